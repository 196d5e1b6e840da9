"""How factors start: the names of the initializations, and the options of those that have some."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

from lora_fx.errors import ConfigError

__all__ = ["OPTIONS", "FrozenOptions", "changes_base", "complete_options", "needs_data", "options"]

_CHANGES_BASE: Final = re.compile(r"pissa(_niter_\d+)?|olora|loftq|corda|lora_ga")
"""The initializations that take what the factors hold at the start out of the base weight."""

_NEEDS_DATA: Final = frozenset({"eva", "corda", "lora_ga"})
"""The initializations that look at activations or gradients: `lora_fx.initialize` takes a dataloader."""


def changes_base(start: bool | str) -> bool:
    """Whether an initialization changes the base weight."""
    return isinstance(start, str) and _CHANGES_BASE.fullmatch(start) is not None


def needs_data(start: bool | str) -> bool:
    """Whether an initialization needs data."""
    return start in _NEEDS_DATA


_V = TypeVar("_V")


class FrozenOptions(Mapping[str, _V]):
    """A read-only, hashable `dict`: the options of an initialization, complete."""

    __slots__ = ("_data",)

    def __init__(self, items: Mapping[str, _V]) -> None:
        self._data: dict[str, _V] = dict(items)

    def __getitem__(self, key: str) -> _V:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __hash__(self) -> int:
        return hash(tuple(self._data.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._data == dict(other)

    def __repr__(self) -> str:
        return repr(self._data)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self._data),)


def _whole(least: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and int(value) >= least

    return check


def _real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)


def _one_of(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: any(value is one or (value == one and one is not True) for one in allowed)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class _Option:
    default: Any
    check: Callable[[Any], bool]
    wanted: str


_FLAG: Final = (_flag, "True or False")
_NO_FILE: Final = "None: lora_fx keeps statistics in memory and writes no cache"

# PEFT's option classes, field by field: LoftQConfig, EvaConfig, CordaConfig, LoraGAConfig.
OPTIONS: Final[Mapping[str, Mapping[str, _Option]]] = {
    "loftq_config": {
        "loftq_bits": _Option(4, _one_of(2, 4, 8), "2, 4 or 8 bits"),
        "loftq_iter": _Option(1, _whole(1), "a whole number of at least 1"),
    },
    "eva_config": {
        "rho": _Option(2.0, lambda v: _real(v) and v >= 1, "a number of at least 1"),
        "tau": _Option(0.99, lambda v: _real(v) and 0 <= v <= 1, "a number between 0 and 1"),
        "use_label_mask": _Option(True, *_FLAG),
        "label_mask_value": _Option(-100, _whole(-(2**63)), "a whole number"),
        "whiten": _Option(False, *_FLAG),
        "adjust_scaling_factors": _Option(True, *_FLAG),
    },
    "corda_config": {
        "cache_file": _Option(None, _one_of(None), _NO_FILE),
        "covariance_file": _Option(None, _one_of(None), _NO_FILE),
        "corda_method": _Option("ipm", _one_of("ipm", "kpm"), "'ipm' or 'kpm'"),
        "verbose": _Option(False, *_FLAG),
        "use_float16_for_covariance": _Option(False, *_FLAG),
        "prune_temporary_fields": _Option(True, *_FLAG),
    },
    "lora_ga_config": {
        "direction": _Option(
            "ArB2r",
            _one_of("ArBr", "A2rBr", "ArB2r", "random"),
            "'ArBr', 'A2rBr', 'ArB2r' or 'random'",
        ),
        "scale": _Option(
            "stable",
            _one_of("stable", "weight_svd", "gd_scale", "unit"),
            "'stable', 'weight_svd', 'gd_scale' or 'unit'",
        ),
        "stable_gamma": _Option(16, _whole(1), "a whole number of at least 1"),
    },
}


def options(name: str, value: object) -> FrozenOptions[Any] | None:
    """Reads the options of an initialization: a mapping, or an instance of PEFT's class.

    Raises:
        ConfigError: If there is no such option, or it has a value that means nothing.
    """
    if value is None or value == {}:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    known = OPTIONS[name]
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"LoraConfig.{name}: found {value!r}; give a dict with {', '.join(known)}"
        )
    for key in value:
        if key not in known:
            raise ConfigError(
                f"LoraConfig.{name}: there is no option {key!r}; there are {', '.join(known)}"
            )
    return complete_options(name, value)


def complete_options(name: str, value: Mapping[str, Any]) -> FrozenOptions[Any]:
    """The options of an initialization with defaults for those that are not given.

    Raises:
        ConfigError: If one has a value that means nothing.
    """
    known = OPTIONS[name]
    complete = {key: value.get(key, one.default) for key, one in known.items()}
    for key, one in known.items():
        if not one.check(complete[key]):
            raise ConfigError(
                f"LoraConfig.{name}[{key!r}]: found {complete[key]!r}; give {one.wanted}"
            )
    return FrozenOptions(complete)
