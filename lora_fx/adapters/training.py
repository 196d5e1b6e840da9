"""What a training loop takes: parameter groups, corrected gradients, losses of several adapters."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_fx.errors import ConfigError
from lora_fx.ir import PlannedSite, Record, record_of, require_record
from lora_fx.kinds import kind_of
from lora_fx.passes.parameters import (
    adapter_parameters,
    claim_unfrozen,
    factors_of,
    inside,
    own_value,
    without_wrappers,
)
from lora_fx.runtime import IDS

__all__ = ["adapter_losses", "correct_gradients", "parameter_groups", "train_together"]

# --- what an optimizer is given -------------------------------------------------------------------
# What an optimizer is given: parameter groups, and the gradient of LoRA-FA.
#
# LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354) trains B faster than A. LoRA-FA (Zhang et al.
# 2023, arXiv:2308.03303) does not train A: what a layer saves for backward is then of rank r, and
# the gradient of B is corrected so that the step of ``B A`` comes closest to that of a full weight.


# With LoRA+ the factors of an embedding keep a rate of their own, by default PEFT's and its authors'.
_EMBEDDING_LR = 1e-6
# What keeps A Aᵀ invertible; PEFT's.
_RIDGE = 1e-8


@inside
def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lora_plus_ratio: float | None = None,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
    lora_fa: bool = False,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups, each parameter once: what ``torch.optim`` takes.

    ========== ============================================================== ============== ============
    name       holds                                                          learning rate  weight decay
    ========== ============================================================== ============== ============
    lora_A     A                                                              lr             as given
    lora_B     B                                                              lr · ratio     as given
    embeddings A and B of embeddings, and of heads that are tied to them      embedding_lr   as given
    modules    what else is a matrix: weights of modules_to_save, token rows  lr             as given
    vectors    biases, norms, magnitudes                                      lr · ratio     0
    ========== ============================================================== ============== ============

    A group without parameters is left out. Rates are those of PEFT's ``create_loraplus_optimizer`` (which has
    a magnitude of a convolution among the A), and so is weight decay but for vectors, of which PEFT decays
    those that are not called a bias. Without a ratio all rates are ``lr``: then the groups differ in their
    weight decay alone.

    Args:
        model: A rewritten model.
        lr: The learning rate.
        lora_plus_ratio: LoRA+: how much faster than A the factor B is trained, above 0; 16 in the paper.
        weight_decay: For all but vectors.
        embedding_lr: The rate of the factors of embeddings. By default ``lr``, and with a ratio
            PEFT's 1e-6.
        lora_fa: LoRA-FA: A is frozen here and in no group, except that of an embedding. The optimizer is
            to be given to :func:`correct_gradients`, too.
        adapter_name: Only the parameters of this adapter, for an optimizer or a learning rate of its own; by
            default all that are trained.

    Returns:
        Groups for any optimizer of torch: ``AdamW(parameter_groups(model, 1e-4))``; ``name`` is one more
        key of each, by which a group can be given options of its own.

    Raises:
        ConfigError: If the model has no adapters, not the one that is named, or nothing in it is trained, or
            a number is none that an optimizer can use. Nothing is frozen then.
    """
    record = require_record(model)
    for name, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("embedding_lr", embedding_lr),
        ("lora_plus_ratio", lora_plus_ratio),
    ):
        _check_number(name, value)
    if lora_plus_ratio == 0:
        raise ConfigError(
            "lora_plus_ratio: found 0; B would never be trained: give a number above 0"
        )
    if embedding_lr is None:
        embedding_lr = lr if lora_plus_ratio is None else _EMBEDDING_LR
    fast = lr * (lora_plus_ratio or 1.0)
    frozen = _first_factors(model, record, adapter_name) if lora_fa else []
    mine = None if adapter_name is None else _of_adapter(model, record, adapter_name)
    left_out = {id(a) for a in frozen}
    kinds = _kinds(model, record)
    members: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if mine is not None and id(parameter) not in mine:
            continue
        if parameter.requires_grad and id(parameter) not in left_out:
            kind = kinds.get(id(parameter), "modules" if parameter.dim() > 1 else "vectors")
            members.setdefault(kind, []).append(parameter)
    if not members:
        raise ConfigError(
            "nothing in the model is trained: no parameter requires a gradient; activate an adapter first"
        )
    for a in frozen:
        a.requires_grad_(False)
    claim_unfrozen(model)
    rates = {
        "lora_A": lr,
        "lora_B": fast,
        "embeddings": embedding_lr,
        "modules": lr,
        "vectors": fast,
    }
    return [
        {
            "name": name,
            "params": members[name],
            "lr": rate,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, rate in rates.items()
        if name in members
    ]


def correct_gradients(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """LoRA-FA: before each step, ``g ← g (A Aᵀ)⁻¹ / s²`` for the gradient ``g`` of every B.

    With A fixed, a step of B by this changes ``s B A`` by the projection of the full weight's gradient on
    what A spans (arXiv:2308.03303, section 3). The gradients are replaced when ``optimizer.step()`` begins,
    after they were accumulated, reduced, unscaled and clipped; they belong to that step.

    Args:
        optimizer: Of any kind, over the groups of ``parameter_groups(..., lora_fa=True)``.
        model: The model of those groups.

    Returns:
        A handle; ``remove()`` ends it.

    Raises:
        ConfigError: If the model has no adapters, the optimizer trains an A, or it trains no B of the model
            whose A is fixed. Later, if a step is given a closure, which makes its gradients after this.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = []
    with without_wrappers(model) as inner:
        rows = [(*one, factors_of(inner, *one).pair) for one in _rows(require_record(inner))]
    for row, adapter, (a, b) in rows:
        if id(a) in trained:
            raise ConfigError(
                f"{row.name}: the optimizer trains A of adapter {adapter!r}; make its groups with "
                "parameter_groups(model, lr, lora_fa=True)"
            )
        if id(b) in trained:
            pairs.append((row, a, b))
    if not pairs:
        raise ConfigError("the optimizer trains no B of this model; give the model of its groups")

    def before(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first argument is the optimizer itself.
        if any(one is not None for one in (*args[1:], kwargs.get("closure"))):
            raise ConfigError(
                "optimizer.step was given a closure, whose gradients LoRA-FA cannot correct; "
                "call backward() first, then step()"
            )
        for row, a, b in pairs:
            # At scale 0 the gradient is 0, and stays so.
            if b.grad is not None and row.scale:
                b.grad = _corrected(row, a.detach(), b.grad)

    return optimizer.register_step_pre_hook(before)


def _corrected(row: PlannedSite, a: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """``g (A Aᵀ + ε)⁻¹ / s²`` for each expert or group, or for all at once."""
    count = row.site.experts or row.site.groups
    rank = row.rank if row.site.experts else row.rank // row.site.groups
    # No half type can be solved in, and their squares would lose what the ridge adds.
    wide = torch.promote_types(a.dtype, torch.float32)
    a = a.to(wide).reshape(count, rank, -1)
    gram = a @ a.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    flat = gradient.to(wide).reshape(count, -1, rank)
    solved: torch.Tensor = torch.linalg.solve(gram, flat, left=False) / row.scale**2
    return solved.reshape(gradient.shape).to(gradient.dtype)


def _rows(record: Record) -> Iterator[tuple[PlannedSite, str]]:
    """Sites with factors of their own in a product: not lookups, of which no input is saved."""
    for adapter, one in record.adapters.items():
        for row in one.sites:
            factors = kind_of(row).low_rank and not row.tied
            if factors and row.site.family != "embedding":
                yield row, adapter


def _kinds(model: nn.Module, record: Record) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for adapter, one in record.adapters.items():
        for row in one.sites:
            table = row.tied or row.site.family == "embedding"
            found = factors_of(model, row, adapter)
            # The magnitude of a convolution has four dimensions, of which three are 1.
            kinds |= {id(one): "vectors" for one in found.present}
            if not kind_of(row).low_rank:
                continue
            kinds |= {
                id(found.a): "embeddings" if table else "lora_A",
                id(found.b): "embeddings" if table else "lora_B",
            }
    return kinds


def _first_factors(
    model: nn.Module, record: Record, adapter_name: str | None
) -> list[nn.Parameter]:
    rows = [one for one in _rows(record) if adapter_name in (None, one[1])]
    return [factors_of(model, row, adapter).a for row, adapter in rows]


def _of_adapter(model: nn.Module, record: Record, adapter_name: str) -> set[int]:
    """What an adapter trains, and has in place of the base's parameters."""
    if adapter_name not in record.adapters:
        has = ", ".join(map(repr, record.adapters))
        raise ConfigError(f"there is no adapter {adapter_name!r}: the model has {has}")
    own = [own_value(model, adapter_name, name) for name in record.adapters[adapter_name].own]
    return {id(one) for one in (*adapter_parameters(model, adapter_name), *own)}


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name}: found {value!r}; give a finite number of at least 0")


# --- several adapters by one batch ----------------------------------------------------------------
# Trains several adapters by one batch, each by the loss of its own rows: in any loop, and in a
# Trainer.


_TrainerT = TypeVar("_TrainerT")

_IGNORED = -100


def adapter_losses(
    logits: Tensor,
    labels: Tensor,
    ids: Sequence[str | None],
    *,
    shift: bool = True,
    label_smoothing: float = 0.0,
    counts: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """The mean cross entropy of each adapter over the rows that it has in a batch.

    The sum of the means gives each adapter the gradient that a step of its own with these rows alone would
    give it. (A mean over the whole batch, as models of transformers compute it, would weigh each adapter by
    its share of the tokens.) Rows without an adapter train nothing, and are left out.

    Args:
        logits: [samples, tokens, classes], or [samples, classes] for a class of each row.
        labels: [samples, tokens] or [samples]; -100 is left out, as in transformers.
        ids: The adapter of each sample, or None, as for :func:`lora_fx.adapter_ids`.
        shift: Whether the label of a token is that of the next one, as causal language models have it. It
            says nothing where a row has one class.
        label_smoothing: As of ``torch.nn.functional.cross_entropy``.
        counts: Over how many labels the mean of each adapter is taken; by default over those of this batch.
            For gradient accumulation, and for several processes, where each has a part of an adapter's rows.

    Returns:
        For each adapter its mean, a scalar that has a gradient; 0 where it has no label.

    Raises:
        ConfigError: If shapes do not match, or there is another number of samples.
    """
    sums, found = _sums(logits, labels, ids, shift=shift, label_smoothing=label_smoothing)
    return {name: sums[name] / max(1, (counts or found)[name]) for name in sums}


def _sums(
    logits: Tensor,
    labels: Tensor,
    ids: Sequence[str | None],
    *,
    shift: bool,
    label_smoothing: float,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The sum of the losses of each adapter, and over how many labels it is taken."""
    if logits.shape[:-1] != labels.shape or labels.dim() not in (1, 2):
        raise ConfigError(
            f"labels of shape {tuple(labels.shape)} do not match logits of shape {tuple(logits.shape)}: "
            "a label for each token [samples, tokens], or one for each row [samples], is needed"
        )
    if labels.is_floating_point():
        raise ConfigError("labels are no whole numbers: a cross entropy of classes needs such")
    if len(ids) != labels.shape[0]:
        raise ConfigError(f"ids name {len(ids)} sample(s), and the batch has {labels.shape[0]}")
    if shift and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    each = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32)),
        labels.reshape(-1),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    of_rows = each.view(*labels.shape, 1).flatten(1).sum(1)
    numbers = (labels != _IGNORED).unsqueeze(-1).flatten(1).sum(1).tolist()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, rows in _by_name(ids).items():
        sums[name] = of_rows[torch.tensor(rows, device=of_rows.device)].sum()
        counts[name] = sum(numbers[row] for row in rows)
    return sums, counts


def _by_name(ids: Sequence[str | None]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return rows


def train_together(trainer: type[_TrainerT], column: str = "adapter") -> type[_TrainerT]:
    """A subclass of transformers' ``Trainer`` that trains all adapters of a batch in one step.

    Rows of the dataset say in a column which adapter they train; None trains nothing. Each adapter gets the
    gradient of the mean loss of its own rows, over all accumulated batches and all processes, and its
    gradient is clipped by itself to ``max_grad_norm``. One that has no row in a step is not stepped: its
    optimizer state and its weight decay stay as well. So it is trained as by a trainer of its own, with the
    learning rates of its parameter groups (:func:`lora_fx.parameter_groups` with ``adapter_name``). What is
    logged as the loss is the sum over the adapters; ``loss_NAME`` is that of each.

    Args:
        trainer: ``transformers.Trainer``, or a subclass whose loss is that of the model.
        column: The column, removed before the data collator sees the rows.

    Returns:
        The subclass. Its model is rewritten, with ``lora_fx.set_adapter(model, names, per_sample=True)``, and
        its arguments have ``remove_unused_columns=False``. Losses are cross entropies of the labels, of
        tokens or of rows; override ``adapter_losses(outputs, labels, ids, counts)`` for others.

    Raises:
        ConfigError: When it is made, if model or arguments are not so. When it trains, if a row has no such
            column or names no adapter, or the model's loss is not known.
    """
    found: Any = _class_over
    made: type[_TrainerT] = found(trainer, column)
    return made


@functools.cache
def _class_over(trainer: Any, column: str) -> Any:
    members = {"__module__": __name__, "adapter_column": column}
    return type(f"Together{trainer.__name__}", (_Together, trainer), members)


class _Collator:
    """Takes the adapters out of the rows of a batch, and puts their numbers into it."""

    def __init__(
        self, collate: Callable[[list[Any]], Any], names: Sequence[str], column: str
    ) -> None:
        self.collate, self.names, self.column = collate, tuple(names), column

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        rest, numbers = [], []
        for row in rows:
            if self.column not in row:
                raise ConfigError(
                    f"a row of the dataset has no column {self.column!r}, which says what adapter it trains; "
                    f"it has {', '.join(map(repr, row))}"
                )
            name = row[self.column]
            if name is not None and name not in self.names:
                has = ", ".join(map(repr, self.names))
                raise ConfigError(
                    f"a row of the dataset names the adapter {name!r}; the model trains {has}"
                )
            numbers.append(-1 if name is None else self.names.index(name))
            rest.append({key: value for key, value in row.items() if key != self.column})
        batch = dict(self.collate(rest))
        sizes = {len(one) for one in batch.values() if isinstance(one, Tensor) and one.dim()}
        if sizes != {len(rows)}:
            raise ConfigError(
                f"the data collator makes tensors of {sorted(sizes)} rows out of {len(rows)} rows of the "
                "dataset: each sample has to stay a row of its own (no packing, no padding-free batches)"
            )
        return {**batch, IDS: torch.tensor(numbers)}


class _Tally:
    """Sums of losses by adapter, until they are logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        for name, one in sums.items():
            self.sums[name] = self.sums.get(name, 0) + one.detach()
            self.counts[name] = self.counts.get(name, 0) + counts[name]


# Loss functions of transformers that are cross entropies, and whether they shift the labels of tokens.
_LOSSES = {
    "ForCausalLM": True,
    "ForMaskedLM": False,
    "ForTokenClassification": False,
    "ForSequenceClassification": False,
    "ForImageClassification": False,
}


class _Together:
    """What :func:`train_together` puts in front of a Trainer."""

    adapter_column = "adapter"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        self._names = _trained_together(me.model)
        _check_arguments(me)
        me.data_collator = _Collator(me.data_collator, self._names, self.adapter_column)
        # A Trainer does not divide such a loss by the number of accumulated batches.
        me.compute_loss_func = self.adapter_losses
        self._counts: dict[str, float] = {}
        self._tallies = {"": _Tally(), "eval_": _Tally()}
        self._hooked: Any = None

    def adapter_losses(
        self,
        outputs: Any,
        labels: Tensor,
        ids: Sequence[str | None],
        counts: Mapping[str, float] | None,
    ) -> dict[str, Tensor]:
        """The loss of each adapter.

        Args:
            outputs: Of the model.
            labels: The labels of the batch.
            ids: The adapter of each row.
            counts: Over how many labels each mean is taken; None for those of this batch.
        """
        me: Any = self
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        options = {
            "shift": _shifts(me.accelerator.unwrap_model(me.model)),
            "label_smoothing": me.args.label_smoothing_factor,
        }
        return adapter_losses(logits, labels, ids, counts=counts, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sum of the losses of all adapters in the batch."""
        me: Any = self
        inner = me.accelerator.unwrap_model(me.model)
        if _trained_together(inner) != self._names:
            raise ConfigError(
                f"the adapters of the model are not those that it had when the trainer was made "
                f"({', '.join(map(repr, self._names))}): make a new one"
            )
        given = dict(inputs)
        labels = given["labels"] if _makes_inputs_of_labels(inner) else given.pop("labels", None)
        if labels is None:
            raise ConfigError("the batch has no 'labels': the loss of each adapter is made of them")
        ids = [self._names[one] if one >= 0 else None for one in given[IDS].tolist()]
        outputs = model(**given)
        counts = self._counts if model.training else None
        losses = self.adapter_losses(outputs, labels, ids, counts)
        own = self._labels_of(labels, ids)
        over = counts or own
        sums = {name: one * max(1, over[name]) for name, one in losses.items()}
        self._tallies["" if model.training else "eval_"].add(sums, own)
        loss = sum(losses.values(), torch.zeros((), device=labels.device))
        if not loss.requires_grad and model.training:
            # No row trains anything.
            loss = loss + _first(outputs).sum() * 0.0
        if model.training:
            # DDP and FSDP take the mean over processes; the counts are those of all of them.
            loss = loss * me.accelerator.num_processes
        if not return_outputs:
            return loss
        return loss, outputs if isinstance(outputs, Mapping) else (loss, *outputs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step: their labels are counted."""
        me: Any = self
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        counts = dict.fromkeys(self._names, 0)
        for batch in found[0]:
            if "labels" not in batch:
                continue
            ids = [self._names[one] if one >= 0 else None for one in batch[IDS].tolist()]
            for name, count in self._labels_of(batch["labels"], ids).items():
                counts[name] += count
        numbers = torch.tensor([*counts.values()], device=me.args.device)
        numbers = me.accelerator.reduce(numbers, "sum")
        self._counts = dict(zip(self._names, numbers.tolist(), strict=True))
        return found

    def _labels_of(self, labels: Tensor, ids: Sequence[str | None]) -> dict[str, int]:
        """How many labels each adapter has in a batch."""
        me: Any = self
        if labels.dim() == 2 and _shifts(me.accelerator.unwrap_model(me.model)):
            labels = labels[:, 1:]
        numbers = (labels != _IGNORED).reshape(len(labels), -1).sum(1).tolist()
        return {name: sum(numbers[row] for row in rows) for name, rows in _by_name(ids).items()}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer, which does not step adapters without rows."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if optimizer is not None and optimizer is not self._hooked:
            optimizer.register_step_pre_hook(lambda *_: self._leave_out())
            self._hooked = optimizer
        return optimizer

    def _leave_out(self) -> None:
        for name, parameters in self._parameters():
            if not self._counts.get(name):
                for parameter in parameters:
                    parameter.grad = None

    def _parameters(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        me: Any = self
        model = me.accelerator.unwrap_model(me.model)
        for name in self._names:
            yield name, [one for one in adapter_parameters(model, name) if one.requires_grad]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips the gradient of each adapter by itself, as a trainer of its own would; their joint norm."""
        me: Any = self
        me.accelerator.unscale_gradients()
        each = [
            nn.utils.clip_grad_norm_(parameters, me.args.max_grad_norm)
            for _, parameters in self._parameters()
        ]
        joint: Tensor = torch.linalg.vector_norm(
            torch.stack([one.to(each[0].device) for one in each])
        )
        return joint

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with the mean loss of each adapter since the last time."""
        me: Any = self
        for prefix, tally in self._tallies.items():
            if f"{prefix}loss" not in logs:
                continue
            zeros = torch.zeros((), device=me.args.device)
            sums = torch.stack([tally.sums.get(name, zeros).float() for name in self._names])
            numbers = [tally.counts.get(name, 0.0) for name in self._names]
            counts = torch.tensor(numbers, device=me.args.device)
            sums, counts = (me.accelerator.reduce(one, "sum") for one in (sums, counts))
            means = zip(self._names, sums.tolist(), counts.tolist(), strict=True)
            logs |= {f"{prefix}loss_{name}": one / count for name, one, count in means if count}
            self._tallies[prefix] = _Tally()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _trained_together(model: nn.Module) -> tuple[str, ...]:
    """The adapters that the rows of a batch may have.

    Raises:
        ConfigError: If the model is not prepared for that.
    """
    if record_of(model) is None or not require_record(model).per_sample:
        raise ConfigError(
            "the model is not prepared for batches of several adapters: call "
            "lora_fx.set_adapter(model, names, per_sample=True) before the trainer is made"
        )
    return require_record(model).active


def _check_arguments(trainer: Any) -> None:
    arguments = trainer.args
    if arguments.remove_unused_columns:
        raise ConfigError(
            f"remove_unused_columns: the Trainer would remove the column {trainer.adapter_column!r}; set it "
            "to False"
        )
    if arguments.n_gpu > 1:
        raise ConfigError(
            "the Trainer would cut a batch for DataParallel, and not the names of its rows' adapters: start "
            "a process for each GPU (torchrun)"
        )
    if trainer.compute_loss_func is not None:
        raise ConfigError(
            "compute_loss_func gives one loss for the batch: override adapter_losses in a subclass"
        )
    clips = arguments.max_grad_norm is not None and arguments.max_grad_norm > 0
    if clips and not hasattr(super(_Together, trainer), "_clip_grad_norm"):
        raise ConfigError(
            "max_grad_norm: this version of transformers clips the gradients of all adapters together; set "
            "it to 0, or take a later one"
        )
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed clips and steps the gradients of all adapters together: use DDP or FSDP2"
        )


def _shifts(model: Any) -> bool:
    """Whether the label of a token is the next token.

    Raises:
        ConfigError: If it is not known what the model's loss is.
    """
    config = getattr(model, "config", None)
    kind = getattr(model, "loss_type", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    other = getattr(config, "problem_type", None) not in (None, "single_label_classification")
    routed = getattr(config, "output_router_logits", False)
    if kind not in _LOSSES or other or routed:
        what = "adds a loss of its routers (output_router_logits)" if routed else f"is {kind!r}"
        raise ConfigError(
            f"{type(model).__name__}: its loss {what}, which is no cross entropy of its labels alone: "
            "override adapter_losses(outputs, labels, ids, counts) in a subclass of the trainer"
        )
    return _LOSSES[kind]


def _makes_inputs_of_labels(model: Any) -> bool:
    """Whether a model makes the input of its decoder of the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _first(outputs: Any) -> Tensor:
    found: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return found
