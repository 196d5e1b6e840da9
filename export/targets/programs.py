"""Targets whose runtimes take a program of ``torch.export`` and not an ONNX file.

The factors of swappable adapters are inputs of the program, after those of the call. An application feeds the
tensors of an adapter's file, so that the base stays loaded. For no adapter it feeds zeros (and gains of 1).
If adapters have their own heads, the folder has a file with the base's values of them, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lora_fx.errors import ExportError, some
from lora_fx.export.adapter_file import base_values, values_of_model
from lora_fx.export.adapter_manifest import (
    MANIFEST_KEY,
    Manifest,
    cast_to,
    check_values,
    fill_tokens,
)
from lora_fx.export.copy import StandIn, unwrapped
from lora_fx.export.prepare import Prepared
from lora_fx.export.session import filled_up
from lora_fx.export.staging import Staging
from lora_fx.export.targets.base import TaskName, Written, add_tokenizer
from lora_fx.export.trace import Trace
from lora_fx.ir import record_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ProgramSession", "ProgramTarget", "TracedProgram", "direct_products", "fed_values"]

_RANK_KEY = "lora_fx.rank"
_BASE = "base"
"""Name of the file of the base, if adapters have their own values of its parameters."""
_OPERATION = re.compile(r"\baten(?:\.|::)\w+(?:\.(?!default\b)\w+)?")


@dataclass(frozen=True)
class TracedProgram:
    """A traced model with the names of its inputs and outputs.

    Attributes:
        trace: The program and its inputs.
        prepared: The model that was traced.
        rank: The rank that factors are padded to; None if each adapter has its own ranks.
    """

    trace: Trace
    prepared: Prepared
    rank: int | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.prepared.outputs

    def operators(self) -> Counter[str]:
        """Return how often the program calls each operator."""
        nodes = [node for node in self.trace.program.graph.nodes if node.op == "call_function"]
        return Counter(str(node.target).removesuffix(".default") for node in nodes)

    def output_axes(self) -> dict[str, tuple[int | str, ...]]:
        """Return the axes of each output: a size, the name of a dynamic axis, or a formula of sizes."""
        program = self.trace.program
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        symbols = self.trace.symbols
        rows = [values[name] for name in program.graph_signature.user_outputs]
        return {
            name: tuple(
                int(size) if str(size).isdigit() else symbols.get(str(size), str(size))
                for size in value.shape
            )
            for name, value in zip(self.outputs, rows, strict=True)
        }

    def metadata(self) -> dict[str, str]:
        """Return the metadata entries of the program."""
        entries = {
            "lora_fx.version": importlib.metadata.version("lora-fx"),
            "lora_fx.dtype": self.prepared.dtype,
            **self.prepared.origin,
            **self.prepared.metadata,
        }
        if self.prepared.manifest is not None:
            entries[MANIFEST_KEY] = self.prepared.manifest.to_json()
        if self.rank is not None:
            entries[_RANK_KEY] = str(self.rank)
        return entries


@dataclass(frozen=True)
class _Port:
    name: str
    dtype: str


class ProgramSession(ABC):
    """A written program, loaded in its runtime to be compared with PyTorch.

    Args:
        program: The program that was written.

    Attributes:
        provider: The runtime in words.
        inputs: The inputs of the call.
    """

    provider: str

    def __init__(self, program: TracedProgram) -> None:
        self._program = program
        arguments = program.trace.arguments
        pairs = zip(arguments.names, arguments.tensors, strict=True)
        self.inputs = tuple(
            _Port(name, str(tensor.dtype).removeprefix("torch.")) for name, tensor in pairs
        )
        self._adapters: dict[str, dict[str, Tensor]] = {}

    @property
    def max_rank(self) -> int | None:
        """The highest rank of an adapter that the program takes; None for any rank."""
        return self._program.rank

    def load_adapter(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Check the values of an adapter, and keep them under a name for :meth:`run`."""
        manifest = self._program.prepared.manifest
        assert manifest is not None
        values = fill_tokens(manifest, values)
        check_values(manifest, values, f"adapter {name!r}", self.max_rank)
        self._adapters[name] = fed_values(manifest, values, self.max_rank)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter."""
        del self._adapters[name]

    def run(self, tensors: Sequence[Tensor], *, adapter: str | None = None) -> dict[str, Tensor]:
        """Run the program on the tensors of a call.

        Args:
            tensors: The tensors of the call.
            adapter: Name of a loaded adapter, or None for the base.

        Returns:
            The outputs by name.

        Raises:
            ExportError: The runtime refuses the call.
        """
        prepared = self._program.prepared
        factors: dict[str, Tensor] = {}
        if adapter is not None:
            factors = self._adapters[adapter]
        elif prepared.manifest is not None:
            factors = fed_values(prepared.manifest, prepared.base_values(), self.max_rank)
        inputs = [tensor.detach().contiguous() for tensor in (*tensors, *factors.values())]
        try:
            results = self.call(inputs)
        except Exception as error:
            raise ExportError(f"{self.provider}: {_first_line(error)}") from error
        return dict(zip(self._program.outputs, results, strict=True))

    @abstractmethod
    def call(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the program on all its inputs, in order, and return its outputs as new tensors."""


class ProgramTarget(ABC):
    """A runtime that takes a program of ``torch.export``; a :class:`RuntimeTarget`.

    Attributes:
        name: Name of the target for users.
        runtime: Name of the runtime in messages.
        package: The package that writes the program and runs it.
        model: Name of the program in the folder.
        dynamic: True if axes may be dynamic.
    """

    name: ClassVar[str]
    runtime: ClassVar[str]
    package: ClassVar[str]
    model: ClassVar[str]
    dynamic: ClassVar[bool]
    axes: Mapping[str, str] = {}

    def task(self, model: nn.Module) -> TaskName | None:
        """Return None: the model is written as it is called."""
        return None

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Raise for options that the runtime does not support."""
        if task is not None:
            raise ExportError(
                f"target={self.name!r} writes a model as it is called, and task is {task!r}: leave task out"
            )
        if adapters == "bank":
            raise ExportError(
                f"target={self.name!r} has no bank of adapters: give adapters='inputs', and feed the tensors "
                "of the adapter's file"
            )
        if dtype == "bf16":
            raise ExportError(f"target={self.name!r} has no bf16: give dtype='fp32' or 'fp16'")

    def file(self, folder: Path, dtype: str | None) -> Path:
        """Return the path of the program."""
        return folder / self.model

    def data_name(self, file: Path) -> str | None:
        """Return the name of the file of weights, or None if they are in the program."""
        return None

    def example(self, example: object) -> object:
        """Return the example unchanged."""
        return example

    def adapt(self, model: ir.Model) -> None:
        """Leave the graph as it is. No ONNX graph is made for such a target."""
        del model

    def finish(self, written: Written) -> Mapping[Path, str]:
        """Write the adapters, the tokenizer, and ``program.json`` with the inputs and outputs in order."""
        report = written.report
        manifest = Manifest.from_metadata(report.metadata)
        rank = report.metadata.get(_RANK_KEY)
        limit = None if rank is None else int(rank)
        model = unwrapped(written.model)
        factors: dict[str, Tensor] = {}
        if manifest is not None:
            factors = fed_values(manifest, base_values(model, manifest), limit)
        described = {
            "inputs": {name: list(axes) for name, axes in report.inputs.items()},
            "adapter_inputs": {name: list(value.shape) for name, value in factors.items()},
            "outputs": {name: list(axes) for name, axes in report.outputs.items()},
            "order": [*report.inputs, *factors],
            **report.metadata,
        }
        path = written.folder / "program.json"
        path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        files = {path: path.name}
        files |= add_tokenizer(written.tokenizer, written.folder / "tokenizer")
        if manifest is not None:
            files |= self._adapters(model, written.folder, manifest, limit)
            if manifest.parameters:
                path = self.write_adapter(written.folder / _BASE, factors)
                files[path] = path.name
        return files

    def _adapters(
        self, model: nn.Module, within: Path, manifest: Manifest, rank: int | None
    ) -> dict[Path, str]:
        record = record_of(model)
        folder = within / "adapters"
        folder.mkdir()
        paths = {}
        for name in () if record is None else record.adapters:
            values = cast_to(manifest, values_of_model(model, name))
            path = self.write_adapter(folder / name, fed_values(manifest, values, rank))
            paths[path] = f"adapters/{path.name}"
        return paths

    @abstractmethod
    def write(self, program: TracedProgram, stage: Staging) -> None:
        """Write a program into its staging folder.

        Raises:
            ExportError: The runtime lacks an operator; the message names it.
        """

    def loaded(self, program: TracedProgram, file: Path) -> ProgramSession:
        """Load a written program in the runtime.

        Raises:
            ExportError: The runtime refuses the program.
        """
        try:
            return self.start(program, file)
        except Exception as error:
            raise self.refusal(error) from error

    @abstractmethod
    def start(self, program: TracedProgram, file: Path) -> ProgramSession:
        """Load a written program in the runtime. Errors of the runtime are not caught here."""

    @abstractmethod
    def write_adapter(self, stem: Path, values: Mapping[str, Tensor]) -> Path:
        """Write the tensors of an adapter to a file, and return its path."""

    def refuse_quantized(self, program: TracedProgram) -> None:
        """Raise if the model has weights in the format of a quantization library."""
        model = program.prepared.base.model
        names = [name for name, module in model.named_modules() if isinstance(module, StandIn)]
        if names:
            raise ExportError(
                f"{some(names)} have quantized weights, for which target={self.name!r} has no form: give "
                "adapters='merge', which makes them dense, or export without target= for ONNX Runtime"
            )

    def refusal(self, error: Exception) -> ExportError:
        """Return the error for a program that the runtime does not take."""
        version = importlib.metadata.version(self.package)
        operations = list(dict.fromkeys(_OPERATION.findall(str(error))))
        which = f" ({some(operations)})" if operations else ""
        return ExportError(
            f"{self.runtime} {version} does not take this model{which}: {_first_line(error)}. "
            f"Nothing was written. Install a newer {self.package}, write the operation with others in the "
            "model's code, or export without target= for ONNX Runtime"
        )


@torch.no_grad()
def fed_values(
    manifest: Manifest, values: Mapping[str, Tensor], rank: int | None
) -> dict[str, Tensor]:
    """Return the tensors to feed for an adapter: one for each adapter input, in order.

    Args:
        manifest: The adapter inputs.
        values: An adapter; sites that it lacks get neutral values. It has all of the manifest's parameters.
        rank: The rank that factors are padded to; None to leave them as they are.
    """
    values = fill_tokens(manifest, values)
    if rank is None:
        return manifest.no_adapter() | values
    return {
        entry.name: filled_up(site, entry, values.get(entry.name), rank).contiguous()
        for site in manifest.targets
        for entry in site.inputs()
    }


def _first_line(error: Exception) -> str:
    while str(error).startswith("An error occurred when running") and error.__cause__ is not None:
        assert isinstance(error.__cause__, Exception)
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Exception from")] or lines
    return " ".join(lines[:3])[:400].rstrip(".:") if lines else type(error).__name__


def direct_products(program: ExportedProgram) -> None:
    """Replace ``linear(x, factor.mT)`` by ``matmul(x, factor)`` if the factor is an input.

    XNNPACK would take the transposed input for a constant weight.
    """
    graph = program.graph
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        x, turned, *bias = node.args
        if any(value is not None for value in bias) or turned.target is not aten.mT.default:
            continue
        (factor,) = turned.args
        if factor.name not in program.graph_signature.user_inputs:
            continue
        with graph.inserting_before(node):
            product = graph.call_function(aten.matmul.default, (x, factor))
        # Copy only the value. By other entries, such as the source, XNNPACK would take it for a linear layer.
        product.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        if not turned.users:
            graph.erase_node(turned)
    program.graph_module.recompile()
