"""``export_onnx``: capture, convert, name, write, compare, move into place.

Nothing here imports onnx or ONNX Runtime before an export begins.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lora_fx.errors import ExportError, ParityError
from lora_fx.export.convert import ConversionError, convert, torch_export_context
from lora_fx.export.facts import graph_facts
from lora_fx.export.placement import Staging, check_target, staging
from lora_fx.export.prepare import Prepared, prepare, prepare_swappable
from lora_fx.export.report import ExportReport
from lora_fx.export.stages import Stages
from lora_fx.export.tasks.registry import find_task
from lora_fx.export.trace import headline, trace
from lora_fx.export.twin import DTYPES
from lora_fx.export.verify import Verdict
from lora_fx.export.verify import verify as verify_file
from lora_fx.export.write import EXTERNAL_DATA_BYTES, write

__all__ = ["BF16_OPSET", "DEFAULT_OPSET", "export_onnx"]

_log = logging.getLogger("lora_fx")

DEFAULT_OPSET = 20
BF16_OPSET = 22  # the first in which convolutions and pooling take bf16
_OPSETS = (18, 19, 20, 21, 22, 24)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: object,
    *,
    task: Literal["text-generation", "text2text-generation"] | None = None,
    adapters: Literal["merge", "inputs"] = "merge",
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    dynamic_shapes: object = None,
    opset: int | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> ExportReport:
    """Write ``model`` as an ONNX file that was checked against PyTorch.

    The file appears at ``path`` only after the check; until then, and after any error, what was
    there before is still there. The model is not changed, its modes included.

    Args:
        model: Any module. Adapters in it are merged first, or become inputs.
        path: The file to write.
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
        adapters: "merge" to fold adapters into the weights. "inputs" to keep them apart: the file is
            the base model, and takes an adapter of any rank at every place where one of the model's is
            (for a plain model: at every linear operation but the head). ``save_onnx_adapter`` writes
            adapters for it, and ``OnnxSession`` runs them.
        dtype: "fp32", "fp16", "bf16" to export the model cast to it, floating inputs included;
            None to keep what it has.
        dynamic_shapes: None to make every axis dynamic that can be, or where that gives no file which
            is equal to the model, the first axis, or none; else input name to a mapping
            of axis to a name, all other axes being fixed.
        opset: ONNX opset; by default 20, and 22 for bf16.
        verify: Compare the file, run by ONNX Runtime on the CPU, with PyTorch on fresh inputs of
            other shapes.
        force: Replace an existing file.
        progress: Called with the name of each stage as it begins.
        external_data_bytes: Bytes of weights from which they are written to a second file.

    Returns:
        What was written, which axes are dynamic and why others are not, and how close it is.

    Raises:
        ParityError: The file computes something else.
        ProviderError: ``verify=True`` without ONNX Runtime.
        ExportError: Anything else: arguments that mean nothing, an existing file, a model that
            cannot be captured or is random, a full disk.
    """
    _check_arguments(model, adapters, dtype, opset)
    if task is not None:
        find_task(task)
        if dynamic_shapes is not None:
            raise ExportError(
                f"task={task!r} says which axes are dynamic: leave dynamic_shapes out"
            )
    if not isinstance(path, str | os.PathLike):
        raise ExportError(f"path is a {type(path).__name__}: give the name of the file to write")
    target = Path(path)
    check_target(target, force=force)
    _require_packages()
    clock = Stages(progress)

    clock.start("capturing the model")
    preparing = prepare if adapters == "merge" else prepare_swappable
    *beside, main = preparing(model, example_inputs, dtype, task)
    options = _Options(opset, verify, external_data_bytes, clock)
    with staging(target) as stage:
        encoder: ExportReport | None = None
        for prepared in beside:
            place = stage.companion(prepared.name)
            encoder = _write_part(prepared, None, place, options)
            main = main.beside(prepared.name, place.target.name)
            clock.start("capturing the model")
        report = _write_part(main, dynamic_shapes, stage, options)
        clock.start("moving into place")
        stage.commit(force=force)
    clock.stop()
    return dataclasses.replace(report, task=task, seconds=clock.seconds, encoder=encoder)


@dataclass(frozen=True)
class _Options:
    opset: int | None
    verify: bool
    external_data_bytes: int
    clock: Stages


def _write_part(
    prepared: Prepared, dynamic_shapes: object, stage: Staging, options: _Options
) -> ExportReport:
    """Write one file into its staging folder and compare it there."""
    clock, opset = options.clock, options.opset
    if dynamic_shapes is None:
        dynamic_shapes = prepared.dynamic_shapes
    if opset is None:
        opset = BF16_OPSET if prepared.dtype == "bf16" else DEFAULT_OPSET
    with torch_export_context():
        traced = trace(prepared.model, prepared.arguments, dynamic_shapes)
    failures: list[str] = []
    while True:
        assert traced is not None
        try:
            clock.start("converting to ONNX")
            program = convert(traced, prepared, opset)
            clock.start("writing the file")
            size, external = write(program, stage, options.external_data_bytes)
            verdict = Verdict(reason="verify=False")
            if options.verify:
                clock.start("comparing with PyTorch in ONNX Runtime")
                verdict = verify_file(prepared, traced, stage.model)
            break
        except (ConversionError, ParityError) as error:
            # What a model does with sizes may be no ONNX: with fewer dynamic axes it may be one.
            failures.append(f"{traced.description}: {headline(error)}")
            clock.start("capturing the model with fewer dynamic axes")
            with torch_export_context():
                traced = trace(
                    prepared.model,
                    prepared.arguments,
                    dynamic_shapes,
                    failures,
                    traced.attempt + 1,
                )
            if traced is None:
                raise
            _log.warning("export with fewer dynamic axes: %s", failures[-1])
    return ExportReport(
        path=str(stage.target),
        size_bytes=size,
        data_file=stage.data.name if external else None,
        opset=opset,
        dtype=prepared.dtype,
        unverified_reason=verdict.reason,
        provider=verdict.provider,
        seconds={},
        swappable=tuple(site.name for site in prepared.manifest.sites) if prepared.manifest else (),
        **graph_facts(traced, program, verdict.parity),
    )


def _check_arguments(model: object, adapters: str, dtype: str | None, opset: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if adapters not in ("merge", "inputs"):
        raise ExportError(
            f"adapters={adapters!r} is unknown: give 'merge', which folds them into the weights, or "
            f"'inputs', which keeps them swappable"
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
