"""``export_onnx``: capture, convert, name, write, compare, move into place.

The one file besides ``session.py`` that imports onnx, and only when it is called.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from lora_fx.errors import ExportError, ParityError, ProviderError
from lora_fx.export.arguments import Arguments, FlatModel, cast_floating
from lora_fx.export.convert import ConversionError, convert, torch_export_context
from lora_fx.export.facts import graph_facts
from lora_fx.export.parity import Parity, check_parity
from lora_fx.export.placement import Staging, check_target, staging, write_errors
from lora_fx.export.report import ExportReport
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import Trace, headline, trace, widen_batch
from lora_fx.export.twin import DTYPES, dtype_name, exportable_twin, unwrapped

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BF16_OPSET", "DEFAULT_OPSET", "EXTERNAL_DATA_BYTES", "export_onnx"]

_log = logging.getLogger("lora_fx")

DEFAULT_OPSET = 20
BF16_OPSET = 22  # the first in which convolutions and pooling take bf16
_OPSETS = (18, 19, 20, 21, 22, 24)

# Bytes of weights from which they go into a file of their own: a model file ends at 2 GB.
EXTERNAL_DATA_BYTES = 1536 * 1024**2


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
    if not isinstance(path, str | os.PathLike):
        raise ExportError(f"path is a {type(path).__name__}: give the name of the file to write")
    target = Path(path)
    check_target(target, force=force)
    _require_packages()
    clock = _Stages(progress)

    clock.start("capturing the model")
    twin = exportable_twin(_merged(unwrapped(model)), dtype)
    arguments = Arguments.of(twin, example_inputs)
    if dtype is not None:
        arguments = arguments.replace(cast_floating(arguments.tensors, DTYPES[dtype]))
    flat, arguments, outputs = _first_run(twin, arguments)
    with torch_export_context():
        traced = trace(flat, arguments, dynamic_shapes)
    for name, value in arguments.baked.items():
        _log.info("argument '%s' is no tensor: its value %s is fixed in the file", name, value)

    stored = dtype_name(twin)
    if opset is None:
        opset = BF16_OPSET if stored == "bf16" else DEFAULT_OPSET
    failures: list[str] = []
    while True:
        assert traced is not None
        try:
            clock.start("converting to ONNX")
            program = convert(traced, twin, outputs, stored, opset)
            with staging(target) as stage:
                clock.start("writing the file")
                size, external = _write(program, stage, external_data_bytes)
                parity, provider, reason = None, "", "verify=False"
                if verify:
                    clock.start("comparing with PyTorch in ONNX Runtime")
                    parity, provider, reason = _verify(flat, traced, stage.model, stored)
                clock.start("moving into place")
                stage.commit(force=force)
                data = stage.data.name if external else None
            break
        except (ConversionError, ParityError) as error:
            # What a model does with sizes may be no ONNX: with fewer dynamic axes it may be one.
            failures.append(f"{traced.description}: {headline(error)}")
            clock.start("capturing the model with fewer dynamic axes")
            with torch_export_context():
                traced = trace(flat, arguments, dynamic_shapes, failures, traced.attempt + 1)
            if traced is None:
                raise
            _log.warning("export with fewer dynamic axes: %s", failures[-1])
    clock.stop()
    return ExportReport(
        path=str(target),
        size_bytes=size,
        data_file=data,
        opset=opset,
        dtype=stored,
        unverified_reason="" if parity else reason,
        provider=provider,
        seconds=clock.seconds,
        **graph_facts(traced, program, parity),
    )


class _Stages:
    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._open: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        self.stop()
        self._open = (stage, time.perf_counter())
        _log.info("export: %s", stage)
        if self._progress is not None:
            self._progress(stage)

    def stop(self) -> None:
        if self._open is not None:
            stage, began = self._open
            self.seconds[stage] = time.perf_counter() - began
            self._open = None


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


def _merged(model: nn.Module) -> nn.Module:
    if "_lora_fx" not in vars(model):  # the record that a rewrite leaves on the root module
        return model
    from lora_fx.passes.merge import merge

    merged, report = merge(model)
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


def _write(model: ir.Model, stage: Staging, limit: int) -> tuple[int, bool]:
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = size > limit
    with write_errors(stage.target, size):
        ir.save(model, stage.model, external_data=stage.data.name if external else None)
        files = [file for file in (stage.model, stage.data) if file.exists()]
        return sum(file.stat().st_size for file in files), stage.data in files


def _verify(
    flat: FlatModel, traced: Trace, file: Path, dtype: str
) -> tuple[Parity | None, str, str]:
    try:
        session = OnnxSession(file, "cpu")
    except ProviderError:
        if dtype != "bf16":
            raise
        # The CPU provider lacks bf16 kernels; a GPU has them.
        try:
            session = OnnxSession(file, "cuda")
        except ProviderError as error:
            reason = "ONNX Runtime runs bf16 on its cuda provider only, and this machine has none"
            _log.warning("not compared with PyTorch: %s: %s", reason, error)
            return None, "", reason
    except ExportError as error:
        raise ConversionError(
            f"ONNX Runtime refuses the exported file, so nothing was written: {error.__cause__}"
        ) from error
    return check_parity(flat, traced, session), session.provider, ""
