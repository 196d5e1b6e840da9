"""Example inputs: a tuple of arguments, a dict of keyword arguments, or a single tensor."""

from __future__ import annotations

from typing import Any

import torch

from lora_fx.errors import CaptureError

__all__ = ["normalise"]


def normalise(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
