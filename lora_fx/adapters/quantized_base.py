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
from lora_fx.files import WeightFiles
from lora_fx.formats import (
    FormatName,
    Storage,
    format_of,
    quantization_of,
    quantized_linear,
    storage,
)
from lora_fx.ir import AdapterRecord, Capture, ModelT, PlannedSite, Region, Site, record_of
from lora_fx.kinds import kind_of
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.capture import holds_quantized
from lora_fx.passes.graph import check_model, install, share_copy
from lora_fx.passes.insert import pissa, site_generator, slot_start
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
    "replace_lora_weights_loftq",
]


_HALF = (torch.float16, torch.bfloat16)


def prepare_for_kbit_training(
    model: ModelT,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> ModelT:
    """Makes a quantized model ready for adapters: PEFT's ``prepare_model_for_kbit_training`` as one step.

    It is called before :func:`lora_fx.rewrite`:

    - everything is frozen;
    - parameters in half precision that are not quantized (norms, biases, embeddings, the head) become fp32,
      so that what lies between the products is computed in it. With a tensor of torchao in half precision
      they stay as they are, since it multiplies nothing else;
    - blocks keep their inputs only, and run again in the backward pass (gradient checkpointing);
    - outputs of the input embeddings require a gradient, so that every block is differentiated.

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
    return cast("ModelT", prepared)


def _wants_half(weight: nn.Parameter) -> bool:
    """Whether products with a quantized weight take half precision and nothing else."""
    known, found = format_of(weight), quantization_of(weight)
    assert known is not None
    assert found is not None
    return not known.any_dtype and found.dtype in _HALF


def _widen(model: nn.Module) -> None:
    """Puts fp32 parameters in place of those in half precision; what is tied stays tied."""
    wide: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype not in _HALF or quantization_of(parameter):
                continue
            if id(parameter) not in wide:
                widened = nn.Parameter(parameter.detach().float(), requires_grad=False)
                vars(widened).update(vars(parameter))  # transformers notes on it where it is from
                wide[id(parameter)] = widened
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
    format: FormatName | str,  # noqa: A002  the name that it has for users
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
    """Quantizes the weight of every linear operation but the output head.

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
        progress: Whether to show a progress bar (if tqdm is installed), or a function that is called with
            (done, total, name) before each weight, and once at the end.

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
        QuantizationError: If an argument is not valid, the model is quantized or rewritten already, there is
            nothing to quantize, a weight does not fit the format, has no values or infinite ones, the code of
            the model also gets to it by a global, or the format does not run on the device or its library is
            missing. Each names what does work.
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
    with show_progress(progress, "weight") as tell:
        capture = run_passes(capture, [Quantize(plan.weights, how, read, target, tell)])
    result = capture.model
    if any(t.device != target for t in (*result.parameters(), *result.buffers())):
        result.to(target)
    install(_kept(capture), kept=True)
    sites = [one.site for one in plan.weights]
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
        if edited or (region.written_out and holds_quantized(region.module)):
            yield region


# LoftQ's first step (Li et al. 2023, arXiv:2310.08659, section 3.1, with Q as it is), over any format.
# Quantizing leaves ``Q ≈ W``. The best product of rank r for the error is the leading part of its singular
# value decomposition: ``B A = [W - Q]_r / s``.
@dataclasses.dataclass(frozen=True, slots=True)
class CompensatedSite:
    """What the factors of one site make up for.

    Attributes:
        name: FQN of the site.
        before: ``‖W - Q‖ / ‖W‖``, Frobenius: what quantizing lost.
        after: ``‖W - (Q + s·BA)‖ / ‖W‖``.
        kept: Whether the new factors were kept; False if the callback declined them.
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
    """Gives an adapter over a quantized base the factors that best make up for what quantizing lost.

    What the factors held is lost, so that this comes before training. Sites over weights that are not
    quantized keep theirs; a magnitude becomes the norm of the new ``Q + s·BA``. Parameters are
    written in place: an optimizer and a compiled model go on. One dense weight is in memory at a time.

    Unlike PEFT's function of this name it takes every format, divides by the adapter's scale (PEFT is right
    where that is 1), and changes nothing if a weight is missing.

    Args:
        model: A rewritten model over a quantized base; the factors are changed.
        original: The model as it was before it was quantized; or its folder with ``model.safetensors``, or
            with shards and their index, or one such file, of which one tensor is read at a time.
        adapter_name: Which adapter; by default the only one, or the only active one.
        callback: Called with the model and the site's name after each site; if it returns False, that
            site gets its factors back. With one, sites are done one after the other.
        iterations: For a fast decomposition, by so many iterations of a subspace; the exact one by default.
            What is lost is noise, whose singular values lie close together: 16 find other directions,
            which leave next to nothing more (0.2 % in the tests).
        progress: Likewise, before each site, as in :func:`quantize`.

    Returns:
        A row for each site that is over a quantized weight.

    Raises:
        ConfigError: If several adapters could be meant, no site of the adapter is over a quantized weight, or
            the original has another one, a quantized one or one that is not finite.
        CheckpointError: If the files are missing or damaged, or have no such weight.
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
    weights = Originals(original, getattr(model, "base_model_prefix", ""))
    done: list[CompensatedSite] = []
    waiting: list[tuple[PlannedSite, dict[str, torch.Tensor]]] = []
    with show_progress(progress, "layer") as tell:
        for number, row in enumerate(rows):
            tell(number, len(rows), row.name)
            original_weight = weights.of(row.site)
            made, site = _compensated(model, row, entry, adapter_name, original_weight, iterations)
            if callback is None:
                waiting.append((row, made))
            else:
                kept = _tried(model, row, adapter_name, made, callback)
                site = dataclasses.replace(site, kept=kept)
            done.append(site)
    # All that can fail is done.
    for row, made in waiting:
        _write(model, row, adapter_name, made)
    return tuple(done)


class Originals:
    """The weights of a quantized model as they were before.

    Args:
        original: The model, or the files of it, as :func:`replace_lora_weights_loftq` takes them.
        prefix: Of the names in a model that has a head.
    """

    def __init__(self, original: nn.Module | str | os.PathLike[str], prefix: Any) -> None:
        self.prefix = prefix if isinstance(prefix, str) else ""
        self.model = original if isinstance(original, nn.Module) else None
        self.files = (
            None if isinstance(original, nn.Module) else WeightFiles(Path(os.fspath(original)))
        )

    def of(self, site: Site) -> torch.Tensor:
        """The weight of a site, in its layout."""
        name, shape = site.weight, site.weight_shape
        if self.files is not None:
            # transformers writes a model without a head under names without its prefix.
            inner = name.removeprefix(f"{self.prefix}.") if self.prefix else name
            found = self.files.tensor(name, inner, f"{self.prefix}.{name}")
            if found is None:
                raise CheckpointError(
                    f"{self.files.path} has no {name}: give the files of the model that was quantized"
                )
        else:
            assert self.model is not None
            found = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
            if found is None:
                raise ConfigError(
                    f"original has no {name}: give the model that was quantized, as it was before"
                )
        if quantization_of(found) is not None or found.is_meta:
            how = "on the meta device" if found.is_meta else f"stored as {quantization_of(found)}"
            raise ConfigError(
                f"{name} of the original is {how}: give the dense model, or its files"
            )
        if tuple(found.shape) != tuple(shape):
            raise ConfigError(
                f"{name} is {list(found.shape)} in the original and {list(shape)} here: give the model that "
                "was quantized"
            )
        if not torch.isfinite(found).all():
            raise ConfigError(f"{name} of the original has values that are not finite")
        return found.detach()


def _compensated(
    model: nn.Module,
    row: PlannedSite,
    entry: AdapterRecord,
    adapter: str,
    original: torch.Tensor,
    iterations: int | None,
) -> tuple[dict[str, torch.Tensor], CompensatedSite]:
    """What the parameters of a site are to hold, by the names of its factors, and its row of the report."""
    if not kind_of(row).low_rank:
        raise ConfigError(
            f"{row.name}: the kind {row.kind!r} has no factors that could make up for what quantizing lost"
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
    made = {names.a: a, names.b: b}
    for slot in kind_of(row).slots(site):
        if slot.neutral is None:
            made[slot.name] = slot_start(row, slot, stored, (a, b), entry.config)
        else:
            made[slot.name] = torch.full(slot.shape, slot.neutral)
    return made, report


def _tried(
    model: nn.Module,
    row: PlannedSite,
    adapter: str,
    made: dict[str, torch.Tensor],
    callback: Callable[[nn.Module, str], bool],
) -> bool:
    """Writes factors, and takes them back if they are rejected."""
    factors = factors_of(model, row, adapter).values
    before = {name: factors[name].detach().clone() for name in made}
    _write(model, row, adapter, made)
    kept = False
    try:
        kept = bool(callback(model, row.name))
    finally:
        if not kept:
            _write(model, row, adapter, before)
    return kept


def _write(model: nn.Module, row: PlannedSite, adapter: str, made: dict[str, torch.Tensor]) -> None:
    factors = factors_of(model, row, adapter).values
    with torch.no_grad():
        for name, value in made.items():
            factors[name].copy_(value)
