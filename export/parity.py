"""Is the file the model? Both run on inputs that the export has not seen, and are compared.

Fresh values in the example's range, at three kinds of shape: the example's, larger in every dynamic
axis, and a batch of one with shorter sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fx.errors import ExportError, ParityError
from lora_fx.export.difference import Outputs, described, difference, judged, worse
from lora_fx.export.reference import Reference
from lora_fx.export.report import OutputParity
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import Axis, Trace

__all__ = ["Parity", "Sizes", "check_parity"]

Sizes: TypeAlias = tuple[tuple[int, ...], ...]
_Resize: TypeAlias = Callable[[Axis, int], int]


@dataclass
class Parity:
    """The outcome: ``rows`` by output, the shapes that ran, those that PyTorch refused and why."""

    rows: dict[str, OutputParity] = field(default_factory=dict)
    tried: list[Sizes] = field(default_factory=list)
    skipped: dict[Sizes, str] = field(default_factory=dict)


def check_parity(model: Reference, trace: Trace, session: OnnxSession) -> Parity:
    """Compare the session with the model on fresh inputs.

    Where there is an attention mask, only positions that it admits are compared: what a model
    returns for padding is arbitrary.

    Args:
        model: What the file has to agree with.
        trace: What the file was made from.
        session: The file.

    Raises:
        ParityError: An output differs by more than its tolerance, or ONNX Runtime refuses a shape
            that PyTorch takes.
    """
    parity = Parity()
    draw = _Draw(model, trace, parity)
    for resize in (_same, _larger, _smaller):
        sizes, inputs, expected = draw.accepted(resize)
        if sizes not in parity.tried:
            _compare(parity, model, trace, sizes, inputs, expected, session)
            parity.tried.append(sizes)
    return parity


class _Draw:
    """Fresh inputs of the shapes that PyTorch takes, with what it makes of them."""

    def __init__(self, model: Reference, trace: Trace, parity: Parity) -> None:
        self.model = model
        self.trace = trace
        self.skipped = parity.skipped
        self.generator = torch.Generator().manual_seed(0)
        self.order = {symbol: index for index, symbol in enumerate(trace.symbols)}

    def accepted(self, resize: _Resize) -> tuple[Sizes, list[Tensor], Outputs]:
        """All dynamic axes resized, else one by one those that PyTorch lets be resized."""
        every = set(self.order)
        # Sizes that no other axis has show an axis that was taken for another; a model may still
        # need equal ones.
        apart = self.run(self.sizes(every, resize, self.order))
        result = apart or self.run(self.sizes(every, resize, {}))
        if result is not None:
            return result
        chosen: set[str] = set()
        result = self.run(self.sizes(chosen, resize, {}))
        if result is None:
            raise ParityError(
                "PyTorch refuses fresh values at the shapes of the example: "
                + "; ".join(self.skipped.values())
            )
        for symbol in self.order:
            bigger = self.run(self.sizes(chosen | {symbol}, resize, {}))
            if bigger is not None:
                chosen.add(symbol)
                result = bigger
        return result

    def sizes(self, symbols: set[str], resize: _Resize, offsets: Mapping[str, int]) -> Sizes:
        return tuple(
            tuple(
                resize(axis, offsets.get(axis.symbol, 0)) if axis.symbol in symbols else axis.size
                for axis in axes
            )
            for axes in self.trace.axes
        )

    def run(self, sizes: Sizes) -> tuple[Sizes, list[Tensor], Outputs] | None:
        if sizes in self.skipped:
            return None
        arguments = self.trace.arguments
        inputs = [
            _fresh(name, tensor, size, self.generator)
            for name, tensor, size in zip(arguments.names, arguments.tensors, sizes, strict=True)
        ]
        try:
            with torch.no_grad():
                return sizes, inputs, self.model.named(inputs)
        except Exception as error:  # noqa: BLE001  # a model refuses a size in its own way
            self.skipped[sizes] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return None


def _same(axis: Axis, offset: int) -> int:
    return axis.size


def _larger(axis: Axis, offset: int) -> int:
    if axis.name == "batch":
        return axis.size + 1
    size = axis.size + max(1, axis.size // 2) + offset
    return size if axis.high is None else min(size, axis.high)


def _smaller(axis: Axis, offset: int) -> int:
    return 1 if axis.name == "batch" else max(2, axis.size // 2)


def _fresh(name: str, like: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    example = like.detach().cpu()
    fresh = _mask(example, size, generator) if "mask" in name else None
    if fresh is None:
        fresh = _positions(example, size)
    if fresh is None:
        fresh = _values(example, size, generator)
    return fresh.to(device=like.device, dtype=like.dtype)


def _mask(example: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    if not bool(((example == 0) | (example == 1)).all()):
        return None
    fresh = torch.ones(size)
    if len(size) == 2 and size[0] > 1:
        # Padding on the right, and no row that is nothing but padding.
        lengths = torch.randint(1, size[1] + 1, (size[0], 1), generator=generator)
        lengths[0] = size[1]
        fresh = (torch.arange(size[1])[None] < lengths).float()
    if example.is_floating_point() and not bool(example.any()):
        return torch.zeros(size)  # an additive mask, in which 0 is what admits a position
    return fresh


def _positions(example: Tensor, size: tuple[int, ...]) -> Tensor | None:
    if example.is_floating_point() or example.ndim == 0 or example.shape[-1] < 2:
        return None
    first = example.reshape(-1)[0]
    counting = torch.arange(example.shape[-1]) + first
    if not bool((example == counting).all()):
        return None
    return (torch.arange(size[-1]) + first).expand(size).clone()


def _values(example: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if example.numel() == 0:
        return torch.zeros(size)
    if not example.is_floating_point():
        low, high = int(example.min()), int(example.max())
        return torch.randint(low, high + 1, size, generator=generator)
    values = example.double()
    spread = values.std(correction=0)
    fresh = values.mean() + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    return fresh.clamp(values.min(), values.max())


def _compare(
    parity: Parity,
    model: Reference,
    trace: Trace,
    sizes: Sizes,
    inputs: Sequence[Tensor],
    expected: Outputs,
    session: OnnxSession,
) -> None:
    names = trace.arguments.names
    shapes = ", ".join(f"{name} {list(size)}" for name, size in zip(names, sizes, strict=True))
    try:
        actual = session.run(list(inputs))
    except ExportError as error:
        raise ParityError(
            f"PyTorch runs on {shapes}, ONNX Runtime does not: {error}. Fix that axis with "
            f"dynamic_shapes if you do not need it"
        ) from error
    masks = [
        value
        for name, value in zip(names, inputs, strict=True)
        if name.endswith("attention_mask") and value.ndim == 2
    ]
    with torch.no_grad():
        narrow = dict(model.narrow(inputs) or ())
    for (name, want), got in zip(expected, actual.values(), strict=True):
        if want.shape != got.shape:
            raise ParityError(
                f"output '{name}' has shape {list(got.shape)} in the exported file and "
                f"{list(want.shape)} in PyTorch on {shapes}; nothing was written"
            )
        row = difference(name, want, got, masks, model.precision)
        if name in narrow:
            row = judged(row, model.precision, want, got, narrow[name], masks, shapes)
        parity.rows[name] = worse(parity.rows.get(name, row), row)
        if row.max_rel_error > row.tolerance:
            raise ParityError(
                f"output '{name}' of the exported file differs from {model.description} by "
                f"{described(row)} on {shapes}; nothing was written"
            )
