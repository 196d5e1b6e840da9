"""What a file is tried on: fresh values, or those of the example where a model takes no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError, ParityError
from lora_fx.export.onnx import export_onnx
from lora_fx.export.verify import _rows

MARKER = 9


class Captioned(nn.Module):
    """Puts the patches of an image where the text has markers, as many as there are patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.project = nn.Linear(3, 4)

    def forward(self, input_ids: Tensor, patches: Tensor, attention_mask: Tensor) -> Tensor:
        marked = (input_ids == MARKER)[..., None].expand(*input_ids.shape, 4)
        features = self.project(patches)
        if not torch.compiler.is_exporting() and marked.sum() != features.numel():
            raise ValueError("Image features and image tokens do not match")
        text = self.embed(input_ids).masked_scatter(marked, features)
        return text.cumsum(1) * attention_mask[..., None]


def captioned_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[MARKER, MARKER, 1, 2, 3], [4, MARKER, MARKER, 5, 6]])
    return {"input_ids": ids, "patches": torch.randn(2, 2, 3), "attention_mask": torch.ones(2, 5)}


def test_whole_numbers_are_those_of_the_example_where_others_are_refused(tmp_path: Path) -> None:
    report = export_onnx(Captioned(), tmp_path / "m.onnx", captioned_inputs())
    assert report.verified
    assert report.values_tried == (
        "input_ids: rows of the example, since PyTorch refuses fresh values: "
        "Image features and image tokens do not match"
    )
    assert report.values_tried in str(report)
    # At the shapes of the example, of a larger batch of longer texts, and of a smaller one.
    tried = [shapes["input_ids"] for shapes in report.shapes_tried]
    assert tried[0] == (2, 5)
    assert tried[1][0] == 3
    assert len(tried) == 3


def test_fresh_values_need_no_word(tmp_path: Path) -> None:
    report = export_onnx(nn.Linear(4, 4), tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.values_tried == ""


class Masked(nn.Module):
    """Keeps what a mask leaves: as much in each row, as in a masked autoencoder."""

    def forward(self, tokens: Tensor, bool_masked_pos: Tensor) -> Tensor:
        return tokens[~bool_masked_pos].reshape(tokens.shape[0], 2, 3) * 2


def test_masks_are_the_last_to_be_taken_from_the_example(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    dynamic = {"tokens": {0: "batch"}, "bool_masked_pos": {0: "batch"}}
    report = export_onnx(
        Masked(), tmp_path / "m.onnx", (torch.randn(2, 4, 3), mask), dynamic_shapes=dynamic
    )
    assert report.verified
    assert report.values_tried.startswith("bool_masked_pos: rows of the example")


class Particular(nn.Module):
    """Takes the very numbers of the example."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and index[0, 0] != 3:
            raise ValueError("not mine")
        return x + index


def test_a_model_that_takes_nothing_else_at_all_is_refused(tmp_path: Path) -> None:
    example = (torch.randn(2, 2), torch.tensor([[3, 1], [0, 7]]))
    with pytest.raises(ParityError, match=r"refuses fresh values at the shapes.*not mine"):
        export_onnx(Particular(), tmp_path / "m.onnx", example)
    assert not list(tmp_path.iterdir())


def test_rows_are_moved_repeated_cut_and_lengthened() -> None:
    example = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert _rows(example, (2, 3)).tolist() == [[4, 5, 6], [1, 2, 3]]
    assert _rows(example, (3, 5)).tolist() == [[4, 5, 6, 6, 6], [1, 2, 3, 3, 3], [4, 5, 6, 6, 6]]
    assert _rows(example, (1, 2)).tolist() == [[4, 5]]
    assert _rows(torch.tensor(7), ()) == 7


class Counting(nn.Module):
    """Counts its calls, or notes the last one's length, which it never reads."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.fc, self.decides, self.calls, self.length = nn.Linear(3, 3), decides, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.length = len(x.shape)
        return self.fc(x) * (self.calls if self.decides else 1)


def test_a_model_whose_next_call_differs_has_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"writes to self\.calls, and its next call"):
        export_onnx(Counting(decides=True), tmp_path / "m.onnx", torch.randn(2, 3))
    export_onnx(Counting(decides=False), tmp_path / "m.onnx", torch.randn(2, 3))


class CountingInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


def test_a_model_that_counts_in_a_buffer_has_no_file(tmp_path: Path) -> None:
    # Each check ran the model once more, until its count was the one that the file had kept.
    with pytest.raises(ExportError, match=r"writes into the buffer calls, and its next call"):
        export_onnx(CountingInABuffer(), tmp_path / "m.onnx", torch.randn(2, 3))


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        result = self.fc(x) + self.last
        self.last = x.detach().clone()
        return result


def test_a_model_that_remembers_its_inputs_has_no_file(tmp_path: Path) -> None:
    model, x = Remembering(), torch.randn(2, 3)
    model(x)  # now it returns the same for this input each time
    with pytest.raises(ExportError, match="its next call on the same inputs returns other values"):
        export_onnx(model, tmp_path / "m.onnx", x)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("edges", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.edges, self.fc(x))


def test_a_sparse_buffer_that_onnx_lacks_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="sparse"):
        export_onnx(Mixing(), tmp_path / "m.onnx", torch.randn(3, 3))
