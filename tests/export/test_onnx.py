"""Exports of real models, compared on shapes that the export did not see, and every refusal."""

from __future__ import annotations

import errno
import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import ExportError, ParityError
from lora_fx.export.arguments import Arguments, FlatModel
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import trace

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Tied(nn.Module):
    """An embedding whose weight is the output head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.embed(ids)).relu()))


def transformer(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    tiny = dict(TINY)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**tiny))
    if kind == "llama":
        config = transformers.LlamaConfig(**tiny, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def warmed(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Batch-norm statistics other than 0 and 1."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(*inputs)
    return model


def initializers(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    return {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def assert_same(path: Path, model: nn.Module, *inputs: Tensor, tolerance: float = 1e-4) -> None:
    """The file's first output is what the model computes, in eval mode."""
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
    (got, *_) = OnnxSession(path, "cpu").run(inputs).values()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("build", "example", "unseen", "axes"),
    [
        (mlp, (3, 4), (7, 4), ("batch", 4)),
        (conv_net, (1, 3, 32, 32), (5, 3, 40, 24), ("batch", 3, "height", "width")),
    ],
)
def test_model_in_train_mode_is_exported_for_inference_and_left_as_it_was(
    tmp_path: Path,
    build: Callable[[], nn.Module],
    example: tuple[int, ...],
    unseen: tuple[int, ...],
    axes: tuple[int | str, ...],
) -> None:
    model = warmed(build(), torch.randn(4, *example[1:]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(example))

    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "Dropout" not in operators(tmp_path / "m.onnx")
    assert report.verified
    assert report.max_rel_error < 1e-4
    assert report.inputs == {"input": axes}
    assert list(report.fixed_axes) == ["input[1]"]
    assert_same(tmp_path / "m.onnx", model, torch.randn(unseen))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_transformer_runs_on_batches_and_lengths_export_did_not_see(
    tmp_path: Path, kind: str
) -> None:
    model = transformer(kind).train()
    ids = torch.randint(3, 99, (1, 7))
    report = export_onnx(
        model, tmp_path / "m.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    assert model.training
    assert report.inputs["input_ids"] == ("batch", "sequence")
    assert report.max_rel_error < 1e-4
    assert {shapes["input_ids"][0] for shapes in report.shapes_tried} == {1, 2, 3}
    if kind != "bert":
        assert model.config.use_cache  # off in the copy only

    model.eval()
    ids = torch.randint(3, 99, (4, 13))
    mask = (torch.arange(13)[None] < torch.tensor([[13], [9], [5], [1]])).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
    outputs = OnnxSession(tmp_path / "m.onnx", "cpu").run(
        {"input_ids": ids, "attention_mask": mask}
    )
    first = "last_hidden_state" if kind == "bert" else "logits"
    assert next(iter(outputs)) == first
    valid = mask.bool()
    torch.testing.assert_close(outputs[first][valid], expected[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [lambda: transformer("bert"), Tied])
def test_every_matrix_has_its_fully_qualified_name(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    model = build()
    ids = torch.randint(3, 50, (2, 6))
    export_onnx(model, tmp_path / "m.onnx", (ids,))
    stored = initializers(tmp_path / "m.onnx")
    named = dict(model.named_parameters(remove_duplicate=False))
    matrices = {
        name: value for name, value in stored.items() if value.ndim == 2 and value.size > 99
    }
    for name, value in matrices.items():
        weight = named[name].detach().numpy()
        assert np.array_equal(value, weight) or np.array_equal(value, weight.T), name
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "pooler" not in name:
            assert f"{name}.weight" in stored


def test_large_tied_weight_is_stored_once(tmp_path: Path) -> None:
    model = Tied()
    model.embed.weight = model.head.weight = nn.Parameter(torch.randn(20_000, 16))
    model.head.out_features = model.embed.num_embeddings = 20_000
    report = export_onnx(model, tmp_path / "m.onnx", (torch.randint(0, 20_000, (2, 6)),))
    assert report.size_bytes < 1.1 * model.embed.weight.nbytes
    assert "embed.weight" in initializers(tmp_path / "m.onnx")


class Clashing(nn.Module):
    """Parameters called like the input, an output and an operation; outputs that are no results."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(4))
        self.output_0 = nn.Parameter(torch.randn(4))
        self.linear = nn.Parameter(torch.randn(4, 4))
        self.weight = nn.Linear(4, 4)

    def forward(self, x: Tensor, unused: Tensor, factor: float = 2.0) -> tuple[Tensor, ...]:
        z = self.weight(x)
        return z @ self.linear + self.output_0 + self.x * factor, x, z, z, self.linear


def test_clashing_names_and_odd_outputs(tmp_path: Path) -> None:
    model = Clashing()
    report = export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 4), torch.randn(3), 3.0))
    assert list(report.inputs) == ["x", "unused"]
    assert list(report.outputs) == [f"output_{index}" for index in range(5)]
    assert report.baked_arguments == {"factor": "3.0"}
    assert "weight.weight" in initializers(tmp_path / "m.onnx")
    x = torch.randn(6, 4)
    outputs = OnnxSession(tmp_path / "m.onnx", "cpu").run((x, torch.randn(1)))
    for got, expected in zip(outputs.values(), model(x, x, 3.0), strict=True):
        torch.testing.assert_close(got, expected.detach())


class Nested(nn.Module):
    """Lists and dicts of tensors on both sides."""

    def forward(self, pair: list[Tensor], extra: dict[str, Tensor]) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1], "more": [pair[0] * 2, {"a": extra["k"]}], "none": None}


def test_nested_arguments_and_results_are_named_by_their_place(tmp_path: Path) -> None:
    pair = [torch.randn(2, 3), torch.randn(2, 3)]
    example = {"pair": pair, "extra": {"k": torch.randn(2, 1)}}
    report = export_onnx(Nested(), tmp_path / "m.onnx", example)
    assert list(report.inputs) == ["pair_0", "pair_1", "extra.k"]
    assert list(report.outputs) == ["sum", "more_0", "more_1.a"]
    assert "size 1" in report.fixed_axes["extra.k[1]"]


def test_nothing_of_the_build_machine_and_the_metadata_of_the_export(tmp_path: Path) -> None:
    report = export_onnx(transformer("bert"), tmp_path / "m.onnx", (torch.randint(3, 99, (2, 6)),))
    content = (tmp_path / "m.onnx").read_bytes()
    places = [Path.cwd(), Path.home(), Path(sysconfig.get_path("purelib")), tmp_path]
    for place in [*map(str, places), "site-packages", "modeling_bert.py", "pkg.torch.export"]:
        assert place.encode() not in content, place
    model = onnx.load(tmp_path / "m.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["lora_fx.opset"] == "20" == str(model.opset_import[0].version)
    assert metadata["lora_fx.dtype"] == "fp32"
    assert metadata["lora_fx.version"] == report.versions["lora-fx"]
    axes = json.loads(metadata["lora_fx.dynamic_axes"])
    assert axes == {"input_ids": {"0": "batch", "1": "sequence"}}
    scopes = [entry.value for node in model.graph.node for entry in node.metadata_props]
    assert any("encoder.layer.1.attention.self.query" in scope for scope in scopes)
    assert report.axis_limits == {"sequence": 64}
    onnx.checker.check_model(model, full_check=True)


def test_existing_file_is_replaced_unless_force_is_false(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=r"m\.onnx exists.*force=False"):
        export_onnx(mlp(), path, torch.randn(2, 4), force=False)
    assert path.read_bytes() == b"old"
    export_onnx(mlp(), path, torch.randn(2, 4))
    assert OnnxSession(path, "cpu").run(torch.randn(3, 4))["output"].shape == (3, 2)
    with pytest.raises(ExportError, match="folder"):
        export_onnx(mlp(), tmp_path, torch.randn(2, 4), force=True)


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("589824 requested and 431936 written"),  # numpy's words for it
    ],
)
def test_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None, error: OSError
) -> None:
    path = tmp_path / "m.onnx"
    if old is not None:
        path.write_bytes(old)

    def full(model: object, file: os.PathLike[str], **options: object) -> None:
        Path(file).write_bytes(b"half of a mod")
        raise error

    monkeypatch.setattr(onnx_ir, "save", full)
    model = mlp()
    with pytest.raises(ExportError, match=r"disk is full.*m\.onnx, which takes 0\.\d kB") as caught:
        export_onnx(model, path, torch.randn(2, 4), force=True)
    assert isinstance(caught.value.__cause__, OSError)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])
    assert model.training


def test_failed_move_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(mlp(), path, torch.randn(2, 4), external_data_bytes=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".onnx":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ExportError, match=r"Input/output error.*untouched"):
        export_onnx(mlp(), path, torch.randn(2, 4), external_data_bytes=0, force=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_external_data_loads_runs_and_is_replaced_with_its_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = Tied()
    first = export_onnx(model, path, torch.randint(0, 50, (2, 6)), external_data_bytes=1000)
    assert {file.name for file in tmp_path.iterdir()} == set(first.files)
    assert first.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert_same(path, model, torch.randint(0, 50, (3, 9)))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in map(tmp_path.joinpath, first.files):
        (moved / file.name).write_bytes(file.read_bytes())
    assert_same(moved / "m.onnx", model, torch.randint(0, 50, (3, 9)))

    second = export_onnx(
        model, path, torch.randint(0, 50, (2, 6)), external_data_bytes=1000, force=True
    )
    assert not set(second.data_files) & set(first.data_files)
    assert not (tmp_path / first.data_files[0]).exists()
    assert_same(path, model, torch.randint(0, 50, (3, 9)))
    third = export_onnx(model, path, torch.randint(0, 50, (2, 6)), force=True)
    assert third.data_files == ()
    assert [file for file in tmp_path.iterdir() if file.is_file()] == [path]


def test_parity_gate_sees_a_changed_weight_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    save = onnx_ir.save

    def corrupting(model: onnx_ir.Model, file: Path, **options: Any) -> None:
        value = model.graph.initializers["3.bias"]
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(value.const_value.numpy() + np.float32(1e-2))
        save(model, file, **options)

    monkeypatch.setattr(onnx_ir, "save", corrupting)
    with pytest.raises(ParityError, match=r"output 'output'.*1\.00e-02.*input \[2, 4\]"):
        export_onnx(mlp(), path, torch.randn(2, 4), force=True)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
    report = export_onnx(mlp(), path, torch.randn(2, 4), force=True, verify=False)
    assert not report.verified
    assert "verify=False" in report.unverified_reason


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "shape"])
def test_parity_gate_sees_wrong_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float | str
) -> None:
    run = OnnxSession.run

    def distorted(self: OnnxSession, inputs: Any, **options: Any) -> dict[str, Any]:
        outputs = run(self, inputs, **options)
        (value,) = outputs.values()
        if wrong == "shape":
            return {"output": value[:, :1]}
        value[-1, -1] = wrong
        return outputs

    monkeypatch.setattr(OnnxSession, "run", distorted)
    with pytest.raises(ParityError, match="output 'output'"):
        export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_an_axis_on_which_the_file_is_wrong_is_fixed_and_the_report_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = OnnxSession.run

    def late(self: OnnxSession, inputs: Any, **options: Any) -> dict[str, Any]:
        (value,) = run(self, inputs, **options).values()
        return {"output": value if len(value) == 2 else value + 1}

    monkeypatch.setattr(OnnxSession, "run", late)
    with pytest.raises(ParityError, match="output 'output'"):
        export_onnx(
            mlp(), tmp_path / "m.onnx", torch.randn(2, 4), dynamic_shapes={"input": {0: "b"}}
        )
    assert not list(tmp_path.iterdir())
    report = export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert report.verified
    assert report.inputs == {"input": (2, 4)}
    # Two ways failed for one reason, which is said once.
    ways = (
        "with every axis dynamic, with the first axis dynamic: output 'output' of the exported file"
    )
    assert ways in report.fixed_axes["input[0]"]
    assert "fewer dynamic axes" in caplog.text


def test_left_padded_examples_do_not_fail_the_gate(tmp_path: Path) -> None:
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    example = {"input_ids": ids, "attention_mask": mask}
    assert export_onnx(transformer("llama"), tmp_path / "m.onnx", example).verified


def test_half_precision_is_the_half_model_and_the_argument_stays_fp32(tmp_path: Path) -> None:
    model = transformer("llama")
    ids = torch.randint(3, 99, (2, 6))
    report = export_onnx(model, tmp_path / "m.onnx", (ids,), dtype="fp16")
    assert report.dtype == "fp16"
    assert report.verified
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = initializers(tmp_path / "m.onnx")
    assert stored["lm_head.weight"].dtype == np.float16
    assert stored["model.rotary_emb.inv_freq"].dtype == np.float32
    assert operators(tmp_path / "m.onnx")


def test_bf16_says_that_it_could_not_be_compared(tmp_path: Path) -> None:
    model = warmed(conv_net(), torch.randn(4, 3, 16, 16))
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 16, 16), dtype="bf16")
    assert report.opset == 22
    assert "take bf16" in report.opset_reason
    if not report.verified:
        assert "cuda" in report.unverified_reason
        assert "NOT CHECKED" in str(report)
    types = {value.data_type for value in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert types == {onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT64}


def test_given_dynamic_shapes_name_axes_and_fix_the_others(tmp_path: Path) -> None:
    model = Tied()
    ids = torch.randint(0, 50, (2, 6))
    report = export_onnx(model, tmp_path / "m.onnx", ids, dynamic_shapes={"ids": {1: "tokens"}})
    assert report.inputs == {"ids": (2, "tokens")}
    assert report.outputs == {"output": (2, "tokens", 50)}
    assert report.fixed_axes == {"ids[0]": "not in dynamic_shapes"}
    assert_same(tmp_path / "m.onnx", model, torch.randint(0, 50, (2, 11)))
    with pytest.raises(ExportError, match=r"torch\.export cannot capture"):
        export_onnx(mlp(), tmp_path / "n.onnx", torch.randn(2, 4), dynamic_shapes=[{1: "width"}])


def test_falls_back_to_fewer_dynamic_axes_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export = torch.export.export

    def picky(model: nn.Module, args: Any, *, dynamic_shapes: Any, **options: Any) -> Any:
        if dynamic_shapes[0][0][1] is torch.export.Dim.AUTO:
            raise RuntimeError("no guard\nfor this")
        return export(model, args, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(torch.export, "export", picky)
    report = export_onnx(Tied(), tmp_path / "m.onnx", torch.randint(0, 50, (2, 6)))
    assert report.inputs == {"ids": ("batch", 6)}
    assert "no guard" in report.fixed_axes["ids[1]"]
    assert "no guard" in caplog.text


class Choosy(nn.Module):
    """Takes sequences of a multiple of three, which torch.export does not find out."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[1] % 3:
            raise ValueError("the length has to be a multiple of 3")
        return x.cumsum(1)


def test_shapes_that_pytorch_refuses_are_skipped_and_reported(tmp_path: Path) -> None:
    report = export_onnx(Choosy(), tmp_path / "m.onnx", torch.randn(2, 9))
    assert {tuple(shapes["x"]) for shapes in report.shapes_tried} == {(2, 9), (3, 9), (1, 9)}
    assert set(report.shapes_skipped.values()) == {"the length has to be a multiple of 3"}


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), 0.5)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"value": x, "kind": "text"}


@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        (mlp(), torch.randn(2, 4), {"opset": 23}, "23 is refused.*rotary.*batches; use 20, 22 or 24"),
        (mlp(), torch.randn(2, 4), {"opset": 11}, "opset 11 is not supported"),
        (mlp(), torch.randn(2, 4), {"external_data_bytes": -1}, "external_data_bytes=-1: give"),
        (mlp(), torch.randn(2, 4), {"shard_bytes": 0}, "shard_bytes=0: give a number of bytes, 1"),
        (mlp(), torch.randn(2, 4), {"dtype": "int4"}, "'int4' is unknown.*fp16"),
        (mlp(), torch.randn(2, 4), {"adapters": "keep"}, "'keep' is unknown.*'merge'.*'inputs'"),
        (mlp, torch.randn(2, 4), {}, "not a torch.nn.Module"),
        (mlp(), 3, {}, "example_inputs is a int"),
        (mlp(), {}, {}, "no tensor"),
        (mlp(), (torch.randn(2, 4),) * 2, {}, "2 positional arguments.*takes 1: input"),
        (mlp(), torch.randn(2, 5), {}, r"does not run.*input \[2, 5\]"),
        (mlp(), {"inptu": torch.randn(2, 4)}, {}, "does not run.*inptu"),
        (mlp(), torch.randn(2, 4), {"dynamic_shapes": {"x": {}}}, "names 'x'.*inputs are input"),
        (mlp(), torch.randn(2, 4), {"dynamic_shapes": [{5: "b"}]}, r"axis 5 of 'input'.*\[2, 4\]"),
        (mlp(), torch.randn(2, 4), {"dynamic_shapes": 7}, "dict by input name"),
        (mlp(), torch.randn(2, 4), {"dynamic_shapes": [7]}, "dynamic_shapes of 'input' is 7"),
        (Noisy(), torch.randn(2, 4), {}, "random in eval mode.*Dropout"),
        (Odd(), torch.randn(2, 4), {}, "output 'kind'.*str"),
        (mlp().to("meta"), torch.randn(2, 4), {}, "'0.weight' is on the meta device"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    tmp_path: Path, model: nn.Module, inputs: object, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "m.onnx", inputs, **options)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"pip install 'lora-fx\[gpu\]'"):
        export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 4))


def test_uncopyable_member_is_an_export_error(tmp_path: Path) -> None:
    model = mlp()
    model.handle = (item for item in ())  # type: ignore[assignment]
    with pytest.raises(ExportError, match="cannot be copied"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4))


def test_weight_norm_leaves_a_tensor_that_cannot_be_copied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    assert export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4)).verified


@pytest.mark.parametrize("use_dora", [False, True])
def test_rewritten_model_is_merged_first(use_dora: bool, tmp_path: Path) -> None:
    import lora_fx.api
    from lora_fx.config.lora_config import LoraConfig

    model = lora_fx.api.rewrite(
        Tied(),
        LoraConfig(r=4, lora_alpha=8, target_modules=["mix"], lora_dropout=0.5, use_dora=use_dora),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.train()
    export_onnx(model, tmp_path / "m.onnx", torch.randint(0, 50, (2, 6)))
    assert model.training
    assert not any("lora" in name for name in initializers(tmp_path / "m.onnx"))
    assert_same(tmp_path / "m.onnx", model, torch.randint(0, 50, (3, 9)))


@pytest.mark.parametrize("adapters", ["merge", "inputs"])
@pytest.mark.parametrize(
    "around",
    [
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="bf16"),
        pytest.param(lambda: torch.autocast("cpu", torch.float16), id="fp16"),
        pytest.param(torch.inference_mode, id="inference"),
    ],
)
def test_modes_around_the_call_have_no_part_in_the_file(
    tmp_path: Path, around: Callable[[], Any], adapters: Any
) -> None:
    model, x = lora_fx.rewrite(mlp(), lora_fx.LoraConfig(r=2)), torch.randn(2, 4)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.normal_()
    plain = export_onnx(model, tmp_path / "plain.onnx", x, adapters=adapters)
    with around():
        report = export_onnx(model, tmp_path / "m.onnx", x, adapters=adapters)
    assert report.dtype == "fp32"
    assert report.operators == plain.operators
    assert report.max_rel_error < 1e-6
    want, got = (
        [entry.raw_data for entry in onnx.load(tmp_path / name).graph.initializer]
        for name in ("plain.onnx", "m.onnx")
    )
    assert got == want


def test_progress_names_each_stage_as_it_begins(tmp_path: Path) -> None:
    stages: list[str] = []
    report = export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 4), progress=stages.append)
    assert stages == list(report.seconds)
    assert stages[0] == "capturing the model"
    assert stages[-1] == "moving into place"


def test_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(mlp(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "opset", [24, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (18, 19, 21, 22))]
)
def test_other_opsets(tmp_path: Path, opset: int) -> None:
    ids = torch.randint(3, 99, (2, 6))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    report = export_onnx(transformer("llama"), tmp_path / "m.onnx", example, opset=opset)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset
    assert report.opset_reason == "asked for"
    assert report.max_rel_error < 1e-5
    assert {shapes["input_ids"][0] for shapes in report.shapes_tried} == {1, 2, 3}
    assert len({shapes["input_ids"][1] for shapes in report.shapes_tried}) == 3


@pytest.mark.slow
def test_why_opset_23_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # When this fails, torch.onnx has been mended, and the refusal can go.
    monkeypatch.setattr("lora_fx.export.onnx._check_arguments", lambda *_: None)
    example = {"input_ids": torch.randint(3, 99, (2, 6))}
    report = export_onnx(transformer("llama"), tmp_path / "m.onnx", example, opset=23)
    assert "RotaryEmbedding" in report.fixed_axes["input_ids[1]"]


@pytest.mark.slow
def test_encoder_decoder_has_two_sequence_axes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.randint(3, 99, (2, 7))
    example = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :5],
    }
    report = export_onnx(
        transformers.T5ForConditionalGeneration(config), tmp_path / "m.onnx", example
    )
    assert report.inputs["input_ids"][1] != report.inputs["decoder_input_ids"][1]
    assert report.max_rel_error < 1e-4


class Windows(nn.Module):
    """Pads to whole windows and back, stage after stage, as DaViT and Twins do."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            high, wide = x.shape[2], x.shape[3]
            x = nn.functional.pad(x, (0, (7 - wide % 7) % 7, 0, (7 - high % 7) % 7))
            cut = x.unflatten(2, (x.shape[2] // 7, 7)).unflatten(4, (x.shape[3] // 7, 7))
            x = (cut - cut.mean((3, 5), keepdim=True)).flatten(4, 5).flatten(2, 3)
            x = nn.functional.pad(conv(x[:, :, :high, :wide]), (0, x.shape[3] % 4, 0, 0))
        return x


class Positions(nn.Module):
    """Its table ends: what is asked of the size is a limit, in other words than ``length <= 33``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(34, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if 2 * (x.shape[1] + 1) > 2 * self.table.shape[0]:
            return x
        return x + self.table[: x.shape[1]]


def test_a_limit_in_any_linear_form_is_one(tmp_path: Path) -> None:
    report = export_onnx(Positions(), tmp_path / "m.onnx", torch.randn(2, 5, 4))
    assert report.dynamic_axes == {"x": {0: "batch", 1: "sequence"}}
    assert report.axis_limits == {"sequence": 33}


class Asking(nn.Module):
    """Asks of a size, and goes on for long; the size may turn out to be fixed right after that."""

    steps: ClassVar[list[int]] = []  # of each forward; torch.export resets what a module holds

    def __init__(self, *, settled: bool) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(3, 16)) if settled else None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.steps.append(0)
        if x.shape[2] % 8 == 0:
            x = x * 2
        if self.place is not None:
            x = x + self.place
        for _ in range(400):
            self.steps[-1] += 1
            x = x + 1
        return x, y + 1


@pytest.mark.parametrize("settled", [False, True])
def test_a_trace_that_asks_what_no_file_can_ends_early(settled: bool) -> None:
    model = Asking(settled=settled).eval()
    model.steps.clear()
    inputs = torch.randn(2, 3, 16), torch.randn(5, 7)
    found = trace(FlatModel(model, Arguments.of(model, inputs)), Arguments.of(model, inputs))
    assert found is not None
    axes = found.dynamic_axes()
    assert model.steps[-1] == 400
    if settled:
        assert model.steps[0] == 400
        assert [sorted(one) for one in axes.values()] == [[0], [0, 1]]
        return
    assert model.steps[0] < 200
    assert [sorted(one) for one in axes.values()] == [[0], [0]]
    reasons = [axis.reason for axis in (*found.axes[0][1:], found.axes[1][1])]
    assert all("asks of its sizes whether Eq(s" in one for one in reasons), reasons


def test_reasoning_about_sizes_has_a_budget(tmp_path: Path) -> None:
    """Fewer axes are dynamic then, and the report says which and why."""
    report = lora_fx.export_onnx(Windows(), tmp_path / "m.onnx", torch.randn(2, 3, 16, 18))
    assert report.dynamic_axes == {"x": {0: "batch"}}
    assert "becomes a formula of" in report.fixed_axes["x[3]"]
    assert "Windows" in report.fixed_axes["x[3]"] or "test_onnx.py" in report.fixed_axes["x[3]"]
