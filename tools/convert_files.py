"""Convert an adapter of another method over the files of a model, one tensor at a time."""

from __future__ import annotations

import os
from pathlib import Path

from lora_fx.checkpoint import check_free, save_adapter
from lora_fx.conversion import convert
from lora_fx.converted_files import ConvertedFiles
from lora_fx.errors import ConfigError
from lora_fx.extraction import ExtractionReport, RankChoice, weights_in, weights_of
from lora_fx.methods import read_foreign
from lora_fx.progress import Progress
from lora_fx.tools.models import load_model

__all__ = ["convert_files"]


def convert_files(
    path: str | os.PathLike[str],
    model_name: str,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    component: str | None = None,
    force: bool = False,
    progress: Progress = False,
) -> ExtractionReport:
    """Convert an adapter of another method to LoRA, and write it for PEFT.

    Same as :func:`lora_fx.convert_adapter`, but a model of transformers in a folder is read one weight at a
    time.

    Args:
        path: The adapter: a folder of PEFT, or a file of LyCORIS, kohya or ComfyUI.
        model_name: The base model by its name for the command line, such as ``hf:FOLDER``.
        out: The folder to write.
        rank: As for :func:`lora_fx.convert_adapter`.
        energy: As for :func:`lora_fx.convert_adapter`.
        budget: As for :func:`lora_fx.convert_adapter`.
        component: As for :func:`lora_fx.convert_adapter`.
        force: True to replace an adapter in ``out``.
        progress: As for :func:`lora_fx.convert_adapter`.

    Returns:
        The report, with a row for each site.

    Raises:
        CheckpointError: As :func:`lora_fx.convert_adapter`, or if ``out`` has an adapter and ``force`` is
            False.
        ConfigError: As :func:`lora_fx.convert_adapter`, or if the model is unknown, or ``out`` is ``path``.
    """
    choice = RankChoice.of(rank, energy, budget)
    source, target = Path(path), Path(out)
    if target.resolve() == source.resolve():
        raise ConfigError(f"{out} is the adapter that is converted: give another folder")
    check_free(target, force=force)
    scheme, _, name = model_name.partition(":")
    folder = Path(name).expanduser()
    files = scheme == "hf" and folder.is_dir() and any(folder.glob("*.safetensors"))
    trained = source if source.is_dir() else None
    loaded = load_model(model_name, weights=not files, adapter=trained)
    model = loaded.model
    if files and loaded.stored_in is None:
        before = weights_in(ConvertedFiles(folder, model), model)
    else:
        model = load_model(model_name, adapter=trained).model if files else model
        before = weights_of(model, model)
    adapter = read_foreign(source, model, component=component)
    adapted, report = convert(model, adapter, before, choice, progress=progress)
    save_adapter(adapted, target, force=force, save_embedding_layers=False)
    return report
