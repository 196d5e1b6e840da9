r"""Selection of names by a config, with rank and scale, exactly by PEFT's rules.

The rules are those of `check_target_module_exists` and `get_pattern_key` of PEFT 0.21.2, in order:

0. `scope`, which PEFT does not have: the name has to be in such a module;
1. `exclude_modules` (string: `re.fullmatch`; list: the whole name or a `.suffix` of it);
2. `modules_to_save`: such a module, and everything in it, is trained in full and never adapted;
3. `target_modules`, with the same syntax;
4. for list entries that are not the whole name: `layers_to_transform`, on the first numeric
   segment, or on the one after `layers_pattern`.

`target_parameters` names parameters, by the whole name or a `.suffix`. Of the other fields only
`modules_to_save` applies to them. If it is set, `target_modules=None` selects nothing.

`scale = alpha / r`, or `alpha / sqrt(r)` with `use_rslora`. Nothing here needs a model or torch.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, TypeVar

from lora_fx.config.lora_config import ALL_LINEAR, LoraConfig

__all__ = [
    "Unmatched",
    "Verdict",
    "alpha_for",
    "excluded",
    "judge",
    "layer_index",
    "name_matches",
    "nearest_names",
    "parameter_entry",
    "rank_for",
    "saved_by",
    "saved_entries",
    "saved_module",
    "scale_for",
    "scale_of",
    "unmatched",
    "unmatched_saved",
    "unmatched_targets",
    "uses_default_targets",
]

_V = TypeVar("_V", bound=float)

_HEADS: Final[Mapping[str | None, tuple[str, ...]]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@functools.lru_cache(maxsize=64)
def _as_set(entries: tuple[str, ...]) -> frozenset[str]:
    return frozenset(entries)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@dataclass(frozen=True)
class Verdict:
    """The decision whether a config selects a name, with the reason that a plan shows."""

    selected: bool
    reason: str


@dataclass(frozen=True)
class Unmatched:
    """Entries of a config that select nothing in a model; the tuples are empty by default.

    Attributes:
        targets: Entries of `target_modules` that match no name at all.
        filtered: Entries that match names, all of which `exclude_modules`, `modules_to_save` or
            `layers_to_transform` removed.
        excludes: Entries of `exclude_modules` that match no name.
        scopes: Entries of `scope` that contain no name.
        rank_keys: Keys of `rank_pattern` that set the rank of no selected name.
        alpha_keys: The same for `alpha_pattern`.
        layers: Indices of `layers_to_transform` in which no name is selected.
        layers_patterns: Entries of `layers_pattern` that find no index in any name.
    """

    targets: tuple[str, ...] = ()
    filtered: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    rank_keys: tuple[str, ...] = ()
    alpha_keys: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


def uses_default_targets(config: LoraConfig) -> bool:
    """Return True if `target_modules` is None or "all-linear", so that operations decide instead of names."""
    if config.target_modules is None:
        return config.target_parameters is None
    return config.target_modules == ALL_LINEAR


def judge(name: str, config: LoraConfig, *, in_default: bool = True) -> Verdict:
    """Decide whether a name is selected, and give the reason.

    Args:
        name: FQN of a site, without PEFT's "base_model.model." prefix.
        config: The user's configuration.
        in_default: True if `target_modules=None` or "all-linear" includes the operation. The caller knows it
            from the graph. It has no effect with other targets.
    """
    if not _in_scope(name, config):
        return Verdict(False, f"outside of scope {', '.join(map(repr, _entries(config.scope)))}")
    excluded = _entry_for(name, config.exclude_modules) if config.exclude_modules else None
    if excluded is not None:
        return Verdict(False, f"excluded by exclude_modules {excluded!r}")
    saved = saved_by(name, config)
    if saved is not None:
        return Verdict(False, f"trained in full: modules_to_save {saved!r}")
    if uses_default_targets(config):
        return _judge_default(name, config, in_default)
    entry = _entry_for(name, config.target_modules)
    if entry is None:
        field = "target_parameters" if config.target_modules is None else "target_modules"
        return Verdict(False, f"matches no target in {field}")
    if isinstance(config.target_modules, str):
        return Verdict(True, f"matches the regular expression {entry!r}")
    if entry == name:
        return Verdict(True, "named in target_modules")
    return _layer_objection(name, config) or Verdict(True, f"matches target {entry!r}")


def _in_scope(name: str, config: LoraConfig) -> bool:
    """Return True if a name is in one of the modules of `scope`, or there is no scope."""
    return config.scope is None or any(_lies_in(name, module) for module in config.scope)


def _lies_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def excluded(name: str, config: LoraConfig) -> bool:
    """Return True if `exclude_modules` matches a name."""
    return _entry_for(name, config.exclude_modules) is not None


def name_matches(name: str, config: LoraConfig, *, in_default: bool = True) -> bool:
    """Return True if a config selects a name; :func:`judge` also gives the reason."""
    return judge(name, config, in_default=in_default).selected


def layer_index(name: str, config: LoraConfig) -> int | None:
    """Return the index to compare with `layers_to_transform`, or None if the name has no index.

    Without `layers_pattern` the index is the first numeric segment that has two segments before it and one
    after it: PEFT's expression does not match the index in "layers.0.q".
    """
    patterns = _entries(config.layers_pattern)
    expressions = [_layer_regex(pattern) for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    for expression in expressions:
        match = _compiled(expression).match(name)
        if match is not None:
            return int(match["idx"]) if match["idx"] is not None else None
    return None


def rank_for(name: str | Sequence[str], config: LoraConfig) -> int:
    """Return the rank of the adapter at `name`.

    If there are several names, the first that matches a pattern decides.
    """
    return _from_pattern(name, config.rank_pattern, config.r)


def alpha_for(name: str | Sequence[str], config: LoraConfig) -> float:
    """Return the alpha of the adapter at `name`, looked up as by :func:`rank_for`."""
    return _from_pattern(name, config.alpha_pattern, config.lora_alpha)


def scale_for(name: str | Sequence[str], config: LoraConfig) -> float:
    """Return the scale of the branch at `name`: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    return scale_of(rank_for(name, config), alpha_for(name, config), config)


def scale_of(rank: int, alpha: float, config: LoraConfig) -> float:
    """Return the scale of a branch of this rank and alpha."""
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def saved_entries(config: LoraConfig) -> tuple[str, ...]:
    """Return `modules_to_save`, with the heads that `task_type` adds to it."""
    return tuple(
        dict.fromkeys((*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ())))
    )


def saved_module(name: str, config: LoraConfig) -> bool:
    """Return True if the module at `name` is copied and trained in full.

    PEFT (`_set_trainable`) compares with `str.endswith`, without a dot: "head" saves "lm_head" too. A child
    of a saved module does not match, but is part of it.
    """
    return name.endswith(saved_entries(config))


def saved_by(name: str, config: LoraConfig) -> str | None:
    """Return the entry of `modules_to_save` whose module contains the name, or None."""
    for entry in saved_entries(config):
        if _compiled(rf"(^|.*\.){entry}($|\..*)").match(name):
            return entry
        # PEFT's guard misses names that `saved_module` matches without a dot. PEFT then fails on an
        # adapter at such a module, and copies adapters inside it. A copy is trained in full, so here
        # neither is adapted.
        if name.endswith(entry) or f"{entry}." in name:
            return entry
    return None


def parameter_entry(weight: str, config: LoraConfig) -> str | None:
    """Return the entry of `target_parameters` that names a parameter, or None.

    Args:
        weight: FQN of the parameter.
        config: The user's configuration.
    """
    return _entry_for(weight, config.target_parameters) if _in_scope(weight, config) else None


def unmatched(
    names: Iterable[str], config: LoraConfig, *, selected: Collection[str] | None = None
) -> Unmatched:
    """Return the entries of the config that select nothing among the names.

    Args:
        names: All names that could be a target.
        config: The user's configuration.
        selected: The names that are adapted; by default those that `name_matches`.
    """
    names = list(dict.fromkeys(names))
    if selected is None:
        selected = [name for name in names if name_matches(name, config)]
    targets = () if uses_default_targets(config) else _entries(config.target_modules)
    as_regex = isinstance(config.target_modules, str)
    matched = _used(names, targets, as_regex)
    kept = _used(selected, targets, as_regex)
    excludes = _entries(config.exclude_modules)
    excluding = _used(names, excludes, isinstance(config.exclude_modules, str))
    layers = config.layers_to_transform
    wanted = (layers,) if isinstance(layers, int) else tuple(layers or ())
    seen = {layer_index(name, config) for name in selected} if wanted else set()
    return Unmatched(
        targets=tuple(entry for entry in targets if entry not in matched),
        filtered=tuple(entry for entry in targets if entry in matched and entry not in kept),
        excludes=tuple(entry for entry in excludes if entry not in excluding),
        scopes=tuple(
            entry
            for entry in _entries(config.scope)
            if not any(_lies_in(name, entry) for name in names)
        ),
        rank_keys=_idle_keys(config.rank_pattern, selected),
        alpha_keys=_idle_keys(config.alpha_pattern, selected),
        layers=tuple(index for index in wanted if index not in seen),
        layers_patterns=tuple(
            entry
            for entry in _entries(config.layers_pattern)
            if not any(_compiled(_layer_regex(entry)).match(name) for name in names)
        ),
    )


def unmatched_targets(names: Iterable[str], config: LoraConfig) -> tuple[str, ...]:
    """Return the entries of `target_modules` (or the regular expression) that match none of the names."""
    return unmatched(names, config).targets


def unmatched_saved(module_names: Iterable[str], config: LoraConfig) -> tuple[str, ...]:
    """Return the entries of `modules_to_save` that match no module.

    A folder of PEFT lists all names that the head of a `task_type` may have. A match for one of these names
    is enough.
    """
    names = list(module_names)

    def matches(entry: str) -> bool:
        return any(name.endswith(entry) for name in names)

    heads = _HEADS.get(config.task_type, ())
    optional = heads if any(map(matches, heads)) else ()
    entries = [entry for entry in config.modules_to_save or () if entry not in optional]
    return tuple(entry for entry in entries if not matches(entry))


def nearest_names(target: str, names: Iterable[str], n: int = 3) -> tuple[str, ...]:
    """Return up to `n` existing targets that look like `target`, the most similar first.

    Compares with full names, last components, and endings with as many components as the target. Only the
    literal text of a regular expression counts.
    """
    plain = re.sub(r"\.[*+]\??|\\[a-zA-Z]|[\\^$()\[\]{}?*+|]", "", target).strip(".")
    length = plain.count(".") + 1
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        candidates.update(dict.fromkeys((parts[-1], ".".join(parts[-length:]), name)))
    return tuple(difflib.get_close_matches(plain, candidates, n=n)) if plain and n > 0 else ()


def _judge_default(name: str, config: LoraConfig, in_default: bool) -> Verdict:
    if not in_default:
        return Verdict(False, f"not what target_modules={config.target_modules!r} stands for")
    objection = _layer_objection(name, config)
    if config.target_modules is None:
        return objection or Verdict(True, "part of the default, since target_modules is not set")
    return objection or Verdict(True, f"part of target_modules={config.target_modules!r}")


def _layer_objection(name: str, config: LoraConfig) -> Verdict | None:
    wanted = config.layers_to_transform
    if wanted is None or wanted == ():
        return None
    index = layer_index(name, config)
    if index is None:
        hint = "layers_pattern finds no" if config.layers_pattern else "its name shows no"
        return Verdict(False, f"{hint} layer index, and layers_to_transform is set")
    if index in ((wanted,) if isinstance(wanted, int) else wanted):
        return None
    return Verdict(False, f"layer {index} is not in layers_to_transform")


def _entries(value: str | Collection[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _suffixes(name: str) -> Iterator[str]:
    """Yield the name and every ending after a dot, longest first."""
    yield name
    for position, character in enumerate(name):
        if character == ".":
            yield name[position + 1 :]


def _entry_for(name: str, value: str | Collection[str] | None) -> str | None:
    """Return the entry of a module list that matches a name, the longest first, or a matching expression."""
    if value is None:
        return None
    if isinstance(value, str):
        return value if _compiled(value).fullmatch(name) else None
    entries = _as_set(tuple(value))
    return next((suffix for suffix in _suffixes(name) if suffix in entries), None)


def _used(names: Iterable[str], entries: Sequence[str], as_regex: bool) -> set[str]:
    """Return the module names or regular expressions of a config that match at least one of the names."""
    if as_regex:
        return {
            entry for entry in entries if any(_compiled(entry).fullmatch(name) for name in names)
        }
    return set(entries).intersection(suffix for name in names for suffix in _suffixes(name))


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _pattern_key(name: str, keys: Iterable[str]) -> str:
    matching = (key for key in keys if _compiled(rf"(.*\.)?({key})$").match(name))
    # Like PEFT, fall back to the name itself: a key may fail to match itself as an expression.
    return next(matching, name)


def _from_pattern(name: str | Sequence[str], pattern: Mapping[str, _V], default: _V) -> _V:
    for candidate in (name,) if isinstance(name, str) else name:
        key = _pattern_key(candidate, pattern)
        if key in pattern:
            return pattern[key]
    return default


def _idle_keys(pattern: Mapping[str, object], selected: Iterable[str]) -> tuple[str, ...]:
    if not pattern:
        return ()
    deciding = {_pattern_key(name, pattern) for name in selected}
    return tuple(key for key in pattern if key not in deciding)
