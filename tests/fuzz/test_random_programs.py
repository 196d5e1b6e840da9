"""Random programs end equal to the dense oracle, or in a typed refusal.

A failure prints the program, shrunk by hypothesis. ``python -m tests.fuzz`` runs as many as one likes and
counts what came of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from tests.fuzz.choices import Drawn
from tests.fuzz.features import OFF
from tests.fuzz.grammar import write_program
from tests.fuzz.program import Program
from tests.fuzz.worker import Worker, worker

_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return write_program(Drawn(draw, OFF))


@pytest.fixture(scope="module")
def judges() -> Iterator[Worker]:
    with worker() as one:
        yield one


def check(judges: Worker, program: Program) -> None:
    outcome = judges.judge(program)
    event(outcome.label)
    event("adapted" if outcome.sites else "nothing adapted")
    note(str(program))
    note(str(outcome))
    assert not outcome.failed, str(outcome)


@given(programs())
@settings(max_examples=250, suppress_health_check=_CHECKS)
def test_a_random_program_is_right_or_refused(judges: Worker, program: Program) -> None:
    check(judges, program)


# They take a minute or two, and less than five on a busy core; ``python -m tests.fuzz`` is for thousands.
@pytest.mark.slow
@given(programs())
@settings(max_examples=600, suppress_health_check=_CHECKS)
def test_many_random_programs_are_right_or_refused(judges: Worker, program: Program) -> None:
    check(judges, program)
