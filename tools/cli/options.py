"""Arguments that several commands take, and the configuration made from them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_fx.config import ALL_LINEAR, LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.files import output_file
from lora_fx.tools.cli import console
from lora_fx.tools.models import FORMS, LoadedModel, load_inputs, load_model

__all__ = [
    "Alpha",
    "Bias",
    "ConfigSource",
    "Dropout",
    "Excludes",
    "Force",
    "FrontendName",
    "InputsName",
    "ModelName",
    "Rank",
    "RsLora",
    "Saved",
    "Strict",
    "TargetRegex",
    "Targets",
    "as_options",
    "capture_options",
    "config_from",
    "file_to_write",
    "load",
    "loaded_adapter",
]


# Not inside a call, which is Python as a whole.
_ARGUMENT = re.compile(
    r"(?<![\w.(])(?<!, )(?P<name>\w+)=(?P<value>'[^'\s]*'|True|False|\d+(?:\.\d+)?\b)"
)


def as_options(message: str, commands: Iterable[Any]) -> str:
    """``adapters='inputs'`` as ``--adapters inputs``, where a command has such an option.

    Args:
        message: Of an error.
        commands: Those of the application.
    """
    options = {
        str(one.name): one
        for command in commands
        for one in command.params
        if one.param_type_name == "option"
    }

    def spelt(match: re.Match[str]) -> str:
        option, value = options.get(match["name"]), match["value"]
        if option is None:
            return match[0]
        if not option.is_flag:
            return f"{option.opts[0]} {value.strip(chr(39))}"
        names = option.opts if value == "True" else option.secondary_opts
        return str(names[0]) if names and value in ("True", "False") else match[0]

    return _ARGUMENT.sub(spelt, message)


_PANEL = "What to adapt"
_CAPTURE = "How to look at the model"

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS}.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
Rank = Annotated[
    int | None,
    typer.Option("--r", help="Rank of the adapters; 8 if nobody says.", rich_help_panel=_PANEL),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="The branch is scaled by alpha / r.", rich_help_panel=_PANEL),
]
Dropout = Annotated[
    float | None,
    typer.Option("--dropout", help="Of the adapters' input, in [0, 1).", rich_help_panel=_PANEL),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="Name of an operation or its last part, or all-linear. Repeat it, or use commas. "
        "Without it: every linear operation but the output head.",
        rich_help_panel=_PANEL,
    ),
]
TargetRegex = Annotated[
    str | None,
    typer.Option(
        "--target-regex", help="A regular expression for whole names.", rich_help_panel=_PANEL
    ),
]
Excludes = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Not these; as --target.", rich_help_panel=_PANEL),
]
Saved = Annotated[
    list[str] | None,
    typer.Option(
        "--modules-to-save", help="Modules that are trained in full.", rich_help_panel=_PANEL
    ),
]
RsLora = Annotated[
    bool | None,
    typer.Option("--rslora/--no-rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=_PANEL),
]
Bias = Annotated[
    str | None,
    typer.Option("--bias", help="Train biases: none, all, lora_only.", rich_help_panel=_PANEL),
]
ConfigSource = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A JSON file, or an adapter folder, to start from; the other options change it.",
        rich_help_panel=_PANEL,
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail if a target selects nothing.", rich_help_panel=_PANEL)
]

FrontendName = Annotated[
    str,
    typer.Option(
        "--frontend",
        help="auto, symbolic, regions or export; export takes the inputs that hf: and timm: models "
        "say they take, or --inputs.",
        rich_help_panel=_CAPTURE,
    ),
]
InputsName = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        metavar="MODULE:CALLABLE",
        help="A callable that gives example inputs: a tuple, a dict or a tensor.",
        rich_help_panel=_CAPTURE,
    ),
]


def capture_options(loaded: LoadedModel, frontend: str, inputs: str | None) -> dict[str, Any]:
    """How a command captures: keyword arguments of the verbs.

    Inputs that come with a model are used where a graph cannot be made without. Those of ``--inputs``
    are always used: with them, the result is compared with the model.

    Raises:
        ConfigError: If ``inputs`` names nothing that can be called.
    """
    if inputs is not None:
        return {"frontend": frontend, "example_inputs": load_inputs(inputs)}
    given = loaded.example_inputs if frontend == "export" else None
    return {"frontend": frontend, "example_inputs": given}


def config_from(
    source: Path | None,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: list[str] | None = None,
    target_regex: str | None = None,
    excludes: list[str] | None = None,
    saved: list[str] | None = None,
    rslora: bool | None = None,
    bias: str | None = None,
) -> LoraConfig:
    """The configuration: that of ``source``, with what was given on the command line changed.

    Raises:
        ConfigError: A value means nothing, or two contradict each other.
        CheckpointError: ``source`` is a folder without a readable configuration.
    """
    if targets and target_regex is not None:
        raise ConfigError("--target and --target-regex say two things: give one of them")
    names = _split(targets)
    selected: Any = target_regex if target_regex is not None else names
    if names and [name.lower() for name in names] == [ALL_LINEAR]:
        selected = ALL_LINEAR
    given = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": selected,
        "exclude_modules": _split(excludes),
        "modules_to_save": _split(saved),
        "use_rslora": rslora,
        "bias": bias,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(_read(source), **changes) if source else LoraConfig(**changes)


def load(name: str, *, weights: bool = True) -> LoadedModel:
    """Loads a model under a progress bar."""
    with console.progress(f"loading {name}"):
        return load_model(name, weights=weights)


def file_to_write(given: str, suffixes: Sequence[str], *, force: bool) -> Path:
    """The path of a file that a command writes: it stops before the work is done, not after it.

    Args:
        given: As it was typed: a Path would not keep the separator at its end.
        suffixes: Those that the file may have.
        force: Whether something may be there already.

    Raises:
        ConfigError: It is a folder or has another suffix, or something is there already.
    """
    path = output_file(given, suffixes, ConfigError)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists: give another name, or --force to write over it")
    return path


def _split(names: list[str] | None) -> list[str] | None:
    if not names:
        return None
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def _read(source: Path) -> LoraConfig:
    if source.is_dir() or not source.exists():
        return LoraConfig.from_pretrained(source)
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} does not hold a JSON object of LoraConfig's fields")
    try:
        return LoraConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def loaded_adapter(session: Any, adapter: Path | None) -> str | None:
    """Loads an adapter file or folder into a session of ONNX Runtime; the name that it has there."""
    if adapter is None:
        return None
    session.load_adapter(adapter.stem, adapter)
    return adapter.stem
