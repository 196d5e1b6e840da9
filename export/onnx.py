"""``export_onnx``: capture, convert, name, write, compare, move into place.

Nothing here imports onnx or ONNX Runtime before an export begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora_fx.errors import ExportError
from lora_fx.export.adapters import over_quantized
from lora_fx.export.build import Options, Stages, build
from lora_fx.export.copy import DTYPES, unwrapped
from lora_fx.export.prepare import prepare, prepare_swappable
from lora_fx.export.report import ExportReport
from lora_fx.export.staging import EXTERNAL_DATA_BYTES, SHARD_BYTES, Scratch, check_target, staging
from lora_fx.export.tasks import find_task
from lora_fx.files import output_file
from lora_fx.ir import record_of
from lora_fx.passes.capture import ONE_AT_A_TIME
from lora_fx.passes.graph import copy_without_trainers, instance_forwards
from lora_fx.passes.parameters import check_intact
from lora_fx.runtime import without_autocast

__all__ = [
    "export_onnx",
    "refuse_nan",
    "without_ambient_autocast",
]


@contextlib.contextmanager
def without_ambient_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast off wherever the model is: it would be traced, and the dtype of a file is an argument.

    Autocast that the model enters by itself stays as it is.
    """
    # On the CPU in any case: that is where weights are merged and cast.
    kinds = {"cpu", *(tensor.device.type for tensor in model.parameters())}
    with contextlib.ExitStack() as stack:
        for kind in sorted(kinds):
            stack.enter_context(without_autocast(kind))
        yield


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 24  # elements that are looked at at once


def refuse_nan(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that are not numbers: every output would be equal to them.

    Infinite values pass: masks are filled with them.

    Raises:
        ExportError: With the names of those that hold NaN.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    broken = [name for name, value in named if _has_nan(value)]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ExportError(
            f"{', '.join(broken[:5])}{more} of {type(model).__name__} hold NaN: the training diverged, or "
            "the weights were not loaded"
        )


@torch.no_grad()
def _has_nan(value: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    if not plain or value.is_meta or value.dtype not in _DTYPES:
        return False
    return any(bool(part.isnan().any()) for part in _parts(value))


def _parts(value: Tensor) -> Iterator[Tensor]:
    """Views of a tensor, none of them large where it has rows."""
    if value.dim() == 0 or value.numel() <= _CHUNK:
        yield value
        return
    rows = max(1, _CHUNK * value.shape[0] // value.numel())
    yield from torch.split(value, rows)


_OPSETS = (18, 19, 20, 21, 22, 24)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: object,
    *,
    task: Literal["text-generation", "text2text-generation"] | None = None,
    adapters: Literal["merge", "inline", "inputs"] | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    dynamic_shapes: object = None,
    opset: int | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write ``model`` as an ONNX file that was checked against PyTorch.

    The file appears at ``path`` only after the check; until then, and after any error, what was
    there before is still there. The model is not changed, its modes included. Autocast around the call
    counts for nothing: ``dtype`` says what the file computes in.

    Args:
        model: Any module. Adapters of lora_fx in it are merged first, or become inputs; those of PEFT and
            others stay products of their own in the file, with a warning in the log.
        path: The file to write, with the suffix ``.onnx``.
        example_inputs: A tuple (args), a dict (kwargs) or a single tensor. Values matter: the
            check draws its own from their range. Sizes of 1 cannot become dynamic, but a batch of
            one is widened.
        task: What the file is for. None to export the model as it is called;
            "text-generation" for a decoder with its key-value cache as inputs and outputs, which
            ``OnnxSession.generate`` runs; "text2text-generation" for an encoder-decoder, whose
            encoder goes into a second file ``STEM.xxxxxxxx.encoder.onnx``. The example is token
            ids (or what the encoder takes); mask, cache and dynamic axes come with the task.
            ``{"input_ids": ids, "logits_to_keep": 0}`` asks for the logits of all positions
            instead of the last one.
        adapters: "merge" to fold adapters into the weights, which makes a quantized model dense. "inline"
            to keep those that are active in the file, as products of their own beside the operations.
            "inputs" to keep them apart: the file is the base model, and takes an adapter of any rank at
            every place where one of the model's is (for a model without adapters: at every linear
            operation but the head; rewrite it to choose others). ``save_onnx_adapter`` writes adapters
            for it, and ``OnnxSession`` runs them. None for "inline" where an active adapter is at a
            quantized weight, else for "merge".
        dtype: "fp32", "fp16", "bf16" to export the model cast to it, floating inputs included;
            None to keep what it has. A half-precision file is compared with the model in fp32, its
            weights rounded to half precision; the tolerance is that of the dtype.
        dynamic_shapes: None to make every axis dynamic that can be, or where that gives no file which
            is equal to the model, the first axis, or none; else input name to a mapping
            of axis to a name, all other axes being fixed.
        opset: ONNX opset, 18 to 22 or 24. None for the one that the providers run best: 20, and 22
            for bf16, the first in which convolutions and pooling take it. 23 is refused: a file of it
            has rotary embeddings that ONNX Runtime rejects for batches of more than one.
        verify: Compare the file, run by ONNX Runtime on the CPU, with PyTorch on fresh inputs of
            other shapes.
        force: Replace an existing file.
        progress: Called with the name of each stage as it begins.
        external_data_bytes: Bytes of weights from which they are written to files of their
            own, beside ``path``: 256 MiB by default.
        shard_bytes: Bytes of one such file: 4 GB by default.

    Returns:
        What was written, which axes are dynamic and why others are not, and how close it is.

    Raises:
        CaptureError: A layer that has an adapter was deleted or replaced after the rewrite.
        ParityError: The file computes something else.
        OutputPathError: ``path`` is a folder, or has another suffix.
        ProviderError: ``verify=True`` without ONNX Runtime.
        NoMatchError: ``adapters="inputs"`` of a model that has neither adapters nor an operation to
            adapt.
        ExportError: Anything else: arguments that mean nothing, an existing file, a model that
            cannot be captured or is random, a folder that cannot be written to, a full disk (with
            the bytes that the file takes).
    """
    _check_arguments(model, adapters, dtype, opset)
    sizes: tuple[tuple[str, object, int], ...] = (
        ("external_data_bytes", external_data_bytes, 0),
        ("shard_bytes", shard_bytes, 1),
    )
    for name, size, least in sizes:
        if not isinstance(size, int) or size < least:
            raise ExportError(f"{name}={size!r}: give a number of bytes, {least} or more")
    if task is not None:
        find_task(task)
        if dynamic_shapes is not None:
            raise ExportError(
                f"task={task!r} says which axes are dynamic: leave dynamic_shapes out"
            )
    target = output_file(path, (".onnx",))
    check_target(target, force=force)
    _require_packages()
    clock = Stages(progress)

    model = _without_trainers(model)
    with ONE_AT_A_TIME, without_ambient_autocast(model), staging(target) as stage:
        keep = Scratch(stage).keep
        options = Options(opset, verify, external_data_bytes, shard_bytes, keep, clock)
        clock.start("capturing the model")
        refuse_nan(model)
        if adapters is None:
            adapters = "inline" if over_quantized(unwrapped(model)) else "merge"
        preparing = (
            prepare_swappable
            if adapters == "inputs"
            else partial(prepare, merged=adapters == "merge")
        )
        *beside, main = preparing(model, example_inputs, dtype, keep, task)
        encoder: ExportReport | None = None
        for prepared in beside:
            place = stage.companion(prepared.name)
            encoder = build(prepared, place, options)
            main = main.beside(prepared.name, place.target.name)
            clock.start("capturing the model")
        report = build(main, stage, options, dynamic_shapes)
        clock.start("moving into place")
        stage.commit(force=force)
    clock.stop()
    return dataclasses.replace(
        report, task=task, adapters=adapters, seconds=clock.seconds, encoder=encoder
    )


def _check_arguments(
    model: object, adapters: str | None, dtype: str | None, opset: int | None
) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    record = record_of(unwrapped(model))
    if record is not None:
        check_intact(unwrapped(model), record)
    if adapters not in ("merge", "inline", "inputs", None):
        raise ExportError(
            f"adapters={adapters!r} is unknown: give 'merge', which folds them into the weights, 'inline', "
            f"which keeps them beside, or 'inputs', which keeps them swappable"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype={dtype!r} is unknown: give one of {', '.join(DTYPES)} or None")
    if opset == 23:
        raise ExportError(
            "opset 23 is refused: its fused rotary embedding is exported with a cache for a batch "
            "of one, which ONNX Runtime rejects for larger batches; use 20, 22 or 24"
        )
    if opset is not None and opset not in _OPSETS:
        raise ExportError(f"opset {opset!r} is not supported: use one of {_OPSETS}")


def _without_trainers(model: nn.Module) -> nn.Module:
    """Give a rewritten model without what trainers have set on it, a copy where there is something."""
    inner = unwrapped(model)
    record = record_of(inner)
    if record is None or instance_forwards(inner) <= record.forwards:
        return model
    return copy_without_trainers(inner, record.forwards, ExportError)


def _require_packages() -> None:
    # All three now: torch.onnx asks for some of them only halfway through.
    try:
        for package in ("onnx", "onnx_ir", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the export needs onnx, onnxscript and onnx-ir ({error}): pip install 'lora-fx[gpu]', "
            f"or 'lora-fx[cpu]'"
        ) from error
