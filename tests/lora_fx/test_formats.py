"""The protocol of weight formats: what is registered, and that nobody else knows a library."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.formats import (
    STANDARD_OPERATORS,
    PackedFormat,
    WeightFormat,
    base,
    dense,
    format_of,
    formats,
    operator_named,
    pack_integers,
    quantization_of,
    stack_matrices,
    storage,
)
from lora_fx.ir import NoOperator, OnnxOperator, OnnxWeight, Quantization
from tests.docs.pages import blocks

ROOT = Path(__file__).resolve().parents[2]
# Where a library of quantized weights is more than a word in a docstring.
KNOW_A_LIBRARY = {
    "lora_fx/formats/bitsandbytes.py",
    "lora_fx/formats/compressed_tensors.py",
    "lora_fx/formats/finegrained_fp8.py",
    "lora_fx/formats/gptqmodel.py",
    "lora_fx/formats/hqq.py",
    "lora_fx/formats/torchao.py",
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes off what a test registers."""
    monkeypatch.setattr(base, "_formats", base._formats)
    monkeypatch.setattr(base, "_by_class", base._by_class)


@pytest.fixture
def example(registered: None) -> Iterator[ModuleType]:
    """The format of the example, registered."""
    spec = importlib.util.spec_from_file_location(
        "custom_format", ROOT / "examples/custom_format.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_format"] = module
    spec.loader.exec_module(module)
    lora_fx.register_format(module.RowFormat())
    yield module
    del sys.modules["custom_format"]


@pytest.fixture
def guide(registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library and the format of docs/guides/formats.md, registered."""
    page = (ROOT / "docs/guides/formats.md").read_text(encoding="utf-8")
    library, form = [block.text for block in blocks(page) if block.language == "python"][:2]
    (tmp_path / "mylib.py").write_text(library + form, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("mylib")
    del sys.modules["mylib"]


def two_layers(guide: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(guide.MyLinear(nn.Linear(64, 32)), nn.Tanh(), nn.Linear(32, 4))


class Odd(WeightFormat):
    library = "odd"
    classes = frozenset({"OddTensor"})

    def describe(self, weight: Any) -> Quantization | None:
        return None

    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


def test_what_is_no_format_is_refused(registered: None) -> None:
    class Nameless(WeightFormat):
        describe, values = Odd.describe, Odd.values

    with pytest.raises(lora_fx.ConfigError, match="lacks library, classes"):
        lora_fx.register_format(Nameless())
    with pytest.raises(lora_fx.ConfigError, match=r"subclass lora_fx\.formats\.WeightFormat"):
        lora_fx.register_format(object())  # type: ignore[arg-type]
    assert [one.library for one in formats()] == [
        "bitsandbytes",
        "torchao",
        "transformers",
        "compressed-tensors",
        "transformers",
        "lora_fx",
        "gptqmodel",
        "hqq",
    ]


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ({"names": ("q", "int4")}, "'int4' is registered already, by torchao"),
        ({"classes": frozenset({"Params4bit"})}, "Params4bit are bitsandbytes's already"),
        ({"operators": (OnnxOperator("MatMulBnb4", lambda build, product: None),)}, "MatMulBnb4"),
        ({"operators": (OnnxOperator("MatMulNBits", lambda build, product: None),)}, "MatMulNBits"),
    ],
    ids=["name", "class", "operator", "standard operator"],
)
def test_what_is_taken_is_refused(taken: dict[str, Any], message: str, registered: None) -> None:
    with pytest.raises(lora_fx.ConfigError, match=re.escape(message)):
        lora_fx.register_format(type("Taking", (Odd,), taken)())


def test_a_format_that_only_reads_makes_nothing(registered: None) -> None:
    class Reads(Odd):
        names = ("odd",)

    lora_fx.register_format(Reads())
    with pytest.raises(lora_fx.QuantizationError, match="odd makes no weight in 'odd'"):
        lora_fx.quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "odd")


def test_it_takes_no_argument_that_it_does_not_name(example: ModuleType) -> None:
    with pytest.raises(
        lora_fx.QuantizationError, match="block_size=32 means nothing for 'my_int8'"
    ):
        lora_fx.quantize(example.Net(), "my_int8", block_size=32)
    with pytest.raises(lora_fx.QuantizationError, match=r"use nf4, fp4, int8, int4, .*, my_int8"):
        lora_fx.quantize(example.Net(), "my_int9")


def test_bytes_are_those_that_it_takes(example: ModuleType) -> None:
    plan = lora_fx.plan_quantization(example.Net(), "my_int8")
    result = lora_fx.quantize(example.Net(), "my_int8")
    weights: list[Any] = [p for p in result.parameters() if quantization_of(p) is not None]
    assert plan.bytes == sum(w.codes.nbytes + w.scales.nbytes for w in weights)
    assert len(plan) == len(weights) == 3


def test_every_part_has_the_values_of_the_weight(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = lora_fx.quantize(example.Net(), "my_int8")
    x = torch.randn(5, 32)
    config = lora_fx.LoraConfig(r=2, init_lora_weights=False)
    adapted = lora_fx.rewrite(model, config)
    known = format_of(adapted.up.weight)
    assert known is not None
    assert known.library == "example"
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(twin(x), adapted(x), rtol=0, atol=0)
    merged = lora_fx.merge(adapted)
    assert not any(quantization_of(parameter) for parameter in merged.parameters())
    assert not merged.up._load_state_dict_pre_hooks
    torch.testing.assert_close(merged(x), adapted(x))
    again = lora_fx.merge(adapted, requantize=True)
    weight, exact = again.up.weight, merged.up.weight
    # Half a step of the row's scale, and what fp32 rounds.
    limit = exact.abs().amax(1, keepdim=True) / 127 * 0.5001
    assert bool(((dense(weight) - exact).abs() <= limit).all())


def test_gradients_are_those_of_the_values(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = lora_fx.quantize(example.Net(), "my_int8")
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, init_lora_weights=False))
    x = torch.randn(5, 32, requires_grad=True)
    (found,) = torch.autograd.grad(adapted(x).square().sum(), x)
    merged = lora_fx.merge(adapted)
    (wanted,) = torch.autograd.grad(merged(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_state_dict_of_another_format_is_refused(example: ModuleType) -> None:
    model = lora_fx.quantize(example.Net(), "my_int8")
    with pytest.raises(RuntimeError, match=r"up\.weight is stored as my_int8 .* has its values"):
        model.load_state_dict(example.Net().state_dict())


def test_a_state_dict_has_the_parts_by_the_name_of_the_weight(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = lora_fx.quantize(example.Net(), "my_int8")
    state = model.state_dict()
    assert {"up.codes", "up.scales", "mix_codes", "mix_scales"} < state.keys()
    assert not {"up.weight", "mix"} & state.keys()
    other = lora_fx.quantize(example.Net(), "my_int8")
    other.load_state_dict(state)
    x = torch.randn(5, 32)
    assert torch.equal(other(x), model(x))


# --- a library with layers of its own -----------------------------------------------------------------


def test_a_layer_becomes_linear_over_the_same_memory(guide: Any) -> None:
    model = two_layers(guide)
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 64)
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["0"]))
    layer: Any = adapted[0]
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert not hasattr(layer, "group")
    assert {n: t.data_ptr() for n, t in layer._parameters["weight"].parts.items()} == {
        name: getattr(model[0], name).data_ptr() for name in ("packed", "scales", "zeros")
    }
    assert torch.equal(adapted(x), model(x))
    assert type(model[0]) is guide.MyLinear
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_library_loads_what_a_merge_has_packed(guide: Any) -> None:
    model = two_layers(guide)
    config = lora_fx.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    again = lora_fx.merge(lora_fx.rewrite(model, config), requantize=True)
    model.load_state_dict(again.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(model(x), again(x))


def test_scales_in_half_precision_are_not_rounded_in_a_file(guide: Any, tmp_path: Path) -> None:
    layer = guide.MyLinear(nn.Linear(64, 32, bias=False))
    layer.scales = layer.scales.half()
    adapted = lora_fx.rewrite(nn.Sequential(layer), lora_fx.LoraConfig(r=2, target_modules=["0"]))
    lora_fx.export_onnx(adapted, tmp_path / "model.onnx", torch.eye(64))
    (output,) = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu").run([torch.eye(64)]).values()
    exact = guide.dequantize(layer.packed, layer.scales.double(), layer.zeros)
    torch.testing.assert_close(output.double(), exact.T, rtol=1e-6, atol=0)


def test_layers_in_other_forms_are_refused_with_their_reason(
    guide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = two_layers(guide), lora_fx.LoraConfig(r=2, target_modules=["0"])
    monkeypatch.setattr(guide.MyLayers, "parts", lambda self, layer: None)
    with pytest.raises(lora_fx.LoraFxError, match=r"it is quantized \(mylib\.MyLinear\): adapt"):
        lora_fx.rewrite(model, config)
    monkeypatch.setattr(guide.MyLayers, "objection", lambda self, layer, named: f"{named} turns x")
    with pytest.raises(lora_fx.LoraFxError, match=r"mylib\.MyLinear turns x"):
        lora_fx.rewrite(model, config)


def test_a_block_size_is_one_of_the_format_s(guide: Any) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 4))
    with pytest.raises(
        lora_fx.QuantizationError, match="block_size=16: 'my_int4' takes 32, 64, 128"
    ):
        lora_fx.quantize(model, "my_int4", block_size=16)
    with pytest.raises(lora_fx.QuantizationError, match="double=True means nothing for 'my_int4'"):
        lora_fx.quantize(model, "my_int4", double=True)
    reason = "blocks of 64 do not divide its rows of 96 values: block_size=32 does"
    with pytest.raises(lora_fx.QuantizationError, match=reason):
        lora_fx.quantize(model, "my_int4", block_size=64)
    (planned,) = lora_fx.plan_quantization(model, "my_int4").weights
    assert planned.bytes == 64 * (96 // 2 + 3 * (4 + 1))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("onnx_weight", "'0.weight' is stored as my_int4 .* its format names no operator of ONNX"),
        ("pack", "mylib makes no weight in 'my_int4'"),
    ],
)
def test_a_missing_member_is_named(
    guide: Any, member: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(guide.MyFormat, member)
    config = lora_fx.LoraConfig(r=2, target_modules=["0"])
    adapted = lora_fx.rewrite(two_layers(guide), config)
    needing: dict[str, Callable[[], Any]] = {
        "pack": lambda: lora_fx.merge(adapted, requantize=True),
        "onnx_weight": lambda: lora_fx.export_onnx(adapted, tmp_path / "m.onnx", torch.eye(64)),
    }
    with pytest.raises(lora_fx.LoraFxError, match=message):
        needing[member]()


def test_a_packed_format_needs_its_tensor(registered: None) -> None:
    class Bare(PackedFormat):
        library = "bare"
        describe, decode = Odd.describe, Odd.values  # type: ignore[assignment]

    with pytest.raises(lora_fx.ConfigError, match="it lacks tensor"):
        lora_fx.register_format(Bare())


# --- integers of an ONNX file -------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (3, 16), (8, 32), (4, 8)])
def test_integers_with_and_without_a_sign_are_the_same_arrays(bits: int, block: int) -> None:
    middle = 1 << (3 if bits <= 4 else 7)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (6, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1 << bits, (6, 64 // block), generator=generator)
    scales = torch.rand(zeros.shape, generator=generator)
    signed = (codes.short() - middle).to(torch.int8)
    unsigned = pack_integers(codes, scales, zeros, block, bits)
    other = pack_integers(signed, scales, zeros - middle, block, bits)
    assert isinstance(unsigned, OnnxWeight)
    assert isinstance(other, OnnxWeight)
    assert torch.equal(unsigned.codes, other.codes)
    assert unsigned.zeros is not None
    assert other.zeros is not None
    assert torch.equal(unsigned.zeros, other.zeros)
    assert unsigned.operator == other.operator


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_file_has_zero_points_that_no_code_has(guide: Any, dtype: str, tmp_path: Path) -> None:
    layer = guide.MyLinear(nn.Linear(96, 32, bias=False))
    layer.zeros = layer.zeros.float() + torch.rand(layer.zeros.shape) / 8
    layer.zeros[:3] = torch.tensor([[7.5], [16.25], [-3]])
    adapted = lora_fx.rewrite(nn.Sequential(layer), lora_fx.LoraConfig(r=2, target_modules=["0"]))
    path = tmp_path / "model.onnx"
    report = lora_fx.export_onnx(adapted, path, torch.eye(96), dtype=dtype)
    assert [stored.operator for stored in report.quantized] == ["MatMulNBits"]
    x = torch.eye(96, dtype=torch.float32 if dtype == "fp32" else torch.float16)
    (output,) = lora_fx.OnnxSession(path, "cpu").run([x]).values()
    exact = guide.dequantize(layer.packed, layer.scales, layer.zeros).T
    limit = {"fp32": 1e-6, "fp16": 2e-3}[dtype]
    assert float((output.float() - exact).norm() / exact.norm()) < limit


@pytest.mark.parametrize(
    ("zero", "block", "bits", "reason"),
    [
        (7.5, 8, 4, "zero points that are no integers of 4 bits"),
        (7.5, 32, 8, "zero points that are no integers of 8 bits"),
        (-1.0, 32, 8, "zero points that are no integers of 8 bits"),
        (0.0, 48, 8, "blocks of 48, which do not divide its rows of 64 values"),
    ],
)
def test_integers_that_no_operator_has_are_refused(
    zero: float, block: int, bits: int, reason: str
) -> None:
    scales = torch.ones(6, -(-64 // block))
    codes = torch.zeros(6, 64, dtype=torch.uint8)
    refusal = pack_integers(codes, scales, torch.full_like(scales, zero), block, bits)
    assert isinstance(refusal, NoOperator)
    assert reason in refusal.reason


@pytest.mark.parametrize("name", ["int4", "int8", "nf4"])
def test_stacks_of_one_format_have_their_own_sizes(name: str) -> None:
    for width in (64, 128):
        stack = stack_matrices(torch.randn(2, 32, width), storage(name), "w", turned=False)
        quantization = quantization_of(stack)
        assert quantization is not None
        assert quantization.shape == (32, width)


def test_an_operator_is_found_by_its_name() -> None:
    names = {one.name for one in STANDARD_OPERATORS} | {"MatMulBnb4"}
    assert {operator_named(name).name for name in names} == names


def test_settings_are_saved_with_the_parts_and_compared(
    guide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = lambda self, weight: {"group": torch.tensor(weight.options)}  # noqa: E731
    monkeypatch.setattr(guide.MyFormat, "saved_settings", settings)
    model: Any = lora_fx.rewrite(two_layers(guide), lora_fx.LoraConfig(r=4, target_modules=["0"]))
    state = model.state_dict()
    assert state["0.group"] == 32
    model.load_state_dict(state)
    model.load_state_dict({key: t for key, t in state.items() if key != "0.group"})
    with pytest.raises(RuntimeError, match=r"0.weight is stored with group: 32 here, .* has 16"):
        model.load_state_dict({**state, "0.group": torch.tensor(16)})


def test_parts_may_have_the_dtype_of_the_layer(guide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = guide.MyLayers.parts

    def with_dtype(self: Any, layer: nn.Module) -> Any:
        result = parts(self, layer)
        return result and dataclasses.replace(result, dtype=torch.float16)

    config = lora_fx.LoraConfig(r=4, target_modules=["0"])
    assert (
        lora_fx.rewrite(two_layers(guide), config)[0]._parameters["weight"].dtype == torch.float32
    )  # type: ignore[index]
    monkeypatch.setattr(guide.MyLayers, "parts", with_dtype)
    layer: Any = lora_fx.rewrite(two_layers(guide), config)[0]  # type: ignore[index]
    assert layer._parameters["weight"].dtype == layer.bias.dtype == torch.float16


@pytest.mark.parametrize("name", ["shape", "data", "options"])
def test_a_part_cannot_have_the_name_of_an_attribute_of_tensors(name: str, guide: Any) -> None:
    tensors = {**guide.quantize(torch.randn(4, 32), 32), name: torch.zeros(1)}
    with pytest.raises(lora_fx.ConfigError, match=f"MyTensor: a part cannot be named '{name}'"):
        guide.MyTensor(guide.Parts(tensors, (4, 32), 32), torch.float32)


def test_only_a_library_s_file_knows_it() -> None:
    told = re.compile(
        r"""(Params4bit|Int8Params|Int8Tensor|Int4Tensor|NF4Tensor|IntxUnpacked|Linear4bit|Linear8bitLt|FP8Linear
        |"compressed_tensors[."]|f"compressed_tensors\.|quantization_scheme|"gptqmodel[."]|"hqq[."]
        |import\ (bitsandbytes|torchao)|sys\.modules(\.get)?[\[(]"(bitsandbytes|torchao)
        |library\ ==|"(nf4|fp4|bitsandbytes\.|torchao\.)")""",
        re.VERBOSE,
    )
    found = set()
    for folder in ("lora_fx", "passes", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            code = re.sub(r'"""[\s\S]*?"""', "", path.read_text(encoding="utf-8"))
            if told.search(re.sub(r"#.*", "", code)):
                found.add(str(path.relative_to(ROOT)))
    assert found == KNOW_A_LIBRARY
