"""Modules that hold the tensors of adapters: factors, dropouts, state, and containers for bare parameters."""

from __future__ import annotations

import keyword
import re
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError
from lora_fx.runtime.modules.parts import note_whole

__all__ = [
    "AdapterDropout",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "AdapterState",
    "Holder",
    "KeptIndices",
    "KeptTensors",
    "OffloadedFactors",
    "check_adapter_name",
]


# Adapter names that would hide attributes of modules or of lora_fx.runtime.rows.samples.SampleRows.
_TAKEN = (
    *("training", "thread", "threads", "inherited", "samples", "repeats", "state"),
    *("proofs", "folded"),
    *("assign", "assigned", "of_blocks", "reassign", "settle", "lay_out", "slots"),
)


_HOOK = "_hf_hook"  # attribute with accelerate's hook


class _NoLayer(ConfigError, AttributeError):
    """Error for code that treats a module of an adapter as a layer."""


class AdapterModule(nn.Module):
    """Module that lora_fx adds to a model, and that the base does not have."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute. Raise for ``weight``, which tensor parallelism reads from each module."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise _NoLayer(
                "a module that holds an adapter has no weight, and is no layer: parallelize the model first "
                "(parallelize_module), and rewrite what that gives"
            ) from error


class AdapterFactors(AdapterModule):
    """One factor (A or B) of a site, with a parameter for each adapter, such as ``layer.lora_A.default``.

    It has no forward, because the graph reads the parameters. Thus accelerate's hooks, which load parameters
    before a call, never run. :class:`OffloadedFactors` loads a parameter when it is read.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Setting accelerate's hook turns the module into :class:`OffloadedFactors`.

        FSDP2 also replaces factors by sharded ones here. A digest of the whole factor is recorded before.
        """
        if isinstance(value, nn.Parameter):
            note_whole(self, name, value)
        super().__setattr__(name, value)
        if name == _HOOK and type(self) is AdapterFactors:
            object.__setattr__(self, "__class__", OffloadedFactors)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register a hook.

        Raises:
            ConfigError: If the hook is from Opacus, for per-sample gradients. This module is never called, so
                the hook would not run.
        """
        library = type(getattr(getattr(hook, "func", hook), "__self__", None)).__module__
        if library.partition(".")[0] == "opacus":
            raise ConfigError(
                "Opacus computes the gradients of single samples by hooks on layers, and the factors of an "
                "adapter are read by the graph of the layer that they adapt: no hook on them runs. Use "
                "grad_sample_mode='ew' with a model of lora_fx.rewrite(..., optimize=False), where linear "
                "layers have LoRA; or grad_sample_mode='no_op', and set grad_sample of the parameters from "
                "torch.func (vmap over grad of functional_call), which any adapter goes with"
            )
        return super().register_full_backward_hook(hook, prepend)

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Add or replace the factor of an adapter.

        Args:
            adapter: Name of the adapter.
            value: A of shape [r, in, ...] or B of shape [out, r, ...]. A parameter is registered as it is.
        """
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        self.register_parameter(adapter, parameter)

    def extra_repr(self) -> str:
        """Return the names and shapes of the factors."""
        shapes = ((name, tuple(p.shape)) for name, p in self.named_parameters())
        return ", ".join(f"{name}={shape}" for name, shape in shapes)


class OffloadedFactors(AdapterFactors):
    """Factors that accelerate has offloaded to the disk or the CPU. Each read loads the factor."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute. Load the values of a factor.

        Raises:
            ConfigError: If the factor would be trained. The gradient of a loaded value would be lost.
        """
        value = super().__getattr__(name)
        hook: Any = self.__dict__.get(_HOOK)
        stored = getattr(hook, "weights_map", None)
        if not isinstance(value, nn.Parameter) or not value.is_meta or stored is None:
            return value
        if self.training and torch.is_grad_enabled():
            raise ConfigError(
                f"the factors of adapter {name!r} are offloaded by accelerate, which is for inference: call "
                "model.eval(), or take the hooks off (accelerate.hooks.remove_hook_from_submodules)"
            )
        loaded = stored[name].to(hook.execution_device, value.dtype)
        return nn.Parameter(loaded, requires_grad=False)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute. Without accelerate's hook, the module is an :class:`AdapterFactors` again."""
        super().__delattr__(name)
        if name == _HOOK:
            object.__setattr__(self, "__class__", AdapterFactors)


class KeptIndices(AdapterFactors):
    """Indices of the rows of a weight that an adapter trains, as non-persistent buffers."""

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Add the indices of an adapter.

        Args:
            adapter: Name of the adapter.
            value: Integers, [n].
        """
        self.register_buffer(adapter, value, persistent=False)


class AdapterState(AdapterFactors):
    """Buffers that training calls write into, one tensor for each adapter.

    The buffers are not trained. While the backward runs the module again, they have the values that they had
    in the forward.
    """

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Add or replace the tensor of an adapter."""
        self.register_buffer(adapter, value.detach())


class AdapterDropout(AdapterModule, nn.Dropout):
    """Dropout of an adapter's branch at a site.

    It is an ``nn.Dropout``, so code that looks for such modules finds it (``model.eval()``, TRL's
    ``disable_dropout``, a schedule of probabilities). The graph reads ``p`` and ``training`` at each call. It
    never calls the module, so hooks on it do not run.
    """


class AdapterDropouts(AdapterModule):
    """Dropouts of a site by adapter, named like PEFT's: ``layer.lora_dropout.default.p``."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            ConfigError: If another module would replace a dropout. The graph would not call it.
        """
        if isinstance(value, nn.Module) and not isinstance(value, AdapterDropout):
            raise ConfigError(
                f"lora_dropout.{name} is the dropout of an adapter, and a {type(value).__name__} in its "
                "place would not be called: set its p instead (p = 0 for no dropout)"
            )
        super().__setattr__(name, value)

    def add(self, adapter: str, p: float) -> None:
        """Add or replace the dropout of an adapter.

        Args:
            adapter: Name of the adapter.
            p: The initial probability.
        """
        self.add_module(adapter, AdapterDropout(p).train(self.training))


class Holder(AdapterModule):
    """Container for the factors of a bare parameter, in the module that owns the parameter.

    A bare parameter is used without a layer, such as the stacked weights of experts.
    """

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise, because the container is not a layer.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "code goes through the children of a module and calls each, and one of them holds the adapter of "
            "a parameter: leave out what is a lora_fx.runtime.modules.AdapterModule, or leave the parameter "
            "out of target_parameters"
        )


class KeptTensors(AdapterFactors):
    """Tensors that an adapter stores for a parameter without training them. They are not factors."""


def check_adapter_name(name: object) -> None:
    """Raise if a name cannot be an attribute of :class:`AdapterFactors`.

    Raises:
        ConfigError: If the name is empty, has other characters than letters, digits, "_" and "-",
            is a keyword of Python, or an attribute of ``nn.Module``.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"adapter_name must be a string that is not empty, found {name!r}")
    if not re.fullmatch(r"[\w-]+", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"adapter_name {name!r} has to be letters, digits, '_' and '-', and no word of Python: "
            "it is part of parameter and folder names"
        )
    if hasattr(AdapterFactors, name) or name in _TAKEN:
        raise ConfigError(f"adapter_name {name!r} is an attribute of nn.Module: choose another")
