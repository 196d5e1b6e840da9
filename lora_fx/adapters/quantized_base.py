"""Quantized base models (QLoRA, arXiv:2305.14314), and LoftQ's factors."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lora_fx.adapters.manage import adapter_record, the_adapter
from lora_fx.errors import CheckpointError, ConfigError, QuantizationError
from lora_fx.formats import (
    FormatName,
    PackedTensor,
    Storage,
    format_of,
    quantization_of,
    quantized_linear,
    storage,
)
from lora_fx.gguf_files import weight_files
from lora_fx.ir import AdapterRecord, Capture, ModelT, PlannedSite, Region, Site, record_of
from lora_fx.kinds import kind_of
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.capture import holds_quantized
from lora_fx.passes.graph import check_model, install, share_copy
from lora_fx.passes.insert import pissa, site_generator, slot_start
from lora_fx.passes.merge import forget_loader
from lora_fx.passes.parameters import (
    as_factors,
    as_matrices,
    base_weight,
    check_whole,
    factor_names,
    factors_of,
    inside,
    matrix_shape,
    part_of,
    shapes_of,
)
from lora_fx.passes.patterns import pattern_of
from lora_fx.passes.pipeline import find_operations, run_passes
from lora_fx.passes.quantize import Materialize, QuantizationPlan, Quantize, Values
from lora_fx.passes.quantize import plan_quantization as make_plan
from lora_fx.progress import Progress, show_progress

__all__ = [
    "CompensatedSite",
    "Originals",
    "plan_quantization",
    "prepare_for_kbit_training",
    "quantize",
    "quantized_parameters",
    "replace_lora_weights_loftq",
]


_HALF = (torch.float16, torch.bfloat16)


def prepare_for_kbit_training(
    model: ModelT,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> ModelT:
    """Prepare a quantized model for adapters, as PEFT's ``prepare_model_for_kbit_training``.

    Call it before :func:`lora_fx.rewrite`:

    - All parameters are frozen.
    - Unquantized parameters in half precision (norms, biases, embeddings, the head) become fp32. The
      operations between the products then run in fp32. They stay if a tensor of torchao is in half precision,
      because its products accept no other dtype.
    - Blocks keep only their inputs, and run again in the backward pass (gradient checkpointing).
    - Outputs of the input embeddings require a gradient, so that every block is differentiated.

    Differences from PEFT's function:

    - Its argument is not changed.
    - It recognizes quantized weights themselves, not attributes that transformers sets on loaded models.
    - Checkpoints are not reentrant by default.
    - A model without quantized weights is an error. PEFT doubles its size.

    Args:
        model: A model with quantized weights. It is not changed.
        use_gradient_checkpointing: True to checkpoint blocks with the model's
            ``gradient_checkpointing_enable``, which models of transformers have.
        gradient_checkpointing_kwargs: Arguments for ``torch.utils.checkpoint.checkpoint``;
            ``use_reentrant=False`` by default.

    Returns:
        A frozen copy that shares its weights with the model, except those that became fp32.

    Raises:
        QuantizationError: If no weight is quantized.
        ConfigError: If the model already has adapters, or cannot checkpoint and should.
        CaptureError: If the model cannot be copied.
    """
    check_model(model)
    if record_of(model) is not None:
        raise ConfigError(
            f"{type(model).__name__} has adapters already, and they would be frozen: prepare the base, and "
            "rewrite what that gives"
        )
    prepared = share_copy(model)
    stored = [p for p in prepared.parameters() if quantization_of(p) is not None]
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
    if not any(_wants_half(parameter) for parameter in stored):
        _widen(prepared)
    if use_gradient_checkpointing:
        _checkpoint(prepared, gradient_checkpointing_kwargs)
    return cast("ModelT", prepared)


def quantized_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the quantized weights of a model, for ``fully_shard(..., ignored_params=...)``.

    FSDP2 then leaves them whole in every process, on the device where they are, and shards everything else.
    Otherwise it would shard the packed bytes and lose their scales.

    Args:
        model: A model that FSDP2 does not shard yet.

    Returns:
        The parameters; none for a model without quantized weights.
    """
    return {p for p in model.parameters() if quantization_of(p) is not None}


def _wants_half(weight: nn.Parameter) -> bool:
    """Return True if products with a quantized weight accept only half precision."""
    known, quantization = format_of(weight), quantization_of(weight)
    assert known is not None
    assert quantization is not None
    return not known.any_dtype and quantization.dtype in _HALF


def _widen(model: nn.Module) -> None:
    """Replace parameters in half precision by fp32 copies. Tied weights stay tied."""
    wide: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in _HALF:
                continue
            # A packed tensor computes its values in any dtype, so only the dtype that it reports changes.
            if quantization_of(parameter) and not isinstance(parameter, PackedTensor):
                continue
            if id(parameter) not in wide:
                widened = nn.Parameter(parameter.detach().float(), requires_grad=False)
                # transformers marks the origin of a parameter in its attributes.
                vars(widened).update(vars(parameter))
                wide[id(parameter)] = widened
            module._parameters[name] = wide[id(parameter)]


def _can_checkpoint(model: Any) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", True)) and hasattr(
        model, "gradient_checkpointing_enable"
    )


def _checkpoint(model: Any, options: Mapping[str, Any] | None) -> None:
    kwargs = {"use_reentrant": False, **(options or {})}
    # Prefer transformers' newer name: it warns if the older one is called.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        enable(activation_checkpointing_kwargs=kwargs)
    # transformers already does this for models of tokens.
    if getattr(model, "_require_grads_hook", None) is None:
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_wants_gradient)


def _wants_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_()


_log = logging.getLogger("lora_fx")


def plan_quantization(
    model: nn.Module,
    format: FormatName | str,  # noqa: A002  the name that it has for users
    *,
    exclude: Sequence[str] | str | None = None,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
) -> QuantizationPlan:
    """Return the plan of :func:`quantize`: the weights, their sizes, and the weights left out, with reasons.

    Arguments and errors are those of :func:`quantize`. The model can be on the meta device.
    """
    how = storage(format, block_size=block_size, double=double, compute_dtype=compute_dtype)
    capture = _captured(model)
    return make_plan(capture, find_operations(capture), how, exclude)


def quantize(
    model: ModelT,
    format: FormatName | str,  # noqa: A002  the name that it has for users
    *,
    exclude: Sequence[str] | str | None = None,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    weights: str | Path | None = None,
    progress: Progress = False,
) -> ModelT:
    """Quantize the weight of every linear operation except the output head.

    Operations are matched in the graph, as in :func:`lora_fx.rewrite`. This includes functional operations
    and weights that are stored [in, out]. Lookups, convolutions, experts, tied weights and weights whose rows
    are applied separately stay unchanged; :func:`plan_quantization` lists them with the reasons.

    Weights are read, stored and freed one at a time. With a model on the meta device and ``weights``, only
    the result and a single weight are ever in memory.

    Args:
        model: Any module. It is not changed; the result shares the weights that are not quantized.
        format: ``nf4`` or ``fp4`` (bitsandbytes: blocks of 64 values, 4 bits), ``int8`` (torchao: a scale for
            each row) or ``int4`` (torchao: blocks of 32 values of a row; the values have 4 bits and take 8,
            and its tensors refuse fp64: ``.to(torch.float64)`` is an AssertionError of torchao).
        exclude: Operations to leave unchanged, by the rules of ``exclude_modules``: a list of names or their
            ends, or a regular expression for whole names.
        block_size: Number of values of a row that share a scale. The default for ``nf4`` and ``fp4`` is 32
            for rows that 64 does not divide.
        double: For ``nf4`` and ``fp4``: True to quantize the scales as well, which saves 0.37 bits a value.
            This is the default, as in QLoRA and ``Linear4bit``; in ``BitsAndBytesConfig`` it is off.
        compute_dtype: For ``nf4`` and ``fp4``: the dtype of the product, fp16, bf16 or fp32; by default the
            dtype of its input.
        device: Where to store the weights; by default on the model's device, or on the CPU if they are read
            from files.
        weights: A folder with ``model.safetensors``, or its shards and their index, or one such file, or a
            GGUF file. The model has to be on the meta device then. All values are read from the files, in the
            dtypes of the model.
        progress: True to show a progress bar (if tqdm is installed), or a function. It is called with (done,
            total, name) before each weight, and once at the end.

    Returns:
        A frozen module of the model's class, for :func:`lora_fx.rewrite`. Layers that were ``nn.Linear`` are
        ``Linear4bit`` of bitsandbytes or hold torchao's tensor, and PEFT recognizes them. Other operations
        (Conv1D of GPT-2, ``F.linear`` with a parameter) are nodes of a graph (:func:`lora_fx.graphs`). Only
        lora_fx can adapt them, not PEFT.

        ``torch.save(result.state_dict())`` saves all of them, for a model that is quantized the same way.
        ``from_pretrained`` of transformers loads what ``save_pretrained`` writes for ``nf4`` and ``fp4`` if
        only layers are quantized; otherwise a warning is logged. On ``int8`` and ``int4`` ``save_pretrained``
        fails, because it cannot write torchao's tensors.

    Raises:
        QuantizationError: If an argument is not valid, or the model is quantized or rewritten already. If
            there is nothing to quantize. If a weight does not fit the format, has no values or infinite ones,
            or is also read through a global by the model's code. If the format does not run on the device or
            its library is missing. Each error names what does work.
        CheckpointError: If the files are damaged, or belong to another model.
        CaptureError: If the model cannot be captured.
    """
    how = storage(format, block_size=block_size, double=double, compute_dtype=compute_dtype)
    target = _target(model, device, how, files=weights is not None)
    capture = _captured(model)
    forget_loader(capture.model)
    plan = make_plan(capture, find_operations(capture), how, exclude)
    for name, reason in plan.left:
        _log.info("not quantized: %s: %s", name, reason)
    read: Values | None = None
    if weights is not None:
        read = weight_files(Path(weights), capture.model).reader(capture.model)
        stored = frozenset(planned.site.weight for planned in plan)
        capture = run_passes(capture, [Materialize(stored, read, target)])
    with show_progress(progress, "weight") as tell:
        capture = run_passes(capture, [Quantize(plan.weights, how, read, target, tell)])
    result = capture.model
    if any(t.device != target for t in (*result.parameters(), *result.buffers())):
        result.to(target)
    install(_kept(capture), kept=True)
    sites = [planned.site for planned in plan.weights]
    how.made_by.layers.describe_model(result, how, sites, plan.weights[0].dtype)
    return cast("ModelT", result)


def _captured(model: nn.Module) -> Capture:
    if record_of(model) is not None:
        raise QuantizationError(
            "the model has adapters: quantize the model that was rewritten, which was not changed, and "
            "rewrite the result"
        )
    check_whole(model.named_parameters(), QuantizationError)
    return capture_model(model)


def _target(
    model: nn.Module, device: torch.device | str | int | None, how: Storage, *, files: bool
) -> torch.device:
    """Check a model that is to be quantized, and return the device of the result."""
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
        model_device = next((p.device for p in model.parameters() if not p.is_meta), None)
        target = model_device or torch.device("cpu")
    else:
        target = _usable(device)
    objection = how.made_by.device_objection(how, target)
    if objection is not None:
        raise QuantizationError(objection)
    return target


def _usable(device: torch.device | str | int) -> torch.device:
    try:
        target = torch.device(device)
        # ``torch.device("cuda")`` has no index. A tensor that is allocated there has one.
        indexed_device = torch.empty(0, device=target).device
    except TypeError as error:
        raise QuantizationError(
            f"device={device!r}: it is a torch.device or the name of one, as 'cpu' or 'cuda:0'"
        ) from error
    except (RuntimeError, AssertionError) as error:
        # The message of a backend that is not built in is a page long.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise QuantizationError(
            f"device={str(device)!r} cannot be used ({reason}): device='cpu' can"
        ) from error
    if indexed_device.type == "meta":
        raise QuantizationError("device='meta' holds no values: device='cpu' does")
    return indexed_device


def _kept(capture: Capture) -> Iterator[Region]:
    """Yield the regions that must run their graph, because their own forward would read dense weights."""
    for region in capture.regions.values():
        edited = any(node.target is quantized_linear for node in region.graph.nodes)
        if edited or (region.written_out and holds_quantized(region.module)):
            yield region


# LoftQ's first step (Li et al. 2023, arXiv:2310.08659, section 3.1, with Q unchanged), for any format.
# Quantizing gives ``Q ≈ W``. The best approximation of the error by a product of rank r is the leading part
# of its singular value decomposition: ``B A = [W - Q]_r / s``.
@dataclasses.dataclass(frozen=True, slots=True)
class CompensatedSite:
    """The quantization error of a site, before and after its factors compensate it.

    Attributes:
        name: FQN of the site.
        before: ``‖W - Q‖ / ‖W‖``, Frobenius: the error of quantizing.
        after: ``‖W - (Q + s·BA)‖ / ‖W‖``.
        kept: True if the new factors were kept, False if the callback declined them.
    """

    name: str
    before: float
    after: float
    kept: bool = True


@inside
def replace_lora_weights_loftq(
    model: nn.Module,
    original: nn.Module | str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    callback: Callable[[nn.Module, str], bool] | None = None,
    iterations: int | None = None,
    progress: Progress = False,
) -> tuple[CompensatedSite, ...]:
    """Set the factors of an adapter over a quantized base to those that best compensate the quantization.

    Call it before training, because the old values of the factors are lost. Sites over weights that are not
    quantized keep their factors. A magnitude becomes the norm of the new ``Q + s·BA``. Parameters are written
    in place, so an optimizer and a compiled model stay valid. One dense weight is in memory at a time.

    Unlike PEFT's function of this name, it accepts every format and divides by the adapter's scale (PEFT is
    right only for scale 1). It changes nothing if a weight is missing.

    Args:
        model: A rewritten model over a quantized base; its factors are changed.
        original: The model before it was quantized. Or its folder with ``model.safetensors``, or with shards
            and their index, or one such file; tensors are then read one at a time.
        adapter_name: The adapter; by default the only one, or the only active one.
        callback: A function that is called with the model and the site's name after each site. If it returns
            False, that site gets its factors back. With a callback, each site is written before the next is
            computed.
        iterations: Number of subspace iterations of a fast decomposition; by default the decomposition is
            exact. The error is noise, whose singular values lie close together. So 16 iterations find other
            directions, which leave hardly more error (0.2 % in the tests).
        progress: As in :func:`quantize`, before each site.

    Returns:
        A row for each site over a quantized weight.

    Raises:
        ConfigError: If several adapters could be meant or no site of the adapter is over a quantized weight.
            If the weight of the original is missing, quantized, not finite, or has another shape.
        CheckpointError: If the files are missing or damaged, or lack the weight.
    """
    adapter_name = the_adapter(model, adapter_name)
    entry = adapter_record(model, adapter_name)
    rows = tuple(row for row in entry.sites if row.site.quantized is not None)
    if not rows:
        raise ConfigError(
            f"no site of the adapter {adapter_name!r} is over a quantized weight, so that nothing was lost: "
            "over a dense base use init_lora_weights='pissa' or 'loftq'"
        )
    if iterations is not None and iterations < 1:
        raise ConfigError(f"iterations={iterations}: it is at least 1, or None")
    weights = Originals(original, model)
    done: list[CompensatedSite] = []
    waiting: list[tuple[PlannedSite, dict[str, torch.Tensor]]] = []
    with show_progress(progress, "layer") as tell:
        for number, row in enumerate(rows):
            tell(number, len(rows), row.name)
            original_weight = weights.of(row.site)
            factors, site = _compensated(
                model, row, entry, adapter_name, original_weight, iterations
            )
            if callback is None:
                waiting.append((row, factors))
            else:
                kept = _tried(model, row, adapter_name, factors, callback)
                site = dataclasses.replace(site, kept=kept)
            done.append(site)
    # Nothing below can fail.
    for row, factors in waiting:
        _write(model, row, adapter_name, factors)
    return tuple(done)


class Originals:
    """The weights of a quantized model before it was quantized.

    Args:
        original: The model or its files, as in :func:`replace_lora_weights_loftq`.
        model: The quantized model. Names in the files may have its ``base_model_prefix`` or lack it.
    """

    def __init__(self, original: nn.Module | str | os.PathLike[str], model: nn.Module) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        self.prefix = prefix if isinstance(prefix, str) else ""
        self.model = original if isinstance(original, nn.Module) else None
        self.files = (
            None
            if isinstance(original, nn.Module)
            else weight_files(Path(os.fspath(original)), model)
        )

    def of(self, site: Site) -> torch.Tensor:
        """Return the weight of a site before it was quantized, in the shape of the model's parameter."""
        name, shape = site.weight, site.weight_shape
        if self.files is not None:
            # transformers writes a model without a head under names without its prefix.
            inner = name.removeprefix(f"{self.prefix}.") if self.prefix else name
            weight = self.files.tensor(name, inner, f"{self.prefix}.{name}")
            if weight is None:
                raise CheckpointError(
                    f"{self.files.path} has no {name}: give the files of the model that was quantized"
                )
        else:
            assert self.model is not None
            weight = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
            if weight is None:
                raise ConfigError(
                    f"original has no {name}: give the model that was quantized, as it was before"
                )
        stored = quantization_of(weight) or (weight.dtype if weight.dtype.itemsize < 2 else None)
        if stored is not None or weight.is_meta:
            how = "on the meta device" if weight.is_meta else f"stored as {stored}"
            raise ConfigError(
                f"{name} of the original is {how}: give the dense model, or its files"
            )
        if tuple(weight.shape) != tuple(shape):
            raise ConfigError(
                f"{name} is {list(weight.shape)} in the original and {list(shape)} here: give the model that "
                "was quantized"
            )
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{name} of the original has values that are not finite")
        return weight.detach()


def _compensated(
    model: nn.Module,
    row: PlannedSite,
    entry: AdapterRecord,
    adapter: str,
    original: torch.Tensor,
    iterations: int | None,
) -> tuple[dict[str, torch.Tensor], CompensatedSite]:
    """Compute the factors of a site that best compensate the error of its quantized weight.

    Returns:
        The new parameters by the names of the factors, and the row of the report.
    """
    if not kind_of(row).low_rank:
        raise ConfigError(
            f"{row.name}: the kind {row.kind!r} has no factors that could make up for what quantizing lost"
        )
    if shapes_of(row) != pattern_of(row.site).factors(row.site, row.rank):
        raise ConfigError(
            f"{row.name}: the factors of the kind {row.kind!r} cannot be any matrices, so that they do not "
            "make up for what quantizing lost"
        )
    site, stored = row.site, base_weight(model, row.site)
    _, out, inner = matrix_shape(site)
    if row.rank > min(out, inner):
        raise ConfigError(
            f"{row.name}: rank {row.rank} is more than a matrix [{out}, {inner}] has: set a smaller one with "
            "rank_pattern"
        )
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    exact = part_of(site, original.to(stored.device, wide))
    lost = as_matrices(site, exact - part_of(site, stored).to(wide))
    generator = site_generator(f"{row.name}.loftq", entry.config)
    a, b = pissa(lost, row.rank, row.scale, iterations, generator)
    left = lost - row.scale * (b @ a)
    size = float(exact.norm().clamp_min(torch.finfo(wide).tiny))
    report = CompensatedSite(row.name, float(lost.norm()) / size, float(left.norm()) / size)
    shapes = pattern_of(site).factors(site, row.rank)
    a, b = as_factors(shapes, a, b)
    names = factor_names(row)
    factors = {names.a: a, names.b: b}
    for slot in kind_of(row).slots(site):
        if slot.neutral is None:
            factors[slot.name] = slot_start(row, slot, stored, (a, b), entry.config)
        else:
            factors[slot.name] = torch.full(slot.sized(row.rank), slot.neutral)
    return factors, report


def _tried(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    new: dict[str, torch.Tensor],
    callback: Callable[[nn.Module, str], bool],
) -> bool:
    """Write factors, and restore the old ones if the callback rejects them. Return True if they were kept."""
    factors = factors_of(model, row, adapter).values
    before = {name: factors[name].detach().clone() for name in new}
    _write(model, row, adapter, new)
    kept = False
    try:
        kept = bool(callback(model, row.name))
    finally:
        if not kept:
            _write(model, row, adapter, before)
    return kept


def _write(model: nn.Module, row: PlannedSite, adapter: str, new: dict[str, torch.Tensor]) -> None:
    factors = factors_of(model, row, adapter).values
    with torch.no_grad():
        for name, value in new.items():
            factors[name].copy_(value)
