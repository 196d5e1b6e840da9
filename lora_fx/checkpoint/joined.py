"""Which sites the tensors of a folder are for, before there is a model with adapters to ask."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lora_fx.adapters.checkpoint_layout import WRAPPER, is_attention
from lora_fx.adapters.settings import Target
from lora_fx.checkpoint.checkpoint_joined import Joined
from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import alpha_for, parameter_entry, rank_for
from lora_fx.errors import CheckpointError
from lora_fx.ir.values import join
from lora_fx.passes.parameters.own import base_modules

__all__ = ["NOTE", "Parts", "note_of", "parts_in", "stored_targets", "wrapped_parameters"]

NOTE = "lora_fx.parts"
"""Key of the file's metadata, which PEFT does not look at, with the sites that were joined."""

Parts = Mapping[str, Mapping[str, tuple[int, float]]]
"""By name of an adapter of PEFT: rank and alpha of the sites that it was made of."""

_FACTOR = re.compile(r"(?:(?P<holder>.+)\.)?lora_(?:[AB]\.weight|embedding_[AB])")
_PROJECTIONS = ("q", "k", "v", "out_proj")


def note_of(joined: Iterable[Joined]) -> dict[str, str]:
    """The metadata of a file: without it, the whole is adapted as one when it is read."""
    parts = {
        one.name: {member.row.name: (member.row.rank, member.row.alpha) for member in one.members}
        for one in joined
    }
    return {NOTE: json.dumps(parts, sort_keys=True)} if parts else {}


def parts_in(metadata: Mapping[str, str]) -> Parts:
    """Reads what :func:`note_of` wrote.

    Raises:
        CheckpointError: If the note is not one that lora_fx wrote.
    """
    text = metadata.get(NOTE, "{}")
    try:
        return {
            whole: {name: (int(rank), float(alpha)) for name, (rank, alpha) in parts.items()}
            for whole, parts in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the metadata {NOTE!r} of the file is damaged ({text[:60]!r}); save the adapter again, or "
            "take the metadata out of the file to have the whole weights adapted"
        ) from error


def wrapped_parameters(model: nn.Module, config: LoraConfig) -> dict[str, list[str]]:
    """FQNs of the parameters that ``target_parameters`` names, by module, in the order of PEFT's wrappers."""
    found: dict[str, list[str]] = {}
    for owner, module in base_modules(model) if config.target_parameters else ():
        for name, value in module._parameters.items():
            weight = join(owner, name)
            if value is not None and parameter_entry(weight, config) is not None:
                found.setdefault(owner, []).append(weight)
    return found


def stored_targets(
    model: nn.Module, config: LoraConfig, keys: Iterable[str], parts: Parts
) -> list[Target]:
    """What the factors among the keys are for, in their order.

    Args:
        model: The model, rewritten or not.
        config: That of the folder.
        keys: Without PEFT's prefix.
        parts: What was joined.
    """
    modules = dict(base_modules(model, every_name=True))
    parameters = wrapped_parameters(model, config)
    found: dict[str, Target] = {}
    for key in keys:
        match = _FACTOR.fullmatch(key)
        if match is not None:
            for target in _targets(match["holder"] or "", modules, parameters, config, parts):
                found[target.name] = target
    return list(found.values())


def _targets(
    holder: str,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, list[str]],
    config: LoraConfig,
    parts: Parts,
) -> Iterator[Target]:
    name = holder if holder in modules else _bare(holder)
    depth = 0
    while holder.endswith(f".{WRAPPER}" * (depth + 1)) and holder != name:
        depth += 1
    wrapped = parameters.get(name, [])
    parameter = name in modules and depth < len(wrapped)
    if parameter:
        name = wrapped[len(wrapped) - 1 - depth]
    elif name.endswith("_lora") and name not in modules:
        name = name.removesuffix("_lora")
    outer, _, leaf = name.rpartition(".")
    if leaf == "out_proj" and not parameter and f"{outer}.{WRAPPER}." in f"{holder}.":
        # Part of the adapter of the attention layer around it.
        name = outer
    if name in parts:
        yield from (Target(one, *numbers) for one, numbers in parts[name].items())
        return
    name = name or "weight"
    within: tuple[str, ...] = ()
    if name in modules and is_attention(modules[name]):
        within = tuple(f"{name}.{projection}" for projection in _PROJECTIONS)
    yield Target(name, rank_for(name, config), alpha_for(name, config), parameter, within)


def _bare(name: str) -> str:
    return ".".join(atom for atom in name.split(".") if atom != WRAPPER)
