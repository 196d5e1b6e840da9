"""``lora-fx run``: an exported model, run and timed."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from lora_fx.errors import ConfigError, ExportError
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["run"]

_TOTAL = "total_length"
_DYNAMIC = {0: 2}  # the size of a dynamic axis by its position
_OTHERWISE = 8


def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An .onnx file.", show_default=False)
    ],
    provider: Annotated[
        str, typer.Option("--provider", help="cpu or cuda: that one, or an error.")
    ] = "cpu",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="name=FILE.npy; random values without it. Repeat it."),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size", help="axis=SIZE of a dynamic axis, where no --input has it. Repeat it."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="An .onnx_adapter file, or an adapter folder, to run with."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Write the outputs to this .npz file.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs that are timed.")] = 10,
    force: o.Force = False,
) -> None:
    """Run an ONNX file on the device that is asked for, and show what comes out."""
    from lora_fx.export.session import OnnxSession

    written = None if output is None else _output_file(output, force=force)
    wanted: Any = provider
    with console.progress(f"loading {file}"):
        session = OnnxSession(file, wanted)
        chosen = o.loaded_adapter(session, adapter)
    feeds = _feeds(session.inputs, _pairs(inputs, "--input"), _pairs(sizes, "--size"))
    seconds = []
    with console.progress("running") as advance:
        results = session.run(
            feeds, adapter=chosen
        )  # allocations and kernels are chosen in the first run
        for done in range(repeat):
            advance(done, repeat, "")
            began = time.perf_counter()
            results = session.run(feeds, adapter=chosen)
            seconds.append(time.perf_counter() - began)
    screen = console.output()
    screen.print(_table("input", feeds))
    screen.print(_table("output", results))
    median = 1e3 * statistics.median(seconds)
    screen.print(
        f"{session.provider}: {median:.2f} ms a run (median of {repeat}, "
        f"{1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})",
        highlight=False,
    )
    if written is not None:
        _write(written, results)
        screen.print(f"wrote {written}", highlight=False, soft_wrap=True)


def _output_file(given: str, *, force: bool) -> Path:
    output = o.file_to_write(given, (".npz",), force=force)
    if not output.parent.is_dir():
        raise ConfigError(f"cannot write {output}: there is no folder {output.parent}")
    return output


def _write(output: Path, results: dict[str, Any]) -> None:
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with temporary.open("wb") as opened:
            np.savez(opened, **results)
        temporary.replace(output)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pairs(entries: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{option} {entry}: write name=value")
        pairs[name] = value
    return pairs


def _feeds(ports: Any, files: dict[str, str], sizes: dict[str, str]) -> dict[str, Any]:
    names = [port.name for port in ports]
    unknown = [name for name in files if name not in names]
    if unknown:
        raise ConfigError(f"--input {unknown[0]}: the inputs are {', '.join(map(str, ports))}")
    axes = {axis for port in ports for axis in port.shape if isinstance(axis, str)}
    for axis, size in sizes.items():
        if axis not in axes or not size.isdigit():
            raise ConfigError(
                f"--size {axis}={size}: give a whole number for one of the dynamic axes "
                f"({', '.join(sorted(axes)) or 'there are none'})"
            )
    chosen = {axis: int(size) for axis, size in sizes.items()}
    read = {name: _read(file) for name, file in files.items()}
    for port in ports:
        if port.name in read:
            sizes_of = zip(port.shape, read[port.name].shape, strict=False)
            known = {axis: size for axis, size in sizes_of if isinstance(axis, str)}
            for axis in known.keys() & sizes.keys():
                if known[axis] != int(sizes[axis]):
                    raise ConfigError(
                        f"--size {axis}={sizes[axis]}: {files[port.name]} has {known[axis]} there"
                    )
            chosen |= known
    if _TOTAL in axes:
        # Of a file that generates: what it has read and what it reads.
        parts = (chosen.get(axis, _OTHERWISE) for axis in ("past_length", "sequence"))
        chosen.setdefault(_TOTAL, sum(parts))
    random = np.random.default_rng(0)
    return {
        port.name: read[port.name] if port.name in read else _drawn(port, chosen, random)
        for port in ports
    }


def _read(file: str) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{file} is not a readable .npy file: {error}") from error


def _drawn(port: Any, sizes: dict[str, int], random: np.random.Generator) -> Any:
    """Random values that fit: 0 and 1 for whole numbers, ids of any vocabulary; a mask is full."""
    for index, axis in enumerate(port.shape):
        if isinstance(axis, str):
            # An axis has one size wherever it comes up.
            sizes.setdefault(axis, _DYNAMIC.get(index, _OTHERWISE))
    shape = [
        axis if isinstance(axis, int) else sizes.get(axis or "", _DYNAMIC.get(index, _OTHERWISE))
        for index, axis in enumerate(port.shape)
    ]
    if port.dtype == "bfloat16":
        import torch

        return torch.from_numpy(random.standard_normal(shape)).to(torch.bfloat16)
    try:
        dtype = np.dtype(port.dtype)
    except TypeError as error:
        raise ConfigError(f"no random values for {port}: give --input {port.name}=FILE") from error
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if "mask" in port.name:
        return np.ones(shape, dtype)
    return random.integers(0, 2, shape).astype(dtype)


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title, "dtype", "shape", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("min", "mean", "max"):
        table.add_column(column, justify="right")
    for name, value in values.items():
        numbers = np.asarray(value.float() if hasattr(value, "float") else value)
        numbers = numbers.astype(np.float64)
        stats = (
            [f"{one:.4g}" for one in (numbers.min(), numbers.mean(), numbers.max())]
            if numbers.size
            else ["", "", ""]
        )
        shape = "×".join(map(str, value.shape)) or "scalar"
        table.add_row(name, str(value.dtype).removeprefix("torch."), shape, *stats)
    return table
