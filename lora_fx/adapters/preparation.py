"""What a quantised model needs before it is trained: wide norms, checkpoints, gradients of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError, QuantizationError
from lora_fx.formats.weights import quantization_of
from lora_fx.ir.record import record_of
from lora_fx.passes.graph.copies import check_model, share_copy

__all__ = ["prepare_for_kbit_training"]

_HALF = (torch.float16, torch.bfloat16)


def prepare_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Makes a quantised model ready for adapters: PEFT's ``prepare_model_for_kbit_training`` as one step.

    It is called before :func:`lora_fx.rewrite`:

    - everything is frozen;
    - parameters in half precision that are not quantised (norms, biases, embeddings, the head) become fp32,
      so that what lies between the products is computed in it. With a tensor of torchao in half precision
      they stay as they are, since it multiplies nothing else;
    - blocks keep their inputs only, and run again in the backward pass (gradient checkpointing);
    - outputs of the input embeddings want a gradient, so that every block is differentiated.

    Unlike PEFT's, this does not change its argument; the kind of model is read off its weights, not off
    attributes that transformers sets on what it has loaded; checkpoints are not reentrant unless that is
    asked for; and a model without quantised weights is an error, where PEFT doubles its size.

    Args:
        model: A model with quantised weights. It is not touched.
        use_gradient_checkpointing: Whether to checkpoint blocks, by the model's own
            ``gradient_checkpointing_enable``, which models of transformers have.
        gradient_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``; ``use_reentrant=False`` by
            default.

    Returns:
        A copy over the same weights, but for those that became fp32, all of it frozen.

    Raises:
        QuantizationError: If no weight is quantised.
        ConfigError: If the model has adapters already, or is to checkpoint and cannot.
        CaptureError: If the model cannot be copied.
    """
    check_model(model)
    if record_of(model) is not None:
        raise ConfigError(
            f"{type(model).__name__} has adapters already, and they would be frozen: prepare the base, and "
            "rewrite what that gives"
        )
    stored = [found for p in model.parameters() if (found := quantization_of(p)) is not None]
    if not stored:
        raise QuantizationError(
            f"nothing in {type(model).__name__} is quantised: quantise it first (lora_fx.quantize), or train "
            "it as it is; gradient checkpointing alone is model.gradient_checkpointing_enable()"
        )
    if use_gradient_checkpointing and not _can_checkpoint(model):
        raise ConfigError(
            f"{type(model).__name__} cannot checkpoint its blocks by itself (it has no "
            "gradient_checkpointing_enable): pass use_gradient_checkpointing=False, and wrap the calls of "
            "its blocks in torch.utils.checkpoint.checkpoint where memory asks for it"
        )
    prepared = share_copy(model)
    if not any(one.library == "torchao" and one.dtype in _HALF for one in stored):
        _widen(prepared)
    if use_gradient_checkpointing:
        _checkpoint(prepared, gradient_checkpointing_kwargs)
    return prepared


def _widen(model: nn.Module) -> None:
    """Puts fp32 parameters in the place of those in half precision; what is tied stays tied."""
    wide: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in _HALF or quantization_of(parameter):
                continue
            if id(parameter) not in wide:
                wide[id(parameter)] = nn.Parameter(parameter.detach().float(), requires_grad=False)
            module._parameters[name] = wide[id(parameter)]


def _can_checkpoint(model: Any) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", True)) and hasattr(
        model, "gradient_checkpointing_enable"
    )


def _checkpoint(model: Any, options: Mapping[str, Any] | None) -> None:
    given = {"use_reentrant": False, **(options or {})}
    # The newer name of transformers, where calling the older one is a warning.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
    else:
        enable(activation_checkpointing_kwargs=given)
    # transformers does it for models of tokens.
    if getattr(model, "_require_grads_hook", None) is None:
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_wants_gradient)


def _wants_gradient(module: nn.Module, given: Any, output: torch.Tensor) -> None:
    output.requires_grad_()
