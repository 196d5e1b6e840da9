"""``target="executorch"``: ``model.pte`` for ExecuTorch, with XNNPACK for the operations that it has.

Axes are fixed, because ExecuTorch plans memory for the sizes of the example. So all factors have the same
rank. An adapter is a file of named tensors, ``NAME.ptd``, which ``FlatTensorDataMap`` of ExecuTorch reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import ExportError, some
from lora_fx.export.staging import Staging, write_errors
from lora_fx.export.targets.programs import (
    ProgramSession,
    ProgramTarget,
    TracedProgram,
    direct_products,
)
from lora_fx.extras import load_optional

__all__ = ["ExecutorchTarget"]

_ALIGNMENT = 16  # bytes, as ExecuTorch aligns tensors in a program


def _load(module: str, attribute: str = "") -> Any:
    return load_optional(
        f"executorch.{module}",
        "target='executorch'",
        "lora-fx[executorch]",
        attribute=attribute,
        error=ExportError,
    )


class ExecutorchTarget(ProgramTarget):
    """Target for ExecuTorch."""

    name = "executorch"
    runtime = "ExecuTorch"
    package = "executorch"
    model = "model.pte"
    dynamic = False

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Raise for options that ExecuTorch does not support, or if its package is missing."""
        super().check(task=task, adapters=adapters, dtype=dtype)
        _load("exir")

    def write(self, program: TracedProgram, stage: Staging) -> None:
        """Lower a program to ExecuTorch, and write it."""
        self.refuse_quantized(program)
        _refuse_gains(program)
        lower = _load("exir", "to_edge_transform_and_lower")
        partitioner = _load("backends.xnnpack.partition.xnnpack_partitioner", "XnnpackPartitioner")
        direct_products(program.trace.program)
        try:
            lowered = lower(program.trace.program, partitioner=[partitioner()]).to_executorch()
        except Exception as error:
            raise self.refusal(error) from error
        missing = _missing(lowered.executorch_program)
        if missing:
            raise self.refusal(ExportError(f"its runtime has no kernel for {some(missing)}"))
        with write_errors(stage.target), stage.model.open("wb") as file:
            lowered.write_to_file(file)

    def start(self, program: TracedProgram, file: Path) -> ProgramSession:
        """Load the program."""
        return _Session(program, file)

    def write_adapter(self, stem: Path, values: Mapping[str, Tensor]) -> Path:
        """Write ``NAME.ptd``, whose tensors have the names of the inputs."""
        data = _load("exir._serialize.data_serializer")
        layout = _load("exir.tensor_layout", "TensorLayout")
        number = _load("exir.tensor", "scalar_type_enum")
        serializer = _load("extension.flat_tensor.serialize.serialize", "FlatTensorSerializer")
        entries = {
            name: data.DataEntry(
                index,
                _ALIGNMENT,
                layout(number(value.dtype), list(value.shape), list(range(value.dim()))),
            )
            for index, (name, value) in enumerate(values.items())
        }
        buffers = [value.contiguous().numpy().tobytes() for value in values.values()]
        blob = serializer().serialize(data.DataPayload(buffers, entries))
        path = stem.with_name(f"{stem.name}.ptd")
        path.write_bytes(bytes(blob))
        return path


def _refuse_gains(program: TracedProgram) -> None:
    """Raise for DoRA at a site that takes adapters: ExecuTorch 1.5 ends the process when it runs such a gain.

    Raises:
        ExportError: The message names the sites.
    """
    manifest = program.prepared.manifest
    sites = [site.name for site in manifest.sites if site.gain] if manifest is not None else []
    if sites:
        raise ExportError(
            f"{some(sites)} take adapters with DoRA, whose gain crashes ExecuTorch as an input: give "
            "adapters='merge' or 'inline', or export a model whose adapters have no DoRA"
        )


def _missing(program: Any) -> list[str]:
    """Return the operators of a program without a kernel in the runtime that is installed."""
    known = set(_load("runtime", "Runtime").get().operator_registry.operator_names)
    used = {
        f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        for plan in program.execution_plan
        for operator in plan.operators
    }
    return sorted(used - known)


class _Session(ProgramSession):
    def __init__(self, program: TracedProgram, file: Path) -> None:
        super().__init__(program)
        from importlib.metadata import version

        self.provider = f"ExecuTorch {version('executorch')}, XNNPACK"
        loaded = _load("runtime", "Runtime").get().load_program(file)
        self._method = loaded.load_method("forward")
        self._kept = loaded  # the method reads its memory

    def call(self, tensors: list[Tensor]) -> list[Tensor]:
        results = self._method.execute([tensor.cpu() for tensor in tensors])
        return [torch.as_tensor(value).clone() for value in results]
