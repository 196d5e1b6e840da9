"""Weights of a model before adapters were folded into it, for the next merge into the same model.

A second merge into a model begins with the weights that the model had before the first one. They are copied
from the base. Nothing is subtracted, so the result is bitwise the same after any number of merges. No weight
is kept for this: a fingerprint says whether the base has the values that a weight had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import nn

from lora_fx.digests import add_values
from lora_fx.errors import MergeError, some

__all__ = ["find_origins", "note_origins", "values_by_name"]

_WIDTH: Final = 1024  # whole numbers of eight bytes in a row of a fingerprint


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Fingerprints of a weight before the first merge (None if unknown) and after the last merge."""

    before: str | None
    after: str


_ORIGINS: weakref.WeakKeyDictionary[nn.Module, dict[str, _Origin]] = weakref.WeakKeyDictionary()


def values_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _fingerprint(value: torch.Tensor) -> str:
    """Return a hash of the bits of a tensor.

    The bits are read as a matrix of 64-bit integers, and the sums of its rows and columns are hashed. The
    sums run on the tensor's device and need no memory of its size. Integers wrap around, so that the order of
    a sum does not matter.
    """
    digest = hashlib.blake2b(f"{value.dtype} {list(value.shape)}".encode(), digest_size=16)
    flat = value.detach().contiguous().flatten()
    size = flat.element_size()
    whole = len(flat) * size // (8 * _WIDTH) * (8 * _WIDTH) // size
    if whole and flat.storage_offset() * size % 8 == 0:
        words = flat[:whole].view(torch.int64).view(-1, _WIDTH)
        parts = [words.sum(0), words.sum(1), flat[whole:]]
    else:
        parts = [flat]
    for part in parts:
        add_values(digest, part)
    return digest.hexdigest()


def _is_plain(value: torch.Tensor) -> bool:
    """Return True if a tensor's bits can be hashed: it has values, and is not sharded, quantized or lazy."""
    known = type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided
    return known and not value.is_meta and value.numel() > 0


def note_origins(into: nn.Module, before: Mapping[str, str], written: Collection[str]) -> None:
    """Record fingerprints of the weights that a merge has written.

    Args:
        into: The model that adapters were folded into.
        before: Fingerprints of its weights before the first merge, by name.
        written: Names of weights that the merge has written.
    """
    values = values_by_name(into)
    _ORIGINS[into] = {
        name: _Origin(before.get(name), _fingerprint(values[name]))
        for name in written
        if name in values and _is_plain(values[name])
    }


def find_origins(
    into: nn.Module,
    base: Mapping[str, torch.Tensor],
    written: Collection[str],
    trained: Collection[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Find the weights of a model that earlier merges have written. Nothing is changed.

    A weight that was changed since, such as by training or loading, counts as the model's own.

    Args:
        into: The model.
        base: The base's parameters and buffers by name.
        written: Names of weights that the next merge writes.
        trained: Names of weights that the merge overwrites as a whole.

    Returns:
        The values of the base to restore, and fingerprints of the weights before the first merge, both by
        name.

    Raises:
        MergeError: If a weight has the change of an earlier merge, and the base has other values than the
            weight had before.
    """
    values = values_by_name(into)
    origins = _ORIGINS.get(into, {})
    before = {
        name: _fingerprint(values[name])
        for name in {*written, *origins}
        if name in values and _is_plain(values[name])
    }
    lost, restored = [], {}
    for name, origin in origins.items():
        if before.get(name) != origin.after or origin.before == origin.after:
            continue
        source = base.get(name)
        if source is not None and _is_plain(source) and _fingerprint(source) == origin.before:
            restored[name] = source.detach()
        elif name not in trained:
            lost.append(name)
        if origin.before is not None:
            before[name] = origin.before
    if lost:
        raise MergeError(
            f"into has adapters of an earlier merge in {some(lost)}, and the base of this model has other "
            "values than these weights had before, so that they cannot be restored: give a fresh model. To "
            "merge several adapters, name all of them in adapter_names"
        )
    return restored, before
