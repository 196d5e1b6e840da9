"""Adapters of a session: stored on its device, and chosen by name or as weighted sums."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_fx.errors import ConfigError, some
from lora_fx.export.adapter_manifest import (
    AdapterInput,
    Manifest,
    check_values,
    fill_tokens,
    ranks_of,
)
from lora_fx.export.ort import Bound, placed
from lora_fx.ir import is_base

__all__ = ["AdapterChoice", "AdapterStore", "HeldAdapter", "weighted_sum"]

AdapterChoice: TypeAlias = str | Mapping[str, Any] | Sequence[str | None] | None
"""Choice of adapters: one by name, several with weights, or None for the base model, which PEFT calls
``"__base__"``. A file with a bank also takes a name or None for each row of the batch."""

_CACHED_SUMS = 8


@dataclass(frozen=True, eq=False)
class HeldAdapter:
    """Adapter of a session, ready to run. Two of these objects are equal only if they are identical.

    Attributes:
        values: Values on the CPU, by input name.
        bound: The same values as ONNX Runtime values on the session's device. If the file cannot run on its
            defaults, also neutral values for its other adapter inputs.
        ranks: Map from site to rank.
        rows: Required number of rows of the batch, or None for any number.
        fed: Inputs that choose among the bound adapters for each row.
    """

    values: Mapping[str, Tensor]
    bound: Bound
    ranks: Mapping[str, int]
    rows: int | None = None
    fed: Mapping[str, Any] = field(default_factory=dict)

    def check_rows(self, batch: int, file: str) -> None:
        """Raise if the size of a batch differs from the number of chosen adapters.

        Raises:
            ConfigError: The batch has another size.
        """
        if self.rows is not None and self.rows != batch:
            raise ConfigError(
                f"adapter has {self.rows} names, and the batch for {file} has {batch} rows: give a name, or "
                "None, for each row, or a single name for all"
            )


@dataclass(eq=False)
class AdapterStore:
    """Store of a session's adapters by name. Threads may use, load and unload adapters at once.

    Args:
        runtime: The onnxruntime module.
        takes: The adapter inputs of the file, or None if it takes no adapters.
        device: Device of the session.
        file: Name of the file for messages.
        max_rank: Highest allowed rank, if there is a limit.
    """

    runtime: Any
    takes: Manifest | None
    device: torch.device
    file: str
    max_rank: int | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        # A run without an adapter uses the defaults of the file. If the file has none, or defaults of rank 0,
        # it is fed neutral values.
        alone = self.takes is None or self.takes.runs_alone
        neutral = {} if alone else self.manifest.no_adapter()
        self._none = HeldAdapter({}, Bound(self._placed(neutral)), {})
        self._no_base = not alone and bool(self.manifest.parameters)
        self._held: dict[str, HeldAdapter] = {}
        self._sums: OrderedDict[tuple[tuple[HeldAdapter, float], ...], HeldAdapter] = OrderedDict()

    @property
    def manifest(self) -> Manifest:
        """Manifest of the adapter inputs of the file.

        Raises:
            ConfigError: The file takes no adapters.
        """
        if self.takes is None:
            raise ConfigError(
                f"{self.file} takes no adapters: they are merged into its weights. Export the model with "
                "adapters='inputs' to swap them"
            )
        return self.takes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._held)

    def load(self, name: str, values: Mapping[str, Tensor], description: str) -> None:
        """Add an adapter. It replaces an adapter of the same name.

        Raises:
            CheckpointError: The values do not match the inputs of the file. The store is then unchanged.
        """
        values = fill_tokens(self.manifest, values)
        check_values(self.manifest, values, description, self.max_rank)
        adapter = self._hold(values)
        with self._lock:
            self._forget(name)
            self._held[name] = adapter

    def unload(self, name: str) -> None:
        """Remove an adapter. Runs that have begun with it finish with it.

        Raises:
            ConfigError: There is no such adapter.
        """
        with self._lock:
            self._known(name)
            self._forget(name)
            del self._held[name]

    def chosen(self, choice: AdapterChoice | HeldAdapter) -> HeldAdapter:
        """Look up the adapter of a run, or compute a sum. A :class:`HeldAdapter` is returned unchanged.

        Raises:
            ConfigError: There is no such adapter, a weight is not a finite number, or the ranks add up to
                more than the session's maximum.
        """
        if choice is None or is_base(choice) or (isinstance(choice, Mapping) and not choice):
            if self._no_base:
                raise ConfigError(
                    f"{self.file} has no base: each of its adapters has its own "
                    f"{some([parameter.name for parameter in self.manifest.parameters])}, without defaults "
                    "(required_inputs=True): choose an adapter"
                )
            return self._none
        if isinstance(choice, HeldAdapter):
            return choice
        _ = self.manifest  # raises if the file takes no adapters
        if isinstance(choice, str):
            with self._lock:
                return self._known(choice)
        if isinstance(choice, Sequence):
            raise ConfigError(
                f"{self.file} runs one adapter for the whole batch, and adapter is a list: export the model "
                "with adapters='bank' to choose one for each row"
            )
        weights = _checked_weights(choice)
        with self._lock:
            parts = tuple((self._known(name), weight) for name, weight in weights.items())
            if parts in self._sums:
                self._sums.move_to_end(parts)
                return self._sums[parts]
        summed = weighted_sum(self.manifest, [(adapter.values, w) for adapter, w in parts])
        if not all(bool(value.isfinite().all()) for value in summed.values()):
            raise ConfigError(
                f"the weights {dict(weights)} are too large: the weighted sum has values that are not finite"
            )
        total = self._hold(summed)
        self._check_room(weights, total)
        with self._lock:
            # A sum must not keep an adapter alive that was unloaded in the meantime.
            loaded = list(self._held.values())
            if all(adapter in loaded for adapter, _ in parts):
                self._sums[parts] = total
                while len(self._sums) > _CACHED_SUMS:
                    self._sums.popitem(last=False)
        return total

    def _hold(self, values: Mapping[str, Tensor]) -> HeldAdapter:
        cpu_values = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        bound = Bound({**self._none.bound.values, **self._placed(cpu_values)})
        return HeldAdapter(cpu_values, bound, ranks_of(self.manifest, cpu_values))

    def _placed(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: placed(self.runtime, value, self.device) for name, value in values.items()}

    def _known(self, name: str) -> HeldAdapter:
        if name not in self._held:
            has = ", ".join(map(repr, self._held)) or "none"
            raise ConfigError(
                f"there is no adapter {name!r}: the session has {has}; load_adapter(name, file) adds one"
            )
        return self._held[name]

    def _forget(self, name: str) -> None:
        """Drop the cached sums that use an adapter."""
        removed = self._held.get(name)
        for parts in [key for key in self._sums if any(adapter is removed for adapter, _ in key)]:
            del self._sums[parts]

    def _check_room(self, weights: Mapping[str, float], total: HeldAdapter) -> None:
        rank = max(total.ranks.values(), default=0)
        if self.max_rank is not None and rank > self.max_rank:
            raise ConfigError(
                f"the ranks of {', '.join(map(repr, weights))} add up to {rank}, above the "
                f"max_rank={self.max_rank} of the session"
            )


def weighted_sum(
    manifest: Manifest, parts: list[tuple[Mapping[str, Tensor], float]]
) -> dict[str, Tensor]:
    """Return one adapter equal to a weighted sum of adapters. The sum is exact, because the ranks add up.

    Args:
        manifest: The manifest of the file.
        parts: For each adapter its values by input name, and its weight.

    Raises:
        ConfigError: The adapters have different values of a parameter, or different rows of an embedding.

    Returns:
        Values by input name. The A are concatenated along the rank, and the B too, after multiplication by
        the weights.
    """
    summed = {}
    names = [parameter.name for parameter in manifest.parameters]
    for name in (*names, *(name for target in manifest.tokens for name in target.names)):
        own = [values[name] for values, _ in parts if name in values]
        if not all(torch.equal(own[0], value) for value in own):
            raise ConfigError(
                f"the adapters have different values of {name}, which have no weighted sum: choose one of "
                "them"
            )
        if own:
            summed[name] = own[0]
    for site in manifest.sites:
        for adapter_input in site.inputs():
            terms = [
                (values[adapter_input.name], weight)
                for values, weight in parts
                if adapter_input.name in values
            ]
            if terms:
                summed[adapter_input.name] = _joined(adapter_input, terms, site.groups)
    return summed


def _joined(adapter_input: AdapterInput, parts: list[tuple[Tensor, float]], groups: int) -> Tensor:
    dtype = parts[0][0].dtype
    if adapter_input.rank_axis is None:
        # The weight of a gain applies to its difference from 1.
        neutral = adapter_input.neutral
        assert neutral is not None
        total = sum((value.double() - neutral) * weight for value, weight in parts)
        return (torch.as_tensor(total) + neutral).to(dtype)
    if adapter_input.role == "B":
        scaled = [(value.double() * weight).to(dtype) for value, weight in parts]
        return torch.cat(scaled, adapter_input.rank_axis)
    tensors = [value for value, _ in parts]
    if groups == 1:
        return torch.cat(tensors, adapter_input.rank_axis)
    # A of a grouped convolution: its rank axis holds one group after the other.
    by_group = [value.unflatten(0, (groups, -1)) for value in tensors]  # type: ignore[no-untyped-call]
    return torch.cat(by_group, 1).flatten(0, 1)


def _checked_weights(choice: Mapping[str, Any]) -> dict[str, float]:
    if not hasattr(choice, "items"):
        raise ConfigError(
            f"adapter is a {type(choice).__name__}: give a name, a dict of name to weight, or None"
        )
    weights = {}
    for name, weight in choice.items():
        # Scalars of NumPy and PyTorch count as numbers, too.
        number = not isinstance(weight, bool | str) and hasattr(weight, "__float__")
        try:
            value = float(weight) if number else math.nan
        except (TypeError, ValueError, RuntimeError, OverflowError):  # no scalar, or too large
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"the weight of adapter {name!r} is {weight!r}: give a finite number")
        weights[name] = value
    return weights
