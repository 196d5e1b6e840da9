"""The protocol of weight formats: what is registered, and that nobody else knows a library."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.formats import (
    STANDARD_OPERATORS,
    WeightFormat,
    base,
    format_of,
    formats,
    operator_named,
    quantization_of,
    stack_matrices,
    storage,
)
from lora_fx.ir import OnnxOperator, Quantization

ROOT = Path(__file__).resolve().parents[2]
# Where a library of quantized weights is more than a word in a docstring.
KNOW_A_LIBRARY = {
    "lora_fx/formats/bitsandbytes.py",
    "lora_fx/formats/compressed_tensors.py",
    "lora_fx/formats/finegrained_fp8.py",
    "lora_fx/formats/gptqmodel.py",
    "lora_fx/formats/torchao.py",
}


@pytest.fixture
def registered() -> Iterator[None]:
    """Takes off what a test registers."""
    before, by_class = base._formats, dict(base._by_class)
    yield
    base._formats = before
    base._by_class.clear()
    base._by_class.update(by_class)


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
    with pytest.raises(lora_fx.QuantizationError, match="use nf4, fp4, int8, int4, my_int8"):
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
    assert bool(((weight.values(torch.float32) - exact).abs() <= limit).all())


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


def test_only_a_library_s_file_knows_it() -> None:
    told = re.compile(
        r"""(Params4bit|Int8Params|Int8Tensor|Int4Tensor|NF4Tensor|IntxUnpacked|Linear4bit|Linear8bitLt|FP8Linear
        |"compressed_tensors[."]|f"compressed_tensors\.|quantization_scheme|"gptqmodel[."]
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
