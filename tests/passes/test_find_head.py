from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_fx.passes.capture.auto import capture
from lora_fx.passes.match.find_operations import match
from lora_fx.passes.match.marks import find_head
from tests.golden import check_golden
from tests.zoo import TIMM, TORCHVISION, TRANSFORMERS, Block, LlamaShapes, Mlp, Residual, Shared


def heads(model: nn.Module) -> dict[str, str]:
    captured = capture(model)
    return {s.name: s.head for s in find_head(captured, match(captured)).sites if s.head}


@pytest.mark.parametrize("build", [Residual, Shared])
def test_the_last_linear_operation_is_the_head(build) -> None:
    assert heads(build()) == {"head": "found"}


def test_what_comes_after_it_does_not_hide_it() -> None:
    class Scaled(Mlp):
        def forward(self, x):
            return torch.log_softmax(super().forward(x) * 2.0, -1)

    assert heads(Scaled()) == {"second": "found"}


def test_every_output_has_a_head() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.left = nn.Linear(4, 2)
            self.right = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.body(x))
            return {"left": self.left(x), "right": self.right(x)}

    assert heads(TwoHeads()) == {"left": "found", "right": "found"}


def test_a_layer_with_a_residual_around_it_is_not_the_head() -> None:
    assert heads(Block()) == {}


def test_the_last_layer_of_a_repeated_block_is_a_layer_like_the_others() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    assert heads(nn.Sequential(Plain(), Plain())) == {}
    assert heads(nn.Sequential(Plain(), nn.Linear(4, 2))) == {"1": "found"}


def test_a_head_inside_a_module_is_found() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(6, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.dense(x)))

    assert heads(nn.Sequential(Block(), Block(), Classifier())) == {"2.out": "found"}


def test_a_model_that_names_its_head_is_believed() -> None:
    class Declares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 9)
            self.after = nn.Linear(9, 9)

        def forward(self, x):
            return self.after(self.lm_head(x))

        def get_output_embeddings(self):
            return self.lm_head

    assert heads(Declares()) == {"lm_head": "declared"}


def test_a_declaration_that_fails_declares_nothing() -> None:
    class Fails(Mlp):
        def get_output_embeddings(self):
            raise NotImplementedError

    assert heads(Fails()) == {"second": "found"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"lm_head": "declared"}),
        ("gpt2", {"lm_head": "declared"}),
        ("t5", {"lm_head": "declared"}),
        ("whisper", {"proj_out": "declared"}),
        ("mixtral", {"lm_head": "declared"}),
        ("bert", {"classifier": "found"}),
        ("vit", {"classifier": "found"}),
    ],
)
def test_heads_of_transformers(name: str, expected: dict[str, str]) -> None:
    model, _ = TRANSFORMERS[name]()
    assert heads(model) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (TORCHVISION["resnet18"], "fc"),
        (TORCHVISION["vit_b_16"], "heads.head"),
        (TIMM["vit"], "head"),
        (TIMM["convnext"], "head.fc"),
        (TIMM["efficientnet"], "classifier"),
    ],
)
def test_heads_of_image_models(model, expected: str) -> None:
    with torch.device("meta"):
        assert set(heads(model()[0])) == {expected}


def test_nothing_is_modified_where_there_is_no_head() -> None:
    captured = capture(Block())
    found = match(captured)
    assert find_head(captured, found) == found


def test_finding_twice_finds_the_same() -> None:
    captured = capture(Residual())
    once = find_head(captured, match(captured))
    assert find_head(captured, once) == once


def test_golden() -> None:
    captured = capture(LlamaShapes(2))
    found = find_head(captured, match(captured))
    check_golden("find_head_llama", "".join(f"{s.name}: {s.head or '-'}\n" for s in found.sites))
