"""A rewritten model as a ``PeftModel``, for libraries that treat those in a way of their own.

TRL finds the reference of a model that is trained already by asking whether it is a ``PeftModel``, and
transformers' Trainer saves and resumes the adapter alone if it is one. :func:`as_peft_model` puts a model
into such an object: its methods are those of PEFT (0.21, ``peft/peft_model.py``), and do what lora-fx does.

The class is made when it is first asked for, so that nothing imports PEFT before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import (
    active_adapters,
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
from lora_fx.checkpoint.state import adapter_state_dict, load_adapter_state_dict
from lora_fx.checkpoint.trainers import save_peft_folder
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, some
from lora_fx.extras import load_optional
from lora_fx.ir import require_record
from lora_fx.passes.merge import merging
from lora_fx.passes.parameters import AroundModel
from lora_fx.progress import show_progress

__all__ = ["as_peft_model", "peft_configs", "peft_model_class", "read_config"]

# TRL's names of the adapter that it trains, and of its copy.
_TRAINED, _REFERENCE = "default", "ref"
_BASE = "__base__"  # PEFT's name of no adapter, for samples of a batch


def as_peft_model(model: nn.Module) -> Any:
    """Put a rewritten model into a ``peft.PeftModel``, for TRL and for checkpoints that PEFT resumes.

    The model is not changed, and not copied: it is ``result.get_base_model()``, and training one trains the
    other. Libraries see a ``PeftModel`` whose methods are those of lora-fx: TRL's ``DPOTrainer`` and
    ``GRPOTrainer`` take the adapter as it is at the beginning as the reference, and a ``Trainer`` writes
    adapter folders that hold the weights once, and resumes those of PEFT.

    Args:
        model: What :func:`lora_fx.rewrite` or :func:`lora_fx.load_adapter` has returned.

    Raises:
        ConfigError: If the model is not rewritten, or PEFT is not installed.
    """
    require_record(model)
    return peft_model_class()(model)


def peft_model_class() -> Any:
    """Return the class of what :func:`as_peft_model` returns, a subclass of ``peft.PeftModel``.

    Raises:
        ConfigError: If PEFT is not installed.
    """
    return _class_over(load_optional("peft", "a PeftModel", "peft", attribute="PeftModel"))


def read_config(config: Any) -> LoraConfig:
    """Return a configuration of PEFT, or of ours, as one of ours.

    Raises:
        ConfigError: If it is not one of LoRA, or asks for something that is not there.
    """
    if isinstance(config, LoraConfig):
        return config
    # PEFT checks no types, and libraries give None for a field that their users left out.
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    return LoraConfig.from_dict(values)


class _Configs(dict[str, Any]):
    """Configurations of PEFT, by the names of the adapters. PEFT cannot add another."""

    def __setitem__(self, name: str, config: Any) -> None:
        """Refuse, before PEFT has changed anything of the model."""
        self.update({name: config})

    def update(self, *_: Any, **__: Any) -> None:
        """Refuse likewise."""
        raise ConfigError(
            f"PEFT was asked to adapt a model that has adapters of lora-fx ({some(list(self))}): give "
            "peft_config=None to a trainer that trains these, lora_fx.add_adapter(model, config, name) adds "
            "another one, and PEFT can adapt the model that was given to lora_fx.rewrite, or what "
            "lora_fx.merge makes of this one"
        )


def peft_configs(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of each adapter of a rewritten model, as one of PEFT.

    Raises:
        ConfigError: If the model is not rewritten, or PEFT is not installed.
    """
    config = load_optional("peft", "peft_config", "peft", attribute="LoraConfig")
    adapters = require_record(model).adapters
    return _Configs(
        {name: config(**_values(adapter.config, config)) for name, adapter in adapters.items()}
    )


class _Inside(nn.Module):
    """The tuner that PEFT calls the base model, and that holds the model.

    Attributes:
        model: What runs: the rewritten model, or its merged copy.
        waiting: The rewritten model while the merged one runs, in a tuple: it is no module of this one then.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.waiting: tuple[nn.Module, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute, of the model if the tuner has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)


class _Adapted(AroundModel):
    """The methods of a ``PeftModel`` over a rewritten model. The class of PEFT comes after it."""

    base_model: Any
    modules_to_save: None = None  # PEFT's own, of tasks with a head

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]  # it is a module by its other base
        self.base_model = _Inside(model)
        self.peft_type = "LORA"
        self._is_prompt_learning = False
        self.config = getattr(model, "config", {"model_type": "custom"})
        self.device = next(model.parameters()).device
        self.training = model.training

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **_: Any,
    ) -> Any:
        """Read a local adapter folder onto a model, as :func:`lora_fx.load_adapter`; frozen by default."""
        adapted = load_adapter(model, model_id, adapter_name=adapter_name)
        set_adapter(adapted, adapter_name, inference_mode=not is_trainable)
        return as_peft_model(adapted.train(is_trainable))

    @property
    def _model(self) -> nn.Module:
        inside = self.base_model
        model: nn.Module = inside.waiting[0] if inside.waiting else inside.model
        return model

    def get_base_model(self) -> nn.Module:
        """Give the rewritten model."""
        return self._model

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model with its active adapters, or each sample with the adapter that is named for it."""
        with self._samples(adapter_names):
            return self.base_model.model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generate with the model, with ``adapter_names`` as in :meth:`forward`."""
        beams = kwargs.get("num_beams") or 1
        with self._samples(adapter_names, beams):
            return self.base_model.model.generate(*args, **kwargs)

    @contextmanager
    def _samples(self, names: Sequence[str] | None, repeats: int = 1) -> Iterator[None]:
        if names is None:
            yield
            return
        if self.base_model.waiting:
            raise ConfigError(
                "adapter_names: the adapters are merged; call unmerge_adapter() first"
            )
        ids = [None if name == _BASE else name for name in names]
        with adapter_ids(self._model, ids, repeats=repeats):
            yield

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configuration of each adapter, as one of PEFT."""
        return peft_configs(self._model)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(active_adapters(self._model))

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the names of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def add_adapter(self, adapter_name: str, peft_config: Any, **_: Any) -> None:
        """Add an adapter, as :func:`lora_fx.add_adapter`. The one called "ref" is a copy of "default".

        TRL adds that one as the reference, and then copies values by PEFT's names of parameters, which are
        others than these.
        """
        add_adapter(self._model, read_config(peft_config), adapter_name)
        if adapter_name == _REFERENCE and _TRAINED in adapter_names(self._model):
            values = adapter_state_dict(self._model, _TRAINED)
            load_adapter_state_dict(self._model, values, _REFERENCE)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, as :func:`lora_fx.set_adapter`."""
        set_adapter(self._model, adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as :func:`lora_fx.delete_adapter`."""
        delete_adapter(self._model, adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add a combination of adapters, as :func:`lora_fx.add_weighted_adapter`."""
        add_weighted_adapter(self._model, *args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base while the context lasts, as :func:`lora_fx.disable_adapter`."""
        with disable_adapter(self._model):
            yield

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **_: Any,
    ) -> None:
        """Read a local folder into an adapter, which is made if there is none of the name."""
        load_adapter(self._model, model_id, adapter_name=adapter_name)
        if adapter_name in self.active_adapters:
            set_adapter(self._model, self.active_adapters, inference_mode=not is_trainable)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the folders that PEFT's ``save_pretrained`` writes, in one move.

        Args:
            save_directory: Gets the adapter "default"; others get folders of their names in it.
            selected_adapters: Those that are written; by default all of them.
            is_main_process: Whether this process writes.
            state_dict: The values of a model that is sharded.
            options: Others of PEFT; only those that change nothing are known.

        Raises:
            ConfigError: If there is no such adapter, or the folder is to be pushed.
        """
        if options.get("push_to_hub"):
            raise ConfigError("push_to_hub=True: save the folder without, and upload it")
        if not is_main_process:
            return
        names = list(adapter_names(self._model) if selected_adapters is None else selected_adapters)
        values = {key.removeprefix(PREFIX): value for key, value in (state_dict or {}).items()}
        save_peft_folder(self._model, Path(save_directory), names, origin_of(self._model), values)

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Run a merged model in place of this one, until :meth:`unmerge_adapter`.

        Nothing is added to weights and subtracted again: the merged weights are new tensors, which take
        memory until then, and the others are shared.

        Args:
            adapter_names: Which adapters; those that are active by default.
            safe_merge: Always on: weights that are not finite are refused.
        """
        adapted = self._model
        merged, _ = merging.merge(adapted, adapter_names=adapter_names)
        self.base_model.model, self.base_model.waiting = merged, (adapted,)

    def unmerge_adapter(self) -> None:
        """Run the adapted model again, bit for bit as it was."""
        self.base_model.model, self.base_model.waiting = self._model, ()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Merge, as :func:`lora_fx.merge`: into a new model, and with every check."""
        with show_progress(progressbar, "weight") as progress:
            merged, _ = merging.merge(self._model, adapter_names=adapter_names, progress=progress)
        return merged

    def unload(self) -> nn.Module:
        """Give the model without adapters."""
        merged, _ = merging.merge(self._model, adapter_names=())
        return merged


@functools.cache
def _class_over(base: type) -> type:
    return type("PeftModel", (_Adapted, base), {"__module__": __name__})


def _values(config: LoraConfig, theirs: type) -> dict[str, Any]:
    """The fields of a configuration that PEFT's has, too."""
    known = theirs.__dataclass_fields__  # type: ignore[attr-defined]
    values = config.to_dict()
    return {name: value for name, value in values.items() if name in known and known[name].init}
