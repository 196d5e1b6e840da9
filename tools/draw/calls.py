"""How data flows between the modules of a model that have no graph: one call without data says it.

A copy of the model over tensors of the meta device is called once. Every tensor knows the calls that it
was computed from, so that what one module gives and another one takes is an edge, whatever happens to it
in between.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lora_fx.errors import some
from lora_fx.passes.capture import CACHE, normalize, synthesise
from lora_fx.passes.graph import original_class, uninstall
from lora_fx.tools.draw.picture import times

__all__ = ["INPUT", "OUTPUT", "Calls", "calls_of"]

INPUT = ">"
"""First character of an end of an edge that is an argument of the box; its name follows."""

OUTPUT = "<"
"""The end of an edge that is what the box returns."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """What one call of a model showed.

    Attributes:
        edges: By FQN of a module, the data flow between its children, as pairs of child names, in the
            order of the calls. Arguments and the result are ends, too.
        shapes: By FQN, what a module took and what it gave, in words.
    """

    edges: Mapping[str, tuple[tuple[str, str], ...]]
    shapes: Mapping[str, tuple[str, str]]


def calls_of(model: nn.Module, example_inputs: Any = None) -> Calls | str:
    """Records which module's result goes to which other module.

    Args:
        model: Any module. It is not touched, and its weights are not read.
        example_inputs: As for :func:`lora_fx.capture`; None for ones that the model's own configuration
            describes.

    Returns:
        The calls, or why there are none, in words.
    """
    if example_inputs is None:
        made = synthesise(model)
        if made.inputs is None:
            return f"no example inputs: {made.words}"
        example_inputs = made.inputs
    failure = ""
    # Some operators have no form without data but for bfloat16.
    for dtype in (None, torch.bfloat16):
        try:
            return _called(model, example_inputs, dtype)
        except Exception as error:  # noqa: BLE001  whatever the user's code raises without data
            first = next(iter(str(error).splitlines()), "")
            failure = failure or f"a call without data failed: {type(error).__name__}: {first}"
    return failure


def _called(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None) -> Calls:
    """Calls a copy over tensors without data, those of floating point in another dtype if one is given."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device="meta")

    copied = _copy(model, empty)
    args, kwargs = pytree.tree_map_only(torch.Tensor, empty, normalize(example_inputs))
    if CACHE in inspect.signature(copied.forward).parameters:
        kwargs.setdefault(CACHE, False)
    # A mask that is all ones says nothing, and code that looks at its values cannot.
    kwargs.pop("attention_mask", None)
    recorder = _Recorder(copied)
    with torch.no_grad(), recorder:
        copied(*args, **kwargs)
    return recorder.calls(with_dtypes=dtype is None)


def _copy(model: nn.Module, empty: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy with other tensors, in which every module has its own class and no hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=False)
    memo |= {id(buffer): empty(buffer) for buffer in model.buffers()}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        uninstall(module)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied.eval()


@dataclasses.dataclass
class _Frame:
    """A call that has not returned.

    Attributes:
        fqn: Of the module.
        sources: What each tensor was computed from, by its id: FQNs of calls and names of arguments.
        alive: The tensors, so that no id is used again.
    """

    fqn: str
    sources: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    alive: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def put(self, tensor: torch.Tensor, sources: tuple[str, ...]) -> None:
        self.sources[id(tensor)] = sources
        self.alive.append(tensor)

    def of(self, value: Any) -> tuple[str, ...]:
        found = (self.sources.get(id(tensor), ()) for tensor in _tensors(value))
        return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    leaves = [value] if isinstance(value, torch.Tensor) else pytree.tree_leaves(value)
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


_ANSWERS: Mapping[Any, Any] = {
    torch.Tensor.__bool__: True,
    torch.Tensor.__int__: 0,
    torch.Tensor.__index__: 0,
    torch.Tensor.__float__: 0.0,
    torch.Tensor.item: 0,
}
"""What code that asks a tensor without data for a value is told."""


_Shapes = list[tuple[tuple[int, ...], torch.dtype]]


class _Recorder(TorchFunctionMode):
    """Follows tensors through functions, and sees every module enter and leave."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._frames: list[_Frame] = [_Frame("")]
        self._edges: dict[str, dict[tuple[str, str], None]] = {}
        self._shapes: dict[str, tuple[_Shapes, _Shapes]] = {}
        self._first: dict[str, int] = {}
        for fqn, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(fqn, module), with_kwargs=True)
            module.register_forward_hook(self._leaving(fqn), with_kwargs=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        if answer is not None and args[0].device.type == "meta":
            return answer
        if func in (torch.nonzero, torch.Tensor.nonzero) and args[0].device.type == "meta":
            return torch.empty(1, args[0].dim(), dtype=torch.long, device="meta")
        given = func(*args, **(kwargs or {}))
        frame = self._frames[-1]
        sources = frame.of((args, kwargs))
        if sources:
            for tensor in _tensors(given):
                frame.put(tensor, sources)
        return given

    def _entering(self, fqn: str, module: nn.Module) -> Any:
        signature = inspect.signature(original_class(module).forward)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            outer, frame = self._frames[-1], _Frame(fqn)
            self._first.setdefault(fqn, len(self._first))
            if fqn:
                for source in outer.of((args, kwargs)):
                    self._connect(outer.fqn, source, fqn)
            try:
                bound = signature.bind(module, *args, **kwargs).arguments
            except TypeError:
                bound = {"input": (args, kwargs)}
            for name, value in bound.items():
                named = {name: value} if not isinstance(value, dict) else value
                for key, one in named.items():
                    for tensor in _tensors(one):
                        frame.put(tensor, (f"{INPUT}{key}",))
            self._frames.append(frame)

        return hook

    def _leaving(self, fqn: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, given: Any) -> None:
            frame = self._frames.pop()
            for source in frame.of(given):
                self._connect(fqn, source, OUTPUT)
            for tensor in _tensors(given):
                self._frames[-1].put(tensor, (fqn,))
            taken = [(tuple(t.shape), t.dtype) for t in _tensors((args, kwargs))]
            made = [(tuple(t.shape), t.dtype) for t in _tensors(given)]
            self._shapes.setdefault(fqn, (taken, made))

        return hook

    def _connect(self, frame: str, source: str, target: str) -> None:
        """Notes an edge at the lowest module that holds both ends."""
        if source.startswith(INPUT) or target == OUTPUT:
            owner = frame
        else:
            shared = itertools.takewhile(
                lambda pair: pair[0] == pair[1],
                zip(source.split("."), target.split("."), strict=False),
            )
            owner = ".".join(atom for atom, _ in shared)
        ends = [self._child(owner, end) for end in (source, target)]
        if None not in ends and ends[0] != ends[1]:
            self._edges.setdefault(owner, {})[ends[0], ends[1]] = None  # type: ignore[index]

    def _child(self, owner: str, end: str) -> str | None:
        if end.startswith(INPUT) or end == OUTPUT:
            return end
        if owner and not end.startswith(f"{owner}."):
            return None
        name = end[len(owner) + 1 :] if owner else end
        return name.partition(".")[0] or None

    def calls(self, *, with_dtypes: bool) -> Calls:
        """What was seen; of edges in both directions, those that go on in time."""
        shapes = {
            fqn: (_in_words(taken, with_dtypes), _in_words(given, with_dtypes))
            for fqn, (taken, given) in self._shapes.items()
        }
        edges = {}
        for owner, found in self._edges.items():
            order = self._order(owner)
            last = len(order)
            edges[owner] = tuple(
                (a, b)
                for a, b in found
                if a.startswith(INPUT) or b == OUTPUT or order.get(a, last) < order.get(b, last)
            )
        return Calls(edges, shapes)

    def _order(self, owner: str) -> dict[str, int]:
        """When each child was first called, or something in it."""
        order: dict[str, int] = {}
        for fqn, when in self._first.items():
            child = self._child(owner, fqn) if fqn else None
            if child is not None:
                order.setdefault(child, when)
        return order


def _in_words(tensors: _Shapes, with_dtypes: bool) -> str:
    found = [
        times(shape) + (f" {str(dtype).removeprefix('torch.')}" if with_dtypes else "")
        for shape, dtype in tensors
    ]
    return some(found, 4)
