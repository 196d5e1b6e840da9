"""Proxies of values that are known only when the graph runs.

Operations on them are recorded. If code needs the value itself (a length, a number), the trace ends with the
reason.
"""

from __future__ import annotations

import dis
import math
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, fx

from lora_fx.runtime import in_place

if TYPE_CHECKING:
    from lora_fx.passes.capture.trace import Recorder

__all__ = ["ModeProxy", "TracedValue", "holds_traced"]

_ABOUT_SHAPE: dict[str, Callable[..., Any]] = {
    "size": lambda shape, dim=None: shape if dim is None else shape[dim],
    "dim": len,
    "numel": math.prod,
}


class TracedValue(fx.Proxy):
    """Proxy of a value that is not known yet."""

    tracer: Recorder

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Return ``Tensor`` for ``isinstance`` in model code, and the class of the proxy for anything else.

        C functions that see ``Tensor`` would treat the proxy as a tensor.
        """
        return Tensor if _is_isinstance(sys._getframe(1)) else type(self)

    def __getattr__(self, name: str) -> Any:
        shape = self.tracer.known_shape(self) if name in ("shape", "ndim") else None
        if shape is not None:
            return shape if name == "shape" else len(shape)
        return _Attribute(self, name)

    def __getitem__(self, key: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def __len__(self) -> int:
        shape = self.tracer.known_shape(self)
        if shape:
            return shape[0]
        return self.tracer.end("its forward takes the length of a traced value with len")

    def __index__(self) -> NoReturn:  # noqa: PLE0305  refuses
        self.tracer.end("its forward turns a traced value into a number")

    __int__ = __float__ = __complex__ = __index__

    def __contains__(self, item: object) -> NoReturn:
        self.tracer.end("its forward looks for something in a traced value")

    def __copy__(self) -> NoReturn:
        self.tracer.end("its forward copies a traced value")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.tracer.end("its forward copies a traced value")

    def __format__(self, spec: str) -> str:
        self.tracer.doubts("its forward turns a traced value into a text")
        return "?"

    def __str__(self) -> str:
        return self.__format__("")

    def __repr__(self) -> str:
        return self.__format__("")

    def __hash__(self) -> int:
        if not str(sys._getframe(1).f_globals.get("__name__", "")).startswith("torch."):
            self.tracer.doubts("its forward looks something up by a traced value")
        return object.__hash__(self)

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Attribute(TracedValue):
    """Proxy of ``x.name``: an attribute read if it is used, a method call if it is called."""

    def __init__(self, root: TracedValue, name: str) -> None:
        self.__dict__.update(tracer=root.tracer, _root=root, _name=name, _read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Return the node of the read, created at the first use."""
        own = self.__dict__
        if own["_read"] is None:
            args = (own["_root"], own["_name"])
            own["_read"] = self.tracer.create_proxy("call_function", getattr, args, {}).node
        read: fx.Node = own["_read"]
        return read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        question = _ABOUT_SHAPE.get(own["_name"])
        shape = self.tracer.known_shape(own["_root"]) if question else None
        if question and shape is not None:
            return question(shape, *args, **kwargs)
        return self.tracer.create_proxy("call_method", own["_name"], (own["_root"], *args), kwargs)


class ModeProxy(TracedValue):
    """Proxy of ``module.training``, which the graph reads when it runs."""

    def __init__(self, tracer: Recorder, target: str) -> None:
        self.__dict__.update(tracer=tracer, _target=target, _read=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Return the node of the read, created at the first use."""
        own = self.__dict__
        if own["_read"] is None:
            own["_read"] = self.tracer.create_node("get_attr", own["_target"], (), {})
        read: fx.Node = own["_read"]
        return read


def _is_isinstance(frame: FrameType) -> bool:
    """Return True if a frame of model code is in a call of ``isinstance``."""
    if str(frame.f_globals.get("__name__", "")).startswith("torch."):
        return False
    called = ""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset >= frame.f_lasti:
            break
        if (
            instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            and instruction.argval == "isinstance"
        ):
            called = "isinstance"
        elif instruction.opname.startswith("CALL"):
            called = ""
    return called == "isinstance"


def holds_traced(value: Any) -> bool:
    """Return True if a value is a traced value or a container of one."""
    if issubclass(type(value), TracedValue):
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


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
):
    setattr(TracedValue, f"__i{_name}__", _in_place(f"i{_name}"))
