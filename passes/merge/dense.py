"""Restore the base model of a rewritten one: its own classes, and dense weights for quantized ones.

A library's own layer becomes a layer of torch, with the same name and hooks. It stays the same object, so
that other references to it (a second parent, a closure) see the dense layer.

A weight becomes dense only if the code that reads it can read a dense one. There are three such cases: the
weight belongs to a library's layer, its tensor subclass behaves like a dense tensor, or the model's own code
expects a dense weight and only a graph reads the quantized one. In the last case the dense weight gets the
layout that the model's own code expects.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import MergeError
from lora_fx.formats import (
    LibraryLayers,
    dense,
    format_of,
    formats,
    is_format_hook,
    quantization_of,
)
from lora_fx.ir import Layout, Quantization, Record, Site
from lora_fx.passes.graph import (
    CONSTANT,
    install,
    is_lazy,
    kept_graph,
    memory_of,
    uninstall,
)
from lora_fx.passes.parameters import (
    detached,
    distributed_as,
    gathered,
    is_partitioned,
    is_sharded,
    mark_adapted,
    place_base,
    trained_by_hand,
    unprotect,
    with_part,
)
from lora_fx.passes.trainers import copy_without_trainers
from lora_fx.runtime.modules import AdapterModule
from lora_fx.runtime.rows import unwatch_calls, unwatch_tokens

__all__ = [
    "KEPT_IN_FP32",
    "Keep",
    "cast",
    "cast_model",
    "check_dtype",
    "dtype_of_all",
    "forget_loader",
    "keep_all",
    "layouts_of",
    "make_dense",
    "make_savable",
    "quantized_weights",
    "stripped",
    "values_of",
]


# transformers computes rotary angles in fp32 whatever the model's dtype. It keeps these buffers in fp32
# when it loads a model, because position * frequency would lose too many digits in half precision.
KEPT_IN_FP32 = ("inv_freq", "original_inv_freq")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_dtype(dtype: object) -> None:
    """Raise if an argument ``dtype`` is neither a dtype that weights can have nor None.

    Raises:
        MergeError: If it is something else.
    """
    if dtype is not None and dtype not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise MergeError(f"dtype is {dtype!r}; it is one of {known}")


class Keep(Protocol):
    """Type of the argument ``keep``: a function that can store each new weight elsewhere."""

    def __call__(
        self, weight: torch.Tensor, again: Callable[[], torch.Tensor] | None = None, /
    ) -> torch.Tensor:
        """Return a tensor with the values of a new weight, for the model to use instead of the weight.

        Args:
            weight: The new weight.
            again: Function that computes the same weight again; None if its inputs will change.
        """
        ...


def keep_all(
    weight: torch.Tensor, again: Callable[[], torch.Tensor] | None = None, /
) -> torch.Tensor:
    """Return each new weight itself: the default for an argument of type :class:`Keep`."""
    return weight


def cast_model(
    model: nn.Module,
    dtype: torch.dtype,
    keep: Keep = keep_all,
    *,
    buffers: bool = True,
) -> None:
    """Cast parameters and buffers, as ``nn.Module.to`` does, but into new parameters.

    Tied parameters stay tied.

    Rotary frequencies stay in fp32, as transformers loads them.

    Args:
        model: A model that is used nowhere else, over weights that may be shared.
        dtype: The new dtype.
        keep: Called with each new weight, returns a tensor of the same values to use instead.
        buffers: True to cast buffers, too.

    Raises:
        MergeError: If a number overflows.
    """
    uses = Counter(
        memory_of(old) for module in model.modules() for old in _to_cast(module, dtype).values()
    )
    # The old parameter is stored to keep it alive: if its memory were reused, another parameter could get the
    # same key.
    tied: dict[tuple[object, ...], tuple[nn.Parameter, nn.Parameter]] = {}
    for fqn, module in model.named_modules():
        for leaf, old in _to_cast(module, dtype).items():
            key = memory_of(old)
            if key in tied:
                module._parameters[leaf] = tied[key][1]
                continue
            new = _cast_parameter(old, dtype, f"{fqn}.{leaf}", keep)
            module._parameters[leaf] = new
            if uses[key] > 1:
                tied[key] = old, new
        for leaf, buffer in module._buffers.items() if buffers else ():
            if buffer is not None and buffer.is_floating_point() and leaf not in KEPT_IN_FP32:
                module._buffers[leaf] = cast(buffer, dtype, f"{fqn}.{leaf}")


def _to_cast(module: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that have to be cast to a dtype, by name.

    Quantized, lazy and integer parameters are left out.
    """
    return {
        leaf: old
        for leaf, old in module._parameters.items()
        if old is not None
        and old.dtype != dtype
        and old.is_floating_point()
        and _stored(old) is None
        and not is_lazy(old)
    }


def _cast_parameter(
    old: nn.Parameter,
    dtype: torch.dtype,
    name: str,
    keep: Keep,
) -> nn.Parameter:
    if is_partitioned(old):
        value = distributed_as(cast(gathered(old, name), dtype, name), old)
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
    else:
        parameter = nn.Parameter(keep(cast(old.detach(), dtype, name)))
    parameter.requires_grad_(old.requires_grad)
    return parameter


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a tensor in another dtype, and raise if a number overflows.

    Args:
        values: A floating-point tensor.
        dtype: The new dtype.
        name: Its FQN, for the error.

    Raises:
        MergeError: If a number overflows.
    """
    result = values.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(values.dtype).max
    if narrower and bool((result.isinf() & values.isfinite()).any()):
        raise MergeError(f"{name} overflows {dtype}; merge in a wider dtype")
    return result


_log = logging.getLogger("lora_fx")

# Attributes that transformers and accelerate set on a quantized model.
_OF_MODELS = (
    "hf_quantizer",
    "is_4bit_serializable",
    "is_8bit_serializable",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
    "_is_quantized_training_enabled",
)

_WIDE = (torch.float32, torch.float64)


def dtype_of_all(model: nn.Module) -> torch.dtype | None:
    """Return the dtype for the dense version of a quantized model; None if the model is not quantized.

    It is the dtype of the weights that are not quantized, because the model computes in it. Several dtypes
    are promoted to one that holds all. If every weight is quantized, it is the dtype of their values.
    """
    stored = quantized_weights(model)
    if not stored:
        return None
    plain = {
        parameter.dtype
        for parameter in model.parameters()
        if _stored(parameter) is None and parameter.dtype in _DTYPES
    }
    return functools.reduce(
        torch.promote_types, plain or {quantization.dtype for quantization in stored.values()}
    )


def quantized_weights(model: nn.Module) -> dict[str, Quantization]:
    """Return every quantized weight, by each of its names."""
    stored = (
        (name, _stored(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )
    return {name: quantization for name, quantization in stored if quantization is not None}


def _stored(weight: torch.Tensor) -> Quantization | None:
    """Return the quantization of a weight, or of the local shard of a sharded weight; None if dense."""
    return quantization_of(torch_private.local_tensor(weight))


def layouts_of(sites: Iterable[Site]) -> dict[str, Layout]:
    """Return the layouts that the weights of sites had before they were quantized, by FQN."""
    return {
        site.weight: "in_out" if site.turned else "out_in"
        for site in sites
        if site.quantized is not None
    }


def values_of(
    model: nn.Module, name: str, layouts: Mapping[str, Layout], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a weight as the model's own code reads it, dequantized if it is quantized.

    If FSDP2 has split a quantized weight, each process dequantizes its own part.

    Args:
        model: A model that has it.
        name: Its FQN.
        layouts: The result of :func:`layouts_of`.
        dtype: The dtype in which the model will compute. For fp32 and fp64, values are dequantized to fp32,
            as the kernels do for such inputs; else to the weight's own dtype, so that they are rounded once.
    """
    weight = model.get_parameter(name)
    stored = _stored(weight)
    if stored is None:
        return detached(weight)
    dtype = torch.float32 if dtype in _WIDE else stored.dtype
    if is_sharded(weight):
        values = with_part(weight, dense(torch_private.local_tensor(weight), dtype))
    else:
        values = dense(weight, dtype)
    return values if layouts.get(name, "out_in") == "out_in" else values.T


def make_dense(
    model: nn.Module,
    dtype: torch.dtype,
    layouts: Mapping[str, Layout],
    keep: Keep = keep_all,
) -> None:
    """Replace the remaining quantized weights of a model by dense ones, in place and one by one.

    Args:
        model: A model that is used nowhere else; the weights of adapted sites are dense in it already.
        dtype: The dtype of the new weights.
        layouts: The result of :func:`layouts_of`.
        keep: Called with each new weight, returns a tensor of the same values to use instead.
    """
    new: dict[int, nn.Parameter] = {}
    left: list[str] = []
    for fqn, module in list(model.named_modules()):
        for leaf, weight in list(module._parameters.items()):
            if weight is None or _stored(weight) is None:
                continue
            name = f"{fqn}.{leaf}" if fqn else leaf
            if not _is_known(module, weight, name, layouts):
                left.append(name)
                continue
            if id(weight) not in new:
                values = values_of(model, name, layouts, dtype).to(dtype).contiguous()
                new[id(weight)] = nn.Parameter(keep(values), requires_grad=False)
            module._parameters[leaf] = new[id(weight)]
        _make_plain(module)
        if kept_graph(module) is not None and not left:
            _drop_graph(module)
    if left:
        _log.warning(
            "these weights are still quantized: only the code of their modules knows how they are read: %s",
            ", ".join(left),
        )
    else:
        _forget(model)


def _make_plain(module: nn.Module) -> None:
    """Turn a library's quantized layer with a weight that is now dense into torch's, such as ``nn.Linear``.

    Any other module stays as it is.
    """
    if not any(quantization_of(parameter) for parameter in module._parameters.values()):
        for hooks in (torch_private.load_hooks(module), torch_private.state_hooks(module)):
            for key in [key for key, hook in hooks.items() if is_format_hook(hook)]:
                del hooks[key]
    weight = module._parameters.get("weight")
    # A library's layers may hold dense weights, too, in the library's own parameter class.
    if type(weight) is not nn.Parameter or quantization_of(weight) is not None:
        return
    entry = _plain(module)
    if entry is None:
        return
    layers, plain = entry
    for name in layers.attributes:
        module.__dict__.pop(name, None)
    module.__class__ = plain
    bias = module._parameters.get("bias")
    # The layer cast its bias to the dtype of the input.
    if bias is not None and bias.dtype != weight.dtype:
        same = bias.detach().to(weight.dtype)
        module._parameters["bias"] = nn.Parameter(same, requires_grad=bias.requires_grad)


def _plain(module: nn.Module) -> tuple[LibraryLayers, type[nn.Module]] | None:
    """Return the library of a quantized layer, and torch's class for the layer with a dense weight.

    Return None for any other module.
    """
    for known in formats():
        plain = known.layers.plain(type(module))
        if plain is not None:
            return known.layers, plain
    return None


def _is_known(
    module: nn.Module, weight: nn.Parameter, name: str, layouts: Mapping[str, Layout]
) -> bool:
    """Return True if a quantized weight can be replaced by a dense one, because its reader can read both."""
    known = format_of(torch_private.local_tensor(weight))
    return bool(known and known.shows_values) or name in layouts or _plain(module) is not None


def make_savable(model: nn.Module) -> None:
    """Let transformers save a model that it has loaded quantized.

    When transformers (5.24) saves, it reverses the conversions of the load, and fails if one cannot be
    reversed. The model has the converted values, so that such conversions can be dropped.

    Args:
        model: A model that is used nowhere else.
    """
    for module in model.modules():
        conversions = module.__dict__.get("_weight_conversions")
        if conversions:
            module.__dict__["_weight_conversions"] = [c for c in conversions if _reverses(c)]


def _reverses(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def forget_loader(model: nn.Module) -> None:
    """Remove transformers' quantizer from a model whose weights it dequantized while loading (GGUF).

    Without this, ``save_pretrained`` refuses the model. Any other model stays as it is.

    Args:
        model: A model that is used nowhere else.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_serializable():
        return
    if all(type(p) is nn.Parameter and p.is_floating_point() for p in model.parameters()):
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Remove the attributes that mark a model of transformers as quantized.

    With these attributes, transformers would save the model as quantized.
    """
    for module in model.modules():
        for name in _OF_MODELS:
            module.__dict__.pop(name, None)
        config: Any = getattr(module, "config", None)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def stripped(model: nn.Module, record: Record) -> nn.Module:
    """Return a copy of the base model: its own classes, no factors, ``requires_grad`` as before.

    Modules that ran a graph over quantized weights before the rewrite run that graph again. Attributes that
    trainers have set since are left out.

    Raises:
        MergeError: If the attributes of trainers cannot be told from those that other code has set.
    """
    by_hand = trained_by_hand(model, record)
    result = copy_without_trainers(model, record.forwards, MergeError)
    for name in record.placed:
        place_base(result, name, record.adapters[name].own, record.originals, keep=False)
    del result.__dict__["_lora_fx"]
    unwatch_calls(result)
    unwatch_tokens(result)
    unprotect(result)
    kept = {name: result.get_submodule(name) for name in record.base.kept}
    for module in list(result.modules()):
        if module in kept.values():
            uninstall(module)
        else:
            _drop_graph(module)
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterModule):
                del module._modules[name]
    for name, parameter in result.named_parameters():
        # Parameters that were put into the model since are not in record.trainable.
        new = name in by_hand and by_hand[name].requires_grad
        parameter.requires_grad = name in record.trainable or new
    mark_adapted(result, adapted=False)
    base = record.base
    install(
        (base.region(key, kept[key], record.frontend) for key in base.graphs if key in kept),
        kept=True,
    )
    return result


def _drop_graph(module: nn.Module) -> None:
    """Make a module run its own forward instead of a graph, and remove buffers that only the graph reads."""
    uninstall(module)
    # The buffers of a script module are in a container that cannot be iterated without keys().
    for name in [name for name in module._buffers.keys() if name.startswith(CONSTANT)]:  # noqa: SIM118
        del module._buffers[name]
