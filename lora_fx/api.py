"""The functions that users call; each runs a pipeline of passes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters import allot_ranks, input_moments, set_adapter
from lora_fx.config import LoraConfig, whole_number
from lora_fx.errors import ConfigError, MergeError
from lora_fx.formats import Deploy
from lora_fx.ir import (
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
from lora_fx.passes.merge import (
    MergeReport,
    OutputError,
    Rounding,
    RoundingName,
    merging,
    stripped,
    with_prediction,
)
from lora_fx.passes.parameters import claim_unfrozen, inside, protect
from lora_fx.passes.plan import with_advice
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
        merged: The merged model.
        example_inputs: As for :func:`lora_fx.rewrite`.
        adapter_names: The merged adapters; by default the active ones.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """
    adapted = model
    if adapter_names is not None:
        adapted = share_copy(model)
        set_adapter(adapted, adapter_names)
    wanted = _floats(run_reference(adapted, example_inputs))
    actual = _floats(run_reference(merged, example_inputs))
    base = _floats(run_reference(stripped(model, require_record(model)), example_inputs))
    size = float(wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
    error = actual - wanted
    return OutputError(
        relative_error=float(error.norm()) / size,
        largest=float(error.abs().max()) if len(error) else 0.0,
        relative_change=float((wanted - base).norm()) / size,
    )


def _floats(output: Any) -> Tensor:
    """Return all floating-point values of an output as a flat fp64 vector."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    parts = [leaf.detach().double().flatten() for leaf in leaves if leaf.is_floating_point()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


@inside
def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    frontend: Frontend = "auto",
    dynamic_shapes: Any = None,
) -> Capture:
    """Capture a model as graphs that compute the same outputs.

    Args:
        model: Any module. It is not changed; the result shares its weights' storage.
        example_inputs: A tuple (args), a dict (kwargs) or a tensor. With them, the outputs of the capture are
            compared with the model's.
        frontend: ``symbolic``, ``export``, ``regions``, or ``auto``: the first that works. For a model of
            transformers or timm, ``export`` can generate missing inputs; a note then lists them.
        dynamic_shapes: For ``export``, passed to ``torch.export.export``. By default all shapes are those of
            the example: the graph is only used to match operations.

    Returns:
        The capture; ``capture.model`` runs it.

    Raises:
        CaptureError: If this frontend cannot capture the model, or the outputs of the capture differ.
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
    memory: Memory = DEFAULT_MEMORY,
    loss: Loss | None = None,
    strict: bool = False,
    frontend: Frontend = "auto",
    deploy: Deploy | str | None = None,
    merge_into: Deploy | str | None = None,
    tokens: int | None = None,
    budget: int | str | None = None,
    inputs: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: Progress = False,
) -> Plan:
    """Return a plan of what :func:`rewrite` would do, with reasons, costs and advice.

    The model is not changed. With ``budget``, the plan's ``config`` has the ranks to use.

    Args:
        model: Any module that is not rewritten yet.
        config: The configuration of the adapter.
        example_inputs: As for :func:`capture`; with them, more operations can be matched. The plan then also
            has the activation memory of a training step with inputs of their shapes, for each ``memory=`` of
            :func:`rewrite`. This memory is counted without running the model.
        memory: As for :func:`rewrite`. With "least" the plan lists the blocks that are recomputed and the
            modules that run in tiles, and the reasons why others do not.
        loss: As for :func:`rewrite`. With "chunked" the plan lists the heads that can use it, and the reasons
            why others cannot.
        strict: True to raise if an entry of the configuration selects nothing.
        frontend: As for :func:`capture`.
        deploy: As for :func:`rewrite`. The plan checks that each site can have this storage.
        merge_into: A storage, named as for ``deploy``. The plan then has, for each site, the smallest
            ``‖ΔW‖ / ‖W‖`` at which a merge with rounding to nearest keeps nine tenths of the change.
        tokens: Number of tokens in one epoch of the training data that contribute to the loss. The advice
            then compares the data with the capacity of the adapter, and suggests a learning rate
            (:mod:`lora_fx.ir.advice`).
        budget: The upper bound for everything that the adapter trains: a number of parameters, or a size of
            its tensors such as ``"20MB"`` (20 · 10^6 bytes) or ``"20MiB"``. The gradients of ``inputs``
            choose the rank of each site (:mod:`lora_fx.adapters.budget`). ``r`` and ``rank_pattern`` then
            only set the scales, which do not change. Each site keeps at least its smallest rank.
        inputs: For ``budget``: a few batches with labels, as for :func:`initialize`.
        loss_fn: For ``budget``, as for :func:`initialize`.
        forward: For ``budget``, as for :func:`initialize`.
        progress: For ``budget``, as for :func:`initialize`.

    Returns:
        A plan: print it, or read ``sites``, ``skipped``, ``rejections``, ``unmatched`` and ``advice``.

    Raises:
        NoMatchError: If nothing is selected; lists the nearest names.
        PartialMatchError: With ``strict``.
        ConfigError: If a site cannot be trained for the storage of ``deploy``; names it and the reason. If
            the budget is too small; says how large it has to be. If the gradients for the budget cannot be
            computed.
        CaptureError: If the model cannot be captured.
    """
    if tokens is not None:
        number = whole_number(tokens)
        if number is None or number < 1:
            raise ConfigError(
                f"tokens is {tokens!r}: give the number of tokens of the training data"
            )
        tokens = number
    if inputs is not None and budget is None:
        raise ConfigError("inputs are for a budget: add budget=, or pass them as example_inputs")
    planning = functools.partial(
        pipeline.plan_model,
        model,
        example_inputs=example_inputs,
        memory=memory,
        loss=loss,
        strict=strict,
        frontend=frontend,
        deploy=deploy,
    )
    captured, planned = planning(config)
    pipeline.check_trains(planned)
    if budget is not None:
        allotment = allot_ranks(
            planned,
            model,
            budget,
            inputs,
            example_inputs=example_inputs,
            loss_fn=loss_fn,
            forward=forward,
            frontend=frontend,
            progress=progress,
        )
        config = allotment.config
        _, planned = planning(config, captured=captured)
        planned = allotment.onto(planned)
    planned = with_advice(planned, captured, example_inputs, tokens=tokens)
    if merge_into is not None:
        planned = with_prediction(planned, model, merge_into)
    return with_kept(
        planned, model, config, example_inputs, loss=loss, frontend=frontend, deploy=deploy
    )


@inside
def compare(
    configs: Mapping[str, LoraConfig],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    frontend: Frontend = "auto",
) -> Comparison:
    """Plan several configurations for a model, to compare their costs. Nothing is changed.

    Args:
        configs: Configurations by names of your choice.
        model: Any module that is not rewritten yet.
        example_inputs: As for :func:`capture`.
        frontend: As for :func:`capture`.

    Returns:
        The plans: print them for a table of sites, parameters, FLOPs, bytes and ranks.

    Raises:
        ConfigError: If ``configs`` is empty or not a dict.
        NoMatchError: If a configuration selects nothing; names it.
        CaptureError: If the model cannot be captured.
    """
    if not configs or not isinstance(configs, Mapping):
        raise ConfigError(
            "compare takes a dict of at least one LoraConfig by a name of your own, and then the model: "
            "lora_fx.compare({'r 8': lora_fx.LoraConfig(r=8)}, model)"
        )
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
    loss: Loss | None = None,
    strict: bool = False,
    frontend: Frontend = "auto",
    callback: Callable[[str, Capture], None] | None = None,
    deploy: Deploy | str | None = None,
) -> ModelT:
    """Insert LoRA branches into a model's graphs: ``W' = W + (alpha / r) B A`` (arXiv:2106.09685).

    Args:
        model: Any module. Its modules, modes, gradients and statistics are not changed.
        config: The configuration of the adapter.
        example_inputs: As for :func:`capture`. With them the result is checked against the model.
        adapter_name: Name of the adapter.
        optimize: True to run the passes that make training cheaper (:mod:`lora_fx.passes.optimize.fuse`).
            Without these passes the graphs have the canonical form,
            ``x -> dropout -> A -> B -> scale -> add``. The two forms draw different random numbers for
            dropout.
        memory: The activations that a training step keeps for its backward. "fast" keeps the input of each
            product. "balanced" recomputes the outputs of norms, activations and gated products from their
            inputs, which a step keeps anyway (:mod:`lora_fx.passes.optimize.recompute`). Square layers with
            DoRA then compute their product twice, for the gradient of the magnitude. Outputs are bitwise
            equal. Without ``optimize`` this has no effect. "least" also runs whole blocks again in the
            backward, with their inputs on the host (:mod:`lora_fx.runtime.memory.blocks`). It computes
            modules that treat each token on its own (norms, MLPs, experts) a tile of tokens at a time
            (:mod:`lora_fx.runtime.memory.tiles`), and the loss in chunks. A step takes about as long as with
            gradient checkpointing. :func:`plan` lists the blocks and modules.
        loss: "chunked" computes a cross entropy of the output head a few rows at a time, in training calls
            (:mod:`lora_fx.runtime.loss.logits`). The logits of all tokens, their softmax and their gradient
            never exist at once. The output then has a placeholder for the logits, which raises a
            :class:`LogitsError` when it is read. Calls in eval mode, without gradients or without a loss are
            the same as with "whole", which computes the model's own loss and is the default unless ``memory``
            is "least".
        strict: True to raise if an entry of the configuration selects nothing.
        frontend: As for :func:`capture`.
        callback: A function that is called with a name and the capture: first after the capture, with the
            name ``capture``, then after each pass of :func:`lora_fx.passes.pipeline.rewrite_passes`, with the
            pass's name. Use it to inspect the graphs.
        deploy: The storage in which the adapted weights will be used: a format of :func:`quantize`
            ("int4", "int8", "nf4", …), "bf16", "fp16", or the format of a quantized base. The forward then
            multiplies with the rounded weights, ``Q(W + s·BA)``, and gradients pass through the rounding
            (:mod:`lora_fx.runtime.kernels.deployed`). :func:`merge` and :func:`export_onnx` store the same
            codes and scales. ``lora_dropout`` must be 0. Only plain LoRA of matrix products is supported, one
            adapter at a time. Over a dense base, a format needs ``nn.Linear`` layers.

    Returns:
        A module of the model's class with the same outputs, ready to train. The base is frozen and shared
        with the argument; the adapters are trainable. If you unfreeze a parameter of the base by hand, it
        gets its own storage with its first gradient, so the argument is not trained. Such a parameter is
        merged, and is saved next to the adapters. With ``modules_to_save`` it becomes part of an adapter.

    Raises:
        ConfigError: If an argument is not valid, or the model is already rewritten. If a site cannot be
            trained for the storage of ``deploy``; names it and the reason.
        QuantizationError: If the library of the format of ``deploy`` is missing.
        NoMatchError: If nothing is selected, or would be trained.
        PartialMatchError: With ``strict``.
        CaptureError: If the model cannot be captured.
    """
    pipeline.check_config(config)
    adapted = pipeline.rewrite_model(
        model,
        with_seed(config),
        example_inputs,
        options=pipeline.RewriteOptions(
            adapter_name, optimize, memory, loss, strict, deploy=deploy
        ),
        frontend=frontend,
        callback=callback,
    )
    return cast("ModelT", adapted)


@inside
def graphs(model: nn.Module) -> dict[str, fx.Graph]:
    """Return the graph of every region of a captured or rewritten model, by FQN; ``""`` is the root.

    A module that no pass has changed runs its own forward, and its graph shows what that computes. The graphs
    are for reading: do not edit them.
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
    rounding: RoundingName = ...,
    inputs: Iterable[Any] | None = ...,
    forward: Callable[[nn.Module, Any], Any] | None = ...,
    seed: int = ...,
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
    rounding: RoundingName = ...,
    inputs: Iterable[Any] | None = ...,
    forward: Callable[[nn.Module, Any], Any] | None = ...,
    seed: int = ...,
    example_inputs: Any = ...,
    return_report: Literal[True],
    progress: Progress = ...,
) -> tuple[ModelT, MergeReport]: ...
@inside
def merge(
    model: ModelT,
    *unexpected: object,
    adapter_names: Sequence[str] | str | None = None,
    into: ModelT | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
    own: bool = False,
    rounding: RoundingName = "nearest",
    inputs: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    example_inputs: Any = None,
    return_report: bool = False,
    progress: Progress = False,
) -> ModelT | tuple[ModelT, MergeReport]:
    """Fold trained adapters into the weights.

    Tensors without an adapter are shared with the model that was rewritten, and copied only on request.
    Shared parameters are frozen, so that the two models are not trained together. The result's own parameters
    require a gradient if they did in the original. To train the result further, pass ``own=True``.

    Args:
        model: A rewritten model; it is not changed.
        unexpected: Refused: pass all options by keyword.
        adapter_names: The adapters to merge; by default the active ones.
        into: Fold into this model, of the original class, instead of a copy of the base. Its weights are
            overwritten slice by slice, which needs no second copy. A parameter whose memory is shared with
            something else (as the model that was rewritten shares it with ``model``) is replaced by a new
            one. A second merge into the same model first restores the weights from before the first one,
            which are copied from the base; with no ``adapter_names`` it only restores them. A model that was
            copied or cast after a merge counts as a new one, so the next merge adds to its weights. For a
            quantized base, pass a dense model: the adapters' change is added to its weights, not to the
            quantized values, and only once.
        dtype: The dtype of all parameters and buffers of the result, each rounded once. By default each
            weight keeps its dtype. If a quantized base becomes dense, all parameters get the widest dtype
            among its unquantized parameters (if all are quantized, the dtype of the quantized values). The
            model computes in this dtype, so the merged model accepts the same inputs as ``model``.
        requantize: True to quantize merged weights again if they were quantized, in the same format and
            layers. By default the whole result is dense, even without an adapter. A model that was rewritten
            with ``deploy`` is stored in its format in any case.
        own: True to make the result independent, as with ``into``: it shares nothing, and requires gradients
            if the original did.
        rounding: The way in which merged weights of 16 bits or less are rounded. ``"nearest"``: each value to
            the nearest value of the dtype. ``"compensated"``: with error feedback, so that the outputs for
            ``inputs`` change least (GPTQ, arXiv:2210.17323); without inputs, errors along a row add up to
            about zero. ``"stochastic"``: up or down at random, so that the mean is unchanged. Convolutions,
            embeddings, experts, biases and formats without a known grid are rounded to nearest.
        inputs: Batches as for :func:`initialize`, on which compensated rounding depends; 100 to 1000 samples
            are enough. The report then has the error of each site's output for them.
        forward: A function that calls the model with a batch of ``inputs``, if they have another form.
        seed: The seed of stochastic rounding.
        example_inputs: As for :func:`rewrite`: the report then has the error of the model's outputs.
        return_report: True to compare every merged weight with an fp64 computation, and return the report as
            well. Without it, a sample of each weight is compared. A merge that loses more than a tenth of the
            adapters' change logs a warning.
        progress: True to show a progress bar (if tqdm is installed), or a function that is called with (done,
            total, site name) before each weight.

    Returns:
        A module of the user's own class without anything of lora_fx, and the :class:`MergeReport` if
        requested.

    Raises:
        MergeError: If there is nothing to merge, the result would not be finite, arguments exclude each
            other, or a format cannot hold a merged weight. The message names the weight. A dense merge has no
            such limit.
        CaptureError: If the example inputs do not fit the model, or an adapted layer was deleted or replaced
            after the rewrite.
    """
    if unexpected:
        raise MergeError(
            "merge takes one argument, a model with adapters, and options by name. To merge an adapter in a "
            "folder: lora_fx.merge(lora_fx.load_adapter(model, folder))"
        )
    how = Rounding.named(rounding, seed=seed)
    if inputs is not None:
        names = merging.chosen(require_record(model, MergeError), adapter_names)
        try:
            moments = input_moments(model, inputs, names, forward=forward, progress=progress)
        except ConfigError as error:
            raise MergeError(f"inputs: {error}; nothing was merged") from error
        how = dataclasses.replace(how, moments=moments)
    merged, report = merging.merge(
        model,
        adapter_names=adapter_names,
        into=into,
        storage=merging.Storage(dtype=dtype, requantize=requantize, own=own),
        rounding=how,
        measure=return_report,
        progress=progress,
    )
    if example_inputs is not None:
        outputs = output_error(model, merged, example_inputs, adapter_names)
        report = dataclasses.replace(report, outputs=outputs)
    dense = cast("ModelT", merged)
    return (dense, report) if return_report else dense


def _check_adapted(model: nn.Module) -> None:
    """Raise if neither the model nor a module in it has adapters.

    Trainers wrap rewritten models in modules.
    """
    if not any(record_of(module) is not None for module in model.modules()):
        require_record(model)


@inside
def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters for an optimizer.

    Parameters of the base that were unfrozen by hand get their own storage here, so the model that was
    rewritten is not trained. Without this call they get it with their first gradient.

    Raises:
        ConfigError: If the model has no adapters. Note that `rewrite` does not change its argument.
        CaptureError: If an adapted layer was deleted or replaced.
    """
    _check_adapted(model)
    claim_unfrozen(model)
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


@inside
def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable parameters, in PEFT's format.

    Raises:
        ConfigError: If the model has no adapters. Note that `rewrite` does not change its argument.
    """
    _check_adapted(model)
    trainable = sum(elements(p) for p in model.parameters() if p.requires_grad)
    total = sum(elements(p) for p in model.parameters())
    share = 100 * trainable / total if total else 0.0
    # Users of PEFT expect this function to print.
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201
