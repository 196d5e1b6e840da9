"""Fused weights: the whole, and each part of it, can have an adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import hf_conv1d, sample, seeded

WIDTH = 8


class Fused(nn.Module):
    """Attention over one projection, cut as the subclass does."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if layer is None else layer
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.cut(self.qkv(x))
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Chunked(Fused):
    def cut(self, y):
        y = y.chunk(3, dim=-1)
        return y[0], y[1], y[2]


class Split(Fused):
    def cut(self, y):
        y = torch.split(y, [WIDTH, WIDTH, WIDTH], -1)
        return y[0], y[1], y[2]


class SplitFromTheFront(Fused):
    def cut(self, y):
        y = y.split(WIDTH, dim=2)
        return y[0], y[1], y[2]


class Sliced(Fused):
    def cut(self, y):
        return y[..., :WIDTH], y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]


class Narrowed(Fused):
    def cut(self, y):
        return tuple(y.narrow(-1, i * WIDTH, WIDTH) for i in range(3))


class Viewed(Fused):
    """As timm and many others do."""

    def cut(self, y):
        y = y.reshape(y.shape[0], y.shape[1], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        return tuple(y[i].transpose(1, 2).flatten(2) for i in range(3))


class Unflattened(Fused):
    def cut(self, y):
        y = y.unflatten(-1, (3, WIDTH))
        return y[:, :, 0], y[:, :, 1], y[:, :, 2]


class Interleaved(Fused):
    """Heads first, and each with its own q, k and v, as GPT-NeoX has it."""

    def cut(self, y):
        y = y.view(y.shape[0], y.shape[1], 2, 3 * WIDTH // 2)
        q, k, v = (y[..., i * WIDTH // 2 : (i + 1) * WIDTH // 2] for i in range(3))
        return tuple(t.flatten(2) for t in (q, k, v))


class ThreeHeads(Fused):
    """Three of anything are not q, k and v."""

    def cut(self, y):
        y = y.view(y.shape[0], y.shape[1], 3, WIDTH).transpose(1, 2)
        return y, y, y

    def forward(self, x):
        q, k, v = self.cut(self.qkv(x))
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Opaque(Chunked):
    """What a trace gives up on after it has seen the cut."""

    def forward(self, x):
        q, k, v = self.cut(self.qkv(x))
        if x.sum() > 1e9:
            return x
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Functional(nn.Module):
    """No module stands for the product."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_kernel = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / 3)

    def forward(self, x):
        y = (x @ self.qkv_kernel).chunk(3, -1)
        return F.scaled_dot_product_attention(y[0], y[1], y[2])


class GateUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x):
        y = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(y[0]) * y[1]


class Unequal(nn.Module):
    """Fewer keys and values than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        y = torch.split(self.qkv_proj(x), [WIDTH, WIDTH // 2, WIDTH // 2], dim=-1)
        return y[0] * torch.cat([y[1], y[2]], -1)


FUSED = [Chunked, Split, SplitFromTheFront, Sliced, Narrowed, Viewed, Unflattened, Opaque]
THIRDS = (("q", (0, 8)), ("k", (8, 16)), ("v", (16, 24)))


def parts(model: nn.Module) -> dict[str, tuple]:
    plan = lora_fx.plan(model, LoraConfig(r=2, target_modules=".*"))
    return {row.name: row.site.parts for row in plan if row.site.parts}


def x() -> torch.Tensor:
    return sample(2, 5, WIDTH)


@pytest.mark.parametrize("build", FUSED)
def test_it_is_seen_however_it_is_cut(build) -> None:
    assert parts(build()) == {"qkv": THIRDS}


def test_names_follow_what_the_weight_is_called() -> None:
    assert parts(Functional()) == {"qkv_kernel": THIRDS}
    assert parts(GateUp()) == {"gate_up_proj": (("gate", (0, 8)), ("up", (8, 16)))}
    assert parts(Unequal()) == {"qkv_proj": (("q", (0, 8)), ("k", (8, 12)), ("v", (12, 16)))}


def test_parts_that_are_no_rows_side_by_side_are_not_offered() -> None:
    assert parts(Interleaved()) == {}
    assert parts(ThreeHeads()) == {}
    with pytest.raises(lora_fx.NoMatchError):
        lora_fx.plan(Interleaved(), LoraConfig(target_modules=["qkv.q"]))


@pytest.mark.parametrize(
    "build", [*FUSED, lambda: Chunked(hf_conv1d(3 * WIDTH, WIDTH)), Functional, Unequal]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_part_has_its_own_rank_and_a_merge_touches_its_rows_only(build, dtype) -> None:
    model = seeded(build)().to(dtype)
    (name,) = parts(model)
    config = LoraConfig(
        r=2, target_modules=[f"{name}.q", f"{name}.v"], rank_pattern={f"{name}.v": 3}
    )
    plan = lora_fx.plan(model, config)
    assert [(row.name, row.rank) for row in plan] == [(f"{name}.q", 2), (f"{name}.v", 3)]
    assert f"{name}.k" in [skipped.site.name for skipped in plan.skipped]
    adapted = lora_fx.rewrite(model, config)
    inputs = x().to(dtype)
    assert_same_bits(adapted(inputs), model.requires_grad_(False)(inputs))
    randomize(adapted)
    found = adapted(inputs)
    merged, report = lora_fx.merge(adapted, return_report=True)
    assert report.max_ulp <= (0.5 if dtype is torch.bfloat16 else 1.0)
    assert_close(merged(inputs), found, 1e-12 if dtype is torch.float64 else 2e-2)
    key = f"{name}.weight" if f"{name}.weight" in model.state_dict() else name
    old, new = model.state_dict()[key], merged.state_dict()[key]
    if plan.sites[0].site.layout == "in_out":
        old, new = old.T, new.T
    changed = (old != new).any(1)
    wanted = torch.zeros_like(changed)
    for row in plan:
        wanted[slice(*row.site.rows)] = True
    assert torch.equal(changed, wanted)
    for row in plan:
        owner = adapted.get_submodule(row.site.holder)
        exact = row.scale * owner.lora_B.default.double() @ owner.lora_A.default.double()
        rows = slice(*row.site.rows)
        assert_close(
            new[rows].double(), old[rows].double() + exact, 1e-12 if dtype.itemsize == 8 else 4e-3
        )


def test_gradients_are_those_of_the_rows() -> None:
    model = seeded(Chunked)().double()
    adapted = randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["qkv.k"])))
    adapted(x().double()).square().sum().backward()
    merged = lora_fx.merge(adapted).requires_grad_(True)
    merged(x().double()).square().sum().backward()
    grad = merged.qkv.weight.grad[8:16]
    holder = adapted.qkv.k_lora
    a, b = holder.lora_A.default, holder.lora_B.default
    assert_close([a.grad, b.grad], [4 * b.detach().T @ grad, 4 * grad @ a.detach().T], 1e-12)


def test_the_whole_is_what_is_meant_where_it_is_named() -> None:
    for targets in (["qkv"], None, "all-linear", ".*qkv.*", ["qkv", "qkv.q"]):
        names = [row.name for row in lora_fx.plan(Chunked(), LoraConfig(target_modules=targets))]
        assert "qkv" in names
        assert "qkv.q" not in names
    plan = lora_fx.plan(Chunked(), LoraConfig(target_modules=["qkv", "qkv.q"]))
    assert "target_modules 'qkv.q'" in "".join(plan.unmatched)


def test_an_excluded_part_leaves_the_others() -> None:
    plan = lora_fx.plan(Chunked(), LoraConfig(exclude_modules=["qkv.k"]))
    assert [row.name for row in plan if row.site.part_of] == ["qkv.q", "qkv.v"]


@pytest.mark.parametrize("targets", ["qkv.(q|v)", ["q", "v"]])
def test_parts_are_selected_like_modules(targets) -> None:
    plan = lora_fx.plan(Chunked(), LoraConfig(target_modules=targets))
    assert [row.name for row in plan] == ["qkv.q", "qkv.v"]


def test_rows_can_be_named_by_number_wherever_they_are_cut() -> None:
    model = seeded(Interleaved)()
    adapted = randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["qkv.4_12", "out"])))
    assert adapted.qkv.get_submodule("4_12_lora").lora_B.default.shape == (8, 2)
    assert_close(lora_fx.merge(adapted)(x()), adapted(x()), 1e-5)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qkv.0_99"], "has the rows 0 to 24"),
        (["qkv.5_5"], "has the rows 0 to 24"),
        (["qkv.0_6", "qkv.5_9"], "overlap: 0_6 and 5_9"),
        (["qkv.q", "qkv.4_12"], "overlap: 0_8 and 4_12"),
    ],
)
def test_rows_that_cannot_be_are_refused(targets, message) -> None:
    with pytest.raises(lora_fx.ConfigError, match=message):
        lora_fx.plan(Chunked(), LoraConfig(target_modules=targets))


@pytest.mark.parametrize("build", [Chunked, Opaque, Functional])
def test_an_adapter_of_parts_comes_back(build, tmp_path) -> None:
    model = seeded(build)()
    (name,) = parts(model)
    config = LoraConfig(r=2, target_modules=[f"{name}.q", f"{name}.k"])
    adapted = randomize(lora_fx.rewrite(model, config))
    lora_fx.save_adapter(adapted, tmp_path)
    assert_same_bits(lora_fx.load_adapter(model, tmp_path)(x()), adapted(x()))


def test_the_dry_run_says_what_can_be_named() -> None:
    assert "qkv: q, k, v" in str(lora_fx.plan(Chunked(), LoraConfig()))


def test_export_sees_how_a_whole_model_divides_its_outputs() -> None:
    plan = lora_fx.plan(Viewed(), LoraConfig(target_modules=["qkv.v"]), x(), frontend="export")
    assert [row.name for row in plan] == ["qkv.v"]
    model = seeded(Viewed)()
    adapted = lora_fx.rewrite(model, LoraConfig(target_modules=["qkv.v"]), x(), frontend="export")
    randomize(adapted)
    assert_close(lora_fx.merge(adapted)(x()), adapted(x()), 1e-5)


class TwoCut(nn.Module):
    """Two parameters of one module, each cut in the same rows."""

    def __init__(self, name: str = "u") -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 8))
        self.name = name
        setattr(self, name, nn.Parameter(torch.randn(16, 8)))

    def forward(self, x):
        a, b = self.w.chunk(2)
        c, d = getattr(self, self.name).chunk(2)
        return (x @ a.t()) * (x @ b.t()) + (x @ c.t()) * (x @ d.t())


def test_parts_of_two_parameters_have_factors_of_their_own(tmp_path) -> None:
    model = seeded(TwoCut)()
    adapted = randomize(lora_fx.rewrite(model, LoraConfig(r=2, target_modules=".*")))
    assert sum(p.requires_grad for p in adapted.parameters()) == 8
    assert_close(lora_fx.merge(adapted)(x()), adapted(x()), 1e-4)
    lora_fx.save_adapter(adapted, tmp_path)
    assert_same_bits(lora_fx.load_adapter(model, tmp_path)(x()), adapted(x()))


class NamedLikeAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 8))
        self.w_0_8 = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        a, b = self.w.chunk(2)
        return x @ a.t() + x @ b.t() + x @ self.w_0_8


class NamedLikeFactors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.w_lora = nn.Linear(8, 8)

    def forward(self, x):
        return self.w_lora(x @ self.w)


@pytest.mark.parametrize(
    ("build", "message"),
    [(NamedLikeAPart, "those of w.0_8"), (NamedLikeFactors, "the name of a Linear")],
)
def test_factors_never_share_a_name(build, message) -> None:
    with pytest.raises(lora_fx.CaptureError, match=message):
        lora_fx.rewrite(build(), LoraConfig(r=2, target_modules=".*"))
