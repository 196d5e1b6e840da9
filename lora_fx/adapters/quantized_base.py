"""Stores a model's linear weights in few bits: what QLoRA begins with (arXiv:2305.14314)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError, QuantizationError
from lora_fx.files import WeightFiles
from lora_fx.formats import Storage, format_of, quantization_of, quantized_linear, storage
from lora_fx.ir import Capture, Region, record_of
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.capture import holds_quantized, written_out
from lora_fx.passes.graph import check_model, install, share_copy
from lora_fx.passes.pipeline import find_operations, run_passes
from lora_fx.passes.quantize import Materialize, QuantizationPlan, Quantize, Values
from lora_fx.passes.quantize import plan_quantization as make_plan

__all__ = [
    "plan_quantization",
    "prepare_for_kbit_training",
    "quantize",
]


_HALF = (torch.float16, torch.bfloat16)


def prepare_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Makes a quantized model ready for adapters: PEFT's ``prepare_model_for_kbit_training`` as one step.

    It is called before :func:`lora_fx.rewrite`:

    - everything is frozen;
    - parameters in half precision that are not quantized (norms, biases, embeddings, the head) become fp32,
      so that what lies between the products is computed in it. With a tensor of torchao in half precision
      they stay as they are, since it multiplies nothing else;
    - blocks keep their inputs only, and run again in the backward pass (gradient checkpointing);
    - outputs of the input embeddings want a gradient, so that every block is differentiated.

    Unlike PEFT's, this does not change its argument; the kind of model is read off its weights, not off
    attributes that transformers sets on what it has loaded; checkpoints are not reentrant unless that is
    asked for; and a model without quantized weights is an error, where PEFT doubles its size.

    Args:
        model: A model with quantized weights. It is not touched.
        use_gradient_checkpointing: Whether to checkpoint blocks, by the model's own
            ``gradient_checkpointing_enable``, which models of transformers have.
        gradient_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``; ``use_reentrant=False`` by
            default.

    Returns:
        A copy over the same weights, but for those that became fp32, all of it frozen.

    Raises:
        QuantizationError: If no weight is quantized.
        ConfigError: If the model has adapters already, or is to checkpoint and cannot.
        CaptureError: If the model cannot be copied.
    """
    check_model(model)
    if record_of(model) is not None:
        raise ConfigError(
            f"{type(model).__name__} has adapters already, and they would be frozen: prepare the base, and "
            "rewrite what that gives"
        )
    stored = [p for p in model.parameters() if quantization_of(p) is not None]
    if not stored:
        raise QuantizationError(
            f"nothing in {type(model).__name__} is quantized: quantize it first (lora_fx.quantize), or train "
            "it as it is; gradient checkpointing alone is model.gradient_checkpointing_enable()"
        )
    if use_gradient_checkpointing and not _can_checkpoint(model):
        raise ConfigError(
            f"{type(model).__name__} cannot checkpoint its blocks by itself (it has no "
            "gradient_checkpointing_enable): pass use_gradient_checkpointing=False, and wrap the calls of "
            "its blocks in torch.utils.checkpoint.checkpoint where memory asks for it"
        )
    prepared = share_copy(model)
    if not any(_wants_half(parameter) for parameter in stored):
        _widen(prepared)
    if use_gradient_checkpointing:
        _checkpoint(prepared, gradient_checkpointing_kwargs)
    return prepared


def _wants_half(weight: nn.Parameter) -> bool:
    """Whether products with a quantized weight take half precision and nothing else."""
    known, found = format_of(weight), quantization_of(weight)
    assert known is not None
    assert found is not None
    return not known.any_dtype and found.dtype in _HALF


def _widen(model: nn.Module) -> None:
    """Puts fp32 parameters in the place of those in half precision; what is tied stays tied."""
    wide: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in _HALF or quantization_of(parameter):
                continue
            if id(parameter) not in wide:
                wide[id(parameter)] = nn.Parameter(parameter.detach().float(), requires_grad=False)
            module._parameters[name] = wide[id(parameter)]


def _can_checkpoint(model: Any) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", True)) and hasattr(
        model, "gradient_checkpointing_enable"
    )


def _checkpoint(model: Any, options: Mapping[str, Any] | None) -> None:
    given = {"use_reentrant": False, **(options or {})}
    # The newer name of transformers, where calling the older one is a warning.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
    else:
        enable(activation_checkpointing_kwargs=given)
    # transformers does it for models of tokens.
    if getattr(model, "_require_grads_hook", None) is None:
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_wants_gradient)


def _wants_gradient(module: nn.Module, given: Any, output: torch.Tensor) -> None:
    output.requires_grad_()


_log = logging.getLogger("lora_fx")


def plan_quantization(
    model: nn.Module,
    format: str,  # noqa: A002  the name that it has for users
    *,
    exclude: Sequence[str] | str | None = None,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
) -> QuantizationPlan:
    """The dry run of :func:`quantize`: which weights, what they take, and what is left and why.

    Args and errors are those of :func:`quantize`. A model on the meta device will do.
    """
    how = storage(format, block_size=block_size, double=double, compute_dtype=compute_dtype)
    capture = _captured(model)
    return make_plan(capture, find_operations(capture), how, exclude)


def quantize(
    model: nn.Module,
    format: str,  # noqa: A002  the name that it has for users
    *,
    exclude: Sequence[str] | str | None = None,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    weights: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Stores the weight of every linear operation but the output head in few bits.

    Operations are found by what they compute, as :func:`lora_fx.rewrite` finds them: functional ones, too,
    and weights that are stored [in, out]. Lookups, convolutions, experts, tied weights and those of which
    rows are applied by themselves stay as they are; :func:`plan_quantization` says which and why.

    One weight at a time is read, stored and let go. With a model on the meta device and ``weights`` no more
    than the result and one weight is ever in memory.

    Args:
        model: Any module. It is not touched; the result shares the weights that stay as they are.
        format: ``nf4`` or ``fp4`` (bitsandbytes: blocks of 64 values, 4 bits), ``int8`` (torchao: a scale for
            each row) or ``int4`` (torchao: blocks of 32 values of a row; the values have 4 bits and take 8,
            and its tensors refuse fp64: ``.to(torch.float64)`` is an AssertionError of torchao).
        exclude: Operations to leave as they are, by the rules of ``exclude_modules``: a list of names or
            their ends, or a regular expression for whole names.
        block_size: Values of a row that share a scale; for ``nf4`` and ``fp4`` without it, 32 for rows
            that 64 does not divide.
        double: For ``nf4`` and ``fp4``: whether the scales are quantized, too, which saves 0.37 bits a value.
            By default they are, as in QLoRA and ``Linear4bit``; ``BitsAndBytesConfig`` has it off.
        compute_dtype: For ``nf4`` and ``fp4``: in which dtype the product is computed, fp16, bf16 or fp32; by
            default that of its input.
        device: Where to store; by default where the weights lie, for those of files on the CPU.
        weights: A folder with ``model.safetensors``, or its shards and their index, or one such file. The
            model is on the meta device; everything is taken from the files, in the dtypes of the model.
        progress: Called with (done, total, name) before each weight, and once at the end.

    Returns:
        A module of the model's own class, all of it frozen, for :func:`lora_fx.rewrite`. Layers that are
        ``nn.Linear`` are ``Linear4bit`` of bitsandbytes, or hold torchao's tensor, and PEFT takes them for
        what they are. Other operations (Conv1D of GPT-2, ``F.linear`` with a parameter) are nodes of a graph
        (:func:`lora_fx.graphs`), which lora_fx alone reads: PEFT cannot adapt them.

        ``torch.save(result.state_dict())`` keeps any of them, for a model that is quantized likewise.
        ``from_pretrained`` of transformers loads what ``save_pretrained`` writes of ``nf4`` and ``fp4`` if
        all that is quantized are layers; otherwise a line in the log says so. On ``int8`` and ``int4``
        ``save_pretrained`` fails: it cannot write torchao's tensors.

    Raises:
        QuantizationError: If an argument means nothing, the model is quantized or rewritten already, there is
            nothing to quantize, a weight does not fit the format, has no values or infinite ones, or the
            format does not run on the device or its library is missing. Each names what does work.
        CheckpointError: If the files are damaged, or belong to another model.
        CaptureError: If the model cannot be captured.
    """
    how = storage(format, block_size=block_size, double=double, compute_dtype=compute_dtype)
    target = _target(model, device, how, files=weights is not None)
    capture = _captured(model)
    plan = make_plan(capture, find_operations(capture), how, exclude)
    for name, reason in plan.left:
        _log.info("not quantized: %s: %s", name, reason)
    read: Values | None = None
    if weights is not None:
        read = WeightFiles(Path(weights)).reader(capture.model)
        stored = frozenset(one.site.weight for one in plan)
        capture = run_passes(capture, [Materialize(stored, read, target)])
    capture = run_passes(capture, [Quantize(plan.weights, how, read, target, progress)])
    result = capture.model
    if any(t.device != target for t in (*result.parameters(), *result.buffers())):
        result.to(target)
    install(_kept(capture), kept=True)
    sites = [one.site for one in plan.weights]
    how.made_by.layers.describe_model(result, how, sites, plan.weights[0].dtype)
    return result


def _captured(model: nn.Module) -> Capture:
    if record_of(model) is not None:
        raise QuantizationError(
            "the model has adapters: quantize the model that was rewritten, which was not changed, and "
            "rewrite the result"
        )
    return capture_model(model)


def _target(
    model: nn.Module, device: torch.device | str | int | None, how: Storage, *, files: bool
) -> torch.device:
    """Where the result is going to be."""
    check_model(model)
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta and not files:
        raise QuantizationError(
            f"{meta[0]} is on the meta device and has no values: weights=FOLDER reads them from safetensors"
        )
    whole = len(meta) == sum(1 for _ in model.named_parameters())
    if files and not whole:
        raise QuantizationError(
            "the model has values, and weights= is for one that has none: make it with "
            'torch.device("meta") around, or load the weights and leave weights= out'
        )
    if device is None:
        there = next((p.device for p in model.parameters() if not p.is_meta), None)
        target = there or torch.device("cpu")
    else:
        target = _usable(device)
    objection = how.made_by.device_objection(how, target)
    if objection is not None:
        raise QuantizationError(objection)
    return target


def _usable(device: torch.device | str | int) -> torch.device:
    try:
        target = torch.device(device)
        # With the number that the tensors on it will name.
        found = torch.empty(0, device=target).device
    except TypeError as error:
        raise QuantizationError(
            f"device={device!r}: it is a torch.device or the name of one, as 'cpu' or 'cuda:0'"
        ) from error
    except (RuntimeError, AssertionError) as error:
        # A backend that is not built in goes on for a page.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise QuantizationError(
            f"device={str(device)!r} cannot be used ({reason}): device='cpu' can"
        ) from error
    if found.type == "meta":
        raise QuantizationError("device='meta' holds no values: device='cpu' does")
    return found


def _kept(capture: Capture) -> Iterator[Region]:
    """The regions that run their graph from now on: what else their module does reads dense weights."""
    for region in capture.regions.values():
        edited = any(node.target is quantized_linear for node in region.graph.nodes)
        above = written_out(region.module) is not None and holds_quantized(region.module)
        if edited or above:
            yield region
