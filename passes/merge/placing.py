"""Store merged and trained parameters in a model of the user's own class."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.formats import (
    format_of,
    quantization_of,
)
from lora_fx.ir import Record
from lora_fx.passes.graph import (
    is_lazy,
    is_partitioned,
    memory_of,
    partitioned_twin,
    storage_of,
)
from lora_fx.passes.parameters import (
    changed_buffers,
    distributed_as,
    gathered,
    own_value,
    parameter_of,
    trained_by_hand,
)

__all__ = [
    "copy_shared",
    "freeze_shared",
    "place_biases",
    "place_merged",
    "place_trained",
    "set_parameter",
    "trained",
    "trained_buffers",
    "unshared",
    "untie_config",
]

_log = logging.getLogger("lora_fx")


def unshared(model: nn.Module) -> frozenset[str]:
    """Return the FQNs of the parameters that can be overwritten, because nothing else uses their memory.

    Parameters with several names, of another type, or with storage that other tensors use are left out. Such
    tensors may be in the adapted model that was made from this one, or in a ``state_dict``.
    """
    counts = _places(model)
    single_use = torch_private.storage_users(torch.empty(1))
    return frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if counts[id(parameter)] == 1
        and type(parameter) is nn.Parameter
        and parameter.layout is torch.strided
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and not (parameter.device.type == "cpu" and parameter.untyped_storage().is_shared())
        and torch_private.storage_users(parameter) == single_use
    )


def _places(model: nn.Module) -> Counter[int]:
    """Count how often modules refer to each parameter, by the parameter's ``id``."""
    return Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def place_merged(
    result: nn.Module,
    merged: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    over: Collection[str] = (),
) -> tuple[str, ...]:
    """Store the merged weights, and return the names of weights that this has untied.

    Args:
        result: The model to store them in.
        merged: New tensors, by FQN.
        tied: FQNs of weights to tie, each with the FQN of the weight that it is tied to.
        over: Parameters to overwrite.
    """
    counts = _places(result)
    tied_counts = Counter(id(result.get_parameter(name)) for name in (*tied, *set(tied.values())))
    untied = tuple(
        name
        for name in merged
        if counts[identity := id(result.get_parameter(name))] > max(1, tied_counts[identity])
    )
    for name, weight in merged.items():
        if name not in tied:
            set_parameter(result, name, weight, over)
    for name, to in tied.items():
        owner, _, key = name.rpartition(".")
        result.get_submodule(owner)._parameters[key] = result.get_parameter(to)
    if untied:
        _log.warning("tied weights were untied by the merge: %s", ", ".join(untied))
    return untied


def place_biases(
    result: nn.Module, biases: Mapping[str, torch.Tensor], over: Collection[str] = ()
) -> None:
    """Store the merged biases. Other biases that shared a parameter with them keep it."""
    for name, bias in biases.items():
        set_parameter(result, name, distributed_as(bias, result.get_parameter(name)), over)


def set_parameter(model: nn.Module, name: str, value: torch.Tensor, over: Collection[str]) -> None:
    """Give a parameter a new value: in place if its name is in ``over``, or else as a new parameter."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters[key]
    assert old is not None
    # A scripted module was copied with its memory, and its parameters cannot be replaced.
    if name in over or isinstance(module, torch.jit.ScriptModule):
        old.detach().copy_(value)
        return
    # A value that is quantized, or partitioned, is already a parameter of its library.
    if isinstance(value, nn.Parameter) and is_partitioned(value):
        value.requires_grad_(old.requires_grad)
    elif not isinstance(value, nn.Parameter) or quantization_of(value) is None:
        value = nn.Parameter(value, old.requires_grad)
    module._parameters[key] = value
    _renew_layer(module)


def trained(
    model: nn.Module, record: Record, names: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that adapters or the user trained in full, under each of their names."""
    for name in names:
        adapter = record.adapters[name]
        weights = {row.site.weight for row in adapter.sites}
        for fqn in adapter.own:
            value = own_value(model, name, fqn)
            if fqn not in weights and isinstance(value, nn.Parameter):
                yield fqn, value
    yield from trained_by_hand(model, record).items()


def place_trained(
    result: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, torch.Tensor],
    over: Collection[str] = (),
) -> None:
    """Write tensors that were trained in full, or changed by training, into a merged model.

    They are copied, because training of the adapted model may continue.

    Args:
        result: The model to store them in.
        parameters: The parameters of :func:`trained`, by FQN.
        buffers: The buffers of :func:`trained_buffers`, by FQN.
        over: Parameters to overwrite.
    """
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in copies:
            value, old = parameter.detach(), _parameter(result, name)
            if is_partitioned(parameter):
                value = distributed_as(gathered(parameter, name).to(old.device, old.dtype), old)
            elif name not in over:
                value = value.to(old.device, old.dtype, copy=True)
            set_parameter(result, name, value, over)
            copies[id(parameter)] = _parameter(result, name)
        owner, _, key = name.rpartition(".")
        module = result.get_submodule(owner)
        if not isinstance(module, torch.jit.ScriptModule):
            module._parameters[key] = copies[id(parameter)]
    present = dict(result.named_buffers())
    for name, buffer in buffers.items():
        if name in present:
            present[name].copy_(buffer)


def trained_buffers(
    model: nn.Module, record: Record, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the buffers that training has changed, by FQN, both with an adapter and without one."""
    own = {fqn for adapter in record.adapters.values() for fqn in adapter.own}
    buffers = {name: buffer for name, buffer in changed_buffers(model, record) if name not in own}
    for adapter in names:
        values = ((fqn, own_value(model, adapter, fqn)) for fqn in record.adapters[adapter].own)
        buffers |= {fqn: value for fqn, value in values if not isinstance(value, nn.Parameter)}
    return buffers


def freeze_shared(result: nn.Module, model: nn.Module, record: Record) -> tuple[str, ...]:
    """Freeze the parameters that a merged model shares with the adapted one, and return their names.

    An optimizer writes in place, so it would also train the user's own model.

    Args:
        result: The merged model.
        model: The rewritten model.
        record: Its record.
    """
    shared = tuple(_shared(result, model, record))
    for name in shared:
        _parameter(result, name).requires_grad_(False)
    _log.info("merge: %d parameter(s) shared with the rewritten model, and frozen", len(shared))
    return shared


def copy_shared(result: nn.Module, model: nn.Module, record: Record) -> nn.Module:
    """Give a merged model separate storage for all shared parameters; tied weights stay tied.

    Args:
        result: The merged model; it is changed.
        model: The rewritten model.
        record: Its record.

    Returns:
        The merged model. If a weight is quantized, a deep copy of the model, because scales are shared, too.
    """
    if any(quantization_of(parameter) is not None for parameter in result.parameters()):
        return copy.deepcopy(result)
    shared = {id(_parameter(result, name)) for name in _shared(result, model, record)}
    copies: dict[tuple[object, ...], nn.Parameter] = {}
    for module in result.modules():
        for key, old in module._parameters.items():
            if old is None or id(old) not in shared:
                continue
            memory = memory_of(old)
            if memory not in copies:
                copies[memory] = _own_copy(old)
            module._parameters[key] = copies[memory]
    return result


def _own_copy(parameter: nn.Parameter) -> nn.Parameter:
    if is_partitioned(parameter):
        twin = partitioned_twin(parameter, own=True)
        twin.requires_grad_(parameter.requires_grad)
        return twin
    clone = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    clone.__dict__.update(parameter.__dict__)
    return clone


def _shared(result: nn.Module, model: nn.Module, record: Record) -> Iterator[str]:
    """Yield the FQNs of a merged model's parameters that share memory with the adapted model or its base."""
    seen = {storage_of(tensor) for tensor in (*model.parameters(), *record.originals.values())}
    for name, parameter in result.named_parameters():
        if storage_of(parameter) in seen or _has_no_storage(parameter):
            yield name


def _has_no_storage(parameter: nn.Parameter) -> bool:
    """Return True for a sparse parameter: its parts may be shared, which cannot be detected."""
    return not is_lazy(parameter) and parameter.layout is not torch.strided


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    parameter = parameter_of(model, name)
    assert parameter is not None
    return parameter


def untie_config(model: nn.Module) -> None:
    """Set in the configuration of a transformers model that its embeddings are not tied any more.

    Otherwise saving and loading would tie them again and lose one of the two.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    ends = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in ends and weights[0] is not weights[1]:
        config.tie_word_embeddings = False


def _renew_layer(layer: nn.Module) -> None:
    """Make a library's quantized layer use the scales of its new weight."""
    known = format_of(layer._parameters.get("weight"))
    if known is not None:
        known.layers.renew(layer)
