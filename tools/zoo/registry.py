"""All entries of the zoo, and how some of them are selected."""

from __future__ import annotations

import difflib
import fnmatch

from lora_fx.errors import ConfigError
from lora_fx.tools.zoo import plain_models
from lora_fx.tools.zoo.entries import Entry
from lora_fx.tools.zoo.library_models import read

__all__ = ["ENTRIES", "find", "select"]

LIBRARIES = ("torchvision", "timm", "transformers", "diffusers")
"""Each with a table of its models."""

ENTRIES: tuple[Entry, ...] = (
    *plain_models.ENTRIES,
    *(entry for name in LIBRARIES for entry in read(name)),
)


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ConfigError: There is none; with the nearest.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise ConfigError(f"the zoo has no model {name!r}{_nearest(name, [e.name for e in ENTRIES])}")


def groups() -> tuple[str, ...]:
    """The groups, in order."""
    return tuple(dict.fromkeys(entry.group for entry in ENTRIES))


def select(only: str | None = None, group: str | None = None) -> list[Entry]:
    """The entries that are asked for.

    Args:
        only: A part of the name, or a pattern with ``*`` and ``?`` for all of it.
        group: A group, or the beginning of its name.

    Raises:
        ConfigError: Nothing is selected; with what there is.
    """
    chosen = list(ENTRIES)
    if group is not None:
        chosen = [entry for entry in chosen if entry.group.startswith(group)]
        if not chosen:
            raise ConfigError(f"the zoo has no group {group!r}: {', '.join(groups())}")
    if only is None:
        return chosen
    found = [entry for entry in chosen if _fits(entry.name, only)]
    if not found:
        names = [entry.name for entry in chosen]
        raise ConfigError(f"no model of the zoo is called {only!r}{_nearest(only, names)}")
    return found


def _fits(name: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name.lower(), pattern.lower())
    return pattern.lower() in name.lower()


def _nearest(name: str, known: list[str]) -> str:
    short = {known_name.partition("/")[2]: known_name for known_name in known}
    near = difflib.get_close_matches(name.rpartition("/")[2], short, 3, cutoff=0.5)
    return f"; nearest: {', '.join(short[n] for n in near)}" if near else ""
