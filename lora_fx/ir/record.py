"""The record of a rewritten model: its adapters, and the graphs of the model without them."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.ir.graph import BASE_READ, META_KEY, Region, Tag, tag_of
from lora_fx.ir.plan import PlannedSite, PlannedTokens
from lora_fx.ir.savings import Savings
from lora_fx.ir.site import Matches

__all__ = [
    "DEFAULT_LOSS",
    "DEFAULT_MEMORY",
    "ActiveAdapters",
    "AdapterRecord",
    "Base",
    "Loss",
    "Memory",
    "Record",
    "freeze",
    "is_base",
    "record_of",
    "require_record",
    "thaw",
]


Memory: TypeAlias = Literal["fast", "balanced", "least"]
"""Which tensors a training step saves for its backward; see :func:`lora_fx.rewrite`."""

DEFAULT_MEMORY: Memory = "fast"

Loss: TypeAlias = Literal["whole", "chunked"]
"""The way to compute the logits for the loss of a training step: all at once, or chunk by chunk."""

DEFAULT_LOSS: Loss = "whole"


def is_base(name: object) -> bool:
    """Return True if a sample's adapter name stands for the base: None, or PEFT's ``__base__``."""
    return name is None or (isinstance(name, str) and name == "__base__")


class _Ref(str):
    """A node of a pickled graph, by name."""


class _Target(tuple[str, ...]):
    """A function in a pickled graph, as the path to import it."""


def freeze(graph: fx.Graph) -> tuple[Any, ...]:
    """Return a graph as picklable values, with its tags.

    fx pickles a graph module as code and traces it again when it is loaded, which loses the tags.
    """
    nodes = [
        (
            node.op,
            node.name,
            _freeze_target(node.target),
            *(_map(values, fx.Node, lambda n: _Ref(n.name)) for values in (node.args, node.kwargs)),
            _written(tag_of(node)),
            BASE_READ in node.meta,
        )
        for node in graph.nodes
    ]
    return (nodes, torch_private.codegen_of(graph))


def thaw(frozen: tuple[Any, ...]) -> fx.Graph:
    """Return the graph from a result of :func:`freeze`, with the same names and tags."""
    nodes, codegen = frozen
    graph = fx.Graph()
    graph.set_codegen(codegen)
    named: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, tag, of_base in nodes:
        args, kwargs = (_map(values, _Ref, named.__getitem__) for values in (args, kwargs))
        node = graph.create_node(op, _thaw_target(target), args, kwargs, name=name)
        named[name] = node
        if isinstance(tag, Tag):
            node.meta[META_KEY] = tag
        if of_base:
            node.meta[BASE_READ] = True
    return graph


def _written(tag: Tag | None) -> Tag | None:
    """Return a tag as :func:`freeze` stores it, without ``fused``, which only later passes need."""
    return None if tag is None else dataclasses.replace(tag, fused=None)


def _freeze_target(target: Any) -> Any:
    if isinstance(target, str):
        return target
    if isinstance(target, torch_private.OpOverload):
        namespace, name = torch_private.schema_of(target).name.split("::")
        return _Target(("op", namespace, name, torch_private.overload_name(target)))
    try:
        pickle.dumps(target)
    except Exception as error:
        imported: Any = getattr(importlib.import_module(target.__module__), target.__name__, None)
        if imported is not target:
            raise pickle.PicklingError(f"cannot pickle a graph that calls {target!r}") from error
        return _Target(("function", target.__module__, target.__name__))
    return target


def _thaw_target(target: Any) -> Any:
    if not isinstance(target, _Target):
        return target
    kind, *path = target
    if kind == "function":
        return getattr(importlib.import_module(path[0]), path[1])
    return getattr(getattr(getattr(torch.ops, path[0]), path[1]), path[2])


def _map(value: Any, cls: type, fn: Callable[[Any], Any]) -> Any:
    """Replace each instance of ``cls`` in the arguments of a node by the result of ``fn``."""
    # Not fx.map_arg: its containers are immutable subclasses that need torch to unpickle.
    if isinstance(value, cls):
        return fn(value)
    if isinstance(value, dict):
        return {key: _map(item, cls, fn) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_map(item, cls, fn) for item in (value.start, value.stop, value.step)))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, cls, fn) for item in value))
    if isinstance(value, list | tuple):
        items = [_map(item, cls, fn) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """One adapter of a rewritten model.

    Attributes:
        config: Its configuration.
        sites: The sites that it adapts.
        saved_modules: Modules that it trains in full.
        biases: FQNs of the biases that it trains.
        own: FQNs of the base's tensors that it replaces: the trained biases, the parameters and learned
            buffers of ``saved_modules``, and weights that its initialization has changed. The replacements
            are in the model while the adapter is active, and stored outside it otherwise
            (:mod:`lora_fx.passes.parameters.replacements`).
        initialized: True if it has the initial values that its configuration asks for; False if they still
            have to be computed from data.
        tokens: Rows of embeddings that it trains.
        given: The names in ``own`` of parameters that were in its folder and that it does not train: weights
            of embeddings and heads, and parameters that were trained by hand.
    """

    config: LoraConfig
    sites: tuple[PlannedSite, ...]
    saved_modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    initialized: bool = True
    tokens: tuple[PlannedTokens, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[PlannedSite | PlannedTokens, ...]:
        """The sites, and the trained rows of embeddings."""
        return (*self.sites, *self.tokens)


@dataclasses.dataclass(frozen=True)
class Base:
    """The graphs of a model before any branch was inserted, and the operations in them.

    Adding or switching adapters inserts branches into these graphs again. A ``Base``
    never changes, so that copies of a model share it.

    Attributes:
        graphs: The graph of every region by key, parents first. Equal layers share a graph.
        classes: The class name of each region's module, by key.
        fallback: :attr:`lora_fx.ir.graph.Region.fallback` of each region, by key.
        not_run: :attr:`lora_fx.ir.graph.Region.not_run` of the regions that have a reason, by key.
        matches: Every linear operation.
        notes: Notes of the capture.
        kept: FQNs of the modules that already ran a graph before the rewrite, because their own code cannot
            read their quantized weights (:func:`lora_fx.quantize`).
        written_out: Keys of the regions with :attr:`lora_fx.ir.graph.Region.written_out`.
    """

    graphs: Mapping[str, fx.Graph]
    classes: Mapping[str, str]
    fallback: Mapping[str, bool]
    not_run: Mapping[str, str]
    matches: Matches
    notes: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()
    written_out: frozenset[str] = frozenset()

    def region(self, key: str, module: nn.Module, frontend: str) -> Region:
        """Return a region on a module of a rewritten model.

        Args:
            key: The key of the region.
            module: The module.
            frontend: The front-end of the capture.
        """
        return Region(
            key,
            module,
            self.graphs[key],
            fallback=self.fallback[key],
            not_run=self.not_run.get(key, ""),
            written_out=key in self.written_out,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle each graph once, because equal layers share their graph and the class that runs it.
        distinct = {id(graph): graph for graph in self.graphs.values()}
        numbers = {key: number for number, key in enumerate(distinct)}
        index_of = {fqn: numbers[id(graph)] for fqn, graph in self.graphs.items()}
        frozen = tuple(freeze(graph) for graph in distinct.values())
        flags = (dict(self.classes), dict(self.fallback), dict(self.not_run))
        fields = (self.matches, self.notes, self.kept, self.written_out)
        return _thawed, (frozen, index_of, *flags, *fields)


@dataclasses.dataclass(frozen=True, eq=False)
class ActiveAdapters:
    """The adapters that a model runs with. Two choices are equal only if they are the same object.

    Attributes:
        names: Their names, in the order in which they are added.
        per_sample: True if each sample of a batch has one of them, or none.
        ids: The adapter of each sample, or None for the base; empty if none was chosen.
        repeats: The number of consecutive copies of each sample that a batch may have.
        thread: The id of the thread in the ``with`` block of this choice; 0 without a block.
    """

    names: tuple[str, ...] = ()
    per_sample: bool = False
    ids: tuple[str | None, ...] = ()
    repeats: int = 1
    thread: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """The root module's ``_lora_fx`` attribute: fully immutable, so that copies of a model share it.

    Attributes:
        adapters: By adapter name.
        active: Names of the adapters whose branches are in the graphs, in the order in which they are added.
        per_sample: True if each sample of a batch has one of the active adapters, or none.
        frontend: The front-end that captured the model.
        trainable: FQNs of the parameters that required a gradient before the rewrite, which ``merge``
            restores.
        buffers: A fingerprint of every persistent buffer at the rewrite. A buffer that has changed since is
            saved, because it was learned.
        base: The graphs without branches.
        originals: The base's own value of every tensor that an adapter has replaced
            (:attr:`AdapterRecord.own`), by FQN. They share their storage with the model before the rewrite.
        optimize: True if branches are fused with their operations.
        chosen: The choice of :func:`lora_fx.set_adapter`, while a ``with`` block overrides it.
        blocks: The choices of the open ``with`` blocks, in all threads and tasks, in the order of entry. A
            copy of a model has none.
        by_hand: FQNs of the base's parameters that were trained although no adapter trains them
            (:mod:`lora_fx.passes.parameters.rewritten`).
        forwards: FQNs of the modules that had a ``forward`` on their instance at the rewrite.
        memory: The tensors that fused branches save for their backward.
        loss: The way in which a training call computes its loss: from all logits at once, or in chunks.
        savings: The modules that are recomputed or run in tiles.
    """

    adapters: Mapping[str, AdapterRecord]
    active: tuple[str, ...]
    frontend: str
    trainable: frozenset[str]
    buffers: Mapping[str, str]
    base: Base
    originals: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    per_sample: bool = False
    optimize: bool = True
    chosen: ActiveAdapters | None = None
    blocks: tuple[ActiveAdapters, ...] = ()
    by_hand: frozenset[str] = frozenset()
    forwards: frozenset[str] = frozenset()
    memory: Memory = DEFAULT_MEMORY
    loss: Loss = DEFAULT_LOSS
    savings: Savings = dataclasses.field(default_factory=Savings)

    def with_adapter(self, name: str, adapter: AdapterRecord, **fields: Any) -> Record:
        """Return the record with a new entry for an adapter, and new values of some fields."""
        return dataclasses.replace(self, adapters={**self.adapters, name: adapter}, **fields)

    @property
    def placed(self) -> tuple[str, ...]:
        """The adapters whose replacements of the base's parameters are in the model.

        If samples have different adapters, the model has the base's parameters, and all replacements are
        stored outside it.
        """
        return () if self.per_sample else self.active

    @property
    def deploys(self) -> bool:
        """True if an adapter is trained for the storage of its merged weights (``deploy=``)."""
        return any(row.deploy for adapter in self.adapters.values() for row in adapter.sites)

    @property
    def is_disabled(self) -> bool:
        """True in a ``with`` block that disables all adapters."""
        return any(not block.ids for block in self.blocks)

    @property
    def choice(self) -> ActiveAdapters:
        """The active adapters outside of all ``with`` blocks."""
        return self.chosen or ActiveAdapters(self.active, self.per_sample)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return self._without_blocks()

    def __reduce__(self) -> tuple[Any, ...]:
        record = self._without_blocks()
        return Record, tuple(getattr(record, field.name) for field in dataclasses.fields(record))

    def _without_blocks(self) -> Record:
        # A copy is in no block, so no block would end for it. It keeps the adapters that were active.
        return dataclasses.replace(self, chosen=None, blocks=()) if self.blocks else self


def record_of(model: object) -> Record | None:
    """Return the record of a rewritten model, or None for any other model."""
    # Not getattr: torch.compile's wrapper forwards reads to the model, but stores writes itself.
    record = getattr(model, "__dict__", {}).get("_lora_fx")
    return record if isinstance(record, Record) else None


def require_record(model: nn.Module, error: type[LoraFxError] = ConfigError) -> Record:
    """Return the record of a rewritten model.

    Args:
        model: A rewritten model.
        error: The class of the error to raise for any other model.
    """
    record = record_of(model)
    argument: object = model
    if not isinstance(argument, nn.Module):
        is_path = isinstance(argument, str | PathLike)
        value = repr(str(argument)) if is_path else f"a {type(argument).__name__}"
        raise error(
            f"the first argument is {value}, and has to be the model that lora_fx.rewrite or "
            "lora_fx.load_adapter(model, folder) returned"
        )
    if record is None:
        raise error(
            f"this {type(model).__name__} has no adapters. lora_fx.rewrite and lora_fx.load_adapter return a "
            "model with adapters, and do not change their argument, so keep the result: "
            "model = lora_fx.rewrite(model, config). The result of lora_fx.merge has no adapters any more. "
            "If the model is wrapped (DistributedDataParallel), pass the model inside. If PEFT has adapted "
            "it, load the folder that PEFT saves with lora_fx.load_adapter"
        )
    return record


def _thawed(frozen: tuple[Any, ...], index_of: dict[str, int], *fields: Any) -> Base:
    graphs = [thaw(graph) for graph in frozen]
    return Base({fqn: graphs[number] for fqn, number in index_of.items()}, *fields)
