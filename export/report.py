"""Reports of exports about files and their checks, as plain data that needs neither onnx nor torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, TypeVar

from lora_fx.ir import html_block, html_lines, html_table, json_text

if TYPE_CHECKING:
    from lora_fx.passes.merge import MergeReport

__all__ = [
    "BankSize",
    "ExportReport",
    "OutputParity",
    "StoredFormat",
    "fusions_text",
    "short",
    "size_text",
    "worse",
    "worst_by_layer",
]


@dataclass(frozen=True)
class StoredFormat:
    """Quantized weights in a file.

    Attributes:
        scheme: Name of the format, such as ``nf4`` or ``int8``.
        operator: Operator that reads the weights, such as "MatMulNBits" or "DequantizeLinear".
        block_size: Number of values that share a scale; None for one scale a row.
        weights: Number of matrices.
        values: Number of values of all matrices.
        bytes: Size of all matrices, scales included.
    """

    scheme: str
    operator: str
    block_size: int | None
    weights: int
    values: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits of a value, with its share of a scale."""
        return 8 * self.bytes / self.values

    @property
    def of_fp16(self) -> float:
        """Ratio of the size of the weights to their size in fp16."""
        return self.bytes / (2 * self.values)

    def __str__(self) -> str:
        blocks = "a scale a row" if self.block_size is None else f"blocks of {self.block_size}"
        several = "s"[: self.weights > 1]
        return (
            f"{self.weights} weight{several} in {self.scheme}, {blocks}, for {self.operator}: "
            f"{size_text(self.bytes)}, {self.bits:.2f} bits a value, {self.of_fp16:.0%} of fp16"
        )


@dataclass(frozen=True)
class BankSize:
    """Size of a bank: the adapters that a file can run in one batch.

    Attributes:
        adapters: Names of the adapters in the file; the first has id 0.
        capacity: Largest number of adapters.
        rank: Rank that all adapters are padded to.
    """

    adapters: tuple[str, ...]
    capacity: int
    rank: int

    def __str__(self) -> str:
        return f"{len(self.adapters)} of at most {self.capacity} adapters, filled up to rank {self.rank}"


def size_text(size: int) -> str:
    """Return a number of bytes as text, in kB or MB."""
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


_Entry = TypeVar("_Entry")
_LAYER = re.compile(r"^(past_key_values|present)\.\d+\.")


@dataclass(frozen=True)
class OutputParity:
    """Largest difference of one output from PyTorch's, over every shape that was tried.

    Attributes:
        name: Name of the output in the file.
        max_abs_error: Largest absolute difference.
        max_rel_error: Ratio of that difference to the largest magnitude of the output.
        tolerance: Limit of ``max_rel_error``; 0 for outputs that must be equal.
        pytorch_rel_error: For a half-precision file, the difference of PyTorch in that precision from
            the reference, else None. If it is far over the tolerance, so are providers that round
            after each operation.
    """

    name: str
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    pytorch_rel_error: float | None = None


@dataclass(frozen=True, repr=False)
class ExportReport:
    """Result of ``export_onnx``. Print it to see all of it; a notebook shows tables.

    Attributes:
        path: Path of the file.
        files: Sizes in bytes of the files of this model by name. The first is the model; files of its
            weights follow, if they are separate. All of them have to stay in one folder.
        opset: ONNX opset of the file.
        dtype: Storage dtype of most weights: "fp32", "fp16", "bf16" or torch's name.
        nodes: Number of nodes of the graph.
        operators: Number of nodes by operator, the most frequent first.
        initializers: Number of stored tensors.
        inputs: Axes by input name: a name for each dynamic axis, a size for each fixed axis.
        outputs: Axes by output name, in the same form.
        dynamic_axes: Names of dynamic axes by input name and position.
        axis_limits: Largest sizes of dynamic axes by name, for axes with a limit.
        fixed_axes: Reasons of fixed axes by ``input[axis]``.
        baked_arguments: Arguments that are not tensors, and so are constants of the file.
        verified: True if the file was compared with PyTorch.
        unverified_reason: Reason why it was not compared, else "".
        parity: Result of the comparison, one row an output.
        shapes_tried: Input shapes of the comparison.
        values_tried: Remark on the input values of the comparison, "" for fresh values.
        shapes_skipped: Shapes that PyTorch itself refused, with its error messages.
        provider: Execution provider of the comparison, else "".
        reference: Reference of the comparison in words, else "".
        seconds: Wall-clock seconds of each stage, in order.
        metadata: Metadata entries: version, base model, adapters and their configurations.
        versions: Versions of the packages that were used.
        task: Task of the export, None if the model was exported as it is called.
        encoder: Report of the file with the encoder, which has to stay in the same folder, or None.
        swappable: Sites that take an adapter when the file runs; empty if adapters were merged.
        opset_reason: Reason for the opset.
        finite: Locations where the model branches on values being finite. The file has only the branch for
            finite values.
        quantized: Quantized weights, one entry for each format; empty without quantized weights.
        adapters: Form of the adapters: "merge", "inline", "inputs" or "bank", as in ``export_onnx``.
        bank: Size of the bank of a file that has one, else None.
        target: The runtime that the folder is for; None for a file without a folder.
        companions: Sizes in bytes of the other files in that folder by name.
        optimize: Level of fusion, as in ``export_onnx``. It is lower than requested if a file with more
            fusions did not match the model.
        fused: Number of applications of each fusion by name.
        not_fused: Reasons why a fusion or a level of fusions was not applied, everywhere or at some nodes.
        adapter_nodes: Names of the nodes that read adapters. Quantizers have to leave them out, with the
            argument ``nodes_to_exclude`` in ONNX Runtime. The metadata of the file has them as well.
        merged: The merge of the adapters, rounded to the dtypes of the file; None without a merge.
    """

    path: str
    files: Mapping[str, int]
    opset: int
    dtype: str
    nodes: int
    operators: Mapping[str, int]
    initializers: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    axis_limits: Mapping[str, int]
    fixed_axes: Mapping[str, str]
    baked_arguments: Mapping[str, str]
    verified: bool
    unverified_reason: str
    parity: tuple[OutputParity, ...]
    shapes_tried: tuple[Mapping[str, tuple[int, ...]], ...]
    values_tried: str
    shapes_skipped: Mapping[str, str]
    provider: str
    reference: str
    seconds: Mapping[str, float]
    metadata: Mapping[str, str]
    versions: Mapping[str, str]
    task: str | None = None
    encoder: ExportReport | None = None
    swappable: tuple[str, ...] = ()
    opset_reason: str = ""
    finite: tuple[str, ...] = ()
    quantized: tuple[StoredFormat, ...] = ()
    adapters: str = "merge"
    bank: BankSize | None = None
    target: str | None = None
    companions: Mapping[str, int] = field(default_factory=dict)
    optimize: str = "standard"
    fused: Mapping[str, int] = field(default_factory=dict)
    not_fused: Mapping[str, str] = field(default_factory=dict)
    merged: MergeReport | None = None
    adapter_nodes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())

    @property
    def data_files(self) -> tuple[str, ...]:
        """Names of the files of the weights; empty if weights are in the model file."""
        return tuple(self.files)[1:]

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference over all outputs; 0 if nothing was compared."""
        return max((row.max_abs_error for row in self._rows()), default=0.0)

    @property
    def max_rel_error(self) -> float:
        """Largest difference over all outputs, each relative to its output's largest magnitude."""
        return max((row.max_rel_error for row in self._rows()), default=0.0)

    def _rows(self) -> tuple[OutputParity, ...]:
        return self.parity if self.encoder is None else (*self.encoder.parity, *self.parity)

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of the whole export."""
        return sum(self.seconds.values())

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json_text(self)

    def __repr__(self) -> str:
        checked = f"error {self.max_rel_error:.1e}" if self.verified else "NOT CHECKED"
        return f"<ExportReport: {self._head()}, {checked}; print it for more>"

    def _repr_html_(self) -> str:
        ports = [
            (kind, name, ", ".join(map(str, axes)))
            for kind, entries in (("input", self.inputs), ("output", self.outputs))
            for name, axes in short(entries).items()
        ]
        parity = [
            (
                row.name,
                f"{row.max_abs_error:.1e}",
                f"{row.max_rel_error:.1e}",
                f"{row.tolerance:.0e}",
            )
            for row in worst_by_layer(self.parity)
        ]
        operators = [(name, str(count)) for name, count in self.operators.items()]
        blocks = [
            html_block(
                "inputs and outputs", html_table(("", "name", "axes"), ports, 3), opened=True
            )
        ]
        if self.verified:
            columns = ("output", "largest error", "relative", "allowed")
            title = f"checked on {self.provider} against {self.reference}"
            blocks.append(html_block(title, html_table(columns, parity), opened=True))
        blocks.append(
            html_block(f"nodes ({self.nodes})", html_table(("operator", "nodes"), operators))
        )
        blocks.append(html_block("all of it", f"<pre>{escape(str(self))}</pre>"))
        unchecked = "" if self.verified else f"NOT CHECKED: {self.unverified_reason}"
        return f"<div>{html_lines((self._head(), unchecked))}{''.join(blocks)}</div>"

    def _head(self) -> str:
        return (
            f"{self.path}: {size_text(self.size_bytes)}, opset {self.opset}, {self.dtype}, "
            f"{self.nodes} nodes, {self.initializers} initializers, {self.total_seconds:.1f} s"
        )

    def __str__(self) -> str:
        lines = [self._head()]
        if self.opset_reason:
            lines.append(f"  opset {self.opset}: {self.opset_reason}")
        if self.data_files:
            lines.append(f"  weights in {', '.join(self.data_files)}: keep them beside it")
        if self.target is not None:
            lines.append(f"  for {self.target}, with {', '.join(self.companions)}")
        lines += [f"  input  {name}{_axes(axes)}" for name, axes in short(self.inputs).items()]
        lines += [f"  output {name}{_axes(axes)}" for name, axes in short(self.outputs).items()]
        lines += [f"  {axis} is at most {size}" for axis, size in self.axis_limits.items()]
        if self.task is None:
            # With a task, the user did not choose the fixed axes, so they are not listed.
            lines += [f"  fixed: {axis}: {reason}" for axis, reason in self.fixed_axes.items()]
        lines += [f"  baked in: {name} = {value}" for name, value in self.baked_arguments.items()]
        if self.finite:
            more = f" and {len(self.finite) - 1} more" if len(self.finite) > 1 else ""
            lines.append(f"  values are taken to be finite, at {self.finite[0]}{more}")
        lines += [f"  {form}" for form in self.quantized]
        if self.fused:
            lines.append(f"  fused ({self.optimize}): {fusions_text(self.fused)}")
        lines += [f"  not fused: {name}: {why}" for name, why in self.not_fused.items()]
        if self.merged is not None:
            lines.append(f"  {self.merged.summary}")
        if self.adapters == "inline":
            lines.append("  adapters stay beside the operations, as products of their own")
        if self.swappable:
            sites = len(self.swappable)
            sites_text = f"at {sites} place{'s'[: sites > 1]}"
            lines.append(
                f"  adapters of any rank are inputs, {sites_text}"
                if self.bank is None
                else f"  each row of a batch has its own adapter, {sites_text}: {self.bank}"
            )
        lines += self._parity_lines()
        if self.encoder is not None:
            lines.append(f"with the encoder beside it, {self.encoder}")
        return "\n".join(lines)

    def _parity_lines(self) -> list[str]:
        if not self.verified:
            return [f"  NOT CHECKED against PyTorch: {self.unverified_reason}"]
        lines = [f"  checked on {self.provider} against {self.reference}, with"]
        lines += [f"    {_shapes(shapes)}" for shapes in self.shapes_tried]
        if self.values_tried:
            lines.append(f"  {self.values_tried}")
        lines.extend(map(_parity_line, worst_by_layer(self.parity)))
        lines += [f"  not tried: {shape}: {why}" for shape, why in self.shapes_skipped.items()]
        return lines


def short(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Keep one of several entries whose names differ only in the number of a layer, as in a cache."""
    by_name: dict[str, _Entry] = {}
    for name, entry in entries.items():
        by_name.setdefault(_LAYER.sub(r"\1.*.", name), entry)
    return by_name


def fusions_text(fused: Mapping[str, int]) -> str:
    """Return the fusions of a file as text: their names and numbers of applications."""
    return ", ".join(f"{name} {count}×" for name, count in fused.items())


def worse(first: OutputParity, second: OutputParity) -> OutputParity:
    """Return the worse row of two comparisons of one output."""
    row = max(first, second, key=lambda entry: entry.max_rel_error)
    narrow = [r.pytorch_rel_error for r in (first, second) if r.pytorch_rel_error is not None]
    return dataclasses.replace(row, pytorch_rel_error=max(narrow, default=None))


def worst_by_layer(rows: Iterable[OutputParity]) -> list[OutputParity]:
    """Return the worst row over all layers of a cache, and all other rows."""
    worst: dict[str, OutputParity] = {}
    for row in rows:
        row = dataclasses.replace(row, name=_LAYER.sub(r"\1.*.", row.name))
        worst[row.name] = worse(worst.get(row.name, row), row)
    return list(worst.values())


def _parity_line(row: OutputParity) -> str:
    narrow = ""
    if row.pytorch_rel_error is not None:
        narrow = f", PyTorch in this precision {row.pytorch_rel_error:.1e}"
    return (
        f"  parity {row.name}: max error {row.max_abs_error:.1e} absolute, "
        f"{row.max_rel_error:.1e} relative (allowed {row.tolerance:.0e}{narrow})"
    )


def _axes(axes: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(axis) for axis in axes) + "]"


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in short(shapes).items())
