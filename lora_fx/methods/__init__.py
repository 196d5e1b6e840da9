"""Adapters of other methods than LoRA, as the changes that they make to the parameters of a model.

Each file that implements methods lists them in its ``METHODS``. PEFT's folders and files of LyCORIS, kohya
and ComfyUI are read.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_fx.adapter_files import DIFFUSERS_NAME, PICKLE_NAME, WEIGHTS_NAME
from lora_fx.config import CONFIG_NAME
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.methods import lycoris_file
from lora_fx.methods.base import CONVERTER, ForeignAdapter, Layer, Method, ParameterChange
from lora_fx.methods.layer_names import PARTS, PlacedLayers, check_part, lora_role, place_layers
from lora_fx.methods.peft_folder import read_peft_folder
from lora_fx.methods.refusals import method_of, read_config, refusal

__all__ = [
    "CONVERTER",
    "PARTS",
    "ForeignAdapter",
    "Layer",
    "Method",
    "ParameterChange",
    "PlacedLayers",
    "check_is_lora",
    "check_part",
    "check_peft_type",
    "lora_role",
    "methods",
    "place_layers",
    "read_foreign",
]


def _built_in() -> tuple[Method, ...]:
    """Return the methods in the ``METHODS`` of every file of this package."""
    files = pkgutil.iter_modules([str(Path(__file__).parent)])
    modules = (importlib.import_module(f"{__name__}.{file.name}") for file in files)
    return tuple(method for module in modules for method in getattr(module, "METHODS", ()))


_METHODS = _built_in()
_OF_PEFT = {method.peft_type: method for method in _METHODS if method.peft_type}
_OF_FILES = tuple(method for method in _METHODS if method.in_files)


def methods() -> tuple[Method, ...]:
    """Return all methods that can be read."""
    return _METHODS


def check_peft_type(folder: Path) -> None:
    """Raise if a folder of PEFT has an adapter of another method than LoRA.

    Raises:
        CheckpointError: If the adapter is of another method; the message says what would work. If the
            configuration is missing or damaged.
    """
    peft_type = read_config(folder)["peft_type"]
    reason = refusal(peft_type, _OF_PEFT)
    if reason is not None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: peft_type is {peft_type!r}: {reason}")


def check_is_lora(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a file of kohya, LyCORIS or diffusers has layers of another method than LoRA and DoRA.

    Args:
        path: The file.
        tensors: Its tensors, by key.

    Raises:
        CheckpointError: If there is such a layer. The message names the tensor, its method, and the
            converter.
    """
    lycoris_file.check_is_lora(path, tensors, _OF_FILES)


def read_foreign(
    path: str | os.PathLike[str], model: nn.Module, *, component: str | None = None
) -> ForeignAdapter:
    """Read an adapter of another method: a folder of PEFT, or a file of LyCORIS, kohya or ComfyUI.

    Args:
        path: The folder or file.
        model: The base model. Only its names, classes and shapes are used, so it may be on the meta device.
        component: The part of a pipeline that the model is ("unet", "transformer", "text_encoder",
            "text_encoder_2", "text_encoder_3"), if several parts of a file fit it.

    Raises:
        CheckpointError: If the files are missing, damaged or for another model, if the adapter is LoRA
            already, or if its method changes no weight. The message names the tensor or the reason.
        ConfigError: If the component does not exist, or is given for a folder.
    """
    path = Path(path)
    if path.is_file() and path.name in (WEIGHTS_NAME, PICKLE_NAME):
        path = path.parent if (path.parent / CONFIG_NAME).is_file() else path
    if (path / DIFFUSERS_NAME).is_file() and not (path / CONFIG_NAME).is_file():
        path = path / DIFFUSERS_NAME
    if path.is_file():
        return lycoris_file.read_lycoris_file(path, model, component, _OF_FILES)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder or file on this machine, and nothing is downloaded: give the local "
            "folder of a PEFT adapter, or a file of LyCORIS or kohya (.safetensors)"
        )
    if component is not None:
        raise ConfigError(
            f"component={component!r}: {path} is a folder of one adapter, and has no parts"
        )
    config = read_config(path)
    return read_peft_folder(path, model, method_of(path, config, _OF_PEFT), config)
