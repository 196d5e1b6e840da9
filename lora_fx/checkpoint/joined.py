"""Sites that share an adapter of PEFT: their factors are joined when saved and split when loaded."""

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
    "attention_around",
    "joined_of",
    "note_of",
    "parts_in",
    "stored_targets",
    "wrapped_parameters",
]


Tensors = dict[str, torch.Tensor]

_OUT_PROJ = 2
"""Number of times that PEFT adds the product of ``out_proj``: 1 as soon as a release adds it once."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """A site that is part of an adapter of PEFT.

    Attributes:
        row: The site.
        keys: Keys of the site's A and B.
        rows: Range of the outputs that the site computes (start, stop).
    """

    row: PlannedSite
    keys: tuple[str, str]
    rows: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """The factors A and B of one adapter of PEFT, which contain the factors of several sites.

    Attributes:
        keys: Keys of A and B.
        crossed: True if A and B are swapped and transposed, as PEFT stores the factors of a parameter
            [in, out].
        sizes: Numbers of inputs and outputs of the whole weight.
        members: The sites in the pair.
        times: Number of times that PEFT adds the product of A and B to the output.
    """

    keys: tuple[str, str]
    crossed: bool
    sizes: tuple[int, int]
    members: tuple[_Member, ...]
    times: int = 1

    @property
    def rank(self) -> int:
        """The rank of the pair if its members do not share an A: the sum of their ranks."""
        return sum(member.row.rank for member in self.members)

    def shape(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of the two stored factors for a rank: [rank, inputs] and [outputs, rank]."""
        first, last = self.sizes[::-1] if self.crossed else self.sizes
        return (rank, first), (last, rank)

    def turned(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert A and B to the stored factors, or back. They change only if ``crossed`` is set."""
        return (b.T, a.T) if self.crossed else (a, b)


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """An adapter of PEFT that covers several sites.

    Attributes:
        name: The name in the configuration.
        pairs: A single pair, or two for an attention layer: in_proj and out_proj.
        rank_stabilized: True if the scale is alpha / √r.
    """

    name: str
    pairs: tuple[Pair, ...]
    rank_stabilized: bool

    @property
    def members(self) -> tuple[_Member, ...]:
        """The members of all pairs."""
        return tuple(member for pair in self.pairs for member in pair.members)

    @property
    def doubled(self) -> bool:
        """True if PEFT adds a product more than once."""
        return any(pair.times > 1 and pair.members for pair in self.pairs)

    @property
    def scale(self) -> float:
        """The scale of the joined adapter: the largest scale of the members, by magnitude."""
        return max((member.row.scale for member in self.members), key=abs)

    @property
    def rank(self) -> int:
        """The rank to store if members do not share an A: the largest rank of the pairs."""
        return max(pair.rank for pair in self.pairs)

    def alpha(self, rank: int) -> float:
        """Return the alpha that gives the joined adapter its scale at a rank."""
        return self.scale * (math.sqrt(rank) if self.rank_stabilized else rank)

    def packed(self, tensors: Tensors) -> int:
        """Replace the members' factors by PEFT's two factors (of each pair), and return the rank.

        Args:
            tensors: Tensors by key, changed in place.
        """
        ranks = {member.row.rank for member in self.members}
        shared = len(ranks) == 1 and all(_shares(pair, tensors) for pair in self.pairs)
        rank = ranks.pop() if shared else self.rank
        for pair in self.pairs:
            self._pack(pair, rank, shared, tensors)
        return rank

    def split(self, tensors: Tensors, scale: float) -> tuple[set[str], list[str]]:
        """Replace PEFT's factors by those of the members, for the pairs that are in the file.

        Args:
            tensors: Tensors by key, changed in place.
            scale: Scale of the adapter in the file.

        Returns:
            The keys of members in faulty pairs, which are not to be reported as missing, and the problems.
        """
        done: set[str] = set()
        problems: list[str] = []
        for pair in self.pairs:
            factors = [tensors.pop(key, None) for key in pair.keys]
            a, b = factors
            if a is None and b is None:
                continue
            wrong = list(_misfits(pair, factors, self.rank))
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
    """Return PEFT's adapters that cover several sites, or part of a weight."""
    rows_by_name: dict[str, list[PlannedSite]] = {}
    for row in record.sites:
        if not row.tied and layout.joins(row.site):
            rows_by_name.setdefault(layout.place(row.site), []).append(row)
    result = []
    for name, rows in rows_by_name.items():
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
    """Return True if all sites in a pair have the same A, so that A is stored once."""
    factors = [tensors[member.keys[0]] for member in pair.members]
    return all(torch.equal(factor, factors[0]) for factor in factors[1:])


def _misfits(pair: Pair, factors: Sequence[torch.Tensor | None], rank: int) -> Iterator[str]:
    ranks = {member.row.rank for member in pair.members}
    shapes = pair.shape(rank)
    for key, stored, shape in zip(pair.keys, factors, shapes, strict=True):
        if stored is None:
            yield f"missing: {key} {list(shape)}"
    a, b = factors
    if a is None or b is None:
        return
    size = a.shape[0] if a.dim() else 0
    wanted = pair.shape(size if size == rank or ranks == {size} else rank)
    for key, stored, shape in zip(pair.keys, (a, b), wanted, strict=True):
        if tuple(stored.shape) != shape:
            yield f"shape: {key} is {list(stored.shape)} as it was saved, {list(shape)} in the model"
            return
    remainder = pair.turned(a, b)[1].clone()
    for member, columns in _blocks(pair, size):
        remainder[slice(*member.rows), columns] = 0
    if remainder.any():
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
    """Yield each site in a pair with its slice of the pair's rank.

    The slice is the whole rank if the sites share an A.
    """
    shared = all(member.row.rank == rank for member in pair.members)
    start = 0
    for member in pair.members:
        stop = start + member.row.rank
        yield member, slice(0, rank) if shared else slice(start, stop)
        start = stop


NOTE = "lora_fx.parts"
"""Key of the file's metadata with the joined sites. PEFT ignores it."""

Parts = Mapping[str, Mapping[str, tuple[int, float]]]
"""Rank and alpha of the joined sites, by the name of PEFT's adapter and the name of the site."""

_FACTORS = r"lora_(?:[AB]\.weight|embedding_[AB])"
_PROJECTIONS = ("q", "k", "v", "out_proj")


def note_of(joined: Iterable[Joined]) -> dict[str, str]:
    """Return the metadata about joined sites. Without it, loading adapts the whole weight as one site."""
    parts = {
        adapter.name: {
            member.row.name: (member.row.rank, member.row.alpha) for member in adapter.members
        }
        for adapter in joined
    }
    return {NOTE: json.dumps(parts, sort_keys=True)} if parts else {}


def parts_in(metadata: Mapping[str, str]) -> Parts:
    """Return the parts in a note of :func:`note_of`.

    Raises:
        CheckpointError: If lora_fx did not write the note.
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
    """Return the FQNs of the parameters in ``target_parameters``, by module.

    They are in the order of PEFT's wrappers.
    """
    names: dict[str, list[str]] = {}
    for owner, module in base_modules(model) if config.target_parameters else ():
        for name, value in module._parameters.items():
            weight = join(owner, name)
            if value is not None and parameter_entry(weight, config) is not None:
                names.setdefault(owner, []).append(weight)
    return names


def stored_targets(
    model: nn.Module, config: LoraConfig, keys: Iterable[str], parts: Parts
) -> list[Target]:
    """Return the modules and parameters that a folder has factors for, in the order of the keys.

    Args:
        model: The model, rewritten or not.
        config: The configuration of the folder.
        keys: Keys without PEFT's prefix.
        parts: The joined sites.
    """
    modules = dict(base_modules(model, every_name=True))
    parameters = wrapped_parameters(model, config)
    targets: dict[str, Target] = {}
    kind = chosen_kind(config)
    # A kind without factors is recognized by its slots.
    ends = _FACTORS if kind.low_rank else "|".join(map(re.escape, kind.keys))
    pattern = re.compile(rf"(?:(?P<holder>.+)\.)?(?:{ends})")
    for key in keys:
        match = pattern.fullmatch(key)
        if match is not None:
            for target in _targets(match["holder"] or "", modules, parameters, config, parts):
                targets[target.name] = target
    return list(targets.values())


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
    if name != holder and not parameter:
        name = attention_around(holder) or name
    if name in parts:
        yield from (Target(site, *numbers) for site, numbers in parts[name].items())
        return
    name = name or "weight"
    within: tuple[str, ...] = ()
    if name in modules and is_attention(modules[name]):
        within = tuple(f"{name}.{projection}" for projection in _PROJECTIONS)
    yield Target(name, rank_for(name, config), alpha_for(name, config), parameter, within)


def attention_around(holder: str) -> str:
    """Return the attention layer whose rank and alpha apply to these factors, or an empty string.

    PEFT adapts an ``nn.MultiheadAttention`` as a whole, and its ``out_proj`` is inside the wrapped layer.

    Args:
        holder: Name of the module that has the factors, as a folder spells it.
    """
    outer, _, leaf = _bare(holder).rpartition(".")
    return outer if leaf == "out_proj" and f"{outer}.{WRAPPER}." in f"{holder}." else ""


def _part_name(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of a site from the name of its holder.

    Holder ``w_0_8`` belongs to the part ``w.0_8`` of a parameter ``w``.
    """
    outer, _, leaf = name.rpartition(".")
    owner = modules.get(outer)
    parameters = () if owner is None else tuple(owner._parameters)
    cut = [prefix for prefix in parameters if leaf.startswith(f"{prefix}_")]
    if not cut or leaf in parameters:
        return name
    parameter = max(cut, key=len)
    return join(outer, f"{parameter}.{leaf[len(parameter) + 1 :]}")


def _bare(name: str) -> str:
    return ".".join(atom for atom in name.split(".") if atom != WRAPPER)
