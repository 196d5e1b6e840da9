"""The functions that users call; each runs a pipeline of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters import set_adapter
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, MergeError
from lora_fx.ir import (
    DEFAULT_LOSS,
    DEFAULT_MEMORY,
    Capture,
    Comparison,
    Loss,
    Memory,
    ModelT,
    Plan,
    record_of,
    require_record,
)
from lora_fx.passes import pipeline
from lora_fx.passes.capture import Frontend, run_reference
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.graph import (
    elements,
    graphs_of,
    install,
    put_partitions_back,
    share_copy,
)
from lora_fx.passes.insert import with_seed
from lora_fx.passes.kept import with_kept
from lora_fx.passes.merge import MergeReport, OutputError, merging, stripped
from lora_fx.passes.parameters import claim_unfrozen, inside, protect
from lora_fx.progress import Progress
from lora_fx.torch_private import pytree

__all__ = [
    "capture",
    "compare",
    "graphs",
    "merge",
    "output_error",
    "plan",
    "print_trainable_parameters",
    "rewrite",
    "trainable_parameters",
]


def output_error(
    model: nn.Module,
    merged: nn.Module,
    example_inputs: Any,
    adapter_names: Sequence[str] | str | None = None,
) -> OutputError:
    """Compare the outputs of a merged model with those of the adapted model, in eval mode.

    Args:
        model: The rewritten model; it is not changed.
        merged: The merge of it.
        example_inputs: As for :func:`lora_fx.rewrite`.
        adapter_names: Which adapters were merged; those that are active by default.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """
    adapted = model
    if adapter_names is not None:
        adapted = share_copy(model)
        set_adapter(adapted, adapter_names)
    wanted = _floats(run_reference(adapted, example_inputs))
    found = _floats(run_reference(merged, example_inputs))
    base = _floats(run_reference(stripped(model, require_record(model)), example_inputs))
    size = float(wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
    error = found - wanted
    return OutputError(
        relative_error=float(error.norm()) / size,
        largest=float(error.abs().max()) if len(error) else 0.0,
        relative_change=float((wanted - base).norm()) / size,
    )


def _floats(output: Any) -> Tensor:
    """Return all floating-point values of an output as one vector in fp64."""
    leaves = [one for one in pytree.tree_leaves(output) if isinstance(one, Tensor)]
    parts = [one.detach().double().flatten() for one in leaves if one.is_floating_point()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


@inside
def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    frontend: Frontend = "auto",
    dynamic_shapes: Any = None,
) -> Capture:
    """Capture a model as graphs that compute the same.

    Args:
        model: Any module. It is not touched; the result shares its weights' storage.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor. With them, the capture is
            checked: its outputs must be the original's.
        frontend: ``symbolic``, ``export``, ``regions``, or ``auto``: the first that fits. A model of
            transformers or timm says what it takes: for ``export`` inputs are made up where none are
            given, and a note says which.
        dynamic_shapes: For ``export``, as ``torch.export.export`` takes it. By default all shapes are those
            of the example: the graph only shows which operations there are.

    Returns:
        The capture; ``capture.model`` runs it.

    Raises:
        CaptureError: If the model cannot be captured in this way, or the capture computes something else.
    """
    result = capture_model(model, example_inputs, frontend=frontend, dynamic_shapes=dynamic_shapes)
    put_partitions_back(result.model)
    install(region for region in result.regions.values() if not region.not_run)
    protect(result.model)
    return result


@inside
def plan(
    model: nn.Module,
    config: LoraConfig,
    example_inputs: Any = None,
    *,
    loss: Loss = DEFAULT_LOSS,
    strict: bool = False,
    frontend: Frontend = "auto",
) -> Plan:
    """Show what :func:`rewrite` would do, why, and what it costs: a dry run, which changes nothing.

    Args:
        model: Any module that is not rewritten yet.
        config: What to adapt.
        example_inputs: As for :func:`capture`; they let more operations be found. With them the plan
            says what a training step with inputs of their shapes keeps for its backward, with each
            ``memory=`` of :func:`rewrite`, counted without computing anything.
        loss: As for :func:`rewrite`: with "chunked" the plan says which heads may have it, and why others
            may not.
        strict: Whether an entry of the configuration that selects nothing is an error.
        frontend: As for :func:`capture`.

    Returns:
        A plan: print it, or look at ``sites``, ``skipped``, ``rejections`` and ``unmatched``.

    Raises:
        NoMatchError: If nothing is selected; with the nearest names.
        PartialMatchError: With ``strict``.
        CaptureError: If the model cannot be captured.
    """
    _, found = pipeline.plan_model(
        model, config, example_inputs, loss=loss, strict=strict, frontend=frontend
    )
    return with_kept(found, model, config, example_inputs, loss=loss, frontend=frontend)


@inside
def compare(
    configs: Mapping[str, LoraConfig],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    frontend: Frontend = "auto",
) -> Comparison:
    """Plan several configurations for one model, to compare what they cost. Nothing is changed.

    Args:
        configs: Configurations by name; the names are yours.
        model: Any module that is not rewritten yet.
        example_inputs: As for :func:`capture`.
        frontend: As for :func:`capture`.

    Returns:
        The plans: print it for one table of sites, parameters, FLOPs, bytes and ranks.

    Raises:
        ConfigError: If there is no configuration, or they are not a dict.
        NoMatchError: If one selects nothing; it is named.
        CaptureError: If the model cannot be captured.
    """
    if not configs or not isinstance(configs, Mapping):
        raise ConfigError("compare takes a dict of at least one LoraConfig by a name of your own")
    return Comparison(pipeline.plan_all(model, configs, example_inputs, frontend=frontend))


@inside
def rewrite(
    model: ModelT,
    config: LoraConfig,
    example_inputs: Any = None,
    *,
    adapter_name: str = "default",
    optimize: bool = True,
    memory: Memory = DEFAULT_MEMORY,
    loss: Loss = DEFAULT_LOSS,
    strict: bool = False,
    frontend: Frontend = "auto",
    callback: Callable[[str, Capture], None] | None = None,
) -> ModelT:
    """Put LoRA branches into a model's graphs: ``W' = W + (alpha / r) B A`` (arXiv:2106.09685).

    Args:
        model: Any module. It is not touched: not its modules, modes, gradients or statistics.
        config: What to adapt.
        example_inputs: As for :func:`capture`. With them the result is checked against the model.
        adapter_name: Name of the adapter.
        optimize: Whether to run the passes that make training cheaper (:mod:`lora_fx.passes.optimize.fuse`).
            Without them the graphs have the canonical form, ``x -> dropout -> A -> B -> scale -> add``.
            Dropout draws other numbers with than without.
        memory: What a training step keeps for its backward: "fast" keeps the input of each product; with
            "balanced", the outputs of norms, activations and gated products are recomputed from their inputs,
            which a step keeps anyway (:mod:`lora_fx.passes.optimize.recompute`), and square layers with DoRA
            compute their product twice, for the gradient of the magnitude. Outputs are the same bits.
            Without ``optimize`` it has no effect.
        loss: "chunked" computes a cross entropy of the output head, in a training call of the model, a few
            rows at a time (:mod:`lora_fx.runtime.logits`): logits of all tokens, their softmax and their
            gradient are never there at once. Then the output has no logits: what it holds in their place
            raises a :class:`LogitsError` when it is read. Calls in eval mode, without gradients and without
            a loss are as with "whole", the default, which computes what the model computes.
        strict: Whether an entry of the configuration that selects nothing is an error.
        frontend: As for :func:`capture`.
        callback: Is shown the capture after each pass, with the name of the pass: ``capture``, and then those
            of :func:`lora_fx.passes.pipeline.rewrite_passes`. It is there to look at the graphs.

    Returns:
        A module of the model's own class, ready to train: the base frozen and shared with the
        argument, the adapters trainable, the outputs those of the argument. A parameter of the base that you
        unfreeze by hand gets storage of its own with its first gradient, so that the argument is
        not trained, and is merged and saved beside the adapters; ``modules_to_save`` makes it part of one.

    Raises:
        ConfigError: If an argument is not valid, or the model is rewritten already.
        NoMatchError: If nothing is selected, or would be trained.
        PartialMatchError: With ``strict``.
        CaptureError: If the model cannot be captured.
    """
    pipeline.check_config(config)
    adapted = pipeline.rewrite_model(
        model,
        with_seed(config),
        example_inputs,
        adapter_name=adapter_name,
        optimize=optimize,
        memory=memory,
        loss=loss,
        strict=strict,
        frontend=frontend,
        callback=callback,
    )
    return cast("ModelT", adapted)


@inside
def graphs(model: nn.Module) -> dict[str, fx.Graph]:
    """The graph of every region of a captured or rewritten model, by FQN; ``""`` is the root.

    A module that no pass has changed runs its own forward, and its graph says what that computes. Look at the
    graphs, do not edit them.
    """
    return graphs_of(model)


@overload
def merge(
    model: ModelT,
    *,
    adapter_names: Sequence[str] | str | None = ...,
    into: ModelT | None = ...,
    dtype: torch.dtype | None = ...,
    requantize: bool = ...,
    own: bool = ...,
    example_inputs: Any = ...,
    return_report: Literal[False] = ...,
    progress: Progress = ...,
) -> ModelT: ...
@overload
def merge(
    model: ModelT,
    *,
    adapter_names: Sequence[str] | str | None = ...,
    into: ModelT | None = ...,
    dtype: torch.dtype | None = ...,
    requantize: bool = ...,
    own: bool = ...,
    example_inputs: Any = ...,
    return_report: Literal[True],
    progress: Progress = ...,
) -> tuple[ModelT, MergeReport]: ...
@inside
def merge(
    model: ModelT,
    *,
    adapter_names: Sequence[str] | str | None = None,
    into: ModelT | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
    own: bool = False,
    example_inputs: Any = None,
    return_report: bool = False,
    progress: Progress = False,
) -> ModelT | tuple[ModelT, MergeReport]:
    """Fold trained adapters into the weights.

    What is not folded is shared with the model that was rewritten, and copied only if that is asked for. So
    that both are not trained at once, shared parameters are frozen; the result's own require a gradient where
    they did in the original. To train the result further, pass ``own=True``.

    Args:
        model: A rewritten model; it is not changed.
        adapter_names: Which adapters; those that are active by default.
        into: Fold into this model, of the original class, instead of into a copy of the base. Its weights
            are written over slice by slice, so that no second ones are needed; one whose memory something
            else sees (the model that was rewritten shares it with ``model``) gets a new parameter. For a
            quantized base it is a dense model, and what the adapters change is added to its weights, not to
            the quantized ones' values.
        dtype: Of all parameters and buffers of the result, each rounded once. By default each weight keeps
            its own. Where a quantized base becomes dense, all parameters get the widest dtype that one
            which is not quantized has (that of the quantized values, if there is none): the model computes
            in it, and the merged one runs where ``model`` did.
        requantize: Whether merged weights that were quantized are quantized again, in the same format and
            layers. By default the result is dense as a whole, also where no adapter was.
        own: Whether the result is a model of its own, as with ``into``: it shares nothing, and requires
            gradients where the original did.
        example_inputs: As for :func:`rewrite`, with ``requantize``: the report then says what quantizing
            again does to the outputs.
        return_report: Whether to measure every merged weight against fp64 and return the report,
            too.
        progress: Whether to show a progress bar (if tqdm is installed), or a function that is called with
            (done, total, site name) before each weight.

    Returns:
        A module of the user's own class with nothing of lora_fx left in it, and the
        :class:`MergeReport` if asked for.

    Raises:
        MergeError: If there is nothing to merge, the result would not be finite, arguments exclude each
            other, or a format cannot hold a merged weight (the message names it; a dense merge always can).
        CaptureError: If the example inputs do not fit the model, or a layer that has an adapter was deleted
            or replaced after the rewrite.
    """
    if example_inputs is not None and not requantize:
        raise MergeError(
            "example_inputs measure what requantize=True loses: leave them out without it"
        )
    merged, report = merging.merge(
        model,
        adapter_names=adapter_names,
        into=into,
        dtype=dtype,
        requantize=requantize,
        own=own,
        measure=return_report,
        progress=progress,
    )
    if example_inputs is not None:
        outputs = output_error(model, merged, example_inputs, adapter_names)
        report = dataclasses.replace(report, outputs=outputs)
    dense = cast("ModelT", merged)
    return (dense, report) if return_report else dense


def _check_adapted(model: nn.Module) -> None:
    """Refuse a model that has no adapters and is not around one that has, as trainers' modules are."""
    if not any(record_of(module) is not None for module in model.modules()):
        require_record(model)


@inside
def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters to give to an optimizer.

    Those of the base that were unfrozen by hand get storage of their own here, so that the model that was
    rewritten is not trained with them; elsewhere they get it with their first gradient.

    Raises:
        ConfigError: If the model has no adapters, which is what `rewrite` leaves its argument.
        CaptureError: If a layer that has an adapter was deleted or replaced.
    """
    _check_adapted(model)
    claim_unfrozen(model)
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


@inside
def print_trainable_parameters(model: nn.Module) -> None:
    """Print how much is trained, in PEFT's format.

    Raises:
        ConfigError: If the model has no adapters, which is what `rewrite` leaves its argument.
    """
    _check_adapted(model)
    trainable = sum(elements(p) for p in model.parameters() if p.requires_grad)
    total = sum(elements(p) for p in model.parameters())
    share = 100 * trainable / total if total else 0.0
    # A verb that prints is what its users know it for.
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201
