"""``lora-fx generate``: text from an exported model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lora_fx.errors import ConfigError
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o

__all__ = ["generate"]


def generate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="An .onnx file that `lora-fx export --task` wrote.",
            show_default=False,
        ),
    ],
    ids: Annotated[
        list[str] | None,
        typer.Option("--ids", help='The tokens of a prompt: "1 2 3". Repeat it for a batch.'),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="A prompt, with --tokenizer. Repeat it for a batch."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="A local folder with a tokenizer of transformers."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="name=FILE.npy: what else an encoder takes. Repeat it."),
    ] = None,
    provider: Annotated[
        str, typer.Option("--provider", help="cpu or cuda: that one, or an error.")
    ] = "cpu",
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="An .onnx_adapter file, or an adapter folder, to run with."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="20 if the file says nothing.")
    ] = None,
    sample: Annotated[
        bool | None,
        typer.Option("--sample/--greedy", help="Draw tokens or take the likeliest."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the draws.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Draw from so many tokens; 0 for all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from tokens of this probability together.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
) -> None:
    """Continue prompts with an exported model, and show tokens, or text with --tokenizer."""
    import torch

    from lora_fx.export.session import OnnxSession

    reader = _tokenizer(tokenizer) if tokenizer is not None else None
    given = _arrays(inputs)
    prompts = _prompts(ids, text, reader)
    wanted: Any = provider
    with console.progress(f"loading {file}"):
        session = OnnxSession(file, wanted)
        chosen = o.loaded_adapter(session, adapter)
    given.update(_padded(prompts))
    began = time.perf_counter()
    with console.progress("generating"):
        made = session.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator().manual_seed(seed),
            adapter=chosen,
        )
    seconds = time.perf_counter() - began
    screen = console.output()
    # A decoder repeats its prompt; that of an encoder-decoder begins anew.
    start = 0 if session.encoder is not None else max(map(len, prompts), default=0)
    for row in made[:, start:].tolist():
        shown = " ".join(map(str, row)) if reader is None else _decoded(reader, row)
        screen.print(shown, highlight=False, soft_wrap=True, markup=False)
    new = made.shape[1] - start
    console.error_console().print(
        f"{session.provider}: {len(made)} × {new} tokens in {seconds:.2f} s, "
        f"{len(made) * new / seconds:.0f} a second",
        highlight=False,
    )


def _prompts(ids: list[str] | None, text: list[str] | None, reader: Any) -> list[list[int]]:
    if ids and text:
        raise ConfigError("--ids and --text say two things: give one of them")
    if text:
        if reader is None:
            raise ConfigError("--text needs --tokenizer, the folder of the model's tokenizer")
        return [list(reader(one)["input_ids"]) for one in text]
    return [_numbers(one) for one in ids or []]


def _numbers(entry: str) -> list[int]:
    parts = entry.replace(",", " ").split()
    if not parts or not all(part.isdigit() for part in parts):
        raise ConfigError(f'--ids {entry!r}: give the numbers of tokens, as in "1 2 3"')
    return [int(part) for part in parts]


def _padded(prompts: list[list[int]]) -> dict[str, Any]:
    """Prompts of unequal length as a batch: ids and mask, padding on the left."""
    if not prompts:
        return {}
    length = max(map(len, prompts))
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _arrays(entries: list[str] | None) -> dict[str, Any]:
    found = {}
    for entry in entries or []:
        name, equals, file = entry.partition("=")
        if not equals or not name or not file:
            raise ConfigError(f"--input {entry}: write name=FILE.npy")
        try:
            found[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{file} is not a readable .npy file: {error}") from error
    return found


def _tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"--tokenizer needs transformers: pip install 'lora-fx[hf]' ({error})"
        ) from error
    if not folder.is_dir():
        raise ConfigError(f"--tokenizer {folder}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{folder} holds no tokenizer that can be read: {error}") from error


def _decoded(reader: Any, tokens: list[int]) -> str:
    return str(reader.decode(tokens, skip_special_tokens=True))
