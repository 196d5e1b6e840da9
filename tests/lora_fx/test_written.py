"""Programs that write into what an adapted operation gives, in place or behind autograd's back.

The oracle is the same program over the same layer with the adapted weight in the place of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_fx
from tests.algebra import randomize, scale_of
from tests.dora import adapted_weight, magnitude_of, randomize_magnitudes, steer
from tests.numerics import assert_close
from tests.zoo import FORMS, Form, sample, seeded

# --- what programs are made of ----------------------------------------------------------------------


def add(y: Tensor) -> Tensor:
    y += 0.5
    return y


def multiply(y: Tensor) -> Tensor:
    y *= 1.5
    return y


def add_itself(y: Tensor) -> Tensor:
    return y.add_(torch.tanh(y))


def relu(y: Tensor) -> Tensor:
    return F.relu(y, inplace=True)


def set_all(y: Tensor) -> Tensor:
    y[...] = torch.sin(y)
    return y


def set_some(y: Tensor) -> Tensor:
    y[..., 0] = 0.25
    return y


def copy(y: Tensor) -> Tensor:
    return y.copy_(torch.cos(y))


def write_view(y: Tensor) -> Tensor:
    y[..., :2].mul_(3.0)
    return y


def write_whole_view(y: Tensor) -> Tensor:
    y.unsqueeze(0).sub_(0.5)
    return y


def keep_view(y: Tensor) -> Tensor:
    view = y[..., 1:]
    y.mul_(2.0)
    return y + torch.tanh(view.sum())


def write_out(y: Tensor) -> Tensor:
    return torch.add(y, 1.0, out=y)


def tanh(y: Tensor) -> Tensor:
    return torch.tanh(y)


def gelu(y: Tensor) -> Tensor:
    return F.gelu(y)


def product(y: Tensor) -> Tensor:
    return y * torch.tanh(y)


def data_multiply(y: Tensor) -> Tensor:
    y.data.mul_(1.5)
    return y


def data_set(y: Tensor) -> Tensor:
    y.data[..., 0] = 0.5
    return y


def data_of_view(y: Tensor) -> Tensor:
    y[..., 1:].data.add_(0.5)
    return y


def unrecorded(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(1.5)
    return y


def unrecorded_out(y: Tensor) -> Tensor:
    with torch.no_grad():
        torch.add(y, 1.0, out=y)
    return y


def detached(y: Tensor) -> Tensor:
    y.detach().neg_()
    return y


def array(y: Tensor) -> Tensor:
    y.detach().numpy()[..., 0] = 2.0
    return y


PURE = (tanh, gelu, product)
RECORDED = (add, multiply, add_itself, relu, set_all, set_some, copy, write_view, keep_view)
RECORDED += (write_whole_view, write_out)
HIDDEN = (data_multiply, data_set, data_of_view, unrecorded, unrecorded_out, detached, array)
Step = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Program:
    """An operation, and what is done with what it gives.

    Attributes:
        form: The operation.
        steps: By the module that calls it.
        hook: By a forward hook on it.
        late: By the caller, after the loss and before the backward.
        to_input: With what it was given, after it ran.
        traced: Whether the module's own forward can be traced.
    """

    form: Form
    steps: tuple[Step, ...] = ()
    hook: tuple[Step, ...] = ()
    late: tuple[Step, ...] = ()
    to_input: tuple[Step, ...] = ()
    traced: bool = True

    def __repr__(self) -> str:
        names = {
            field: [step.__name__ for step in getattr(self, field)]
            for field in ("steps", "hook", "late", "to_input")
        }
        return f"{self.form.name}, {names}, traced={self.traced}"

    def model(self) -> nn.Module:
        kind = Traced if self.traced else Untraced
        return seeded(lambda: kind(self.form.build(), self.steps, self.to_input))().double()


class Traced(nn.Module):
    def __init__(self, op: nn.Module, steps: tuple[Step, ...], to_input: tuple[Step, ...]) -> None:
        super().__init__()
        self.op, self.steps, self.to_input = op, steps, to_input

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.op(x)
        for step in self.to_input:
            step(x)
        for step in self.steps:
            y = step(y)
        return y


class Untraced(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1 if float(x.detach().sum()) == 0.125 else x)


def adapted_model(program: Program, base: nn.Module, use_dora: bool, optimize: bool) -> nn.Module:
    """With random factors, and magnitudes whose gains are not near 0: there nobody reads an output."""
    form = program.form
    config = lora_fx.LoraConfig(
        r=2 * form.groups, lora_alpha=3, target_modules=[form.site], use_dora=use_dora
    )
    adapted = randomize(lora_fx.rewrite(base, config, optimize=optimize))
    return steer(form, base, adapted) if use_dora else adapted


def run(
    program: Program, op: nn.Module, call: Callable[[Tensor], Tensor], leaves: tuple[Tensor, ...]
) -> list[Tensor] | Exception:
    """Output, and gradients of x and the leaves; or how it fails."""
    x = program.form.x(torch.float64)
    if x.is_floating_point():
        x.requires_grad_()

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        for step in program.hook:
            step(y)

    handle = op.register_forward_hook(hook)
    try:
        y = call(x)
        out = y.detach().clone()
        if not y.requires_grad:
            return [out]
        loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
        for step in program.late:
            step(y)
        wanted = [x, *leaves] if x.requires_grad else [*leaves]
        return [out, *torch.autograd.grad(loss, wanted)]
    except RuntimeError as error:
        return error
    finally:
        handle.remove()


def exactly(program: Program, base: nn.Module, adapted: nn.Module, use_dora: bool) -> Any:
    form = program.form
    own = form.factors(adapted)
    leaves = tuple(p.detach().clone().requires_grad_() for p in own)
    if use_dora:
        leaves = (*leaves, magnitude_of(form, adapted).detach().clone().requires_grad_())

    def call(x: Tensor) -> Tensor:
        weight = adapted_weight(form, base, scale_of(adapted), *leaves)
        return torch.func.functional_call(base, weight, (x,))

    return run(program, base.op, call, leaves)


def check(
    program: Program,
    use_dora: bool,
    optimize: bool,
    mode: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """That an adapted program does what the program does with the adapted weight.

    Args:
        program: The program.
        use_dora: Whether the adapter has a magnitude.
        optimize: Whether operation and branch are fused.
        mode: What it runs in.
    """
    base = program.model()
    adapted = adapted_model(program, base, use_dora, optimize)
    leaves = program.form.factors(adapted)
    if use_dora:
        leaves = (*leaves, magnitude_of(program.form, adapted))
    with mode():
        exact = exactly(program, base, adapted, use_dora)
        found = run(program, adapted.op, adapted, leaves)
    if isinstance(exact, Exception):
        # What autograd refuses of the plain layer it refuses here, and nothing else.
        assert type(found) is type(exact), f"{found} instead of {exact}"
        return
    if isinstance(found, Exception):
        raise found
    assert_close(found, exact, 1e-11)


FIELD = [
    form
    for form in FORMS
    if not form.kind.startswith("experts")
    and form.name != "conv1d unbatched"
    # PyTorch drops or scales the gradient of rows of W; here it is that of A.
    and (form.kind != "embedding" or form.name == "nn.Embedding")
]
SQUARE = Form(
    "square", lambda: nn.Linear(5, 5), lambda: torch.randn(3, 5), "weight", "out_in", "linear"
)
MODES = {
    "grad": contextlib.nullcontext,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
}
WAYS = pytest.mark.parametrize(
    ("use_dora", "optimize"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["DoRA", "DoRA, canonical", "LoRA", "LoRA, canonical"],
)


@WAYS
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "untraced"])
@pytest.mark.parametrize("step", [*RECORDED, *HIDDEN], ids=lambda step: step.__name__)
def test_who_writes_into_an_output_gets_the_gradients_of_the_program(
    step: Step, traced: bool, use_dora: bool, optimize: bool
) -> None:
    named = {form.name: form for form in FIELD}
    for form in (named["nn.Linear"], SQUARE, named["conv2d"], named["nn.Embedding"]):
        check(Program(form, (step, gelu), traced=traced), use_dora, optimize)


class Cut(nn.Module):
    """One weight for two, of which one is adapted; both are written into."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.qk, self.step = nn.Linear(5, 12), step

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.step(self.qk(x)).chunk(2, -1)
        return q * k


@WAYS
@pytest.mark.parametrize(
    "step", [add, set_some, data_multiply, unrecorded], ids=lambda s: s.__name__
)
def test_a_part_of_what_an_operation_gives(step: Step, use_dora: bool, optimize: bool) -> None:
    base = seeded(lambda: Cut(step))().double()
    config = lora_fx.LoraConfig(r=2, target_modules=["qk.0_6"], use_dora=use_dora)
    adapted = randomize_magnitudes(randomize(lora_fx.rewrite(base, config, optimize=optimize)))
    own = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    a, b, *m = leaves = [p.detach().requires_grad_() for p in own.values()]
    weight = base.qk.weight.detach()
    part = weight[:6] + scale_of(adapted) * b @ a
    if m:
        part = (m[0] / part.detach().norm(dim=1))[:, None] * part
    x = sample(3, 5, dtype=torch.float64)
    exact = torch.func.functional_call(base, {"qk.weight": torch.cat((part, weight[6:]))}, (x,))
    found = adapted(x)
    assert_close(found, exact)
    found.square().sum().backward()
    exact.square().sum().backward()
    assert_close([p.grad for p in own.values()], [leaf.grad for leaf in leaves], 1e-11)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    def some(most: int, *kinds: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(draw(st.lists(st.sampled_from(sum(kinds, ())), max_size=most)))

    form = draw(st.sampled_from([*FIELD, SQUARE]))
    traced = draw(st.booleans())
    return Program(
        form,
        steps=some(4, PURE, RECORDED, HIDDEN),
        hook=some(1, RECORDED[:-1], HIDDEN) if draw(st.booleans()) else (),
        late=some(2, HIDDEN),
        to_input=some(1, RECORDED) if draw(st.integers(0, 3)) == 0 else (),
        traced=traced,
    )


@given(programs(), st.sampled_from(list(MODES)), st.booleans(), st.booleans())
@settings(max_examples=300)
def test_any_program_that_writes_computes_what_the_adapted_weight_would(
    program: Program, mode: str, use_dora: bool, optimize: bool
) -> None:
    check(program, use_dora, optimize, MODES[mode])


STRIDES: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(5, 3).T,
    "sequence first": lambda: torch.randn(3, 2, 5).transpose(0, 1),
    "features first": lambda: torch.randn(5, 2, 3).permute(1, 2, 0),
    "expanded": lambda: torch.randn(1, 3, 5).expand(4, 3, 5),
    "every other": lambda: torch.randn(3, 10)[:, ::2],
    "channels last": lambda: torch.randn(2, 5, 3, 3).permute(0, 2, 3, 1),
}


@WAYS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("inputs", STRIDES.values(), ids=STRIDES)
def test_branches_are_added_however_the_input_lies_in_memory(
    inputs: Callable[[], Tensor], bias: bool, use_dora: bool, optimize: bool
) -> None:
    form = Form("", lambda: nn.Linear(5, 7, bias), inputs, "weight", "out_in", "linear")
    check(Program(form, (data_multiply, gelu)), use_dora, optimize)
