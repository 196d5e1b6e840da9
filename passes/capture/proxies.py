"""Stand-ins for what is known only when the graph runs.

Operations on them are recorded. A question that a stand-in cannot answer (how long it is, what number,
which text) ends the trace with the reason.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import fx

from lora_fx.passes.capture.instrument import IN_PLACE
from lora_fx.runtime import in_place

if TYPE_CHECKING:
    from lora_fx.passes.capture.symbolic import Recorder

__all__ = ["ModeProxy", "TracedValue", "attribute_of", "holds_traced"]

_ABOUT_SHAPE: dict[str, Callable[..., Any]] = {
    "size": lambda shape, dim=None: shape if dim is None else shape[dim],
    "dim": len,
    "numel": math.prod,
}


class TracedValue(fx.Proxy):
    """A value that is not known yet."""

    tracer: Recorder

    def __getattr__(self, name: str) -> Any:
        return attribute_of(self, name)

    def __iter__(self) -> Iterator[Any]:
        return self.tracer.refuse("its forward iterates over a traced value")

    def __getitem__(self, key: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def __len__(self) -> int:
        shape = self.tracer.known_shape(self)
        if shape:
            return shape[0]
        return self.tracer.refuse("its forward takes the length of a traced value with len")

    def __index__(self) -> NoReturn:  # noqa: PLE0305  refuses
        self.tracer.refuse("its forward turns a traced value into a number")

    __int__ = __float__ = __complex__ = __index__

    def __contains__(self, item: object) -> NoReturn:
        self.tracer.refuse("its forward looks for something in a traced value")

    def __copy__(self) -> NoReturn:
        self.tracer.refuse("its forward copies a traced value")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.tracer.refuse("its forward copies a traced value")

    def __format__(self, spec: str) -> str:
        return self.tracer.refuse("its forward turns a traced value into a text")

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Attribute(TracedValue):
    """``x.name``: a read if it is used, a method call if it is called."""

    def __init__(self, root: TracedValue, name: str) -> None:
        self.__dict__.update(tracer=root.tracer, _root=root, _name=name, _read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The read; it is made when it is asked for."""
        own = self.__dict__
        if own["_read"] is None:
            args = (own["_root"], own["_name"])
            own["_read"] = self.tracer.create_proxy("call_function", getattr, args, {}).node
        found: fx.Node = own["_read"]
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        question = _ABOUT_SHAPE.get(own["_name"])
        shape = self.tracer.known_shape(own["_root"]) if question else None
        if question and shape is not None:
            return question(shape, *args, **kwargs)
        return self.tracer.create_proxy("call_method", own["_name"], (own["_root"], *args), kwargs)


class ModeProxy(TracedValue):
    """``module.training``, read when the graph runs. The node is made when it is asked for."""

    def __init__(self, tracer: Recorder, target: str) -> None:
        self.__dict__.update(tracer=tracer, _target=target, _read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The read; it is made when it is asked for."""
        own = self.__dict__
        if own["_read"] is None:
            own["_read"] = self.tracer.create_node("get_attr", own["_target"], (), {})
        found: fx.Node = own["_read"]
        return found


def attribute_of(value: TracedValue, name: str) -> Any:
    """``value.name``, whatever attributes the stand-in has itself."""
    recorder: Recorder = value.__dict__["tracer"]
    recorded = vars(operator).get(name) if name.startswith("__") else None
    if isinstance(recorded, BuiltinFunctionType):
        return functools.partial(recorded, value)  # x.__setitem__ is what x[...] = is
    if name.startswith("__"):
        recorder.refuse(
            f"its forward asks for the type or the identity of a traced value ({name}; see isinstance)"
        )
    shape = recorder.known_shape(value) if name in ("shape", "ndim") else None
    if shape is not None:
        return shape if name == "shape" else len(shape)
    return _Attribute(value, name)


def holds_traced(value: Any) -> bool:
    """Whether a value is traced, or a container that holds one that is."""
    if isinstance(value, TracedValue):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(holds_traced, value))
    if isinstance(value, dict):
        return any(map(holds_traced, value.values()))
    if isinstance(value, slice):
        return any(map(holds_traced, (value.start, value.stop, value.step)))
    return False


def _in_place(name: str) -> Callable[[TracedValue, Any], fx.Proxy]:
    def method(self: TracedValue, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (name, self, other), {})

    method.__name__ = f"__{name}__"
    return method


for _name in IN_PLACE.values():
    setattr(TracedValue, f"__{_name}__", _in_place(_name))
