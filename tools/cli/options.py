"""How a command is made of a function, and the groups of options that several commands take."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from lora_fx.config import ALL_LINEAR, LoraConfig
from lora_fx.errors import CheckpointError, ConfigError, QuantizationError
from lora_fx.extras import load_optional
from lora_fx.files import output_file
from lora_fx.tools.cli import console
from lora_fx.tools.models import FORMS, LoadedModel, load_inputs, load_model

if TYPE_CHECKING:
    import torch

__all__ = [
    "Adapters",
    "Capturing",
    "ModelName",
    "Storing",
    "Training",
    "TypedError",
    "as_options",
    "command",
    "config_in",
    "dtype_of",
    "file_to_write",
    "load",
    "loaded_adapters",
]

_log = logging.getLogger("lora_fx")

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS}.", show_default=False)]

# Where the name that Python allows is not the one to type.
_NAMES = {"as_json": "--json", "as_plan": "--plan", "as_format": "--format", "every": "--all"}
_ENTRY = re.compile(r"    (?P<name>\w+): (?P<help>.*)")


class TypedError(ConfigError):
    """What is wrong with something that was typed: it is told in the words of the command line already."""


class Options:
    """A group of options: a dataclass whose fields are options, with their help in its docstring."""

    PANEL: ClassVar[str]


def command(**special: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command.

    A parameter without a default is an argument, one with a default is an option of its name, and one
    that is a group of options stands for those. The help of each is what the docstring says of it. A
    flag that is off has no opposite.

    Args:
        special: By parameter: its ``name`` on the command line, where it is another, ``argument`` for one
            with a default that is an argument all the same, and more arguments of ``typer.Option`` or
            ``typer.Argument``.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, tuple[type, list[str]]] = {}
        shown: list[inspect.Parameter] = []
        for one in _parameters(function):
            if isinstance(one.annotation, type) and issubclass(one.annotation, Options):
                fields: Any = dataclasses.fields(one.annotation)  # type: ignore[arg-type]
                more = {field.name: dict(field.metadata) for field in fields}
                groups[one.name] = (one.annotation, list(more))
                shown += [
                    _option(field, more, one.annotation) for field in _parameters(one.annotation)
                ]
            else:
                shown.append(_option(one, special, function))

        @functools.wraps(function)
        def run(**given: Any) -> None:
            made = {
                name: group(**{field: given.pop(field) for field in fields})
                for name, (group, fields) in groups.items()
            }
            function(**given, **made)

        keyword = inspect.Parameter.KEYWORD_ONLY
        shown = [one.replace(kind=keyword) for one in shown]
        del run.__wrapped__
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in shown}
        run.__doc__ = (inspect.getdoc(function) or "").partition("\nArgs:\n")[0]
        return run

    return decorate


def _parameters(of: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(of, include_extras=True)
    for one in inspect.signature(of).parameters.values():
        yield one.replace(annotation=hints[one.name])


def _option(
    one: inspect.Parameter, special: dict[str, dict[str, Any]], owner: Any
) -> inspect.Parameter:
    if one.annotation is ModelName:
        return one
    how = {"help": _helps(owner).get(one.name), **special.get(one.name, {})}
    if how.pop("argument", False) or one.default is inspect.Parameter.empty:
        found: Any = typer.Argument(metavar=how.pop("metavar", one.name.upper()), **how)
        found.show_default = False
    else:
        name = how.pop("name", _NAMES.get(one.name))
        if name is None and one.default is False:
            name = f"--{one.name.replace('_', '-')}"
        named = [] if name is None else [name]
        found = typer.Option(*named, rich_help_panel=getattr(owner, "PANEL", None), **how)
    return one.replace(annotation=Annotated[one.annotation, found])


def _helps(of: Any) -> dict[str, str]:
    """Return the description of each parameter or attribute in a docstring."""
    text = inspect.getdoc(of) or ""
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in re.split(r"\n(?:Args|Attributes):\n", text, maxsplit=1)[-1].splitlines():
        if (match := _ENTRY.fullmatch(line)) is not None:
            current = entries[match["name"]] = [match["help"]]
        elif line.strip():
            current.append(line.strip())
    return {name: " ".join(lines) for name, lines in entries.items()}


@dataclasses.dataclass
class Adapters(Options):
    """The options that say what to adapt.

    Attributes:
        r: Rank of the adapters; 8 by default.
        alpha: The branch is scaled by alpha / r.
        dropout: Of the adapters' input, in [0, 1).
        target: Name of an operation or its last part, or all-linear. Repeat it, or use commas. Without
            it: every linear operation but the output head and routers.
        target_regex: A regular expression for whole names.
        exclude: Not these; as --target.
        scope: Only what lies in this module (model.language_model). Repeat it, or use commas.
        modules_to_save: Modules that are trained in full.
        rslora: Scale by alpha / sqrt(r).
        bias: Train biases: none, all, lora_only.
        config: A JSON or YAML file, or an adapter folder, to start from; the other options change it.
        strict: Fail if a target selects nothing.
    """

    PANEL = "What to adapt"

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target: list[str] | None = None
    target_regex: str | None = None
    exclude: list[str] | None = None
    scope: list[str] | None = None
    modules_to_save: list[str] | None = None
    rslora: bool | None = None
    bias: str | None = None
    config: Path | None = None
    strict: bool = False

    def made(self) -> LoraConfig:
        """The configuration: that of ``--config``, with what was given on the command line changed.

        Raises:
            ConfigError: A value is not valid, or two contradict each other.
            CheckpointError: ``--config`` is a folder without a readable configuration.
        """
        if self.target and self.target_regex is not None:
            raise ConfigError("--target and --target-regex say two things: give one of them")
        names = _split(self.target)
        selected: Any = self.target_regex if self.target_regex is not None else names
        if names and [name.lower() for name in names] == [ALL_LINEAR]:
            selected = ALL_LINEAR
        given = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": selected,
            "exclude_modules": _split(self.exclude),
            "scope": _split(self.scope),
            "modules_to_save": _split(self.modules_to_save),
            "use_rslora": self.rslora,
            "bias": self.bias,
        }
        changes: dict[str, Any] = {name: one for name, one in given.items() if one is not None}
        if self.config is None:
            return LoraConfig(**changes)
        return dataclasses.replace(config_in(self.config), **changes)


@dataclasses.dataclass
class Capturing(Options):
    """The options that say how a model is looked at.

    Attributes:
        frontend: auto, symbolic, regions or export; export takes the inputs that hf: and timm: models
            say they take, or --inputs.
        inputs: A callable that gives example inputs: a tuple, a dict or a tensor.
    """

    PANEL = "How to look at the model"

    frontend: str = "auto"
    inputs: str | None = dataclasses.field(default=None, metadata={"metavar": "MODULE:CALLABLE"})

    @property
    def by_default(self) -> bool:
        """Whether both options are left at their defaults."""
        return self.frontend == "auto" and self.inputs is None

    def load(self, name: str) -> LoadedModel:
        """Loads a model; with inputs, they run through it, and it needs its weights."""
        return load(name, weights=self.inputs is not None)

    def of(self, loaded: LoadedModel) -> dict[str, Any]:
        """How a command captures: keyword arguments of the verbs.

        Inputs that come with a model are used where a graph cannot be made without. Those of ``--inputs``
        are always used: with them, the result is compared with the model.

        Raises:
            ConfigError: If ``--inputs`` names nothing that can be called.
        """
        if self.inputs is not None:
            return {"frontend": self.frontend, "example_inputs": load_inputs(self.inputs)}
        given = loaded.example_inputs if self.frontend == "export" else None
        return {"frontend": self.frontend, "example_inputs": given}


_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclasses.dataclass
class Training(Options):
    """The options that say on which GPUs a step of training is planned.

    Attributes:
        mesh: Plan a step on GPUs: fsdp=8 shards the weights over 8, replicate=2,fsdp=8 over two such groups,
            and tp=2 cuts layers over 2.
        batch: Samples that each GPU, or each group of tp, gets in a step.
        sequence: Tokens of a sample, for a model of text.
        dtype: Of the weights: bf16, fp16 or fp32.
        checkpointing: Compute blocks again in the backward instead of keeping what they need.
    """

    PANEL = "What a training step needs"

    mesh: str | None = dataclasses.field(default=None, metadata={"metavar": "NAME=SIZE,..."})
    batch: int = 1
    sequence: int = 2048
    dtype: str = "bf16"
    checkpointing: bool = False

    def planned(self, loaded: LoadedModel, config: LoraConfig, inputs: Any) -> Any:
        """Return what a GPU of the mesh needs, or None without a mesh.

        Raises:
            ConfigError: An option has no meaning, or the model cannot be planned so.
        """
        if self.mesh is None:
            return None
        from lora_fx.tools.cluster import Mesh, plan_step, step_inputs

        mesh = Mesh.parse(self.mesh)
        if self.batch < 1 or self.sequence < 1:
            raise ConfigError("--batch and --sequence are at least 1")
        dtype = dtype_of(self.dtype)
        given = step_inputs(loaded.model, inputs, batch=self.batch, sequence=self.sequence)
        with console.progress(f"a step on {mesh}"):
            return plan_step(
                loaded.model, config, mesh, given, dtype=dtype, checkpointing=self.checkpointing
            )


@dataclasses.dataclass
class Storing(Options):
    """The option that quantizes weights before a model is rewritten.

    Attributes:
        quantize: Quantize the weights of linear operations first: nf4, fp4, int8 or int4.
    """

    PANEL = "What the base is stored in"

    quantize: str | None = dataclasses.field(default=None, metadata={"metavar": "FORMAT"})

    def planned(self, loaded: LoadedModel) -> Any:
        """What would be quantized: a quantization plan, or None.

        Raises:
            QuantizationError: If the model is quantized already. One of a folder is made without its
                weights, so that only its configuration says so.
        """
        from lora_fx.adapters import plan_quantization

        if self.quantize is None:
            return None
        how = getattr(getattr(loaded.model, "config", None), "quantization_config", None)
        if how is not None:
            raise QuantizationError(
                f"{loaded.name} is quantized already, as quantization_config in its config.json says: leave "
                "--quantize out, or give the folder that it was made of"
            )
        with console.progress("planning"):
            return plan_quantization(loaded.model, self.quantize)

    def load(self, name: str, look: Capturing) -> LoadedModel:
        """Loads a model and quantizes it where that is asked for, under progress bars.

        The weights of a folder of transformers are read one by one, where the folder names them as the
        model does; other models are loaded whole.

        Raises:
            ConfigError: If the frontend is one that quantized models cannot have.
        """
        from lora_fx.adapters import quantize

        if self.quantize is None:
            return look.load(name)
        if look.frontend == "export":
            raise ConfigError(
                "--frontend export takes quantized weights apart: use auto or regions"
            )
        if name.startswith("hf:"):
            empty = load(name, weights=False)
            folder = empty.folder
            files = folder is not None and any(True for _ in folder.glob("*.safetensors"))
            try:
                if files:
                    with console.progress("quantizing") as tell:
                        made = quantize(empty.model, self.quantize, weights=folder, progress=tell)
                    return dataclasses.replace(empty, model=made)
            except CheckpointError as error:
                _log.warning("loaded whole, not weight by weight: %s", error)
        loaded = load(name)
        with console.progress("quantizing") as tell:
            made = quantize(loaded.model, self.quantize, progress=tell)
        return dataclasses.replace(loaded, model=made)


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


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that is called so; None stays None.

    Raises:
        ConfigError: If there is none.
    """
    import torch

    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name} is unknown: give one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


def _split(names: list[str] | None) -> list[str] | None:
    if not names:
        return None
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def config_in(source: Path) -> LoraConfig:
    """The configuration in a JSON or YAML file, or in an adapter folder.

    Raises:
        ConfigError: If it is none, or PyYAML is missing for a YAML file.
        CheckpointError: If it is a folder without a readable configuration.
    """
    if source.is_dir() or not source.exists():
        return LoraConfig.from_pretrained(source)
    as_yaml = source.suffix.lower() in (".yaml", ".yml")
    kind = "YAML" if as_yaml else "JSON"
    try:
        text = source.read_text(encoding="utf-8")
        values = _parse_yaml(text) if as_yaml else json.loads(text)
    except ConfigError:
        raise  # the package for YAML is missing
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is not readable {kind}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} does not hold a {kind} object of LoraConfig's fields")
    try:
        return LoraConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _parse_yaml(text: str) -> Any:
    yaml = load_optional("yaml", "a YAML file", "lora-fx[cli]")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def loaded_adapters(session: Any, given: Iterable[str] | None) -> str | list[str | None] | None:
    """Load adapter files or folders into a session of ONNX Runtime.

    Args:
        session: An ``OnnxSession``.
        given: Files, folders and names of adapters that are in the bank of the file, or "none".

    Returns:
        The name that it has there; for several a list, one for each row of the batch.

    Raises:
        TypedError: If two of them would have the same name.
    """
    names: dict[str, str | None] = {}
    for one in (rows := list(given or ())):
        path = Path(one)
        if one in names or (one in session.adapters and not path.exists()):
            names.setdefault(one, one)
        elif one == "none" and not path.exists():
            names[one] = None
        elif path.stem in names.values():
            raise TypedError(
                f"--adapter {one}: another one is named {path.stem}: rename its folder"
            )
        else:
            session.load_adapter(path.stem, path)
            names[one] = path.stem
    chosen = [names[one] for one in rows]
    return chosen if len(chosen) > 1 else next(iter(chosen), None)


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

    def spelled(match: re.Match[str]) -> str:
        option, value = options.get(match["name"]), match["value"]
        if option is None:
            return match[0]
        if not option.is_flag:
            return f"{option.opts[0]} {value.strip(chr(39))}"
        names = option.opts if value == "True" else option.secondary_opts
        return str(names[0]) if names and value in ("True", "False") else match[0]

    return _ARGUMENT.sub(spelled, message)
