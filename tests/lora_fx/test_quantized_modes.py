"""Adapters over quantized bases: compiled, checkpointed, in half precision, trained by the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import lora_fx
from lora_fx.formats import dense, quantization_of, quantized_linear
from tests.quantized import IDS, SCHEMES, llama, quantized

pytestmark = pytest.mark.filterwarnings("ignore:.*(is|enable|disable|gradient)_checkpointing")

BITS_4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)


def adapted(base: nn.Module, **fields: Any) -> Any:
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, **fields)
    return lora_fx.rewrite(base, config).train()


def step(model: nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {
        name.removeprefix("_orig_mod."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return grads | {"loss": loss.detach()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


class Loss(nn.Module):
    """The loss alone: a compiled graph returns tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 128)
        self.out = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean square of the output."""
        return self.out(torch.relu(self.fc(x))).square().mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_compiles_as_one_graph(scheme: str, training: bool) -> None:
    torch._dynamo.reset()
    model = adapted(quantized(Loss(), scheme), target_modules=["fc", "out"]).train(training)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = []
    for one in (model, compiled):
        model.zero_grad()
        loss = one(x)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        seen.append(grads | {"loss": loss.detach()})
    assert len(seen[0]) == 5
    assert_same(seen[1], seen[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scheme", ["nf4 double", "int8 bitsandbytes", "int8 torchao"])
def test_checkpointing_gives_the_same_gradients(scheme: str, reentrant: bool) -> None:
    model = adapted(quantized(llama(1), scheme))
    inputs = {"input_ids": IDS, "labels": IDS}
    expected = step(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(step(model, **inputs), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_casts_what_is_not_quantized(scheme: str) -> None:
    model = adapted(quantized(llama(1), scheme))
    stored = {n: dense(p).clone() for n, p in model.named_parameters() if quantization_of(p)}
    with torch.no_grad():
        expected = model(IDS).logits
    model.to(torch.bfloat16)
    found = model(IDS).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.detach().float(), expected, atol=0.03, rtol=0)
    for name, values in stored.items():
        now = dense(model.get_parameter(name), torch.float32)
        torch.testing.assert_close(now, values, atol=1e-3, rtol=1e-2)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if ".lora_" in n)
    found.float().square().mean().backward()
    assert all(p.grad is not None for p in lora_fx.trainable_parameters(model))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "int4 torchao"])
def test_double_precision_computes_the_same(scheme: str) -> None:
    model = adapted(quantized(llama(1), scheme))
    expected = step(model, input_ids=IDS, labels=IDS)
    found = step(model.to(torch.float64), input_ids=IDS, labels=IDS)
    assert {g.dtype for n, g in found.items() if n != "loss"} == {torch.float64}
    assert_same({n: g.float() for n, g in found.items()}, expected)


@pytest.mark.parametrize("scheme", ["nf4", "nf4 torchao"])
def test_double_precision_keeps_no_values(scheme: str) -> None:
    base = quantized(Loss(), scheme)
    model = adapted(base, target_modules=["fc", "out"]).to(torch.float64)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t if t.is_floating_point() else t, lambda t: t
    ):
        model(torch.randn(3, 64).double())
    assert kept
    assert not {(64, 128), (128, 64)} & set(kept)


def test_bitsandbytes_computes_in_double_precision_if_told_so() -> None:
    weight = quantized(nn.ModuleList([nn.Linear(64, 32)]), "nf4").get_parameter("0.weight")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).double()
    exact = x @ dense(weight, torch.float64).T
    for given in (x, x.float()):
        found = quantized_linear(given, weight, compute_dtype=torch.float64)
        assert found.dtype == given.dtype
        torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_is_the_same_as_a_cast(scheme: str) -> None:
    model = adapted(quantized(llama(1), scheme))
    expected = step(model, input_ids=IDS, labels=IDS)
    found = step(model.half(), input_ids=IDS, labels=IDS)
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 0.02, name


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_of_samples_have_gradients(scheme: str, optimize: bool) -> None:
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False)
    model: Any = lora_fx.rewrite(quantized(llama(1), scheme), config, optimize=optimize).train()
    lora_fx.add_adapter(model, config, "b")
    expected = {}
    for row, name in enumerate(("b", "default")):
        lora_fx.set_adapter(model, name)
        expected[row] = model(IDS[row : row + 1]).logits
    lora_fx.set_adapter(model, ["default", "b"])
    with lora_fx.adapter_ids(model, ["b", "default"]):
        found = model(IDS).logits
    found.square().mean().backward()
    for row, value in expected.items():
        torch.testing.assert_close(found[row : row + 1], value, atol=1e-5, rtol=1e-4)
    assert all(p.grad.abs().max() > 0 for p in lora_fx.trainable_parameters(model))


@pytest.mark.parametrize("scheme", ["nf4", "int8 bitsandbytes", "int8 torchao", "int4 torchao"])
def test_autocast_trains(scheme: str) -> None:
    model = adapted(quantized(llama(1), scheme))
    expected = step(model, input_ids=IDS, labels=IDS)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, input_ids=IDS, labels=IDS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 0.05, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llama")
    llama(1).save_pretrained(found)
    return found


def configs() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        "nf4": BITS_4,
        "int8 bitsandbytes": BitsAndBytesConfig(load_in_8bit=True),
        "int8 torchao": TorchAoConfig(Int8WeightOnlyConfig()),
    }


@pytest.mark.parametrize("scheme", ["nf4", "int8 bitsandbytes", "int8 torchao"])
def test_the_trainer_trains_what_transformers_quantized(
    scheme: str, folder: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configs()[scheme])
    model = adapted(base)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base, arguments, train_dataset=data)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert float(losses[-1]) < float(losses[0])
    assert base.is_quantized
    assert lora_fx.merge(model, requantize=True).is_quantized
    lora_fx.save_adapter(model, tmp_path / "adapter")
    again = lora_fx.load_adapter(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_a_base_whose_weights_a_call_has_packed(folder: Path) -> None:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS_4)

    base = load().eval()
    with torch.no_grad():
        before = base(IDS).logits
    packed = [p for p in base.parameters() if type(p).__name__ == "Params4bit"]
    # Whether this processor has the kernel: then the base is packed, and stays so.
    states = [bool(getattr(p.quant_state, "packing_format_for_cpu", False)) for p in packed]
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4)).eval()
    assert len(lora_fx.plan(load(), lora_fx.LoraConfig(r=4)).sites) == 7
    fresh = lora_fx.rewrite(load(), lora_fx.LoraConfig(r=4)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, fresh(IDS).logits, atol=0.02, rtol=0)
        torch.testing.assert_close(model(IDS).logits, before, atol=0.02, rtol=0)
        assert torch.equal(base(IDS).logits, before)
    assert states == [bool(getattr(p.quant_state, "packing_format_for_cpu", False)) for p in packed]
    merged = lora_fx.merge(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
