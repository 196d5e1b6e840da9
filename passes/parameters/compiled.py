"""What the verbs for rewritten models share: the way past torch.compile's wrappers, and a look at the model.

A wrapper passes attributes on and keeps modules, buffers and a ``__dict__`` of its own: what reads through it
seems to work, and what writes changes the wrapper. So a verb works on the module inside.

A model may have been changed since the last verb. What it has lost is refused, and what is trained by hand is
noted, once here for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from lora_fx.ir.record import record_of
from lora_fx.passes.parameters.by_hand import note_by_hand, protect
from lora_fx.passes.parameters.intact import check_intact

__all__ = ["inside", "without_wrappers"]

_INNER = "_orig_mod"
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def inside(verb: _Verb) -> _Verb:
    """Lets a verb that is given a compiled model, or one with compiled layers, work on what is inside.

    What the verb returns is what it was given, where that is what it would return.

    Raises:
        CaptureError: If a layer that has an adapter was deleted or replaced.
    """

    @functools.wraps(verb)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        with without_wrappers(model) as inner:
            result = verb(inner, *args, **kwargs)
        return model if result is inner else result

    return cast(_Verb, call)


@contextmanager
def without_wrappers(model: Any, *, leaving: bool = False) -> Iterator[Any]:
    """The module inside torch.compile's wrapper, with its layers as they are without theirs.

    Wrappers of layers are in their places again when the context ends. They have compiled nothing else then:
    they go by what the module inside is.

    Args:
        model: A rewritten model; anything else is given back as it is.
        leaving: Whether a ``with`` block is left, which has to end whatever has become of the model.

    Raises:
        CaptureError: If a layer that has an adapter was deleted or replaced.
    """
    inner = _unwrapped(model) if isinstance(model, nn.Module) else None
    record = None if inner is None else record_of(inner)
    if inner is None or record is None:
        yield model
        return
    places = [
        (parent, name, child)
        for parent in inner.modules()
        if _INNER not in parent._modules
        for name, child in parent._modules.items()
        if child is not None and _INNER in child._modules
    ]
    for parent, name, child in places:
        parent._modules[name] = _unwrapped(child)
    try:
        if not leaving:
            check_intact(inner, record)
        note_by_hand(inner)
        yield inner
        protect(inner)
    finally:
        for parent, name, child in places:
            if parent._modules.get(name) is _unwrapped(child):
                parent._modules[name] = child


def _unwrapped(module: nn.Module) -> nn.Module:
    while (found := module._modules.get(_INNER)) is not None:
        module = found
    return module
