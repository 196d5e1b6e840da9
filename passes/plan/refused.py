"""Targets that a configuration names and that cannot be adapted: an error, not a silence.

An entry of a list says which weights are meant. Where all that it selects is refused, the run would train
less than was asked for, whatever the other entries select.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import judge
from lora_fx.ir.values import Rejection

__all__ = ["named_by", "refusals"]


def named_by(target: str, rejections: Iterable[Rejection], config: LoraConfig) -> list[Rejection]:
    """The refusals that an entry of ``target_modules`` runs into; those left out otherwise do not count.

    Args:
        target: The entry: a full name, or the end of one, of a module or of its weight.
        rejections: All of them.
        config: What excludes, saves in full, or is for some layers only.
    """
    found = []
    for rejection in rejections:
        for name in (rejection.name, f"{rejection.name}.weight"):
            meant = name == target or name.endswith(f".{target}")
            if meant and judge(name, config).selected:
                found.append(rejection)
                break
    return found


def refusals(
    targets: Iterable[str], rejections: tuple[Rejection, ...], config: LoraConfig
) -> Iterator[str]:
    """A line for each entry that selects refused weights and nothing else.

    Args:
        targets: Entries of ``target_modules``, a list, that selected no site.
        rejections: All that was refused.
        config: The configuration.
    """
    for target in targets:
        found = named_by(target, rejections, config)
        reasons: dict[str, list[str]] = {}
        for rejection in found:
            reasons.setdefault(rejection.reason, []).append(rejection.name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"{target!r}: {', '.join(names[:3])}{more} cannot be adapted: {reason}"
