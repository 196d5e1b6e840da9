"""Commands on ONNX files: export, export-adapter, run, generate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lora_fx.errors import ConfigError, ExportError, some
from lora_fx.extras import load_optional
from lora_fx.files import replacing
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["export", "export_adapter", "generate", "run"]

_STAGES = 5  # number of stages of export_onnx
_TOTAL = "total_length"
_DYNAMIC = {0: 2}  # the size of a dynamic axis by its position
_OTHERWISE = 8


@o.command()
def export(
    model: o.ModelName,
    out: str,
    adapter: list[Path] | None = None,
    task: str | None = None,
    target: str | None = None,
    tokenizer: Path | None = None,
    adapters: str | None = None,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    required_inputs: bool = False,
    dtype: str | None = None,
    opset: int | None = None,
    optimize: str = "standard",
    provider: str | None = None,
    quantize: str | None = None,
    verify: bool = True,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Export a model to ONNX. The file gets its name only after it was compared with PyTorch.

    Args:
        model: The model.
        out: The .onnx file; with --target the folder.
        adapter: An adapter folder, to merge. With --adapters inputs or bank, it decides which operations take
            an adapter; repeat it for several, each gets the name of its folder.
        task: text-generation (a decoder with its key-value cache) or text2text-generation (an
            encoder-decoder): a file for `lora-fx generate`. --target chooses it for a model that generates.
        target: genai (onnxruntime-genai), transformers.js, openvino or executorch: the folder that it loads.
        tokenizer: The folder of the tokenizer that goes into it; by default the model's.
        adapters: merge; inline: branches next to the operations (the default over quantized weights); inputs:
            a base model that takes an adapter when it runs; bank: one that takes an adapter for each row.
        max_adapters: With a bank, how many adapters there may be.
        max_rank: With a bank, their highest rank.
        required_inputs: Give no input a default, for browsers, Node, OpenVINO and tools that rewrite files;
            the adapters of a bank are then constants.
        dtype: fp32, fp16 or bf16; by default the model's.
        opset: ONNX opset; by default 20, or 22 for bf16.
        optimize: standard: operators of ONNX, fast on every provider; runtime: operators of ONNX Runtime as
            well; none: the graph as PyTorch exports it.
        provider: cpu, cuda or webgpu: the provider for --optimize runtime; cpu by default.
        quantize: int4 or int8: quantize the matrix products of a dense model, but not the factors.
        verify: Compare ONNX Runtime with PyTorch.
        force: Overwrite existing files.
        as_json: Print the report as JSON.
    """
    path = Path(out) if target is not None else o.file_to_write(out, (".onnx",), force=force)
    folders = adapter or []
    o.check_names(model, folders, provider=provider, dtype=dtype)
    if len(folders) > 1 and adapters not in ("inputs", "bank"):
        raise o.TypedError("several --adapter: give one, or --adapters bank (or inputs)")

    from lora_fx.checkpoint import load_adapter
    from lora_fx.export.onnx import export_onnx
    from lora_fx.tools.cli.tables import render_export

    choices = {"task": task, "target": target, "adapters": adapters, "optimize": optimize}
    choices["quantize"] = quantize
    o.check_choices(export_onnx, **choices)
    loaded = o.load(model, adapter=next(iter(folders), None))
    inputs = loaded.inputs()
    if target is not None and tokenizer is None:
        has_tokenizer = loaded.folder is not None and any(loaded.folder.glob("tokenizer*"))
        tokenizer = loaded.folder if has_tokenizer else None
    base: Any = loaded.model
    if loaded.folder is not None and hasattr(base.config, "use_cache"):
        base.config.use_cache = False  # a single pass returns no cache
    for folder in folders:
        named = len(folders) > 1 or adapters == "bank"
        with console.progress("reading the adapter"):
            called = folder.name.replace(".", "-") if named else "default"
            base = load_adapter(base, folder, adapter_name=called)
    chosen: dict[str, Any] = {**choices, "dtype": dtype, "tokenizer": tokenizer}
    chosen |= {"max_adapters": max_adapters, "max_rank": max_rank, "provider": provider}
    chosen["required_inputs"] = required_inputs
    with console.steps("exporting", _STAGES) as begin:
        report = export_onnx(
            base, path, inputs, opset=opset, verify=verify, force=force, progress=begin, **chosen
        )
    if as_json:
        console.say_json(report.to_json())
        return
    console.output().print(render_export(report), highlight=False)


@o.command(folder={"metavar": "DIR"})
def export_adapter(
    folder: Path,
    out: str,
    base: Path | None = None,
    model: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write an adapter for a file that was exported with --adapters inputs.

    Args:
        folder: An adapter folder.
        out: The .onnx_adapter file.
        base: The .onnx file that the adapter is for: the adapter is checked against it.
        model: The model of the adapter, for adapters that depend on the base weights.
        dtype: fp32, fp16 or bf16; not with --base.
        force: Overwrite existing files.
    """
    path = o.file_to_write(out, (".onnx_adapter",), force=force)
    o.check_names(model, [folder], dtype=dtype)
    if base is not None:
        o.check_file(base)

    from lora_fx.checkpoint import load_adapter
    from lora_fx.export.adapter_file import save_onnx_adapter

    source: Any = folder
    if model is not None:
        loaded: Any = o.load(model, adapter=folder).model
        with console.progress("reading the adapter"):
            source = load_adapter(loaded, folder)
    kind: Any = dtype
    with console.progress("writing the adapter"):
        written = save_onnx_adapter(source, path, base=base, dtype=kind, force=force)
    size = written.stat().st_size
    console.say(f"{written}: {size / 1e3:.1f} kB")


@o.command(inputs={"name": "--input"}, sizes={"name": "--size"}, repeat={"min": 1})
def run(
    file: Path,
    provider: str = "cpu",
    inputs: list[str] | None = None,
    sizes: list[str] | None = None,
    adapter: list[str] | None = None,
    output: str | None = None,
    repeat: int = 10,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Run an ONNX file on the requested device, and show the outputs.

    Args:
        file: An .onnx file.
        provider: cpu, cuda or webgpu; there is no fallback.
        inputs: name=FILE.npy; by default random values. Repeat it.
        sizes: axis=SIZE of a dynamic axis that no --input has. Repeat it.
        adapter: An .onnx_adapter file, or an adapter folder, to run with; or the name of one that is in the
            file's bank. Repeat it for a bank: one for each row of the batch, or none.
        output: Write the outputs to this .npz file.
        repeat: Runs that are timed.
        force: Overwrite existing files.
        as_json: Print shapes, figures and times as JSON.
    """
    written = None if output is None else _output_file(output, force=force)
    o.check_names(provider=provider)
    o.check_file(file)

    session, chosen = _session(file, provider, adapter)
    files = _pairs(inputs, "--input")
    feeds = _feeds(session.inputs, files, _pairs(sizes, "--size"))
    random = [name for name in feeds if name not in files]
    results, seconds = _timed(session, feeds, chosen, repeat)
    if written is not None:
        _write(written, results)
    screen = console.output()
    median = 1e3 * statistics.median(seconds)
    if as_json:
        report = {
            "provider": session.provider,
            "milliseconds": {
                "median": median,
                "least": 1e3 * min(seconds),
                "most": 1e3 * max(seconds),
            },
            "random_inputs": random,
            "inputs": _figures(feeds),
            "outputs": _figures(results),
        }
        console.say_json(report)
        return
    screen.print(_table("input", feeds))
    screen.print(_table("output", results))
    console.say(
        f"{session.provider}: {median:.2f} ms a run (median of {repeat}, "
        f"{1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})"
    )
    if random:
        console.say(
            f"random values were used for {some(random)}: for your own, give --input NAME=FILE.npy"
        )
    if written is not None:
        console.say(f"wrote {written}")


def _session(file: Path, provider: str, adapters: list[str] | None) -> tuple[Any, Any]:
    """Load an ONNX file and adapters. Return the session, and the names of the adapters in it."""
    from lora_fx.export.session import OnnxSession

    wanted: Any = provider
    with console.progress(f"loading {file}"):
        session = OnnxSession(file, wanted)
        return session, o.loaded_adapters(session, adapters)


def _timed(
    session: Any, feeds: Mapping[str, Any], adapter: Any, repeat: int
) -> tuple[dict[str, Any], list[float]]:
    """Run a session several times. Return the outputs, and the seconds of each run."""
    seconds = []
    with console.progress("running") as advance:
        # The first run allocates memory and chooses kernels.
        results = session.run(feeds, adapter=adapter)
        for done in range(repeat):
            advance(done, repeat, "")
            began = time.perf_counter()
            results = session.run(feeds, adapter=adapter)
            seconds.append(time.perf_counter() - began)
    return results, seconds


def _output_file(path: str, *, force: bool) -> Path:
    output = o.file_to_write(path, (".npz",), force=force)
    if not output.parent.is_dir():
        raise ConfigError(f"cannot write {output}: there is no folder {output.parent}")
    return output


def _write(output: Path, results: dict[str, Any]) -> None:
    try:
        with replacing(output) as new, new.open("wb") as opened:
            np.savez(opened, **results)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error}") from error


def _pairs(entries: list[str] | None, option: str, value: str = "value") -> dict[str, str]:
    pairs = {}
    for entry in entries or []:
        name, _, text = entry.partition("=")
        if not name or not text:
            raise o.TypedError(f"{option} {entry}: write name={value}")
        pairs[name] = text
    return pairs


def _feeds(ports: Any, files: dict[str, str], sizes: dict[str, str]) -> dict[str, Any]:
    names = [port.name for port in ports]
    unknown = [name for name in files if name not in names]
    if unknown:
        raise o.TypedError(f"--input {unknown[0]}: the inputs are {', '.join(map(str, ports))}")
    axes = {axis for port in ports for axis in port.shape if isinstance(axis, str)}
    for axis, size in sizes.items():
        if axis not in axes or not size.isdigit():
            raise o.TypedError(
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
                    raise o.TypedError(
                        f"--size {axis}={sizes[axis]}: {files[port.name]} has {known[axis]} there"
                    )
            chosen |= known
    if _TOTAL in axes:
        # In a generating file: the length of the past plus the new tokens.
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
    """Return values for an input of an ONNX file that the user has not given.

    Numbers are random, integers are 0 or 1 (valid as ids), and a mask has ones.
    """
    for index, axis in enumerate(port.shape):
        if isinstance(axis, str):
            # An axis has the same size in all inputs.
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


_MEASURES: dict[str, Callable[[Any], Any]] = {"min": np.min, "mean": np.mean, "max": np.max}


def _figures(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return dtype, shape and a few figures of each output. Outputs that are not finite have no figures."""
    entries = {}
    for name, value in values.items():
        numbers = np.asarray(value.float() if hasattr(value, "float") else value)
        numbers = numbers.astype(np.float64)
        figures = {
            key: float(measure(numbers)) if np.isfinite(numbers).all() and numbers.size else None
            for key, measure in _MEASURES.items()
        }
        dtype = str(value.dtype).removeprefix("torch.")
        entries[name] = {"dtype": dtype, "shape": list(value.shape), **figures}
    return entries


def _table(title: str, values: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            entry["dtype"],
            "×".join(map(str, entry["shape"])) or "scalar",
            *("" if entry[key] is None else f"{entry[key]:.4g}" for key in _MEASURES),
        )
        for name, entry in _figures(values).items()
    ]
    return console.table(title, "dtype", "shape", *_MEASURES, rows=rows, right=tuple(_MEASURES))


@o.command(inputs={"name": "--input"}, sample={"name": "--sample/--greedy"})
def generate(
    file: Path,
    ids: list[str] | None = None,
    text: list[str] | None = None,
    tokenizer: Path | None = None,
    inputs: list[str] | None = None,
    provider: str = "cpu",
    adapter: list[str] | None = None,
    max_new_tokens: int | None = None,
    sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Continue prompts with an exported model, and show tokens, or text with --tokenizer.

    Args:
        file: An .onnx file that `lora-fx export --task` wrote.
        ids: The tokens of a prompt: "1 2 3". Repeat it for a batch.
        text: A prompt, with --tokenizer. Repeat it for a batch.
        tokenizer: A local folder with a tokenizer of transformers.
        inputs: name=FILE.npy: another input of an encoder. Repeat it.
        provider: cpu, cuda or webgpu; there is no fallback.
        adapter: An .onnx_adapter file, or an adapter folder, to run with; or the name of one that is in the
            file's bank. Repeat it for a bank: one for each row of the batch, or none.
        max_new_tokens: The largest number of new tokens; by default the number in the file, or 20.
        sample: Draw tokens at random, or take the most likely ones.
        temperature: The temperature of the draws.
        top_k: Draw from this many tokens; 0 for all.
        top_p: Draw from the most likely tokens up to this total probability.
        seed: The seed of the draws.
        as_json: Print tokens, text and times as JSON.
    """
    _check_prompt(ids, text, tokenizer)
    o.check_names(provider=provider)
    o.check_file(file)

    import torch

    reader = None if tokenizer is None else _tokenizer(tokenizer)
    feeds = {name: _read(path) for name, path in _pairs(inputs, "--input", "FILE.npy").items()}
    prompts = _prompts(ids, text, reader)
    session, chosen = _session(file, provider, adapter)
    feeds.update(_padded(prompts))
    began = time.perf_counter()
    with console.progress("generating"):
        tokens = session.generate(
            **feeds,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
            adapter=chosen,
        )
    seconds = time.perf_counter() - began
    # A decoder repeats its prompt; an encoder-decoder does not.
    start = 0 if session.encoder is not None else max(map(len, prompts), default=0)
    rows = tokens[:, start:].tolist()
    texts = None
    if reader is not None:
        texts = [str(reader.decode(row, skip_special_tokens=True)) for row in rows]
    if as_json:
        report = {"provider": session.provider, "seconds": seconds, "tokens": rows, "text": texts}
        console.say_json(report)
        return
    for shown in texts or [" ".join(map(str, row)) for row in rows]:
        console.say(shown)
    new = sum(map(len, rows))
    console.say(
        f"{session.provider}: {len(rows)} × {new // len(rows)} tokens in {seconds:.2f} s, "
        f"{new / seconds:.0f} a second",
        to=console.error_console(),
    )


def _check_prompt(ids: list[str] | None, text: list[str] | None, tokenizer: Path | None) -> None:
    if ids and text:
        raise ConfigError("--ids and --text say two things: give one of them")
    if text and tokenizer is None:
        raise ConfigError("--text needs --tokenizer, the folder of the model's tokenizer")
    if tokenizer is not None and not tokenizer.is_dir():
        raise ConfigError(f"--tokenizer {tokenizer}: there is no such folder")


def _prompts(ids: list[str] | None, text: list[str] | None, reader: Any) -> list[list[int]]:
    if text:
        return [list(reader(prompt)["input_ids"]) for prompt in text]
    return [_numbers(entry) for entry in ids or []]


def _numbers(entry: str) -> list[int]:
    parts = entry.replace(",", " ").split()
    if not parts or not all(part.isdigit() for part in parts):
        raise ConfigError(f'--ids {entry!r}: give the numbers of tokens, as in "1 2 3"')
    return [int(part) for part in parts]


def _padded(prompts: list[list[int]]) -> dict[str, Any]:
    """Return token ids and a mask for prompts of unequal length, padded on the left."""
    if not prompts:
        return {}
    length = max(map(len, prompts))
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _tokenizer(folder: Path) -> Any:
    transformers = load_optional("transformers", "--tokenizer", "lora-fx[hf]")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{folder} holds no tokenizer that can be read: {error}") from error
