"""What the user asks for: PEFT's `LoraConfig`, immutable and checked when it is made.

Field names, defaults and meaning are those of `peft.LoraConfig` (PEFT 0.21.2), so that a
configuration moves between the two libraries unchanged. A PEFT field whose feature lora_fx does
not have is accepted with PEFT's default value and refused with any other: nothing is dropped in
silence.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
import numbers
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

from lora_fx.errors import CheckpointError, ConfigError

__all__ = ["ALL_LINEAR", "CONFIG_NAME", "TASK_TYPES", "FrozenPattern", "LoraConfig"]

CONFIG_NAME: Final = "adapter_config.json"
ALL_LINEAR: Final = "all-linear"
TASK_TYPES: Final = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

_logger = logging.getLogger("lora_fx")
_T = TypeVar("_T")
_V = TypeVar("_V", bound=float)

# What PEFT writes about itself and the base model's class: no part of what an adapter computes.
_METADATA: Final = frozenset({"peft_type", "auto_mapping", "peft_version"})

# PEFT's fields for features that lora_fx lacks, with PEFT's default, which switches them off.
_UNSUPPORTED: Final[Mapping[str, object]] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "runtime_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
_UNSUPPORTED_INITS: Final = re.compile(
    r"eva|olora|pissa(_niter_\d+)?|corda|loftq|orthogonal|mica|lora_ga", re.IGNORECASE
)


class FrozenPattern(Mapping[str, _V]):
    """A read-only, hashable `dict` that keeps its order, because the first matching key wins.

    Two of them are equal when they hold the same items in the same order; one equals a plain
    mapping when the items are the same in any order.
    """

    __slots__ = ("_data",)

    def __init__(self, items: Mapping[str, _V]) -> None:
        self._data: dict[str, _V] = dict(items)

    def __getitem__(self, key: str) -> _V:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenPattern):
            return tuple(self.items()) == tuple(other.items())
        return isinstance(other, Mapping) and self._data == dict(other)

    def __hash__(self) -> int:
        return hash(tuple(self._data.items()))

    def __repr__(self) -> str:
        return repr(self._data)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenPattern, (dict(self._data),)


def _bad(name: str, found: object, remedy: str) -> ConfigError:
    return ConfigError(f"LoraConfig.{name}: found {found!r}; {remedy}")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _bad(name, value, "give True or False")
    return value


def _text(name: str, value: object) -> str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is not None and not isinstance(value, str):
        raise _bad(name, value, "give a string or None")
    return value


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) <= 0:
        raise _bad(name, value, "a rank is a whole number of at least 1")
    return int(value)


def _number(name: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise _bad(name, value, "give a finite number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _dropout(name: str, value: object) -> float:
    probability = float(_number(name, value))
    if not 0.0 <= probability < 1.0:
        raise _bad(name, value, "a dropout probability is at least 0 and below 1")
    return probability


def _seed(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _bad(name, value, "a seed is a whole number")
    if not 0 <= int(value) < 2**63:
        raise _bad(name, value, "a seed is at least 0 and below 2**63")
    return int(value)


def _init(name: str, value: object) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() == "gaussian":
        return "gaussian"
    if isinstance(value, str) and _UNSUPPORTED_INITS.fullmatch(value):
        raise _bad(name, value, "lora_fx does not support it; use True, False or 'gaussian'")
    raise _bad(name, value, "the initialisations are True, False and 'gaussian'")


def _bias(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in ("none", "all", "lora_only"):
        raise _bad(name, value, "give 'none', 'all' or 'lora_only'")
    return value


def _task(name: str, value: object) -> str | None:
    plain = value.value if isinstance(value, Enum) else value
    if plain is not None and (not isinstance(plain, str) or plain not in TASK_TYPES):
        raise _bad(name, value, f"the task types are {', '.join(TASK_TYPES)}")
    return plain


def _compiles(name: str, pattern: str, prefix: str = "") -> None:
    # PEFT puts text around some patterns, where global flags such as (?i) are an error: the prefix
    # makes them one here, instead of in the middle of the matching.
    try:
        re.compile(pattern)
        re.compile(prefix + pattern)
    except (re.error, OverflowError, RecursionError) as exc:
        raise _bad(name, pattern, f"it is not a regular expression ({exc}); correct it") from exc


def _strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise _bad(name, value, "give a list of strings")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise _bad(name, entry, "every entry is a string that is not empty")
    return tuple(dict.fromkeys(sorted(value) if isinstance(value, set | frozenset) else value))


def _modules(name: str, value: object) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return tuple(sorted(_strings(name, value)))
    if name == "target_modules" and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    _compiles(name, value)
    return value


def _saved(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    entries = _strings(name, value)
    for entry in entries:
        _compiles(name, entry, "()")
    return entries


def _layers(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    indices = value if isinstance(value, list | tuple | set | frozenset | range) else (value,)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, numbers.Integral):
            raise _bad(name, index, "give a layer index (a whole number) or a list of them")
    return tuple(sorted({int(index) for index in indices}))


def _layers_pattern(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    entries = _strings(name, ([value] if value else []) if isinstance(value, str) else value)
    for entry in entries:
        _compiles(name, entry, "(?P<idx>)")
    return entries


def _pattern(check: Callable[[str, object], _V]) -> Callable[[str, object], FrozenPattern[_V]]:
    def normalise(name: str, value: object) -> FrozenPattern[_V]:
        if value is None:
            return FrozenPattern({})
        if not isinstance(value, Mapping):
            raise _bad(name, value, "give a dict of name or regular expression to number")
        for key in value:
            if not isinstance(key, str):
                raise _bad(name, key, "a key is a module name or a regular expression")
            _compiles(name, key, "()")
        return FrozenPattern({key: check(f"{name}[{key!r}]", one) for key, one in value.items()})

    return normalise


_NORMALISERS: Final[Mapping[str, Callable[[str, object], object]]] = {
    "r": _rank,
    "lora_alpha": _number,
    "lora_dropout": _dropout,
    "target_modules": _modules,
    "exclude_modules": _modules,
    "layers_to_transform": _layers,
    "layers_pattern": _layers_pattern,
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_number),
    "use_rslora": _flag,
    "bias": _bias,
    "modules_to_save": _saved,
    "task_type": _task,
    "fan_in_fan_out": _flag,
    "init_lora_weights": _init,
    "seed": _seed,
    "inference_mode": _flag,
    "base_model_name_or_path": _text,
    "revision": _text,
}


def _is_off(value: object) -> bool:
    """Whether a value can only mean that a feature is not used."""
    if isinstance(value, Collection) and not isinstance(value, str):
        return not value
    return value is None or value is False


def _without_unsupported(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drops PEFT's fields that are at their default; refuses others and names that do not exist."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NORMALISERS:
            kept[name] = value
        elif name not in _UNSUPPORTED:
            near = difflib.get_close_matches(name, _NORMALISERS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            remedy = f"{hint}The fields are {', '.join(_NORMALISERS)}"
            raise ConfigError(f"LoraConfig has no field {name!r}; {remedy}")
        elif not _is_off(value) and value != _UNSUPPORTED[name]:
            default = _UNSUPPORTED[name]
            raise _bad(
                name, value, f"lora_fx does not support it; leave it out or give {default!r}"
            )
    return kept


def _accept_peft_fields(cls: type[_T]) -> type[_T]:
    """Lets the generated `__init__` see only lora_fx's own fields; the signature stays its own."""
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        generated(self, *args, **_without_unsupported(kwargs))

    type.__setattr__(cls, "__init__", __init__)
    return cls


@_accept_peft_fields
@dataclass(frozen=True)
class LoraConfig:
    """Which operations get an adapter, and which one.

    Values are normalised: lists become tuples, sets and lists that PEFT treats as sets become
    sorted tuples, dicts become `FrozenPattern`. So a config can be hashed, compared and pickled,
    and cannot be changed in place. `dataclasses.replace` makes a changed copy.

    Attributes:
        r: Rank of the adapters.
        lora_alpha: The branch is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
            `use_rslora`.
        lora_dropout: Probability in [0, 1), on the adapter's input only.
        target_modules: None: every linear operation but the output head (here lora_fx differs from
            PEFT, which has a table of architectures). "all-linear": every linear module but the
            output head. Any other string: a regular expression for the whole name. A list: names,
            or their last components.
        exclude_modules: Same syntax; applied first.
        layers_to_transform: Layer indices to adapt. Not with a string as `target_modules`. An empty
            collection of any type, as PEFT's empty list, means no restriction.
        layers_pattern: Names of the containers whose index counts, "layers" or "h".
        rank_pattern: Name or regular expression to rank; the first key that matches wins.
        alpha_pattern: The same for `lora_alpha`.
        use_rslora: Rank-stabilised scale (https://arxiv.org/abs/2312.03732).
        bias: Which biases of the base model train: "none", "all" or "lora_only".
        modules_to_save: Modules that are copied, trained in full and saved with the adapter.
        task_type: One of `TASK_TYPES`; classification and question answering save their heads.
        fan_in_fan_out: PEFT's note that weights are stored as (in, out).
        init_lora_weights: True: A Kaiming-uniform, B zero. "gaussian": A normal, B zero. False:
            both random, so that the adapter changes the output at once.
        seed: Seeds the initialisation of each site. lora_fx only: PEFT warns about keys that it
            does not know, so the file does not hold it.
        inference_mode: The adapter is loaded frozen.
        base_model_name_or_path: Where the base model came from.
        revision: Which version of it.

    Raises:
        ConfigError: A value cannot mean anything, a name is not a field, or a PEFT field asks for a
            feature that lora_fx does not have.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: Collection[str] | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    seed: int = 0
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, normalise in _NORMALISERS.items():
            object.__setattr__(self, name, normalise(name, getattr(self, name)))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    remedy = f"leave it out, or list the targets instead of {self.target_modules!r}"
                    raise _bad(name, getattr(self, name), remedy)
        if self.layers_pattern and self.layers_to_transform is None:
            raise _bad("layers_pattern", self.layers_pattern, "give layers_to_transform as well")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; `from_dict` gives an equal config back."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Reads what `to_dict` gave, here or in PEFT.

        Raises:
            ConfigError: As the constructor, and when `peft_type` is there and is not LORA.
        """
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise ConfigError(f"peft_type is {kind!r}; a LoraConfig holds only 'LORA'")
        return cls(**{name: value for name, value in values.items() if name not in _METADATA})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `adapter_config.json` as PEFT reads it; makes the folder.

        The order of `rank_pattern` and `alpha_pattern` is kept (PEFT's own writer sorts it, and the
        first key wins). `seed` is not written.

        Raises:
            CheckpointError: The file cannot be written. A file that was there before still is.
        """
        path = Path(directory, CONFIG_NAME)
        values = {**self.to_dict(), "peft_type": "LORA"}
        del values["seed"]
        text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"
        temporary = path.with_name(f"{CONFIG_NAME}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("x", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as exc:
            raise CheckpointError(
                f"{path} cannot be written ({exc}); give a folder that is writable and has room"
            ) from exc

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> LoraConfig:
        """Reads the `adapter_config.json` of a local adapter folder, PEFT's or lora_fx's.

        A key that neither library knows comes from a newer PEFT: it is ignored, with a warning in
        the log, when its value is a number or switches a feature off, and refused otherwise.

        Raises:
            CheckpointError: The file is missing, is not JSON, or is not of a LoRA adapter.
            ConfigError: A value in it is wrong or asks for a feature that lora_fx does not have.
        """
        path = Path(directory, CONFIG_NAME)
        values = _read_json(path)
        kind = values.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type is {kind!r}; only LoRA adapters can be read")
        known = {*_NORMALISERS, *_UNSUPPORTED, *_METADATA}
        for name in sorted(values.keys() - known):
            value = values[name]
            if _is_off(value) or (isinstance(value, int | float) and value is not True):
                _logger.warning("%s: the unknown key %r (%r) is ignored", path, name, value)
                del values[name]
        try:
            return cls.from_dict(values)
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}") from exc


def _plain(value: object) -> object:
    if isinstance(value, FrozenPattern):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the local folder of a PEFT adapter")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{path} is not readable JSON ({exc}); save the adapter again"
        ) from exc
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; save the adapter again")
    return values
