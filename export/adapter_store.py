"""The adapters of a session: held where it runs, handed out by name or as weighted sums."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_fx.errors import ConfigError
from lora_fx.export.adapter_manifest import AdapterInput, Manifest, check_values, ranks_of
from lora_fx.export.ort import Bound, placed

__all__ = ["AdapterChoice", "AdapterStore", "HeldAdapter", "weighted_sum"]

AdapterChoice: TypeAlias = str | Mapping[str, Any] | Sequence[str | None] | None
"""One adapter by name, several with weights, a name or None for each row of the batch where the file has a
bank, or None for the base model."""

_CACHED_SUMS = 8


@dataclass(frozen=True, eq=False)
class HeldAdapter:
    """An adapter that is ready to run; two are the same only if they are one object.

    Attributes:
        values: On the CPU, by the names of the inputs.
        bound: The same where the session runs, as ONNX Runtime has them, and of a file whose defaults have
            rank 0 those of its other inputs.
        ranks: Site to rank.
        rows: How many rows the batch has to have, None for any number.
        fed: Inputs that say which of what is bound runs.
    """

    values: Mapping[str, Tensor]
    bound: Bound
    ranks: Mapping[str, int]
    rows: int | None = None
    fed: Mapping[str, Any] = field(default_factory=dict)

    def check_rows(self, batch: int, file: str) -> None:
        """Refuse a batch of another size than that for which adapters were chosen.

        Raises:
            ConfigError: It has another size.
        """
        if self.rows is not None and self.rows != batch:
            raise ConfigError(
                f"adapter has {self.rows} names, and the batch for {file} has {batch} rows: give a name, or "
                "None, for each row, or a single name for all"
            )


@dataclass(eq=False)
class AdapterStore:
    """Adapters by name. Threads may use, load and unload them at once.

    Args:
        runtime: The onnxruntime module.
        takes: The inputs of the file; None for one that takes no adapters.
        device: Where the session runs.
        file: Its name, for messages.
        max_rank: The highest rank that there is room for, if there is a limit.
    """

    runtime: Any
    takes: Manifest | None
    device: torch.device
    file: str
    max_rank: int | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        # The defaults of the file run where there is no adapter, unless they have rank 0.
        alone = self.takes is None or self.takes.runs_alone
        own = {} if alone else self.manifest.no_adapter()
        self._none = HeldAdapter({}, Bound(self._placed(own)), {})
        self._held: dict[str, HeldAdapter] = {}
        self._sums: OrderedDict[tuple[tuple[HeldAdapter, float], ...], HeldAdapter] = OrderedDict()

    @property
    def manifest(self) -> Manifest:
        """What the file takes.

        Raises:
            ConfigError: It takes no adapters.
        """
        if self.takes is None:
            raise ConfigError(
                f"{self.file} takes no adapters: they are merged into its weights. Export the model with "
                "adapters='inputs' to swap them"
            )
        return self.takes

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._held)

    def load(self, name: str, values: Mapping[str, Tensor], what: str) -> None:
        """Hold an adapter. It replaces one of the same name.

        Raises:
            CheckpointError: The values are no adapter of the file. What was held still is.
        """
        check_values(self.manifest, values, what, self.max_rank)
        held = self._hold(values)
        with self._lock:
            self._forget(name)
            self._held[name] = held

    def unload(self, name: str) -> None:
        """Hold an adapter no longer. A run that uses it ends with it.

        Raises:
            ConfigError: There is no such adapter.
        """
        with self._lock:
            self._known(name)
            self._forget(name)
            del self._held[name]

    def chosen(self, choice: AdapterChoice | HeldAdapter) -> HeldAdapter:
        """The adapter to run with. A held one is returned as it is, also after others were loaded.

        Raises:
            ConfigError: There is no such adapter, a weight is no finite number, or the weighted ranks do
                not fit into the room for them.
        """
        if choice is None:
            return self._none
        if isinstance(choice, HeldAdapter):
            return choice
        _ = self.manifest  # a file that takes no adapters says so
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
        summed = weighted_sum(self.manifest, [(one.values, w) for one, w in parts])
        if not all(bool(value.isfinite().all()) for value in summed.values()):
            raise ConfigError(
                f"the weights {dict(weights)} are too large: the weighted sum has values that are not finite"
            )
        total = self._hold(summed)
        self._check_room(weights, total)
        with self._lock:
            # An adapter that was unloaded meanwhile must not be kept alive by a sum.
            held = list(self._held.values())
            if all(one in held for one, _ in parts):
                self._sums[parts] = total
                while len(self._sums) > _CACHED_SUMS:
                    self._sums.popitem(last=False)
        return total

    def _hold(self, values: Mapping[str, Tensor]) -> HeldAdapter:
        own = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        bound = Bound({**self._none.bound.values, **self._placed(own)})
        return HeldAdapter(own, bound, ranks_of(self.manifest, own))

    def _placed(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: placed(self.runtime, one, self.device) for name, one in values.items()}

    def _known(self, name: str) -> HeldAdapter:
        if name not in self._held:
            has = ", ".join(map(repr, self._held)) or "none"
            raise ConfigError(
                f"there is no adapter {name!r}: the session has {has}; load_adapter(name, file) adds one"
            )
        return self._held[name]

    def _forget(self, name: str) -> None:
        """Drops the sums that an adapter is in."""
        gone = self._held.get(name)
        for parts in [key for key in self._sums if any(one is gone for one, _ in key)]:
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
    """One adapter that changes the model as several do together: exact, since the ranks add up.

    Args:
        manifest: The inputs.
        parts: Values by name, and the weight of each.

    Returns:
        The A of all, concatenated along the rank; the B as well, multiplied by the weights.
    """
    found = {}
    for site in manifest.sites:
        for one in site.inputs():
            given = [(values[one.name], weight) for values, weight in parts if one.name in values]
            if given:
                found[one.name] = _joined(one, given, site.groups)
    return found


def _joined(one: AdapterInput, parts: list[tuple[Tensor, float]], groups: int) -> Tensor:
    dtype = parts[0][0].dtype
    if one.rank_axis is None:
        # Of a gain, what counts is what it has more or less than 1.
        total = sum((value.double() - one.neutral) * weight for value, weight in parts)
        return (torch.as_tensor(total) + one.neutral).to(dtype)
    if one.role == "B":
        scaled = [(value.double() * weight).to(dtype) for value, weight in parts]
        return torch.cat(scaled, one.rank_axis)
    tensors = [value for value, _ in parts]
    if groups == 1:
        return torch.cat(tensors, one.rank_axis)
    # A of a grouped convolution: the rank is that of one group after the other.
    by_group = [value.unflatten(0, (groups, -1)) for value in tensors]  # type: ignore[no-untyped-call]
    return torch.cat(by_group, 1).flatten(0, 1)


def _checked_weights(choice: Mapping[str, Any]) -> dict[str, float]:
    if not hasattr(choice, "items"):
        raise ConfigError(
            f"adapter is a {type(choice).__name__}: give a name, a dict of name to weight, or None"
        )
    weights = {}
    for name, weight in choice.items():
        # What NumPy and PyTorch take for a number is one, too.
        number = not isinstance(weight, bool | str) and hasattr(weight, "__float__")
        try:
            value = float(weight) if number else math.nan
        except (TypeError, ValueError, RuntimeError, OverflowError):  # of several, or too large
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"the weight of adapter {name!r} is {weight!r}: give a finite number")
        weights[name] = value
    return weights
