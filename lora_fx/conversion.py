"""Conversion of adapters of other methods to LoRA, from the change that each makes to a weight."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lora_fx.adapters import Forward
from lora_fx.config import LoraConfig
from lora_fx.errors import CheckpointError, ConfigError
from lora_fx.extraction import (
    Difference,
    ExtractionReport,
    RankChoice,
    Weights,
    extract,
    names_of,
    weights_of,
)
from lora_fx.ir import ModelT
from lora_fx.methods import ForeignAdapter, ParameterChange, read_foreign
from lora_fx.passes.capture import Frontend
from lora_fx.passes.parameters import base_parameters, inside
from lora_fx.progress import Progress

__all__ = ["convert", "convert_adapter"]


@overload
def convert_adapter(
    model: ModelT,
    path: str | os.PathLike[str],
    *,
    rank: int | None = ...,
    energy: float | None = ...,
    budget: int | str | None = ...,
    component: str | None = ...,
    inputs: Iterable[Any] | None = ...,
    forward: Forward | None = ...,
    adapter_name: str = ...,
    example_inputs: Any = ...,
    frontend: Frontend = ...,
    progress: Progress = ...,
    return_report: Literal[False] = ...,
) -> ModelT: ...
@overload
def convert_adapter(
    model: ModelT,
    path: str | os.PathLike[str],
    *,
    rank: int | None = ...,
    energy: float | None = ...,
    budget: int | str | None = ...,
    component: str | None = ...,
    inputs: Iterable[Any] | None = ...,
    forward: Forward | None = ...,
    adapter_name: str = ...,
    example_inputs: Any = ...,
    frontend: Frontend = ...,
    progress: Progress = ...,
    return_report: Literal[True],
) -> tuple[ModelT, ExtractionReport]: ...
@inside
def convert_adapter(
    model: ModelT,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    component: str | None = None,
    inputs: Iterable[Any] | None = None,
    forward: Forward | None = None,
    adapter_name: str = "default",
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    progress: Progress = False,
    return_report: bool = False,
) -> ModelT | tuple[ModelT, ExtractionReport]:
    """Rewrite a model with LoRA made of an adapter of another method.

    Folders of PEFT (LoHa, LoKr, OFT, BOFT, IA³, VeRA, MiSS and Bone, HRA, RandLoRA, FourierFT, VB-LoRA,
    AdaLoRA, LN tuning, trainable tokens) and files of LyCORIS, kohya and ComfyUI are read. The factors of a
    weight are the leading singular triples of its change. They are exact if the rank of the site is at least
    that of the change. Changes of VeRA, AdaLoRA, HRA, MiSS and VB-LoRA have low ranks, those of OFT, IA³ and
    RandLoRA full ranks. Biases, norms and modules that the adapter stores in full are also stored in full in
    the result.

    Args:
        model: The base model. It is not changed.
        path: The folder, or the file (``.safetensors``).
        rank: The rank of all sites, by default 16. A site whose change has a smaller rank gets that rank.
        energy: Instead of ``rank``: each site gets the smallest rank that keeps this share of ``‖ΔW‖²``. 1 is
            exact.
        budget: Instead of ``rank``: a number of parameters, or a size such as "20MB", for the whole adapter.
        component: The part of a pipeline that the model is ("unet", "text_encoder", …). Needed if several
            parts of the file fit the model.
        inputs: As for :func:`lora_fx.extract_adapter`.
        forward: As for :func:`lora_fx.extract_adapter`.
        adapter_name: The name of the adapter.
        example_inputs: As for :func:`lora_fx.rewrite`.
        frontend: As for :func:`lora_fx.rewrite`.
        progress: As for :func:`lora_fx.extract_adapter`.
        return_report: True to return the report as well.

    Returns:
        A rewritten model, as :func:`lora_fx.rewrite` returns it, and if requested the
        :class:`ExtractionReport`, which has the error of each site.

    Raises:
        CheckpointError: If the files are damaged or for another model, the adapter is LoRA already, or its
            method changes no weight (prompt and prefix tuning).
        ConfigError: If the adapter changes nothing, or a weight that the model uses twice. If the model is
            rewritten already, or a choice of ranks makes no sense.
        QuantizationError: If a weight is quantized.
        CaptureError: If the model cannot be captured.
    """
    choice = RankChoice.of(rank, energy, budget)
    before = weights_of(model, model)
    adapter = read_foreign(path, model, component=component)
    adapted, report = convert(
        model,
        adapter,
        before,
        choice,
        inputs=inputs,
        forward=forward,
        adapter_name=adapter_name,
        example_inputs=example_inputs,
        frontend=frontend,
        progress=progress,
    )
    return (adapted, report) if return_report else adapted


def convert(
    model: ModelT, adapter: ForeignAdapter, before: Weights, choice: RankChoice, **options: Any
) -> tuple[ModelT, ExtractionReport]:
    """Return a model whose LoRA approximates the changes of an adapter, and the report of the errors.

    Args:
        model: The base; it may be on the meta device.
        adapter: An adapter of another method, with its change of each weight.
        before: The weights of the base.
        choice: The rule for the ranks.
        options: Other arguments of :func:`lora_fx.extraction.extract`.

    Raises:
        ConfigError: If the adapter changes nothing, or a weight that the model uses twice.
        CaptureError: As :func:`convert_adapter`.
    """
    changes, whole = _by_name(model, adapter)
    values = _Values(before, changes, whole)
    ranks = {name: change.rank for name, change in changes.items() if change.rank is not None}
    difference = Difference(values.before, values.after, ranks)
    if not any(difference.changed(name) for name in (*changes, *whole)):
        raise ConfigError(
            f"this adapter of {adapter.method} changes nothing: it was not trained. Add a new LoRA adapter "
            "with lora_fx.rewrite"
        )
    # The folder's own modules_to_save are those whose values differ.
    known = {name: adapter.config.get(name) for name in ("task_type", "base_model_name_or_path")}
    config = LoraConfig(**{name: value for name, value in known.items() if value is not None})
    return extract(model, difference, choice, config=config, **options)


class _Values:
    """The values of a base before and after an adapter. Values that the adapter changes are in fp64.

    In the dtype of the weights, rounding errors would give the difference full rank.
    """

    def __init__(
        self,
        base: Weights,
        changes: Mapping[str, ParameterChange],
        whole: Mapping[str, Tensor],
    ) -> None:
        self._base, self._changes, self._whole = base, changes, whole
        self._last: tuple[str, Tensor | None] = ("", None)

    def before(self, name: str) -> Tensor | None:
        """Return the value of a parameter in the base; None if the base has no such parameter."""
        if self._last[0] != name:
            value = self._base(name)
            if name in self._changes and value is not None:
                value = value.detach().double()
            self._last = (name, value)
        return self._last[1]

    def after(self, name: str) -> Tensor | None:
        """Return the value of a parameter with the adapter applied; None if there is no such parameter.

        If the adapter does not change the parameter, the result is the object that :meth:`before` returns.
        """
        if name in self._whole:
            return self._whole[name]
        value = self.before(name)
        if name not in self._changes or value is None:
            return value
        with torch.no_grad():
            return self._changes[name].adapted(value)


def _by_name(
    model: nn.Module, adapter: ForeignAdapter
) -> tuple[dict[str, ParameterChange], dict[str, Tensor]]:
    """Return an adapter's changes of parameters, and the values that it stores in full, by name.

    A parameter that has several names is listed under each name.

    Raises:
        ConfigError: If a parameter has several names and the adapter changes only some of them, or gives them
            different values. PEFT adapts a module with several names only under the first one.
        CheckpointError: If the adapter stores a parameter and changes it.
    """
    names = names_of(base_parameters(model))
    changes: dict[str, ParameterChange] = {}
    for change in adapter.changes:
        group = names[change.parameter]
        if len(group) > 1 and not change.tied:
            raise _shared(adapter, group, f"changes {change.parameter} alone")
        changes |= dict.fromkeys(group, change)
    whole = _whole_by_name(model, adapter, names)
    both = sorted(changes.keys() & whole.keys())
    if both:
        raise CheckpointError(
            f"the adapter of {adapter.method} stores {both[0]} in full and changes it: it is damaged"
        )
    return changes, whole


def _whole_by_name(
    model: nn.Module, adapter: ForeignAdapter, names: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    """Return the values that an adapter stores in full, by all names of each parameter.

    Args:
        model: The base.
        adapter: The adapter.
        names: All names of each parameter, by each of its names.

    Raises:
        ConfigError: If a parameter has several names that do not all get the same value.
    """
    whole: dict[str, Tensor] = {}
    stored: dict[tuple[str, ...], list[Tensor]] = {}
    for name, value in adapter.whole.items():
        owner, _, leaf = name.rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(leaf)
        if parameter is None:
            whole[name] = value
        else:
            stored.setdefault(names[name], []).append(value)
            whole |= dict.fromkeys(names[name], value)
    for group, values in stored.items():
        if len(values) < len(group):
            raise _shared(adapter, group, "has only some of them in full")
        if not all(torch.equal(values[0], value) for value in values):
            raise _shared(adapter, group, "has different values for them")
    return whole


def _shared(adapter: ForeignAdapter, names: Sequence[str], problem: str) -> ConfigError:
    """Return the error for an adapter that does not treat all names of a shared parameter alike."""
    return ConfigError(
        f"{' and '.join(names)} are one parameter, and the adapter of {adapter.method} {problem}: give a "
        "model that does not share it (tie_word_embeddings=False in the configuration of a model of "
        "transformers)"
    )
