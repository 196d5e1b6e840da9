"""The adapter kinds that lora_fx knows, and which of them a configuration chooses."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import Site
from lora_fx.kinds.base import AdapterKind

__all__ = [
    "chosen_kind",
    "is_plain",
    "kind_objection",
    "kind_of",
    "kind_with",
    "kinds",
    "register_adapter_kind",
    "union_of",
]


def _built_in() -> tuple[AdapterKind, ...]:
    """The kinds of every file of this package: its ``KINDS``, those first that only add to the operation."""
    package = __name__.rpartition(".")[0]
    files = pkgutil.iter_modules([str(Path(__file__).parent)])
    modules = (importlib.import_module(f"{package}.{file.name}") for file in files)
    found = (kind for module in modules for kind in getattr(module, "KINDS", ()))
    return tuple(sorted(found, key=lambda kind: bool(kind.transforms)))


_BUILT_IN = _built_in()
_PLAIN = next(kind for kind in _BUILT_IN if kind.name == "lora")
_registry: tuple[AdapterKind, ...] = _BUILT_IN


def kinds() -> tuple[AdapterKind, ...]:
    """All kinds, in the order in which they were registered."""
    return _registry


def register_adapter_kind(kind: AdapterKind) -> None:
    """Adds an adapter kind of your own: what is trained at a site, beside or instead of A and B.

    A configuration chooses it by its name, ``LoraConfig(kind="ia3", target_modules=[...])``. All of PEFT's
    fields keep their meaning: they say which operations are adapted and what is trained beside the adapters,
    and fields that say something of A and B are refused by a kind that has none. PEFT's own variants have no
    ``kind``: there their fields choose (``lora_bias`` and the like), so that PEFT reads what is saved.
    An adapter folder has the name in ``adapter_config.json``, with a ``peft_type`` that PEFT does not take
    for LoRA; it can be loaded where the kind is registered.

    Args:
        kind: An object of a subclass of :class:`lora_fx.kinds.AdapterKind`. Its options are attributes of it.

    Raises:
        ConfigError: If its name is empty or taken by another kind, or it says nothing of the weight it makes.
    """
    global _registry  # noqa: PLW0603  # one list for the process
    given: object = kind
    if not isinstance(given, AdapterKind) or not given.name:
        raise ConfigError(
            f"{given!r} is no adapter kind with a name: subclass lora_fx.kinds.AdapterKind"
        )
    # A cell of a notebook that is run again defines its class again.
    if any(one.name == kind.name and _place(one) != _place(kind) for one in _registry):
        raise ConfigError(f"the kind {kind.name!r} is registered already: give it another name")
    if not kind.low_rank and not kind.transforms:
        raise ConfigError(
            f"the kind {kind.name!r} has no factors (low_rank) and makes no other weight (transforms): it "
            "would train nothing that a merge knows"
        )
    if not kind.low_rank and not kind.keys:
        raise ConfigError(
            f"the kind {kind.name!r} has no factors and says no keys, by which a folder could be read"
        )
    _registry = (*(one for one in _registry if one.name != kind.name), kind)


def _place(kind: AdapterKind) -> tuple[str, str]:
    return type(kind).__module__, type(kind).__qualname__


class _Kinded(Protocol):
    @property
    def kind(self) -> str: ...


def kind_of(row: _Kinded) -> AdapterKind:
    """The kind of a planned site.

    Raises:
        ConfigError: If it was registered in another process and is not here.
    """
    return _named(row.kind)


def _named(name: str) -> AdapterKind:
    for kind in _registry:
        if kind.name == name:
            return kind
    names = [kind.name for kind in _registry if kind not in _BUILT_IN]
    near = difflib.get_close_matches(name, names)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"the adapter kind {name!r} is not registered here: {hint}call lora_fx.register_adapter_kind with it "
        "first"
    )


def chosen_kind(config: LoraConfig) -> AdapterKind:
    """The kind that a configuration chooses.

    Raises:
        ConfigError: If it is not registered, is one that other fields choose, or lacks what they ask for.
    """
    if config.kind is None:
        asked = (kind for kind in _BUILT_IN if kind.field and getattr(config, kind.field))
        return next(asked, _PLAIN)
    kind = _named(config.kind)
    if kind in _BUILT_IN:
        how = f"{kind.field}=True chooses it" if kind.field else "it is not chosen by name"
        raise ConfigError(f"LoraConfig.kind: found {kind.name!r}; {how}: leave out kind")
    kind.check(config)
    return kind


def is_plain(config: LoraConfig) -> bool:
    """Whether a configuration chooses A and B and nothing else: ``W' = W + s · B A``."""
    return chosen_kind(config) is _PLAIN


def kind_objection(site: Site, config: LoraConfig) -> str | None:
    """Why a selected site cannot have the configuration's kind; None if it can.

    Raises:
        ConfigError: If it cannot, and the configuration names it in a list: then it is what was asked for.
    """
    reason = chosen_kind(config).objection(site)
    if reason is not None and _is_named(site.name, config):
        raise ConfigError(f"{site.name}: {reason}")
    return reason


def _is_named(name: str, config: LoraConfig) -> bool:
    targets = config.target_modules
    if not isinstance(targets, tuple):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)


def union_of(names: Iterable[str], site: Site) -> str:
    """The kind that trains at a site whatever any of these does.

    Raises:
        ConfigError: If there is none.
    """
    several = [_named(name) for name in dict.fromkeys(names)]
    return kind_with({slot.name for kind in several for slot in kind.slots(site)}, site)


def kind_with(slots: Collection[str], site: Site) -> str:
    """The kind that trains A, B and these slots at a site.

    Raises:
        ConfigError: If there is none.
    """
    for kind in _registry:
        if kind.low_rank and {slot.name for slot in kind.slots(site)} == set(slots):
            return kind.name
    raise ConfigError(
        f"{site.name}: no registered kind has A, B and {', '.join(slots) or 'nothing else'}"
    )
