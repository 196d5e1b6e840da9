"""Starting values that need data: EVA, CorDA, LoRA-GA.

EVA (Paischer et al. 2024, arXiv:2410.07170) starts A as the principal components of the inputs. It reads
the data until the components of every site stand still. Then it gives the rank of all sites together to the
components that explain most of the variance: a site gets up to ``rho`` times its rank, or none.
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
from lora_fx.config import LoraConfig, changes_base, needs_data
from lora_fx.errors import ConfigError, LoraFxError, some
from lora_fx.ir import AdapterRecord, ModelT, PlannedSite, Record, Region, Site, require_record
from lora_fx.kinds import kind_of
from lora_fx.passes.graph import install
from lora_fx.passes.insert import (
    See,
    Start,
    computed_starts,
    data_start,
    drop_site,
    initial_start,
    low_rank_svd,
    observed,
    place_slots,
    place_start,
    signs,
    site_generator,
    slot_start,
)
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

__all__ = [
    "Components",
    "Data",
    "Forward",
    "Report",
    "gradients",
    "initialize",
    "loss_of",
    "moments",
    "restart",
    "show_inputs",
    "tokens_seen",
]

# --- statistics of data ---------------------------------------------------------------------------


Forward = Callable[[nn.Module, Any], Any]
"""How to call a model with a batch."""

Report = Callable[[int | None, str], None]
"""Is told how many batches are done (None: as many as before), and what is being done."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a start is computed from.

    Attributes:
        batches: A tensor is the model's one argument, a tuple or list has all of them, and a mapping has
            them by name.
        device: Where the model is.
        forward: How to call the model with a batch, where it is not so.
        report: Is told of every batch.
    """

    batches: Iterable[Any]
    device: torch.device
    forward: Forward | None
    report: Report

    def counted(self) -> Iterator[tuple[int, Any]]:
        """The batches of one pass, with their numbers, where the model is.

        Raises:
            ConfigError: If there are none.
        """
        number = -1
        for number, batch in enumerate(self.batches):
            yield number, _on_device(batch, self.device)
        if number < 0:
            raise ConfigError("the dataloader is empty: give at least one batch")

    def output(self, model: nn.Module, batch: Any, number: int) -> Any:
        """The model's output for a batch.

        Raises:
            ConfigError: If the model does not take it.
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
    """The loss of an output.

    Raises:
        ConfigError: If there is none, or it has no gradient.
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
    """A batch with its tensors on a device."""
    if hasattr(value, "to") and not isinstance(value, type):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _on_device(one, device) for key, one in value.items()}
    if isinstance(value, tuple | list):
        parts = [_on_device(one, device) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tokens_seen(batch: Any, ignored_label: int | None) -> torch.Tensor | None:
    """Which tokens of a batch count: those that the attention mask has, and that are labeled.

    Args:
        batch: A batch; only a mapping of a language model's inputs says something of tokens.
        ignored_label: The label of those that are not; None if labels do not matter.

    Returns:
        A mask of all tokens, flat; None if every vector counts.
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
    """From now on a model with no active adapter shows what sites read.

    Layers that are written out, and would apply weights where nothing sees it, run their graphs.
    """
    capture = base_capture(model, record)
    seen: dict[str, Region] = {one.fqn: one for one in observed(capture, rows, see)}
    capture = dataclasses.replace(capture, regions={**capture.regions, **seen})
    install(regions_to_install(capture, rows))


def moments(
    model: nn.Module,
    record: Record,
    rows: tuple[PlannedSite, ...],
    data: Data,
    *,
    half: bool,
) -> dict[str, torch.Tensor]:
    """The mean of ``XᵀX`` over all calls, each X [n, in] divided by its largest value, by site.

    Args:
        model: A rewritten model with no active adapter. Its graphs are other ones afterwards.
        record: Its record.
        rows: The sites.
        data: The data.
        half: Whether to compute in the inputs' own dtype, not in fp32 (``use_float16_for_covariance``).

    Raises:
        ConfigError: If an input is not finite, or a site is not run.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys((row.name for row in rows), 0)

    def see(row: PlannedSite, x: torch.Tensor) -> None:
        x = x if half else x.float()
        # PEFT's measure; the largest magnitude where no value is above zero.
        largest = x.max().abs()
        x = x / torch.where(largest > 0, largest, x.abs().max().clamp_min(1e-30))
        product = x.T @ x
        if not torch.isfinite(product).all():
            raise ConfigError(f"{row.name}: the model gives it inputs that are not finite")
        sums[row.name] = sums[row.name] + product if row.name in sums else product
        counts[row.name] += 1

    show_inputs(model, record, rows, see)
    with torch.no_grad():
        for number, batch in data.counted():
            data.report(number, "collecting second moments")
            data.output(model.eval(), batch, number)
    _check_reached([name for name, count in counts.items() if count == 0])
    return {name: value / counts[name] for name, value in sums.items()}


def gradients(
    model: nn.Module,
    rows: tuple[PlannedSite, ...],
    data: Data,
    loss_fn: Callable[[Any, Any], Any] | None,
) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss, by weight: fp32, on the CPU.

    Every gradient goes to the CPU as soon as it is there: the device never holds more than one.

    Args:
        model: A rewritten model with no active adapter.
        rows: The sites.
        data: The data.
        loss_fn: The loss of an output and a batch.

    Raises:
        ConfigError: If a gradient is not finite, there is no loss, or a weight has no gradient.
    """
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
                torch.autograd.backward(loss_of(output, batch, loss_fn))
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
    """A leaf over the same values in place of a weight: what is tied to that has no part in it."""
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
    """Computes starts from the base as it was, and puts them in; all of them or none.

    Args:
        model: A rewritten model; changed in place, its graphs are not.
        adapter_name: An adapter of it, active or not.
        entry: What its record becomes, but for the weights that the starts change.
        rows: The sites that start again.
        make: The start of a site, from its weight; by default what the entry's configuration says.
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
    """Gives an adapter the start that its configuration names, where the rewrite could not.

    A model that was rewritten on the meta device, sharded and given memory (``to_empty``) has no start: call
    this without data, in every process. The start is that of a plain rewrite to the last bit, in each
    process its part of it. An adapter that has been trained loses that.

    ``eva`` (arXiv:2410.07170) looks at the inputs of the sites and shares out their ranks, ``corda``
    (arXiv:2406.05223) looks at the inputs' second moments, ``lora_ga`` (arXiv:2407.05000) at the gradients
    of the weights. The last two change the base as the model has it; the model that was rewritten is not
    touched, and a merge and a saved adapter are relative to that.

    Call it before an optimizer is made and before the model is wrapped: factors are new parameters
    afterwards, and with ``eva`` of other shapes. Several processes have to be given the same data.

    Args:
        model: A rewritten model; it is changed.
        dataloader: None for a start that needs no data. Otherwise batches: a tensor, a tuple or list of the
            arguments, or a mapping of them by name. They are moved to where the model is. ``eva`` may go
            through them several times, and leaves out tokens that an ``attention_mask`` or ``labels`` leave
            out.
        adapter_name: Which adapter; by default the only one, or the only active one.
        loss_fn: For ``lora_ga``, the loss of the model's output and the batch; by default the output's
            ``loss``, or the output itself.
        forward: How to call the model with a batch, where it is not as above.
        progress: Whether to show a progress bar (if tqdm is installed), or a function that is called with
            (batches done, batches in all or 0, what is being done).

    Returns:
        The model itself.

    Raises:
        ConfigError: If several adapters could be meant, the adapter needs no data and gets some, or needs
            some and gets none, or has more than factors and no data, has its start already or
            has been trained, the data is empty, is not what the model takes, does not reach a site, or gives
            values that are not finite, or the model is on the meta device. The model is as it was then.
    """
    adapter_name = the_adapter(model, adapter_name)
    entry = adapter_record(model, adapter_name)
    if dataloader is None:
        _start_plainly(model, entry, adapter_name)
        return model
    _check(model, entry, adapter_name, loss_fn)
    with ExitStack() as stack:
        report = stack.enter_context(_reporting(progress, dataloader))
        # What training mode draws is the same each time, and no random numbers of others are used up.
        device = next(model.parameters()).device
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(entry.config.seed or 0)
        stack.enter_context(_same_modes(model))
        stack.enter_context(disable_adapter(model))
        data = Data(dataloader, device, forward, report)
        if entry.config.init_lora_weights == "eva":
            _from_components(model, entry, adapter_name, data)
        else:
            _from_statistics(model, entry, adapter_name, data, loss_fn)
    return model


def _start_plainly(model: nn.Module, entry: AdapterRecord, adapter_name: str) -> None:
    """Writes the start that a rewrite computes into the parameters that are there."""
    start = entry.config.init_lora_weights
    if needs_data(start):
        raise ConfigError(f"init_lora_weights={start!r} needs data: give initialize() a dataloader")
    if changes_base(start) or entry.own or entry.tokens:
        raise ConfigError(
            f"the adapter {adapter_name!r} has values of the base in it (init_lora_weights={start!r}, "
            "modules_to_save, bias, trainable_token_indices): rewrite the model when it has its weights"
        )
    _check_has_values(model)
    reshard(model)
    for row in entry.sites:
        there = factors_of(model, row, adapter_name)
        if kind_of(row).low_rank and not row.tied:
            begun = initial_start(row, _stand_in(model, row.site), entry.config)
            write(there.a, begun.a)
            write(there.b, begun.b)
        slots = kind_of(row).slots(row.site)
        if not slots:
            continue
        weight = gathered(base_weight(model, row.site))
        low_rank = kind_of(row).low_rank
        pair = (gathered(there.a), gathered(there.b)) if low_rank else None
        for slot in slots:
            write(there.slots[slot.name], slot_start(row, slot, weight, pair, entry.config))


def _stand_in(model: nn.Module, site: Site) -> torch.Tensor:
    """A weight's shape, dtype and device: a start that does not read it needs no more."""
    device = weight_at(model, site.weight).device
    return torch.empty((), dtype=base_dtype(model, site), device=device).expand(site.weight_shape)


def _check_has_values(model: nn.Module) -> None:
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
    _check_has_values(model)


def _from_components(model: nn.Module, entry: AdapterRecord, adapter_name: str, data: Data) -> None:
    found = _components(model, entry, data)
    rows = tuple(_shared_out(model, entry, found))
    ranks = {row.name: row.rank for row in rows}
    config = with_patterns(entry.config, by_site(rows))

    def make(row: PlannedSite, weight: torch.Tensor) -> Start:
        data.report(None, f"starting {row.name}")
        return data_start(row, weight, config, found[row.name].a)

    started = dataclasses.replace(entry, config=config, sites=rows, initialized=True)
    restart(model, adapter_name, started, rows, make)
    for row in entry.sites:
        if row.name not in ranks:
            drop_site(model, row, adapter_name)


def _shared_out(
    model: nn.Module, entry: AdapterRecord, found: Mapping[str, _Found]
) -> Iterator[PlannedSite]:
    """The sites that have a rank, with alphas that keep their scales or not."""
    options: Any = entry.config.eva_config
    for row in entry.sites:
        rank, alpha = found[row.name].rank, row.alpha
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
        seen = moments(model, require_record(model), rows, data, half=half)

    def make(row: PlannedSite, weight: torch.Tensor) -> Start:
        data.report(None, f"starting {row.name}")
        return data_start(row, weight, config, seen[row.site.weight if by_weight else row.name])

    restart(model, adapter_name, dataclasses.replace(entry, initialized=True), rows, make)


@contextmanager
def _same_modes(model: nn.Module) -> Iterator[None]:
    """Puts back which modules train."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _reporting(progress: Progress, dataloader: Iterable[Any]) -> Iterator[Report]:
    """Give the function that is told how many batches are done."""
    try:
        total = len(dataloader)  # type: ignore[arg-type]  # one without a length raises TypeError
    except TypeError:
        total = 0
    # EVA may go through the batches again.
    with show_progress(progress, "batch") as tell:
        yield _telling(tell, total)


def _telling(tell: Tell, total: int) -> Report:
    last = 0

    def report(done: int | None, what: str) -> None:
        nonlocal last
        last = last if done is None else done
        tell(last, total, what)

    return report


_ITERATIONS = 4
_MOST_BATCHES = 1000
_log = logging.getLogger("lora_fx")


class Components:
    """The leading components of all vectors that were seen.

    Attributes:
        directions: The components [n, in], of length 1, in order; None before the first batch.
        values: Their singular values.
        shares: Which share of the variance each one explains.
        steady: Which of them the last batch has hardly turned.
    """

    def __init__(self, count: int, threshold: float, generator: torch.Generator) -> None:
        self._count = count
        self._threshold = threshold
        self._generator = generator
        self._seen = 0
        self._mean = torch.zeros(0)
        self._spread = torch.zeros(0)  # the variance, times how many were seen
        self.directions: torch.Tensor | None = None
        self.values = torch.zeros(0)
        self.shares = torch.zeros(0)
        self.steady = torch.zeros(count, dtype=torch.bool)

    def add(self, batch: torch.Tensor) -> bool:
        """Takes a batch in, [k, in].

        Returns:
            False if it has fewer vectors than there are components: it is left out then.
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
class _Found:
    """What a site gets.

    Attributes:
        rank: Its rank; 0 for no adapter.
        a: A, [rank, in].
    """

    rank: int
    a: torch.Tensor


def _components(model: nn.Module, entry: AdapterRecord, data: Data) -> dict[str, _Found]:
    """Ranks and components, by site.

    Args:
        model: A rewritten model with no active adapter. Its graphs are other ones afterwards.
        entry: The adapter's record; options are those of ``eva_config``.
        data: It may be gone through several times.

    Raises:
        ConfigError: If an input is not finite, a site is not run, or no batch has as many vectors as a site
            has components.
    """
    rows = entry.sites
    search = _Search(rows, entry.config)
    show_inputs(model, require_record(model), rows, search.see)
    with torch.no_grad():
        for number, batch in _again_and_again(data, search):
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


def _again_and_again(data: Data, search: _Search) -> Iterator[tuple[int, Any]]:
    """The batches, from the first one again after the last one, up to a limit."""
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
            return  # an iterator, which can be gone through once


class _Search:
    """The state of the search."""

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
        """Tokens of this label do not count."""
        return self._options["label_mask_value"] if self._options["use_label_mask"] else None

    @property
    def done(self) -> bool:
        """Whether nothing moves any more."""
        return bool(self._given) and all(self.steady(name) for name in self._ranks)

    @property
    def lacking(self) -> list[str]:
        """Sites that no batch was large enough for."""
        return [name for name, found in self._found.items() if found.directions is None]

    def steady(self, name: str) -> bool:
        """Whether the components that a site gets stand still."""
        if not self._given:
            return False
        found = self._found[self._same[name]]
        return bool(found.steady[: self._given[self._same[name]]].all())

    def begin(self) -> None:
        """The next call of the model shows which sites read the same."""
        self._inputs = {}

    def compare(self) -> None:
        """Sites that read the same share their components."""
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
        """What a site reads."""
        if self.mask is not None and len(self.mask) == len(x):
            x = x[self.mask.to(x.device)]
        if not torch.isfinite(x).all():
            raise ConfigError(f"{row.name}: the model gives it inputs that are not finite")
        if self._inputs is not None:
            self._inputs.setdefault(row.name, f"{tuple(x.shape)}:{digest_of(x)}")
        elif row.name in self._found and not self.steady(row.name):
            self._found[row.name].add(x)

    def share(self) -> None:
        """Gives the rank of all sites to the components that explain most."""
        if not self.lacking:
            shares = {name: found.shares for name, found in self._found.items()}
            self._given = _ranks_by_share(shares, self._same, self._ranks)

    def result(self) -> dict[str, _Found]:
        """What the search has come to."""
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

    def _of(self, name: str) -> _Found:
        found, rank = self._found[self._same[name]], self._given[name]
        assert found.directions is not None
        a = found.directions[:rank]
        if self._options["whiten"]:
            a = a / found.values[:rank, None].sqrt()
        return _Found(rank, a)


def _ranks_by_share(
    shares: Mapping[str, torch.Tensor], same: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, int]:
    """How many components each site gets, of as many as the ranks are together.

    Args:
        shares: Which share of the variance each component explains, by site that has some of its own.
        same: For every site the one whose components it has.
        ranks: The ranks to give away. Among sites of the same components the one that owns them gets most.
    """
    order = [*shares, *(name for name, source in same.items() if name != source)]
    owners = [name for name in order for _ in shares[same[name]]]
    every = torch.cat([shares[same[name]].cpu() for name in order])
    best = every.argsort(descending=True, stable=True)[: sum(ranks.values())]
    counts = Counter(owners[index] for index in best.tolist())
    given = {name: counts.get(name, 0) for name in ranks}
    for name, source in same.items():
        if given[source] < given[name]:
            given[source], given[name] = given[name], given[source]
    return given
