"""Which parts of a fused weight a configuration means: ``qkv.q``, or rows by number, ``qkv.0_64``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import Verdict, excluded, judge, uses_default_targets
from lora_fx.errors import ConfigError
from lora_fx.ir.values import Site

__all__ = ["choose_parts"]

_ROWS = re.compile(r"(?P<name>.+)\.(?P<start>\d+)_(?P<stop>\d+)")


def choose_parts(site: Site, config: LoraConfig, whole: Verdict) -> list[tuple[Site, Verdict]]:
    """The parts of a site that are adapted in its place; empty if the site itself is meant.

    Args:
        site: Any site.
        config: What the user asks for.
        whole: What the configuration says of the site.

    Raises:
        ConfigError: If rows are named that the weight does not have, or that overlap.
    """
    if not site.divisible:
        return []
    parts = [site.part(name, rows) for name, rows in site.parts]
    if whole.selected:
        if not any(excluded(part.name, config) for part in parts):
            return []
        return [
            (part, judge(part.name, config) if excluded(part.name, config) else whole)
            for part in parts
        ]
    if uses_default_targets(config) or excluded(site.name, config):
        return []
    numbered = {part.rows: part for part in _by_number(site, config)}
    # Rows that have a name, too, are called what the configuration calls them.
    parts = [part for part in parts if part.rows not in numbered] + list(numbered.values())
    verdicts = [(part, judge(part.name, config)) for part in parts]
    selected = [part for part, verdict in verdicts if verdict.selected]
    _check(site, selected)
    return verdicts if selected else []


def _by_number(site: Site, config: LoraConfig) -> Iterator[Site]:
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ():
        found = _ROWS.fullmatch(target)
        if found is None or not f".{site.name}".endswith(f".{found['name']}"):
            continue
        rows = int(found["start"]), int(found["stop"])
        if not rows[0] < rows[1] <= site.out_features:
            raise ConfigError(
                f"target_modules {target!r}: {site.name} has the rows 0 to {site.out_features}, "
                "written start_stop as in a slice"
            )
        yield site.part(f"{found['start']}_{found['stop']}", rows)


def _check(site: Site, parts: list[Site]) -> None:
    ordered = sorted(part.rows or (0, 0) for part in parts)
    for one, other in itertools.pairwise(ordered):
        if one[1] > other[0]:
            raise ConfigError(
                f"target_modules names rows of {site.name} that overlap: {one[0]}_{one[1]} and "
                f"{other[0]}_{other[1]}; a row has one adapter"
            )
