"""Resizing and combining of adapter folders, without a model.

Both work on the factors of each layer as PEFT stores them. The products ``B A`` are never built: with
``B = Q R`` and ``Aᵀ = P S``, the singular values of ``B A`` are those of ``R Sᵀ``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_fx.adapter_files import read_tensors
from lora_fx.adapters import Combination, Target, Term, combine, with_patterns
from lora_fx.checkpoint import (
    PARTS_NOTE,
    PREFIX,
    StackedDown,
    StackedUp,
    attention_around,
    by_hand_in,
    check_free,
    check_start,
    note_of_by_hand,
    without_prefix,
    write_folder,
)
from lora_fx.config import LoraConfig, rank_for, saved_by, scale_for
from lora_fx.errors import CheckpointError, ConfigError, some
from lora_fx.extraction import RankChoice
from lora_fx.ir import Layout, json_text
from lora_fx.kinds import base_change, chosen_kind, is_plain
from lora_fx.methods import check_peft_type
from lora_fx.passes.lowrank import rank_of_energy

__all__ = ["ResizeReport", "ResizedLayer", "combine_folders", "resize_adapter"]

_log = logging.getLogger("lora_fx")

_KEY = re.compile(
    r"(?:(?P<name>.+)\.)?lora_(?:(?P<plain>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
# Tensors of a layer that mean the same for any rank, as long as the scale stays.
_OF_ANY_RANK = (".lora_magnitude_vector", ".lora_B.bias")


@dataclasses.dataclass(frozen=True, slots=True)
class ResizedLayer:
    """A layer of a resized adapter.

    Attributes:
        name: The name of the layer in the folder.
        old_rank, rank: The ranks before and after.
        error: ``‖BA - B'A'‖ / ‖BA‖``.
    """

    name: str
    old_rank: int
    rank: int
    error: float


@dataclasses.dataclass(frozen=True)
class ResizeReport:
    """The result of :func:`resize_adapter`. Print it for a line for each layer.

    Attributes:
        layers: The layers.
        kept: The share of ``‖BA‖²`` of all layers that is kept.
    """

    layers: tuple[ResizedLayer, ...]
    kept: float

    @property
    def summary(self) -> str:
        """The result in one line."""
        spans = (
            f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
            for ranks in (
                [layer.old_rank for layer in self.layers],
                [layer.rank for layer in self.layers],
            )
        )
        before, after = spans
        return (
            f"{len(self.layers)} layer(s), rank {before} before, {after} now, "
            f"{100 * self.kept:.3g} % of ‖BA‖² kept"
        )

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json_text(self)

    def __str__(self) -> str:
        lines = (
            f"  {layer.name}: rank {layer.rank} of {layer.old_rank}, error {layer.error:.3g} of the change"
            for layer in self.layers
        )
        return "\n".join([self.summary, *lines])


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The factors A and B of a layer, or of a stack of experts, in an adapter folder.

    Attributes:
        target: Name of the layer that PEFT looks up rank and alpha by. An attention layer has several pairs.
        keys: Keys of A and B in the file.
        a, b: A and B as they are stored.
        rank, scale: Rank and scale of each matrix.
        groups: Groups of a convolution.
        experts: Number of matrices of a stack of experts; 0 for a layer.
    """

    target: str
    keys: tuple[str, str]
    a: Tensor
    b: Tensor
    rank: int
    scale: float
    groups: int
    experts: int

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the factors in fp64, split by expert or group: n matrices A [r, in] and B [out, r]."""
        a, b = self.a.double(), self.b.double()
        if self.experts:
            return StackedDown(self.experts).decode(a), StackedUp(self.experts).decode(b)
        count = self.groups
        return (
            a.reshape(count, a.shape[0] // count, -1),
            b.reshape(count, b.shape[0] // count, -1),
        )

    def stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Convert factors, split as by :meth:`matrices`, to the shapes and dtypes of the file."""
        if self.experts:
            a, b = StackedDown(self.experts).encode(a), StackedUp(self.experts).encode(b)
        else:
            a = a.reshape(-1, *self.a.shape[1:])
            b = b.reshape(self.b.shape[0], -1, *self.b.shape[2:])
        return a.to(self.a.dtype).contiguous(), b.to(self.b.dtype).contiguous()


@dataclasses.dataclass(frozen=True)
class _Folder:
    """The contents of an adapter folder: factors by layer, other tensors by key, metadata."""

    path: Path
    config: LoraConfig
    pairs: Mapping[str, _Pair]
    kept: Mapping[str, Tensor]
    notes: Mapping[str, str]


def _write(
    out: Path,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    notes: Mapping[str, str],
    *,
    force: bool,
) -> None:
    values = {PREFIX + key: value.clone() for key, value in tensors.items()}
    write_folder(out, values, config, notes=notes, force=force)


def _read(folder: str | os.PathLike[str]) -> _Folder:
    """Read the factors and the configuration of a LoRA folder.

    Raises:
        CheckpointError: If the folder is damaged, or has no LoRA adapter.
        ConfigError: If its tensors do not tell the rank, if it trains other tensors whose meaning depends on
            the rank, or if its initialization changes the base.
    """
    path = Path(folder)
    check_peft_type(path)
    config = LoraConfig.from_pretrained(path)
    if not is_plain(config) and not config.use_dora and not config.lora_bias:
        kind = chosen_kind(config)
        raise ConfigError(
            f"{path}: {kind.setting or kind.name} trains more than A and B, whose meaning depends on the rank"
        )
    _check_base(path, config)
    read, metadata = read_tensors(path)
    tensors = without_prefix(read)
    # Leave out the note about parts of a weight, because their ranks change. Loading then adapts the whole
    # weight.
    notes = {key: text for key, text in metadata.items() if key not in ("format", PARTS_NOTE)}
    factors: dict[str, dict[str, str]] = {}
    kept = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            role = match["plain"] or match["embedding"]
            factors.setdefault(match["name"] or "", {})[role] = key
        elif ".lora_" in key and not key.endswith(_OF_ANY_RANK):
            raise ConfigError(f"{path}: the meaning of {key} may depend on the rank")
        else:
            kept[key] = value
    if not factors:
        raise CheckpointError(f"{path} holds no LoRA factor")
    pairs = {}
    for name, keys in factors.items():
        if len(keys) < 2:
            raise CheckpointError(
                f"{path}: {next(iter(keys.values()))} has no other factor: the file was cut short"
            )
        pairs[name] = _pair(path, name, (keys["A"], keys["B"]), tensors, config)
    return _Folder(path, config, pairs, kept, notes)


def _check_base(path: Path, config: LoraConfig) -> None:
    """Raise if loading the adapter of a folder changes the base, as with PiSSA.

    This change depends on the rank, so such an adapter cannot get another rank.

    Raises:
        CheckpointError: If the change is computed from data.
        ConfigError: If the change is computed from the weights.
    """
    setting = base_change(config)
    if not setting:
        return
    check_start(config, path)
    remedy = (
        "lora_fx.extract_adapter(base, lora_fx.merge(lora_fx.load_adapter(base, folder)), rank=...)"
        if config.init_lora_weights == "loftq"
        else "lora_fx.save_adapter(lora_fx.load_adapter(base, folder), other_folder)"
    )
    raise ConfigError(
        f"{path}: {setting} changes the base, and another rank changes it in another way: make an adapter of "
        f"the unchanged base first, with {remedy}"
    )


def _pair(
    path: Path,
    name: str,
    keys: tuple[str, str],
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
) -> _Pair:
    a, b = (tensors[key] for key in keys)
    for key, value in zip(keys, (a, b), strict=True):
        if value.dim() < 2 or not value.is_floating_point() or not torch.isfinite(value).all():
            raise CheckpointError(
                f"{path}: {key} is {value.dtype} {list(value.shape)}, and a factor has finite floating-point "
                "numbers: the file is damaged"
            )
    target = attention_around(name) or name
    rank = rank_for(target, config)
    experts = 0
    if config.target_parameters and a.dim() == 2 and a.shape[0] != rank:
        if config.rank_pattern or config.alpha_pattern:
            raise ConfigError(
                f"{path}: {name} may be a stack of experts, and its rank is in a pattern by the name of a "
                "parameter, which the tensors do not tell: load it onto its model, and use "
                "lora_fx.add_weighted_adapter"
            )
        experts = a.shape[0] // rank
    size = rank * max(experts, 1)
    groups = rank // b.shape[1] if not experts and b.shape[1] and rank % b.shape[1] == 0 else 1
    if a.shape[0] != size or b.shape[1] * groups != size or b.shape[0] % groups:
        raise CheckpointError(
            f"{path}: {keys[0]} is {list(a.shape)} and {keys[1]} {list(b.shape)}, and the rank in "
            f"adapter_config.json is {rank}: the file is damaged"
        )
    return _Pair(target, keys, a, b, rank, scale_for(target, config), groups, experts)


# --- another rank ---------------------------------------------------------------------------------


def resize_adapter(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
) -> ResizeReport:
    """Write an adapter with the closest product of a smaller rank at each layer.

    The scale of each layer stays, and so do magnitudes (DoRA), biases and modules that are stored in full.
    The rank of a convolution is a multiple of its groups, and at least their number. Projections of an
    ``nn.MultiheadAttention`` have one rank. No model is needed.

    Args:
        folder: The adapter folder.
        out: The folder to write.
        rank: The rank of all layers; by default 16. A layer with a smaller rank keeps its factors.
        energy: Instead of ``rank``: each layer gets the smallest rank that keeps this share of ``‖BA‖²``.
        force: True to replace an adapter in ``out``.

    Raises:
        CheckpointError: If the folder is damaged or no LoRA adapter, or ``out`` has an adapter and ``force``
            is False.
        ConfigError: If a choice makes no sense, or the adapter trains tensors whose meaning depends on the
            rank, or its start changes the base (PiSSA, OLoRA, LoftQ).
    """
    choice = RankChoice.of(rank, energy)
    target = Path(out)
    if target.resolve() == Path(folder).resolve():
        raise ConfigError(f"{out} is the adapter that is resized: give another folder")
    check_free(target, force=force)
    source = _read(folder)
    tensors = dict(source.kept)
    layers, targets, total, lost = [], [], 0.0, 0.0
    for members in _by_target(source.pairs).values():
        closest = {name: _closest(pair) for name, pair in members.items()}
        unit = max(_rank(choice, pair, closest[name][1]) for name, pair in members.items())
        for name, pair in members.items():
            (a, b), squares = closest[name]
            before, missing = float(squares.sum()), float(squares[unit:].sum())
            new_rank = unit * pair.groups
            if new_rank < pair.rank:
                tensors |= zip(pair.keys, pair.stored(a[:, :unit], b[:, :, :unit]), strict=True)
            else:
                new_rank, missing = pair.rank, 0.0
                tensors |= zip(pair.keys, (pair.a, pair.b), strict=True)
            total, lost = total + before, lost + missing
            error = math.sqrt(missing / before) if before else 0.0
            layers.append(ResizedLayer(name, pair.rank, new_rank, error))
            targets.append(Target(pair.target, new_rank, pair.scale * new_rank))
    if source.config.target_parameters and len({layer.rank for layer in layers}) > 1:
        raise ConfigError(
            f"{source.path}: layers would have different ranks, and it adapts parameters, whose patterns "
            "need their names: give a rank that all layers have"
        )
    config = with_patterns(dataclasses.replace(source.config, use_rslora=False), targets)
    _write(target, tensors, config, source.notes, force=force)
    return ResizeReport(tuple(layers), 1 - lost / total if total else 1.0)


def _by_target(pairs: Mapping[str, _Pair]) -> dict[str, dict[str, _Pair]]:
    """Return the pairs of each target, by name. Pairs of one target have one rank and one scale."""
    by_target: dict[str, dict[str, _Pair]] = defaultdict(dict)
    for name, pair in pairs.items():
        by_target[pair.target][name] = pair
    return by_target


def _closest(pair: _Pair) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return factors from the SVD of a layer, largest singular value first, and the squared values.

    Cutting off the end of the factors gives the closest product of a lower rank. Each factor is scaled by the
    roots of the singular values of ``BA``. The squares are those of ``s·BA``, summed over all matrices.
    """
    a, b = pair.matrices()
    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.mT)
    u, values, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
    roots = values.sqrt()
    factors = roots[..., None] * (vh @ p.mT), (q @ u) * roots[:, None]
    return factors, (values * pair.scale).square().sum(0)


def _rank(choice: RankChoice, pair: _Pair, squares: Tensor) -> int:
    """Return the new rank of each matrix of a layer, from its squared singular values."""
    if choice.energy is not None:
        return min(rank_of_energy(squares, choice.energy), len(squares))
    assert choice.rank is not None
    return min(max(choice.rank // pair.groups, 1), len(squares))


# --- sums -----------------------------------------------------------------------------------------


def combine_folders(
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    out: str | os.PathLike[str],
    how: Combination,
    *,
    force: bool = False,
) -> int:
    """Write the weighted combination of adapters, as :func:`lora_fx.add_weighted_adapter` computes it.

    No model is needed. A layer that only some adapters have is combined from these adapters. A tensor that an
    adapter stores in full is copied: no weight applies to it, and a warning says so.

    Args:
        folders: The adapter folders.
        weights: A weight for each.
        out: The folder to write.
        how: The method.
        force: True to replace an adapter in ``out``.

    Returns:
        The number of combined layers.

    Raises:
        CheckpointError: If a folder is damaged or no LoRA adapter, or ``out`` has an adapter and ``force`` is
            False.
        ConfigError: If there is not a weight for each folder, the adapters have no sum, or the start of one
            changes the base (PiSSA, OLoRA, LoftQ).
    """
    target = Path(out)
    if len(folders) != len(weights):
        raise ConfigError(
            f"weights: found {len(weights)} for {len(folders)} adapter(s); give each a weight"
        )
    if target.resolve() in [Path(folder).resolve() for folder in folders]:
        raise ConfigError(f"{out} is one of the adapters that are combined: give another folder")
    check_free(target, force=force)
    sources = [_read(folder) for folder in folders]
    _check_sum(sources)
    how = how.among(len(sources))
    tensors = _in_full(sources)
    _warn_of_copies(sources, weights)
    targets = []
    layout: Layout = "in_out" if sources[0].config.fan_in_fan_out else "out_in"
    largest = max(pair.rank for source in sources for pair in source.pairs.values())
    names = dict.fromkeys(name for source in sources for name in source.pairs)
    for name in names:
        parts = [
            (source.pairs[name], weight)
            for source, weight in zip(sources, weights, strict=True)
            if name in source.pairs
        ]
        first = parts[0][0]
        rule = how
        if how.by_product and how.svd_rank is None and largest % first.groups == 0:
            rule = dataclasses.replace(how, svd_rank=largest)
        a, b = combine(
            [_term(pair, weight) for pair, weight in parts],
            rule,
            groups=first.groups,
            experts=bool(first.experts),
            layout=layout,
            where=name,
        )
        rank = a.shape[1] if first.experts else a.shape[0]
        targets.append(Target(first.target, rank, float(rank)))
        tensors |= zip(first.keys, first.stored(a, b), strict=True)
    selected = dict.fromkeys(target.name for target in targets)
    config = with_patterns(_selecting(sources, selected), targets)
    _write(target, tensors, config, _notes(sources), force=force)
    return len(names)


def _term(pair: _Pair, weight: float) -> Term:
    if pair.experts:
        return Term(*pair.matrices(), pair.scale, float(weight))
    return Term(pair.a.double(), pair.b.double(), pair.scale, float(weight))


def _check_sum(sources: Sequence[_Folder]) -> None:
    """Raise if the adapters cannot be added, or are for different models."""
    for source in sources:
        config = source.config
        if not is_plain(config) or config.trainable_token_indices:
            name = "trainable_token_indices" if is_plain(config) else chosen_kind(config).field
            raise ConfigError(f"{source.path}: of {name} there is no weighted sum")
        if config.bias != "none":
            raise ConfigError(
                f"{source.path}: it trains biases of the base (bias={config.bias!r}), and there is no sum of "
                "these"
            )
    bases = {source.config.base_model_name_or_path for source in sources} - {None}
    if len(bases) > 1:
        _log.warning(
            "the adapters name different base models: %s. Their sum makes sense only for equal ones",
            ", ".join(sorted(map(str, bases))),
        )
    experts = {
        (name, pair.experts, pair.groups)
        for source in sources
        for name, pair in source.pairs.items()
    }
    names = [name for name, _, _ in experts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the adapters are for different models: {some(twice)} differ")


def _in_full(sources: Iterable[_Folder]) -> dict[str, Tensor]:
    """Return the tensors that adapters store in full, by key. Raise if the values for a key differ."""
    tensors: dict[str, Tensor] = {}
    for source in sources:
        for key, value in source.kept.items():
            if key in tensors and not torch.equal(tensors[key], value):
                raise ConfigError(
                    f"several adapters have {key} in full (modules_to_save): there is no sum of "
                    "these; combine adapters of which one at most does"
                )
            tensors[key] = value
    return tensors


def _warn_of_copies(sources: Sequence[_Folder], weights: Sequence[float]) -> None:
    """Log a warning about modules that are stored in full by an adapter whose weight is not 1."""
    for source, weight in zip(sources, weights, strict=True):
        saved = [key for key in source.kept if saved_by(key.rpartition(".")[0], source.config)]
        if saved and weight != 1:
            _log.warning(
                "%s has %s in full (modules_to_save), which is copied as it is: the weight %s does not apply "
                "to it, because that takes the values of the base",
                source.path,
                some(saved),
                weight,
            )


def _notes(sources: Sequence[_Folder]) -> dict[str, str]:
    """Return the metadata of a combination: each entry from the first adapter that has it."""
    notes: dict[str, str] = {}
    for source in sources:
        notes = {**source.notes, **notes}
    by_hand = {name for source in sources for name in by_hand_in(source.notes)}
    return notes | note_of_by_hand(by_hand)


def _selecting(sources: Sequence[_Folder], names: Iterable[str]) -> LoraConfig:
    """Return the configuration of a combination: the first adapter's, for the layers of all adapters."""
    first = sources[0].config
    saved = dict.fromkeys(name for s in sources for name in s.config.modules_to_save or ())
    config = dataclasses.replace(
        first,
        use_rslora=False,
        modules_to_save=tuple(saved) or None,
        rank_pattern={},
        alpha_pattern={},
    )
    for name in names:
        if (entry := saved_by(name, config)) is not None:
            raise ConfigError(
                f"{name}: an adapter has LoRA there, and another one has {entry} in full (modules_to_save): "
                "there is no sum of these; train both in the same way"
            )
    fields = (
        *("target_modules", "target_parameters", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "scope"),
    )
    if len({tuple(getattr(s.config, field) for field in fields) for s in sources}) == 1:
        return config
    if any(s.config.target_parameters for s in sources):
        raise ConfigError(
            "the adapters adapt different parameters (target_parameters): load them onto their model, and "
            "use lora_fx.add_weighted_adapter"
        )
    return dataclasses.replace(
        config,
        target_modules="|".join(f"({re.escape(name)})" for name in names),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        scope=None,
    )
