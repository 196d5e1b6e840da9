"""Does a file do with adapters what the model does with them, and without one what the base does?"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import MergeError, ParityError
from lora_fx.export.adapters.adapter_check import cast_to
from lora_fx.export.adapters.adapter_values import values_of_model
from lora_fx.export.adapters.factor_model import FactorModel, random_factors
from lora_fx.export.adapters.manifest import Manifest
from lora_fx.export.copy.casts import Casts
from lora_fx.export.copy.quantized_weight import StandIn
from lora_fx.export.prepare.preparing import Prepared
from lora_fx.export.report import worse
from lora_fx.export.session.onnx_session import OnnxSession
from lora_fx.export.trace.arguments import FlatModel
from lora_fx.export.trace.cases import Cases, Outputs
from lora_fx.export.trace.tracing import Trace
from lora_fx.export.verify.difference import PrecisionError
from lora_fx.export.verify.parity import Parity, check_parity
from lora_fx.export.verify.reference import Reference

__all__ = ["check_adapters"]

_log = logging.getLogger("lora_fx")

# Of the lowest sites. 1 is what the defaults have, too: an axis of size 1 is the one that is taken for
# something to broadcast.
_RANDOM_RANKS = (3, 1)


def check_adapters(prepared: Prepared, traced: Trace, session: OnnxSession, casts: Casts) -> Parity:
    """Compare the file with PyTorch: alone, with every adapter of the model, and with random ones.

    The random ones are judged by the model with their factors folded into its weights, so that nothing of
    what was traced judges itself. The file alone is judged again after each adapter: memory that a kernel
    never writes then holds what an adapter has left there, and not the zeros of a new process.

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
    base = Reference(prepared.base, casts)
    parity = check_parity(base, traced, session, cases)
    manifest = prepared.manifest
    assert manifest is not None
    assert isinstance(prepared.model, FactorModel)
    for name, active in prepared.adapters.items():
        assert prepared.source is not None
        values = _in_range(name, manifest, values_of_model(prepared.source, name))
        model = Reference(active(), casts)
        _check(parity, f"adapter {name!r}", model, traced, session, values, cases)
    for rank in _RANDOM_RANKS:
        # A bias that no weight can take is compared with the adapters that have trained it.
        loose = prepared.model.loose_biases()
        values = {
            name: torch.zeros_like(value) if name in loose else value
            for name, value in random_factors(manifest, rank).items()
        }
        random = Reference(_Adapted(prepared.model, values, casts.keep), casts)
        what = f"a random adapter of rank {rank}"
        _check(parity, what, random, traced, session, values, cases)
        _check_again(parity, what, base, traced, session, cases)
    return parity


def _check_again(
    parity: Parity,
    what: str,
    base: Reference,
    traced: Trace,
    session: OnnxSession,
    cases: Cases | None,
) -> None:
    """Compare the file alone once more, in the memory that a run with an adapter has left."""
    try:
        found = check_parity(base, traced, session, cases)
    except ParityError as error:
        raise type(error)(f"alone, after a run with {what}: {error}") from error
    parity.rows |= {name: worse(parity.rows[name], row) for name, row in found.rows.items()}


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


class _Adapted:
    """A model with the same adapter at every call, folded into its weights where that can be.

    It cannot over quantised weights: there, and in half precision, which is no reference, the traced model
    is handed the factors.
    """

    def __init__(
        self,
        model: FactorModel,
        values: Mapping[str, Tensor],
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        self._flat = model
        self._values = values
        self._keep = keep
        self.model = model.model
        self.arguments = model.arguments
        inputs = model.adapter_inputs
        self._factors = [
            values[one.name].to(model.device, getattr(torch, one.dtype)) for one in inputs
        ]
        self._dense = self._merged()

    def over(self, model: nn.Module) -> _Adapted:
        return _Adapted(self._flat.over(model), self._values, self._keep)

    def named(self, tensors: Sequence[Tensor]) -> Outputs:
        if self._dense is not None:
            return self._dense.named(tensors)
        return self._flat.named([*tensors, *self._factors])

    def run(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        if self._dense is not None:
            return self._dense.run(call, *args, **kwargs)
        return self._flat.handed(self._factors, call, *args, **kwargs)

    def _merged(self) -> FlatModel | None:
        if any(one.dtype in ("float16", "bfloat16") for one in self._flat.adapter_inputs):
            return None
        if any(isinstance(module, StandIn) for module in self.model.modules()):
            return None
        try:
            return self._flat.merged(self._factors, self._keep)
        except MergeError as error:
            _log.info("a random adapter is compared unmerged: %s", error)
            return None
