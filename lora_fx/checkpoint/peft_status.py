"""The state of adapters in PEFT's words: ``get_layer_status`` and ``get_model_status``.

PEFT's functions look for PEFT's layers. These return PEFT's dataclasses for the sites of a rewritten model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from lora_fx.extras import load_optional
from lora_fx.ir import PlannedSite, Record, require_record
from lora_fx.passes.graph import original_class
from lora_fx.passes.parameters import factors_of, inside, own_value, tokens_of

__all__ = ["layer_status", "model_status"]


@dataclasses.dataclass
class _Layer:
    """One row of PEFT's layer status, for a layer with adapters.

    Attributes:
        kind: PEFT's name of the layer's class.
        whole: True if the trained rows or modules replace those of the base.
        scheme: Name of the weight format; None for a plain tensor.
        tensors: The tensors of each adapter, by the adapter's name.
    """

    kind: str
    whole: bool = False
    scheme: str | None = None
    tensors: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)


@inside
def layer_status(model: nn.Module, merged: Collection[str] = ()) -> list[Any]:
    """Return a ``TunerLayerStatus`` of PEFT for each layer with adapters, in the order of the modules.

    ``name`` is the site's FQN. ``module_type`` has the class of the layer in your model, as in
    ``"lora.Linear"``. ``quantization_backend`` is the name of the weight format, if the weight has one.

    Args:
        model: A rewritten model.
        merged: The adapters that are merged at the moment.

    Raises:
        ConfigError: If the model is not rewritten, or PEFT is not installed.
    """
    status = load_optional("peft.peft_model", "status", "peft", attribute="TunerLayerStatus")
    record = require_record(model)
    return [
        status(
            name=name,
            module_type=layer.kind,
            enabled=not record.is_disabled,
            active_adapters=[
                adapter
                for adapter in record.choice.names
                if not layer.whole or adapter in layer.tensors
            ],
            merged_adapters=[adapter for adapter in merged if adapter in layer.tensors],
            requires_grad={key: _agreed(values) for key, values in layer.tensors.items()},
            available_adapters=sorted(layer.tensors),
            devices={key: _devices(values) for key, values in layer.tensors.items()},
            quantization_backend=layer.scheme,
        )
        for name, layer in _layers(model, record).items()
    ]


@inside
def model_status(model: nn.Module, merged: Collection[str] = ()) -> Any:
    """Return PEFT's ``TunerModelStatus``; see :func:`layer_status`.

    Unlike in PEFT, active and merged adapters are never "irregular": they are those of the model.

    Args:
        model: A rewritten model.
        merged: The adapters that are merged at the moment.

    Raises:
        ConfigError: If the model is not rewritten, or PEFT is not installed.
    """
    peft = load_optional("peft.peft_model", "status", "peft")
    record = require_record(model)
    tensors: dict[str, list[Tensor]] = {}
    layers = _layers(model, record).values()
    for layer in layers:
        for adapter, values in layer.tensors.items():
            tensors.setdefault(adapter, []).extend(values)
    schemes = {layer.scheme for layer in layers if not layer.whole}
    trainable, total = peft.PeftModel.get_nb_trainable_parameters(model)
    return peft.TunerModelStatus(
        base_model_type=original_class(model).__name__,
        adapter_model_type="LoraModel",
        peft_types=dict.fromkeys(record.adapters, "LORA"),
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not record.is_disabled,
        active_adapters=list(record.choice.names),
        merged_adapters=sorted(merged),
        requires_grad={adapter: _agreed(values) for adapter, values in tensors.items()},
        available_adapters=sorted(tensors),
        devices={adapter: _devices(values) for adapter, values in tensors.items()},
        quantization_backend="irregular" if len(schemes) > 1 else next(iter(schemes), None),
    )


def _layers(model: nn.Module, record: Record) -> dict[str, _Layer]:
    """Return the layers with adapters by FQN, in the order of the modules."""
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    layers: dict[str, tuple[int, _Layer]] = {}
    for adapter in record.adapters:
        for name, owner, layer, tensors in _parts(model, record, adapter):
            layers.setdefault(name, (order[owner], layer))[1].tensors[adapter] = tensors
    return {name: layer for name, (_, layer) in sorted(layers.items(), key=lambda item: item[1][0])}


def _parts(
    model: nn.Module, record: Record, adapter: str
) -> Iterator[tuple[str, str, _Layer, list[Tensor]]]:
    """Yield the name, the module, the layer, and the tensors of each layer that an adapter has."""
    planned = record.adapters[adapter]
    for row in planned.places:
        owner = row.site.owner
        if isinstance(row, PlannedSite):
            scheme = None if row.site.quantized is None else row.site.quantized.scheme
            kind = f"lora.{original_class(model.get_submodule(owner)).__name__}"
            yield row.name, owner, _Layer(kind, scheme=scheme), list(_factors(model, row, adapter))
        elif not row.tied:
            layer, rows = _Layer("TrainableTokensLayer", whole=True), tokens_of(model, row, adapter)
            yield f"{row.name}.token_adapter", owner, layer, [rows]
    for module in planned.saved_modules:
        names = [name for name in planned.own if name.startswith(f"{module}.")]
        values = (own_value(model, adapter, name) for name in names)
        tensors: list[Tensor] = [value for value in values if isinstance(value, nn.Parameter)]
        yield module, module, _Layer("ModulesToSaveWrapper", whole=True), tensors


def _factors(model: nn.Module, row: PlannedSite, adapter: str) -> Iterator[Tensor]:
    """Yield the parameters of an adapter at a site, without buffers."""
    for tensor in factors_of(model, row, adapter).present:
        if isinstance(tensor, nn.Parameter):
            yield tensor


def _agreed(tensors: Collection[Tensor]) -> bool | str:
    """Return True if all tensors require a gradient, False if none does, else PEFT's word "irregular"."""
    answers = {tensor.requires_grad for tensor in tensors}
    return "irregular" if len(answers) > 1 else answers == {True}


def _devices(tensors: Collection[Tensor]) -> list[str]:
    """Return the types of the devices of tensors."""
    return sorted({tensor.device.type for tensor in tensors})
