"""Compares a capture with the model that it was made from, on the example inputs."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.errors import CaptureError
from lora_fx.passes._region import install, uninstall
from lora_fx.passes._sharing import share_copy
from lora_fx.passes.capture.inputs import normalise
from lora_fx.passes.capture.watch import Count, count_weights
from lora_fx.types import Capture

__all__ = ["check_unchanged", "run_reference", "watch_reference"]

_T = TypeVar("_T")
_log = logging.getLogger("lora_fx")
_TOLERANCE = 1e-6


def check_unchanged(model: nn.Module, capture: Capture, example_inputs: Any) -> float:
    """Runs the model and its capture in eval mode and compares the outputs.

    Returns:
        The largest difference, relative to the largest value of its output; 0.0 for equal bits.

    Raises:
        CaptureError: If the inputs do not fit the model, or the outputs differ by more than 1e-6.
    """
    reference = run_reference(model, example_inputs)
    install(capture.regions.values())
    try:
        # A copy: what a forward writes, into buffers and attributes, is not part of the capture.
        runs = share_copy(capture.model)
    finally:
        for region in capture.regions.values():
            uninstall(region.module)
    difference = _difference(reference, _run(runs, example_inputs))
    if difference > _TOLERANCE:
        raise CaptureError(
            f"the captured model ({capture.frontend}) computes something else than the original: "
            f"relative difference {difference:.3g} on the example inputs. Try another frontend, "
            "and please report this"
        )
    if difference:
        _log.info("the captured model rounds differently: relative difference %.3g", difference)
    return difference


def run_reference(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output in eval mode. The model is not touched: a copy over its weights runs.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """
    return _reference(model, example_inputs, _run)


def watch_reference(model: nn.Module, example_inputs: Any) -> Count:
    """What the model multiplies with its data on the example inputs; a copy over its weights runs.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """

    def watch(runs: nn.Module, inputs: Any) -> Count:
        args, kwargs = pytree.tree_map(_own, normalise(inputs))
        with torch.random.fork_rng(devices=_devices(runs)):
            return count_weights(runs.eval(), args, kwargs)

    return _reference(model, example_inputs, watch)


def _reference(model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], _T]) -> _T:
    normalise(example_inputs)
    runs = share_copy(model)
    try:
        return run(runs, example_inputs)
    except Exception as error:
        raise CaptureError(
            f"the model does not run on the example inputs ({type(error).__name__}: {error}). They "
            "must be what its forward takes: a tuple of arguments, a dict of keyword arguments or "
            "a tensor"
        ) from error


def _devices(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def _run(model: nn.Module, example_inputs: Any) -> Any:
    """The output in eval mode; every run begins with the same random numbers and uses none up."""
    # A forward may write into what it is given: tensors, and caches more so.
    args, kwargs = pytree.tree_map(_own, normalise(example_inputs))
    forked = torch.random.fork_rng(devices=_devices(model))
    with torch.no_grad(), forked, _without_fast_path():
        return model.eval()(*args, **kwargs)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Attention in the operations that a graph has; the fast path writes zeros where padding is."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _difference(reference: Any, found: Any) -> float:
    left, left_spec = pytree.tree_flatten(reference)
    right, right_spec = pytree.tree_flatten(found)
    if left_spec != right_spec:
        raise CaptureError(f"the captured model returns {right_spec}, the original {left_spec}")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, torch.Tensor) or a.device.type == "meta":
            continue
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b):
            continue
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst
