"""Migration of adapters to a model with other names: the same changes of weights under new names.

Modules get new names, experts become stacks, and projections are fused or split. The product of A and B
stays the same. So each adapted matrix of the folder is looked up in the model in three ways:

1. under its own name;
2. under the name that transformers gives to it when it loads a checkpoint, with the exact parts of parameters
   that it becomes (:mod:`lora_fx.checkpoint.matrices`);
3. by its words, numbers and shape (:mod:`lora_fx.checkpoint.matching`). With the model that the adapter was
   made for, also by the order of execution.

The factors are then put together for the parameters that hold the matrices. If several matrices are in one
parameter, each gets a part of its rank, and B is block-diagonal: ``[B1 0; 0 B2] [A1; A2]``. If they share A,
the rank stays the same.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from lora_fx.adapters import WRAPPER, Target, is_attention, with_targets
from lora_fx.checkpoint.joined import stored_targets
from lora_fx.checkpoint.keys import StackedDown, StackedUp
from lora_fx.checkpoint.matching import Named, match_names
from lora_fx.checkpoint.matrices import Block, Matrices, Matrix
from lora_fx.config import LoraConfig, alpha_for, parameter_entry, rank_for, saved_entries, scale_of
from lora_fx.errors import CheckpointError, LoraFxError, some
from lora_fx.ir import Site, folded, join, record_of, text_table
from lora_fx.passes.capture import capture
from lora_fx.passes.graph import is_conv1d
from lora_fx.passes.pipeline import find_operations

__all__ = ["Migration", "Move", "move_adapter"]

_log = logging.getLogger("lora_fx")

_Reason = Literal["same name", "transformers", "names and shapes", "order of execution"]

_LEAF: Final = re.compile(
    r"(?:(?P<holder>.+)\.)?(?P<leaf>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]"
    r"|lora_magnitude_vector(?:\.weight)?|token_adapter\.trainable_tokens_delta)"
)
_KINDS: Final = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ARROW: Final = ".->."  # with dots, because ``folded`` only folds numbers next to a dot
_PAIR: Final = ("lora_A.weight", "lora_B.weight")


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """The new name and form of a matrix, or of another tensor, in a folder.

    Attributes:
        old: Its name in the folder.
        new: The parameter of the model, with the index of an expert in a stack in brackets.
        change: "unchanged", "renamed", "moved into a stack", "fused", "taken apart", or several of them.
        reason: "same name"; "transformers" for its conversion of checkpoints; "names and shapes"; or "order
            of execution".
        confidence: 1 for a rule that is exact. For names and shapes, the share of words in common.
        part: The rows or columns of the new parameter; empty for all.
    """

    old: str
    new: str
    change: str
    reason: _Reason
    confidence: float = 1.0
    part: str = ""


@dataclasses.dataclass(frozen=True)
class Migration:
    """The plan of a migration: an adapter under the names of another model, or the problems.

    Attributes:
        moves: A row for each matrix and each other tensor of the folder.
        problems: Names that are ambiguous, or that nothing in the model fits. If there are any, nothing is
            loaded.
        tensors: The tensors by PEFT's keys for the new model, without the prefix; empty with problems.
        config: The configuration for these tensors.
        model: The class of the model.
    """

    moves: tuple[Move, ...]
    problems: tuple[str, ...]
    tensors: Mapping[str, Tensor] = dataclasses.field(repr=False)
    config: LoraConfig = dataclasses.field(repr=False)
    model: str

    @property
    def changed(self) -> int:
        """The number of matrices and tensors that get another name or form."""
        return sum(move.change != "unchanged" for move in self.moves)

    @property
    def confidence(self) -> float:
        """The lowest confidence of a move; 1 if all are exact."""
        return min((move.confidence for move in self.moves), default=1.0)

    def check(self) -> None:
        """Raise if there are problems.

        Raises:
            CheckpointError: If there are problems. The message names all of them.
        """
        if self.problems:
            raise CheckpointError(
                "\n  ".join(
                    [
                        f"the adapter cannot be moved to this {self.model}; nothing was changed:",
                        *self.problems,
                    ]
                )
            )

    def __str__(self) -> str:
        shown = [move for move in self.moves if move.change != "unchanged"]
        rows = folded(
            (
                f"{move.old}{_ARROW}{move.new}".replace("[", ".").replace("]", ""),
                move.part,
                move.change,
                move.reason if move.confidence == 1.0 else f"{move.reason}, {move.confidence:.0%}",
            )
            for move in shown
        )
        cells = [(row.name.replace(_ARROW, " -> "), row.times, *row.cells) for row in rows]
        lines = text_table(("matrix", "", "part", "change", "by"), cells, 5) if cells else []
        same = len(self.moves) - len(shown)
        lines += [f"{same} of {len(self.moves)} keep their name and form"]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def move_adapter(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    *,
    source: nn.Module | None = None,
    example_inputs: Any = None,
    written: Mapping[str, Any] | None = None,
) -> Migration:
    """Find the matrices of an adapter in a model with other names.

    Args:
        model: The model to load the adapter on; it is not changed, and may be on the meta device.
        tensors: The tensors of the folder, without PEFT's prefix.
        config: The configuration of the folder.
        source: The model that the adapter was trained on, if there is one. It may be on the meta device. It
            tells the parts of fused matrices, and the order of execution.
        example_inputs: Inputs of ``model``, if its graphs are needed and it is captured by calling it.
        written: All entries of ``adapter_config.json``, which tell the version of PEFT.
    """
    return _Migrator(model, tensors, config, source, example_inputs, written or {}).run()


@dataclasses.dataclass(eq=False)
class _Adapter:
    """A module or a parameter of the folder with its tensors.

    Attributes:
        weight: FQN of the adapted weight in the old model.
        name: The name of the module or parameter in the configuration.
        values: The tensors, by the last part of the key, such as ``lora_A.weight``.
        keys: The whole keys, by the same part.
    """

    weight: str
    name: str
    values: dict[str, Tensor]
    keys: dict[str, str]

    @property
    def kind(self) -> str:
        if "token_adapter.trainable_tokens_delta" in self.values:
            return "embedding" if self.values.keys() & {"lora_embedding_A"} else ""
        return "embedding" if "lora_embedding_A" in self.values else "linear"

    @property
    def has_factors(self) -> bool:
        return {*_PAIR} <= self.values.keys() or "lora_embedding_B" in self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as PEFT reads it, [out, in, ...], or of one matrix of a stack."""
        if not self.has_factors:
            return tuple(next(iter(self.values.values())).shape)
        if "lora_embedding_A" in self.values:
            a, b = self.values["lora_embedding_A"], self.values["lora_embedding_B"]
            return a.shape[1], b.shape[0]
        a, b = (self.values[leaf] for leaf in _PAIR)
        return b.shape[0], *a.shape[1:]


@dataclasses.dataclass(eq=False)
class _Item:
    """One matrix of the folder: a whole adapter, or one expert, or a part of it.

    Attributes:
        adapter: The adapter.
        name: Name of the matrix.
        expert: Index of the expert, if the adapter is for a stack of experts.
        shape: The shape of the matrix, as it is stored.
        pick: A function that returns the factors of the matrix, [rows, r] and [r, columns].
        whole: True if the adapter consists of this matrix alone.
    """

    adapter: _Adapter
    name: str
    expert: int | None
    shape: tuple[int, ...]
    pick: Callable[[], tuple[Tensor, Tensor]]
    whole: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """The change that an old matrix makes to one block of a parameter of the new model.

    The block changes by ``scale * left @ right``.

    Attributes:
        block: The rows and columns of the parameter, or the expert of a stack.
        left, right: The factors, [rows, r] and [r, columns].
        scale: The scale of the old adapter.
        old: Name of the old matrix.
    """

    block: Block
    left: Tensor
    right: Tensor
    scale: float
    old: str


class _Migrator:
    """A migration while it runs: the moves of matrices so far, and the problems."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        config: LoraConfig,
        source: nn.Module | None,
        example_inputs: Any,
        written: Mapping[str, Any],
    ) -> None:
        self.model, self.config, self.tensors, self.written = model, config, tensors, written
        self.matrices = Matrices(model)
        self.source = None if source is None else Matrices(source)
        self.example_inputs = example_inputs
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.state = {**self.matrices.parameters, **_buffers(model)}
        self.moves: list[Move] = []
        self.problems: list[str] = []
        self.kept: dict[str, Tensor] = {}
        self.kept_weights: dict[str, str] = {}
        self.wholes: dict[str, _Adapter] = {}
        self.parts: dict[str, list[_Part]] = defaultdict(list)
        self.raw: dict[str, tuple[str, Tensor]] = {}
        self.claimed: set[str] = set()

    def run(self) -> Migration:
        """Look up every tensor, and put the result together."""
        adapters, raw = self._parsed()
        open_items: list[_Item] = []
        for adapter in adapters:
            if self._fits(adapter):
                self._keep(adapter)
            else:
                open_items += self._move_by_rules(adapter)
        open_raw = {
            name: value
            for name, value in raw.items()
            if not self._move_tensor_by_rules(name, value)
        }
        if open_items or open_raw:
            self._search(open_items, open_raw)
        tensors, config = ({}, self.config) if self.problems else self._written()
        if self.problems:
            tensors = {}
        return Migration(
            tuple(self.moves), tuple(self.problems), tensors, config, type(self.model).__name__
        )

    # --- the folder -------------------------------------------------------------------------------

    def _parsed(self) -> tuple[list[_Adapter], dict[str, Tensor]]:
        """Return the adapters of the folder, and its other tensors by their names."""
        holders: dict[str, dict[str, str]] = defaultdict(dict)
        raw: dict[str, Tensor] = {}
        for key, value in self.tensors.items():
            match = _LEAF.fullmatch(key)
            if match is None:
                raw[key] = value
            else:
                holders[match["holder"] or ""][match["leaf"].removesuffix(".weight")] = key
        adapters = []
        wrapped: dict[str, list[str]] = defaultdict(list)
        for holder in holders:
            wrapped[_bare(holder)].append(holder)
        for module, layers in wrapped.items():
            names = self._wrapped(module, len(layers))
            # The innermost wrapper has the most base layers in its name.
            for holder, name in zip(sorted(layers, key=len, reverse=True), names, strict=True):
                keys = {_full(leaf): key for leaf, key in holders[holder].items()}
                values = {leaf: self.tensors[key] for leaf, key in keys.items()}
                weight = join(module, name or "weight")
                adapters.append(_Adapter(weight, weight if name else module, values, keys))
        return adapters, raw

    def _wrapped(self, module: str, count: int) -> list[str]:
        """Return the adapted parameters of a module, in the order of PEFT's wrappers, the innermost first.

        The module's own weight is an empty string.
        """
        entries = self.config.target_parameters or ()
        leaves = []
        for entry in entries:
            owner, _, leaf = entry.rpartition(".")
            if not owner or f".{module}".endswith(f".{owner}"):
                leaves.append(leaf)
        named = [leaf for leaf in leaves if parameter_entry(join(module, leaf), self.config)]
        if not named:
            return [""] * count
        order = self._registered(module, named)
        return order[:count] if len(order) >= count else ["", *order][:count]

    def _registered(self, module: str, leaves: Sequence[str]) -> list[str]:
        """Return names of parameters in the order in which their module registers them."""
        for matrices in (self.source, self.matrices):
            if matrices is None:
                continue
            renamed = matrices.renamed(join(module, leaves[0])).rpartition(".")[0]
            for owner in (module, renamed):
                known = [
                    name.rpartition(".")[2]
                    for name in matrices.parameters
                    if name.rpartition(".")[0] == owner
                ]
                if set(leaves) <= set(known):
                    return sorted(leaves, key=known.index)
        return list(leaves)

    def _experts(self, adapter: _Adapter) -> int | None:
        """Return the number of experts of an adapted stack, or None for a matrix."""
        if adapter.name != adapter.weight or not {*_PAIR} <= adapter.values.keys():
            return None
        rank = rank_for(adapter.name, self.config)
        count, remainder = divmod(len(adapter.values[_PAIR[0]]), rank)
        return count if count > 1 and not remainder else None

    # --- exact rules ------------------------------------------------------------------------------

    def _fits(self, adapter: _Adapter) -> bool:
        """Return True if the model has the adapted weight under the same name, in the same form."""
        if adapter.weight not in self.state:
            module = self.modules.get(adapter.weight.removesuffix(".weight"))
            return adapter.name != adapter.weight and module is not None and is_attention(module)
        return self._fits_parameter(adapter, adapter.weight) and not self._is_swapped(
            adapter, adapter.weight
        )

    def _fits_parameter(self, adapter: _Adapter, parameter: str) -> bool:
        """Return True if the shape and the kind of an adapter fit a whole parameter of the model."""
        shape = self.state[parameter]
        if not adapter.has_factors:
            return True
        if len(shape) == 3 and adapter.name == adapter.weight:
            experts = self._experts(adapter)
            return experts == shape[0] and sorted(adapter.shape) == sorted(shape[1:])
        if len(shape) == 2 and adapter.kind == "linear" and self._is_in_out(parameter):
            shape = shape[::-1]
        own = adapter.shape
        if len(shape) > 2:
            # The channels of a grouped convolution are those of all groups.
            return own[0] == shape[0] and own[2:] == shape[2:] and own[1] % shape[1] == 0
        return own == shape

    def _is_swapped(self, adapter: _Adapter, parameter: str) -> bool:
        """Return True if A and B of a stack are swapped, compared with PEFT 0.20 and later.

        PEFT before 0.19 read every stack as [E, in, out]. PEFT 0.19 did so only if the module does not
        declare it (``is_transposed``). If the shapes do not tell, the version of PEFT does.
        """
        shape = self.state[parameter]
        if len(shape) != 3 or not adapter.has_factors:
            return False
        turned = self.matrices.orientation(parameter)
        straight = shape[:0:-1] if turned else shape[1:]
        if straight[0] != straight[1]:
            return adapter.shape != straight
        return self._peft_swaps(turned)

    def _peft_swaps(self, turned: bool) -> bool:
        """Return True if the PEFT that wrote the folder swaps A and B of stacks.

        ``turned`` is True for stacks [E, in, out].
        """
        version = self.written.get("peft_version")
        if isinstance(version, str) and (match := re.match(r"0\.(\d+)", version)):
            minor = int(match[1])
            return minor == 19 if turned else minor <= 19
        # Early PEFT wrote no version. lora_fx writes none either, but it writes all fields of PEFT 0.21.
        return bool(self.written) and "lora_ga_config" not in self.written and not turned

    def _is_in_out(self, parameter: str) -> bool:
        return self.matrices.orientation(parameter)

    def _keep(self, adapter: _Adapter) -> None:
        self.kept |= {key: adapter.values[leaf] for leaf, key in adapter.keys.items()}
        if adapter.name == adapter.weight:
            self.kept_weights |= dict.fromkeys(adapter.keys.values(), adapter.weight)
        self.claimed.add(adapter.weight)
        self.moves.append(Move(adapter.name, adapter.name, "unchanged", "same name"))

    def _move_by_rules(self, adapter: _Adapter) -> list[_Item]:
        """Move an adapter to the parameter of the same name, or by the conversions of transformers.

        Returns:
            The matrices of the adapter that these rules do not move.
        """
        if adapter.weight in self.state and self._fits_parameter(adapter, adapter.weight):
            self._move_whole(adapter, adapter.weight, "same name", 1.0)
            return []
        renamed = self.matrices.renamed(adapter.weight)
        if renamed in self.state and self._fits_parameter(adapter, renamed):
            self._move_whole(adapter, renamed, "transformers", 1.0)
            return []
        items = list(self._items(adapter))
        open_items = []
        for item in items:
            matrix = self.matrices.at(renamed, item.expert)
            if matrix is not None and matrix.blocks and self._stored_like(item, matrix):
                self._move_part(item, matrix, "transformers", 1.0)
            else:
                open_items.append(item)
        return open_items

    def _stored_like(self, item: _Item, matrix: Matrix) -> bool:
        return item.shape in (matrix.shape, matrix.shape[::-1])

    def _items(self, adapter: _Adapter) -> Iterator[_Item]:
        """Yield the matrices of an adapter: one for each expert, and with ``source`` one for each part."""
        if not {*_PAIR} <= adapter.values.keys():
            yield _Item(adapter, adapter.weight, None, adapter.shape, _no_factors, True)
            return
        experts = self._experts(adapter)
        a, b = (adapter.values[leaf] for leaf in _PAIR)
        if experts is None:
            factors = functools.partial(_pair, b, a)
            yield from self._divided(
                _Item(adapter, adapter.weight, None, adapter.shape, factors, True)
            )
            return
        down, up = StackedDown(experts).decode(a), StackedUp(experts).decode(b)
        for expert in range(experts):
            factors = functools.partial(_pair, up[expert], down[expert])
            yield from self._divided(
                _Item(adapter, adapter.weight, expert, adapter.shape, factors, False)
            )

    def _divided(self, item: _Item) -> Iterator[_Item]:
        """Yield the parts of a fused matrix for which the old model has names; else the matrix itself."""
        matrices = self.source
        weight = item.adapter.weight
        if matrices is None or weight not in matrices.parameters or len(item.shape) != 2:
            yield item
            return
        inner = [
            (matrix, [block for block in matrix.blocks if block.expert == item.expert])
            for matrix in matrices.inside(weight, self._source_sites)
        ]
        parts = [
            (matrix, blocks) for matrix, blocks in inner if len(blocks) == len(matrix.blocks) == 1
        ]
        if sum(math.prod(matrix.shape) for matrix, _ in parts) != math.prod(item.shape):
            yield item
            return
        turned = matrices.orientation(weight)
        for matrix, (block,) in parts:
            yield _Item(
                item.adapter,
                matrix.name,
                None,
                matrix.shape,
                functools.partial(_factors_of_block, item.pick, block, turned),
                False,
            )

    def _move_tensor_by_rules(self, name: str, value: Tensor) -> bool:
        """Move a tensor that is not a factor, if the model has its name or the name from transformers.

        Returns:
            True if the tensor was moved.
        """
        bare = _bare(name)
        if bare in self.state:
            self.raw[name] = (name, value)
            self.moves.append(Move(name, name, "unchanged", "same name"))
            return True
        renamed = self.matrices.renamed(bare)
        if self.state.get(renamed) == tuple(value.shape):
            self.raw[name] = (renamed, value)
            self.moves.append(Move(name, renamed, "renamed", "transformers"))
            return True
        return False

    # --- names, shapes and the order of execution -------------------------------------------------

    def _search(self, items: list[_Item], raw: Mapping[str, Tensor]) -> None:
        """Match the matrices and tensors that no exact rule covers."""
        items = self._by_order(items)
        named = {self._searched(item): item for item in items}
        tensors = {self.matrices.renamed(_bare(name)): name for name in raw}
        wanted = [
            Named(name, item.shape, item.adapter.kind, turned=item.expert is not None)
            for name, item in named.items()
        ]
        wanted += [Named(name, tuple(raw[old].shape)) for name, old in tensors.items()]
        matrices = {matrix.name: matrix for matrix in self._free(())}
        matched = match_names(wanted, self._named(matrices.values()))
        if matched.problems and any(len(item.shape) == 2 for item in items):
            sites = self._sites
            if any(site.parts for site in sites):
                matrices = {matrix.name: matrix for matrix in self._free(sites)}
                matched = match_names(wanted, self._named(matrices.values()))
        for name, (new, score) in matched.names.items():
            matrix = matrices[new]
            if name in named:
                self._move(named[name], matrix, "names and shapes", score)
            elif matrix.whole:
                self.raw[tensors[name]] = (matrix.whole, raw[tensors[name]])
                self.moves.append(
                    Move(tensors[name], matrix.whole, "renamed", "names and shapes", score)
                )
            else:
                self.problems.append(
                    f"{tensors[name]}: it is a part of {matrix.blocks[0].parameter} in the model, and the "
                    "folder has no other part of it"
                )
        olds = {**{name: item.adapter.name for name, item in named.items()}, **tensors}
        lines = defaultdict(list)
        for name, text in matched.problems.items():
            lines[text].append(olds[name])
        self.problems += [f"{some(sorted(set(names)), 3)}: {text}" for text, names in lines.items()]
        if matched.problems and self.source is None:
            self.problems.append(
                "source=the_old_model tells the parts of fused matrices, and the order of execution"
            )

    def _searched(self, item: _Item) -> str:
        name = self.matrices.renamed(item.name)
        if item.expert is None:
            return name
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.{item.expert}.{leaf}"

    def _free(self, sites: Iterable[Site]) -> Iterator[Matrix]:
        """Yield the matrices and buffers of the model to which nothing of the folder is moved yet."""
        for matrix in self.matrices.all(sites):
            parameters = {block.parameter for block in matrix.blocks} | {matrix.whole}
            taken = {matrix.name, *(f"{name}#" for name in parameters)} & self.claimed
            if not taken and not parameters & self.claimed:
                yield matrix
        for name, shape in _buffers(self.model).items():
            if name not in self.claimed:
                yield Matrix(name, shape, (), name)

    def _named(self, matrices: Iterable[Matrix]) -> Iterator[Named]:
        for matrix in matrices:
            owner = (matrix.whole or matrix.name).rpartition(".")[0]
            embedding = isinstance(self.modules.get(owner), nn.Embedding)
            yield Named(
                matrix.name, self._read_shape(matrix), "embedding" if embedding else "linear"
            )

    def _read_shape(self, matrix: Matrix) -> tuple[int, ...]:
        """Return the shape of a matrix as PEFT reads it, [out, in]."""
        turned = matrix.whole and len(matrix.shape) == 2 and self._is_in_out(matrix.whole)
        return matrix.shape[::-1] if turned else matrix.shape

    def _by_order(self, items: list[_Item]) -> list[_Item]:
        """Match matrices by the order of execution, if both models run equal operations.

        Returns:
            The matrices that are not matched.
        """
        if self.source is None:
            return items
        old = [site for site in self._source_sites if site.rows is None]
        new = [site for site in self._sites if site.rows is None]
        if [_form(site) for site in old] != [_form(site) for site in new]:
            return items
        pairs = {mine.weight: other.weight for mine, other in zip(old, new, strict=True)}
        left = []
        for item in items:
            target = pairs.get(item.name)
            if target is None or not item.whole or not self._fits_parameter(item.adapter, target):
                left.append(item)
            else:
                self._move_whole(item.adapter, target, "order of execution", 1.0)
        return left

    @functools.cached_property
    def _sites(self) -> tuple[Site, ...]:
        return _sites_of(self.model, self.example_inputs)

    @functools.cached_property
    def _source_sites(self) -> tuple[Site, ...]:
        assert self.source is not None
        return _sites_of(self.source.model, None)

    # --- moves ------------------------------------------------------------------------------------

    def _move(self, item: _Item, matrix: Matrix, reason: _Reason, score: float) -> None:
        if item.whole and matrix.whole:
            self._move_whole(item.adapter, matrix.whole, reason, score)
        elif matrix.blocks:
            self._move_part(item, matrix, reason, score)
        else:
            self.problems.append(f"{item.name}: {matrix.name} of the model is no matrix")

    def _move_whole(self, adapter: _Adapter, parameter: str, reason: _Reason, score: float) -> None:
        if parameter in self.wholes:
            self.problems.append(
                f"{adapter.name} and {self.wholes[parameter].name} are both {parameter} of the model"
            )
        change = "renamed" if adapter.weight != parameter else "unchanged"
        if self._is_swapped(adapter, parameter):
            adapter = _turn(adapter, self.state[parameter][0])
            change = "A and B swapped" if change == "unchanged" else f"{change}, A and B swapped"
        self.wholes[parameter] = adapter
        self.claimed.add(parameter)
        self.moves.append(
            Move(
                adapter.name.removesuffix(".weight"),
                parameter.removesuffix(".weight"),
                change,
                reason,
                score,
            )
        )

    def _move_part(self, item: _Item, matrix: Matrix, reason: _Reason, score: float) -> None:
        extra = sorted(item.adapter.values.keys() - {*_PAIR})
        if extra:
            self.problems.append(
                f"{item.adapter.name}: the model has it as part of {matrix.blocks[0].parameter}, and "
                f"{', '.join(extra)} cannot be put together with others: merge the adapter with the library "
                "that it was trained with"
            )
            return
        left, right = item.pick()
        straight = (left.shape[0], right.shape[1]) == matrix.shape
        if not straight or (matrix.shape[0] == matrix.shape[1] and self._is_turned(item)):
            left, right = right.T, left.T
        name = item.adapter.name
        scale = scale_of(rank_for(name, self.config), alpha_for(name, self.config), self.config)
        for block in matrix.blocks:
            own = left[block.rows], right[:, block.columns]
            if block.flipped:
                own = own[1].T, own[0].T
            self.parts[block.parameter].append(_Part(block, *own, scale, item.name))
            self.claimed.add(f"{block.parameter}#")
            self.moves.append(
                Move(
                    item.name.removesuffix(".weight") + _index(item.expert),
                    block.parameter.removesuffix(".weight") + _index(block.expert),
                    _change(item, block, self.state[block.parameter]),
                    reason,
                    score,
                    _part_of(block, self.state[block.parameter]),
                )
            )
        self.claimed.add(matrix.name)

    def _is_turned(self, item: _Item) -> bool:
        """Return True if the stored factors of a square matrix are those of its transpose."""
        if item.expert is not None:
            return self._peft_swaps(turned=False)
        return bool(self.config.fan_in_fan_out)

    # --- the result -------------------------------------------------------------------------------

    def _written(self) -> tuple[dict[str, Tensor], LoraConfig]:
        """Return the migrated adapter: its tensors by the names of the new model, and its configuration."""
        config = self._renamed_config()
        targets = stored_targets(self.model, config, self.kept, {})
        tensors: dict[str, Tensor] = {}
        moved: dict[str, dict[str, Tensor]] = {}
        for parameter, adapter in self.wholes.items():
            moved[parameter] = adapter.values
            targets.append(
                Target(
                    self._target(parameter),
                    rank_for(adapter.name, self.config),
                    alpha_for(adapter.name, self.config),
                    not self._as_module(parameter),
                )
            )
        for parameter, parts in self.parts.items():
            if parameter in moved:
                self.problems.append(
                    f"{parameter}: the folder has an adapter for all of it, and one for a part"
                )
                continue
            values, rank, scale = self._joined(parameter, parts)
            moved[parameter] = values
            alpha = scale * (math.sqrt(rank) if config.use_rslora else rank)
            targets.append(
                Target(self._target(parameter), rank, alpha, not self._as_module(parameter))
            )
        by_name = {target.name: target for target in targets}
        exact = with_targets(config, by_name.values(), self.model)
        stacked = {target.name for target in targets if target.parameter}
        for parameter, values in moved.items():
            prefix = self._prefix(parameter, stacked)
            tensors |= {join(prefix, leaf): value for leaf, value in values.items()}
        tensors |= self._kept_tensors(stacked)
        for old, (new, value) in self.raw.items():
            tensors[old if new in (old, _bare(old)) else new] = value
        return tensors, exact

    def _kept_tensors(self, stacked: set[str]) -> dict[str, Tensor]:
        """Return the tensors that keep their name.

        The number of ``base_layer`` in a key changes if more parameters of the module are adapted now.
        """
        tensors = {}
        for key, value in self.kept.items():
            match = _LEAF.fullmatch(key)
            assert match is not None
            owner = _bare(match["holder"] or "")
            names = [name for name in stacked if name.rpartition(".")[0] == owner]
            weight = self.kept_weights.get(key, "")
            if weight in stacked and len(names) > 1:
                key = join(self._prefix(weight, stacked), match["leaf"])
            tensors[key] = value
        return tensors

    def _as_module(self, parameter: str) -> bool:
        """Return True if PEFT adapts a weight by wrapping its module, and False for a bare parameter."""
        owner, _, leaf = parameter.rpartition(".")
        module = self.modules[owner]
        return leaf == "weight" and (isinstance(module, _KINDS) or is_conv1d(module))

    def _target(self, parameter: str) -> str:
        return parameter.rpartition(".")[0] if self._as_module(parameter) else parameter

    def _prefix(self, parameter: str, stacked: set[str]) -> str:
        """Return the beginning of the keys of a parameter's factors: its module, or PEFT's wrapper in it."""
        owner, _, _ = parameter.rpartition(".")
        if self._as_module(parameter):
            return owner
        wrapped = [
            name
            for name in self.matrices.parameters
            if name.rpartition(".")[0] == owner and name in stacked
        ]
        return join(owner, *[WRAPPER] * (len(wrapped) - 1 - wrapped.index(parameter)))

    def _joined(
        self, parameter: str, parts: Sequence[_Part]
    ) -> tuple[dict[str, Tensor], int, float]:
        """Return the two factors of a parameter from its parts, their rank, and the scale."""
        shape = self.state[parameter]
        scale = max((part.scale for part in parts), key=abs)
        turned = self.matrices.orientation(parameter)
        experts: dict[int | None, list[_Part]] = defaultdict(list)
        for part in parts:
            experts[part.block.expert].append(part)
        pairs: dict[int | None, tuple[Tensor, Tensor]] = {}
        for expert, own in experts.items():
            self.problems += _overlaps(parameter, own)
            pairs[expert] = _block_diagonal(own, shape[-2:], scale, turned)
        rank = max(len(a) for a, _ in pairs.values())
        padded = {
            expert: (
                nn.functional.pad(a, (0, 0, 0, rank - len(a))),
                nn.functional.pad(b, (0, rank - b.shape[1])),
            )
            for expert, (a, b) in pairs.items()
        }
        if None in padded:
            a, b = padded[None]
            return {_PAIR[0]: a.contiguous(), _PAIR[1]: b.contiguous()}, rank, scale
        empty = tuple(torch.zeros_like(factor) for factor in next(iter(padded.values())))
        ordered = [padded.get(expert, empty) for expert in range(shape[0])]
        down, up = (torch.stack(factors) for factors in zip(*ordered, strict=True))
        return (
            {
                _PAIR[0]: StackedDown(shape[0]).encode(down).contiguous(),
                _PAIR[1]: StackedUp(shape[0]).encode(up).contiguous(),
            },
            rank,
            scale,
        )

    def _renamed_config(self) -> LoraConfig:
        """Return the configuration with new names in ``modules_to_save`` and ``trainable_token_indices``."""
        config = self.config
        entries = saved_entries(config)
        owners: dict[str, str] = {}
        for old, (new, _) in self.raw.items():
            bare = _bare(old)
            if bare == new:
                continue
            for entry in entries:
                outer = _shortest_prefix_ending_in(bare, entry)
                if outer is not None:
                    tail = bare.removeprefix(outer)
                    owners[entry] = (
                        new.removesuffix(tail) if new.endswith(tail) else new.rpartition(".")[0]
                    )
        if owners:
            saved = tuple(owners.get(entry, entry) for entry in entries)
            config = dataclasses.replace(config, modules_to_save=tuple(dict.fromkeys(saved)))
        rows = config.trainable_token_indices
        if isinstance(rows, Mapping):
            matrices = {
                adapter.weight.rpartition(".")[0]: parameter.rpartition(".")[0]
                for parameter, adapter in self.wholes.items()
            }
            renamed = {
                next(
                    (new for old, new in matrices.items() if f".{old}".endswith(f".{name}")), name
                ): indices
                for name, indices in rows.items()
            }
            config = dataclasses.replace(config, trainable_token_indices=renamed)
        return config


def _turn(adapter: _Adapter, experts: int) -> _Adapter:
    """Return the adapter of a stack with A and B swapped and transposed."""
    a, b = (adapter.values[leaf] for leaf in _PAIR)
    down, up = StackedDown(experts), StackedUp(experts)
    values = {
        **adapter.values,
        _PAIR[0]: down.encode(up.decode(b).mT).contiguous(),
        _PAIR[1]: up.encode(down.decode(a).mT).contiguous(),
    }
    return dataclasses.replace(adapter, values=values)


def _bare(name: str) -> str:
    return ".".join(atom for atom in name.split(".") if atom != WRAPPER)


def _full(leaf: str) -> str:
    return f"{leaf}.weight" if leaf in ("lora_A", "lora_B") else leaf


def _shortest_prefix_ending_in(name: str, entry: str) -> str | None:
    """Return the shortest beginning of a tensor's name, in whole parts, that ends in ``entry``, or None."""
    atoms = name.split(".")
    for stop in range(1, len(atoms)):
        if ".".join(atoms[:stop]).endswith(entry):
            return ".".join(atoms[:stop])
    return None


def _buffers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_buffers()}


def _no_factors() -> tuple[Tensor, Tensor]:
    raise AssertionError("only factors are put together")


def _pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left, right


def _factors_of_block(
    pick: Callable[[], tuple[Tensor, Tensor]], block: Block, turned: bool
) -> tuple[Tensor, Tensor]:
    """Return the factors of one block, cut out of the factors of the old parameter.

    Args:
        pick: A function that returns the factors of the parameter.
        block: The part of the parameter.
        turned: True if PEFT reads the parameter as [in, out].
    """
    left, right = pick()
    if turned:
        left, right = right.T, left.T
    left, right = left[block.first], right[:, block.last]
    if block.flipped:
        left, right = right.T, left.T
    first, last = torch.empty_like(left), torch.empty_like(right)
    first[block.rows], last[:, block.columns] = left, right
    return first, last


def _form(site: Site) -> tuple[object, ...]:
    return site.family, site.in_features, site.out_features, site.experts, site.layout


def _sites_of(model: nn.Module, example_inputs: Any) -> tuple[Site, ...]:
    """Return the sites of a model in the order of execution; none if the model cannot be captured."""
    if record_of(model) is not None:
        return ()
    try:
        return find_operations(capture(model, example_inputs)).sites
    except LoraFxError as error:
        _log.warning("the parts of fused weights are not known: %s", error)
        return ()


def _index(expert: int | None) -> str:
    return "" if expert is None else f"[{expert}]"


def _part_of(block: Block, shape: Sequence[int]) -> str:
    rows, columns = _span(block.first, shape[-2]), _span(block.last, shape[-1])
    parts = [f"rows {rows}" if rows else "", f"columns {columns}" if columns else ""]
    return ", ".join(part for part in parts if part)


def _span(indices: Tensor, size: int) -> str:
    low, high = int(indices.min()), int(indices.max()) + 1
    steps = set(indices.diff().tolist())
    if steps <= {1}:
        return "" if high - low == size else f"{low}:{high}"
    return f"{low}:{high}:{steps.pop()}" if len(steps) == 1 else f"in {low}:{high}"


def _change(item: _Item, block: Block, shape: Sequence[int]) -> str:
    changes = []
    if item.expert is None and block.expert is not None:
        changes.append("moved into a stack")
    if item.expert is not None and block.expert is None:
        changes.append("taken out of a stack")
    rows, columns = len(block.rows), len(block.columns)
    if (rows, columns) != tuple(item.shape) and (columns, rows) != tuple(item.shape):
        changes.append("taken apart")
    if rows * columns != math.prod(shape[-2:]):
        changes.append("fused")
    return ", ".join(changes) or "renamed"


def _overlaps(parameter: str, parts: Sequence[_Part]) -> Iterator[str]:
    """Yield a problem for each pair of parts that cover the same values of a parameter."""
    for index, part in enumerate(parts):
        for other in parts[:index]:
            rows = set(part.block.first.tolist()) & set(other.block.first.tolist())
            columns = set(part.block.last.tolist()) & set(other.block.last.tolist())
            if rows and columns:
                yield f"{part.old} and {other.old} are both the same part of {parameter} of the model"


def _block_diagonal(
    parts: Sequence[_Part], shape: Sequence[int], scale: float, turned: bool
) -> tuple[Tensor, Tensor]:
    """Return A [R, in] and B [out, R] of a matrix from its parts. Parts with the same A share its rank."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        left = part.left.new_zeros(shape[0], part.left.shape[1])
        right = part.right.new_zeros(part.right.shape[0], shape[1])
        left[part.block.first.long()], right[:, part.block.last.long()] = part.left, part.right
        a, b = (left.T, right.T) if turned else (right, left)
        b = b * (part.scale / scale) if part.scale != scale else b
        for index, (other_a, other_b) in enumerate(pairs):
            if other_a.shape == a.shape and torch.equal(other_a, a):
                pairs[index] = (other_a, other_b + b)
                break
        else:
            pairs.append((a, b))
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
