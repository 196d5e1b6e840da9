"""Extract an adapter from the files of two models, one tensor at a time, without loading either.

The model is built on the meta device to get names and shapes. Memory holds only the adapter, and the tensors
and the decomposition of one weight.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_fx.checkpoint import check_free, save_adapter
from lora_fx.config import LoraConfig
from lora_fx.converted_files import ConvertedFiles
from lora_fx.errors import ConfigError, QuantizationError
from lora_fx.extraction import (
    Difference,
    ExtractionReport,
    RankChoice,
    extract,
    weights_in,
    weights_of,
)
from lora_fx.files import WeightFiles
from lora_fx.progress import Progress
from lora_fx.tools.models import load_model

__all__ = ["extract_files"]


def extract_files(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    force: bool = False,
    progress: Progress = False,
) -> ExtractionReport:
    """Extract an adapter from a fully fine-tuned model of transformers, and write it for PEFT.

    Same as :func:`lora_fx.extract_adapter`, but for models in folders, which are not loaded. Memory holds
    only the adapter and one weight. A head that the base does not have is stored in full.

    Args:
        base: The folder of the model before it was tuned: ``config.json`` and safetensors.
        tuned: The folder of the tuned model.
        out: The folder to write.
        rank: As for :func:`lora_fx.extract_adapter`.
        energy: As for :func:`lora_fx.extract_adapter`.
        budget: As for :func:`lora_fx.extract_adapter`.
        force: True to replace an adapter in ``out``.
        progress: As for :func:`lora_fx.extract_adapter`.

    Returns:
        The report, with a row for each site.

    Raises:
        CheckpointError: If a folder has no safetensors or damaged ones, the tuned model is another one, or
            ``out`` has an adapter and ``force`` is False.
        ConfigError: As :func:`lora_fx.extract_adapter`.
        QuantizationError: If a model is quantized.
    """
    choice = RankChoice.of(rank, energy, budget)
    source, target = Path(base).expanduser(), Path(tuned).expanduser()
    for folder in (source, target):
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is not a folder: give a folder of transformers, with safetensors"
            )
        WeightFiles(folder)  # raises for damaged files
        if folder.resolve() == Path(out).resolve():
            raise ConfigError(f"{out} is the folder of a model: give another one for the adapter")
    check_free(Path(out), force=force)
    loaded = load_model(f"hf:{target}", weights=False)
    if loaded.stored_in is not None:
        raise QuantizationError(
            f"{target} is quantized: extract from dense checkpoints. The adapter loads onto a quantized base "
            "afterwards"
        )
    model = loaded.model
    difference = Difference(
        weights_in(ConvertedFiles(source, model), model), weights_of(target, model)
    )
    config = LoraConfig(base_model_name_or_path=str(source))
    adapted, report = extract(model, difference, choice, progress=progress, config=config)
    save_adapter(adapted, out, force=force, save_embedding_layers=False)
    return report
