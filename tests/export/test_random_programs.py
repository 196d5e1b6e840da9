"""Random programs, exported merged and with adapters as inputs, against W' = W + s·BA in the original model.

What an adapter changes is written out here by hand for each kind of operation, so that nothing of the library
judges itself.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig, OnnxSession
from lora_fx.export.adapter_file import manifest_of_file
from lora_fx.export.adapter_manifest import Manifest
from lora_fx.export.onnx import export_onnx

WIDTH, HEADS, VOCABULARY = 6, 2, 11
PART = WIDTH // HEADS
SCALE = 1.5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Kind:
    """An operation that is linear in a weight, and keeps [batch, sequence, WIDTH].

    Attributes:
        shape: Of the weight; of a layer's, where ``layer`` makes one.
        apply: The operation: its weight or layer, and x.
        delta: What A and B change of the weight.
        layer: Makes a module that holds the weight, and a bias.
    """

    shape: tuple[int, ...]
    apply: Callable[[Any, Tensor], Tensor]
    delta: Callable[[Tensor, Tensor], Tensor]
    layer: Callable[[], nn.Module] | None = None


def product(a: Tensor, b: Tensor) -> Tensor:
    return b @ a


def turned(a: Tensor, b: Tensor) -> Tensor:
    return (b @ a).mT


def grouped(groups: int) -> Callable[[Tensor, Tensor], Tensor]:
    def delta(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.chunk(groups), b.chunk(groups), strict=True)
        return torch.cat([torch.einsum("rik,orz->oik", one, other) for one, other in pairs])

    return delta


def heads(w: Tensor, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    rows = x.unflatten(-1, (HEADS, PART)).permute(2, 0, 1, 3).reshape(HEADS, batch * length, PART)
    out = torch.bmm(rows, w)
    return out.view(HEADS, batch, length, PART).permute(1, 2, 0, 3).reshape(batch, length, WIDTH)


def convolved(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.mT).mT


SQUARE = (WIDTH, WIDTH)
KINDS: Mapping[str, Kind] = {
    "layer": Kind(SQUARE, lambda m, x: m(x), product, lambda: nn.Linear(WIDTH, WIDTH)),
    "right": Kind(SQUARE, lambda w, x: x @ w, turned),
    "linear": Kind(SQUARE, lambda w, x: nn.functional.linear(x, w), product),
    "left": Kind(SQUARE, lambda w, x: (w @ x.mT).mT, product),
    "einsum": Kind(SQUARE, lambda w, x: torch.einsum("bsd,de->bse", x, w), turned),
    "einsum-left": Kind(SQUARE, lambda w, x: torch.einsum("ed,bsd->bse", w, x), product),
    "transposed": Kind(SQUARE, lambda w, x: x @ w.T, product),
    "viewed": Kind((WIDTH, 2, 3), lambda w, x: x @ w.view(WIDTH, WIDTH).t(), product),
    "conv": Kind(
        (WIDTH, WIDTH, 3), convolved, grouped(1), lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    ),
    "grouped-conv": Kind(
        (WIDTH, PART, 3),
        convolved,
        grouped(2),
        lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2),
    ),
    "heads": Kind((HEADS, PART, PART), heads, turned),
}


class Program(nn.Module):
    """Steps one after the other, each with a weight of its own or that of an earlier step."""

    def __init__(self, steps: tuple[tuple[str, int, bool], ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.kinds: list[str] = []
        self.owners: list[int] = []
        self.bent: list[bool] = []
        for index, (kind, back, bent) in enumerate(steps):
            earlier = [at for at, one in enumerate(self.kinds) if one == kind]
            shared = self.owners[earlier[-1]] if back and earlier else index
            self.kinds.append(kind)
            self.owners.append(shared)
            self.bent.append(bent)
            if shared != index:
                continue
            made = KINDS[kind]
            if made.layer is not None:
                self.add_module(f"s{index}", made.layer())
            else:
                fan = made.shape[1] if len(made.shape) < 3 else made.shape[-1] * 2
                self.register_parameter(
                    f"s{index}", nn.Parameter(torch.randn(made.shape) / fan**0.5)
                )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for kind, owner, bent in zip(self.kinds, self.owners, self.bent, strict=True):
            x = KINDS[kind].apply(getattr(self, f"s{owner}"), x)
            x = x.tanh() if bent else x
        return x

    def weights(self) -> dict[str, str]:
        """Site name to the kind of operation that it has."""
        return {
            "embed": "embed",
            **{f"s{owner}": kind for kind, owner in zip(self.kinds, self.owners, strict=True)},
        }


def delta_of(kind: str, a: Tensor, b: Tensor) -> Tensor:
    return turned(a, b) if kind == "embed" else KINDS[kind].delta(a, b)


def dense(program: Program, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Program:
    """The original with W + BA in the place of every W."""
    result = copy.deepcopy(program)
    with torch.no_grad():
        for name, kind in program.weights().items():
            found = getattr(result, name)
            weight = found.weight if isinstance(found, nn.Module) else found
            change = delta_of(kind, *(one.double() for one in factors[name]))
            weight.copy_((weight.double() + change.reshape(weight.shape)).to(weight))
    return result


def drawn(
    manifest: Manifest, program: Program, rank: int
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """An adapter as a file takes it, and the same as A and B of PEFT."""
    values: dict[str, Tensor] = {}
    factors = {}
    for site in manifest.sites:
        a, b = site.inputs()
        own = rank * site.groups if site.family == "conv" else rank
        values[a.name] = torch.randn(a.sized(own)) / 2
        values[b.name] = torch.randn(b.sized(own)) / 3
        pair = values[a.name], values[b.name]
        factors[site.name] = pair if site.family == "conv" else (pair[0].mT, pair[1].mT)
    assert factors.keys() == program.weights().keys()
    return values, factors


def rewritten(program: Program, rank: int) -> nn.Module:
    """With a trained adapter at every weight."""
    config = LoraConfig(
        r=2 * rank, lora_alpha=2 * rank * SCALE, target_modules=list(program.weights())
    )
    # optimize=False: what is exported is the same, and fusing is tested elsewhere.
    model = lora_fx.rewrite(program, config, optimize=False).eval()
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def trained_factors(model: nn.Module, program: Program) -> dict[str, tuple[Tensor, Tensor]]:
    parameters = dict(model.named_parameters())
    found = {}
    for name in program.weights():
        own = [key for key in parameters if "lora_" in key and _site(key) == name]
        a, b = sorted(own)
        found[name] = parameters[a].detach(), parameters[b].detach() * SCALE
    return found


def _site(key: str) -> str:
    first = key.split(".")[0]
    return first.removesuffix("_lora").split("_lora")[0]


def check(program: Program, session: OnnxSession, want: nn.Module, adapter: str | None) -> None:
    """One to three texts of several lengths."""
    for batch in (1, 2, 3):
        ids = torch.randint(VOCABULARY, (batch, 2 + batch))
        with torch.no_grad():
            expected = want(ids)
        got = session.run(ids, adapter=adapter)["output"]
        torch.testing.assert_close(got, expected, **CLOSE)


def check_program(steps: tuple[tuple[str, int, bool], ...], seed: int, rank: int) -> None:
    program = Program(steps, seed).eval()
    model = rewritten(program, rank)
    ids = torch.randint(VOCABULARY, (2, 5))
    with tempfile.TemporaryDirectory() as folder:
        merged, swaps = Path(folder, "merged.onnx"), Path(folder, "inputs.onnx")
        factors = trained_factors(model, program)
        report = export_onnx(model, merged, ids)
        assert report.inputs == {"ids": ("batch", "sequence")}
        check(program, OnnxSession(merged, "cpu"), dense(program, factors), None)

        report = export_onnx(model, swaps, ids, adapters="inputs")
        assert report.inputs == {"ids": ("batch", "sequence")}
        session = OnnxSession(swaps, "cpu")
        session.load_adapter("trained", model)
        check(program, session, dense(program, factors), "trained")
        manifest = manifest_of_file(swaps)
        for other in (4, 1, 3, 2):
            values, pairs = drawn(manifest, program, other)
            session.load_adapter("drawn", values)
            check(program, session, dense(program, pairs), "drawn")
            check(program, session, program, None)  # in memory that the adapter has left


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 1), st.booleans()),
    min_size=1,
    max_size=7,
).map(tuple)
OPTIONS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


def test_every_kind_of_operation_used_twice() -> None:
    check_program(tuple((kind, use, True) for kind in KINDS for use in (0, 1)), 1, 2)


@settings(max_examples=2, derandomize=True, **OPTIONS)
@given(STEPS, st.integers(0, 99), st.integers(1, 3))
def test_random_programs(steps: tuple[tuple[str, int, bool], ...], seed: int, rank: int) -> None:
    check_program(steps, seed, rank)


@pytest.mark.slow
@settings(max_examples=40, **OPTIONS)
@given(STEPS, st.integers(0, 999), st.integers(1, 4))
def test_many_random_programs(
    steps: tuple[tuple[str, int, bool], ...], seed: int, rank: int
) -> None:
    check_program(steps, seed, rank)
