"""What a forward reads may change, and what it leaves behind stays: each place of the grammar."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lora_fx
from tests.fuzz.choices import Seeded
from tests.fuzz.judge import imported, judge
from tests.fuzz.program import Program
from tests.fuzz.reads import AROUND, GOES_ON, PLACES, write_read, write_state
from tests.fuzz.source import Scope, Source

_USES = {"times": ("0.5", "2.0"), "lookup": ("None", "0.5"), "if": ("2", "3")}


def _program(place: str, use: str, frontend: str, product: bool) -> Program:
    source = Source(Seeded("0"))
    scope = Scope(source, "Net", "", 4)
    value, other = _USES[use]
    write_read(scope, PLACES[place], use, value, other, change=bool(PLACES[place].change))
    scope.add(f"x = x @ {scope.parameter(4, 4)}" if product else f"x = {scope.linear()}(x)")
    source.classes.append(str(scope))
    source.calls.append('("forward", (x(2, 3, 4),), {})')
    return Program(
        str(source),
        ({"r": 2, "target_modules": ".*"},),
        frontend,
        example=frontend == "export",
        actions=("merge", "call", "change", "call"),
    )


@pytest.mark.parametrize("product", [False, True], ids=["layer", "product"])
@pytest.mark.parametrize("frontend", ["regions", "symbolic", "export"])
@pytest.mark.parametrize("place", sorted(PLACES.keys() - {"default"}))  # a graph fixes __defaults__
def test_see_a_change(place: str, frontend: str, product: bool) -> None:
    for use in ("times", "if") if PLACES[place].number else _USES:
        program = _program(place, use, frontend, product)
        outcome = judge(program)
        refused = outcome.kind == "refused" and any(
            reason in outcome.detail for reason in _reasons(frontend, product)
        )
        assert outcome.kind == "equal" or refused, f"{outcome}\n{program}"


def _reasons(frontend: str, product: bool) -> list[str]:
    """Why a model may be refused: never because of what its forward reads."""
    reasons = ["cannot be copied"]
    if frontend == "symbolic":
        reasons.append("does not trace symbolically")
    if frontend == "export":
        reasons.append("torch.export fails")
    if frontend == "regions" and product:
        reasons.append("selects no operation")
    return reasons


def _outputs(module: ModuleType, frontend: str) -> list[torch.Tensor]:
    """What three calls give, of a model that was just built; adapted if there is a front-end."""
    random.seed(0)
    np.random.seed(0)
    for name in [name for name in os.environ if name.startswith("STATE_")]:
        del os.environ[name]
    torch.manual_seed(0)
    model = module.build().eval()
    x = torch.ones(2, 4)
    if frontend:
        example = x if frontend == "export" else None
        config = lora_fx.LoraConfig(r=2, target_modules=".*")
        model = lora_fx.rewrite(model, config, example, frontend=frontend)
    with torch.no_grad():
        return [model(x) for _ in range(3)]


@pytest.mark.parametrize("product", [False, True], ids=["layer", "product"])
@pytest.mark.parametrize("frontend", ["regions", "symbolic"])
@pytest.mark.parametrize("state", sorted(AROUND.keys() - GOES_ON))
def test_leave_behind_what_a_call_leaves(
    state: str, frontend: str, product: bool, tmp_path: Path
) -> None:
    source = Source(Seeded("0"))
    scope = Scope(source, "Net", "", 4)
    write_state(scope, state)
    scope.add(f"x = x @ {scope.parameter(4, 4)}" if product else f"x = {scope.linear()}(x)")
    source.classes.append(str(scope))
    with imported(str(source), tmp_path) as module:
        expected = _outputs(module, "")
    with imported(str(source), tmp_path) as module:
        found = _outputs(module, frontend)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
