"""Example inputs: a tuple of arguments, a dict of keyword arguments, or a single tensor."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.errors import CaptureError

__all__ = ["CACHE", "by_place", "describe", "named_inputs", "normalize"]

CACHE = "use_cache"
"""The argument by which a caller of a transformers model says whether it wants a cache back."""


def normalize(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as ``(args, kwargs)``.

    Raises:
        CaptureError: If they are something else.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, list):
        return tuple(example_inputs), {}
    if hasattr(example_inputs, "keys"):
        return (), {str(key): example_inputs[key] for key in example_inputs.keys()}  # noqa: SIM118  a BatchEncoding is no dict
    raise CaptureError(
        "example_inputs must be a tuple of arguments, a dict of keyword arguments or a tensor, found "
        f"{type(example_inputs).__name__}"
    )


def named_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The call that a graph of the whole model is made for: every argument by its name.

    A model of transformers that is not told otherwise returns a cache. No graph does, so the call is
    one with ``use_cache=False``, unless the example inputs say something else.

    Args:
        model: The model.
        example_inputs: As for :func:`normalize`.

    Returns:
        The arguments, those that ``**kwargs`` takes among them.

    Raises:
        CaptureError: If they do not fit, or hold what ``torch.export`` cannot follow.
    """
    args, kwargs = normalize(example_inputs)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(f"torch.export cannot follow *{name}: pass them by name")
        else:
            inputs[name] = value
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) and any(
            isinstance(x, torch.Tensor) for x in pytree.tree_leaves(value)
        ):
            raise CaptureError(
                f"torch.export cannot follow tensors inside the argument {name!r}: pass tensors"
            )
    if CACHE in signature.parameters and hasattr(model, "config") and inputs.get(CACHE) is None:
        inputs[CACHE] = False
    return inputs


def by_place(
    model: nn.Module, example_inputs: Any, named: dict[str, Any]
) -> tuple[Any, ...] | None:
    """The same call with arguments by place, where code can tell it from the one by name.

    A decorator that takes ``*args, **kwargs`` can. A graph has one forward for both.

    Args:
        model: The model.
        example_inputs: As for :func:`normalize`.
        named: :func:`named_inputs` of them.

    Returns:
        The arguments; None if nothing can tell, or some can be given by name only.
    """
    code = getattr(getattr(model.forward, "__func__", model.forward), "__code__", None)
    if code is not None and not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return None
    args, _ = normalize(example_inputs)
    if args:
        return args
    parameters = inspect.signature(model.forward).parameters.values()
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][: len(named)]
    return tuple(named[name] for name in places) if set(places) == set(named) else None


def describe(inputs: Any) -> str:
    """Names, dtypes and shapes of example inputs, in a line."""
    args, kwargs = normalize(inputs)
    named = [("", value) for value in args] + [(f"{key} ", value) for key, value in kwargs.items()]
    return ", ".join(
        f"{name}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"{name}{value!r}"
        for name, value in named
    )
