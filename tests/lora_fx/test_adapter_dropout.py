"""The dropout of adapters is a module: what walks over modules, sets ``p`` or ends training reaches it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import CaptureError, ConfigError, LoraConfig
from lora_fx.runtime.kernels.masks import draw, dropped, kept, recovery, unpacked
from tests.algebra import randomize
from tests.mixtures import mixtral
from tests.numerics import assert_close, assert_same_bits, tensors
from tests.quantized import quantized
from tests.zoo import Einsum, Mlp, Residual, Tied, seeded, tiny_llama

P = 0.5


def disable_dropout(model: nn.Module) -> None:
    """As TRL's ``disable_dropout_in_model`` is written."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [one for name, one in model.named_modules() if ".lora_dropout." in f".{name}"]  # type: ignore[misc]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


def _layer(make: Callable[[], nn.Module], *shape: int) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (nn.Sequential(make()), torch.randn(*shape))


def _ids(model: nn.Module) -> tuple[nn.Module, Any]:
    return model, torch.arange(12).view(2, 6) % 11


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], dict[str, Any]]] = {
    "linear": (_layer(lambda: nn.Linear(8, 8), 3, 8), {}),
    "bias on B": (_layer(lambda: nn.Linear(8, 8), 3, 8), {"lora_bias": True}),
    "DoRA": (_layer(lambda: nn.Linear(8, 8), 3, 8), {"use_dora": True}),
    "conv": (_layer(lambda: nn.Conv2d(4, 4, 3), 2, 4, 6, 6), {}),
    "conv, DoRA": (_layer(lambda: nn.Conv2d(4, 4, 3), 2, 4, 6, 6), {"use_dora": True}),
    "einsum": (
        lambda: (Einsum("bi,oi->bo", 6, 8), torch.randn(3, 8)),
        {"target_modules": ["kernel"]},
    ),
    "attention": (lambda: (Attention(), torch.randn(2, 3, 8)), {"target_modules": ["inner"]}),
    "quantized": (
        lambda: (quantized(nn.Sequential(nn.Linear(64, 64)), "nf4"), torch.randn(3, 64)),
        {},
    ),
    "tied": (lambda: _ids(Tied()), {"target_modules": ["embed", "head"]}),
    "experts": (
        lambda: _ids(mixtral()),
        {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
    "llama": (lambda: _ids(tiny_llama()[0]), {"target_modules": "all-linear"}),
}


@seeded
def built(case: str, *, optimize: bool = True, p: float = P) -> tuple[nn.Module, Any]:
    make, options = CASES[case]
    base, inputs = make()
    config = LoraConfig(**{"r": 2, "target_modules": ["0"], **options, "lora_dropout": p})
    return randomize(lora_fx.rewrite(base, config, optimize=optimize)).train(), inputs


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return tensors(model(inputs))


@pytest.mark.parametrize("optimize", [True, False], ids=["", "canonical"])
@pytest.mark.parametrize("case", CASES)
def test_a_walk_reaches_it(case: str, optimize: bool) -> None:
    model, inputs = built(case, optimize=optimize)
    expected = outputs(model.eval(), inputs)
    before = outputs(model.train(), inputs)
    assert any(not torch.equal(one, other) for one, other in zip(before, expected, strict=True))
    disable_dropout(model)
    assert_same_bits(outputs(model, inputs), expected)


@pytest.mark.parametrize("optimize", [True, False], ids=["", "canonical"])
@pytest.mark.parametrize("case", CASES)
def test_its_own_mode_counts(case: str, optimize: bool) -> None:
    model, inputs = built(case, optimize=optimize)
    expected = outputs(model.eval(), inputs)
    model.train()
    assert dropouts(model)
    for one in dropouts(model):
        assert one.training
        one.eval()
    assert_same_bits(outputs(model, inputs), expected)


@pytest.mark.parametrize("optimize", [True, False], ids=["", "canonical"])
@pytest.mark.parametrize("case", ["linear", "bias on B", "conv", "quantized"])
def test_all_can_be_dropped(case: str, optimize: bool) -> None:
    model, inputs = built(case, optimize=optimize)
    for one in dropouts(model):
        one.p = 1
    other, _ = built(case, optimize=optimize)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_A." in name:
                parameter.zero_()
    found = outputs(model, inputs)
    assert_close(found, outputs(other.eval(), inputs))
    sum(one.square().sum() for one in found).backward()
    named = dict(model.named_parameters())
    for name in ("lora_A.default", "lora_B.default"):
        assert not named[f"0.{name}"].grad.any()


@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
@pytest.mark.usefixtures("packed_masks")
def test_masks_at_the_ends(p: float) -> None:
    x = torch.randn(3, 50, requires_grad=True)
    out = dropped(x, p, training=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    if p == 0:
        assert out is x
    elif p == 1:
        assert not out.any()
        assert not grad.any()
    else:
        assert 0 < (out == 0).sum() < out.numel()
    kept_now = unpacked(draw(x, p), x).double().mean()
    assert kept_now == 1 - p if p in (0, 1) else 0 < kept_now < 1
    assert recovery(p) * kept(p) == (0 if p == 1 else 256)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), "0.5", torch.tensor(0.5)])
def test_what_is_no_probability_is_refused(p: Any) -> None:
    model, inputs = built("linear")
    dropouts(model)[0].p = p
    with pytest.raises(ConfigError, match="a probability is at least 0 and at most 1"):
        model(inputs)


def test_nothing_is_kept_for_no_dropout() -> None:
    def saved(model: nn.Module, inputs: Any) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one: shapes.append(one.shape) or one, lambda one: one
        ):
            model(inputs)
        return shapes

    model, inputs = built("linear")
    plain, _ = built("linear", p=0.0)
    assert not dropouts(plain)
    assert len(saved(model, inputs)) > len(saved(plain, inputs))
    disable_dropout(model)
    assert saved(model, inputs) == saved(plain, inputs)


def test_the_state_has_no_more_keys() -> None:
    with_it, without = (built("llama", p=p)[0] for p in (P, 0.0))
    assert with_it.state_dict().keys() == without.state_dict().keys()
    assert not list(dropouts(with_it)[0].state_dict())


def test_plan_and_status_are_those_of_the_configuration(tmp_path: Any) -> None:
    model, _ = built("llama")
    before, table = lora_fx.status(model), str(lora_fx.plan(tiny_llama()[0], LoraConfig(r=2)))
    disable_dropout(model)
    assert lora_fx.status(model) == before
    assert str(lora_fx.plan(tiny_llama()[0], LoraConfig(r=2))) == table
    lora_fx.save_adapter(model, tmp_path / "adapter")
    assert LoraConfig.from_pretrained(tmp_path / "adapter").lora_dropout == P


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_their_own(how: str) -> None:
    model, inputs = built("linear")
    dropouts(model)[0].p = 0.25
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert [one.p for one in dropouts(other)] == [0.25]
    assert_same_bits(outputs(other, inputs), outputs(model, inputs))
    disable_dropout(other)
    assert [one.p for one in dropouts(model)] == [0.25]


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_has_none(case: str) -> None:
    model, _ = built(case)
    base, merged = CASES[case][0]()[0], lora_fx.merge(model)
    assert type(merged) is type(base)
    names = {name for name, _ in base.named_modules()}
    assert {name for name, _ in merged.named_modules()} == names
    assert dropouts(model)


def test_each_adapter_has_its_own() -> None:
    model, inputs = built("linear")
    expected = outputs(model, inputs)
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.25), "b")
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["0"]), "c")
    assert {name: one.p for name, one in model[0].lora_dropout.named_children()} == {
        "default": P,
        "b": 0.25,
    }
    assert_same_bits(outputs(model, inputs), expected)
    lora_fx.set_adapter(model, ["default", "b"])
    model[0].lora_dropout.b.p = model[0].lora_dropout.default.p = 0.0
    assert_same_bits(outputs(model, inputs), outputs(copy.deepcopy(model).eval(), inputs))
    lora_fx.set_adapter(model, "c")
    lora_fx.delete_adapter(model, "b")
    assert [name for name, _ in model[0].lora_dropout.named_children()] == ["default"]
    lora_fx.delete_adapter(model, "default")
    assert not hasattr(model[0], "lora_dropout")


def test_rows_of_a_batch_have_it() -> None:
    model, inputs = built("linear")
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=P), "b")
    randomize(model)
    with lora_fx.adapter_ids(model, ["default", "b", None]):
        expected = outputs(model.eval(), inputs)
        assert not torch.equal(outputs(model.train(), inputs)[0], expected[0])
        disable_dropout(model)
        assert_same_bits(outputs(model, inputs), expected)


def test_loaded_adapters_begin_with_the_configuration(tmp_path: Any) -> None:
    model, _ = built("llama")
    disable_dropout(model)
    lora_fx.save_adapter(model, tmp_path / "adapter")
    again = lora_fx.load_adapter(tiny_llama()[0], tmp_path / "adapter")
    assert {one.p for one in dropouts(again)} == {P}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0, 0.25, 1])
def test_a_block_that_is_computed_again_has_the_same_mask(p: float, reentrant: bool) -> None:
    model, inputs = built("linear")
    dropouts(model)[0].p = p
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(0)
        run(inputs.clone().requires_grad_()).square().sum().backward()
        found.append([parameter.grad for parameter in lora_fx.trainable_parameters(model)])
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_a_compiled_model_follows_it(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    config = LoraConfig(r=2, lora_dropout=P, target_modules=["up", "down"], **options)
    model = randomize(lora_fx.rewrite(Residual(), config)).train()
    ids = torch.arange(12).view(3, 4) % 11
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module not in dropouts(model):
            module.p = 0.0
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    expected = outputs(copy.deepcopy(model).eval(), ids)

    def run() -> Tensor:
        out: Tensor = compiled(ids)
        out.square().sum().backward()
        return out

    first = run()
    assert counter.frame_count == 1
    assert not torch.equal(run(), first)
    assert counter.frame_count == 1
    disable_dropout(model)
    assert_close(run(), expected[0])
    seen = counter.frame_count
    assert_close(run(), expected[0])
    assert counter.frame_count == seen
    # As a schedule sets it, and back.
    for p in (0.1, 0.2, 0.3):
        for one in dropouts(model):
            one.p = p
        assert not torch.allclose(run(), expected[0])
    disable_dropout(model)
    assert_close(run(), expected[0])


def test_it_is_exported_by_torch() -> None:
    model, inputs = built("linear")
    model.eval()
    program = torch.export.export(model, (inputs,))
    assert_close(program.module()(inputs), model(inputs))


def test_another_module_in_its_place_is_refused() -> None:
    model, inputs = built("linear")
    expected = outputs(model, inputs)
    with pytest.raises(ConfigError, match=r"lora_dropout\.default .* set its p instead"):
        model[0].lora_dropout.default = nn.Identity()
    assert_same_bits(outputs(model, inputs), expected)
    del model[0].lora_dropout
    with pytest.raises(CaptureError, match="0: it has no lora_dropout of adapter 'default'"):
        lora_fx.merge(model)


def test_a_name_that_is_taken_is_refused() -> None:
    base = Mlp()
    base.first.lora_dropout = nn.Dropout(0.1)
    with pytest.raises(
        CaptureError, match=r"'first\.lora_dropout', which is the name of a Dropout"
    ):
        lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["first"], lora_dropout=0.1))
    plain = lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["first"]))
    assert type(plain.first.lora_dropout) is nn.Dropout
