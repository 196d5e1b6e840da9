"""A change of what a forward has read is seen under every front-end: each place of the grammar."""

from __future__ import annotations

import pytest

from tests.fuzz.choices import Seeded
from tests.fuzz.judge import judge
from tests.fuzz.program import Program
from tests.fuzz.reads import PLACES, write_read
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
@pytest.mark.parametrize("place", sorted(PLACES))
def test_a_change_is_seen(place: str, frontend: str, product: bool) -> None:
    for use in ("times", "if") if PLACES[place].number else _USES:
        program = _program(place, use, frontend, product)
        outcome = judge(program)
        assert outcome.kind in ("equal", "refused"), f"{outcome}\n{program}"
        if frontend == "regions" and not product:
            # A layer of its own goes on with its adapter, whatever the code around it does.
            assert outcome.kind == "equal" or "cannot be copied" in outcome.detail, (
                f"{outcome}\n{program}"
            )
