"""Puts what was merged or trained into a model of the base class.

A weight that was quantized may go back into its format: what that loses is measured.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from lora_fx.errors import MergeError, QuantizationError
from lora_fx.formats import dense, format_of, quantization_of, requantized
from lora_fx.ir import Record
from lora_fx.passes.graph import (
    is_lazy,
    is_partitioned,
    memory_of,
    partitioned_twin,
    storage_of,
)
from lora_fx.passes.merge.fold import Fold
from lora_fx.passes.merge.rounding import MergedSite
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
    "requantized_site",
    "trained",
    "unshared",
    "untie_config",
]


def unshared(model: nn.Module) -> frozenset[str]:
    """FQNs of the parameters that can be written over, since nothing else sees their memory.

    Not one that is in several places, nor one whose storage other tensors have, too: those of the adapted
    model that was made of this one, a ``state_dict`` that somebody keeps. Nor what is no plain tensor.
    """
    places = _places(model)
    alone = _users(torch.empty(1))
    return frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if places[id(parameter)] == 1
        and type(parameter) is nn.Parameter
        and parameter.layout is torch.strided
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and not (parameter.device.type == "cpu" and parameter.untyped_storage().is_shared())
        and _users(parameter) == alone
    )


def _users(tensor: torch.Tensor) -> int:
    """How many objects hold the tensor's storage, the one that is asked among them."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _places(model: nn.Module) -> Counter[int]:
    """In how many places each parameter is, by its identity."""
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
    """Puts the merged weights in and says which of them were tied to something, and are not now.

    Args:
        result: The model that they are put into.
        merged: New tensors, by FQN.
        tied: Weights that are one parameter with another one, by FQN.
        over: Parameters that are written over.
    """
    places = _places(result)
    together = Counter(id(result.get_parameter(name)) for name in (*tied, *set(tied.values())))
    untied = tuple(
        name
        for name in merged
        if places[own := id(result.get_parameter(name))] > max(1, together[own])
    )
    for name, weight in merged.items():
        if name not in tied:
            _set_parameter(result, name, weight, over)
    for name, to in tied.items():
        owner, _, key = name.rpartition(".")
        result.get_submodule(owner)._parameters[key] = result.get_parameter(to)
    return untied


def place_biases(
    result: nn.Module, biases: Mapping[str, torch.Tensor], over: Collection[str] = ()
) -> None:
    """Puts the merged biases in; others that they shared a parameter with keep it."""
    for name, bias in biases.items():
        _set_parameter(result, name, distributed_as(bias, result.get_parameter(name)), over)


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor, over: Collection[str]) -> None:
    """The value in a parameter that is written over, or a new one in the place of one that others share."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters[key]
    assert old is not None
    # What is scripted is copied with its memory, and none of its parameters can be exchanged.
    if name in over or isinstance(module, torch.jit.ScriptModule):
        old.detach().copy_(value)
        return
    # One that was quantized again is a parameter of its library, and so is one in parts.
    if isinstance(value, nn.Parameter) and is_partitioned(value):
        value.requires_grad_(old.requires_grad)
    elif not isinstance(value, nn.Parameter) or quantization_of(value) is None:
        value = nn.Parameter(value, old.requires_grad)
    module._parameters[key] = value
    _renew_layer(module)


def trained(
    model: nn.Module, record: Record, names: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """What was trained beside the factors, under each of its names: by adapters, and by hand."""
    for name in names:
        adapter = record.adapters[name]
        weights = {row.site.weight for row in adapter.sites}
        for own in adapter.own:
            if own not in weights:
                yield own, own_value(model, name, own)
    yield from trained_by_hand(model, record).items()


def place_trained(
    model: nn.Module,
    result: nn.Module,
    record: Record,
    names: Sequence[str],
    over: Collection[str] = (),
) -> None:
    """Copies what was trained beside the factors: the model may be trained further."""
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in trained(model, record, names):
        if id(parameter) not in copies:
            value, old = parameter.detach(), _parameter(result, name)
            if is_partitioned(parameter):
                value = distributed_as(gathered(parameter, name).to(old.device, old.dtype), old)
            elif name not in over:
                value = value.to(old.device, old.dtype, copy=True)
            _set_parameter(result, name, value, over)
            copies[id(parameter)] = _parameter(result, name)
        owner, _, key = name.rpartition(".")
        module = result.get_submodule(owner)
        if not isinstance(module, torch.jit.ScriptModule):
            module._parameters[key] = copies[id(parameter)]
    buffers = dict(result.named_buffers())
    for name, buffer in changed_buffers(model, record):
        if name in buffers:
            buffers[name].copy_(buffer)


def freeze_shared(result: nn.Module, model: nn.Module, record: Record) -> tuple[str, ...]:
    """Freezes what a merged model shares with the adapted one, whose base others have, and says what that is.

    An optimizer writes in place: it would train the user's own model.

    Args:
        result: The merged model.
        model: The rewritten model.
        record: Its record.
    """
    shared = tuple(_shared(result, model, record))
    for name in shared:
        _parameter(result, name).requires_grad_(False)
    return shared


def copy_shared(result: nn.Module, model: nn.Module, record: Record) -> nn.Module:
    """Gives a merged model storage of its own for all that it shares; what is tied stays tied.

    Args:
        result: The merged model; it is changed.
        model: The rewritten model.
        record: Its record.

    Returns:
        The merged model; a copy of it where something is quantized, since its scales are shared, too.
    """
    if any(quantization_of(parameter) is not None for parameter in result.parameters()):
        return copy.deepcopy(result)
    shared = {id(_parameter(result, name)) for name in _shared(result, model, record)}
    made: dict[tuple[object, ...], nn.Parameter] = {}
    for module in result.modules():
        for key, old in module._parameters.items():
            if old is None or id(old) not in shared:
                continue
            memory = memory_of(old)
            if memory not in made:
                made[memory] = _own_copy(old)
            module._parameters[key] = made[memory]
    return result


def _own_copy(parameter: nn.Parameter) -> nn.Parameter:
    if is_partitioned(parameter):
        twin = partitioned_twin(parameter, own=True)
        twin.requires_grad_(parameter.requires_grad)
        return twin
    made = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


def _shared(result: nn.Module, model: nn.Module, record: Record) -> Iterator[str]:
    """FQNs of the parameters of a merged model whose memory the adapted one, or its base, has, too."""
    seen = {storage_of(one) for one in (*model.parameters(), *record.originals.values())}
    for name, parameter in result.named_parameters():
        if storage_of(parameter) in seen or _has_no_storage(parameter):
            yield name


def _has_no_storage(parameter: nn.Parameter) -> bool:
    """Whether it is sparse: its parts are shared, and nothing tells."""
    return not is_lazy(parameter) and parameter.layout is not torch.strided


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    found = parameter_of(model, name)
    assert found is not None
    return found


def untie_config(model: nn.Module) -> None:
    """Says in the configuration of a transformers model that its embeddings are not tied any more.

    Otherwise saving and loading ties them again and loses one of the two.
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


def requantized_site(
    change: Fold, old: torch.Tensor, weight: nn.Parameter
) -> tuple[nn.Parameter, MergedSite]:
    """The merged weight in the old one's format; one matrix in fp64 is made for it.

    Args:
        change: What is folded in.
        old: The values of the weight, in the layout of its site.
        weight: The quantized weight.

    Returns:
        The new parameter, and its row in the report.

    Raises:
        MergeError: If the format cannot hold the merged weight.
    """
    exact = change.exact(old)
    before = old.double()
    moved = _relative(exact - before, before)
    del before
    values = exact if change.rows[0][0].site.layout == "out_in" else exact.T
    try:
        made = requantized(values, weight)
    except QuantizationError as error:
        raise MergeError(
            f"{change.name}: the merged weight cannot be quantized as it was: {error}. "
            "Merge without requantize=True: the result is dense then"
        ) from error
    lost = _relative(dense(made, torch.float64) - values, values)
    return made, MergedSite(change.name, change.adapters, math.nan, moved, lost)


def _renew_layer(layer: nn.Module) -> None:
    """Has a library's layer use the scales of the weight that was put into it."""
    known = format_of(layer._parameters.get("weight"))
    if known is not None:
        known.layers.renew(layer)


def _relative(difference: torch.Tensor, to: torch.Tensor) -> float:
    """The Frobenius norm of a difference, relative to another's."""
    tiny = torch.finfo(torch.float64).tiny
    return float(difference.norm() / to.norm().clamp_min(tiny))
