"""Which axis of an activation has the samples is seen, or the call is refused: never guessed by its size.

Each program runs with one adapter for each sample, once followed and once by what was seen then, and is
compared with the original model, sample by sample, with W + s·BA for its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import ConfigError
from lora_fx.ir.record import record_of
from lora_fx.runtime.rows.row_tracking import Follower
from lora_fx.runtime.rows.samples import SampleRows
from tests.lora_fx.test_samples import three
from tests.numerics import assert_close
from tests.zoo import TIMM, TORCHVISION

NAMES = ["a", "b", None, "c"]
WIDTH = 8


class Program(nn.Module):
    """Some modules and parameters, and what is done with them."""

    def __init__(self, run: Callable[..., torch.Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def adapted(base: nn.Module, model: nn.Module, name: str | None) -> nn.Module:
    """The original model with an adapter's product in its weights, by the textbook."""
    result = copy.deepcopy(base)
    if name is None:
        return result
    adapter = record_of(model).adapters[name]
    with torch.no_grad():
        for row in adapter.sites:
            site, holder = row.site, model.get_submodule(row.site.holder)
            kind = "lora_embedding_" if site.family == "embedding" else "lora_"
            a, b = (getattr(getattr(holder, kind + letter), name) for letter in "AB")
            delta = b.flatten(1) @ a.flatten(1)
            weight = result.get_parameter(site.weight)
            if site.rows is not None:
                weight = weight[site.rows[0] : site.rows[1]]
            delta = delta.T if site.family == "embedding" else delta
            weight += (adapter.config.lora_alpha / a.shape[0]) * delta.reshape(weight.shape)
    return result


def expected(base: nn.Module, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    rows = [adapted(base, model, name)(x[i : i + 1]) for i, name in enumerate(NAMES)]
    return torch.cat(rows)


def model_of(base: nn.Module, **config: Any) -> nn.Module:
    return three(base, **{"target_modules": ["fc"], **config})


def table_of(model: nn.Module) -> SampleRows:
    return next(one for one in model.modules() if isinstance(one, SampleRows))


def check_right(base: nn.Module, x: torch.Tensor, *, proved: bool = True, **config: Any) -> None:
    base = base.eval()
    model = model_of(base, **config)
    wanted = expected(base, model, x)
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    for _ in range(2):
        with lora_fx.adapter_ids(model, NAMES):
            assert_close(model(x), wanted)
        assert bool(table_of(model).proofs or table_of(model).folded) == proved


def check_refused(base: nn.Module, x: torch.Tensor, message: str, **config: Any) -> None:
    model = model_of(base.eval(), **config)
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    for _ in range(2):
        with lora_fx.adapter_ids(model, NAMES), pytest.raises(ConfigError, match=message) as raised:
            model(x)
        assert "choose one adapter for the whole batch" in str(raised.value)
        assert not table_of(model).proofs
        assert not table_of(model).folded
    lora_fx.set_adapter(model, "b")
    assert_close(model(x), adapted(base, model, "b")(x))


def tokens(length: int = 4) -> torch.Tensor:
    return torch.randn(4, length, WIDTH, generator=torch.Generator().manual_seed(length))


IDS = torch.randint(0, 9, (4, 4), generator=torch.Generator().manual_seed(0))


def table(rows: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, WIDTH))


def filled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), x.shape[1], WIDTH)
    for step in range(x.shape[1]):
        out[:, step] = x[:, step].tanh()
    return out


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).softmax(-1) @ v


def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, WIDTH)
    chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
    for number, expert in enumerate(self.experts):
        (where,) = torch.where(chosen == number)
        out.index_add_(0, where, expert(flat[where]))
    return self.fc(out.view(x.shape))


def experts() -> dict[str, nn.Module]:
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    return {"router": nn.Linear(WIDTH, 2), "experts": layers}


RIGHT: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any], torch.Tensor]] = {
    "tokens": (lambda s, x: s.fc(x), {}, tokens()),
    "positions of each sample": (
        lambda s, x: s.out(x + s.fc(s.pos[None].expand(len(x), -1, -1))),
        {"pos": table(4)},
        tokens(),
    ),
    "queries of each sample": (
        lambda s, x: s.out(attend(s.fc(s.pos.expand(len(x), -1, -1)), x, x)),
        {"pos": table(3)},
        tokens(),
    ),
    "class token": (
        lambda s, x: attend(
            *(s.fc(torch.cat([s.pos.expand(len(x), 1, -1), x], 1)) for _ in range(3))
        ),
        {"pos": table(1)},
        tokens(),
    ),
    "convolution": (lambda s, x: s.fc(x.mT).mT, {"fc": nn.Conv1d(8, 8, 3, padding=1)}, tokens()),
    "embedding": (lambda s, x: s.fc(x), {"fc": nn.Embedding(9, 8)}, IDS),
    "folded tokens": (lambda s, x: s.fc(x.reshape(-1, 8)).reshape(x.shape), {}, tokens(6)),
    "windows": (
        lambda s, x: s.fc(x.roll(1, 1).view(len(x), 3, 2, 8).reshape(-1, 2, 8)).reshape(x.shape),
        {},
        tokens(6),
    ),
    "sample after sample, twice": (
        lambda s, x: s.fc(x.repeat_interleave(2, 0)).view(len(x), 2, *x.shape[1:]).sum(1),
        {},
        tokens(),
    ),
    "LSTM": (lambda s, x: s.fc(s.r(x)[0]), {"r": nn.LSTM(8, 8, batch_first=True)}, tokens()),
    "GRU": (lambda s, x: s.fc(s.r(x)[0]), {"r": nn.GRU(8, 8, 2, batch_first=True)}, tokens()),
    "LSTM, time first inside": (
        lambda s, x: s.fc(s.r(x.transpose(0, 1))[0].transpose(0, 1)),
        {"r": nn.LSTM(8, 8)},
        tokens(),
    ),
    "norms and pools": (
        lambda s, x: s.fc(F.adaptive_avg_pool1d(s.g(s.n(x.mT)), 1)[..., 0]),
        {"n": nn.BatchNorm1d(8), "g": nn.GroupNorm(2, 8)},
        tokens(),
    ),
    "writes": (lambda s, x: s.fc(filled(x)), {}, tokens()),
    "one step at a time": (
        lambda s, x: torch.stack([s.fc(x[:, t]) for t in range(x.shape[1])], 1),
        {},
        tokens(),
    ),
    "complex numbers": (
        lambda s, x: s.fc(
            torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], 4, 2)) * 1j).flatten(
                -2
            )
        ),
        {},
        tokens(),
    ),
    "Fourier transform": (lambda s, x: s.fc(torch.fft.fft(x, dim=1).real), {}, tokens()),
    "constants": (lambda s, x: s.fc(x * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]), {}, tokens()),
    "last token": (
        lambda s, x: s.fc(x[torch.arange(len(x)), x.sum(-1).argmax(-1)]),
        {},
        tokens(),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_seen_to_be_right(name: str) -> None:
    run, parts, x = RIGHT[name]
    check_right(Program(run, **parts), x)


POSITIONS = "samples of its own on the first axis"
MANY = "several samples at once"
NOT_FIRST = r"fc\.weight: .* they lie on axis 1"
NOT_IN_ORDER = r"fc\.weight: .* not one after the other"

REFUSED: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any], torch.Tensor, str]] = {
    "positions": (
        lambda s, x: s.out(x + s.fc(s.pos)),
        {"pos": table(4)},
        tokens(),
        r"fc\.weight: .*" + POSITIONS,
    ),
    "positions of another number": (
        lambda s, x: s.out(x + s.fc(s.pos)),
        {"pos": table(6)},
        tokens(6),
        r"fc\.weight: .* it is the same for all",
    ),
    "positions, one for all": (
        lambda s, x: s.out(x + s.fc(s.pos[None])),
        {"pos": table(4)},
        tokens(),
        r"fc\.weight: .* it is the same for all",
    ),
    "positions alone": (
        lambda s, x: s.fc(s.pos) * 1.0,
        {"pos": table(4)},
        tokens(),
        r"fc\.weight: .* has met none",
    ),
    "positions in a loss": (
        lambda s, x: (x + s.fc(s.pos)).sum(),
        {"pos": table(4)},
        tokens(),
        POSITIONS,
    ),
    "embedded positions": (
        lambda s, x: s.tok(x) + s.fc(torch.arange(x.shape[1])),
        {"tok": nn.Embedding(9, 8), "fc": nn.Embedding(9, 8)},
        IDS,
        r"fc\.weight: .*" + POSITIONS,
    ),
    "learned queries": (
        lambda s, x: s.out(attend(s.fc(s.pos), x, x)),
        {"pos": table(4)},
        tokens(),
        r"fc\.weight: .*" + POSITIONS,
    ),
    **{
        f"sequence first, {length}": (
            lambda s, x: s.fc(x.transpose(0, 1)).transpose(0, 1),
            {},
            tokens(length),
            NOT_FIRST,
        )
        for length in (4, 6, 8)
    },
    "embedding, sequence first": (
        lambda s, x: s.fc(x.T).transpose(0, 1),
        {"fc": nn.Embedding(9, 8)},
        IDS,
        NOT_FIRST,
    ),
    "time before samples": (
        lambda s, x: s.fc(x.transpose(0, 1).reshape(-1, 8)).view(-1, len(x), 8).transpose(0, 1),
        {},
        tokens(6),
        NOT_IN_ORDER,
    ),
    "windows before samples": (
        lambda s, x: s.fc(x.view(len(x), 3, 2, 8).transpose(0, 1).reshape(-1, 2, 8))[: len(x)],
        {},
        tokens(6),
        NOT_IN_ORDER,
    ),
    "guidance": (
        lambda s, x: sum(s.fc(torch.cat([x, 0 * x])).chunk(2)),
        {},
        tokens(),
        NOT_IN_ORDER,
    ),
    "reversed": (lambda s, x: s.fc(x.flip(0)).flip(0), {}, tokens(), NOT_IN_ORDER),
    "rolled": (lambda s, x: s.fc(x.roll(1, 0)).roll(-1, 0), {}, tokens(), NOT_IN_ORDER),
    "sample by sample": (
        lambda s, x: torch.stack([s.fc(one) for one in x.unbind()]),
        {},
        tokens(),
        r"fc\.weight: .* they lie on none of its axes",
    ),
    "mean before": (lambda s, x: s.fc(x - x.mean(0)), {}, tokens(), r"fc\.weight: .*" + MANY),
    "mean after": (lambda s, x: s.fc(x).mean(0), {}, tokens(), MANY + ".*mean"),
    "sorted": (lambda s, x: s.fc(x.sort(0)[0]), {}, tokens(), r"fc\.weight: .*" + MANY),
    "transform of the batch": (
        lambda s, x: s.fc(torch.fft.fft(x, dim=0).real),
        {},
        tokens(),
        r"fc\.weight: .*" + MANY,
    ),
    "convolution along the samples": (
        lambda s, x: s.fc(x.flatten(0, 1).mT[None])[0].mT.reshape(x.shape),
        {"fc": nn.Conv1d(8, 8, 3, padding=1)},
        tokens(),
        r"fc\.weight: .* they lie on axis 2",
    ),
    **{
        f"{kind.__name__}, sequence first": (
            lambda s, x: s.fc(s.r(x)[0]),
            {"r": kind(8, 8)},
            tokens(),
            r"fc\.weight: .*" + MANY,
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "past every operator": (
        lambda s, x: s.fc(torch.from_numpy(x.detach().numpy()[::-1].copy())).flip(0) + 0 * x,
        {},
        tokens(),
        r"fc\.weight: .* read as numbers",
    ),
    "numbers": (
        lambda s, x: s.fc(torch.tensor(x.tolist()[::-1])).flip(0) + 0 * x,
        {},
        tokens(),
        r"fc\.weight: .* read as numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_is_refused(name: str) -> None:
    run, parts, x, message = REFUSED[name]
    check_refused(Program(run, **parts), x, message)


@pytest.mark.parametrize("length", [4, 6])
def test_attention(length: int) -> None:
    def inside(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = x if s.fc.batch_first else x.transpose(0, 1)
        y = s.fc(y, y, y, need_weights=False)[0]
        return s.out(y if s.fc.batch_first else y.transpose(0, 1))

    def straight(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.out(s.fc(x, x, x, need_weights=False)[0])

    for run in (inside, straight):
        check_right(Program(run, fc=nn.MultiheadAttention(8, 2, batch_first=True)), tokens(length))
    message = (
        rf"fc\.in_proj_weight\[0:8\]: an input of shape \({length}, 4, 8\) .* they lie on axis 1"
    )
    check_refused(Program(inside, fc=nn.MultiheadAttention(8, 2)), tokens(length), message)
    # The caller says that the first axis has the samples, and the layer attends along it.
    check_refused(Program(straight, fc=nn.MultiheadAttention(8, 2)), tokens(length), MANY)


@pytest.mark.parametrize("length", [4, 6])
def test_layers_of_transformers(length: int) -> None:
    def encoder(batch_first: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    check_right(encoder(True), tokens(length), target_modules=None)
    check_refused(encoder(False), tokens(length), r"layers\.0\.self_attn", target_modules=None)


def test_a_branch_on_values_is_seen_anew_each_time() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.fc(x.transpose(0, 1)).transpose(0, 1) if x.sum() > 0 else s.fc(x)

    base, x = Program(run), -tokens().abs()
    check_right(base, x, proved=False)
    check_refused(base, -x, NOT_FIRST)


def test_experts_that_choose_tokens() -> None:
    """Which rows an expert gets depends on values: such a call is followed each time."""
    check_right(Program(routed, **experts()), tokens(), proved=False)
    message = r"experts\.0\.weight: .* samples"
    check_refused(Program(routed, **experts()), tokens(), message, target_modules=["experts.0"])


def test_similarities_of_samples_are_a_result() -> None:
    model = model_of(Program(lambda s, x: s.fc(x[:, 0]) @ x[:, 1].T).eval())
    x = tokens()
    with lora_fx.adapter_ids(model, NAMES):
        found = model(x)
    for i, name in enumerate(NAMES):
        lora_fx.set_adapter(model, [] if name is None else name)
        assert_close(found[i], model(x)[i])


def test_training() -> None:
    """A batch norm's statistics are everybody's; gradients are those of each sample's adapter."""
    base = Program(lambda s, x: s.fc(s.n(x.mT).mT).square().mean(), n=nn.BatchNorm1d(8)).train()
    model, x = model_of(base), tokens()
    plain = copy.deepcopy(base)
    normed = plain.n(x.mT).mT
    lora_fx.set_adapter(model, list("abc"), per_sample=True)
    for _ in range(2):
        model.zero_grad()
        with lora_fx.adapter_ids(model, NAMES):
            model(x).backward()
        for i, name in enumerate(NAMES):
            if name is None:
                continue
            a, b = (getattr(getattr(model.fc, f"lora_{letter}"), name) for letter in "AB")
            mine = [one.detach().clone().requires_grad_() for one in (a, b)]
            scale = record_of(model).adapters[name].config.lora_alpha / len(a)
            out = plain.fc(normed[i]) + scale * normed[i] @ mine[0].T @ mine[1].T
            wanted = torch.autograd.grad(out.square().sum() / x.numel(), mine)
            for one, grad in zip((a, b), wanted, strict=True):
                assert_close(one.grad, grad)


@pytest.mark.parametrize("build", [TIMM["vit"], TIMM["swin"], TORCHVISION["swin"]])
def test_models_of_images(build: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    base, x = build()
    x = torch.cat([x] * 4)[:4]
    check_right(base, x + torch.randn(x.shape) / 10, target_modules=["qkv", "proj"])


# --- the rules ---------------------------------------------------------------------------------------


def filled_part(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3, 6, 5)
    out[:, 1:5].copy_(x)
    out[0, 0] = x[2, 0]
    return out


M = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "mm": lambda x: x[:, 0] @ M,
    "left mm": lambda x: M.T @ x[:, 0].T,
    "gram": lambda x: x[:, 0] @ x[:, 1].T,
    "bmm": lambda x: x @ x.mT,
    "baddbmm": lambda x: torch.baddbmm(x[:1] @ x[:1].mT, x, x.mT),
    "addmm": lambda x: torch.addmm(x[0, 0, :4], x[:, 0], M[:, :4]),
    "addbmm": lambda x: torch.addbmm(x[0] @ x[0].T, x, x.mT),
    "mv": lambda x: x[:, 0] @ M[:, 0],
    "dot": lambda x: x[0, 0] @ x[1, 0],
    "einsum": lambda x: torch.einsum("bsi,bti->st", x, x),
    "sum": lambda x: x.sum(1),
    "sum of all": lambda x: x.sum(),
    "mean": lambda x: x.mean((0, 2), keepdim=True),
    "amax": lambda x: x.amax(0),
    "max": lambda x: x.max(1),
    "max of two": lambda x: torch.max(x, x.flip(0)),
    "argmax": lambda x: x.argmax(0),
    "std": lambda x: x.std(1),
    "var_mean": lambda x: torch.var_mean(x, 0),
    "norm": lambda x: x.norm(dim=1),
    "logsumexp": lambda x: x.logsumexp(1),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2, 1)[0],
    "fft": lambda x: torch.fft.rfft(x, dim=1).real,
    "conv": lambda x: F.conv1d(x, torch.ones(2, 4, 3)),
    "conv of a sample": lambda x: F.conv1d(x.reshape(1, 12, 5), torch.ones(2, 12, 3)),
    "conv by the batch": lambda x: F.conv1d(x[:1], x[:, :4, :3].contiguous()),
    "layer norm": lambda x: F.layer_norm(x, (5,)),
    "rms norm": lambda x: F.rms_norm(x, (4, 5)),
    "group norm": lambda x: F.group_norm(x, 2),
    "instance norm": F.instance_norm,
    "batch norm, evaluated": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "pool": lambda x: F.max_pool1d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x[:, None], 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "attention, plain": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention of few heads": lambda x: F.scaled_dot_product_attention(
        x[:, None].expand(-1, 2, -1, -1), x[:, None], x[:, None], enable_gqa=True
    ),
    "attention with a mask": lambda x: F.scaled_dot_product_attention(
        x[:1, None].expand(3, -1, -1, -1), x[:1, None], x[:1, None], x[:, None, :, :4]
    ),
    "cat": lambda x: torch.cat([x, x.flip(0)], 1),
    "stack": lambda x: torch.stack([x, x.roll(1, 0)], 1),
    "pad": lambda x: F.pad(x, (1, 1), value=1.0),
    "pad the samples": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "reflect": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "repeat": lambda x: x.repeat(2, 1, 2),
    "index": lambda x: x[[2, 0], :, [1, 2]],
    "index by values": lambda x: M[x[:, 0, 0].abs().long() % 5],
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
    "index_select by values": lambda x: M.index_select(0, x[:, 0, 0].abs().long() % 5),
    "gather": lambda x: x.gather(0, torch.randint(0, 3, (2, 4, 5))),
    "gather by values": lambda x: M.expand(4, 5, 6)[:3].gather(1, x.abs().long() % 5),
    "where": lambda x: torch.where(x > 0, x.flip(0), 1.0),
    "masked_fill": lambda x: torch.ones(4, 5).masked_fill(x[0] > 0, 2.0) + x[1:],
    "index_add": lambda x: torch.zeros(2, 4, 5).index_add(0, torch.tensor([0, 1, 0]), x),
    "scatter_add": lambda x: torch.zeros(3, 4, 5).scatter_add(
        0, torch.tensor([0, 2, 0]).view(3, 1, 1).expand(3, 4, 5), x
    ),
    "index_put": lambda x: torch.zeros(5, 4, 5).index_put((torch.tensor([4, 0, 1]),), x),
    "index_put, added": lambda x: torch.zeros(2, 4, 5).index_put(
        (torch.tensor([0, 0, 1]),), x, accumulate=True
    ),
    "scatter": lambda x: torch.zeros(3, 4, 5).scatter(
        0, torch.tensor([2, 1, 0]).view(3, 1, 1).expand(3, 4, 5), x
    ),
    "masked_scatter": lambda x: torch.zeros(4, 4, 5).masked_scatter(torch.eye(4, 5) > 0, x),
    "index_copy": lambda x: torch.zeros(4, 4, 5).index_copy(0, torch.tensor([3, 1, 0]), x),
    "copy": lambda x: torch.zeros(3, 5, 4).copy_(x.mT),
    "write to a part": filled_part,
    "write in place": lambda x: x.clone().flip(0).add_(x),
    "out": lambda x: torch.add(x, x.flip(0), out=torch.empty(3, 4, 5)),
    "foreach": lambda x: torch._foreach_add([x[0], x[1]], [x[1], x[2]]),
    "view of another type": lambda x: x.view(torch.int32).roll(1, 0).view(torch.float32),
    "transposed in place": lambda x: x.clone().transpose_(0, 1),
    "lookup": lambda x: F.embedding(x.abs().long() % 5, M),
    "bag": lambda x: F.embedding_bag(x[:, 0].abs().long() % 5, M),
    "one hot": lambda x: F.one_hot(x.abs().long() % 5, 5),
    "LSTM": lambda x: nn.LSTM(5, 2)(x)[0],
    "fold": lambda x: F.unfold(x[:, None], 2),
    "cdist": lambda x: torch.cdist(x, x.flip(0)),
    "cross": lambda x: torch.linalg.solve(x[:, :4, :4] + 9 * torch.eye(4), x),
    "quantile": lambda x: x.quantile(0.5, dim=0),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid(), generator=torch.Generator().manual_seed(0)),
}


def results_of(run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    found = run(x)
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operator_loses_a_sample(name: str) -> None:
    """Whatever changes with a sample has it among those that it is computed from."""
    run = OPERATIONS[name]
    x = 3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    follower = Follower(nn.Module(), 3, 1)
    follower.enter(x)
    with follower:
        found = results_of(run, x)
    seen = [follower.read(one) for one in found]
    changes = 0
    for sample in range(3):
        for seed in range(3):
            other = x.clone()
            noise = torch.Generator().manual_seed(seed)
            other[sample] = 3 * torch.randn(4, 5, generator=noise)
            for one, new, sets in zip(found, results_of(run, other), seen, strict=True):
                changed = one != new
                if changed.any():
                    assert sets is not None
                    changes += 1
                    within = (sets[0] <= sample) & (-sets[1] >= sample)
                    assert within.expand(one.shape)[changed].all()
    assert changes
