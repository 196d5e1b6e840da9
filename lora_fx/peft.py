"""PEFT's names for lora-fx: a script for PEFT imports them from here, and needs no other change.

::

    from lora_fx.peft import LoraConfig, PeftModel, get_peft_model

Models are those of :func:`lora_fx.as_peft_model`: instances of ``peft.PeftModel`` with lora-fx's methods.
Configurations are PEFT's own classes. Names for methods other than LoRA are missing. Names, arguments and
defaults are those of PEFT 0.21; ``docs/from-peft.md`` lists the differences in behavior.

PEFT has to be installed. It is imported when a name that needs it is first used.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from lora_fx import config as _config
from lora_fx.adapters import (
    adapter_record,
    add_adapter,
    initialize,
    prepare_for_kbit_training,
    replace_lora_weights_loftq,
)
from lora_fx.api import rewrite
from lora_fx.checkpoint import (
    adapter_state_dict,
    as_peft_model,
    cast_to_base,
    layer_status,
    load_adapter_state_dict,
    model_status,
    peft_model_class,
    read_config,
    train_adapters,
)
from lora_fx.errors import ConfigError
from lora_fx.extras import load_optional
from lora_fx.methods import check_peft_type

_TASKS: Final = (
    *("CausalLM", "FeatureExtraction", "QuestionAnswering", "Seq2SeqLM"),
    *("SequenceClassification", "TokenClassification"),
)

# Classes of PEFT and their modules.
_CONFIGS: Final = {
    "ArrowConfig": "peft",
    "BdLoraConfig": "peft",
    "CordaConfig": "peft.tuners.lora.config",
    "EvaConfig": "peft",
    "KasaConfig": "peft",
    "LoftQConfig": "peft",
    "LoraConfig": "peft",
    "LoraGAConfig": "peft",
    "MontecloraConfig": "peft",
    "PeftConfig": "peft",
    "PeftType": "peft",
    "TaskType": "peft",
    "VeloraConfig": "peft",
}

# Aliases of a single class: the model itself already has everything that a task needs.
_MODELS: Final = ("PeftModel", *(f"PeftModelFor{task}" for task in _TASKS))

_LIBRARIES: Final = ("transformers", "diffusers")
"""Libraries whose classes a folder may name. Otherwise a folder could import any code."""

# For each loader here, the class of transformers that loads the base. None: the folder names the class.
_AUTO: Final[dict[str, str | None]] = {
    "AutoPeftModel": None,
    "AutoPeftModelForCausalLM": "AutoModelForCausalLM",
    "AutoPeftModelForFeatureExtraction": "AutoModel",
    "AutoPeftModelForQuestionAnswering": "AutoModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM": "AutoModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification": "AutoModelForSequenceClassification",
    "AutoPeftModelForTokenClassification": "AutoModelForTokenClassification",
}

__all__ = [
    "create_arrow_model",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    """Return a name that needs PEFT: a configuration, ``PeftModel``, or one of the ``AutoPeftModel…``."""
    if name in _MODELS:
        return peft_model_class()
    if name in _AUTO:
        return _auto_class(name)
    if name in _CONFIGS:
        return load_optional(_CONFIGS[name], f"lora_fx.peft.{name}", "peft", attribute=name)
    raise AttributeError(
        f"lora_fx.peft has no {name}: what it has is in docs/from-peft.md, and other methods than LoRA are "
        "in peft alone"
    )


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Rewrite a model, and return it as a ``PeftModel``.

    Unlike PEFT's, it does not change its argument.

    Args:
        model: Any module.
        peft_config: A ``LoraConfig``, of PEFT or of lora-fx. Without ``target_modules``, PEFT's defaults for
            this kind of model are used; every linear operation if PEFT does not know it.
        adapter_name: Name of the adapter.
        mixed: Refused: it is for adapters of several methods.
        autocast_adapter_dtype: True for fp32 adapters over a base in half precision. Otherwise they have the
            dtype of the base.
        revision: The base's revision, for the saved configuration.
        low_cpu_mem_usage: Has no effect: adapters are created on the model's device.

    Raises:
        ConfigError: If the configuration does not belong to LoRA, or as :func:`lora_fx.rewrite` raises.
    """
    if mixed:
        raise ConfigError("mixed=True: lora-fx has LoRA alone, for which it is not needed")
    config = read_config(peft_config, model)
    if revision is not None:
        config = dataclasses.replace(config, revision=revision)
    adapted = rewrite(model, config, adapter_name=adapter_name)
    if not autocast_adapter_dtype:
        cast_to_base(adapted, adapter_name)
    result = as_peft_model(adapted)
    train_adapters(result)
    return result


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: Any,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """Load adapters onto a model, and route each token to some of them (Arrow).

    The adapters are called ``task_0``, ``task_1`` and so on, the general ones ``gks_0`` and so on, and the
    router ``arrow_router``, as in PEFT. Unlike in PEFT, ``use_gks`` does not change the loaded adapters.

    Args:
        base_model: The model, which is not changed.
        task_specific_adapter_paths: Local adapter folders to route to.
        arrow_config: An ``ArrowConfig``.
        general_adapter_paths: Local adapter folders whose mean is subtracted, with ``use_gks``.
        adapter_kwargs: Arguments of ``PeftModel.from_pretrained`` and ``load_adapter`` for each folder.

    Raises:
        ConfigError: If there is no folder, or the adapters do not have the same sites.
        CheckpointError: As :func:`lora_fx.load_adapter` raises.
    """
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    groups = {"task": list(task_specific_adapter_paths), "gks": general}
    folders = {
        f"{group}_{index}": folder
        for group, paths in groups.items()
        for index, folder in enumerate(paths)
    }
    if not groups["task"]:
        raise ConfigError("task_specific_adapter_paths: give at least one adapter folder")
    first, *further = folders.items()
    model = peft_model_class().from_pretrained(base_model, first[1], first[0], **adapter_kwargs)
    for name, folder in further:
        model.load_adapter(folder, name, **adapter_kwargs)
    options = dataclasses.asdict(arrow_config)
    for group, paths in groups.items():
        options[f"{group}_adapter_names"] = [f"{group}_{index}" for index in range(len(paths))]
    sites = [row.name for row in adapter_record(model.get_base_model(), first[0]).sites]
    router = _config.LoraConfig(target_modules=sites, arrow_config=options)
    add_adapter(model.get_base_model(), router, "arrow_router")
    model.set_adapter("arrow_router")
    return model


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a copy of a quantized model that is ready for adapters.

    This is :func:`lora_fx.prepare_for_kbit_training`.
    """
    return prepare_for_kbit_training(
        model, use_gradient_checkpointing, gradient_checkpointing_kwargs
    )


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Any,
    *,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> None:
    """Initialize adapters by EVA from batches: :func:`lora_fx.initialize`."""
    initialize(model, dataloader, adapter_name=adapter_name, progress=show_progress_bar)


def get_layer_status(model: Any) -> list[Any]:
    """Return a ``peft.peft_model.TunerLayerStatus`` for each layer with adapters, in the order of the layers.

    ``module_type`` has the class of the layer in your model. ``quantization_backend`` is the weight format.

    Args:
        model: A rewritten model, or a ``PeftModel`` of this module.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    wrapped = isinstance(model, peft_model_class())
    rows: list[Any] = model.get_layer_status() if wrapped else layer_status(model)
    return rows


def get_model_status(model: Any) -> Any:
    """Return a ``peft.peft_model.TunerModelStatus``: a summary of :func:`get_layer_status` for the model.

    Args:
        model: A rewritten model, or a ``PeftModel`` of this module.

    Raises:
        ConfigError: If the model is not rewritten.
    """
    wrapped = isinstance(model, peft_model_class())
    return model.get_model_status() if wrapped else model_status(model)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by their names in its folder.

    Args:
        model: A rewritten model.
        state_dict: Refused: the values are taken from the model.
        adapter_name: The adapter.

    Raises:
        ConfigError: If there is no such adapter, or for ``state_dict``.
    """
    if state_dict is not None:
        raise ConfigError(
            "state_dict: the values are those of the model, also where it is sharded: leave it out"
        )
    return dict(adapter_state_dict(model, adapter_name))


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Load tensors into an adapter. Unlike in PEFT, missing or unknown names are an error.

    Args:
        model: A rewritten model.
        peft_model_state_dict: Tensors by their names in a folder.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Refused: a tensor of another shape is an error.
        low_cpu_mem_usage: Has no effect.

    Returns:
        The result of PyTorch's ``load_state_dict``: no name is missing or unexpected.

    Raises:
        ConfigError: For ``ignore_mismatched_sizes``.
        CheckpointError: As :func:`lora_fx.load_adapter_state_dict` raises.
    """
    if ignore_mismatched_sizes:
        raise ConfigError("ignore_mismatched_sizes=True: leave such tensors out of what is loaded")
    load_adapter_state_dict(model, peft_model_state_dict, adapter_name)
    return nn.Module().load_state_dict({})


class _AutoPeftModel:
    """A loader for an adapter folder together with the base that it names."""

    _loader: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load the base with transformers, and load the adapter onto it.

        Args:
            pretrained_model_name_or_path: A local adapter folder.
            adapter_name: The name for the adapter.
            is_trainable: True to train it; otherwise it is frozen.
            kwargs: Arguments for ``from_pretrained`` of the base, such as ``dtype``. Nothing is downloaded,
                unless ``local_files_only=False`` is among them.

        Raises:
            ConfigError: If the folder does not name its base.
            CheckpointError: As :func:`lora_fx.load_adapter` raises.
        """
        folder = Path(pretrained_model_name_or_path)
        check_peft_type(folder)
        config = _config.LoraConfig.from_pretrained(folder)
        if config.base_model_name_or_path is None:
            raise ConfigError(
                f"{folder} does not name its base (base_model_name_or_path in adapter_config.json): load it "
                "and use PeftModel.from_pretrained(base, folder)"
            )
        loader = cls._load_class(folder, config)
        options = {"revision": config.revision or "main", "local_files_only": True, **kwargs}
        base = loader.from_pretrained(config.base_model_name_or_path, **options)
        if (folder / "tokenizer_config.json").is_file() and hasattr(
            base, "resize_token_embeddings"
        ):
            tokenizers = load_optional(
                "transformers", cls.__name__, "lora-fx[hf]", attribute="AutoTokenizer"
            )
            base.resize_token_embeddings(len(tokenizers.from_pretrained(folder)))
        return peft_model_class().from_pretrained(base, folder, adapter_name, is_trainable)

    @classmethod
    def _load_class(cls, folder: Path, config: _config.LoraConfig) -> Any:
        """Return the class that loads the base: the class of the task, or the class that the folder names."""
        name, library = cls._loader, "transformers"
        if name is None:
            named = config.auto_mapping or {}
            name, library = named.get("base_model_class"), named.get("parent_library", library)
        if name is None or library.partition(".")[0] not in _LIBRARIES:
            raise ConfigError(
                f"{folder} does not say which class of {' or '.join(_LIBRARIES)} its base is (auto_mapping "
                "in adapter_config.json): use the AutoPeftModelFor… of the task, or load the base, and use "
                "PeftModel.from_pretrained(base, folder)"
            )
        return load_optional(library, cls.__name__, "lora-fx[hf]", attribute=name)


@functools.cache
def _auto_class(name: str) -> type:
    return type(name, (_AutoPeftModel,), {"__module__": __name__, "_loader": _AUTO[name]})
