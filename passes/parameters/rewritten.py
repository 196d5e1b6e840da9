"""Tells the ``Trainer`` of transformers whether a quantized model has adapters.

It refuses to train a model that ``is_quantized`` unless PEFT wraps it: nothing in such a model could be
trained. With adapters in it that is not so, and the attribute says no more than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from lora_fx.errors import CaptureError
from lora_fx.ir import PlannedSite, Record, join, record_of
from lora_fx.passes.graph import is_region, original_class
from lora_fx.passes.parameters.by_hand import note_by_hand, protect
from lora_fx.passes.parameters.factors import factor_names
from lora_fx.passes.parameters.replacements import KEPT
from lora_fx.passes.parameters.tokens import rows_name
from lora_fx.runtime import watch

__all__ = [
    "check_intact",
    "inside",
    "mark_adapted",
    "without_wrappers",
]


_SHOWN = 5


def check_intact(model: nn.Module, record: Record) -> None:
    """Refuses a model in which a layer that has an adapter was deleted or replaced after the rewrite.

    Args:
        model: A rewritten model.
        record: Its record.

    Raises:
        CaptureError: With every such place, and what to do; and of a model in FSDP1.
    """
    watch.refuse_flat(model)
    lost = list(dict.fromkeys(_lost(model, record)))
    if not lost:
        return
    more = f"\n  and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    raise CaptureError(
        f"this {type(model).__name__} has lost what the rewrite put into it: layers were deleted or replaced "
        "since:\n  "
        + "\n  ".join(lost[:_SHOWN])
        + more
        + "\nPut the layers back, or make the change in the original model and rewrite that "
        "(lora_fx.load_adapter gives it what was saved before)"
    )


def _lost(model: nn.Module, record: Record) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for adapter, entry in record.adapters.items():
        for row in entry.sites:
            yield from _lost_at_site(modules, row, adapter)
        for tokens in entry.tokens:
            name = rows_name(tokens, adapter)
            if not _has(modules, name):
                found = _found(modules, tokens.site.holder)
                yield f"{tokens.name}: it has no trained rows of adapter {adapter!r}{found}"
        for name in entry.own:
            owner, _, leaf = name.rpartition(".")
            # Of an adapter that is active it is in the place of the base's.
            kept = name if adapter in record.active else join(owner, KEPT + leaf, adapter)
            if not _has(modules, kept):
                yield f"{name}: adapter {adapter!r} has its own value of it, and it is not there"
    for fqn in record.base.kept:
        if fqn not in modules:
            yield f"{fqn}: it is not there, and its quantized weight is known to its graph alone"


def _lost_at_site(modules: dict[str, nn.Module], row: PlannedSite, adapter: str) -> Iterator[str]:
    site = row.site
    if not _has(modules, site.weight):
        yield f"{row.name}: its weight {site.weight} is not there{_found(modules, site.owner)}"
        return
    for attribute in factor_names(row).present:
        if not _has(modules, join(site.holder, attribute, adapter)):
            found = _found(modules, site.holder)
            yield f"{row.name}: it has no {attribute} of adapter {adapter!r}{found}"
            return


def _found(modules: dict[str, nn.Module], fqn: str) -> str:
    """Say which module is where an adapter's parameters were."""
    module = modules.get(fqn)
    if module is None:
        return f" (there is no module {fqn})"
    if is_region(module):
        return ""  # it is the module that was rewritten, without its factors
    cls = original_class(module)
    return f" ({fqn or 'the model'} is a {cls.__module__}.{cls.__qualname__} now)"


def _has(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether there is such a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    if module is None:
        return False
    # Also a weight that is computed (torch.nn.utils.parametrize).
    return getattr(module, leaf, None) is not None


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


def mark_adapted(model: nn.Module, *, adapted: bool) -> None:
    """Writes ``is_quantized`` where transformers has quantized: whether weights are all that there is.

    Args:
        model: A model of lora_fx's own.
        adapted: Whether it has adapters.
    """
    for module in model.modules():
        if module.__dict__.get("hf_quantizer") is not None:
            module.__dict__["is_quantized"] = not adapted
