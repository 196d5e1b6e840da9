"""Does a file do with adapters what the model does with them, and without one what the base does?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import ParityError
from lora_fx.export.adapter_check import cast_to
from lora_fx.export.adapter_values import values_of_model
from lora_fx.export.cases import Cases, Outputs
from lora_fx.export.casts import Casts
from lora_fx.export.difference import PrecisionError
from lora_fx.export.factor_model import FactorModel, random_factors
from lora_fx.export.manifest import Manifest
from lora_fx.export.parity import Parity, check_parity
from lora_fx.export.prepare import Prepared
from lora_fx.export.reference import Reference
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import Trace

__all__ = ["check_adapters"]

_RANDOM_RANK = 3


def check_adapters(prepared: Prepared, traced: Trace, session: OnnxSession, casts: Casts) -> Parity:
    """Compare the file with PyTorch: alone, with every adapter of the model, and with a random one.

    Args:
        prepared: The model.
        traced: What the file was made from.
        session: The file.
        casts: Makes the weights of the references of a half-precision file.

    Raises:
        PrecisionError: The model, or an adapter, does not bear the precision of the file.
        ParityError: An output differs, with the adapter that it was with.
    """
    cases = prepared.cases
    parity = check_parity(Reference(prepared.base, casts), traced, session, cases)
    manifest = prepared.manifest
    assert manifest is not None
    assert isinstance(prepared.model, FactorModel)
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        values = _in_range(name, manifest, values_of_model(prepared.source, name))
        model = Reference(active(), casts)
        _check(parity, f"adapter {name!r}", model, traced, session, values, cases)
    values = random_factors(manifest, _RANDOM_RANK)
    random = Reference(_Handed(prepared.model, values), casts)
    _check(parity, "a random adapter", random, traced, session, values, cases)
    return parity


def _in_range(adapter: str, manifest: Manifest, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of an adapter in the dtypes of the file."""
    values = cast_to(manifest, exact)
    for name, value in values.items():
        if bool(exact[name].isfinite().all()) and not bool(value.isfinite().all()):
            dtype = str(value.dtype).removeprefix("torch.")
            raise PrecisionError(
                f"adapter {adapter!r} overflows in {dtype}: {name}, with its scale, goes up to "
                f"{float(exact[name].abs().max()):.3g} (the largest {dtype} number is "
                f"{torch.finfo(value.dtype).max:.3g}); nothing was written. Export it in another "
                f"precision"
            )
    return values


def _check(
    parity: Parity,
    what: str,
    model: Reference,
    traced: Trace,
    session: OnnxSession,
    values: Mapping[str, Tensor],
    cases: Cases | None,
) -> None:
    session.load_adapter(what, values)
    try:
        found = check_parity(model, traced, _With(session, what), cases)
    except ParityError as error:
        raise type(error)(f"with {what}: {error}") from error
    finally:
        session.unload_adapter(what)
    for name, row in found.rows.items():
        label = f"{name} with {what}"
        parity.rows[label] = dataclasses.replace(row, name=label)


class _With:
    """A session that runs with one adapter."""

    def __init__(self, session: OnnxSession, adapter: str) -> None:
        self._session = session
        self._adapter = adapter

    def run(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return self._session.run(inputs, adapter=self._adapter)


class _Handed:
    """A model that is handed the same factors at every call, in the dtype of its weights."""

    def __init__(self, model: FactorModel, values: Mapping[str, Tensor]) -> None:
        self._flat = model
        self._values = values
        self.model = model.model
        self.arguments = model.arguments
        inputs = model.adapter_inputs
        self._factors = [
            values[one.name].to(model.device, getattr(torch, one.dtype)) for one in inputs
        ]

    def over(self, model: nn.Module) -> _Handed:
        return _Handed(self._flat.over(model), self._values)

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        return self._flat.named([*tensors, *self._factors])

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        return self._flat.handed(self._factors, call, *args, **kwargs)
