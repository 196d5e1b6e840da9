"""The fields of `LoraConfig`: validation and normalization of each, and the fields that are refused.

No field of a PEFT configuration is dropped silently. It is a field of `LoraConfig`, or it belongs to another
method or engine. Such a field is only accepted with the value that switches it off. Any other field is an
error.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, get_args

from lora_fx.errors import ConfigError, hint

__all__ = [
    "ALL_LINEAR",
    "FOREIGN",
    "KIND_OPTIONS",
    "METADATA",
    "NORMALIZERS",
    "OPTIONS",
    "TASK_TYPES",
    "VARIANTS",
    "Bias",
    "FrozenOptions",
    "FrozenPattern",
    "Start",
    "TaskType",
    "bad",
    "changes_base",
    "complete_options",
    "is_off",
    "needs_data",
    "only_own",
    "options",
    "variant",
    "whole_number",
]

# --- starting values ------------------------------------------------------------------------------


_CHANGES_BASE: Final = re.compile(r"pissa(_niter_\d+)?|olora|loftq|corda|lora_ga")
"""The initializations that subtract the initial product of the factors from the base weight."""

_NEEDS_DATA: Final = frozenset({"eva", "corda", "lora_ga"})
"""The initializations that need activations or gradients: `lora_fx.initialize` takes a dataloader."""


def changes_base(start: bool | str) -> bool:
    """Return True if an initialization changes the base weight."""
    return isinstance(start, str) and _CHANGES_BASE.fullmatch(start) is not None


def needs_data(start: bool | str) -> bool:
    """Return True if an initialization needs data."""
    return start in _NEEDS_DATA


_Value = TypeVar("_Value")


class FrozenOptions(Mapping[str, _Value]):
    """A read-only, hashable `dict`, such as the options of an initialization."""

    __slots__ = ("_data",)

    def __init__(self, items: Mapping[str, _Value]) -> None:
        self._data: dict[str, _Value] = dict(items)

    def __getitem__(self, key: str) -> _Value:
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


def whole_number(value: object) -> int | None:
    """Convert an integer of any type, such as NumPy's, to an int. Return None for a bool or another value."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return operator.index(value)


def _at_least(least: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        number = whole_number(value)
        return number is not None and number >= least

    return check


def _real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)


def _one_of(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: any(
        value is choice or (value == choice and choice is not True) for choice in allowed
    )


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class _Option:
    default: Any
    check: Callable[[Any], bool]
    wanted: str
    store: Callable[[Any], Any] = lambda value: value


_FLAG: Final = (_is_flag, "True or False")
_NO_FILE: Final = "None: lora_fx keeps statistics in memory and writes no cache"


def _positive(value: Any) -> bool:
    return _real(value) and value > 0


# PEFT's option classes, field by field: LoftQConfig, EvaConfig, CordaConfig, LoraGAConfig.
OPTIONS: Final[Mapping[str, Mapping[str, _Option]]] = {
    "loftq_config": {
        "loftq_bits": _Option(4, _one_of(2, 4, 8), "2, 4 or 8 bits"),
        "loftq_iter": _Option(1, _at_least(1), "a whole number of at least 1"),
    },
    "eva_config": {
        "rho": _Option(2.0, lambda v: _real(v) and v >= 1, "a number of at least 1"),
        "tau": _Option(0.99, lambda v: _real(v) and 0 <= v <= 1, "a number between 0 and 1"),
        "use_label_mask": _Option(True, *_FLAG),
        "label_mask_value": _Option(-100, _at_least(-(2**63)), "a whole number"),
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
        "stable_gamma": _Option(16, _at_least(1), "a whole number of at least 1"),
    },
}

# The same for PEFT's variants of LoRA: KasaConfig, VeloraConfig, MontecloraConfig.
VARIANTS: Final[Mapping[str, Mapping[str, _Option]]] = {
    "kasa_config": {
        "beta": _Option(1e-4, lambda v: _real(v) and v >= 0, "a number of at least 0"),
        "gamma": _Option(1e-3, lambda v: _real(v) and v >= 0, "a number of at least 0"),
    },
    "velora_config": {
        "num_groups": _Option(64, _at_least(1), "a whole number of at least 1"),
        "scale": _Option(1.0, _positive, "a number above 0"),
        "init_type": _Option(
            "batch_average",
            _one_of("batch_average", "batch_average_once", "random"),
            "'batch_average', 'batch_average_once' or 'random'",
        ),
    },
    "monteclora_config": {
        "num_samples": _Option(8, _at_least(1), "a whole number of at least 1"),
        "use_entropy": _Option(False, *_FLAG),
        "dirichlet_prior": _Option(0.1, _positive, "a number above 0"),
        "sample_scaler": _Option(1e-4, _real, "a finite number"),
        "kl_loss_weight": _Option(1e-5, _real, "a finite number"),
        "buffer_size": _Option(150, _at_least(1), "a whole number of at least 1"),
    },
}


def variant(name: str, value: object) -> FrozenOptions[Any] | None:
    """Read the options of a variant, as :func:`options` does. An empty mapping chooses the defaults.

    Raises:
        ConfigError: If there is no such option, or its value is not valid.
    """
    return complete_options(name, {}) if value == {} else options(name, value)


def _is_names(value: Any) -> bool:
    listed = isinstance(value, list | tuple | set | frozenset)
    return value is None or (listed and all(isinstance(item, str) for item in value))


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


_NAMES: Final = (_is_names, "a list of names, or None", _names)

KIND_OPTIONS: Final[Mapping[str, Mapping[str, _Option]]] = {
    "use_bdlora": {
        "target_modules_bd_a": _Option(None, *_NAMES),
        "target_modules_bd_b": _Option(None, *_NAMES),
        "nblocks": _Option(1, _at_least(1), "a whole number of at least 1"),
        "match_strict": _Option(True, *_FLAG),
    },
    "arrow_config": {
        "top_k": _Option(3, _at_least(1), "a whole number of at least 1"),
        "router_temperature": _Option(1.0, lambda v: _real(v) and v > 0, "a number greater than 0"),
        "use_gks": _Option(False, *_FLAG),
        "task_adapter_names": _Option(None, *_NAMES),
        "gks_adapter_names": _Option(None, *_NAMES),
        "rng_seed": _Option(
            None, lambda v: v is None or _at_least(0)(v), "a whole number, or None"
        ),
    },
}
"""PEFT's option classes of adapter kinds, field by field: BdLoraConfig, ArrowConfig."""

_KNOWN: Final = {**OPTIONS, **VARIANTS, **KIND_OPTIONS}


def options(name: str, value: object) -> FrozenOptions[Any] | None:
    """Read the options of an initialization or a kind from a mapping, or from an instance of PEFT's class.

    Raises:
        ConfigError: If there is no such option, or its value is not valid.
    """
    if value is None or value == {}:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    known = _KNOWN[name]
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
    """Return the options of an initialization or a kind, with defaults for the missing ones.

    Raises:
        ConfigError: If a value is not valid.
    """
    known = _KNOWN[name]
    complete = {key: value.get(key, option.default) for key, option in known.items()}
    for key, option in known.items():
        if not option.check(complete[key]):
            raise ConfigError(
                f"LoraConfig.{name}[{key!r}]: found {complete[key]!r}; give {option.wanted}"
            )
    return FrozenOptions({key: known[key].store(value) for key, value in complete.items()})


# --- fields ---------------------------------------------------------------------------------------


ALL_LINEAR: Final = "all-linear"
TaskType: TypeAlias = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]
TASK_TYPES: Final = get_args(TaskType)

Bias: TypeAlias = Literal["none", "all", "lora_only"]

Start: TypeAlias = Literal[
    "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga", "mica"
]
"""Names of starting values; ``pissa_niter_N`` for any number is valid as well."""

_V = TypeVar("_V", bound=float)

_INITS: Final = get_args(Start)
_NITER: Final = re.compile(r"pissa_niter_\d+")


class FrozenPattern(FrozenOptions[_V]):
    """A read-only, hashable `dict` that keeps its order, because the first matching key wins.

    Two patterns are equal if they hold the same items in the same order. Compared with a plain mapping, the
    order does not matter.
    """

    __slots__ = ()
    __hash__ = FrozenOptions.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenPattern):
            return tuple(self.items()) == tuple(other.items())
        return super().__eq__(other)


def bad(name: str, value: object, remedy: str) -> ConfigError:
    """Return the error for a field of `LoraConfig` whose value is not valid. `remedy` says what to do."""
    return ConfigError(f"LoraConfig.{name}: found {value!r}; {remedy}")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise bad(name, value, "give True or False")
    return value


def _text(name: str, value: object) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str):
        raise bad(name, value, "give a string or None")
    return value


def _whole(name: str, value: object, remedy: str, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise bad(name, value, remedy)
    if least is not None and int(value) < least:
        raise bad(name, value, remedy)
    return int(value)


def _rank(name: str, value: object) -> int:
    return _whole(name, value, "a rank is a whole number of at least 1", 1)


def _number(name: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise bad(name, value, "give a finite number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _dropout(name: str, value: object) -> float:
    probability = float(_number(name, value))
    if not 0.0 <= probability < 1.0:
        raise bad(name, value, "a dropout probability is at least 0 and below 1")
    return probability


def _seed(name: str, value: object) -> int | None:
    if value is None:
        return None
    seed = _whole(name, value, "a seed is a whole number")
    if not 0 <= seed < 2**63:
        raise bad(name, value, "a seed is at least 0 and below 2**63")
    return seed


def _init(name: str, value: object) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and (value.lower() in _INITS or _NITER.fullmatch(value.lower())):
        return value.lower()
    known = ", ".join(map(repr, _INITS))
    raise bad(name, value, f"the initializations are True, False, {known} and 'pissa_niter_N'")


def _bias(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in get_args(Bias):
        raise bad(name, value, "give 'none', 'all' or 'lora_only'")
    return value


def _task(name: str, value: object) -> str | None:
    plain = value.value if isinstance(value, Enum) else value
    if plain is not None and (not isinstance(plain, str) or plain not in TASK_TYPES):
        raise bad(name, value, f"the task types are {', '.join(TASK_TYPES)}")
    return plain


def _compiles(name: str, pattern: str, prefix: str = "") -> None:
    # PEFT puts text around some patterns, which makes global flags such as (?i) an error. The prefix
    # causes that error here already, instead of during matching.
    try:
        re.compile(pattern)
        re.compile(prefix + pattern)
    except (re.error, OverflowError, RecursionError) as exc:
        raise bad(name, pattern, f"it is not a regular expression ({exc}); correct it") from exc


def _strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise bad(name, value, "give a list of strings")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise bad(name, entry, "every entry is a string that is not empty")
    return tuple(dict.fromkeys(sorted(value) if isinstance(value, set | frozenset) else value))


def _modules(name: str, value: object) -> str | tuple[str, ...]:
    if not isinstance(value, str):
        return tuple(sorted(_strings(name, value)))
    if name == "target_modules" and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    _compiles(name, value)
    return value


def _saved(name: str, value: object) -> tuple[str, ...]:
    entries = _strings(name, value)
    for entry in entries:
        _compiles(name, entry, "()")
    return entries


def _layers(name: str, value: object) -> tuple[int, ...]:
    indices = value if isinstance(value, list | tuple | set | frozenset | range) else (value,)
    remedy = "give a layer index (a whole number) or a list of them"
    return tuple(sorted({_whole(name, index, remedy) for index in indices}))


def _layers_pattern(name: str, value: object) -> tuple[str, ...]:
    entries = _strings(name, ([value] if value else []) if isinstance(value, str) else value)
    for entry in entries:
        _compiles(name, entry, "(?P<idx>)")
    return entries


def _pattern(check: Callable[[str, object], _V]) -> Callable[[str, object], FrozenPattern[_V]]:
    def normalize(name: str, value: object) -> FrozenPattern[_V]:
        if value is None:
            return FrozenPattern({})
        if not isinstance(value, Mapping):
            raise bad(name, value, "give a dict of name or regular expression to number")
        for key in value:
            if not isinstance(key, str):
                raise bad(name, key, "a key is a module name or a regular expression")
            _compiles(name, key, "()")
        return FrozenPattern(
            {key: check(f"{name}[{key!r}]", entry) for key, entry in value.items()}
        )

    return normalize


def _scope(name: str, value: object) -> tuple[str, ...] | None:
    entries = _strings(name, [value] if isinstance(value, str) else value)
    for entry in entries:
        if entry.strip(".") != entry:
            raise bad(name, entry, "give the name of a module, without a dot before or after it")
    return tuple(sorted(entries)) or None


def _parameters(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        raise bad(name, value, "give a list of parameter names, or of their ends")
    return tuple(sorted(_strings(name, value)))


def _tokens(name: str, value: object) -> tuple[int, ...] | FrozenPattern[Any]:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key:
                raise bad(name, key, "a key is the name of an embedding, or its end")
        return FrozenPattern({k: _indices(f"{name}[{k!r}]", v) for k, v in value.items()})
    return _indices(name, value)


def _indices(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset | range) or not value:
        raise bad(name, value, "give a list of token indices that is not empty")
    # Keep the order, because it is that of the rows in a checkpoint, as in PEFT.
    remedy = "a token index is a whole number of at least 0"
    indices = tuple(_whole(name, index, remedy, 0) for index in value)
    if len(set(indices)) != len(indices):
        raise bad(name, value, "every token index is there once")
    return indices


def _invocation(name: str, value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list | tuple):
        raise bad(name, value, "give the token indices of the phrase, in their order")
    remedy = "a token index is a whole number of at least 0"
    return tuple(_whole(name, index, remedy, 0) for index in value) or None


def _base_class(name: str, value: object) -> FrozenOptions[Any]:
    wanted = ("base_model_class", "parent_library")
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in wanted):
        raise bad(name, value, f"give a mapping with {' and '.join(wanted)}, as PEFT writes it")
    return FrozenOptions({str(key): entry for key, entry in value.items()})


def _optional(check: _Check) -> _Check:
    """Return a check that accepts None, and passes any other value to `check`."""
    return lambda name, value: None if value is None else check(name, value)


_Check = Callable[[str, object], object]

NORMALIZERS: Final[Mapping[str, _Check]] = {
    "r": _rank,
    "lora_alpha": _number,
    "lora_dropout": _dropout,
    "target_modules": _optional(_modules),
    "exclude_modules": _optional(_modules),
    "scope": _optional(_scope),
    "layers_to_transform": _optional(_layers),
    "layers_pattern": _optional(_layers_pattern),
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_number),
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "bias": _bias,
    "modules_to_save": _optional(_saved),
    "target_parameters": _optional(_parameters),
    "trainable_token_indices": _optional(_tokens),
    "ensure_weight_tying": _flag,
    "task_type": _task,
    "fan_in_fan_out": _flag,
    "init_lora_weights": _init,
    "loftq_config": options,
    "eva_config": options,
    "corda_config": options,
    "lora_ga_config": options,
    "use_bdlora": options,
    "arrow_config": options,
    "alora_invocation_tokens": _optional(_invocation),
    "dense_groups": _flag,
    "kasa_config": variant,
    "velora_config": variant,
    "monteclora_config": variant,
    "seed": _seed,
    "inference_mode": _flag,
    "base_model_name_or_path": _optional(_text),
    "auto_mapping": _optional(_base_class),
    "revision": _optional(_text),
    "kind": _optional(_text),
}


# Fields that PEFT writes about itself. They do not affect the computation.
METADATA: Final = frozenset({"peft_type", "peft_version"})


class _Foreign(NamedTuple):
    """A field of PEFT that lora_fx does not support.

    Attributes:
        off: PEFT's default, which switches the field off.
        feature: The feature that needs the field, for the error.
    """

    off: object
    feature: str


FOREIGN: Final[Mapping[str, _Foreign]] = {
    "layer_replication": _Foreign(
        None, "the replication of layers, which makes another model: build that one first"
    ),
    "megatron_config": _Foreign(None, "Megatron, an engine that lora_fx does not run on"),
    "megatron_core": _Foreign("megatron.core", "Megatron, an engine that lora_fx does not run on"),
    "qalora_group_size": _Foreign(16, "QALoRA, another method than LoRA"),
    "runtime_config": _Foreign(
        None, "PEFT's runtime (offloading of norms), which saves nothing here"
    ),
    "use_qalora": _Foreign(False, "QALoRA, another method than LoRA"),
}


def is_off(value: object) -> bool:
    """Return True if a value of a field switches its feature off: None, False or an empty collection."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return not value
    return value is None or value is False


_SHORT: Final = {
    "rank": "r",
    "lora_rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "target": "target_modules",
    "exclude": "exclude_modules",
}
"""Fields of `LoraConfig` by their names in other libraries and on the command line, for error texts."""


def only_own(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `LoraConfig`, without PEFT's other fields that are switched off.

    Args:
        values: Fields by name.

    Raises:
        ConfigError: If a field of another method is switched on, or a name does not exist.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in NORMALIZERS:
            kept[name] = value
        elif name not in FOREIGN:
            near = hint(name, NORMALIZERS, "did you mean '{}'?", cutoff=0.5, between="' or '")
            if meant := _SHORT.get(name):
                near = f"did you mean {meant!r}?"
            known = f"The fields are {', '.join(NORMALIZERS)}"
            raise ConfigError(f"LoraConfig has no field {name!r}; {near or known}")
        elif not is_off(value) and value != FOREIGN[name].off and not _is_runtime(name, value):
            off, feature = FOREIGN[name]
            raise ConfigError(
                f"LoraConfig.{name}: found {value!r}; lora_fx does not support it: it belongs to {feature}. "
                f"Leave it out or give {off!r}"
            )
    return kept


def _is_runtime(name: str, value: object) -> bool:
    """Return True if a field is PEFT's `runtime_config`, and the feature in it is switched off."""
    return name == "runtime_config" and is_off(getattr(value, "ephemeral_gpu_offload", True))
