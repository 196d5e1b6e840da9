"""``export_onnx``: capture, convert, name, write, compare, move into place.

Nothing here imports onnx or ONNX Runtime before an export begins.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from lora_fx.errors import ExportError, ParityError
from lora_fx.export.convert import ConversionError, convert, torch_export_context
from lora_fx.export.difference import PrecisionError
from lora_fx.export.facts import graph_facts
from lora_fx.export.placement import check_target, staging
from lora_fx.export.prepare import prepare
from lora_fx.export.report import ExportReport
from lora_fx.export.scratch import Scratch
from lora_fx.export.stages import Stages
from lora_fx.export.trace import headline, trace
from lora_fx.export.twin import DTYPES
from lora_fx.export.verify import Verdict
from lora_fx.export.verify import verify as verify_file
from lora_fx.export.write import EXTERNAL_DATA_BYTES, SHARD_BYTES, write

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
    adapters: Literal["merge"] = "merge",
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
    there before is still there. The model is not changed, its modes included.

    Args:
        model: Any module. Adapters in it are merged first.
        path: The file to write.
        example_inputs: A tuple (args), a dict (kwargs) or a single tensor. Values matter: the
            check draws its own from their range. Sizes of 1 cannot become dynamic, but a batch of
            one is widened.
        adapters: "merge".
        dtype: "fp32", "fp16", "bf16" to export the model cast to it, floating inputs included;
            None to keep what it has. A half-precision file is compared with the model in fp32, its
            weights rounded to half precision; the tolerance is that of the dtype.
        dynamic_shapes: None to make every axis dynamic that can be, or where that gives no file which
            is equal to the model, the first axis, or none; else input name to a mapping
            of axis to a name, all other axes being fixed.
        opset: ONNX opset; by default 20, and 22 for bf16.
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
        ParityError: The file computes something else.
        ProviderError: ``verify=True`` without ONNX Runtime.
        ExportError: Anything else: arguments that mean nothing, an existing file, a model that
            cannot be captured or is random, a full disk.
    """
    _check_arguments(model, adapters, dtype, opset)
    if not isinstance(path, str | os.PathLike):
        raise ExportError(f"path is a {type(path).__name__}: give the name of the file to write")
    target = Path(path)
    check_target(target, force=force)
    _require_packages()
    clock = Stages(progress)

    with staging(target) as stage:
        scratch = Scratch(stage)
        clock.start("capturing the model")
        prepared = prepare(model, example_inputs, dtype, scratch.keep)
        with torch_export_context():
            traced = trace(prepared.model, prepared.arguments, dynamic_shapes)
        if opset is None:
            opset = BF16_OPSET if prepared.dtype == "bf16" else DEFAULT_OPSET
        failures: list[str] = []
        while True:
            assert traced is not None
            try:
                clock.start("converting to ONNX")
                program = convert(traced, prepared, opset)
                clock.start("writing the file")
                files = write(program, stage, external_data_bytes, shard_bytes)
                verdict = Verdict(reason="verify=False")
                if verify:
                    clock.start("comparing with PyTorch in ONNX Runtime")
                    large = len(files) > 1
                    verdict = verify_file(prepared, traced, stage.model, scratch.keep, large=large)
                break
            except PrecisionError:
                raise
            except (ConversionError, ParityError) as error:
                # What a model does with sizes may be no ONNX: with fewer dynamic axes it may be one.
                failures.append(f"{traced.description}: {headline(error)}")
                stage.discard()
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
        clock.start("moving into place")
        stage.commit(force=force)
    clock.stop()
    return ExportReport(
        path=str(target),
        files=files,
        opset=opset,
        dtype=prepared.dtype,
        unverified_reason=verdict.reason,
        provider=verdict.provider,
        reference=verdict.reference,
        seconds=clock.seconds,
        **graph_facts(traced, program, verdict.parity),
    )


def _check_arguments(model: object, adapters: str, dtype: str | None, opset: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if adapters != "merge":
        raise ExportError(
            f"adapters={adapters!r} is not supported: only 'merge', which folds them into the "
            f"weights"
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
