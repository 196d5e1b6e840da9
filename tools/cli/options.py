"""Construction of commands from functions, and groups of options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from lora_fx.config import ALL_LINEAR, LoraConfig, adapters_below
from lora_fx.errors import CheckpointError, ConfigError, QuantizationError, some
from lora_fx.extras import load_optional
from lora_fx.files import output_file
from lora_fx.tools.cli import console
from lora_fx.tools.models import (
    FORMS,
    LoadedModel,
    check_adapter_path,
    check_model_name,
    load_inputs,
    load_model,
)

if TYPE_CHECKING:
    import torch

    from lora_fx.tools.cluster import Mesh, Need, Settings
    from lora_fx.tools.fit import Fit
    from lora_fx.tools.timeline import Row

__all__ = [
    "Adapters",
    "Capturing",
    "ModelName",
    "Sizing",
    "Storing",
    "Training",
    "TypedError",
    "as_options",
    "check_choices",
    "check_file",
    "check_names",
    "command",
    "config_in",
    "dtype_of",
    "file_to_write",
    "load",
    "loaded_adapters",
]

_log = logging.getLogger("lora_fx")

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=f"{FORMS}.", show_default=False)]

# Options whose name on the command line differs from the parameter's name.
_NAMES = {"as_json": "--json", "as_plan": "--plan", "as_format": "--format", "every": "--all"}
_ENTRY = re.compile(r"    (?P<name>\w+): (?P<help>.*)")


class TypedError(ConfigError):
    """An error in typed input whose message already names options instead of Python arguments."""


class Options:
    """A group of options: a dataclass whose fields are options, with their help in its docstring."""

    PANEL: ClassVar[str]


def command(**special: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a command.

    A parameter without a default becomes an argument. A parameter with a default becomes an option with the
    same name. A group of options becomes an option for each field. The help comes from the docstring. A flag
    that is off by default has no opposite (``--no-...``).

    Args:
        special: Settings for parameters, by name. ``name`` is another name, or several, on the command line.
            ``argument`` makes a parameter with a default an argument. All others are arguments of
            ``typer.Option`` or ``typer.Argument``.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, tuple[type, list[str]]] = {}
        shown: list[inspect.Parameter] = []
        for parameter in _parameters(function):
            if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Options):
                fields: Any = dataclasses.fields(parameter.annotation)  # type: ignore[arg-type]
                more = {field.name: dict(field.metadata) for field in fields}
                groups[parameter.name] = (parameter.annotation, list(more))
                shown += [
                    _option(field, more, parameter.annotation)
                    for field in _parameters(parameter.annotation)
                ]
            else:
                shown.append(_option(parameter, special, function))

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            option_groups = {
                name: group(**{field: arguments.pop(field) for field in fields})
                for name, (group, fields) in groups.items()
            }
            function(**arguments, **option_groups)

        keyword = inspect.Parameter.KEYWORD_ONLY
        shown = [parameter.replace(kind=keyword) for parameter in shown]
        del run.__wrapped__
        run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        run.__doc__ = (inspect.getdoc(function) or "").partition("\nArgs:\n")[0]
        return run

    return decorate


def _parameters(function: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        yield parameter.replace(annotation=hints[parameter.name])


def _option(
    parameter: inspect.Parameter, special: dict[str, dict[str, Any]], owner: Any
) -> inspect.Parameter:
    if parameter.annotation is ModelName:
        return parameter
    settings = {"help": _helps(owner).get(parameter.name), **special.get(parameter.name, {})}
    if settings.pop("argument", False) or parameter.default is inspect.Parameter.empty:
        info: Any = typer.Argument(
            metavar=settings.pop("metavar", parameter.name.upper()), **settings
        )
        info.show_default = False
    else:
        name = settings.pop("name", _NAMES.get(parameter.name))
        if name is None and parameter.default is False:
            name = f"--{parameter.name.replace('_', '-')}"
        named = [name] if isinstance(name, str) else list(name or ())
        info = typer.Option(*named, rich_help_panel=getattr(owner, "PANEL", None), **settings)
    return parameter.replace(annotation=Annotated[parameter.annotation, info])


def _helps(owner: Any) -> dict[str, str]:
    """Parse the help of each option from a docstring's ``Args`` or ``Attributes``."""
    text = inspect.getdoc(owner) or ""
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
    """Options that select what to adapt.

    Attributes:
        r: Rank of the adapters; 8 by default.
        alpha: The branch is scaled by alpha / r.
        dropout: Dropout probability for the input of the adapters, in [0, 1).
        target: Name of an operation or its last part, or all-linear. Repeat it, or use commas. By default
            every linear operation but the output head and routers.
        target_regex: A regular expression for whole names.
        exclude: Names not to adapt, written as for --target.
        scope: Adapt only operations in this module (model.language_model). Repeat it, or use commas.
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
        """Return the configuration of ``--config``, changed by the other options.

        Raises:
            ConfigError: If a value is not valid, or two values contradict each other.
            CheckpointError: If ``--config`` is a folder without a readable configuration.
        """
        if self.target and self.target_regex is not None:
            raise ConfigError("--target and --target-regex say two things: give one of them")
        names = _split(self.target)
        selected: Any = self.target_regex if self.target_regex is not None else names
        if names and [name.lower() for name in names] == [ALL_LINEAR]:
            selected = ALL_LINEAR
        typed = {
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
        changes: dict[str, Any] = {k: value for k, value in typed.items() if value is not None}
        if self.config is None:
            return LoraConfig(**changes)
        return dataclasses.replace(config_in(self.config), **changes)


@dataclasses.dataclass
class Capturing(Options):
    """Options for the capture of a model.

    Attributes:
        frontend: auto, symbolic, regions or export; export uses --inputs, or the inputs that are known for
            hf: and timm: models.
        inputs: A callable that returns example inputs: a tuple, a dict or a tensor.
    """

    PANEL = "How to look at the model"

    frontend: str = "auto"
    inputs: str | None = dataclasses.field(default=None, metadata={"metavar": "MODULE:CALLABLE"})

    @property
    def by_default(self) -> bool:
        """Return True if neither option of the capture was set."""
        return self.frontend == "auto" and self.inputs is None

    def load(self, name: str) -> LoadedModel:
        """Load a model, with its weights if there are inputs, because the inputs run through it."""
        return load(name, weights=self.inputs is not None)

    def of(self, loaded: LoadedModel) -> dict[str, Any]:
        """Return the capture's keyword arguments for :func:`lora_fx.rewrite` and similar functions.

        The inputs that are known for a model are used only if the frontend needs inputs. The inputs of
        ``--inputs`` are always used, and the result is compared with the model on them.

        Raises:
            ConfigError: If ``--inputs`` does not name a callable.
        """
        if self.inputs is not None:
            return {"frontend": self.frontend, "example_inputs": load_inputs(self.inputs)}
        inputs = loaded.example_inputs if self.frontend == "export" else None
        return {"frontend": self.frontend, "example_inputs": inputs}


_LARGEST = 10  # tensors at the peak that are listed
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _check_choice(name: str, value: str | None, values: Sequence[str]) -> None:
    if value is not None and value not in values:
        raise ConfigError(f"--{name} {value} is unknown: give one of {', '.join(values)}")


@dataclasses.dataclass
class Training(Options):
    """Options for the plan of a training step on GPUs.

    Attributes:
        mesh: Plan a step on GPUs: fsdp=8 shards the weights over 8, replicate=2,fsdp=8 over two such groups,
            and tp=2 cuts layers over 2.
        batch: Samples that each GPU, or each group of tp, gets in a step.
        sequence: Tokens of a sample, for a model of text.
        dtype: Dtype of the weights: bf16, fp16 or fp32.
        checkpointing: Compute blocks again in the backward instead of keeping their activations.
        base: Format of the frozen weights: one of --quantize (the default), or mxfp4, fp8 or gptq as
            checkpoints have them.
        memory: As in lora_fx.rewrite: fast, balanced, or least for the longest sequences.
        optimizer: adamw, adamw_8bit, paged_adamw, paged_adamw_8bit or sgd.
        fit: Show the longest context and the largest batch that fit on a card: 24GB, 16GiB.
        host: Limit for the memory of the host, which holds the inputs of blocks, with --fit: 64GB. No limit
            by default.
        timeline: Write a page with the live bytes of the step, on one GPU without --mesh: FILE.html.
    """

    PANEL = "What a training step needs"

    mesh: str | None = dataclasses.field(default=None, metadata={"metavar": "NAME=SIZE,..."})
    batch: int = 1
    sequence: int = 2048
    dtype: str = "bf16"
    checkpointing: bool = False
    base: str | None = dataclasses.field(default=None, metadata={"metavar": "FORMAT"})
    memory: str | None = None
    optimizer: str = "adamw"
    fit: str | None = dataclasses.field(default=None, metadata={"metavar": "SIZE"})
    host: str | None = dataclasses.field(default=None, metadata={"metavar": "SIZE"})
    timeline: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE.html"})

    @property
    def plans(self) -> bool:
        """Return True if the options ask for the plan of a step."""
        return self.mesh is not None or self.timeline is not None

    def settings(self, quantize: str | None) -> Settings:
        """Return the settings of the step. ``quantize`` is the format of ``--quantize``, or None."""
        from lora_fx.tools.cluster import Settings

        memory: Any = self.memory or "fast"
        return Settings(
            dtype=dtype_of(self.dtype),
            checkpointing=self.checkpointing,
            memory=memory,
            quantize=self.base or quantize,
            optimizer=self.optimizer,
        )

    def parse_mesh(self) -> Mesh:
        """Return the mesh, by default one GPU.

        Raises:
            ConfigError: If the text is no mesh.
        """
        from lora_fx.tools.cluster import Mesh

        return Mesh() if self.mesh is None else Mesh.parse(self.mesh)

    def page_path(self) -> Path | None:
        """Return the file of the timeline, or None.

        Raises:
            ConfigError: If the path is a folder or has another suffix.
        """
        if self.timeline is None:
            return None
        return file_to_write(self.timeline, (".html",), force=True)

    def title(self, *, text: bool) -> str:
        """Return one line about the step. ``text`` is True if samples consist of tokens."""
        tokens = f"of {self.sequence} tokens " if text else ""
        name = "AdamW" if self.optimizer == "adamw" else self.optimizer
        more = ", blocks computed again" if self.checkpointing else ""
        more += f", memory={self.memory}" if self.memory is not None else ""
        return (
            f"a step of {name} on {self.parse_mesh()}: {self.batch} samples {tokens}on each GPU, "
            f"{self.base or self.dtype}{more}"
        )

    def check(self) -> None:
        """Check the options before a model is loaded.

        Raises:
            ConfigError: If an option is not valid.
        """
        if self.batch < 1 or self.sequence < 1:
            raise ConfigError("--batch and --sequence are at least 1")
        _check_choice("memory", self.memory, ("fast", "balanced", "least"))
        if self.fit is not None and self.mesh is not None:
            raise ConfigError("--fit is for one card: leave --mesh out")
        self.page_path()
        if self.host is not None and self.fit is None:
            raise ConfigError("--host is a limit of --fit: name a card, too")
        if not self.plans and self.fit is None:
            for option, value in (("base", self.base), ("optimizer", self.optimizer)):
                if value not in (None, "adamw"):
                    raise ConfigError(
                        f"--{option} is for the plan of a step: add --fit, --mesh or --timeline"
                    )
            return
        from lora_fx.tools.cluster import OPTIMIZERS
        from lora_fx.tools.fit import size_of
        from lora_fx.tools.planned_weights import STORED, names_of_formats

        _check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        _check_choice("base", self.base, (*names_of_formats(), *STORED))
        for option, size in (("fit", self.fit), ("host", self.host)):
            if size is not None:
                size_of(option, size)
        check_names(dtype=self.dtype)
        self.parse_mesh()

    def fitting(
        self, loaded: LoadedModel, config: LoraConfig, quantize: str | None
    ) -> Sequence[Fit]:
        """Return the contexts and batches that fit on the card, or nothing if the options name no card.

        Raises:
            ConfigError: If the model takes no text, or its weights alone do not fit.
        """
        if self.fit is None:
            return ()
        from lora_fx.tools.cluster import takes_text
        from lora_fx.tools.fit import MOST_PLANS, best_format, fits, size_of, usable

        if not takes_text(loaded.model):
            raise ConfigError(
                f"--fit is for models of text, and {type(loaded.model).__name__} takes no input_ids: "
                "--timeline plans one step of it"
            )
        room = usable(size_of("fit", self.fit))
        memories: Any = ("fast", "balanced", "least") if self.memory is None else (self.memory,)
        with console.steps("planning steps", len(memories) * MOST_PLANS) as tell:
            rows = [
                *fits(
                    loaded.model,
                    config,
                    room,
                    self.settings(quantize),
                    memories=memories,
                    sequence=self.sequence,
                    host=math.inf if self.host is None else size_of("host", self.host),
                    tell=tell,
                )
            ]
        if not any(row.context for row in rows):
            least = min(row.need.peak for row in rows)
            instead = best_format(loaded.model, room, dtype_of(self.dtype))
            advice = (
                "no format is small enough" if instead is None else f"--base {instead} would fit"
            )
            raise ConfigError(
                f"--fit {self.fit}: {room / 1e9:.1f} GB are usable, and a short step needs "
                f"{least / 1e9:.1f} GB, {rows[0].need.weights / 1e9:.1f} of them for weights: "
                f"{(least - room) / 1e9:.1f} GB are missing; {advice}"
            )
        return rows

    def planned(
        self,
        loaded: LoadedModel,
        config: LoraConfig,
        inputs: Any,
        *,
        text: bool,
        quantize: str | None = None,
    ) -> tuple[Need | None, list[Row]]:
        """Plan a training step. Return the needs of a GPU, or None if the options do not ask for this.

        With ``--timeline``, the page is written, and the largest tensors at the peak are returned, too.
        ``text`` is True if samples consist of tokens.

        Raises:
            ConfigError: If the model cannot be planned with the options.
        """
        if not self.plans:
            return None, []
        from lora_fx.tools.cluster import plan_step, step_inputs

        mesh, page = self.parse_mesh(), self.page_path()
        batch = step_inputs(loaded.model, inputs, batch=self.batch, sequence=self.sequence)
        plan = functools.partial(
            plan_step,
            loaded.model,
            config,
            mesh,
            batch,
            self.settings(quantize),
        )
        with console.progress(f"a step on {mesh}"):
            if page is None:
                return plan(), []
            from lora_fx.tools.timeline import Timeline, write_page

            timeline = Timeline()
            need = plan(ledger=timeline)
            write_page(timeline, page, loaded.name, {"step": self.title(text=text)})
            return need, timeline.largest(_LARGEST)


@dataclasses.dataclass
class Sizing(Options):
    """Options for the size of an adapter.

    Attributes:
        tokens: Number of tokens in the training data: compare it with the capacity of the adapter, and
            advise a learning rate.
        budget: Choose the rank of each site within a size (20MB) or a number of parameters. The gradients on
            --inputs, a batch with labels, decide.
        out: Write the configuration with the ranks of --budget, for --config: FILE.json.
    """

    PANEL = "Which ranks"

    tokens: int | None = None
    budget: str | None = dataclasses.field(default=None, metadata={"metavar": "SIZE"})
    out: str | None = dataclasses.field(default=None, metadata={"metavar": "FILE.json"})

    def check(self, look: Capturing, *, compares: bool) -> None:
        """Check the options before a model is loaded.

        Args:
            look: The options with the inputs.
            compares: True if several configurations are planned.

        Raises:
            ConfigError: If an option is not valid.
        """
        if compares and (self.budget is not None or self.tokens is not None):
            raise ConfigError("--budget and --tokens are for one configuration: leave --diff out")
        if self.budget is None:
            if self.out is not None:
                raise ConfigError("--out is for the ranks of --budget")
            return
        if look.inputs is None:
            raise ConfigError(
                "--budget needs --inputs, a callable that returns a batch with labels"
            )
        self.file()

    def file(self) -> Path | None:
        """Return the file to write, or None.

        Raises:
            ConfigError: If it exists, or has another suffix.
        """
        return None if self.out is None else file_to_write(self.out, (".json",), force=False)

    def of(self, inputs: Any) -> dict[str, Any]:
        """Return the keyword arguments of :func:`lora_fx.plan` for these options.

        ``inputs`` is a batch with labels, on which a budget needs gradients.
        """
        budget = self.budget
        if budget is None:
            return {"tokens": self.tokens}
        return {"tokens": self.tokens, "budget": budget, "inputs": [inputs]}

    def write(self, chosen: LoraConfig, before: LoraConfig) -> LoraConfig:
        """Write the configuration with the ranks of a budget to the file of ``--out``.

        Returns:
            The configuration with the ranks of a budget; ``before`` without a budget.
        """
        if self.budget is None:
            return before
        file = self.file()
        if file is not None:
            file.write_text(json.dumps(chosen.to_dict(), indent=2) + "\n", encoding="utf-8")
        return chosen


@dataclasses.dataclass
class Storing(Options):
    """Option that quantizes weights before a model is rewritten.

    Attributes:
        quantize: Quantize the weights of linear operations first: nf4, fp4, int8, int4, hqq4 or others.
    """

    PANEL = "What the base is stored in"

    quantize: str | None = dataclasses.field(default=None, metadata={"metavar": "FORMAT"})

    def check(self) -> None:
        """Check the format before a model is loaded.

        Raises:
            QuantizationError: If there is no such format.
        """
        if self.quantize is not None:
            from lora_fx.formats import format_named

            format_named(self.quantize)

    def planned(self, loaded: LoadedModel) -> Any:
        """Return the quantization plan, or None without ``--quantize``.

        Raises:
            QuantizationError: If the model is already quantized. This is read from the configuration of its
                folder, because the weights are not loaded here.
        """
        from lora_fx.adapters import plan_quantization

        if self.quantize is None:
            return None
        if loaded.stored_in is not None:
            raise QuantizationError(
                f"{loaded.name} is quantized already, as quantization_config in its config.json says: leave "
                "--quantize out, or give the folder that it was made of"
            )
        with console.progress("planning"):
            return plan_quantization(loaded.model, self.quantize)

    def load(self, name: str, look: Capturing) -> LoadedModel:
        """Load a model and quantize it if requested, and show progress bars.

        The weights of a folder of transformers are read one by one, if their names are those of the model.
        Other models are loaded as a whole.

        Raises:
            ConfigError: If the frontend does not support quantized models.
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
            try:
                if empty.weights is not None:
                    with console.progress("quantizing") as tell:
                        quantized = quantize(
                            empty.model, self.quantize, weights=empty.weights, progress=tell
                        )
                    return dataclasses.replace(empty, model=quantized)
            except CheckpointError as error:
                _log.warning("loaded whole, not weight by weight: %s", error)
        loaded = load(name)
        with console.progress("quantizing") as tell:
            quantized = quantize(loaded.model, self.quantize, progress=tell)
        return dataclasses.replace(loaded, model=quantized)


def load(name: str, *, weights: bool = True, adapter: Path | None = None) -> LoadedModel:
    """Load a model and show a progress bar. With an adapter, load the class that it was trained on."""
    with console.progress(f"loading {name}"):
        return load_model(name, weights=weights, adapter=adapter)


# Checks of typed input. Commands call them before they import PyTorch, which takes seconds, or load a
# model, which may take minutes.


def check_names(
    model: str | None = None,
    adapters: Iterable[Path] = (),
    *,
    provider: str | None = None,
    dtype: str | None = None,
) -> None:
    """Check the names of a model, of adapters, of a provider and of a dtype before anything is loaded.

    Raises:
        ConfigError: If a name is wrong. The message has the name and the remedy.
        ProviderError: If the provider is unknown.
    """
    from lora_fx.export.providers import chosen_provider

    if model is not None:
        check_model_name(model)
    for adapter in adapters:
        check_adapter_path(adapter)
    if provider is not None:
        chosen_provider(provider)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown: give one of {', '.join(_DTYPES)}")


def check_file(path: Path) -> None:
    """Raise if the ONNX file that a command runs does not exist.

    Raises:
        ConfigError: The message has the path.
    """
    if not path.exists():
        raise ConfigError(f"there is no file {path}: export a model to it first")


def check_choices(function: Callable[..., Any], **chosen: str | None) -> None:
    """Raise if an option has a value that the library's function does not accept.

    The accepted values are those in the type of the function's parameter.

    Args:
        function: The function of the library that the options are for.
        chosen: Values by the name of the parameter.

    Raises:
        TypedError: If a value is not accepted. The message has all the accepted ones.
    """
    hints = get_type_hints(function)
    for name, value in chosen.items():
        # Literal["a", "b"] | None
        parts = [hints[name], *get_args(hints[name])]
        values = [text for part in parts for text in get_args(part) if isinstance(text, str)]
        if value is not None and value not in values:
            raise TypedError(f"--{name} {value} is unknown: give one of {', '.join(values)}")


def file_to_write(text: str, suffixes: Sequence[str], *, force: bool) -> Path:
    """Return the path of a file that a command will write, checked before any work.

    Args:
        text: The path as typed, because a Path would drop a separator at its end.
        suffixes: Allowed suffixes.
        force: True if the file may exist.

    Raises:
        ConfigError: If the path is a folder, has another suffix, or exists.
    """
    path = output_file(text, suffixes)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists: give another name, or --force to write over it")
    return path


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name such as "bf16", or None for None.

    Raises:
        ConfigError: If the name is unknown.
    """
    check_names(dtype=name)
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[name])
    return dtype


def _split(names: list[str] | None) -> list[str] | None:
    if not names:
        return None
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def config_in(source: Path) -> LoraConfig:
    """Return the configuration in a JSON or YAML file, or in an adapter folder.

    Raises:
        ConfigError: If the file is not a configuration, or PyYAML is missing for a YAML file.
        CheckpointError: If it is a folder without a readable configuration.
    """
    if not source.exists():
        raise ConfigError(
            f"{source} does not exist: give a JSON or YAML file, or an adapter folder"
        )
    if source.is_dir():
        return LoraConfig.from_pretrained(source)
    as_yaml = source.suffix.lower() in (".yaml", ".yml")
    kind = "YAML" if as_yaml else "JSON"
    try:
        text = source.read_text(encoding="utf-8")
        values = _parse_yaml(text) if as_yaml else json.loads(text)
    except ConfigError:
        raise  # PyYAML is missing
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


def loaded_adapters(session: Any, sources: Iterable[str] | None) -> str | list[str | None] | None:
    """Load adapter files or folders into a session of ONNX Runtime.

    Args:
        session: An ``OnnxSession``.
        sources: Files, folders, names of adapters in the file's bank, or "none".

    Returns:
        The adapter's name in the session, or a list of several names, one for each row of the batch.

    Raises:
        TypedError: If two adapters would have the same name, or there is no such adapter.
    """
    names: dict[str, str | None] = {}
    for source in (rows := list(sources or ())):
        path = Path(source)
        if source in names or (source in session.adapters and not path.exists()):
            names.setdefault(source, source)
        elif source == "none" and not path.exists():
            names[source] = None
        elif path.stem in names.values():
            raise TypedError(
                f"--adapter {source}: another one is named {path.stem}: rename its folder"
            )
        else:
            try:
                session.load_adapter(path.stem, path)
            except CheckpointError as error:
                if path.exists():
                    raise
                raise TypedError(f"--adapter {_missing(path, session.adapters)}") from error
            names[source] = path.stem
    chosen = [names[source] for source in rows]
    return chosen if len(chosen) > 1 else next(iter(chosen), None)


def _missing(path: Path, known: Sequence[str]) -> str:
    """Return the error message for an adapter that is neither in the ONNX file nor on the disk."""
    exist = [f"{name} (in the file)" for name in known]
    exist += map(str, [*adapters_below(path.parent), *sorted(path.parent.glob("*.onnx_adapter"))])
    if exist:
        return f"{path}: there is no such adapter. Those that exist: {some(exist)}"
    return f"{path}: there is no such adapter: lora-fx export-adapter writes one"


# Keyword arguments in a message. Those inside a call are not matched, because a call stays Python code.
_ARGUMENT = re.compile(
    r"(?<![\w.(])(?<!, )(?P<name>\w+)=(?P<value>'[^'\s]*'|True|False|\d+(?:\.\d+)?\b)"
)


_COMMANDS = {
    "lora_fx.plan(model, lora_fx.LoraConfig())": "lora-fx plan MODEL",
    'load_adapter(..., match="graph") loads it': "lora-fx migrate ADAPTER --to MODEL --out DIR writes it",
    "source=the_old_model": "--from MODEL",
}
"""Commands, by the Python code that has the same effect."""


def as_options(message: str, commands: Iterable[Any]) -> str:
    """Replace ``adapters='inputs'`` by ``--adapters inputs`` in a message, if a command has such an option.

    Python code that has the same effect as a command is replaced by the command.

    Args:
        message: Message of an error.
        commands: Commands of the application.
    """
    options = {
        str(parameter.name): parameter
        for command in commands
        for parameter in command.params
        if parameter.param_type_name == "option"
    }

    def spelled(match: re.Match[str]) -> str:
        option, value = options.get(match["name"]), match["value"]
        if option is None:
            return match[0]
        if not option.is_flag:
            return f"{option.opts[0]} {value.strip(chr(39))}"
        names = option.opts if value == "True" else option.secondary_opts
        return str(names[0]) if names and value in ("True", "False") else match[0]

    for code, command in _COMMANDS.items():
        message = message.replace(code, command)
    return _ARGUMENT.sub(spelled, message)
