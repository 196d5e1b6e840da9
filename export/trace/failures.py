"""Why ``torch.export`` refused a model, in words of the caller's: inputs, axes, modules and lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lora_fx.export.trace.witness import Witness

__all__ = ["headline", "reason_of_failure", "together"]

# What torch.export calls an axis of a ``FlatModel``, whose one argument is a tuple.
_AXIS = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def headline(error: Exception) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def reason_of_failure(
    error: Exception, witness: Witness, names: Sequence[str], tensors: Sequence[Tensor]
) -> str:
    """What one trace failed for.

    Args:
        error: What torch.export has raised.
        witness: Of that trace.
        names: Of the inputs.
        tensors: The inputs of the call that was traced.
    """
    place = witness.fault(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            f"{place} is data-dependent: a graph cannot branch on values. Write both sides and choose "
            "with torch.where, or capture a model without that branch"
        )
    if "Constraints violated" in str(error):
        axes = dict.fromkeys((int(i), int(axis)) for i, axis in _AXIS.findall(str(error)))
        fixed = [_fixed(i, axis, witness, names, tensors) for i, axis in axes if i < len(names)]
        if fixed:
            return "; ".join(fixed)
    return f"{headline(error)}, at {place}" if place.line else headline(error)


def _fixed(
    index: int, axis: int, witness: Witness, names: Sequence[str], tensors: Sequence[Tensor]
) -> str:
    place = witness.place_of(f"L['tensors'][{index}].size()[{axis}]")
    because = "" if place is None else f": {place}"
    size = tensors[index].shape[axis]
    return (
        f"axis {axis} of '{names[index]}' is fixed, the model works with size {size} only{because}"
    )


def together(failures: Iterable[str]) -> str:
    """What came of several ways, ``way: reason`` each, with equal reasons once."""
    ways: dict[str, list[str]] = {}
    for failure in failures:
        way, _, reason = failure.partition(": ")
        ways.setdefault(reason, []).append(way)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in ways.items())
