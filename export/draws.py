"""Fresh inputs by axis, for a model of which no more is known than one call.

Values in the example's range, at three kinds of shape: the example's, larger in every dynamic axis,
and a batch of one with shorter sequences. Whole numbers can mean more than their range says (as many
marker tokens as there are patches of an image): where a model refuses others, those of the example
are used, in other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fx.errors import ParityError
from lora_fx.export.arguments import Axis, Case, Checked, Outputs, Sizes
from lora_fx.export.trace import Trace

__all__ = ["drawn_cases"]

_Resize: TypeAlias = Callable[[Axis, int], int]


def drawn_cases(model: Checked, trace: Trace, skipped: dict[Sizes, str]) -> Iterator[Case]:
    """Calls that PyTorch takes, with what it makes of them.

    Where there is an attention mask, only positions that it admits count: what a model returns for
    padding is arbitrary.

    Args:
        model: In eval mode.
        trace: Which axes are dynamic.
        skipped: Takes up the shapes that PyTorch refuses, with its words.

    Raises:
        ParityError: PyTorch refuses fresh values at the shapes of the example.
    """
    names = trace.arguments.names
    draw = _Draw(model, trace, skipped)
    for resize in (_same, _larger, _smaller):
        inputs, expected = draw.accepted(resize)
        yield Case(inputs, expected, _admitted(names, inputs, expected), draw.note)


@dataclass
class _Draw:
    """Fresh inputs of the shapes that PyTorch takes, with what it makes of them."""

    model: Checked
    trace: Trace
    skipped: dict[Sizes, str]

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        # By name: axes of one name have one size in the file, whether they were traced as one or not.
        self.order = {
            name: index for index, name in enumerate(dict.fromkeys(self.trace.symbols.values()))
        }
        self.kept: list[str] = []  # inputs whose values are the example's
        self.note = ""

    def accepted(self, resize: _Resize) -> tuple[list[Tensor], Outputs]:
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
            self.keep_more()
            return self.accepted(resize)
        for name in self.order:
            bigger = self.run(self.sizes(chosen | {name}, resize, {}))
            if bigger is not None:
                chosen.add(name)
                result = bigger
        return result

    def keep_more(self) -> None:
        """Use whole numbers of the example: first without the masks, then these, too."""
        names, tensors = self.trace.arguments.names, self.trace.arguments.tensors
        pairs = zip(names, tensors, strict=True)
        whole = [name for name, tensor in pairs if not tensor.is_floating_point()]
        reasons = "; ".join(dict.fromkeys(self.skipped.values()))
        for kept in ([name for name in whole if "mask" not in name], whole):
            if len(kept) > len(self.kept):
                self.kept = kept
                break
        else:
            raise ParityError(
                f"PyTorch refuses fresh values at the shapes of the example: {reasons}"
            )
        self.note = (
            f"{', '.join(kept)}: rows of the example, since PyTorch refuses fresh values: {reasons}"
        )
        self.skipped.clear()

    def sizes(self, names: set[str], resize: _Resize, offsets: Mapping[str, int]) -> Sizes:
        return tuple(
            tuple(
                resize(axis, offsets.get(axis.name, 0)) if axis.name in names else axis.size
                for axis in axes
            )
            for axes in self.trace.axes
        )

    def run(self, sizes: Sizes) -> tuple[list[Tensor], Outputs] | None:
        if sizes in self.skipped:
            return None
        arguments = self.trace.arguments
        inputs = [
            self.drawn(name, tensor, size)
            for name, tensor, size in zip(arguments.names, arguments.tensors, sizes, strict=True)
        ]
        try:
            with torch.no_grad():
                return inputs, self.model.named(inputs)
        except Exception as error:  # noqa: BLE001  # a model refuses a size in its own way
            self.skipped[sizes] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return None

    def drawn(self, name: str, like: Tensor, size: tuple[int, ...]) -> Tensor:
        if name in self.kept:
            return _rows(like, size)
        return _fresh(name, like, size, self.generator)


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


def _rows(example: Tensor, size: tuple[int, ...]) -> Tensor:
    """The rows of the example, moved by one, repeated for a larger batch.

    Shorter ones lose their end, longer ones repeat their last entry: which is mostly text, where
    markers come first.
    """
    if example.ndim == 0 or example.numel() == 0:
        return example.new_zeros(size) if example.ndim else example
    for axis, wanted in enumerate(size):
        places = torch.arange(wanted, device=example.device)
        have = example.shape[axis]
        places = (places + 1) % have if axis == 0 else places.clamp(max=have - 1)
        example = example.index_select(axis, places)
    return example


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


def _admitted(
    names: Sequence[str], inputs: Sequence[Tensor], expected: Outputs
) -> dict[str, Tensor]:
    """Of each output the positions that all attention masks admit."""
    valid: dict[str, Tensor] = {}
    for name, mask in zip(names, inputs, strict=True):
        if not name.endswith("attention_mask") or mask.ndim != 2:
            continue
        for output, want in expected:
            if want.shape[:2] == mask.shape:
                inside = (mask != 0).reshape(*mask.shape, *[1] * (want.ndim - 2))
                valid[output] = inside & valid.get(output, torch.ones_like(inside))
    return valid
