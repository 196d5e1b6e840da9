"""DoRA at every form of a linear operation, against the decomposed weight in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.ir.graph import META_KEY, Tag
from lora_fx.runtime.kernels.masks import dropped
from tests.algebra import adapt, randomize, scale_of
from tests.dora import (
    adapted_weight,
    directed,
    explicit_dora,
    magnitude_of,
    randomize_magnitudes,
    steer,
)
from tests.numerics import assert_close, assert_same_bits, ulp_error
from tests.zoo import FORMS, Form, Tied, sample, seeded

DENSE = [
    form
    for form in FORMS
    if not form.kind.startswith("experts") and form.name != "conv1d unbatched"
]
# What padding_idx and scale_grad_by_freq do to the gradient of a row of W they do to A only: PEFT's m and B
# learn from every lookup, and so do these.
EVERY_LOOKUP = [form for form in DENSE if form.kind != "embedding" or form.name == "nn.Embedding"]
EACH = pytest.mark.parametrize("form", DENSE, ids=lambda form: form.name)


def dora(form: Form, model: nn.Module, **options) -> nn.Module:
    return randomize_magnitudes(randomize(adapt(form, model, use_dora=True, **options)))


def reference(form: Form, model: nn.Module, adapted: nn.Module) -> torch.Tensor:
    a, b = (f.detach().double() for f in form.factors(adapted))
    m = magnitude_of(form, adapted).detach().double()
    exact = copy.deepcopy(model).double()
    return explicit_dora(form, exact, a, b, m, scale_of(adapted), form.x(torch.float64))


@EACH
def test_no_bit_changes_before_training(form: Form) -> None:
    model = form.model().requires_grad_(False)
    assert_same_bits(adapt(form, model, use_dora=True)(form.x()), model(form.x()))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_is_that_of_the_decomposed_weight(form: Form, dtype: torch.dtype) -> None:
    model = form.model().to(dtype)
    adapted = dora(form, model)
    assert_close(adapted(form.x(dtype)), reference(form, model, adapted))


@pytest.mark.parametrize("form", EVERY_LOOKUP, ids=lambda form: form.name)
def test_gradients_are_those_of_the_decomposed_weight(form: Form) -> None:
    model = form.model().double()
    adapted = dora(form, model)
    x = form.x(torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    own = (*form.factors(adapted), magnitude_of(form, adapted))
    cotangent = seeded(torch.randn_like)(model(x))
    adapted(x).backward(cotangent)
    found = [p.grad for p in own] + ([x.grad] if x.requires_grad else [])
    a, b, m = (p.detach().clone().requires_grad_() for p in own)
    given = x.detach().requires_grad_(x.requires_grad)
    explicit_dora(form, model, a, b, m, scale_of(adapted), given).backward(cotangent)
    exact = [a.grad, b.grad, m.grad] + ([given.grad] if x.requires_grad else [])
    assert_close(found, exact, 1e-11)


@EACH
def test_the_merged_model_computes_the_same(form: Form) -> None:
    model = form.model()
    adapted = dora(form, model)
    merged = lora_fx.merge(adapted)
    assert merged.state_dict().keys() == model.state_dict().keys()
    assert_close(merged(form.x()), adapted(form.x()))
    assert_close(merged(form.x()), reference(form, model, adapted))


# --- what else a branch meets -----------------------------------------------------------------------


class Fused(nn.Module):
    """q, k and v in one layer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


def decomposed(base: torch.Tensor, holder: nn.Module, scale: float = 1.0) -> torch.Tensor:
    """m / ‖W + s·BA‖ ∘ (W + s·BA), in fp64."""
    a, b, m = (
        getattr(holder, name).default.detach().double()
        for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    turned = base.detach().double() + scale * (b @ a)
    return m[:, None] / turned.norm(dim=1, keepdim=True) * turned


def with_dora(model: nn.Module, **options) -> nn.Module:
    options = {"r": 2, "lora_alpha": 2, "use_dora": True, "target_modules": ".*", **options}
    config = lora_fx.LoraConfig(**options)
    return randomize_magnitudes(randomize(lora_fx.rewrite(model, config)))


def test_parts_of_a_fused_weight_scale_their_rows_of_the_pure_output() -> None:
    model = seeded(Fused)().double()
    adapted = with_dora(model, target_modules=["qkv.q", "qkv.v", "out"])
    exact = copy.deepcopy(model)
    with torch.no_grad():
        for name, rows in (("q", slice(0, 6)), ("v", slice(12, 18))):
            holder = getattr(adapted.qkv, f"{name}_lora", None) or getattr(adapted, f"{name}_lora")
            exact.qkv.weight[rows] = decomposed(model.qkv.weight[rows], holder)
        exact.out.weight.copy_(decomposed(model.out.weight, adapted.out))
    x = sample(2, 3, 6, dtype=torch.float64)
    assert_close(adapted(x), exact(x))
    assert_close(lora_fx.merge(adapted)(x), exact(x))
    assert_same_bits(
        lora_fx.rewrite(
            model, lora_fx.LoraConfig(r=2, use_dora=True, target_modules=["qkv.q", "qkv.v"])
        )(x),
        copy.deepcopy(model).requires_grad_(False)(x),
    )


def test_rows_of_an_attention_have_magnitudes_of_their_own() -> None:
    model = seeded(lambda: nn.MultiheadAttention(6, 2, batch_first=True))().double()
    nn.init.normal_(model.in_proj_bias)
    adapted = with_dora(model)
    exact = copy.deepcopy(model)
    with torch.no_grad():
        for place, name in enumerate("qkv"):
            rows = slice(6 * place, 6 * place + 6)
            exact.in_proj_weight[rows] = decomposed(
                model.in_proj_weight[rows], getattr(adapted, f"{name}_lora")
            )
        exact.out_proj.weight.copy_(decomposed(model.out_proj.weight, adapted.out_proj))
    x = sample(2, 3, 6, dtype=torch.float64)
    assert_close(adapted(x, x, x)[0], exact(x, x, x)[0])
    assert_close(lora_fx.merge(adapted)(x, x, x)[0], exact(x, x, x)[0])


@pytest.mark.parametrize("first", [True, False], ids=["DoRA first", "DoRA second"])
def test_several_adapters_each_scale_the_pure_output(first: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4)))().double()
    configs = {
        "one": lora_fx.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=".*"),
        "two": lora_fx.LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=".*"),
        "plain": lora_fx.LoraConfig(r=2, lora_alpha=2, target_modules=".*"),
    }
    start, *others = configs if first else reversed(configs)
    adapted = lora_fx.rewrite(model, configs[start], adapter_name=start)
    for name in others:
        lora_fx.add_adapter(adapted, configs[name], name)
    lora_fx.set_adapter(adapted, [start, *others])
    randomize_magnitudes(randomize(adapted))
    layer, weight = adapted[0], model[0].weight.detach()
    total = weight.clone()
    for name, config in configs.items():
        a, b = layer.lora_A.get_parameter(name).detach(), layer.lora_B.get_parameter(name).detach()
        turned = weight + config.lora_alpha / config.r * (b @ a)
        if name != "plain":
            m = layer.lora_magnitude_vector.get_parameter(name).detach()
            turned = m[:, None] / turned.norm(dim=1, keepdim=True) * turned
        total += turned - weight
    x = sample(3, 4, dtype=torch.float64)
    assert_close(adapted(x), F.linear(x, total, model[0].bias))
    assert_close(lora_fx.merge(adapted)[0].weight, total)


def test_dropout_is_on_the_branch_only() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7)))().double()
    adapted = with_dora(model, lora_dropout=0.5).train()
    x = sample(6, 4, dtype=torch.float64)
    seeded(lambda: adapted(x).sum().backward())()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    gains, exact = {}, x
    ones = torch.ones(6, 4, dtype=torch.float64)
    masks = seeded(lambda: [dropped(ones, 0.5, True) for _ in "ab"])()
    leaves = {name: adapted.get_parameter(name).detach().requires_grad_() for name in found}
    for place, mask in zip((0, 2), masks, strict=True):
        a, b, m = (
            leaves[f"{place}.{name}.default"]
            for name in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        layer = model[place]
        norm = (layer.weight + b @ a).detach().norm(dim=1)
        gains[place] = m / norm
        branch = F.linear(F.linear(exact * mask, a), b)
        exact = (
            gains[place] * (F.linear(exact, layer.weight.detach()) + branch) + layer.bias.detach()
        )
        exact = torch.tanh(exact) if place == 0 else exact
    exact.sum().backward()
    assert_close(list(found.values()), [leaf.grad for leaf in leaves.values()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base(dtype: torch.dtype) -> None:
    form = next(form for form in DENSE if form.name == "nn.Linear")
    model = form.model().to(dtype)
    assert_same_bits(adapt(form, model, use_dora=True)(form.x(dtype)), model(form.x(dtype)))
    adapted = dora(form, model)
    assert magnitude_of(form, adapted).dtype is torch.float32
    out = adapted(form.x(dtype))
    assert out.dtype is dtype
    assert_close(out, reference(form, model, adapted))
    out.sum().backward()
    assert torch.isfinite(magnitude_of(form, adapted).grad).all()


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merge_rounds_once(form: Form, dtype: torch.dtype) -> None:
    model = form.model().to(dtype)
    adapted = dora(form, model)
    a, b = (f.detach().double() for f in form.factors(adapted))
    m = magnitude_of(form, adapted).detach().double()
    old = model.get_parameter(f"op.{form.weight}").detach().double()
    delta = form.delta(a, b)
    exact = directed(form, old.reshape(delta.shape) + scale_of(adapted) * delta, m)
    merged, report = lora_fx.merge(adapted, return_report=True)
    found = merged.get_parameter(f"op.{form.weight}")
    assert ulp_error(found, exact.reshape(old.shape)) <= 0.5
    assert report.max_ulp <= 0.5


def test_a_merge_before_training_changes_no_bit_of_half_weights_and_none_but_the_last_of_others() -> (
    None
):
    for dtype, most in ((torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float32, 1.0)):
        model = seeded(lambda: nn.Linear(64, 48))().to(dtype)
        config = lora_fx.LoraConfig(use_dora=True, target_modules=".*")
        merged = lora_fx.merge(lora_fx.rewrite(model, config))
        assert ulp_error(merged.weight, model.weight.detach().double()) <= most


def test_slices_of_a_merge_see_their_own_magnitudes(monkeypatch) -> None:
    monkeypatch.setattr("lora_fx.passes.merge.fold._CHUNK", 16)
    for layer in (nn.Linear(8, 10), nn.Conv1d(4, 6, 2), nn.Embedding(11, 6)):
        model = seeded(lambda layer=layer: nn.Sequential(layer))().double()
        adapted = with_dora(model, target_modules=["0"])
        ids = torch.arange(11)
        shape = (2, layer.weight.shape[1], *(5 for _ in layer.weight.shape[2:]))
        x = ids if isinstance(layer, nn.Embedding) else sample(*shape, dtype=torch.float64)
        assert_close(lora_fx.merge(adapted)(x), adapted(x))


# --- the machinery around a step ----------------------------------------------------------------------


def stack() -> nn.Module:
    """Square, widening and narrowing layers, with biases and without."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6, bias=False)
        )
    )()


def gradients(model: nn.Module, run) -> list[torch.Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad.clone() for p in lora_fx.trainable_parameters(model)]


def test_gradient_checkpointing_gives_the_same() -> None:
    model, x = with_dora(stack().double()), sample(3, 6, dtype=torch.float64).requires_grad_()
    plain = gradients(model, lambda: model(x))
    for reentrant in (True, False):
        found = gradients(model, lambda r=reentrant: checkpoint(model, x, use_reentrant=r))
        assert_same_bits(found, plain)


def test_autocast_gives_what_a_half_model_would() -> None:
    model, x = with_dora(stack()), sample(3, 6)
    exact = gradients(model, lambda: model(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype is torch.bfloat16
    model.zero_grad()
    out.float().square().sum().backward()
    found = [p.grad for p in lora_fx.trainable_parameters(model)]
    assert_close(out.float(), model(x), 3e-2)
    assert_close(found, exact, 6e-2)


def test_compilation_takes_the_whole_graph() -> None:
    model, x = with_dora(stack().double()), sample(3, 6, dtype=torch.float64)
    exact, out = gradients(model, lambda: model(x)), model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), out)
    assert_close(gradients(model, lambda: compiled(x)), exact)


def test_export_takes_the_adapted_graph() -> None:
    model, x = with_dora(stack().double()), sample(3, 6, dtype=torch.float64)
    exported = torch.export.export(model, (x,), strict=False)
    assert_close(exported.module()(x), model(x))


def test_a_trained_base_bias_has_its_gradient() -> None:
    model, x = stack().double(), sample(3, 6, dtype=torch.float64)
    adapted = with_dora(model, bias="all")
    found = gradients(adapted, lambda: adapted(x))
    exact = x
    leaves = {
        n: p.detach().requires_grad_() for n, p in adapted.named_parameters() if p.requires_grad
    }
    for place in (0, 2, 4):
        a, b, m = (
            leaves[f"{place}.{name}.default"]
            for name in ("lora_A", "lora_B", "lora_magnitude_vector")
        )
        turned = model[place].weight.detach() + b @ a
        weight = (m / turned.detach().norm(dim=1))[:, None] * turned
        exact = F.linear(exact, weight, leaves.get(f"{place}.bias"))
        exact = F.gelu(exact) if place < 4 else exact
    exact.square().sum().backward()
    assert_close(found, [leaf.grad for leaf in leaves.values()])


def test_a_frozen_magnitude_keeps_nothing_and_asks_for_nothing() -> None:
    model, x = with_dora(stack().double()), sample(3, 6, dtype=torch.float64)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    exact = dict(zip(names, gradients(model, lambda: model(x)), strict=True))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found = dict(zip(names, gradients(model, lambda: model(x)), strict=True))
    assert_close(list(found.values()), [exact[name] for name in names])


def test_every_node_of_a_branch_is_tagged() -> None:
    for form in DENSE:
        adapted = adapt(form, form.model(), use_dora=True)
        before = lora_fx.capture(form.model())
        for fqn, graph in lora_fx.graphs(adapted).items():
            plain = {node.name for node in before.regions[fqn].graph.nodes}
            for node in graph.nodes:
                if node.name not in plain:
                    assert isinstance(node.meta.get(META_KEY), Tag), (form.name, node)


# --- transforms, and sequences of several lengths -------------------------------------------------


def losses(form: Form, use_dora: bool, optimize: bool):
    """A loss of the trained tensors and x, of the adapted model and of the plain one; and both arguments."""
    model = form.model().double()
    config = lora_fx.LoraConfig(
        r=2 * form.groups, target_modules=[form.site], use_dora=use_dora, lora_alpha=4
    )
    adapted = randomize(lora_fx.rewrite(model, config, optimize=optimize))
    own = [*form.factors(adapted)]
    if use_dora:
        own.append(magnitude_of(form, steer(form, model, adapted)))
    order = [name for one in own for name, p in adapted.named_parameters() if p is one]
    trained = {name: adapted.get_parameter(name).detach() for name in order}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(adapted, values, (x,)).square().sum()

    def exact(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        weight = adapted_weight(form, model, scale_of(adapted), *(values[name] for name in order))
        return torch.func.functional_call(model, weight, (x,)).square().sum()

    return loss, exact, trained, form.x(torch.float64)


ONE_OF_EACH = list({form.pattern: form for form in reversed(EVERY_LOOKUP)}.values())
TRANSFORMS = {
    "grad": lambda f, p, x: func.grad(f)(p, x),
    "of each sample": lambda f, p, x: func.vmap(func.grad(f), (None, 0))(
        p, torch.stack((x, x.flip(0)))
    ),
    "of each model": lambda f, p, x: func.vmap(func.grad(f), (0, None))(
        {name: torch.stack((one, 1.1 * one)) for name, one in p.items()}, x
    ),
    "jvp": lambda f, p, x: func.jvp(
        lambda q: f(q, x), (p,), ({name: torch.cos(one) for name, one in p.items()},)
    ),
    "second": lambda f, p, x: func.jacfwd(func.grad(f))(p, x),
}


@pytest.mark.parametrize("form", ONE_OF_EACH, ids=lambda form: form.name)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func(form: Form, transform) -> None:
    for use_dora, optimize in ((True, True), (True, False), (False, False)):
        loss, exact, trained, x = losses(form, use_dora, optimize)
        found, expected = transform(loss, trained, x), transform(exact, trained, x)
        assert_close(found, expected, 1e-11)


def test_transforms_of_a_second_adapter() -> None:
    model, x = stack().double(), sample(3, 6, dtype=torch.float64)
    adapted = with_dora(model)
    lora_fx.add_adapter(adapted, lora_fx.LoraConfig(target_modules=".*", use_dora=True), "second")
    lora_fx.set_adapter(adapted, ["default", "second"])
    randomize_magnitudes(randomize(adapted))
    trained = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(adapted, values, (x,)).square().sum()

    found = func.grad(loss)(trained)
    assert any("second" in name for name in found)
    adapted(x).square().sum().backward()
    assert_close(found, {name: adapted.get_parameter(name).grad for name in found}, 1e-12)


class Parts(nn.Module):
    """Sequences through layers that narrow, keep and widen, and a weight for two."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.square = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.qk, self.narrow = nn.Linear(8, 10), nn.Linear(5, 3)

    def forward(self, x):
        q, k = self.qk(F.gelu(self.square(F.gelu(self.wide(x))))).chunk(2, -1)
        return self.narrow(F.gelu(q) * k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimize", [True, False], ids=["fused", "canonical"])
@pytest.mark.parametrize("use_dora", [True, False], ids=["DoRA", "LoRA"])
def test_a_nested_tensor_gives_what_its_sequences_give(
    dtype: torch.dtype, optimize: bool, use_dora: bool
) -> None:
    model = seeded(Parts)().to(dtype)
    config = lora_fx.LoraConfig(
        r=2, target_modules=["wide", "square", "qk.0_5", "narrow"], use_dora=use_dora
    )
    adapted = randomize_magnitudes(randomize(lora_fx.rewrite(model, config, optimize=optimize)))
    parts = [sample(3, 6, dtype=dtype), sample(5, 6, dtype=dtype)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    found = gradients(adapted, lambda: torch.cat(adapted(x).unbind()))
    exact = gradients(adapted, lambda: torch.cat([adapted(part) for part in parts]))
    # Two results in bf16 may differ by more than either is off.
    precise = copy.deepcopy(adapted).double()
    assert_close(adapted(x).unbind(), [precise(part.double()) for part in parts])
    if dtype == torch.float64:
        assert_close(found, exact)
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_nested_tensor_of_the_strided_layout_is_right_or_refused() -> None:
    model = stack().double()
    parts = [sample(3, 6, dtype=torch.float64), sample(5, 6, dtype=torch.float64)]
    x = torch.nested.nested_tensor(parts)
    fused = with_dora(model)
    found = gradients(fused, lambda: torch.cat(fused(x).unbind()))
    exact = gradients(fused, lambda: torch.cat([fused(part) for part in parts]))
    assert_close(found, exact)
    canonical = lora_fx.rewrite(
        model, lora_fx.LoraConfig(target_modules=".*", use_dora=True), optimize=False
    )
    with pytest.raises(lora_fx.LoraFxError, match=r"layout=torch\.jagged"):
        canonical(x)


# --- what cannot have it --------------------------------------------------------------------------


class Unplaced(nn.Module):
    """An equation that does not say where its outputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 4))
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return torch.einsum("i...,oi->o...", x, self.kernel)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 4, 5))
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(x @ self.kernel)


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Unplaced, "nothing says where they are"), (Experts, "has no magnitude")],
)
def test_where_it_means_nothing_a_site_is_left_out_or_refused_by_name(build, reason: str) -> None:
    plan = lora_fx.plan(Both(build()), lora_fx.LoraConfig(use_dora=True, target_modules=".*"))
    (skipped,) = [one for one in plan.skipped if one.site.name == "own.kernel"]
    assert reason in skipped.reason
    assert "other" in [row.name for row in plan]
    named = lora_fx.LoraConfig(use_dora=True, target_modules=["kernel", "other"])
    with pytest.raises(lora_fx.ConfigError, match=f"own.kernel: .*{reason}"):
        lora_fx.rewrite(Both(build()), named)


class Both(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.other = own, nn.Linear(2, 2)

    def forward(self, x, y):
        return self.own(x), self.other(y)


def test_the_plan_counts_what_it_adds() -> None:
    model = stack()
    plain = lora_fx.plan(model, lora_fx.LoraConfig(r=2, target_modules=".*"))
    config = lora_fx.LoraConfig(r=2, target_modules=".*", use_dora=True)
    plan = lora_fx.plan(model, config)
    assert [row.parameters - other.parameters for row, other in zip(plan, plain, strict=True)] == [
        6,
        9,
        6,
    ]
    rewritten = lora_fx.rewrite(model, config)
    trained = sum(p.numel() for p in lora_fx.trainable_parameters(rewritten))
    assert plan.trainable_parameters == trained
    # Each keeps what it gives.
    extra = [row.saved - other.saved for row, other in zip(plan, plain, strict=True)]
    assert extra == [6 * 4, 9 * 4, 6 * 4]
    assert "DoRA" in str(plan)
    assert plan.to_dict()["sites"][0]["kind"] == "dora"


def test_tied_heads_have_magnitudes_of_their_own_and_are_untied_by_a_merge() -> None:
    model = Tied().double()
    adapted = with_dora(model, target_modules=["embed"], ensure_weight_tying=True)
    ids = torch.tensor([[0, 1], [2, 3]])
    merged = lora_fx.merge(adapted)
    assert_close(merged(ids), adapted(ids))
    assert merged.head.weight is not merged.embed.weight
    assert adapted.head.lora_embedding_A.default is adapted.embed.lora_embedding_A.default
    assert adapted.head.lora_magnitude_vector.default.shape == (model.head.weight.shape[0],)
