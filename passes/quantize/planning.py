"""Chooses which weights are stored in few bits: those of matrix products, apart from the output head.

It looks and edits nothing. Each operation that is left as it is has a reason.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.config import LoraConfig, excluded, nearest_names, unmatched
from lora_fx.errors import ConfigError, QuantizationError
from lora_fx.formats import Storage, quantization_of
from lora_fx.ir import Capture, Matches, Site, join
from lora_fx.passes.match import weights_asked

__all__ = ["PlannedWeight", "QuantizationPlan", "plan_quantization"]


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedWeight:
    """A weight that is to be stored in few bits.

    Attributes:
        site: The operation.
        shape: Rows and columns of the matrix as it will be stored, [out, in].
        dtype: Of its values.
        bytes: What it will take, scales and all.
    """

    site: Site
    shape: tuple[int, int]
    dtype: torch.dtype
    bytes: int

    @property
    def name(self) -> str:
        """FQN of the operation."""
        return self.site.name

    @property
    def dense_bytes(self) -> int:
        """What it takes before."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """What :func:`lora_fx.quantize` would do; print it.

    Attributes:
        storage: The format.
        weights: What would be stored in it.
        left: Names of operations and weights that stay as they are, each with the reason.
    """

    storage: Storage
    weights: tuple[PlannedWeight, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        """What the weights will take, scales and all."""
        return sum(one.bytes for one in self.weights)

    @property
    def dense_bytes(self) -> int:
        """What they take before."""
        return sum(one.dense_bytes for one in self.weights)

    def __iter__(self) -> Iterator[PlannedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def summary(self) -> str:
        """The weights in one line, and what is left, each reason once."""
        sizes = f"{_mib(self.dense_bytes)} become {_mib(self.bytes)}"
        reasons = Counter(reason for _, reason in self.left)
        first = {reason: name for name, reason in reversed(self.left)}
        lines = [f"{len(self.weights)} weights in {self.storage}: {sizes}"]
        for reason, count in reasons.items():
            more = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  as it is: {first[reason]}{more}: {reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return {
            "format": self.storage.format,
            "library": self.storage.library,
            "block_size": self.storage.block_size,
            "double": self.storage.double,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "weights": [
                {"name": one.name, "shape": list(one.shape), "bytes": one.bytes}
                for one in self.weights
            ],
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
        }

    def __str__(self) -> str:
        width = max(len(one.name) for one in self.weights)
        lines = [self.summary().splitlines()[0]]
        lines += [
            f"  {one.name:{width}}  {one.shape[0]}x{one.shape[1]}  {_mib(one.bytes)}"
            for one in self.weights
        ]
        lines += [f"  as it is: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


_log = logging.getLogger("lora_fx")

_PRODUCTS = ("linear", "matmul")


def plan_quantization(
    capture: Capture, matches: Matches, how: Storage, exclude: Sequence[str] | str | None = None
) -> QuantizationPlan:
    """Says what :class:`lora_fx.passes.quantize.store.Quantize` would store, and what it leaves, and why.

    Args:
        capture: The model.
        matches: Its linear operations, the head marked.
        how: The format.
        exclude: Operations that are left as they are, by the rules of ``exclude_modules``.

    Raises:
        QuantizationError: If the model is quantized already, ``exclude`` is no list of names and no regular
            expression, a weight does not fit the format, or there is nothing to quantize.
    """
    _check_plain(capture.model)
    config = _exclusion(exclude)
    asked = _asked(capture)
    left: dict[str, str] = {}
    rows: list[PlannedWeight] = []
    for site in matches.sites:
        reason = f"exclude={exclude!r}" if excluded(site.name, config) else _left(site, how, asked)
        if reason is not None:
            left[site.name] = reason
            continue
        dtype = capture.model.get_parameter(site.weight).dtype
        shape = (site.out_features, site.in_features)
        objection = how.objection(shape, dtype)
        if objection is not None:
            raise QuantizationError(
                f"{site.name}: {objection}. Or leave it as it is: exclude=[{site.name!r}]"
            )
        rows.append(PlannedWeight(site, shape, dtype, how.bytes(shape, dtype)))
    left |= {one.name: one.reason for one in matches.rejections}
    _warn_of_idle(matches, config)
    if not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise QuantizationError(
            f"there is nothing to quantize in this {type(capture.model).__name__}"
            + (f" ({reasons})" if reasons else ": it has no linear operation")
        )
    return QuantizationPlan(how, tuple(rows), tuple(left.items()))


def _check_plain(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        found = quantization_of(parameter)
        if found is not None:
            raise QuantizationError(
                f"{name} is quantized already, {found}: quantize the model that it was made of, which has "
                "all of the bits, or give this one to lora_fx.rewrite as it is"
            )


def _exclusion(exclude: Sequence[str] | str | None) -> LoraConfig:
    try:
        return LoraConfig(exclude_modules=exclude)
    except ConfigError as error:
        # It names the field that has the same rules, which nobody has set.
        told = str(error).partition(": ")[2]
        raise QuantizationError(f"exclude: {told}") from error


def _asked(capture: Capture) -> dict[str, str]:
    """Weights of whose dtype or shape code makes use, with the function that does."""
    return {
        join(fqn, weight): function
        for fqn, module in capture.model.named_modules()
        for weight, function in weights_asked(module)
    }


def _left(site: Site, how: Storage, asked: Mapping[str, str]) -> str | None:
    """Why a site's weight stays as it is; None if it need not."""
    if site.head:
        return "it is the output head"
    reason = next(_objections(site, how), None)
    shown = how.made_by.shows_values and site.layout == "out_in"
    if reason is None and site.weight in asked and not shown:
        return (
            f"{asked[site.weight]} asks for its dtype or shape, and would be told those of the bytes in "
            "which it is stored"
        )
    return reason


def _objections(site: Site, how: Storage) -> Iterator[str]:
    if site.family != "linear":
        what = "a lookup" if site.family == "embedding" else "a convolution"
        yield f"it is {what}: the formats are of matrix products"
    if site.experts is not None:
        yield "its weight has a matrix for each expert: the formats hold one"
    if site.tied_to:
        yield f"its weight is tied to {', '.join(site.tied_to)}"
    if site.rows is not None:
        yield f"rows {site.rows[0]} to {site.rows[1]} of its weight are applied by themselves"
    if any(call.pattern not in _PRODUCTS for call in site.calls) or site.view is not None:
        yield f"it is written as {site.pattern}: F.linear(x, weight) or x @ weight can be quantized"
    if any(call.left for call in site.calls):
        yield "its weight is the left operand of the product"
    if not how.made_by.any_dtype and any(call.cast for call in site.calls):
        yield f"its weight is cast before it is applied, which {how.library}'s formats cannot be"


def _warn_of_idle(matches: Matches, config: LoraConfig) -> None:
    names = [site.name for site in matches.sites] + [one.name for one in matches.rejections]
    for entry in unmatched(names, config).excludes:
        near = nearest_names(entry, names)
        # Nothing looks like it: what names look like.
        some = near or tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))[:5]
        _log.warning(
            "exclude names no operation with %r; %s: %s",
            entry,
            "nearest" if near else "operations end in",
            ", ".join(map(repr, some)),
        )
