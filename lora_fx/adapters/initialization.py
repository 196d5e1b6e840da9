"""Starting values that need data: EVA, CorDA, LoRA-GA.

EVA (Paischer et al. 2024, arXiv:2410.07170) starts A as the principal components of the inputs. It reads the
data until the components of every site have converged. Then it distributes the total rank of all sites over
the components that explain most of the variance: a site gets up to ``rho`` times its rank, or none.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.adapters.manage import adapter_record, disable_adapter, the_adapter
from lora_fx.adapters.settings import by_site, with_patterns
from lora_fx.adapters.switching import base_capture, on_base
from lora_fx.config import LoraConfig, needs_data
from lora_fx.errors import ConfigError, LoraFxError, some
from lora_fx.ir import AdapterRecord, ModelT, PlannedSite, Record, Region, Site, require_record
from lora_fx.kinds import base_change, kind_of
from lora_fx.passes.graph import install
from lora_fx.passes.insert import (
    See,
    Start,
    computed_starts,
    data_start,
    drop_site,
    initial_start,
    observed,
    place_slots,
    place_start,
    signs,
    site_generator,
    slot_start,
)
from lora_fx.passes.lowrank import low_rank_svd
from lora_fx.passes.parameters import (
    base_dtype,
    base_parameters,
    base_weight,
    digest_of,
    factors_of,
    gathered,
    inside,
    place_base,
    put_back,
    reshard,
    weight_at,
    write,
)
from lora_fx.passes.pipeline import regions_to_install
from lora_fx.passes.plan import at_rank
from lora_fx.progress import Progress, Tell, show_progress
from lora_fx.torch_private import version_counter

__all__ = [
    "Components",
    "Data",
    "Forward",
    "Report",
    "check_has_values",
    "gradients",
    "initialize",
    "loss_of",
    "moments",
    "reporting",
    "restart",
    "running_base",
    "same_modes",
    "show_inputs",
    "tokens_seen",
]

# --- statistics of data ---------------------------------------------------------------------------


Forward = Callable[[nn.Module, Any], Any]
"""A function that calls a model with a batch."""

Report = Callable[[int | None, str], None]
"""A callback for the number of batches done (None: as many as before), and the name of the current step."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The data from which starting values are computed.

    Attributes:
        batches: Batches of inputs. A tensor is the model's only argument, a tuple or list holds all
            arguments, and a mapping holds them by name.
        device: The device of the model.
        forward: A function that calls the model with a batch, if batches have another form.
        report: A callback for each batch.
    """

    batches: Iterable[Any]
    device: torch.device
    forward: Forward | None
    report: Report

    def counted(self) -> Iterator[tuple[int, Any]]:
        """Yield the index and the contents of each batch, moved to the model's device.

        Raises:
            ConfigError: If there are no batches.
        """
        number = -1
        for number, batch in enumerate(self.batches):
            yield number, _on_device(batch, self.device)
        if number < 0:
            raise ConfigError("the dataloader is empty: give at least one batch")

    def output(self, model: nn.Module, batch: Any, number: int) -> Any:
        """Return the model's output for a batch.

        Raises:
            ConfigError: If the model does not accept the batch.
        """
        try:
            if self.forward is not None:
                return self.forward(model, batch)
            if isinstance(batch, Mapping) or hasattr(batch, "keys"):
                return model(**batch)
            return model(*batch) if isinstance(batch, tuple | list) else model(batch)
        except LoraFxError:
            raise
        except Exception as error:
            raise ConfigError(
                f"batch {number}, a {type(batch).__name__}: the model does not take it "
                f"({type(error).__name__}: {error}); give forward=, a function of the model and a batch"
            ) from error


def loss_of(output: Any, batch: Any, loss_fn: Callable[[Any, Any], Any] | None) -> torch.Tensor:
    """Return the loss of an output.

    Raises:
        ConfigError: If there is no loss, or it is not finite.
    """
    loss = output if loss_fn is None else loss_fn(output, batch)
    if loss_fn is None and not isinstance(output, torch.Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ConfigError(
            f"the model's output, a {type(output).__name__}, has no loss: give labels in the batches, or "
            "loss_fn=, a function of the output and the batch that returns a scalar"
        )
    if not torch.isfinite(loss).all():
        raise ConfigError(f"the loss of a batch is {float(loss)}")
    return loss


def _on_device(value: Any, device: torch.device) -> Any:
    """Return a batch with its tensors moved to a device."""
    if hasattr(value, "to") and not isinstance(value, type):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _on_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        parts = [_on_device(item, device) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tokens_seen(batch: Any, ignored_label: int | None) -> torch.Tensor | None:
    """Return a flat mask of the tokens that the attention mask keeps and that have a label.

    Args:
        batch: A batch; only a mapping of a language model's inputs has tokens.
        ignored_label: The label of tokens that do not count; None if labels do not matter.

    Returns:
        The mask; None to use every vector, if the batch has no token ids or its attention mask has another
        shape.
    """
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        return None
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    if mask.shape != ids.shape:
        return None
    mask = mask.bool()
    if ignored_label is not None and "labels" in batch and batch["labels"].shape == ids.shape:
        mask = mask & (batch["labels"] != ignored_label)
    return torch.flatten(mask)


def show_inputs(model: nn.Module, record: Record, rows: tuple[PlannedSite, ...], see: See) -> None:
    """Install graphs that call ``see`` with the inputs of sites if no adapter is active.

    A module with a written-out forward (:attr:`Region.written_out`) runs its graph, because its own forward
    applies the weights without an input to observe.
    """
    capture = base_capture(model, record)
    seen: dict[str, Region] = {region.fqn: region for region in observed(capture, rows, see)}
    capture = dataclasses.replace(capture, regions={**capture.regions, **seen})
    install(regions_to_install(capture, rows))


def moments(
    model: nn.Module,
    record: Record,
    rows: tuple[PlannedSite, ...],
    data: Data,
    *,
    half: bool = False,
    scaled: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the mean of ``XᵀX`` over all calls of each site, by its name. X [n, in] is the input.

    Args:
        model: A rewritten model with no active adapter. Its graphs are replaced.
        record: The record of the model.
        rows: The sites.
        data: The data.
        half: True to compute in the inputs' own dtype instead of fp32 (``use_float16_for_covariance``).
        scaled: True to divide each X by its largest value, as PEFT does.

    Raises:
        ConfigError: If an input is not finite, or a site is not run.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys((row.name for row in rows), 0)
    counted: torch.Tensor | None = None
    last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def product(x: torch.Tensor) -> torch.Tensor:
        x = x if half else x.float()
        if scaled:
            # If the largest value is zero, take the largest magnitude instead.
            largest = x.max().abs()
            x = x / torch.where(largest > 0, largest, x.abs().max().clamp_min(1e-30))
        elif counted is not None and len(counted) == len(x):
            x = x[counted]
        with torch.autocast(x.device.type, enabled=False):
            return x.T @ x

    def see(row: PlannedSite, x: torch.Tensor) -> None:
        nonlocal last
        if not scaled and counted is not None and not counted.any():
            return
        version = 0 if x.is_inference() else version_counter(x)
        # Queries, keys and values have the same input, so compute its product once. ``last`` holds the input,
        # so that no other tensor gets its memory.
        if last is None or last[1] != version or not x.is_set_to(last[0]):
            last = x, version, product(x)
        if not torch.isfinite(last[2].diagonal()).all():
            raise ConfigError(f"{row.name}: the model gives it inputs that are not finite")
        if row.name in sums:
            sums[row.name] += last[2]
        else:
            sums[row.name] = last[2].clone()
        counts[row.name] += 1

    show_inputs(model, record, rows, see)
    with torch.no_grad():
        for number, batch in data.counted():
            data.report(number, "collecting second moments")
            counted = tokens_seen(batch, None)
            data.output(model.eval(), batch, number)
    _check_reached([name for name, count in counts.items() if count == 0])
    return {name: value / counts[name] for name, value in sums.items()}


def gradients(
    model: nn.Module,
    rows: tuple[PlannedSite, ...],
    data: Data,
    loss_fn: Callable[[Any, Any], Any] | None,
) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss for each weight, by FQN: fp32, on the CPU.

    Each gradient is moved to the CPU as soon as it is computed, so the device holds at most one.

    Args:
        model: A rewritten model with no active adapter.
        rows: The sites.
        data: The data.
        loss_fn: The loss of an output and a batch.

    Raises:
        ConfigError: If a gradient is not finite, there is no loss, or the loss or a weight has no gradient.
            If the call is inside of ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ConfigError(
            "gradients are needed, and torch.inference_mode() allows none: create the model and call this "
            "outside of it"
        )
    before = base_parameters(model)
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys((row.site.weight for row in rows), 0)
    try:
        model.requires_grad_(False)
        for name in counts:
            _replace(model, name, _adding(name, sums, counts))
        seen = 0
        for number, batch in data.counted():
            data.report(number, "collecting gradients")
            with torch.enable_grad():
                output = data.output(model.train(), batch, number)
                loss = loss_of(output, batch, loss_fn)
                if not loss.requires_grad:
                    raise ConfigError(
                        "the loss of a batch does not depend on any adapted weight: leave out detach() and "
                        "torch.no_grad() in the model's forward and in loss_fn"
                    )
                torch.autograd.backward(loss)
            seen = number + 1
    finally:
        put_back(model, before)
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    _check_reached([name for name, count in counts.items() if count == 0])
    return {name: value / seen for name, value in sums.items()}


def _replace(model: nn.Module, name: str, hook: Callable[[torch.Tensor], None]) -> None:
    """Replace a weight by a new leaf parameter over the same memory, with a hook on its gradient.

    Weights that are tied to it keep the old parameter.
    """
    owner, _, leaf = name.rpartition(".")
    weight: Any = nn.Parameter(model.get_parameter(name).detach(), requires_grad=True)
    weight.register_post_accumulate_grad_hook(hook)
    model.get_submodule(owner)._parameters[leaf] = weight


def _adding(
    name: str, sums: dict[str, torch.Tensor], counts: dict[str, int]
) -> Callable[[torch.Tensor], None]:
    def add(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        value = weight.grad.to("cpu", torch.float32)
        weight.grad = None
        if not torch.isfinite(value).all():
            raise ConfigError(f"{name}: its gradient is not finite")
        sums[name] = sums[name].add_(value) if name in sums else value.clone()
        counts[name] += 1

    return add


def _check_reached(idle: list[str]) -> None:
    if idle:
        raise ConfigError(
            f"the data does not reach {some(idle)}: give batches that do, or leave it out with "
            "exclude_modules"
        )


# --- starting values ------------------------------------------------------------------------------


def restart(
    model: nn.Module,
    adapter_name: str,
    entry: AdapterRecord,
    rows: Iterable[PlannedSite],
    make: Callable[[PlannedSite, torch.Tensor], Start] | None = None,
) -> None:
    """Compute the starting values of an adapter from the original base, and write all of them or none.

    Args:
        model: A rewritten model, changed in place; its graphs stay.
        adapter_name: An adapter of the model, active or not.
        entry: The adapter's new record, without the base weights that the new start changes.
        rows: The sites that start again.
        make: A function that returns the start of a site from its weight. By default the entry's
            configuration decides.
    """
    record = require_record(model)
    with on_base(model) as before:
        starts = computed_starts(
            model, rows, make or (lambda row, weight: initial_start(row, weight, entry.config))
        )
        for row, start in starts:
            place_start(model, row, adapter_name, start)
            place_slots(model, row, adapter_name, entry.config)
        after = base_parameters(model)
        own = [name for name, parameter in after.items() if parameter is not before[name]]
        originals = {**record.originals, **{name: before[name].detach() for name in own}}
        place_base(model, adapter_name, own, originals)
        entry = dataclasses.replace(entry, own=tuple(dict.fromkeys((*entry.own, *own))))
        record = record.with_adapter(adapter_name, entry, originals=originals)
        model.__dict__["_lora_fx"] = record


@inside
def initialize(
    model: ModelT,
    dataloader: Iterable[Any] | None = None,
    *,
    adapter_name: str | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    forward: Forward | None = None,
    progress: Progress = True,
) -> ModelT:
    """Compute the starting values that an adapter's configuration names, if the rewrite could not.

    If a model was rewritten on the meta device, sharded and given memory (``to_empty``), its adapters have no
    starting values. Call this without data in every process. The values are bitwise equal to those of a plain
    rewrite, and each process gets its part. Training that an adapter already had is lost.

    ``eva`` (arXiv:2410.07170) reads the inputs of the sites and distributes their ranks. ``corda``
    (arXiv:2406.05223) reads the inputs' second moments, ``lora_ga`` (arXiv:2407.05000) the gradients of the
    weights. The last two change the base in this model. The model that was rewritten is not touched, and a
    merge and a saved adapter are relative to it.

    Call it before you create an optimizer and before you wrap the model: the factors become new parameters,
    with ``eva`` of other shapes. All processes need the same data.

    Args:
        model: A rewritten model, changed in place.
        dataloader: None for a start that needs no data. Otherwise batches: a tensor, a tuple or list of the
            arguments, or a mapping of them by name. They are moved to the model's device. ``eva`` may go
            through them several times. It leaves out tokens that an ``attention_mask`` or ``labels`` leave
            out.
        adapter_name: The adapter; by default the only one, or the only active one.
        loss_fn: For ``lora_ga``, the loss of the model's output and the batch; by default the output's
            ``loss``, or the output itself.
        forward: A function that calls the model with a batch, if batches have another form.
        progress: True to show a progress bar (if tqdm is installed), or a function that is called with
            (batches done, total batches or 0, current step).

    Returns:
        The model itself.

    Raises:
        ConfigError: If the adapter is ambiguous, already has its start, or has been trained. If data is
            passed and not needed, or the reverse; without data, if the adapter holds values of the base. If
            the data is empty, does not fit the model, does not reach a site, or gives values that are not
            finite. If the model is on the meta device. The model is unchanged then.
    """
    adapter_name = the_adapter(model, adapter_name)
    entry = adapter_record(model, adapter_name)
    if dataloader is None:
        _start_plainly(model, entry, adapter_name)
        return model
    _check(model, entry, adapter_name, loss_fn)
    with running_base(model, dataloader, forward, progress, seed=entry.config.seed or 0) as data:
        if entry.config.init_lora_weights == "eva":
            _from_components(model, entry, adapter_name, data)
        else:
            _from_statistics(model, entry, adapter_name, data, loss_fn)
    return model


@contextmanager
def running_base(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    progress: Progress,
    *,
    seed: int,
) -> Iterator[Data]:
    """Yield the batches as :class:`Data`, in a context in which the model runs without adapters.

    Random numbers are drawn from ``seed``. The modes of modules and the global random state are restored at
    the end.
    """
    with ExitStack() as stack:
        report = stack.enter_context(reporting(progress, batches))
        # Makes the draws of training mode reproducible, and leaves the global random state alone.
        device = next(model.parameters()).device
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        stack.enter_context(same_modes(model))
        stack.enter_context(disable_adapter(model))
        yield Data(batches, device, forward, report)


def _start_plainly(model: nn.Module, entry: AdapterRecord, adapter_name: str) -> None:
    """Write the starting values of a new adapter into its parameters, for starts that need no data.

    A rewrite on the meta device leaves the parameters without values.
    """
    start = entry.config.init_lora_weights
    if needs_data(start):
        raise ConfigError(f"init_lora_weights={start!r} needs data: give initialize() a dataloader")
    if base_change(entry.config) or entry.own or entry.tokens:
        setting = base_change(entry.config) or f"init_lora_weights={start!r}"
        raise ConfigError(
            f"the adapter {adapter_name!r} has values of the base in it ({setting}, modules_to_save, bias, "
            "trainable_token_indices): rewrite the model when it has its weights"
        )
    check_has_values(model)
    reshard(model)
    for row in entry.sites:
        factors = factors_of(model, row, adapter_name)
        if kind_of(row).low_rank and not row.tied:
            reads = kind_of(row).starts_from_weight
            weight = (
                gathered(base_weight(model, row.site)) if reads else _empty_weight(model, row.site)
            )
            begun = initial_start(row, weight, entry.config)
            write(factors.a, begun.a)
            write(factors.b, begun.b)
        slots = kind_of(row).slots(row.site)
        if not slots:
            continue
        weight = gathered(base_weight(model, row.site))
        low_rank = kind_of(row).low_rank
        pair = (gathered(factors.a), gathered(factors.b)) if low_rank else None
        for slot in slots:
            write(factors.slots[slot.name], slot_start(row, slot, weight, pair, entry.config))


def _empty_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """Return an empty tensor with a weight's shape, dtype and device, for starts that ignore the values."""
    device = weight_at(model, site.weight).device
    return torch.empty((), dtype=base_dtype(model, site), device=device).expand(site.weight_shape)


def check_has_values(model: nn.Module) -> None:
    """Raise if a parameter is on the meta device, because starting values need the weights."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("the model is on the meta device: give it its weights first")


def _check(model: nn.Module, entry: AdapterRecord, adapter_name: str, loss_fn: object) -> None:
    start = entry.config.init_lora_weights
    if not needs_data(start):
        raise ConfigError(
            f"the adapter {adapter_name!r} has init_lora_weights={start!r}, which needs no data: it has its "
            "start already"
        )
    if entry.initialized:
        raise ConfigError(
            f"the adapter {adapter_name!r} has its start already: for another one rewrite the original "
            "model again, or add an adapter"
        )
    for row in entry.sites:
        a, b = factors_of(model, row, adapter_name).pair
        if not a.is_meta and a.any() and b.any():
            raise ConfigError(
                f"the adapter {adapter_name!r} has been trained ({row.name}), and another start would lose "
                "that: initialize comes before training"
            )
    if loss_fn is not None and start != "lora_ga":
        raise ConfigError(f"init_lora_weights={start!r} needs no gradients: leave out loss_fn")
    check_has_values(model)


def _from_components(model: nn.Module, entry: AdapterRecord, adapter_name: str, data: Data) -> None:
    components = _components(model, entry, data)
    rows = tuple(_sites_with_rank(model, entry, components))
    ranks = {row.name: row.rank for row in rows}
    config = with_patterns(entry.config, by_site(rows))

    def make(row: PlannedSite, weight: torch.Tensor) -> Start:
        data.report(None, f"starting {row.name}")
        return data_start(row, weight, config, components[row.name].a)

    started = dataclasses.replace(entry, config=config, sites=rows, initialized=True)
    restart(model, adapter_name, started, rows, make)
    for row in entry.sites:
        if row.name not in ranks:
            drop_site(model, row, adapter_name)


def _sites_with_rank(
    model: nn.Module, entry: AdapterRecord, components: Mapping[str, _SiteStart]
) -> Iterator[PlannedSite]:
    """Yield the sites to which EVA gives a rank above 0, with this rank.

    Alphas change with the rank if ``adjust_scaling_factors`` is set, so that each site keeps its scale.
    """
    options: Any = entry.config.eva_config
    for row in entry.sites:
        rank, alpha = components[row.name].rank, row.alpha
        if options["adjust_scaling_factors"]:
            alpha = alpha * rank / row.rank
        if rank:
            yield at_rank(model, row, rank, alpha, entry.config)


def _from_statistics(
    model: nn.Module,
    entry: AdapterRecord,
    adapter_name: str,
    data: Data,
    loss_fn: Callable[[Any, Any], Any] | None,
) -> None:
    config, rows = entry.config, entry.sites
    by_weight = config.init_lora_weights == "lora_ga"
    if by_weight:
        seen = gradients(model, rows, data, loss_fn)
    else:
        options: Any = config.corda_config
        half = options["use_float16_for_covariance"]
        seen = moments(model, require_record(model), rows, data, half=half, scaled=True)

    def make(row: PlannedSite, weight: torch.Tensor) -> Start:
        data.report(None, f"starting {row.name}")
        return data_start(row, weight, config, seen[row.site.weight if by_weight else row.name])

    restart(model, adapter_name, dataclasses.replace(entry, initialized=True), rows, make)


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def reporting(progress: Progress, dataloader: Iterable[Any]) -> Iterator[Report]:
    """Yield the callback that reports the number of batches done."""
    try:
        total = len(dataloader)  # type: ignore[arg-type]  # one without a length raises TypeError
    except TypeError:
        total = 0
    # The count may exceed the total, because EVA may go through the batches several times.
    with show_progress(progress, "batch") as tell:
        yield _telling(tell, total)


def _telling(tell: Tell, total: int) -> Report:
    last = 0

    def report(done: int | None, step: str) -> None:
        nonlocal last
        last = last if done is None else done
        tell(last, total, step)

    return report


_ITERATIONS = 4
_MOST_BATCHES = 1000
_log = logging.getLogger("lora_fx")


class Components:
    """The leading principal components of all vectors added so far, updated batch by batch.

    Attributes:
        directions: The components [n, in], of length 1, in order; None before the first batch.
        values: Their singular values.
        shares: The share of the variance that each component explains.
        steady: A mask of the components whose directions the last batch hardly changed.
    """

    def __init__(self, count: int, threshold: float, generator: torch.Generator) -> None:
        self._count = count
        self._threshold = threshold
        self._generator = generator
        self._seen = 0
        self._mean = torch.zeros(0)
        self._spread = torch.zeros(0)  # the variance times the number of vectors seen
        self.directions: torch.Tensor | None = None
        self.values = torch.zeros(0)
        self.shares = torch.zeros(0)
        self.steady = torch.zeros(count, dtype=torch.bool)

    def add(self, batch: torch.Tensor) -> bool:
        """Update the components with a batch, [k, in].

        Returns:
            False if the batch has fewer vectors than there are components: it is skipped then.
        """
        if len(batch) < self._count:
            return False
        batch = batch.to(torch.float32)
        mean, before = batch.mean(0), self.directions
        total = self._seen + len(batch)
        rows = batch - mean
        spread = rows.square().sum(0)
        if before is not None:
            between = (self._seen * len(batch) / total) ** 0.5 * (self._mean - mean)
            rows = torch.cat([self.values[:, None] * before, rows, between[None]])
            spread = spread + self._spread + between.square()
            mean = (self._mean * self._seen + mean * len(batch)) / total
        _, values, directions = low_rank_svd(
            rows[None], 2 * self._count, _ITERATIONS, self._generator
        )
        self._seen, self._mean, self._spread = total, mean, spread
        self.values = values[0, : self._count]
        directions = directions[0, : self._count]
        self.directions = directions * signs(directions)[:, None]
        self.shares = self.values.square() / spread.sum()
        if before is not None:
            turned = F.cosine_similarity(self.directions, before)
            self.steady = (turned >= self._threshold).cpu()
        return True


@dataclasses.dataclass(frozen=True)
class _SiteStart:
    """The rank and the starting A of a site.

    Attributes:
        rank: The rank; 0 for no adapter.
        a: A, [rank, in].
    """

    rank: int
    a: torch.Tensor


def _components(model: nn.Module, entry: AdapterRecord, data: Data) -> dict[str, _SiteStart]:
    """Run the search of EVA, and return the rank and the starting A of each site.

    Args:
        model: A rewritten model with no active adapter. Its graphs are replaced.
        entry: The adapter's record; the options are those of its ``eva_config``.
        data: The data, which may be read several times.

    Raises:
        ConfigError: If an input is not finite, a site is not run, or no batch has as many vectors as a site
            has components.
    """
    rows = entry.sites
    search = _Search(rows, entry.config)
    show_inputs(model, require_record(model), rows, search.see)
    with torch.no_grad():
        for number, batch in _repeated_batches(data, search):
            if search.done:
                break
            steady = sum(search.steady(row.name) for row in rows)
            data.report(number, f"{steady} of {len(rows)} sites have converged")
            search.mask = tokens_seen(batch, search.ignored_label)
            if number == 0:
                search.begin()
                data.output(model.eval(), batch, number)
                search.compare()
            data.output(model.eval(), batch, number)
            search.share()
    return search.result()


def _repeated_batches(data: Data, search: _Search) -> Iterator[tuple[int, Any]]:
    """Yield numbered batches, and go through the data several times, up to a limit.

    The data is not repeated if it had no batch that is large enough for some site.
    """
    number = 0
    while number == 0 or (number < _MOST_BATCHES and not search.lacking):
        start = number
        try:
            for _, batch in data.counted():
                yield number, batch
                number += 1
        except ConfigError:
            if start == 0:
                raise
            return  # The dataloader is an iterator, which is exhausted after one pass.


class _Search:
    """The state of EVA's search for components."""

    def __init__(self, rows: tuple[PlannedSite, ...], config: LoraConfig) -> None:
        options: Any = config.eva_config
        self._config = config
        self._options = options
        self._ranks = {row.name: row.rank for row in rows}
        self._wanted = {
            row.name: min(round(row.rank * options["rho"]), row.site.in_features) for row in rows
        }
        self._inputs: dict[str, str] | None = {}
        self._same: dict[str, str] = {}
        self._found: dict[str, Components] = {}
        self._given: dict[str, int] = {}
        self.mask: torch.Tensor | None = None

    @property
    def ignored_label(self) -> int | None:
        """The label of tokens that the search leaves out; None if labels do not matter."""
        return self._options["label_mask_value"] if self._options["use_label_mask"] else None

    @property
    def done(self) -> bool:
        """True once the components have converged."""
        return bool(self._given) and all(self.steady(name) for name in self._ranks)

    @property
    def lacking(self) -> list[str]:
        """The sites for which no batch had as many vectors as the site has components."""
        return [name for name, components in self._found.items() if components.directions is None]

    def steady(self, name: str) -> bool:
        """Return True if the components that a site gets have converged."""
        if not self._given:
            return False
        components = self._found[self._same[name]]
        return bool(components.steady[: self._given[self._same[name]]].all())

    def begin(self) -> None:
        """Start to record a digest of the input of each site, for the next call of the model."""
        self._inputs = {}

    def compare(self) -> None:
        """Find the sites with equal recorded inputs, and let them share their components."""
        assert self._inputs is not None
        _check_reached([name for name in self._ranks if name not in self._inputs])
        first: dict[str, str] = {}
        for name in self._ranks:
            self._same[name] = first.setdefault(self._inputs[name], name)
        for name, source in self._same.items():
            self._wanted[source] = max(self._wanted[source], self._wanted[name])
        for name, source in self._same.items():
            self._wanted[name] = self._wanted[source]
            if name == source:
                self._found[name] = Components(
                    self._wanted[name], self._options["tau"], site_generator(name, self._config)
                )
        self._given = dict(self._wanted)
        self._inputs = None

    def see(self, row: PlannedSite, x: torch.Tensor) -> None:
        """Add the inputs of a site to its components, or record a digest of them after :meth:`begin`."""
        if self.mask is not None and len(self.mask) == len(x):
            x = x[self.mask.to(x.device)]
        if not torch.isfinite(x).all():
            raise ConfigError(f"{row.name}: the model gives it inputs that are not finite")
        if self._inputs is not None:
            self._inputs.setdefault(row.name, f"{tuple(x.shape)}:{digest_of(x)}")
        elif row.name in self._found and not self.steady(row.name):
            self._found[row.name].add(x)

    def share(self) -> None:
        """Distribute the total rank over the components that explain most of the variance."""
        if not self.lacking:
            shares = {name: components.shares for name, components in self._found.items()}
            self._given = _ranks_by_share(shares, self._same, self._ranks)

    def result(self) -> dict[str, _SiteStart]:
        """Return the rank and the starting A of each site. Warn of sites that have not converged."""
        for name in self.lacking:
            raise ConfigError(
                f"{name}: no batch has the {self._wanted[name]} vectors that its components need "
                "(rank times eva_config['rho']): give larger batches"
            )
        moving = [name for name in self._ranks if not self.steady(name)]
        if moving:
            _log.warning(
                "init_lora_weights='eva': the components of %s still moved when the data ended",
                ", ".join(moving),
            )
        return {name: self._of(name) for name in self._ranks}

    def _of(self, name: str) -> _SiteStart:
        components, rank = self._found[self._same[name]], self._given[name]
        assert components.directions is not None
        a = components.directions[:rank]
        if self._options["whiten"]:
            a = a / components.values[:rank, None].sqrt()
        return _SiteStart(rank, a)


def _ranks_by_share(
    shares: Mapping[str, torch.Tensor], same: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Return the number of components that each site gets. Their total is the sum of the ranks.

    Args:
        shares: The share of the variance that each component explains, for sites that do not use the
            components of another.
        same: For every site, the site whose components it uses.
        ranks: The ranks to distribute. Among sites that use the same components, the site that owns them gets
            the largest rank.
    """
    order = [*shares, *(name for name, source in same.items() if name != source)]
    owners = [name for name in order for _ in shares[same[name]]]
    every = torch.cat([shares[same[name]].cpu() for name in order])
    best = every.argsort(descending=True, stable=True)[: sum(ranks.values())]
    counts = Counter(owners[index] for index in best.tolist())
    allotted = {name: counts.get(name, 0) for name in ranks}
    for name, source in same.items():
        if allotted[source] < allotted[name]:
            allotted[source], allotted[name] = allotted[name], allotted[source]
    return allotted
