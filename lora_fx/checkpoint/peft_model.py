"""A rewritten model as a ``PeftModel``, for libraries that handle this class specially.

TRL checks for a ``PeftModel`` to find the reference of a model that is already trained. transformers' Trainer
saves and resumes only the adapter of such a model. :func:`as_peft_model` wraps a model in such an object: it
has the methods of PEFT (0.21, ``peft/peft_model.py``), which call those of lora-fx.

The class is created on first use, so that PEFT is not imported earlier.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lora_fx.adapters import (
    adapter_ids,
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    delete_adapter,
    disable_adapter,
    origin_of,
    set_adapter,
)
from lora_fx.checkpoint.folder import load_adapter
from lora_fx.checkpoint.keys import PREFIX
from lora_fx.checkpoint.peft_status import layer_status, model_status
from lora_fx.checkpoint.state import adapter_state_dict, load_adapter_state_dict
from lora_fx.checkpoint.trainers import save_peft_folder
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, some
from lora_fx.extras import load_optional
from lora_fx.ir import require_record
from lora_fx.passes.merge import merging
from lora_fx.passes.parameters import (
    AroundModel,
    base_dtype,
    factors_of,
    inside,
    tokens_of,
    weight_at,
)
from lora_fx.runtime.modules import AdapterModule

__all__ = [
    "as_peft_model",
    "cast_to_base",
    "merge_and_unload",
    "peft_configs",
    "peft_model_class",
    "read_config",
    "train_adapters",
    "unload",
]

_log = logging.getLogger(__name__)

# TRL's names of the adapter that it trains, and of its copy.
_TRAINED, _REFERENCE = "default", "ref"

# A factor is a module in PEFT, and a parameter here.
_FACTOR_OF_PEFT = re.compile(r"(\.lora_(?:A|B|magnitude_vector)\.[^.]+)\.weight$")

_STATES_OF_PEFT = "peft.utils.save_and_load"
_IN_FOLDER = re.compile(r"\.lora_[AB]\.weight$")

# Options of PEFT's functions that only affect how a folder is downloaded or stored.
_NEUTRAL = frozenset(
    {
        *("cache_dir", "device_map", "ephemeral_gpu_offload", "force_download", "local_files_only"),
        *("low_cpu_mem_usage", "max_memory", "offload_dir", "offload_folder", "offload_index"),
        *(
            "proxies",
            "save_function",
            "save_peft_format",
            "token",
            "torch_device",
            "use_auth_token",
        ),
    }
)


def as_peft_model(model: nn.Module) -> Any:
    """Wrap a rewritten model in a ``peft.PeftModel``, for TRL and for checkpoints that PEFT resumes.

    The model is neither changed nor copied: it is ``result.get_base_model()``, and training one trains the
    other. Libraries see a ``PeftModel`` with the methods of lora-fx. TRL's ``DPOTrainer`` and ``GRPOTrainer``
    use the initial adapter as the reference. A ``Trainer`` writes adapter folders without a second copy of
    the weights, and also resumes PEFT's folders.

    Args:
        model: A model from :func:`lora_fx.rewrite` or :func:`lora_fx.load_adapter`.

    Raises:
        ConfigError: If the model is not rewritten, or PEFT is not installed.
    """
    if isinstance(model, _Adapted):
        return model
    require_record(model)
    return peft_model_class()(model)


def peft_model_class() -> Any:
    """Return the class of the result of :func:`as_peft_model`, a subclass of ``peft.PeftModel``.

    Raises:
        ConfigError: If PEFT is not installed.
    """
    return _class_over(load_optional("peft", "a PeftModel", "peft", attribute="PeftModel"))


def read_config(config: Any, model: nn.Module) -> LoraConfig:
    """Convert a configuration of PEFT, or of lora_fx, to one of lora_fx.

    Args:
        config: The configuration.
        model: The model that it is for. If the configuration names no targets, PEFT's defaults for this kind
            of model are used. If PEFT does not know the model, every linear operation is a target.

    Raises:
        ConfigError: If it is not a configuration of LoRA, or asks for an unsupported feature.
    """
    if isinstance(config, LoraConfig):
        ours = config
    else:
        # PEFT checks no types, and libraries pass None for fields that their users left out.
        values = {name: value for name, value in config.to_dict().items() if value is not None}
        ours = LoraConfig.from_dict(values)
    if ours.target_modules is None and ours.target_parameters is None:
        table = load_optional("peft.utils", "a PeftModel", "peft", attribute=_TABLE)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        ours = dataclasses.replace(ours, target_modules=table.get(kind))
    return ours


_TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


# The configuration of each adapter by its name, and PEFT's configuration that was created from it.
_Known: TypeAlias = dict[str, tuple[LoraConfig, Any]]


class _Configs(dict[str, Any]):
    """Configurations of PEFT by the names of the adapters. It refuses new entries, which PEFT would add."""

    def __setitem__(self, name: str, config: Any) -> None:
        """Raise, because a new entry means that PEFT is about to adapt the model itself."""
        self.update({name: config})

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the configurations as a plain dict."""
        return dict, (dict(self),)

    def update(self, *_: Any, **__: Any) -> None:
        """Raise, because new entries mean that PEFT is about to adapt the model itself."""
        raise ConfigError(
            f"PEFT was asked to adapt a model that has adapters of lora-fx ({some(list(self))}): give "
            "peft_config=None to a trainer that trains these, lora_fx.add_adapter(model, config, name) adds "
            "another one, and PEFT can adapt the model that was given to lora_fx.rewrite, or what "
            "lora_fx.merge makes of this one"
        )


def peft_configs(model: nn.Module, known: _Known | None = None) -> dict[str, Any]:
    """Return the configuration of each adapter of a rewritten model as a configuration of PEFT.

    Args:
        model: A rewritten model.
        known: Configurations from earlier calls. They are returned again while the adapter has the same
            configuration; new ones are added.

    Raises:
        ConfigError: If the model is not rewritten, or PEFT is not installed.
    """
    config = load_optional("peft", "peft_config", "peft", attribute="LoraConfig")
    known = {} if known is None else known
    configs: dict[str, Any] = {}
    for name, adapter in require_record(model).adapters.items():
        ours, theirs = known.get(name, (None, None))
        if ours is not adapter.config:
            theirs = config(**_values(adapter.config, config))
            if theirs.base_model_name_or_path is None:
                theirs.base_model_name_or_path = origin_of(model)
            known[name] = (adapter.config, theirs)
        configs[name] = theirs
    return _Configs(configs)


def _check_options(call: str, options: Mapping[str, Any]) -> None:
    """Raise if an unknown option would change something.

    Raises:
        ConfigError: If such an option is set. The message names the first one.
    """
    for name, value in options.items():
        if name not in _NEUTRAL and value is not None:
            raise ConfigError(f"{call}: lora-fx has no {name}={value!r}: leave it out")


# Like lora_fx.merge, but also accepts compiled and checkpointed layers.
_merge = inside(merging.merge)


def _to_merge(model: nn.Module, adapter_names: Sequence[str] | None) -> Sequence[str] | None:
    """Return the adapters to merge, by default the active ones. None if no adapter is active."""
    return (
        (list(require_record(model).choice.names) or None)
        if adapter_names is None
        else adapter_names
    )


def merge_and_unload(
    model: nn.Module,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Return a merged model, as :func:`lora_fx.merge` does: a new model, with all checks.

    Args:
        model: A rewritten model.
        progressbar: True to show the progress.
        safe_merge: No effect: weights that are not finite are always refused.
        adapter_names: The adapters to merge. None for the active ones.
    """
    names = _to_merge(model, adapter_names)
    merged, _ = _merge(model, adapter_names=names, progress=progressbar)
    return merged


def unload(model: nn.Module) -> nn.Module:
    """Return a rewritten model without its adapters. Over a quantized base it is dense."""
    merged, _ = _merge(model, adapter_names=())
    return merged


class _Tuner(AroundModel):
    """The methods that PEFT's tuner and its ``PeftModel`` have in common."""

    @property
    def _inside(self) -> Any:
        raise NotImplementedError

    @property
    def _model(self) -> Any:
        """The rewritten model, even while a merged model runs."""
        tuner = self._inside
        return tuner.waiting[0] if tuner.waiting else tuner.model

    def get_base_model(self) -> nn.Module:
        """Return the rewritten model."""
        model: nn.Module = self._model
        return model

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = next(self._inside.model.parameters()).device
        return device

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configuration of each adapter as a configuration of PEFT, the same object each time.

        Of changes to its fields, ``save_pretrained`` only writes ``base_model_name_or_path``, ``revision``,
        ``inference_mode`` and ``task_type``.
        """
        return peft_configs(self._model, self._inside.configs)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, also in a block that disables them, as in PEFT."""
        return list(require_record(self._model).choice.names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the names of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, as :func:`lora_fx.set_adapter`. A merged model is unmerged first."""
        self.unmerge_adapter()
        set_adapter(self._model, adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as :func:`lora_fx.delete_adapter`. A merged model is unmerged first."""
        self.unmerge_adapter()
        delete_adapter(self._model, adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add a combination of adapters, as :func:`lora_fx.add_weighted_adapter`."""
        self.unmerge_adapter()
        add_weighted_adapter(self._model, *args, **kwargs)

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Run a merged model instead of this one, until :meth:`unmerge_adapter`.

        Weights are not changed in place and restored: the merged weights are new tensors, which take memory
        until then. The other weights are shared. Inside :meth:`disable_adapter`, the base runs until the end
        of the block.

        Args:
            adapter_names: The adapters to merge; by default the active ones.
            safe_merge: Always on: weights that are not finite are refused.
        """
        self.unmerge_adapter()
        adapted = self._model
        names = _to_merge(adapted, adapter_names)
        merged, _ = _merge(adapted, adapter_names=names)
        # Only factors are trained, and they are in the adapted model.
        merged.train(adapted.training).requires_grad_(False)
        self._inside.merged, self._inside.merged_names = (merged,), tuple(names or ())
        self._inside.run_merged(not require_record(adapted).is_disabled)

    def unmerge_adapter(self) -> None:
        """Run the adapted model again, which is bitwise unchanged."""
        tuner = self._inside
        if tuner.waiting:
            tuner.waiting[0].train(tuner.model.training)
        tuner.run_merged(False)
        tuner.merged, tuner.merged_names = (), ()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Return a merged model (:func:`merge_and_unload`)."""
        return merge_and_unload(self._model, progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """Return the model without adapters (:func:`unload`)."""
        return unload(self._model)


class _TunerModel(_Tuner, nn.Module):
    """The tuner, which PEFT calls the base model. It holds the model.

    Attributes:
        model: The model that runs: the rewritten model, or its merged copy.
        waiting: The rewritten model while the merged copy runs. A tuple holds it, so that it is no child
            module.
        merged: The merged copy from ``merge_adapter`` until ``unmerge_adapter``. While adapters are disabled,
            it does not run.
        merged_names: The adapters in the merged copy.
        configs: PEFT's configurations from earlier calls.
    """

    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.waiting: tuple[nn.Module, ...] = ()
        self.merged: tuple[nn.Module, ...] = ()
        self.merged_names: tuple[str, ...] = ()
        self.configs: _Known = {}
        self.training = model.training

    @property
    def _inside(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the tuner or, if the tuner does not have it, of the model."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "model"), name)

    def run_merged(self, merged: bool) -> None:
        """Choose the model that runs.

        Args:
            merged: True for the merged copy, if there is one. Otherwise the rewritten model runs.
        """
        adapted = self.waiting[0] if self.waiting else self.model
        self.waiting = (adapted,) if merged and self.merged else ()
        before, self.model = self.model, self.merged[0] if self.waiting else adapted
        if self.model.training != before.training:
            self.model.train(before.training)

    def _idle(self) -> list[nn.Module]:
        """Return the model that does not run at the moment: the rewritten model, or its merged copy."""
        return [model for model in (*self.waiting, *self.merged) if model is not self.model]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast both models: the model that runs, and the model that does not."""
        for model in self._idle():
            model._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or unfreeze the rewritten model, and never its merged copy."""
        for model in self.waiting or (self.model,):
            model.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model that runs, and of the rewritten model if it does not run."""
        for model in (self.model, *self.waiting):
            model.zero_grad(set_to_none)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)


class _Adapted(_Tuner):
    """The methods of a ``PeftModel`` over a rewritten model. PEFT's class comes next in the bases."""

    base_model: Any
    modules_to_save: None = None  # PEFT's attribute, for tasks with a head
    _is_warned = False

    def __init__(self, model: nn.Module, *more: Any) -> None:
        if more:
            raise ConfigError(
                "PeftModel(model, config): call get_peft_model(model, config), or "
                "PeftModel.from_pretrained(model, folder)"
            )
        nn.Module.__init__(self)  # type: ignore[arg-type]  # it is a module by its other base
        self.base_model = _TunerModel(model)
        self.peft_type = load_optional("peft", "a PeftModel", "peft", attribute="PeftType").LORA
        self._is_prompt_learning = False
        self.training = model.training
        self.register_load_state_dict_pre_hook(_with_our_names)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle the object by its state, because its class is created dynamically."""
        return _blank, (), vars(self)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Load a local adapter folder onto a model, as :func:`lora_fx.load_adapter`; frozen by default.

        Args:
            model: A model, or a rewritten one, which gets the adapter in addition.
            model_id: The folder.
            adapter_name: The name for the adapter.
            is_trainable: True to train it.
            config: Refused: the folder's configuration is used.
            autocast_adapter_dtype: True for fp32 factors over a base in half precision.
            subfolder: The adapter's subfolder in the folder.
            revision: Refused: nothing is downloaded.
            options: Other options of PEFT that change no values; they have no effect.

        Raises:
            ConfigError: For options that lora-fx does not have.
            CheckpointError: As :func:`lora_fx.load_adapter` raises.
        """
        refused = {"config": config, "revision": revision}
        _check_options("PeftModel.from_pretrained", {**refused, **options})
        inner = model.get_base_model() if isinstance(model, AroundModel) else model
        adapted = load_adapter(inner, Path(model_id, subfolder or ""), adapter_name=adapter_name)
        if not autocast_adapter_dtype:
            cast_to_base(adapted, adapter_name)
        set_adapter(adapted, adapter_name, inference_mode=not is_trainable)
        result = as_peft_model(model if adapted is inner else adapted)
        result._set_mode(adapter_name, is_trainable)
        return result

    def _set_mode(self, adapter_name: str, is_trainable: bool) -> None:
        """Set the modes that PEFT sets after loading an adapter. For training, the base keeps its mode."""
        self.peft_config[adapter_name].inference_mode = not is_trainable
        if is_trainable:
            train_adapters(self)
        else:
            self.eval()  # type: ignore[attr-defined]  # of the other base

    @property
    def _inside(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model with its active adapters, or each sample with its named adapter."""
        if adapter_names is None:
            return self.base_model.model(*args, **kwargs)
        with self._samples(adapter_names):
            return self.base_model.model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate with the model, with ``adapter_names`` as in :meth:`forward`."""
        if adapter_names is None:
            return self.base_model.model.generate(*args, **kwargs)
        with self._samples(adapter_names, kwargs.get("num_beams") or 1):
            return self.base_model.model.generate(*args, **kwargs)

    @contextmanager
    def _samples(self, names: Sequence[str], repeats: int = 1) -> Iterator[None]:
        if self.base_model.waiting:
            raise ConfigError(
                "adapter_names: the adapters are merged; call unmerge_adapter() first"
            )
        with adapter_ids(self._model, names, repeats=repeats):
            yield

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict.

        Raises:
            ConfigError: If PEFT's ``get_peft_model_state_dict`` is the caller, because it would find no
                factors of PEFT.
        """
        if sys._getframe(1).f_globals.get("__name__") == _STATES_OF_PEFT:
            raise ConfigError(
                "PEFT's get_peft_model_state_dict finds none of its layers in this model, and would return "
                "nothing: call lora_fx.peft.get_peft_model_state_dict. accelerate calls it for FSDP: give "
                "the trainer the rewritten model itself then, model.get_base_model()"
            )
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]  # of the other base

    def train(self, mode: bool = True) -> Any:
        """Set the training mode. Before training, warn of checkpoints that accelerate could not write."""
        if mode and not self._is_warned and _has_sharded_checkpoints():
            self._is_warned = True
            _log.warning(
                "accelerate's checkpoints of FSDP will fail for this PeftModel: PEFT finds none of its "
                "layers in it: give the trainer model.get_base_model(), or use version 2 of FSDP with "
                "state_dict_type FULL_STATE_DICT"
            )
        return super().train(mode)  # type: ignore[misc]  # of the other base

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or unfreeze all parameters."""
        self.base_model.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        self.base_model.zero_grad(set_to_none)

    def add_adapter(self, adapter_name: str, peft_config: Any, **options: Any) -> None:
        """Add an adapter, as :func:`lora_fx.add_adapter`. An adapter called "ref" is a copy of "default".

        TRL adds it as the reference, and then copies values by PEFT's names of parameters, which differ here.
        """
        cast = options.pop("autocast_adapter_dtype", True)
        _check_options("add_adapter", options)
        self.unmerge_adapter()
        add_adapter(self._model, read_config(peft_config, self._model), adapter_name)
        if not cast:
            cast_to_base(self._model, adapter_name)
        if adapter_name == _REFERENCE and _TRAINED in adapter_names(self._model):
            values = adapter_state_dict(self._model, _TRAINED)
            load_adapter_state_dict(self._model, values, _REFERENCE)

    def get_layer_status(self) -> list[Any]:
        """Return a ``peft.peft_model.TunerLayerStatus`` for each layer with adapters."""
        rows = layer_status(self._model, self.base_model.merged_names)
        return [dataclasses.replace(row, name=f"model.{row.name}") for row in rows]

    def get_model_status(self) -> Any:
        """Return a ``peft.peft_model.TunerModelStatus``."""
        return model_status(self._model, self.base_model.merged_names)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base within the context, as :func:`lora_fx.disable_adapter`."""
        tuner = self.base_model
        try:
            with disable_adapter(self._model):
                tuner.run_merged(False)
                yield
        finally:
            tuner.run_merged(not require_record(self._model).is_disabled)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Load an adapter from a local folder. An existing adapter of this name gets the loaded values."""
        cast = options.pop("autocast_adapter_dtype", True)
        _check_options("load_adapter", options)
        self.unmerge_adapter()
        load_adapter(self._model, Path(model_id, subfolder or ""), adapter_name=adapter_name)
        if not cast:
            cast_to_base(self._model, adapter_name)
        if adapter_name in self.active_adapters:
            set_adapter(self._model, self.active_adapters, inference_mode=not is_trainable)
        self._set_mode(adapter_name, is_trainable)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write adapter folders as PEFT's ``save_pretrained`` does, all of them or none.

        Args:
            save_directory: The folder of the adapter "default". Other adapters get subfolders of their names.
            safe_serialization: False is refused: only safetensors are written.
            selected_adapters: The adapters to write; by default all of them.
            save_embedding_layers: As in PEFT; only "auto" is supported.
            is_main_process: True if this process writes.
            state_dict: The values of a sharded model.
            options: Other options of PEFT; only those without effect are accepted.

        Raises:
            ConfigError: If there is no such adapter, or for an option that lora-fx does not have.
        """
        if options.pop("push_to_hub", False):
            raise ConfigError("push_to_hub=True: save the folder without, and upload it")
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization=False: lora-fx writes safetensors, which PEFT reads: leave it out"
            )
        if save_embedding_layers != "auto":
            raise ConfigError(
                f"save_embedding_layers={save_embedding_layers!r}: call lora_fx.save_adapter(model, folder, "
                "save_embedding_layers=...)"
            )
        # PEFT drops these as well, or they have no effect on a folder of safetensors.
        for name in ("path_initial_model_for_weight_conversion", "max_shard_size"):
            options.pop(name, None)
        _check_options("save_pretrained", options)
        if not is_main_process:
            return
        names = list(adapter_names(self._model) if selected_adapters is None else selected_adapters)
        values = {
            _FACTOR_OF_PEFT.sub(r"\1", key.removeprefix(PREFIX)): value
            for key, value in (state_dict or {}).items()
        }
        said = {
            name: {field: getattr(config, field) for field in _DESCRIPTIVE}
            for name, config in self.peft_config.items()
        }
        origin = origin_of(self._model)
        save_peft_folder(self._model, Path(save_directory), names, origin, values, said)


def _has_sharded_checkpoints() -> bool:
    """Return True if accelerate runs FSDP and asks PEFT for the tensors of a ``PeftModel``."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return False
    plugin = getattr(state.AcceleratorState(), "fsdp_plugin", None)
    if plugin is None:
        return False
    # accelerate gathers whole tensors of FSDP2 by itself (_get_model_state_dict in utils/fsdp_utils.py).
    return (plugin.fsdp_version, plugin.state_dict_type.name) != (2, "FULL_STATE_DICT")


def _with_our_names(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
    """Rename PEFT's names of factors in a state dict to lora_fx's names.

    Raises:
        ConfigError: If the state dict has the names of a folder, as from PEFT's
            ``set_peft_model_state_dict``.
    """
    if any(_IN_FOLDER.search(name) for name in state):
        raise ConfigError(
            "these are the tensors of an adapter folder, and PEFT's function finds none of its layers in "
            "this model: call lora_fx.peft.set_peft_model_state_dict"
        )
    for name in [name for name in state if _FACTOR_OF_PEFT.search(name)]:
        state[name.removesuffix(".weight")] = state.pop(name)


def train_adapters(model: Any) -> None:
    """Put adapters into training mode, as PEFT does for new adapters. The base keeps its mode."""
    for module in model.modules():
        if isinstance(module, AdapterModule):
            module.train()
        elif isinstance(module, AroundModel):
            module.training = True  # type: ignore[attr-defined]  # it is a module, too


def _blank() -> Any:
    """Create a ``PeftModel`` without state, for unpickling."""
    return object.__new__(peft_model_class())


# Fields that describe an adapter and do not affect its outputs.
_DESCRIPTIVE = ("base_model_name_or_path", "revision", "inference_mode", "task_type")


@inside
def cast_to_base(model: nn.Module, adapter_name: str) -> None:
    """Cast the factors of half-precision weights to the weights' dtype (``autocast_adapter_dtype=False``)."""
    for row in require_record(model).adapters[adapter_name].sites:
        dtype = base_dtype(model, row.site)
        if dtype in (torch.float16, torch.bfloat16):
            for factor in factors_of(model, row, adapter_name).present:
                factor.data = factor.data.to(dtype)
    for trained in require_record(model).adapters[adapter_name].tokens:
        dtype = weight_at(model, trained.site.weight).dtype
        if dtype in (torch.float16, torch.bfloat16):
            rows = tokens_of(model, trained, adapter_name)
            rows.data = rows.data.to(dtype)


@functools.cache
def _class_over(base: type) -> type:
    return type("PeftModel", (_Adapted, base), {"__module__": __name__})


def _values(config: LoraConfig, theirs: type) -> dict[str, Any]:
    """Return the fields of a configuration that PEFT's class has as well."""
    known = theirs.__dataclass_fields__  # type: ignore[attr-defined]
    values = config.to_dict()
    return {name: value for name, value in values.items() if name in known and known[name].init}
