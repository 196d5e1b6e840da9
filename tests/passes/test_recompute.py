"""The pass that makes cheap inputs of products again in the backward."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.passes.graph import is_region
from lora_fx.runtime.kernels.recompute import Chain, source_of
from lora_fx.tools.bench.counted import saved_bytes
from tests.golden import check_golden, printed
from tests.numerics import TOLERANCE, assert_close

WIDTH, INNER, TOKENS = 16, 24, 12


def same(h: Tensor) -> Tensor:
    return h


class RMSNorm(nn.Module):
    """As models of transformers write it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))


class Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, INNER, bias=False)
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """It is not traced, as the blocks of most models."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.mlp = norm, mlp
        self.after: Callable[[Tensor], Tensor] = same

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 1e30:
            return x
        h = self.after(self.norm(x))
        return self.last(x + self.mlp(h))


CONFIG = LoraConfig(
    seed=0, r=3, lora_alpha=6, target_modules=["first", "gate", "up", "down", "last"]
)


def block(norm: str = "rms", mlp: str = "silu", dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(0)
    norms = {"rms": RMSNorm, "layer": lambda: nn.LayerNorm(WIDTH)}
    acts: dict[str, Callable[[], nn.Module]] = {
        "silu": lambda: Gated(nn.SiLU()),
        "gelu": lambda: Gated(nn.GELU("tanh")),
        "plain": lambda: Plain(nn.GELU()),
        "new": lambda: Plain(NewGELU()),
        "relu": lambda: Plain(nn.ReLU()),
        "inplace": lambda: Gated(nn.SiLU(inplace=True)),
    }
    return Block(norms[norm](), acts[mlp]()).to(dtype)


def rewritten(model: nn.Module, memory: Any, config: LoraConfig = CONFIG) -> nn.Module:
    found = lora_fx.rewrite(model, config, memory=memory)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return found


def pair(model: nn.Module, config: LoraConfig = CONFIG) -> tuple[nn.Module, nn.Module]:
    return rewritten(model, "balanced", config), rewritten(model, "fast", config)


def data(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def run(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of the input and the factors."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    out = model(x) if call is None else call(model, x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads]


def check(
    balanced: nn.Module,
    fast: nn.Module,
    x: Tensor,
    call: Any = None,
    tolerance: float | None = None,
) -> None:
    found, expected = run(balanced, x, call), run(fast, x, call)
    assert torch.equal(found[0], expected[0])
    assert len(found) == len(expected)
    assert_close(found, expected, tolerance)


def chains(model: nn.Module) -> list[str]:
    graphs = lora_fx.graphs(model).values()
    found = [node.target for graph in graphs for node in graph.nodes]
    return sorted(one.__name__ for one in found if isinstance(one, Chain))


def saved(model: nn.Module, x: Tensor | None = None) -> int:
    x = data(torch.float32) if x is None else x
    return saved_bytes(model, lambda: model(x.detach().requires_grad_()).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mlp", ["silu", "gelu", "plain", "new", "relu", "inplace"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_outputs_and_gradients_stay(norm: str, mlp: str, dtype: torch.dtype) -> None:
    check(*pair(block(norm, mlp, dtype)), data(dtype))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh gelu": lambda g: F.gelu(g, approximate="tanh"),
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "leaky": F.leaky_relu,
    "squared": lambda g: F.relu(g).square(),
    "power": lambda g: torch.pow(g, 3),
    "erf": lambda g: g * (1 + torch.erf(g / 1.5)),
    "swish": lambda g: g * torch.sigmoid(1.7 * g),
    "glu": lambda g, u: F.silu(g) * u,
    "turned glu": lambda g, u: u * F.gelu(g),
    "twice": lambda g, u: F.silu(g) * u + F.silu(u) * g,
    "divided": lambda g, u: F.silu(g) / (1 + u * u),
    "clamped": lambda g, u: F.silu(g.clamp(max=1.0)) * u.clamp(-1.0, 1.0),
    "norm": lambda g: F.layer_norm(g, (INNER,)),
    "rms": lambda g: F.rms_norm(g, (INNER,)),
    "both": lambda g: F.layer_norm(F.gelu(g), (INNER,)),
    "cast": lambda g: F.silu(g.float()).to(g.dtype),
    "softmax": lambda g: torch.softmax(g, -1),
    "sum": lambda g, u: g + u,
    "tanh": torch.tanh,
    "written": lambda g: F.silu(g).mul_(2.0),
    "into": lambda g: F.silu(g * 1.0, inplace=True),
    "one number": lambda g, u: F.silu(g) * u.mean(),
    "broadcast": lambda g, u: F.silu(g) * u[..., :1],
    "square root": lambda g: g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 0.1),
    "unused": lambda g, u: F.silu(g) + 0.0 * F.silu(u),
}


BOTH = (
    "glu",
    "turned glu",
    "twice",
    "divided",
    "clamped",
    "sum",
    "one number",
    "broadcast",
    "unused",
)


class Functional(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.operation, self.both = OPERATIONS[name], name in BOTH

    def forward(self, x):
        if self.both:
            return self.down(self.operation(self.gate(x), self.up(x)))
        return self.down(self.operation(self.gate(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LoraConfig(seed=0, r=3, target_modules=["gate", "up", "down"])
    balanced, fast = pair(Functional(name).to(dtype), config)
    check(balanced, fast, data(dtype))
    assert saved(balanced, data(dtype)) <= saved(fast, data(dtype))


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (40, WIDTH), (2, 3, 5, WIDTH)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check(*pair(block()), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "more", [{"lora_dropout": 0.3}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3}]
)
def test_dropout_and_dora(more: dict[str, Any]) -> None:
    config = LoraConfig(**{"seed": 0, "r": 3, "target_modules": CONFIG.target_modules, **more})
    check(*pair(block(), config), data())


def test_chains_are_found() -> None:
    assert chains(rewritten(block("rms", "silu"), "balanced")) == [
        "act_mul",
        "pow_mean_add_rsqrt_mul_mul",
    ]
    assert chains(rewritten(block("layer", "plain"), "balanced")) == ["act", "layer_norm"]
    # Of a ReLU the result is kept, which is the input of the product.
    assert chains(rewritten(block("layer", "relu"), "balanced")) == ["layer_norm"]
    assert chains(rewritten(block("layer", "inplace"), "balanced")) == ["layer_norm"]
    assert chains(rewritten(block(), "fast")) == []


class WrittenGELU(nn.Module):
    """As older models write it, to the last digit."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class ScaledGELU(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return x * (0.5 * (1 + torch.erf(self.slope * x / math.sqrt(2))))


def kernels(model: nn.Module) -> list[str]:
    """The operations by which chains are made again that are not their own."""
    graphs = lora_fx.graphs(model).values()
    found = [node.target for graph in graphs for node in graph.nodes]
    others = [one.again for one in found if isinstance(one, Chain) and one.again]
    nodes = (node for graph in others for node in graph.nodes if node.op == "call_function")
    return sorted(getattr(node.target, "__name__", "") for node in nodes)


WRITTEN: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gelu": (lambda: Plain(WrittenGELU()), ["gelu"]),
    "gated": (lambda: Gated(WrittenGELU()), ["gelu", "mul"]),
    "setting": (lambda: Plain(ScaledGELU(1.0)), ["gelu"]),
    "another function": (
        lambda: Plain(ScaledGELU(1.7)),
        ["add", "erf", "mul", "mul", "mul", "truediv"],
    ),
    "nine digits": (
        lambda: Plain(NewGELU()),
        ["add", "add", "mul", "mul", "mul", "mul", "pow", "tanh"],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_out_is_made_again_by_a_kernel(name: str, dtype: torch.dtype) -> None:
    mlp, expected = WRITTEN[name]
    torch.manual_seed(0)
    balanced, fast = pair(Block(nn.LayerNorm(WIDTH), mlp()).to(dtype))
    loaded = pickle.loads(pickle.dumps(balanced))
    assert kernels(balanced) == kernels(loaded) == expected
    check(balanced, fast, data(dtype))
    check(loaded, fast, data(dtype))
    assert saved(balanced.float()) < saved(fast.float())


def test_functions_that_are_written_out_in_a_forward() -> None:
    class Inline(Plain):
        def forward(self, x):
            g = self.up(x)
            return self.down(g * torch.sigmoid(g))

    torch.manual_seed(0)
    balanced, fast = pair(Block(nn.LayerNorm(WIDTH), Inline(nn.Identity())).double())
    assert kernels(balanced) == ["silu"]
    check(balanced, fast, data())


def test_a_kernel_is_that_of_the_settings_and_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    models = pair(Block(nn.LayerNorm(WIDTH), Plain(ScaledGELU(1.0))).double())
    for model in models:
        model.mlp.act.slope = 1.7
    check(*models, data())
    models = pair(Block(nn.LayerNorm(WIDTH), Plain(WrittenGELU())).double())
    monkeypatch.setattr(WrittenGELU, "forward", lambda self, x: x * torch.sigmoid(x))
    check(*models, data())


def test_golden() -> None:
    model = rewritten(block(), "balanced")
    graphs = lora_fx.graphs(model)
    text = "\n".join(printed(graphs[name]) for name in ("norm", "mlp"))
    text += "".join(
        printed(node.target.graph)
        for name in ("norm", "mlp")
        for node in graphs[name].nodes
        if isinstance(node.target, Chain)
    )
    check_golden("recompute", text)


@pytest.mark.parametrize("mlp", ["silu", "gelu", "new", "plain"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_keeps_less(norm: str, mlp: str) -> None:
    balanced, fast = pair(block(norm, mlp, torch.float32))
    size = 2 * TOKENS * 4
    # The output of the norm, and the input of the last product of the MLP.
    assert saved(fast) - saved(balanced) >= size * (WIDTH + INNER)


def test_keeps_less_than_the_frozen_model() -> None:
    model = block("rms", "silu", torch.float32)
    frozen = copy.deepcopy(model).requires_grad_(False)
    factors = sum(3 * 2 * TOKENS * 4 for _ in range(5))
    # The input of the first product and of the last, which are no outputs of chains.
    others = 2 * 2 * TOKENS * 4 * WIDTH
    inner = 2 * TOKENS * 4 * INNER
    found = saved(rewritten(model, "balanced"))
    assert found <= saved(frozen) - inner + factors + others


def test_an_output_that_a_hook_replaces_is_kept() -> None:
    models = pair(block())
    for model in models:
        model.norm.register_forward_hook(lambda module, given, out: out * 2)
    check(*models, data())


@pytest.mark.parametrize("hooked", ["norm", "mlp.act", "mlp", "mlp.up"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_see_what_they_see(hooked: str, kind: str) -> None:
    models, seen = pair(block()), ([], [])
    for model, mine in zip(models, seen, strict=True):
        module = model.get_submodule(hooked)
        if kind == "forward":
            module.register_forward_hook(lambda m, given, out, mine=mine: mine.append(out))
        elif kind == "pre":
            module.register_forward_pre_hook(lambda m, given, mine=mine: mine.append(given[0]))
        else:
            module.register_full_backward_hook(lambda m, i, o, mine=mine: mine.append(o[0]))
    check(*models, data())
    assert len(seen[0]) == len(seen[1]) > 0
    for one, other in zip(*seen, strict=True):
        assert_close(one.detach(), other.detach())
        assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_is_written_into_is_kept(grad: bool) -> None:
    def write(h: Tensor) -> Tensor:
        with torch.set_grad_enabled(grad):
            h.mul_(2)
        return h

    models = pair(block())
    for model in models:
        model.after = write
    check(*models, data())


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "replaced": lambda h: setattr(h, "data", h.detach() * 3),
    "data": lambda h: h.data.mul_(3),
    "view of data": lambda h: h.data.view(-1)[:7].fill_(1),
    "numpy": lambda h: h.detach().numpy().__imul__(3),
    "storage": lambda h: h.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("written", WRITERS.values(), ids=WRITERS)
def test_a_write_past_the_version_counter(written: Callable[[Tensor], Any]) -> None:
    def write(h: Tensor) -> Tensor:
        written(h)
        return h

    models = pair(block())
    for model in models:
        model.after = write
    check(*models, data())


def test_an_input_that_is_written_into_is_an_error() -> None:
    balanced, fast = pair(block())
    for model in (balanced, fast):
        held: list[Tensor] = []
        model.norm.register_forward_pre_hook(lambda m, given, held=held: held.append(given[0]))
        out = model(data())
        with torch.no_grad():
            held[0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_an_input_that_is_written_into_before_a_product_reads_the_output() -> None:
    results = []
    for model in pair(block()):
        first = model.norm(x := data().requires_grad_() * 1)
        model.mlp.gate(first)
        h = model.norm(x)
        with torch.no_grad():
            x.mul_(2)
        out = model.mlp.gate(h)
        results.append(torch.autograd.grad(out.sum(), [model.mlp.gate.lora_B.default]))
        out = model.mlp.gate(h)
        factor = model.mlp.gate.lora_A.default
        results[-1] += torch.autograd.grad(out.sum(), [factor])
    assert_close(*results)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_norm_weight_that_changes_before_the_backward(norm: str) -> None:
    """What shards parameters frees them when the module that has them is done."""
    results = []
    for model in pair(block(norm)):
        out = model(data())
        model.norm.weight.data.mul_(2)
        factors = [model.mlp.gate.lora_A.default, model.mlp.up.lora_A.default]
        results.append(torch.autograd.grad(out.sum(), factors))
        model.norm.weight.data.div_(2)
    assert_close(*results)


def test_a_view_is_made_again() -> None:
    models = pair(block())
    for model in models:
        model.after = lambda h: h.view(-1, WIDTH).view(2, TOKENS, WIDTH)
    check(*models, data())
    flat = pair(block())
    for model in flat:
        model.after = lambda h: h.view(1, -1, WIDTH)[:, : TOKENS * 2].view(2, TOKENS, WIDTH)
    check(*flat, data())
    turned = pair(block())
    for model in turned:
        model.after = lambda h: h.flip(0)
    check(*turned, data())


def test_source_of_views() -> None:
    model = rewritten(block(), "balanced")
    x = data().requires_grad_()
    y = model.norm(x)
    assert source_of(y) is not None
    assert source_of(y.view(-1, WIDTH)) is not None
    assert source_of(y.T if y.dim() == 2 else y.transpose(0, 1)) is None
    assert source_of(y[:1]) is None
    assert source_of(y * 1) is None
    assert source_of(y.detach()) is None
    with torch.no_grad():
        assert source_of(model.norm(x)) is None
    assert source_of(model.norm(x.detach())) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return out

    check(*pair(block()), data(), call)
    check(*pair(block("layer", "plain")), data(), call)


def test_offloading() -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            out: Tensor = model(x)
        return out

    check(*pair(block()), data(), call)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_autocast(norm: str, inside: bool) -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = model(x).float()
        return out

    models = pair(block(norm, dtype=torch.float32))
    x = data(torch.float32)
    if not inside:
        check(*models, x, call, tolerance=TOLERANCE[torch.bfloat16])
        return
    with torch.autocast("cpu", torch.bfloat16):
        check(*models, x, tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mlp", ["silu", "plain", "new"])
def test_second_derivatives(norm: str, mlp: str) -> None:
    results = []
    for model in pair(block(norm, mlp)):
        x = data().requires_grad_()
        factors = [p for p in model.parameters() if p.requires_grad]
        out = model(x).pow(2).sum()
        first = torch.autograd.grad(out, [x, *factors], create_graph=True)
        second = torch.autograd.grad(sum(one.pow(2).sum() for one in first), [x, *factors])
        results.append([*first, *second])
    assert_close([one.detach() for one in results[0]], [one.detach() for one in results[1]])


class Between(torch.autograd.Function):
    """Its gradient has nothing to do with what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


@pytest.mark.parametrize("between", [False, True])
def test_second_derivatives_of_what_is_between(between: bool) -> None:
    results = []
    for model in pair(block()):
        held: list[Tensor] = []

        def keep(h: Tensor, held: list[Tensor] = held) -> Tensor:
            held.append(h)
            return Between.apply(h).view(h.shape) if between else h  # type: ignore[no-any-return, no-untyped-call]

        model.after = keep
        factor = model.mlp.gate.lora_A.default
        (first,) = torch.autograd.grad(model(data()).pow(2).sum(), [factor], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), held)
        results.append(second)
    assert_close(results[0], results[1])


def test_trained_norm() -> None:
    config = LoraConfig(seed=0, r=3, target_modules=CONFIG.target_modules, modules_to_save=["norm"])
    balanced, fast = pair(block(), config)
    check(balanced, fast, data())
    results = []
    for model in (balanced, fast):
        weight = next(p for n, p in model.named_parameters() if p.requires_grad and "norm" in n)
        (first,) = torch.autograd.grad(model(data()).pow(2).sum(), [weight], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), [weight])
        results.append(second)
    assert_close(results[0], results[1])


def test_functional_transforms() -> None:
    from torch.func import functional_call, grad, vmap

    results = []
    for model in pair(block()):
        model(data())  # the first call is watched
        model.forward = lambda x, m=model: m.last(m.first(x) + m.mlp(m.norm(m.first(x))))
        factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        inner = nn.Sequential(model.first, model.norm, model.mlp, model.last)
        inner_factors = {n: p.detach() for n, p in inner.named_parameters() if p.requires_grad}
        assert factors
        per_sample = vmap(
            grad(lambda f, x, inner=inner: functional_call(inner, f, (x,)).sum()), (None, 0)
        )
        results.append([*per_sample(inner_factors, data()).values()])
    assert_close(*results)


def test_backward_twice() -> None:
    balanced, fast = pair(block())
    results = []
    for model in (balanced, fast):
        out = model(data()).pow(2).sum()
        out.backward(retain_graph=True)
        out.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()
    assert_close(*results)


def test_a_part_of_the_gradients() -> None:
    results = []
    for model in pair(block()):
        x = data().requires_grad_()
        out = model(x).pow(2).sum()
        up = model.mlp.up.lora_A.default
        first = torch.autograd.grad(out, [up], retain_graph=True)
        results.append([*first, *torch.autograd.grad(out, [x, up])])
    assert_close(*results)


def test_graph_of_one_product_after_another_was_freed() -> None:
    """Each product keeps what it needs itself, as in PyTorch."""
    model = rewritten(block(), "balanced")
    h = model.norm(data().requires_grad_())
    one, other = model.mlp.gate(h), model.mlp.up(h)
    one.sum().backward()
    (grad,) = torch.autograd.grad(other.sum(), [model.mlp.up.lora_A.default])
    expected = torch.autograd.grad(
        model.mlp.up(h.detach().requires_grad_()).sum(), [model.mlp.up.lora_A.default]
    )
    assert_close(grad, expected[0])


def test_nothing_is_held() -> None:
    import gc

    model = rewritten(block(), "balanced")
    x = data().requires_grad_()
    out = model(x)
    out.sum().backward()
    del out
    gc.collect()
    before = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
    for _ in range(3):
        model(x).sum().backward()
    gc.collect()
    assert sum(issubclass(type(one), Tensor) for one in gc.get_objects()) <= before


class Told(nn.Module):
    """An activation that reads what is not its own."""

    power = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.approximate, self.function = "none", F.silu
        self.slope, self.factors = 1.5, [0.5]

    def forward(self, x):
        scaled = F.gelu(x, approximate=self.approximate) * self.slope * FACTOR
        return scaled * self.function(x) * self.factors[0] * x.pow(self.power)


FACTOR = 2.0


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "attribute": lambda act, _: setattr(act, "approximate", "tanh"),
    "function": lambda act, _: setattr(act, "function", F.mish),
    "list": lambda act, _: act.factors.insert(0, 7.0),
    "global": lambda _, patch: patch.setitem(globals(), "FACTOR", 7.0),
    "class": lambda _, patch: patch.setattr(Told, "power", 7.0),
    "code": lambda _, patch: patch.setattr(Told, "forward", lambda self, x: x),
    "forward": lambda act, _: setattr(act, "forward", lambda x: x),
    "hook": lambda act, _: act.register_forward_hook(lambda *given: given[2] * 7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_backward_is_that_of_the_module_as_it_was(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    balanced, fast = pair(Block(RMSNorm(), Gated(Told())).double())
    expected = run(fast, data())
    assert "act_mul" in chains(balanced)

    def changed(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        CHANGES[change](model.mlp.act, monkeypatch)
        return out

    assert_close(run(balanced, data(), changed), expected)
    # From then on it is what it is now.
    fast.mlp.act = balanced.mlp.act
    check(balanced, fast, data())


def test_a_hook_of_an_activation_runs_once() -> None:
    calls: list[nn.Module] = []
    model = rewritten(block(), "balanced")
    model.mlp.act.register_forward_hook(lambda module, *_: calls.append(module))
    run(model, data())
    assert calls == [model.mlp.act]


class Noisy(nn.Module):
    def forward(self, x):
        x = x + torch.randn_like(x)
        return F.silu(x) * x


class Dropping(nn.Module):
    def forward(self, x):
        x = F.dropout(x, 0.5)
        return F.silu(x) * x


@pytest.mark.parametrize("act", [Noisy, Dropping])
def test_what_an_activation_draws_is_drawn_once(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    check(*pair(Block(nn.LayerNorm(WIDTH), Gated(act())).double()), data())


def test_an_activation_that_becomes_inplace() -> None:
    models = pair(block())
    for model in models:
        model.mlp.act.inplace = True
    check(*models, data())


@pytest.mark.parametrize("other", [nn.Tanh, nn.Dropout])
def test_an_activation_that_is_replaced(other: type[nn.Module]) -> None:
    models = pair(block())
    for model in models:
        model.mlp.act = other()
    check(*models, data())


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        g = self.fc(x)
        a = F.silu(g)
        g.mul_(3)
        return self.down(a * g)


def test_writes_between_the_operations_of_a_chain() -> None:
    balanced, fast = pair(
        Writing().double(), LoraConfig(seed=0, r=2, target_modules=["fc", "down"])
    )
    with torch.no_grad():
        assert torch.equal(balanced(data()), fast(data()))
    for model in (balanced, fast):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(data()).sum().backward()


def test_whole_graph() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(3))
            self.norm = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x):
            h = F.linear(x, self.a)
            h = F.layer_norm(h, (WIDTH,), self.norm)
            return F.linear(F.silu(F.linear(h, self.b)) * h, self.c)

    models = pair(Whole().double(), LoraConfig(seed=0, r=2, target_parameters=["a", "b", "c"]))
    assert chains(models[0]) == ["layer_norm", "silu_mul"]
    check(*models, data())


def test_copies() -> None:
    balanced, fast = pair(block())
    check(copy.deepcopy(balanced), fast, data())
    buffer = io.BytesIO()
    torch.save(balanced, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    check(loaded, fast, data())
    assert chains(loaded) == chains(balanced)
    assert type(loaded.norm) is type(balanced.norm)


def test_outputs_hold_no_recipe() -> None:
    model = rewritten(block(), "balanced")
    out = model.norm(data().requires_grad_()).detach()
    buffer = io.BytesIO()
    torch.save(out, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), out)


def test_later_adapters() -> None:
    model = rewritten(block(), "balanced")
    before = chains(model)
    lora_fx.add_adapter(model, CONFIG, "other")
    lora_fx.set_adapter(model, "other")
    assert chains(model) == before
    with lora_fx.disable_adapter(model):
        assert chains(model) == []
        assert not is_region(model.norm)
    assert chains(model) == before
    fast = rewritten(block(), "fast")
    lora_fx.add_adapter(fast, CONFIG, "other")
    lora_fx.set_adapter(fast, "other")
    assert chains(fast) == []


def test_merged_classes() -> None:
    merged = lora_fx.merge(rewritten(block(), "balanced"))
    assert type(merged.norm) is RMSNorm
    assert type(merged.mlp.act) is nn.SiLU


def test_the_argument_is_not_changed() -> None:
    model = block()
    rewritten(model, "balanced")
    assert type(model.norm) is RMSNorm
    assert type(model.mlp) is Gated


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="memory='most' is unknown"):
        lora_fx.rewrite(block(), CONFIG, memory="most")  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiles() -> None:
    balanced, fast = pair(nn.Sequential(block("rms", "silu", torch.float32).mlp, nn.Linear(16, 16)))
    found = torch.compile(balanced, fullgraph=True)
    assert_close(run(found, data(torch.float32)), run(fast, data(torch.float32)))


class PostNorm(nn.Module):
    """Its norm is the last thing that it does, and the next one reads what that gives."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = Gated(nn.SiLU()), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x + self.mlp(x)) if x.sum() < 1e30 else x


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_sharded_norms(alone: bool, trained: bool) -> None:
    """FSDP2 frees the weight of a norm before a product of the next block makes its input again."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(PostNorm() for _ in range(3)))
    saved = {"modules_to_save": ["norm"]} if trained else {}
    config = LoraConfig(seed=0, r=3, target_modules=["gate", "up", "down"], **saved)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        models = pair(model, config)
        for one in models:
            for layer in one:
                for part in (layer.norm, layer.mlp) if alone else ():
                    fully_shard(part)
                fully_shard(layer)
            fully_shard(one)
        results = [run(one, data(torch.float32)) for one in models]
    finally:
        dist.destroy_process_group()
    whole = [[getattr(t, "full_tensor", lambda t=t: t)() for t in found] for found in results]
    assert_close(*whole)
