"""Load models by name, for the command line.

``package.module:callable`` is called without arguments and returns a model, or a model and its example
inputs. ``hf:FOLDER`` is a local folder of transformers, and ``hf:FOLDER/NAME.gguf`` is a GGUF file of
llama.cpp, whose weights are dequantized. ``timm:NAME`` and ``torchvision:NAME`` are untrained models of those
libraries. Nothing is downloaded.

Names are checked without importing PyTorch, so that a wrong name is reported at once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lora_fx.config import CONFIG_NAME, download_command, missing_adapter, read_json
from lora_fx.errors import CheckpointError, ConfigError, hint, some
from lora_fx.extras import install_command, is_installed, load_optional
from lora_fx.files import current
from lora_fx.gguf_files import check_gguf, check_rope, is_gguf, open_gguf, weight_files

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FORMS",
    "LoadedModel",
    "check_adapter_path",
    "check_model_name",
    "load_inputs",
    "load_model",
    "quiet_transformers",
]


_log = logging.getLogger("lora_fx")

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


_FILES = (".onnx", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".json")


def load_folder(folder: Path, *, weights: bool = True, adapter: Path | None = None) -> nn.Module:
    """Load a model of transformers: the class that ``config.json`` names, or else the class of AutoModel.

    Args:
        folder: Folder with ``config.json``, and weights. Or a GGUF file, whose configuration is in the file
            unless there is a ``config.json`` next to it.
        weights: False to build the model on the meta device, if names and shapes suffice. Otherwise a
            folder without weights gives an untrained model.
        adapter: Folder of an adapter, to load the class that it was trained on instead.

    Raises:
        ConfigError: If the folder is missing or has no model, or transformers cannot make the model.
        CheckpointError: If the adapter's class has parameters that neither folder contains.
    """
    _check_folder(folder)
    transformers = load_optional("transformers", f"hf:{folder}", "lora-fx[hf]")
    quiet_transformers()
    import torch

    from lora_fx.formats import keep_quantized

    try:
        config, source = _configuration(transformers, folder)
        architecture = _architecture_of(adapter, transformers, config)
        if architecture is None:
            architecture, adapter = _architecture(transformers, config, folder), None
        stored, labels = ({}, {}) if adapter is None else _shapes_and_labels(adapter)
        if adapter is not None:
            _set_labels(config, architecture, stored, labels, adapter)
        if not weights:
            with torch.device("meta"):
                empty = _build(architecture, config)
            _mark_loaded(empty, folder)
            return empty
        if is_gguf(folder) or any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            model: nn.Module
            with keep_quantized():
                model, loading = architecture.from_pretrained(
                    **source, config=config, output_loading_info=True
                )
            lost = sorted(set(loading["missing_keys"]) - stored.keys())
            if lost and adapter is not None:
                raise CheckpointError(
                    f"the adapter {adapter} was trained on {type(model).__name__}, and neither its folder "
                    f"nor {folder} contains {some(lost, 3)}: give the folder of the model that was trained"
                )
            if lost and is_gguf(folder):
                raise CheckpointError(
                    f"{folder} has no {some(lost, 3)} of {type(model).__name__}: if there is a config.json "
                    "next to it, it has to be that of the model that was converted to GGUF"
                )
            return model
        torch.manual_seed(0)
        return _build(architecture, config)
    except CheckpointError:
        raise
    except Exception as error:
        # transformers raises errors of many types for a folder that it cannot read.
        raise ConfigError(
            f"hf:{folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _configuration(transformers: Any, path: Path) -> tuple[Any, dict[str, Any]]:
    """Read the configuration of a model's folder or GGUF file.

    Return the configuration, and the arguments with which ``from_pretrained`` loads the model.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, "local_files_only": True}
    if not is_gguf(path):
        return transformers.AutoConfig.from_pretrained(**source), source
    source["pretrained_model_name_or_path"] = path.parent
    own = {} if (path.parent / "config.json").is_file() else {"gguf_file": path.name}
    config = transformers.AutoConfig.from_pretrained(**source, **own)
    check_rope(path, open_gguf(path), config)
    source["gguf_file"] = path.name
    if hasattr(transformers, "GgufConfig"):
        # On a GPU, transformers would keep the quantized weights of some models. lora-fx cannot train over
        # them.
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return config, source


def _check_folder(folder: Path) -> None:
    """Raise unless a path is a GGUF file, or a folder with the configuration of a model."""
    if is_gguf(folder):
        check_gguf(folder)
        return
    if not folder.is_dir():
        nearest = _nearest_folder(folder)
        raise ConfigError(
            f"hf:{folder}: there is no such folder{nearest or _download_command(str(folder))}"
        )
    if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"hf:{folder} is the folder of an adapter, and a model is needed here: give the folder of the "
            "model that was adapted. The model comes first, then the adapter"
        )
    if not (folder / "config.json").is_file():
        files = sorted(f"hf:{path}" for path in folder.glob("*.gguf"))
        remedy = f"give a file: {some(files, 3)}" if files else "give the folder of a model"
        raise ConfigError(f"hf:{folder}: there is no config.json in it: {remedy}")


def _download_command(name: str) -> str:
    """Return a hint to download a model, if a missing folder looks like a name of the Hub; else ""."""
    command = download_command(name)
    return (
        command
        and f". lora-fx downloads nothing: for a model of the Hub, run `{command}`, and then use hf:{name}"
    )


def quiet_transformers() -> None:
    """Disable transformers' network access, progress bars and reports."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


_CLASSES_OF_TASK = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


def _architecture_of(adapter: Path | None, transformers: Any, config: Any) -> Any:
    """Return the model class that an adapter was trained on, from the adapter's configuration.

    The configuration names the class or a task. Return None if it names no class of transformers, and no task
    for which this model has a class.

    Raises:
        CheckpointError: If that class is of another kind of model.
    """
    if adapter is None or not (adapter / CONFIG_NAME).is_file():
        return None
    # The adapter may be of another method, so its configuration is not read as a LoraConfig.
    trained = read_json(current(adapter / CONFIG_NAME))
    named = trained.get("auto_mapping") or {}
    library = named.get("parent_library", "")
    if library.partition(".")[0] == "transformers":
        architecture: Any = load_optional(
            library, f"the adapter {adapter}", "lora-fx[hf]", attribute=named["base_model_class"]
        )
        settings = getattr(architecture, "config_class", None)
        if settings is not None and not isinstance(config, settings):
            raise CheckpointError(
                f"the adapter {adapter} was trained on {architecture.__name__}, which does not take the "
                f"configuration in the model's folder ({type(config).__name__}): give the folder of the "
                "model that was trained"
            )
        return architecture
    classes = getattr(transformers, _CLASSES_OF_TASK.get(trained.get("task_type") or "", ""), {})
    return classes.get(type(config), None)


def _shapes_and_labels(adapter: Path) -> tuple[dict[str, list[int]], dict[int, str]]:
    """Return the shapes of an adapter's tensors by their names in the model, and the names of its labels."""
    from lora_fx.checkpoint import PREFIX, labels_in, read_tensors

    tensors, metadata = read_tensors(adapter)
    # Other methods have tensors of all layers, without this prefix.
    shapes = {key.removeprefix(PREFIX): list(tensor.shape) for key, tensor in tensors.items()}
    return shapes, labels_in(metadata)


def _set_labels(
    config: Any,
    architecture: Any,
    stored: Mapping[str, list[int]],
    labels: Mapping[int, str],
    adapter: Path,
) -> None:
    """Set the number and the names of a model's labels to those of the head in an adapter's folder.

    Args:
        config: The configuration of the model, which is changed.
        architecture: The class of the model.
        stored: Shapes of the adapter's tensors by name.
        labels: Class names in the adapter's folder; empty if it has none, as in a folder that PEFT wrote.
        adapter: The folder.
    """
    import torch

    with torch.device("meta"):
        empty = _build(architecture, config)
    for name, parameter in empty.named_parameters():
        shape, shape_now = stored.get(name), list(parameter.shape)
        if shape is not None and shape_now == [config.num_labels, *shape[1:]]:
            break
    else:
        return
    if config.num_labels != shape[0]:
        config.num_labels = shape[0]  # transformers then names the labels LABEL_0, LABEL_1, ...
    if len(labels) == shape[0]:
        config.id2label = dict(labels)
        config.label2id = {label: index for index, label in labels.items()}
    elif all(label == f"LABEL_{index}" for index, label in config.id2label.items()):
        _warn_of_names(adapter, shape[0])


@functools.cache  # warn once: some merges read the adapter twice
def _warn_of_names(adapter: Path, classes: int) -> None:
    _log.warning(
        "%s does not say what its %d classes are called: they are LABEL_0, LABEL_1 and so on. Set id2label "
        "in the config.json of the result",
        adapter,
        classes,
    )


def _architecture(transformers: Any, config: Any, path: Path) -> Any:
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    # A GGUF file names no class of transformers. Use the class that generates text, as llama.cpp does.
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING if is_gguf(path) else {}
    return next(filter(None, named), None) or classes.get(type(config), transformers.AutoModel)


def _build(architecture: Any, config: Any) -> nn.Module:
    # Auto classes have from_config, model classes _from_config.
    make = getattr(architecture, "_from_config", None) or architecture.from_config
    model: nn.Module = make(config)
    return model


def _mark_loaded(model: Any, folder: Path) -> None:
    """Mark the parameters that were loaded from a folder, as transformers does.

    A plan can then detect a head with random values.

    Only the head is checked, because parameters inside the base model may have other names in a file.
    """
    from safetensors import safe_open

    if is_gguf(folder):
        names = {*weight_files(folder, model).names}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in names:
                parameter._is_hf_initialized = True
        return
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    inside = f"{model.base_model_prefix}." if hasattr(model, "base_model_prefix") else ""
    if not shapes or len(inside) < 2:
        return
    for name, parameter in model.named_parameters():
        if name.startswith(inside) or shapes.get(name) == list(parameter.shape):
            parameter._is_hf_initialized = True


def _nearest_folder(folder: Path) -> str:
    try:
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    above = str(folder.parent / "_").removesuffix("_")
    return hint(folder.name, siblings, f"; nearest: {above}{{}}", between=f", {above}")


FORMS = "package.module:callable, hf:FOLDER, hf:FOLDER/NAME.gguf, timm:NAME or torchvision:NAME"
"""Forms of a model's name."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, its name and its example inputs.

    Attributes:
        name: Name by which it was loaded.
        model: The model in evaluation mode.
        example_inputs: Keyword or positional arguments of a call; None if they are unknown.
        folder: Folder from which a model of transformers was loaded.
        weights: Folder with safetensors, or GGUF file, from which :func:`lora_fx.quantize` can read the
            weights one at a time.
    """

    name: str
    model: nn.Module
    example_inputs: Any = None
    folder: Path | None = None
    weights: Path | None = None

    @property
    def stored_in(self) -> str | None:
        """Name of the format in which the folder has the weights, from its configuration; None if dense."""
        settings = getattr(getattr(self.model, "config", None), "quantization_config", None)
        if settings is None:
            return None
        of = settings if isinstance(settings, dict) else settings.to_dict()
        name = str(getattr(of.get("quant_method"), "value", of.get("quant_method")))
        return f"{name} {of['bnb_4bit_quant_type']}" if of.get("load_in_4bit") else name

    def inputs(self) -> Any:
        """Return the example inputs.

        Raises:
            ConfigError: If they are unknown.
        """
        if self.example_inputs is None:
            raise ConfigError(
                f"{self.name} does not say what it takes: let the callable return a pair, the "
                "model and its example inputs"
            )
        return self.example_inputs


def check_model_name(name: str) -> None:
    """Raise if a name cannot be the name of a model, without importing PyTorch.

    Raises:
        ConfigError: If the name has no known form, the folder is missing, or a library is not installed.
        CheckpointError: If a GGUF file is missing or is not one, or the package gguf is missing.
    """
    scheme, colon, target = name.partition(":")
    path = Path(name).expanduser()
    if not colon or not scheme or not target:
        if (path / CONFIG_NAME).is_file():
            raise ConfigError(
                f"{name} is the folder of an adapter, and a model is needed here: the model comes first, "
                f"then the adapter. A model is named {FORMS}"
            )
        if path.is_dir():
            raise ConfigError(f"{name} is a folder: for a model of transformers, write hf:{name}")
        if is_gguf(path) and path.is_file():
            raise ConfigError(f"{name} is a GGUF file: write hf:{name}")
        unlike = path.suffix.lower() in _FILES or ":" in name
        raise ConfigError(
            f"{name!r} names no model: use {FORMS}{'' if unlike else _download_command(name)}"
        )
    if scheme == "hf":
        _check_folder(Path(target).expanduser())
    elif scheme in _LOADERS:
        if not is_installed(scheme):
            raise ConfigError(f"{name!r} needs {scheme}: {install_command(scheme)}")
    else:
        near = hint(scheme.lower(), _LOADERS, "{}", count=1)
        if near and not is_installed(scheme.partition(".")[0]):
            raise ConfigError(f"{name!r} names no model: did you mean {near}:{target}? Use {FORMS}")


def check_adapter_path(path: Path) -> None:
    """Raise if a path cannot be the path of an adapter, without importing PyTorch.

    Raises:
        ConfigError: If there is no such folder or file, or it is the folder of a model.
    """
    if not path.exists():
        raise ConfigError(missing_adapter(path))
    if (path / "config.json").is_file() and not any(path.rglob(CONFIG_NAME)):
        raise ConfigError(
            f"{path} is the folder of a model, and an adapter is needed here: the model comes first, then "
            "the adapter"
        )


def load_model(name: str, *, weights: bool = True, adapter: Path | None = None) -> LoadedModel:
    """Load a model by its name.

    Args:
        name: A name in one of the :data:`FORMS`.
        weights: False if names and shapes suffice. A model of transformers is then built on the meta
            device, whatever its size.
        adapter: Folder of an adapter that the model is for. A model of transformers then has the class that
            the adapter was trained on.

    Raises:
        ConfigError: If the name is unknown, a package is missing, or the model cannot be made. The message
            has the nearest names or the extra to install.
        CheckpointError: If neither the model's folder nor the adapter's contains some of its parameters.
    """
    check_model_name(name)
    scheme, _, target = name.partition(":")
    if scheme in _LOADERS:
        return _LOADERS[scheme](name, target, weights, adapter)
    return _from_callable(name, scheme, target)


def load_inputs(name: str) -> Any:
    """Return example inputs from ``package.module:callable``.

    Raises:
        ConfigError: If the name is unknown, or the callable fails.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"{name!r} names no inputs: use package.module:callable")
    return _called(name, _attribute(name, module, attribute))


def _from_callable(name: str, module_name: str, attribute: str) -> LoadedModel:
    from torch import nn

    source = _attribute(name, module_name, attribute)
    if not isinstance(source, nn.Module):
        source = _called(name, source)
    model, inputs = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name!r} gave {type(model).__name__} {str(model)[:40]!r}: it has to give a "
            "torch.nn.Module, or one and its example inputs"
        )
    return LoadedModel(name, model.eval(), inputs)


def _attribute(name: str, module_name: str, attribute: str) -> Any:
    value: Any = _module(name, module_name)
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [key for key in vars(value) if not key.startswith("_")]
            raise ConfigError(
                f"{name!r}: {module_name} has no {attribute!r}{hint(attribute, public, cutoff=0.5)}"
            )
        value = getattr(value, part)
    return value


def _module(name: str, module_name: str) -> ModuleType:
    # A console script has no working folder in its path, unlike `python -m`.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = error.name is not None and (
            module_name == error.name or module_name.startswith(f"{error.name}.")
        )
        if not own:
            missing = str(error.name).partition(".")[0]
            raise ConfigError(
                f"{name!r}: {module_name} needs {error.name}: {install_command(missing)}"
            ) from error
        names = (path.stem for path in Path.cwd().glob("*.py"))
        raise ConfigError(
            f"{name!r}: there is no module {error.name}{hint(module_name, names, cutoff=0.5)}. Modules are "
            f"looked for in {Path.cwd()} and among the installed packages"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error


def _called(name: str, function: object) -> Any:
    if not callable(function):
        raise ConfigError(f"{name!r} is a {type(function).__name__}: name a callable or a module")
    try:
        return function()
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0]
        remedy = f": {install_command(missing)}" if missing else ""
        raise ConfigError(
            f"{name!r} failed when it was called without arguments: {type(error).__name__}: {error}{remedy}"
        ) from error


def _from_timm(name: str, model_name: str, weights: bool, adapter: Path | None) -> LoadedModel:
    from lora_fx.passes.capture import synthesise

    timm = load_optional("timm", repr(name), "timm")
    if not timm.is_model(model_name):
        raise ConfigError(
            f"timm has no model {model_name!r}{hint(model_name, timm.list_models(), cutoff=0.5)}"
        )
    model = _made(name, lambda: timm.create_model(model_name, pretrained=False))
    return LoadedModel(name, model.eval(), synthesise(model).inputs)


def _from_torchvision(
    name: str, model_name: str, weights: bool, adapter: Path | None
) -> LoadedModel:
    import torch

    models = load_optional("torchvision", repr(name), "torchvision").models
    known = models.list_models()
    if model_name not in known:
        raise ConfigError(
            f"torchvision has no model {model_name!r}{hint(model_name, known, cutoff=0.5)}"
        )
    kind = f"{models.get_model_builder(model_name).__module__}."
    # A detector or a segmentation model has trained weights inside unless told otherwise.
    inner = "detection." in kind or "segmentation." in kind
    extra = {"weights_backbone": None} if inner else {}
    model = _made(name, lambda: models.get_model(model_name, weights=None, **extra))
    if "detection." in kind or "optical_flow." in kind:
        return LoadedModel(name, model.eval())
    shape = (2, 3, 16, 112, 112) if "video." in kind else (2, 3, 224, 224)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return LoadedModel(name, model.eval(), inputs)


def _from_folder(name: str, folder: str, weights: bool, adapter: Path | None) -> LoadedModel:
    from lora_fx.passes.capture import synthesise

    path = Path(folder).expanduser()
    model = load_folder(path, weights=weights, adapter=adapter)
    inputs = synthesise(model).inputs
    file = is_gguf(path)
    readable = file or any(True for _ in path.glob("*.safetensors"))
    parent = path.parent if file else path
    return LoadedModel(name, model.eval(), inputs, parent, path if readable else None)


def _made(name: str, build: Callable[[], Any]) -> Any:
    import torch

    try:
        torch.manual_seed(0)  # the weights are untrained, but the same each time
        return build()
    except Exception as error:
        raise ConfigError(f"{name} cannot be made: {type(error).__name__}: {error}") from error


_LOADERS: Mapping[str, Callable[[str, str, bool, Path | None], LoadedModel]] = {
    "hf": _from_folder,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}
