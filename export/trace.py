"""From a model and one call to an exported program whose axes are dynamic wherever they can be.

Every axis of every input is offered to ``torch.export`` as dynamic; it keeps those that the model
treats as such and fixes the rest (channels that meet a weight, a grid of patches). Each axis that
stays fixed carries its reason.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lora_fx.errors import ExportError
from lora_fx.export.arguments import Arguments, FlatModel
from lora_fx.export.source import Place
from lora_fx.export.witness import Witness, watched

__all__ = ["Axis", "Trace", "headline", "trace", "widen_batch"]

_log = logging.getLogger("lora_fx")


@dataclass(frozen=True)
class Axis:
    """One axis of one input.

    Attributes:
        size: Its size in the example.
        name: Its name in the file if it is dynamic, else None.
        symbol: What torch.export calls it if it is dynamic; equal symbols are equal sizes.
        high: The largest size the model takes, None if there is no limit.
        reason: Why it is fixed, "" if it is not.
    """

    size: int
    name: str | None = None
    symbol: str | None = None
    high: int | None = None
    reason: str = ""

    @property
    def label(self) -> int | str:
        """What the file says: the name of a dynamic axis, the size of a fixed one."""
        return self.size if self.name is None else self.name


@dataclass(frozen=True)
class Trace:
    """An exported program and what is known about its inputs.

    Attributes:
        program: The program of a ``FlatModel``.
        arguments: The call that was traced.
        axes: The axes of each input.
        symbols: Symbol of torch.export to the name of the axis.
        description: Which axes were offered as dynamic.
        attempt: Its number among the ways that there are, from most to fewest dynamic axes.
    """

    program: ExportedProgram
    arguments: Arguments
    axes: tuple[tuple[Axis, ...], ...]
    symbols: Mapping[str, str]
    description: str = ""
    attempt: int = 0

    def labels(self) -> list[list[int | str]]:
        """For each input its sizes and axis names."""
        return [[axis.label for axis in axes] for axes in self.axes]

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name to its dynamic axes, by position."""
        return {
            name: {index: axis.name for index, axis in enumerate(axes) if axis.name is not None}
            for name, axes in zip(self.arguments.names, self.axes, strict=True)
        }


def widen_batch(arguments: Arguments) -> Arguments:
    """Repeat a batch of one, where all tensors share it: a size of 1 cannot become dynamic."""
    batched = [tensor for tensor in arguments.tensors if tensor.ndim]
    if not batched or any(tensor.shape[0] != 1 for tensor in batched):
        return arguments
    return arguments.replace([torch.cat([t, t]) if t.ndim else t for t in arguments.tensors])


def trace(
    model: FlatModel,
    arguments: Arguments,
    dynamic_shapes: object = None,
    failed: Sequence[str] = (),
    first: int = 0,
) -> Trace | None:
    """Export ``model`` with as many dynamic axes as it allows.

    Args:
        model: In eval mode.
        arguments: The call to trace.
        dynamic_shapes: None for every axis; else input name to a mapping of axis to a name (or to
            a ``torch.export.Dim``), or a sequence of such mappings in the order of the inputs.
            Axes that it leaves out are fixed; those that it names have to be dynamic.
        failed: What came of the ways that were tried already: reasons of the axes that stay fixed.
        first: Which way to try first.

    Returns:
        The first that works; None if ``first`` is beyond the last.

    Raises:
        ExportError: torch.export cannot capture the model, with its reason.
    """
    labels = _labels(dynamic_shapes, arguments)
    failures = list(failed)
    attempts = list(enumerate(_attempts(arguments, dynamic_shapes, labels)))[first:]
    if not attempts:
        return None
    for attempt, (description, specs) in attempts:
        try:
            with torch.no_grad(), watched(model.model) as witness:
                program = torch.export.export(
                    model, arguments.tensors, dynamic_shapes=(specs,), strict=False
                )
        except Exception as error:  # noqa: BLE001  # torch.export raises all kinds; kept as a reason
            failures.append(f"{description}: {headline(error)}")
            last = error
            continue
        for failure in failures:
            _log.warning("export with fewer dynamic axes: %s", failure)
        found = _read(program, arguments, specs, labels, failures, witness)
        return dataclasses.replace(found, description=description, attempt=attempt)
    raise ExportError(
        f"torch.export cannot capture {type(model.model).__name__} ({'; '.join(failures)})"
    ) from last


def _attempts(
    arguments: Arguments, dynamic_shapes: object, labels: Sequence[Mapping[int, Any]]
) -> list[tuple[str, tuple[dict[int, Any], ...]]]:
    tensors = arguments.tensors
    if dynamic_shapes is not None:
        # Named axes are a demand: Dim.DYNAMIC fails where Dim.AUTO would quietly fix the axis.
        wanted = tuple(
            {axis: Dim.DYNAMIC if axis in named else Dim.STATIC for axis in range(tensor.ndim)}
            for tensor, named in zip(tensors, labels, strict=True)
        )
        return [("with the given dynamic_shapes", wanted)]
    every = tuple(dict.fromkeys(range(tensor.ndim), Dim.AUTO) for tensor in tensors)
    batch = tuple(
        {axis: Dim.STATIC if axis else Dim.AUTO for axis in range(tensor.ndim)}
        for tensor in tensors
    )
    fixed = tuple(dict.fromkeys(range(tensor.ndim), Dim.STATIC) for tensor in tensors)
    return [
        ("with every axis dynamic", every),
        ("with the first axis dynamic", batch),
        ("with fixed axes", fixed),
    ]


def _labels(dynamic_shapes: object, arguments: Arguments) -> list[Mapping[int, str]]:
    names = arguments.names
    if dynamic_shapes is None:
        return [{} for _ in names]
    if isinstance(dynamic_shapes, Mapping):
        unknown = [name for name in dynamic_shapes if name not in names]
        if unknown:
            raise ExportError(
                f"dynamic_shapes names {', '.join(map(repr, unknown))}, but the inputs are "
                f"{', '.join(names)}"
            )
        given = [dynamic_shapes.get(name) for name in names]
    elif isinstance(dynamic_shapes, (tuple, list)) and len(dynamic_shapes) == len(names):
        given = list(dynamic_shapes)
    else:
        raise ExportError(
            f"dynamic_shapes has to be a dict by input name or a sequence of {len(names)} dicts, "
            f"one for each of {', '.join(names)}"
        )
    pairs = zip(given, names, arguments.tensors, strict=True)
    return [_label(spec, name, tensor) for spec, name, tensor in pairs]


def _label(spec: object, name: str, tensor: Tensor) -> dict[int, str]:
    if spec is not None and not isinstance(spec, (Mapping, list, tuple)):
        raise ExportError(f"dynamic_shapes of '{name}' is {spec!r}: give a dict of axis to name")
    entries = spec if isinstance(spec, Mapping) else dict(enumerate(spec or ()))
    labels: dict[int, str] = {}
    for axis, label in entries.items():
        if not isinstance(axis, int) or not -tensor.ndim <= axis < tensor.ndim:
            raise ExportError(
                f"dynamic_shapes gives axis {axis!r} of '{name}', which has shape "
                f"{list(tensor.shape)}"
            )
        if label is None or label is Dim.STATIC:
            continue
        axis %= tensor.ndim
        own = label if isinstance(label, str) else getattr(label, "__name__", "")
        labels[axis] = own or _axis_name(name, axis, tensor)
    return labels


def _read(
    program: ExportedProgram,
    arguments: Arguments,
    specs: Sequence[Mapping[int, Any]],
    labels: Sequence[Mapping[int, str]],
    failures: Sequence[str],
    witness: Witness,
) -> Trace:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    shapes = [values[name].shape for name in program.graph_signature.user_inputs]
    highs = {
        str(symbol): int(limits.upper)
        for symbol, limits in program.range_constraints.items()
        if limits.upper.is_Integer
    }
    symbols: dict[str, str] = {}
    rows: list[tuple[Axis, ...]] = []
    batch = next((tensor.shape[0] for tensor in arguments.tensors if tensor.ndim), 0)
    inputs = zip(arguments.names, arguments.tensors, shapes, specs, labels, strict=True)
    for name, tensor, shape, spec, label in inputs:
        row = []
        for axis, (size, dim) in enumerate(zip(tensor.shape, shape, strict=True)):
            symbol = str(dim)
            if symbol.isdigit():  # an int, or a SymInt that the model made constant
                reason = _why_fixed(size, spec[axis], failures, witness.place(dim))
                row.append(Axis(size, reason=reason))
                continue
            if symbol not in symbols:
                wanted = label.get(axis) or _axis_name(name, axis, tensor)
                shared = axis in label or (axis == 0 and size == batch)
                taken = wanted in symbols.values() and not shared
                symbols[symbol] = f"{name}_{wanted}" if taken else wanted
            row.append(Axis(size, symbols[symbol], symbol, highs.get(symbol)))
        rows.append(tuple(row))
    return Trace(program, arguments, tuple(rows), symbols)


def _axis_name(name: str, axis: int, tensor: Tensor) -> str:
    if axis == 0:
        return "batch"
    if tensor.ndim == 4 and tensor.is_floating_point() and axis > 1:
        return ("height", "width")[axis - 2]
    if axis == 1 and tensor.ndim in (2, 3):
        return "sequence"
    return f"{name}_{axis}"


def _why_fixed(size: int, spec: object, failures: Sequence[str], place: Place | None) -> str:
    if spec is not Dim.STATIC:
        if size == 1:
            return "the example has size 1 here, which torch.export takes for a constant"
        because = "" if place is None else f": {place}"
        return f"the model works with size {size} only{because}"
    if failures:
        return f"the export failed {'; '.join(failures)}"
    return "not in dynamic_shapes"


def headline(error: Exception) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
