"""Function ``export_onnx``: capture, convert, write, compare, and move into place.

Nothing here imports onnx or ONNX Runtime before an export begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ExportError, OutputPathError, ParityError, some
from lora_fx.export.arguments import Sizes
from lora_fx.export.convert import (
    ConversionError,
    convert,
    shield_half_inputs,
    shield_padded_pools,
    torch_export_context,
)
from lora_fx.export.copy import DTYPES, stored_formats, unwrapped
from lora_fx.export.failures import headline
from lora_fx.export.fuse import (
    ADAPTER_NODES_KEY,
    Fused,
    Level,
    Provider,
    Target,
    adapter_nodes,
    fuse,
    guard_ids,
    guard_sizes,
)
from lora_fx.export.fuse import check_target as check_fusions
from lora_fx.export.prepare import (
    DEFAULT_RANK,
    Prepared,
    over_quantized,
    prepare,
    prepare_bank,
    prepare_swappable,
)
from lora_fx.export.providers import ProviderName, chosen_provider
from lora_fx.export.quantize import (
    QUANTIZED_TOLERANCES,
    QuantizedScheme,
    check_dense,
    check_scheme,
    quantized_graph,
)
from lora_fx.export.report import ExportReport, StoredFormat
from lora_fx.export.staging import (
    EXTERNAL_DATA_BYTES,
    SHARD_BYTES,
    Scratch,
    Staging,
    check_target,
    staging,
    write,
)
from lora_fx.export.targets import (
    ProgramTarget,
    RuntimeTarget,
    TaskName,
    TracedProgram,
    Written,
    find_runtime,
)
from lora_fx.export.tasks import find_task
from lora_fx.export.trace import Trace, trace
from lora_fx.export.verify import Parity, PrecisionError
from lora_fx.export.verify import verify as verify_file
from lora_fx.extras import load_optional
from lora_fx.files import output_file
from lora_fx.ir import record_of
from lora_fx.passes.capture import ONE_AT_A_TIME
from lora_fx.passes.parameters import check_intact, check_whole
from lora_fx.passes.trainers import copy_without_trainers, instance_forwards
from lora_fx.runtime.kernels import without_autocast
from lora_fx.versions import installed

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_operators", "export_onnx", "node_count"]


_log = logging.getLogger("lora_fx")


class _Stages:
    """Clock of the stages of an export. One stage is open at a time.

    Attributes:
        seconds: Wall-clock seconds of each stage, in order, summed over its runs.
    """

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._open: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        """End the open stage and begin another."""
        self.stop()
        self._open = (stage, time.perf_counter())
        _log.info("export: %s", stage)
        if self._progress is not None:
            self._progress(stage)

    def stop(self) -> None:
        """End the open stage."""
        if self._open is not None:
            stage, began = self._open
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            self._open = None


_PACKAGES: tuple[str, ...] = ("lora-fx", "torch", "onnx", "onnxscript", "onnx-ir")
_PACKAGES += ("onnxruntime", "onnxruntime-gpu", "openvino", "executorch")


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Summary of a written file, for the report.

    Attributes:
        operators: Number of nodes of each operator.
        initializers: Number of weights.
        outputs: Axes of each output.
        metadata: Metadata entries.
    """

    operators: Counter[str]
    initializers: int
    outputs: Mapping[str, tuple[int | str, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def of_graph(cls, model: ir.Model) -> _Contents:
        """Summarize an ONNX graph."""
        return cls(
            Counter(node.op_type for node in model.graph.all_nodes()),
            len(model.graph.initializers),
            {str(value.name): _axes_of(value) for value in model.graph.outputs},
            dict(model.metadata_props),
        )

    @classmethod
    def of_program(cls, program: TracedProgram) -> _Contents:
        """Summarize a program of ``torch.export``."""
        weights = len(program.trace.program.state_dict)
        return cls(program.operators(), weights, program.output_axes(), program.metadata())


def _graph_facts(trace: Trace, contents: _Contents, parity: Parity) -> dict[str, Any]:
    """Return the fields of an ``ExportReport`` about the contents of the file and its comparison."""

    def by_name(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return dict(zip(trace.arguments.names, sizes, strict=True))

    axes = dict(zip(trace.arguments.names, trace.axes, strict=True))
    return {
        "nodes": contents.operators.total(),
        "operators": dict(contents.operators.most_common()),
        "initializers": contents.initializers,
        "inputs": {name: tuple(axis.label for axis in row) for name, row in axes.items()},
        "outputs": dict(contents.outputs),
        "dynamic_axes": trace.dynamic_axes(),
        "axis_limits": trace.axis_limits(),
        "fixed_axes": {
            f"{name}[{index}]": axis.reason
            for name, row in axes.items()
            for index, axis in enumerate(row)
            if axis.name is None
        },
        "baked_arguments": dict(trace.arguments.baked),
        "finite": trace.finite,
        "verified": not parity.reason,
        "unverified_reason": parity.reason,
        "provider": parity.provider,
        "reference": parity.reference,
        "parity": tuple(parity.rows.values()),
        "shapes_tried": tuple(map(by_name, parity.tried)),
        "values_tried": parity.note,
        "shapes_skipped": {
            ", ".join(f"{name} {list(size)}" for name, size in by_name(sizes).items()): reason
            for sizes, reason in parity.skipped.items()
        },
        "metadata": dict(contents.metadata),
        "versions": _versions(),
    }


def node_count(path: Path) -> int:
    """Return the number of nodes of a file, nodes in subgraphs included."""
    import onnx_ir as ir

    return sum(1 for _ in ir.load(path).graph.all_nodes())


def check_operators(path: Path) -> None:
    """Check a file with ONNX's checker and its strict shape inference.

    Raises:
        Exception: Any error of onnx, if one of them refuses the file.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(
        onnx.load(str(path)), check_type=True, strict_mode=True, data_prop=True
    )


def _axes_of(value: ir.Value) -> tuple[int | str, ...]:
    shape = () if value.shape is None else value.shape
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in shape)


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


_QUANTIZED_KEY = "lora_fx.quantized"
_DEFAULT_OPSET = 20, "the highest that ONNX Runtime's CPU and CUDA providers run in fp32 and fp16"
_BF16_OPSET = 22, "the first in which convolutions and pooling take bf16"


@dataclasses.dataclass(frozen=True)
class _FileOptions:
    """Options of every file of an export; see :func:`export_onnx`."""

    opset: int | None
    optimize: Level
    provider: Provider
    verify: bool
    quantize: QuantizedScheme | None
    external_data_bytes: int
    shard_bytes: int

    def check(self) -> None:
        """Raise if ``external_data_bytes`` or ``shard_bytes`` is not a valid number of bytes.

        Raises:
            ExportError: The message names the argument.
        """
        for name, least in (("external_data_bytes", 0), ("shard_bytes", 1)):
            size: object = getattr(self, name)
            if not isinstance(size, int) or size < least:
                raise ExportError(f"{name}={size!r}: give a number of bytes, {least} or more")

    def opset_for(self, dtype: str) -> tuple[int, str]:
        """Return the opset of a file in a dtype, and the reason for it."""
        if self.opset is not None:
            return self.opset, "asked for"
        return _BF16_OPSET if dtype == "bf16" else _DEFAULT_OPSET


@dataclasses.dataclass(frozen=True)
class _Export:
    """An export in progress, of one file or of several.

    Attributes:
        options: Options of every file.
        scratch: Storage of new weights.
        clock: Clock of the stages.
        adapt: Function that changes a finished graph for its runtime; None for no changes.
        runtime: The runtime that takes a program instead of an ONNX file; None for ONNX.
        rank: The rank that factors are padded to; None for any.
    """

    options: _FileOptions
    scratch: Scratch
    clock: _Stages
    adapt: Callable[[ir.Model], None] | None
    runtime: ProgramTarget | None = None
    rank: int | None = None

    def build(
        self, prepared: Prepared, stage: Staging, dynamic_shapes: object = None
    ) -> ExportReport:
        """Write the file of a model into its staging folder.

        Args:
            prepared: The model.
            stage: The staging folder. The file is not moved into place.
            dynamic_shapes: Dynamic axes from the user; None for those of the task, or for all possible axes.

        Returns:
            The report of this file, without the stages and other facts of the whole export.

        Raises:
            ParityError: The outputs of the file differ.
            ExportError: The model cannot be captured or converted, or the disk is full.
        """
        options = self.options
        opset, why = (0, "") if self.runtime else options.opset_for(prepared.dtype)
        failures: list[str] = []
        traceable = prepared.to_trace(self.scratch.keep)
        if self.runtime is not None and not self.runtime.dynamic:
            dynamic_shapes = {}
        traced = _traced(traceable, dynamic_shapes, failures, 0)
        while True:
            assert traced is not None
            try:
                if self.runtime is not None:
                    written = self._write_program(self.runtime, traced, traceable, prepared, stage)
                    break
                self.clock.start("converting to ONNX")
                converted = self._converted(traced, traceable, opset)
                _, version = installed("onnxruntime")
                target = Target(options.optimize, options.provider, prepared.dtype, version)
                prove = partial(self._prove, prepared, traced, stage)
                written = self._write_fused(converted, traceable, target, stage, prove)
                break
            except PrecisionError:
                raise
            except (ConversionError, ParityError) as error:
                # ONNX may be unable to compute the model's sizes from dynamic axes, so try fewer of them.
                failures.append(f"{traced.description}: {headline(error)}")
                stage.discard()
                self.clock.start("capturing the model with fewer dynamic axes")
                traced = _traced(traceable, dynamic_shapes, failures, traced.attempt + 1)
                if traced is None:
                    raise
                _log.warning("export with fewer dynamic axes: %s", failures[-1])
        written = self._quantized(written, stage, partial(self._prove, prepared, traced, stage))
        manifest = traceable.manifest
        return ExportReport(
            path=str(stage.target),
            files=written.files,
            opset=opset,
            opset_reason=why,
            dtype=traceable.dtype,
            quantized=written.quantized,
            seconds={},
            swappable=tuple(target.name for target in manifest.targets) if manifest else (),
            bank=manifest.bank if manifest else None,
            merged=traceable.merged,
            adapter_nodes=tuple(json.loads(written.contents.metadata.get(ADAPTER_NODES_KEY, "[]"))),
            optimize=written.target.level,
            fused=dict(written.fused.done),
            not_fused={**written.fused.refused, **written.fallbacks},
            **_graph_facts(traced, written.contents, written.parity),
        )

    def _converted(self, traced: Trace, traceable: Prepared, opset: int) -> ir.Model:
        """Return the ONNX graph of a trace. Deferred weights are computed when they are written."""
        deferred = self.scratch.deferred
        defaults = traceable.defaults()  # read here, because deferred weights have no values below
        while True:
            with torch_private.disable_dispatch_modes():
                converted = convert(traced, traceable, opset, defaults)
            if deferred.link(converted, _read_by(traced)):
                return converted

    def _write_program(
        self,
        runtime: ProgramTarget,
        traced: Trace,
        traceable: Prepared,
        prepared: Prepared,
        stage: Staging,
    ) -> _Written:
        """Write a program for its runtime, and compare it there.

        Raises:
            ParityError: The outputs of the program differ.
            ExportError: The runtime does not take the program.
        """
        self.clock.start(f"converting to {runtime.runtime}")
        program = TracedProgram(traced, traceable, self.rank)
        runtime.write(program, stage)
        files = {file.name: file.stat().st_size for file in stage.written()}
        parity = Parity(reason="verify=False")
        if self.options.verify:
            self.clock.start(f"comparing with PyTorch in {runtime.runtime}")
            loaded = runtime.loaded(program, stage.model)
            parity = verify_file(prepared, traced, stage.model, self.scratch.keep, loaded=loaded)
        target = Target("none", self.options.provider, prepared.dtype)
        return _Written(_Contents.of_program(program), None, files, (), parity, target, Fused(), {})

    def _store(self, model: ir.Model, stage: Staging) -> Mapping[str, int]:
        """Write a graph into its staging folder, and return the sizes of its files in bytes."""
        if self.adapt is not None:
            self.adapt(model)
        for value in model.graph.initializers.values():
            # Quantizers transpose matrices without updating the shape that is stored a second time here.
            if not value.is_graph_input():
                value.shape = value.type = None
        self.clock.start("writing the file")
        options = self.options
        return write(model, stage, options.external_data_bytes, options.shard_bytes)

    def _prove(
        self, prepared: Prepared, traced: Trace, stage: Staging, tolerance: float | None = None
    ) -> Parity:
        """Compare the written file with the model, unless ``verify=False``."""
        if not self.options.verify:
            return Parity(reason="verify=False")
        self.clock.start("comparing with PyTorch in ONNX Runtime")
        large = stage.has_data()
        return verify_file(
            prepared, traced, stage.model, self.scratch.keep, large=large, tolerance=tolerance
        )

    def _quantized(
        self, written: _Written, stage: Staging, prove: Callable[[float], Parity]
    ) -> _Written:
        """Replace a file that matches the model by one with quantized weights.

        Raises:
            ParityError: The outputs differ by more than quantization explains.
        """
        scheme = self.options.quantize
        if scheme is None:
            return written
        assert written.model is not None
        self.clock.start("quantizing")
        readers = json.loads(written.contents.metadata.get(ADAPTER_NODES_KEY, "[]"))
        model, form = quantized_graph(written.model, scheme, readers)
        model.metadata_props[_QUANTIZED_KEY] = json.dumps([dataclasses.asdict(form)])
        stage.discard()
        files = self._store(model, stage)
        parity = prove(QUANTIZED_TOLERANCES[scheme])
        contents = _Contents.of_graph(model)
        return dataclasses.replace(
            written, contents=contents, model=model, files=files, quantized=(form,), parity=parity
        )

    def _write_fused(
        self,
        converted: ir.Model,
        traceable: Prepared,
        target: Target,
        stage: Staging,
        prove: Callable[[], Parity],
    ) -> _Written:
        """Write a graph with its fusions, or with fewer fusions if the file does not match the model.

        Args:
            converted: The graph. It is not changed.
            traceable: The model that was traced.
            target: Target of the fusions.
            stage: The staging folder.
            prove: Compares the written file with the model.

        Raises:
            ParityError: The outputs of the file differ even without fusions.
            ConversionError: ONNX Runtime refuses the file.
        """
        fallbacks: dict[str, str] = {}
        while True:
            model = converted if target.level == "none" else converted.clone()
            fused = fuse(model, target)
            manifest = traceable.manifest
            readers = adapter_nodes(model, manifest)
            if readers:
                model.metadata_props[ADAPTER_NODES_KEY] = json.dumps(readers)
            if manifest is not None and manifest.bank is not None:
                guard_ids(model, manifest)
            elif manifest is not None and manifest.required:
                guard_sizes(model, manifest)
            shield_half_inputs(model)
            shield_padded_pools(model)
            names = converted.graph.initializers, model.graph.initializers
            forms = stored_formats(traceable.model.model, *names)
            if forms:
                described = json.dumps([dataclasses.asdict(form) for form in forms])
                model.metadata_props[_QUANTIZED_KEY] = described
            files = self._store(model, stage)
            try:
                contents = _Contents.of_graph(model)
                return _Written(contents, model, files, forms, prove(), target, fused, fallbacks)
            except (ConversionError, ParityError) as error:
                lower = target.lower()
                if lower is None or not fused.done:
                    raise
                fallbacks[f"optimize={target.level!r}"] = headline(error)
                _log.warning("export with fewer fusions: %s", headline(error))
                stage.discard()
                self.clock.start("converting to ONNX")
                target = lower


@dataclasses.dataclass(frozen=True)
class _Written:
    """File that was written and compared.

    Attributes:
        contents: Contents of the file.
        model: The graph of an ONNX file; None for a program of another runtime.
        files: Sizes of all files by name, in bytes.
        quantized: The formats of its quantized weights.
        parity: Result of the comparison.
        target: Target of the fusions in the written file.
        fused: The fusions.
        fallbacks: Errors of files with more fusions, by level of fusion.
    """

    contents: _Contents
    model: ir.Model | None
    files: Mapping[str, int]
    quantized: tuple[StoredFormat, ...]
    parity: Parity
    target: Target
    fused: Fused
    fallbacks: Mapping[str, str]


def _traced(
    prepared: Prepared, dynamic_shapes: object, failures: list[str], attempt: int
) -> Trace | None:
    task = dynamic_shapes is None and prepared.dynamic_shapes is not None
    wanted = prepared.dynamic_shapes if task else dynamic_shapes
    # A trace reads no values of weights.
    with torch_private.disable_dispatch_modes(), torch_export_context():
        return trace(prepared.model, prepared.arguments, wanted, failures, attempt, task=task)


def _read_by(traced: Trace) -> list[Tensor]:
    """Return the weights that a trace reads."""
    signature = traced.program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return [
        traced.program.state_dict[names[node.name]]
        for node in traced.program.graph.find_nodes(op="placeholder")
        if node.users and names.get(node.name) in traced.program.state_dict
    ]


@contextlib.contextmanager
def _without_ambient_autocast(model: nn.Module) -> Iterator[None]:
    """Switch autocast off on the model's devices, because it would be traced.

    The dtype of a file is an argument. Autocast inside of the model's forward is not affected.
    """
    # The CPU is always included, because weights are merged and cast on it.
    kinds = {"cpu", *(tensor.device.type for tensor in model.parameters())}
    with contextlib.ExitStack() as stack:
        for kind in sorted(kinds):
            stack.enter_context(without_autocast(kind))
        yield


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _refuse_nan(model: nn.Module) -> None:
    """Raise if a parameter or buffer has NaN, because outputs with NaN cannot be compared.

    Infinite values are allowed, because masks contain them.

    Raises:
        ExportError: The message names the tensors with NaN.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    broken = [name for name, value in named if _has_nan(value)]
    if broken:
        raise ExportError(
            f"{some(broken)} of {type(model).__name__} hold NaN: the training diverged, or "
            "the weights were not loaded"
        )


@torch.no_grad()
def _has_nan(value: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.layout is torch.strided
    if not plain or value.is_meta or value.dtype not in _DTYPES or not value.numel():
        return False
    return bool(value.amax().isnan())  # amax returns NaN if there is any


_OPSETS = (18, 19, 20, 21, 22, 24)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: object,
    *,
    task: Literal["text-generation", "text2text-generation"] | None = None,
    target: Literal["genai", "transformers.js", "openvino", "executorch"] | None = None,
    tokenizer: Any = None,
    adapters: Literal["merge", "inline", "inputs", "bank"] | None = None,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    required_inputs: bool = False,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    dynamic_shapes: object = None,
    opset: int | None = None,
    optimize: Level = "standard",
    provider: ProviderName | None = None,
    quantize: QuantizedScheme | None = None,
    verify: bool = True,
    force: bool | None = None,
    progress: Callable[[str], None] | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    shard_bytes: int = SHARD_BYTES,
) -> ExportReport:
    """Write ``model`` as an ONNX file that was checked against PyTorch.

    The file appears at ``path`` only after the check. Until then, and after any error, an earlier file at
    ``path`` stays. The model and its modes are not changed. Autocast around the call has no effect: ``dtype``
    sets the precision of the file.

    Args:
        model: Any module. Its adapters of lora_fx are merged first, or become inputs. Adapters of PEFT
            and of other libraries stay separate products in the file, with a warning in the log.
        path: The file to write, with the suffix ``.onnx``.
        example_inputs: A tuple (args), a dict (kwargs) or a single tensor. Values matter,
            because the check draws fresh values from their range. Sizes of 1 cannot become dynamic, but a
            batch of one is widened.
        task: Purpose of the file. None to export the model as it is called, or for the task of its target.
            "text-generation" for a decoder with its key-value cache as inputs and outputs, which
            ``OnnxSession.generate`` runs. "text2text-generation" for an encoder-decoder, whose
            encoder goes into a second file ``STEM.xxxxxxxx.encoder.onnx``. The example is token
            ids (or inputs of the encoder). The task adds mask, cache and dynamic axes.
            ``{"input_ids": ids, "logits_to_keep": 0}`` asks for the logits of all positions
            instead of the last one.
        target: Runtime that needs more than one file; ``path`` is then a folder.
            "genai" for onnxruntime-genai (``og.Model(path)``), with ``genai_config.json``, the tokenizer, and
            with ``adapters="inputs"`` each adapter of the model in ``adapters/NAME.onnx_adapter``.
            "transformers.js" for a browser or Node, with ``onnx/model.onnx``, ``config.json`` and the
            tokenizer. "openvino" for an IR of OpenVINO, and "executorch" for a program of ExecuTorch, whose
            axes are those of the example. Both have no ONNX file; with ``adapters="inputs"`` each adapter of
            the model is a file in ``adapters/``.
            None for one file, which ``OnnxSession`` and any other runtime load.
        tokenizer: Tokenizer for the folder of a target: an object with ``save_pretrained``, or the folder
            that it was saved in.
        adapters: "merge" to fold adapters into the weights, which makes a quantized model dense. A model that
            was rewritten with ``deploy`` is always merged, and keeps its format. "inline"
            to keep active adapters in the file as separate products.
            "inputs" for a file of the base model that takes an adapter of any rank at every site of the
            model's adapters. For a model without adapters, the sites are all linear operations but the head;
            rewrite it to choose other sites. ``save_onnx_adapter`` writes adapters for the file, and
            ``OnnxSession`` runs them.
            "bank" for the same with many adapters at once. The file has the model's adapters and takes more.
            Its input ``adapter_ids``, [batch] or [1], selects the adapter of each row, -1 for none. A number
            that no adapter has is an error, or gives NaN in the outputs of its row. None for
            "inline" if an active adapter is at a quantized weight, else for "merge".
        max_adapters: With "bank", the largest number of adapters; None for the number in the model, and at
            least 8.
        max_rank: With "bank", and with "inputs" for OpenVINO and ExecuTorch, the highest rank, to which all
            adapters are padded; None for the highest in the model, and 16 for a model without adapters.
        required_inputs: True for a file without inputs that have a default, for consumers other than
            ``OnnxSession``: many runtimes do not feed such inputs, and many tools take them out. With
            "inputs", every factor is then a required input, and the file does not run alone. With "bank",
            the adapters are constants, and no others can be loaded. ``adapter_ids`` is required in any case.
        dtype: "fp32", "fp16", "bf16" to export the model cast to it, floating inputs included;
            None to keep the model's dtypes. A half-precision file is compared with the model in fp32, its
            weights rounded to half precision. The tolerance is that of the dtype.
        dynamic_shapes: None to make all possible axes dynamic. If that file does not match the model, only
            the first axis or none is dynamic. Else names of axes by input name and axis, with all other
            axes fixed.
        opset: ONNX opset, 18 to 22 or 24. None for the opset that providers run best: 20, and 22
            for bf16, the first with bf16 in convolutions and pooling. 23 is refused, because its files
            have rotary embeddings that ONNX Runtime rejects for batches of more than one.
        optimize: Level of fusion. "standard" for operators of ONNX alone, in forms that are right and fast
            on every provider. "runtime" for operators of ONNX Runtime as well, if ``provider`` has kernels
            for them in the file's dtype. "none" for the graph of PyTorch.
            If a fused file does not match the model, the export falls back to fewer fusions, and the
            report says why.
        provider: Provider for ``optimize="runtime"``: "cpu" (None), "cuda" or "webgpu", or ONNX Runtime's
            name of it.
        quantize: "int4" or "int8" to quantize the products of a dense model with ONNX Runtime's own tools,
            after the dense file was compared. Factors of adapters stay as they are. "int4" stores weights in
            blocks of 32 (``MatMulNBits``); "int8" also rounds activations (``MatMulInteger``), and is for
            fp32. The quantized file is compared with the dense model as well: its outputs may differ by 0.5
            ("int4") or 0.1 ("int8") of their largest magnitude.
        verify: Compare the file, run by ONNX Runtime on the CPU, with PyTorch on fresh inputs of
            other shapes.
        force: False to refuse an existing file instead of replacing it. With ``target``, files of another
            content next to the model, such as its ``config.json``, are replaced only if this is True.
        progress: Called with the name of each stage as it begins.
        external_data_bytes: Total bytes of weights above which they are written to separate files next to
            ``path``: 256 MiB by default.
        shard_bytes: Bytes of one such file: 4 GB by default.

    Returns:
        The report of the files, the dynamic and fixed axes, and the differences from PyTorch.

    Raises:
        CaptureError: A layer that has an adapter was deleted or replaced after the rewrite.
        ParityError: The outputs of the file differ.
        OutputPathError: ``path`` is a folder, has another suffix, or exists without ``force``.
        ProviderError: ``verify=True`` without ONNX Runtime.
        NoMatchError: ``adapters="inputs"`` or ``"bank"`` of a model that has neither adapters nor an
            operation to adapt.
        ExportError: All other errors: invalid arguments, a model that cannot be captured or is random, a
            folder without write permission. Also a full disk, with the size of the file.
    """
    chosen = "cpu" if provider is None else chosen_provider(provider)
    options = _FileOptions(
        opset, optimize, chosen, verify, quantize, external_data_bytes, shard_bytes
    )
    adapted = _AdapterOptions(adapters, max_adapters, max_rank, required_inputs)
    _check_arguments(model, adapters, dtype, opset)
    runtime = None if target is None else find_runtime(target)
    program = _program_target(
        runtime,
        dynamic_shapes=dynamic_shapes is not None,
        opset=opset is not None,
        optimize=optimize == "runtime",
        quantize=quantize is not None,
        required_inputs=required_inputs,
    )
    adapted.check(model, target, program)
    check_fusions(optimize, None if provider is None else chosen)
    check_scheme(quantize, optimize)
    options.check()
    task = _task_of(model, task, runtime, dynamic_shapes)
    if runtime is not None:
        runtime.check(task=task, adapters=adapters, dtype=dtype)
    destination = _destination(path, runtime, example_inputs, dtype, tokenizer, force)
    if runtime is not None:
        example_inputs = runtime.example(example_inputs)
    check_target(destination.file, force=force)
    if program is None:
        _require_packages()
    subject = _Subject(_without_trainers(model), example_inputs, dtype, task, dynamic_shapes)
    return _write_files(subject, options, adapted, destination, _Stages(progress))


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The model of an export, and its example call; see :func:`export_onnx`."""

    model: nn.Module
    example_inputs: object
    dtype: Literal["fp32", "fp16", "bf16"] | None
    task: TaskName | None
    dynamic_shapes: object


@dataclasses.dataclass(frozen=True)
class _Destination:
    """Destination of the files, and the runtime that loads them.

    Attributes:
        path: The path that the caller gave.
        file: The model's file.
        data: Name of the only file of weights that the runtime reads; None for any number of them.
        runtime: The runtime that loads a folder; None for a single file.
        tokenizer: The tokenizer for the folder.
        force: As for :func:`export_onnx`.
    """

    path: Path
    file: Path
    data: str | None = None
    runtime: RuntimeTarget | None = None
    tokenizer: Any = None
    force: bool | None = None

    @property
    def program(self) -> ProgramTarget | None:
        """The runtime if it takes a program instead of an ONNX file, else None."""
        return self.runtime if isinstance(self.runtime, ProgramTarget) else None

    def finish(self, model: nn.Module, report: ExportReport, stage: Staging) -> ExportReport:
        """Add the runtime's files to the folder, and return the report with them."""
        if self.runtime is None:
            return report
        file_names = self.runtime.finish(
            Written(model, report, stage.model, stage.folder, self.path, self.tokenizer)
        )
        stage.extras = {file: Path(self.path, name) for file, name in file_names.items()}
        return dataclasses.replace(
            _renamed(report, self.runtime.axes),
            target=self.runtime.name,
            companions={name: file.stat().st_size for file, name in file_names.items()},
        )


def _destination(
    path: str | Path,
    runtime: RuntimeTarget | None,
    example_inputs: object,
    dtype: str | None,
    tokenizer: Any,
    force: bool | None,
) -> _Destination:
    """Return the destination of an export; for the arguments see :func:`export_onnx`.

    Raises:
        ExportError: There is a tokenizer, and no folder for it.
        OutputPathError: The path and the example inputs are swapped, or the path is not valid for a file.
    """
    if runtime is not None:
        file = runtime.file(Path(path), dtype)
        return _Destination(Path(path), file, runtime.data_name(file), runtime, tokenizer, force)
    if tokenizer is not None:
        raise ExportError("tokenizer= goes into the folder of a target: give target= as well")
    if isinstance(example_inputs, str | Path) and not isinstance(path, str | Path):
        raise OutputPathError(
            f"path is a {type(path).__name__}: the file, {str(example_inputs)!r}, comes before the "
            "example inputs"
        )
    file = output_file(path, (".onnx",))
    return _Destination(file, file, force=force)


def _write_files(
    subject: _Subject,
    options: _FileOptions,
    adapted: _AdapterOptions,
    destination: _Destination,
    clock: _Stages,
) -> ExportReport:
    """Write the files of a model whose arguments are checked, and move them into place."""
    model, runtime, program = subject.model, destination.runtime, destination.program
    if destination.data is not None:  # the runtime reads a single file of weights
        options = dataclasses.replace(options, shard_bytes=sys.maxsize)
    with (
        ONE_AT_A_TIME,
        _without_ambient_autocast(model),
        staging(destination.file, destination.data) as stage,
        contextlib.ExitStack() as reading,
    ):
        if program is None:
            scratch = Scratch(stage)
            reading.enter_context(scratch.deferred)
        else:  # its runtime reads the memory of the weights
            scratch = Scratch(stage, deferred_bytes=sys.maxsize)
        rank = _rank_of(model, adapted.rank) if adapted.is_padded(program) else None
        adapt = None if runtime is None else runtime.adapt
        export = _Export(options, scratch, clock, adapt, program, rank)
        clock.start("capturing the model")
        _refuse_nan(model)
        how = adapted.how
        if how is None:
            how = "inline" if over_quantized(unwrapped(model)) else "merge"
        if options.quantize is not None:
            check_dense(unwrapped(model), options.quantize, subject.dtype)
        prepared = _preparation(how, adapted)(
            model, subject.example_inputs, subject.dtype, scratch.keep, subject.task
        )
        if adapted.required:
            prepared = tuple(part.requiring() for part in prepared)
        if program is not None:
            example = None if program.dynamic else subject.example_inputs
            prepared = tuple(part.fixed(example, rank) for part in prepared)
        report = _build_all(export, prepared, stage, subject.dynamic_shapes)
        report = destination.finish(model, report, stage)
        clock.start("moving into place")
        stage.commit(force=destination.force)
    clock.stop()
    return dataclasses.replace(report, task=subject.task, adapters=how, seconds=clock.seconds)


@dataclasses.dataclass(frozen=True)
class _AdapterOptions:
    """The options for adapters in a file; see :func:`export_onnx`.

    Attributes:
        how: "merge", "inline", "inputs" or "bank"; None for the default of the model.
        capacity: The largest number of adapters.
        rank: The highest rank of an adapter.
        required: True for a file without inputs that have a default.
    """

    how: Literal["merge", "inline", "inputs", "bank"] | None
    capacity: int | None
    rank: int | None
    required: bool

    def is_padded(self, program: ProgramTarget | None) -> bool:
        """Return True if all factors of a file have one rank, as in a program that takes adapters."""
        return program is not None and self.how == "inputs"

    def check(self, model: nn.Module, target: str | None, program: ProgramTarget | None) -> None:
        """Raise for options that exclude each other.

        Args:
            model: The model.
            target: As for :func:`export_onnx`.
            program: The target if it takes a program.

        Raises:
            ExportError: The message names the argument.
        """
        if self.is_padded(program) and self.capacity is None:
            if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
                raise ExportError(f"max_rank={self.rank!r}: give a whole number of at least 1")
        elif self.how != "bank" and (self.capacity, self.rank) != (None, None):
            raise ExportError("max_adapters and max_rank are of adapters='bank': leave them out")
        if self.required:
            _check_required(model, target, self)


def _program_target(
    runtime: RuntimeTarget | ProgramTarget | None, *, dynamic_shapes: bool, **onnx_only: bool
) -> ProgramTarget | None:
    """Return the target if its runtime takes a program instead of an ONNX file, else None.

    Args:
        runtime: The target of the export, or None.
        dynamic_shapes: True if the caller names dynamic axes.
        onnx_only: Arguments that only ONNX files have, by name: True if the caller sets it.

    Raises:
        ExportError: An argument has no meaning for the target. The message names it.
    """
    if not isinstance(runtime, ProgramTarget):
        return None
    program = runtime
    for name, is_given in onnx_only.items():
        if is_given:
            raise ExportError(
                f"target={program.name!r} writes no ONNX file, so it has no {name}: leave it out"
            )
    if dynamic_shapes and not program.dynamic:
        raise ExportError(
            f"target={program.name!r} plans memory for the sizes of the example: leave dynamic_shapes out, "
            "and give an example of the largest size"
        )
    return program


def _rank_of(model: nn.Module, max_rank: int | None) -> int:
    """Return the rank that all factors are padded to, in a file that fixes the rank.

    Raises:
        ExportError: An adapter of the model has a higher rank than the caller asks for.
    """
    record = record_of(unwrapped(model))
    adapters = () if record is None else record.adapters.values()
    highest = max((row.rank for adapter in adapters for row in adapter.sites), default=0)
    if max_rank is not None and max_rank < highest:
        raise ExportError(
            f"max_rank={max_rank} is below the rank {highest} of an adapter of the model: give {highest} "
            "or more, or leave it out"
        )
    return max_rank or highest or DEFAULT_RANK


def _check_required(model: nn.Module, target: str | None, adapted: _AdapterOptions) -> None:
    """Raise if ``required_inputs=True`` contradicts other arguments.

    Raises:
        ExportError: The message names the argument and the remedy.
    """
    if adapted.how not in ("inputs", "bank"):
        raise ExportError(
            "required_inputs=True is of adapters='inputs' and adapters='bank': other files have no inputs "
            "for adapters. Leave it out"
        )
    if target is not None:
        raise ExportError(
            f"required_inputs=True: {target} runs a file without an adapter as well, which needs the "
            "defaults. Leave it out"
        )
    if adapted.how == "bank":
        if adapted.capacity is not None:
            raise ExportError(
                "max_adapters is for adapters that are loaded later, and with required_inputs=True those of "
                "the model are constants: leave one of them out"
            )
        record = record_of(unwrapped(model))
        if record is None or not record.adapters:
            raise ExportError(
                "required_inputs=True makes constants of the adapters of the model, and it has none: load "
                "some, or leave it out"
            )


def _task_of(
    model: nn.Module, task: TaskName | None, runtime: RuntimeTarget | None, dynamic_shapes: object
) -> TaskName | None:
    """Return the task of an export: the caller's, or that of the runtime for the model.

    Raises:
        ExportError: The task is unknown, or it is given together with dynamic axes.
    """
    if task is None and runtime is not None:
        task = runtime.task(unwrapped(model))
    if task is not None:
        find_task(task)
        if dynamic_shapes is not None:
            raise ExportError(
                f"task={task!r} says which axes are dynamic: leave dynamic_shapes out"
            )
    return task


def _preparation(adapters: str, bank: _AdapterOptions) -> Callable[..., tuple[Prepared, ...]]:
    """Return the function that prepares a model for a value of ``adapters``."""
    preparations: dict[str, Callable[..., tuple[Prepared, ...]]] = {
        "merge": prepare,
        "inline": partial(prepare, merged=False),
        "inputs": prepare_swappable,
        "bank": partial(prepare_bank, capacity=bank.capacity, rank=bank.rank),
    }
    return preparations[adapters]


def _build_all(
    export: _Export, prepared: Sequence[Prepared], stage: Staging, dynamic_shapes: object
) -> ExportReport:
    """Write the files of a model: those of its encoders, and then its own, the last of ``prepared``."""
    *companions, main = prepared
    encoder: ExportReport | None = None
    for part in companions:
        companion = stage.companion(part.name)
        encoder = export.build(part, companion)
        main = main.with_companion(part.name, companion.target.name)
        export.clock.start("capturing the model")
    return dataclasses.replace(export.build(main, stage, dynamic_shapes), encoder=encoder)


def _renamed(report: ExportReport, axes: Mapping[str, str]) -> ExportReport:
    """Return a report with axes renamed by the map ``axes``."""

    def named(
        values: Mapping[str, tuple[int | str, ...]],
    ) -> dict[str, tuple[int | str, ...]]:
        return {
            name: tuple(axes.get(axis, axis) if isinstance(axis, str) else axis for axis in row)
            for name, row in values.items()
        }

    return dataclasses.replace(
        report,
        inputs=named(report.inputs),
        outputs=named(report.outputs),
        dynamic_axes={
            name: {index: axes.get(axis, axis) for index, axis in row.items()}
            for name, row in report.dynamic_axes.items()
        },
        axis_limits={axes.get(name, name): size for name, size in report.axis_limits.items()},
    )


def _check_arguments(
    model: object, adapters: str | None, dtype: str | None, opset: int | None
) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"model is a {type(model).__name__}, not a torch.nn.Module: the model comes first, then the "
            "file, then the example inputs"
        )
    record = record_of(unwrapped(model))
    if record is not None:
        check_intact(unwrapped(model), record)
    check_whole(model.named_parameters(), ExportError)
    if adapters not in ("merge", "inline", "inputs", "bank", None):
        raise ExportError(
            f"adapters={adapters!r} is unknown: give 'merge', which folds them into the weights, 'inline', "
            f"which keeps them beside, 'inputs', which keeps them swappable, or 'bank', which runs one for "
            f"each row of a batch"
        )
    if record is not None and record.deploys and adapters not in ("merge", None):
        raise ExportError(
            f"adapters={adapters!r}: an adapter of the model is trained for a storage of its weights "
            "(deploy=), and only a merge computes that: leave adapters out"
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
    """Return a rewritten model without attributes that trainers set on it: a copy, or the model itself."""
    inner = unwrapped(model)
    record = record_of(inner)
    if record is None or instance_forwards(inner) <= record.forwards:
        return model
    return copy_without_trainers(inner, record.forwards, ExportError)


def _require_packages() -> None:
    # All three are checked first, because torch.onnx imports some of them only halfway through.
    for package in ("onnx", "onnx_ir", "onnxscript"):
        load_optional(package, "the export", "lora-fx[gpu]", "lora-fx[cpu]", error=ExportError)
