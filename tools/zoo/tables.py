"""Reads the models of libraries, which are rows of ``transformers.toml`` and the like.

A table of a file is a group, a row a model: ``make`` is its class, or the name that its library makes it by;
``inputs`` names what it takes, by default that of its group; ``with`` names options of the table ``options``,
which its own options come after. ``"None"`` stands for None. An empty row is
put together in ``assembled.py``.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_fx.tools.zoo.assembled import ASSEMBLED
from lora_fx.tools.zoo.entries import Built, Entry
from lora_fx.tools.zoo.inputs import inputs_of

__all__ = ["read"]

Maker = Callable[[str, str, dict[str, Any]], Built]
"""Gets the name, the inputs and the options."""


def read(library: str) -> tuple[Entry, ...]:
    """The entries of a library, in the order of its file."""
    text = Path(__file__).with_name(f"{library}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    shared, found = tables.pop("options", {}), []
    for group, rows in tables.items():
        inputs = rows.pop("inputs")
        for name, row in rows.items():
            title, targets = f"{library}/{name}", row.pop("targets", None)
            fields = {"note": row.pop("note", ""), "targets": targets and tuple(targets)}
            if row:
                what = (row.pop("make"), row.pop("inputs", inputs))
                make = _maker(library, *what, _options(row, shared, library))
            else:
                make = ASSEMBLED[title]
            found.append(Entry(title, group, make, **fields))
    return tuple(found)


def _maker(library: str, name: str, inputs: str, options: dict[str, Any]) -> Callable[[], Built]:
    return lambda: _MAKERS[library](name, inputs, options)


def _options(row: Any, shared: Mapping[str, Any], library: str) -> Any:
    """The options with those that they name, and in the types of Python."""
    if isinstance(row, dict):
        found: dict[str, Any] = {}
        for name in row.get("with", ()):
            found |= _options(shared[name], shared, library)
        own = {name: one for name, one in row.items() if name != "with"}
        return found | {name: _options(one, shared, library) for name, one in own.items()}
    if isinstance(row, list):
        # Which of the two it is matters to them.
        kind = tuple if library in ("timm", "diffusers") else list
        return kind(_options(one, shared, library) for one in row)
    return None if row == "None" else row


def _of_transformers(name: str, inputs: str, options: dict[str, Any]) -> Built:
    kind = getattr(importlib.import_module("transformers"), name)
    config = kind.config_class(**options)
    # Drawn before the weights are.
    given = inputs_of(inputs)
    return kind(config), given


def _of_diffusers(name: str, inputs: str, options: dict[str, Any]) -> Built:
    given: Any = inputs_of(inputs)
    made = getattr(importlib.import_module("diffusers"), name)(**options)
    return made, {**given, "return_dict": False}


def _of_timm(name: str, inputs: str, options: dict[str, Any]) -> Built:
    timm = importlib.import_module("timm")
    module, _, class_name = name.partition(".")
    if class_name:
        kind = getattr(importlib.import_module(f"timm.models.{module}"), class_name)
        return kind(num_classes=5, **options), inputs_of(inputs)
    return timm.create_model(name, pretrained=False, num_classes=5, **options), inputs_of(inputs)


def _of_torchvision(name: str, inputs: str, options: dict[str, Any]) -> Built:
    models = importlib.import_module("torchvision.models")
    options = {"num_classes": 5, **options}
    if name in vars(models) and isinstance(getattr(models, name), type):
        return getattr(models, name)(**options), inputs_of(inputs)
    return models.get_model(name, weights=None, **options), inputs_of(inputs)


_MAKERS: Mapping[str, Maker] = {
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
    "timm": _of_timm,
    "torchvision": _of_torchvision,
}
