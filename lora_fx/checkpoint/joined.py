"""Which sites the tensors of a folder are for, before there is a model with adapters to ask."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx.adapters import WRAPPER, Layout, Target, is_attention
from lora_fx.config import LoraConfig, alpha_for, parameter_entry, rank_for
from lora_fx.errors import CheckpointError
from lora_fx.ir import AdapterRecord, PlannedSite, join
from lora_fx.kinds import chosen_kind
from lora_fx.passes.parameters import base_modules

__all__ = [
    "NOTE",
    "Joined",
    "Pair",
    "Parts",
    "Tensors",
    "joined_of",
    "note_of",
    "parts_in",
    "stored_targets",
    "wrapped_parameters",
]


Tensors = dict[str, torch.Tensor]

_OUT_PROJ = 2
"""How often PEFT adds what it trained beside ``out_proj``: 1 as soon as a release adds it once."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """A site, as a part of an adapter of PEFT.

    Attributes:
        row: The site.
        keys: Of its own A and B.
        rows: Which outputs of the whole it makes (start, stop).
    """

    row: PlannedSite
    keys: tuple[str, str]
    rows: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One A and one B of PEFT.

    Attributes:
        keys: Theirs.
        crossed: Whether they change places, transposed: PEFT's form of a parameter [in, out].
        sizes: Inputs and outputs of the whole.
        members: What they are made of.
        times: How often PEFT adds their product.
    """

    keys: tuple[str, str]
    crossed: bool
    sizes: tuple[int, int]
    members: tuple[_Member, ...]
    times: int = 1

    @property
    def rank(self) -> int:
        """That of the members together."""
        return sum(member.row.rank for member in self.members)

    def shape(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the two as they are stored."""
        first, last = self.sizes[::-1] if self.crossed else self.sizes
        return (rank, first), (last, rank)

    def turned(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From A and B to what is stored, and back."""
        return (b.T, a.T) if self.crossed else (a, b)


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """One adapter of PEFT.

    Attributes:
        name: What the configuration calls it.
        pairs: One, or two for an attention layer: in_proj and out_proj.
        rank_stabilized: Whether the scale is alpha / √r.
    """

    name: str
    pairs: tuple[Pair, ...]
    rank_stabilized: bool

    @property
    def members(self) -> tuple[_Member, ...]:
        """Of all pairs."""
        return tuple(member for pair in self.pairs for member in pair.members)

    @property
    def doubled(self) -> bool:
        """Whether PEFT adds more of it than its scale says."""
        return any(pair.times > 1 and pair.members for pair in self.pairs)

    @property
    def scale(self) -> float:
        """The one of the whole: no member has a larger one."""
        return max((member.row.scale for member in self.members), key=abs)

    @property
    def rank(self) -> int:
        """Where no factors are shared."""
        return max(pair.rank for pair in self.pairs)

    def alpha(self, rank: int) -> float:
        """By which the whole has its scale at some rank."""
        return self.scale * (math.sqrt(rank) if self.rank_stabilized else rank)

    def packed(self, tensors: Tensors) -> int:
        """Puts PEFT's two factors (of each pair) in place of the members' own, and returns the rank.

        Args:
            tensors: By key; changed.
        """
        ranks = {member.row.rank for member in self.members}
        shared = len(ranks) == 1 and all(_shares(pair, tensors) for pair in self.pairs)
        rank = ranks.pop() if shared else self.rank
        for pair in self.pairs:
            self._pack(pair, rank, shared, tensors)
        return rank

    def split(self, tensors: Tensors, scale: float) -> tuple[set[str], list[str]]:
        """Puts the members' own factors in place of PEFT's, as far as those are there.

        Args:
            tensors: By key; changed.
            scale: That of the adapter in the file.

        Returns:
            The keys of members that are not to be looked for any more, and what is wrong.
        """
        done: set[str] = set()
        problems: list[str] = []
        for pair in self.pairs:
            found = [tensors.pop(key, None) for key in pair.keys]
            a, b = found
            if a is None and b is None:
                continue
            wrong = list(_misfits(pair, found, self.rank))
            if not wrong and a is not None and b is not None:
                tensors |= _parts(pair, *pair.turned(a, b), scale)
                continue
            problems += wrong
            done |= {key for member in pair.members for key in member.keys}
        return done, problems

    def _pack(self, pair: Pair, rank: int, shared: bool, tensors: Tensors) -> None:
        a, b = torch.zeros(rank, pair.sizes[0]), torch.zeros(pair.sizes[1], rank)
        start = 0
        for member in pair.members:
            own_a, own_b = (tensors.pop(key) for key in member.keys)
            if member is pair.members[0]:
                a, b = a.to(own_a.dtype), b.to(own_b.dtype)
            columns = slice(start, start + member.row.rank)
            start = 0 if shared else columns.stop
            a[columns] = own_a
            factor = member.row.scale / self.scale if self.scale else 1.0
            b[slice(*member.rows), columns] = own_b * (factor / pair.times)
        stored = (value.contiguous() for value in pair.turned(a, b))
        tensors.update(zip(pair.keys, stored, strict=True))


def joined_of(layout: Layout, record: AdapterRecord) -> list[Joined]:
    """The adapters of PEFT that are made of several sites, or of a part of one weight."""
    places: dict[str, list[PlannedSite]] = {}
    for row in record.sites:
        if not row.tied and layout.joins(row.site):
            places.setdefault(layout.place(row.site), []).append(row)
    result = []
    for name, rows in places.items():
        pairs = (
            _attention_pairs(layout, name, rows)
            if name in layout.attention
            else (_pair(layout, name, rows),)
        )
        result.append(Joined(name, pairs, record.config.use_rslora))
    return result


def _pair(layout: Layout, name: str, rows: Sequence[PlannedSite]) -> Pair:
    site = rows[0].site
    parameter = name in layout.weights
    prefix = layout.prefix(name) if parameter else layout.inside(name)
    outputs = site.weight_shape[0 if site.layout == "out_in" else 1]
    crossed = parameter and layout.crossed(site)
    return Pair(_keys(prefix), crossed, (site.in_features, outputs), _members(rows))


def _attention_pairs(layout: Layout, name: str, rows: Sequence[PlannedSite]) -> tuple[Pair, Pair]:
    inner = [row for row in rows if row.site.owner == name]
    outer = [row for row in rows if row.site.owner != name]
    width = (inner or outer)[0].site.in_features
    out_proj = _keys(layout.inside(join(name, "out_proj")))
    return (
        Pair(_keys(layout.inside(name)), False, (width, 3 * width), _members(inner)),
        Pair(out_proj, False, (width, width), _members(outer), times=_OUT_PROJ),
    )


def _members(rows: Sequence[PlannedSite]) -> tuple[_Member, ...]:
    return tuple(
        _Member(row, _keys(row.site.holder), row.site.rows or (0, row.site.out_features))
        for row in rows
    )


def _keys(holder: str) -> tuple[str, str]:
    return join(holder, "lora_A.weight"), join(holder, "lora_B.weight")


def _shares(pair: Pair, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all members have the same A, so that one is enough."""
    factors = [tensors[member.keys[0]] for member in pair.members]
    return all(torch.equal(one, factors[0]) for one in factors[1:])


def _misfits(pair: Pair, found: Sequence[torch.Tensor | None], rank: int) -> Iterator[str]:
    ranks = {member.row.rank for member in pair.members}
    shapes = pair.shape(rank)
    for key, stored, shape in zip(pair.keys, found, shapes, strict=True):
        if stored is None:
            yield f"missing: {key} {list(shape)}"
    a, b = found
    if a is None or b is None:
        return
    size = a.shape[0] if a.dim() else 0
    wanted = pair.shape(size if size == rank or ranks == {size} else rank)
    for key, stored, shape in zip(pair.keys, (a, b), wanted, strict=True):
        if tuple(stored.shape) != shape:
            yield f"shape: {key} is {list(stored.shape)} as it was saved, {list(shape)} in the model"
            return
    rest = pair.turned(a, b)[1].clone()
    for member, columns in _blocks(pair, size):
        rest[slice(*member.rows), columns] = 0
    if rest.any():
        names = ", ".join(member.row.name for member in pair.members) or "nothing there"
        yield (
            f"not representable: {pair.keys[1]} changes more than the adapters of the model do "
            f"({names}): load it onto the original model"
        )


def _parts(pair: Pair, a: torch.Tensor, b: torch.Tensor, scale: float) -> Tensors:
    result: Tensors = {}
    for member, columns in _blocks(pair, len(a)):
        own, whole = member.row.scale, scale * pair.times
        block = b[slice(*member.rows), columns]
        result[member.keys[0]] = a[columns]
        result[member.keys[1]] = block if whole == own or not own else block * (whole / own)
    return result


def _blocks(pair: Pair, rank: int) -> Iterator[tuple[_Member, slice]]:
    """Which part of the whole rank each member has: all of it, or its own."""
    shared = all(member.row.rank == rank for member in pair.members)
    start = 0
    for member in pair.members:
        stop = start + member.row.rank
        yield member, slice(0, rank) if shared else slice(start, stop)
        start = stop


NOTE = "lora_fx.parts"
"""Key of the file's metadata, which PEFT does not look at, with the sites that were joined."""

Parts = Mapping[str, Mapping[str, tuple[int, float]]]
"""By name of an adapter of PEFT: rank and alpha of the sites that it was made of."""

_FACTORS = r"lora_(?:[AB]\.weight|embedding_[AB])"
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
    kind = chosen_kind(config)
    # Without factors it is the slots that say where an adapter is.
    ends = _FACTORS if kind.low_rank else "|".join(map(re.escape, kind.keys))
    one = re.compile(rf"(?:(?P<holder>.+)\.)?(?:{ends})")
    for key in keys:
        match = one.fullmatch(key)
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
        name = _part_name(name.removesuffix("_lora"), modules)
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


def _part_name(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of a site, from that of its holder: ``w_0_8`` is the part ``w.0_8`` of a parameter ``w``."""
    outer, _, leaf = name.rpartition(".")
    owner = modules.get(outer)
    parameters = () if owner is None else tuple(owner._parameters)
    cut = [one for one in parameters if leaf.startswith(f"{one}_")]
    if not cut or leaf in parameters:
        return name
    parameter = max(cut, key=len)
    return join(outer, f"{parameter}.{leaf[len(parameter) + 1 :]}")


def _bare(name: str) -> str:
    return ".".join(atom for atom in name.split(".") if atom != WRAPPER)
