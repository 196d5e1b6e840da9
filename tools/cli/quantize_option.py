"""``--quantize``: a model whose weights are stored in few bits before it is rewritten."""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated, Any

import typer

from lora_fx.errors import CheckpointError, ConfigError, QuantizationError
from lora_fx.tools.cli import console
from lora_fx.tools.cli import options as o
from lora_fx.tools.models import LoadedModel

__all__ = ["Quantize", "load_quantised", "planned"]

_log = logging.getLogger("lora_fx")
_PANEL = "What the base is stored in"

Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="FORMAT",
        help="Store the weights of linear operations in few bits first: nf4, fp4, int8 or int4.",
        rich_help_panel=_PANEL,
    ),
]


def planned(loaded: LoadedModel, format_name: str) -> Any:
    """What would be stored in few bits: a :class:`lora_fx.passes.quantize.planning.QuantizationPlan`.

    Raises:
        QuantizationError: If the model is quantised already. One of a folder is made without its weights, so
            that only its configuration says so.
    """
    from lora_fx.adapters import plan_quantization

    how = getattr(getattr(loaded.model, "config", None), "quantization_config", None)
    if how is not None:
        raise QuantizationError(
            f"{loaded.name} is quantised already, as quantization_config in its config.json says: leave "
            "--quantize out, or give the folder that it was made of"
        )
    with console.progress("planning"):
        return plan_quantization(loaded.model, format_name)


def load_quantised(name: str, format_name: str, *, frontend: str) -> LoadedModel:
    """Loads a model and stores it in few bits, under progress bars.

    The weights of a folder of transformers are read one by one, where the folder names them as the model
    does; other models are loaded whole.

    Raises:
        ConfigError: If ``frontend`` is one that quantised models cannot have.
    """
    from lora_fx.adapters import quantize

    if frontend == "export":
        raise ConfigError("--frontend export takes quantised weights apart: use auto or regions")
    if name.startswith("hf:"):
        empty = o.load(name, weights=False)
        files = empty.folder is not None and any(True for _ in empty.folder.glob("*.safetensors"))
        try:
            if files:
                with console.progress("quantising") as advance:
                    model = quantize(
                        empty.model, format_name, weights=empty.folder, progress=advance
                    )
                return dataclasses.replace(empty, model=model)
        except CheckpointError as error:
            _log.warning("loaded whole, not weight by weight: %s", error)
    loaded = o.load(name)
    with console.progress("quantising") as advance:
        model = quantize(loaded.model, format_name, progress=advance)
    return dataclasses.replace(loaded, model=model)
