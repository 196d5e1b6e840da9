"""Traced values that notice when code asks them something that only a tensor can answer.

``torch.fx`` answers on behalf of its proxy: ``isinstance(x, Tensor)`` is False, ``hasattr(x, "y")`` is
True, ``x += 1`` leaves the caller's tensor alone. The graph would then be that of another model.
"""

from __future__ import annotations

import dis
import math
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import fx

from lora_fx.ops import in_place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from lora_fx.passes.capture.symbolic import Recorder

__all__ = ["ISINSTANCE", "ModeProxy", "TracedValue"]

ISINSTANCE = "its forward asks for the type of a traced value with isinstance"

# Code that asks for types on behalf of whoever called it.
_BETWEEN = ("abc", "collections", "typing", "_weakrefset", "torch")
_IN_PLACE = (
    "iadd",
    "isub",
    "imul",
    "imatmul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
)
_ABOUT_SHAPE: dict[str, Callable[..., Any]] = {
    "size": lambda shape, dim=None: shape if dim is None else shape[dim],
    "dim": len,
    "numel": math.prod,
}
_ATTRIBUTE_ACCESS = {dis.opmap[n] for n in dis.opmap if n in ("LOAD_ATTR", "LOAD_METHOD")}


class TracedValue(fx.Proxy):
    """A value that is not known yet."""

    tracer: Recorder

    @property  # type: ignore[misc]  # a question, not a value
    def __class__(self) -> type:
        frame = _asking(sys._getframe(1))
        if frame is None:
            return type(self)
        if frame.f_code.co_name == "__setattr__":
            name = frame.f_locals.get("name", "an attribute")
            self.tracer.refuse(f"its forward writes to self.{name}")
        return self.tracer.refuse(ISINSTANCE)

    def __getattr__(self, name: str) -> Any:
        frame = sys._getframe(1)
        opcode = frame.f_code.co_code[frame.f_lasti]
        if opcode not in _ATTRIBUTE_ACCESS and not _records(frame):
            self.tracer.refuse(
                f"its forward looks for an attribute of a traced value ({name}) with hasattr or getattr"
            )
        shape = self.tracer.known_shape(self) if name in ("shape", "ndim") else None
        if shape is not None:
            return shape if name == "shape" else len(shape)
        return _Attribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        # As in fx: `a, b = x` takes two. Written anew because fx leaves its frame in a cycle.
        code, at = sys._getframe(1).f_code.co_code, sys._getframe(1).f_lasti
        if code[at] != dis.opmap["UNPACK_SEQUENCE"]:
            self.tracer.refuse("its forward iterates over a traced value")
        return (operator.getitem(cast("Any", self), i) for i in range(code[at + 1]))

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

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Attribute(TracedValue):
    """``x.name``: a read if it is used, a method call if it is called."""

    def __init__(self, root: TracedValue, name: str) -> None:
        self.__dict__.update(tracer=root.tracer, _root=root, _name=name, _read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The read; it is made when somebody asks."""
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
    """``module.training``, read when the graph runs. The node is made when somebody asks."""

    def __init__(self, tracer: Recorder, target: str) -> None:
        self.__dict__.update(tracer=tracer, _target=target, _read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The read; it is made when somebody asks."""
        own = self.__dict__
        if own["_read"] is None:
            own["_read"] = self.tracer.create_node("get_attr", own["_target"], (), {})
        found: fx.Node = own["_read"]
        return found


def _asking(frame: FrameType | None) -> FrameType | None:
    """The frame that asks for a type, or None if it is the recorder's own business."""
    first = frame
    while frame is not None:
        if _records(frame):
            return None
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "__setattr__":
            return frame
        if name.partition(".")[0] not in _BETWEEN:
            return frame
        frame = frame.f_back
    return first


def _records(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.startswith(("torch.fx.", "lora_fx.")) or name == "torch.fx"


def _in_place(name: str) -> Callable[[TracedValue, Any], fx.Proxy]:
    def method(self: TracedValue, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (name, self, other), {})

    method.__name__ = f"__{name}__"
    return method


for _name in _IN_PLACE:
    setattr(TracedValue, f"__{_name}__", _in_place(_name))
