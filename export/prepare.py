"""From the caller's model and example to a model and a call that can be traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.arguments import Arguments, FlatModel, cast_floating
from lora_fx.export.origin import origin_of
from lora_fx.export.trace import widen_batch
from lora_fx.export.twin import DTYPES, dtype_name, exportable_twin, unwrapped

__all__ = ["Prepared", "prepare"]

_log = logging.getLogger("lora_fx")


@dataclass(frozen=True)
class Prepared:
    """What is traced, and what the file is compared with.

    Attributes:
        model: The model in eval mode, tensors in and out.
        arguments: The call that is traced.
        outputs: Names of the outputs, in order.
        dtype: What most weights are stored in: "fp32", "fp16", "bf16", or torch's name.
        origin: Metadata entries about the base model and its adapters.
    """

    model: FlatModel
    arguments: Arguments
    outputs: tuple[str, ...]
    dtype: str
    origin: Mapping[str, str]


def prepare(
    model: nn.Module,
    example_inputs: object,
    dtype: str | None,
    keep: Callable[[Tensor], Tensor],
) -> Prepared:
    """Merge, copy and cast a model, and run it once.

    Args:
        model: Any module. It is not changed.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor.
        dtype: "fp32", "fp16", "bf16", or None to keep what it has.
        keep: Takes each weight that is made anew, see ``Scratch.keep``.

    Raises:
        ExportError: The model cannot be copied, or does not run on the inputs.
    """
    model = unwrapped(model)
    twin = exportable_twin(_merged(model, keep), dtype, keep)
    arguments = Arguments.of(twin, example_inputs)
    if dtype is not None:
        arguments = arguments.replace(cast_floating(arguments.tensors, DTYPES[dtype]))
    for name, value in arguments.baked.items():
        _log.info("argument '%s' is no tensor: its value %s is fixed in the file", name, value)
    flat, arguments, outputs = _first_run(twin, arguments)
    return Prepared(flat, arguments, tuple(outputs), dtype_name(twin), origin_of(model))


def _merged(model: nn.Module, keep: Callable[[Tensor], Tensor]) -> nn.Module:
    if "_lora_fx" not in vars(model):  # the record that a rewrite leaves on the root module
        return model
    from lora_fx.passes.merge import merge

    merged, report = merge(model, keep=keep)
    _log.info("export: %s", report)
    return merged


def _first_run(twin: nn.Module, arguments: Arguments) -> tuple[FlatModel, Arguments, list[str]]:
    """Run once: on a widened batch if the model takes it, else on the examples as they are."""
    flat = FlatModel(twin, arguments).eval()
    failure: Exception | None = None
    for candidate in (widen_batch(arguments), arguments):
        try:
            with torch.no_grad():
                return flat, candidate, [name for name, _ in flat.named(candidate.tensors)]
        except ExportError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a model raises; re-raised below
            failure = error
    given = ", ".join(
        f"{name} {list(tensor.shape)}"
        for name, tensor in zip(arguments.names, arguments.tensors, strict=True)
    )
    raise ExportError(
        f"{type(twin).__name__} does not run on the example inputs ({given}): {failure}"
    ) from failure
