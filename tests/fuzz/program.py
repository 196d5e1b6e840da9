"""A program: what a model is, what is done with it, and how it is adapted. It travels as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

__all__ = ["Outcome", "Program"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the fuzzer.

    Attributes:
        source: A Python module with ``build()`` (a new model, always the same), ``calls()`` (the calls,
            each a method's name, arguments and keyword arguments) and ``change(model)``.
        configs: Arguments of ``LoraConfig``, one for each adapter.
        frontend: How the model is captured.
        example: Whether the first call is given to ``rewrite`` as example inputs.
        optimize: Whether branches are fused.
        dtype: Of the model: ``float64``, ``float32`` or ``bfloat16``.
        quantize: Format in which the base is stored; empty for none.
        actions: What is done after the rewrite, in this order; see :mod:`tests.fuzz.judge`.
        features: What the grammar used, for the table of counts.
        memory: What the backward keeps, as ``rewrite`` takes it.
    """

    source: str
    configs: tuple[dict[str, Any], ...] = ({},)
    frontend: str = "auto"
    example: bool = False
    optimize: bool = True
    dtype: str = "float64"
    quantize: str = ""
    actions: tuple[str, ...] = ("call",)
    features: tuple[str, ...] = ()
    memory: str = "fast"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        """What :meth:`to_json` wrote."""
        values = json.loads(text)
        for name in ("configs", "actions", "features"):
            values[name] = tuple(values[name])
        return cls(**values)

    def __str__(self) -> str:
        options = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name not in ("source", "features")
        ]
        return "\n".join([self.source.rstrip(), "", *(f"# {option}" for option in options)])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        kind: ``equal``, ``refused``, ``silent`` (other numbers), ``raw`` (another exception than a
            ``LoraFxError``), ``dead`` (the process ended or hung), ``unstable`` (other
            numbers where the original loses all digits by itself), or ``invalid``: the program fails
            without lora_fx, which is a mistake of the grammar.
        stage: Where it ended: ``rewrite``, ``call``, ``merge``, ...
        detail: The error, or the numbers.
        sites: How many operations were adapted.
        rejected: How many were listed with a reason why they could not be.
    """

    kind: str
    stage: str = ""
    detail: str = ""
    sites: int = 0
    rejected: int = 0

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        return self.kind not in ("equal", "refused", "unstable")

    @property
    def label(self) -> str:
        """Kind and stage, for counting."""
        return f"{self.kind} ({self.stage})" if self.stage else self.kind

    def __str__(self) -> str:
        return f"{self.label}: {self.detail}" if self.detail else self.label
