"""Does a file do with adapters what the model does with them, and without one what the base does?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_fx.errors import ParityError
from lora_fx.export.adapter_check import cast_to
from lora_fx.export.adapter_values import values_of_model
from lora_fx.export.cases import Cases, Checked
from lora_fx.export.factor_model import FactorModel, random_factors
from lora_fx.export.parity import Parity, check_parity
from lora_fx.export.prepare import Prepared
from lora_fx.export.session import OnnxSession
from lora_fx.export.trace import Trace

__all__ = ["check_adapters"]

_RANDOM_RANK = 3


def check_adapters(prepared: Prepared, traced: Trace, session: OnnxSession) -> Parity:
    """Compare the file with PyTorch: alone, with every adapter of the model, and with a random one.

    Args:
        prepared: The model.
        traced: What the file was made from.
        session: The file.

    Raises:
        ParityError: An output differs, with the adapter that it was with.
    """
    cases = prepared.cases
    parity = check_parity(prepared.base, traced, session, cases)
    manifest = prepared.manifest
    assert manifest is not None
    assert isinstance(prepared.model, FactorModel)
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        values = cast_to(manifest, values_of_model(prepared.source, name))
        _check(parity, f"adapter {name!r}", active(), traced, session, values, cases)
    values = random_factors(manifest, _RANDOM_RANK)
    model = _Handed(prepared.model, values)
    _check(parity, "a random adapter", model, traced, session, values, cases)
    return parity


def _check(
    parity: Parity,
    what: str,
    model: Checked,
    traced: Trace,
    session: OnnxSession,
    values: Mapping[str, Tensor],
    cases: Cases | None,
) -> None:
    session.load_adapter(what, values)
    try:
        found = check_parity(model, traced, _With(session, what), cases)
    except ParityError as error:
        raise ParityError(f"with {what}: {error}") from error
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
    """A model that is handed the same factors at every call."""

    def __init__(self, model: FactorModel, values: Mapping[str, Tensor]) -> None:
        self._model = model
        self.model = model.model
        self._values = [values[one.name].to(model.device) for one in model.adapter_inputs]

    def named(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        return self._model.named([*tensors, *self._values])

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        return self._model.handed(self._values, call, *args, **kwargs)
