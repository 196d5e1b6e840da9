"""Helpers for training loops: parameter groups, corrected gradients, penalties, several adapters."""

from __future__ import annotations

import functools
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_fx.adapters.switching import check_known
from lora_fx.errors import ConfigError
from lora_fx.ir import PlannedSite, Record, record_of, require_record
from lora_fx.kinds import AdapterKind, kind_of
from lora_fx.passes.graph import is_partitioned
from lora_fx.passes.parameters import (
    adapter_parameters,
    claim_unfrozen,
    factors_of,
    inside,
    is_sharded,
    own_value,
    without_wrappers,
)
from lora_fx.runtime.rows import IDS

__all__ = [
    "adapter_losses",
    "adapter_penalty",
    "correct_gradients",
    "parameter_groups",
    "train_together",
]

# --- inputs of an optimizer -----------------------------------------------------------------------
# Parameter groups, and the gradient correction of LoRA-FA.
#
# LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354) trains B faster than A. LoRA-FA (Zhang et al.
# 2023, arXiv:2308.03303) does not train A: the activation that a layer saves for backward then has
# rank r. The gradient of B is corrected so that the step of ``B A`` comes closest to the step of a
# full weight.


# With LoRA+ the factors of an embedding keep their own rate. The default is that of PEFT and the authors.
_EMBEDDING_LR = 1e-6
# Added to the diagonal to keep A Aᵀ invertible; PEFT's value.
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
    """Return the trainable parameters in groups for ``torch.optim``, each parameter once.

    ========== ============================================================== ============== ============
    name       holds                                                          learning rate  weight decay
    ========== ============================================================== ============== ============
    lora_A     A                                                              lr             as given
    lora_B     B                                                              lr · ratio     as given
    embeddings A and B of embeddings, and of heads that are tied to them      embedding_lr   as given
    modules    other matrices: weights of modules_to_save, token rows         lr             as given
    vectors    biases, norms, magnitudes                                      lr · ratio     0
    ========== ============================================================== ============== ============

    A group without parameters is left out. Rates and weight decay are those of PEFT's
    ``create_loraplus_optimizer``, with two differences. PEFT puts the magnitude of a convolution with the A,
    and it decays all vectors that are not called a bias. Without a ratio all rates are ``lr``, and the groups
    differ only in their weight decay.

    Args:
        model: A rewritten model.
        lr: The learning rate.
        lora_plus_ratio: LoRA+: how many times faster B is trained than A, above 0; 16 in the paper.
        weight_decay: For all parameters except vectors.
        embedding_lr: The rate of the factors of embeddings. The default is ``lr``, or PEFT's 1e-6 if there is
            a ratio.
        lora_fa: LoRA-FA: A is frozen here and left out of the groups, except the A of an embedding. Give the
            optimizer to :func:`correct_gradients` as well.
        adapter_name: Take only the parameters of this adapter, for a separate optimizer or learning rate. By
            default all trained parameters are taken.

    Returns:
        Groups for any optimizer of torch: ``AdamW(parameter_groups(model, 1e-4))``. Each group also has a
        ``name``, by which you can change its options.

    Raises:
        ConfigError: If the model has no adapters or not the named one, nothing in it is trained, or an
            optimizer cannot use one of the numbers. Nothing is frozen then.
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
    """Replace the gradient ``g`` of every B by ``g (A Aᵀ)⁻¹ / s²`` before each step (LoRA-FA).

    With A fixed, a step of B by this gradient changes ``s B A`` by the full weight's gradient, projected on
    the span of A (arXiv:2308.03303, section 3). The gradients are replaced when ``optimizer.step()`` begins:
    after they were accumulated, reduced, unscaled and clipped. They are valid for that step only.

    Args:
        optimizer: Any optimizer over the groups of ``parameter_groups(..., lora_fa=True)``.
        model: The model of those groups.

    Returns:
        A handle; ``remove()`` ends the correction.

    Raises:
        ConfigError: If the model has no adapters, the optimizer trains an A, or it trains no B of the model
            whose A is fixed. Later, if a step is given a closure, because that computes gradients after the
            correction.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = []
    with without_wrappers(model) as inner:
        rows = [(*entry, factors_of(inner, *entry).pair) for entry in _rows(require_record(inner))]
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
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
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
    """Return the corrected gradient of B, ``g (A Aᵀ + ε)⁻¹ / s²``, for each expert or group separately."""
    count = row.site.experts or row.site.groups
    rank = row.rank if row.site.experts else row.rank // row.site.groups
    # torch.linalg.solve supports no half type, and in half precision the ridge would be rounded away.
    wide = torch.promote_types(a.dtype, torch.float32)
    a = a.to(wide).reshape(count, rank, -1)
    gram = a @ a.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
    flat = gradient.to(wide).reshape(count, -1, rank)
    solved: torch.Tensor = torch.linalg.solve(gram, flat, left=False) / row.scale**2
    return solved.reshape(gradient.shape).to(gradient.dtype)


def _rows(record: Record) -> Iterator[tuple[PlannedSite, str]]:
    """Yield the sites that LoRA-FA covers, each with its adapter: products with untied factors.

    Embedding lookups are left out. They keep no input for the gradient of A, so freezing A saves no memory.
    """
    for adapter, adapter_record in record.adapters.items():
        for row in adapter_record.sites:
            kind = kind_of(row)
            factors = kind.low_rank and kind.direct and not row.tied
            if factors and row.site.family != "embedding":
                yield row, adapter


def _kinds(model: nn.Module, record: Record) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for adapter, adapter_record in record.adapters.items():
        for row in adapter_record.sites:
            table = row.tied or row.site.family == "embedding"
            factors = factors_of(model, row, adapter)
            # Name the group, because a convolution's magnitude looks like a matrix: it has 4 dimensions, 3 of
            # size 1.
            kinds |= {id(vector): "vectors" for vector in factors.present}
            if not kind_of(row).low_rank:
                continue
            kinds |= {
                id(factors.a): "embeddings" if table else "lora_A",
                id(factors.b): "embeddings" if table else "lora_B",
            }
    return kinds


def _first_factors(
    model: nn.Module, record: Record, adapter_name: str | None
) -> list[nn.Parameter]:
    rows = [pair for pair in _rows(record) if adapter_name in (None, pair[1])]
    return [factors_of(model, row, adapter).a for row, adapter in rows]


def _of_adapter(model: nn.Module, record: Record, adapter_name: str) -> set[int]:
    """Return the ids of the parameters of an adapter, including those that replace parameters of the base."""
    if adapter_name not in record.adapters:
        has = ", ".join(map(repr, record.adapters))
        raise ConfigError(f"there is no adapter {adapter_name!r}: the model has {has}")
    own = (own_value(model, adapter_name, name) for name in record.adapters[adapter_name].own)
    return {id(parameter) for parameter in (*adapter_parameters(model, adapter_name), *own)}


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name}: found {value!r}; give a finite number of at least 0")


# --- penalties ------------------------------------------------------------------------------------
# Terms of a loss that depend on the adapters alone, as KaSA and MonteCLoRA have them.


@inside
def adapter_penalty(model: nn.Module, adapter_names: Sequence[str] | str | None = None) -> Tensor:
    """Return the terms that adapters add to a loss; add them: ``loss + lora_fx.adapter_penalty(model)``.

    For KaSA, it is the sum over the layers of ``β ‖d‖² + γ (‖BᵀB - I‖ + ‖A Aᵀ - I‖)`` (arXiv:2412.06071,
    equations 9 to 11). For MonteCLoRA, it is the mean over the layers of the weighted divergences from the
    priors, for the noise of the last call, and zero in evaluation mode. Other kinds add nothing. PEFT
    computes them in ``_get_kasa_loss`` and ``_get_monteclora_loss``.

    Args:
        model: A rewritten model.
        adapter_names: Names of adapters; by default the active ones.

    Returns:
        A scalar with a gradient; 0 if no adapter adds a term. If the model is sharded (FSDP2), all processes
        have to call this.

    Raises:
        ConfigError: If the model has no such adapter, or DeepSpeed has its factors in parts.
    """
    if isinstance(adapter_names, str):
        adapter_names = [adapter_names]
    terms: list[Tensor] = []
    with without_wrappers(model) as inner:
        record = require_record(inner)
        names = record.active if adapter_names is None else adapter_names
        check_known(record, names)
        rows = [(row, name) for name in names for row in record.adapters[name].sites]
        counts = Counter(row.kind for row, _ in rows)
        for row, name in rows:
            term = _penalty(inner, row, name, counts[row.kind])
            if term is not None:
                terms.append(term)
        device = next((parameter.device for parameter in inner.parameters()), None)
    return torch.stack(terms).sum() if terms else torch.zeros((), device=device)


def _penalty(model: nn.Module, row: PlannedSite, adapter: str, sites: int) -> Tensor | None:
    kind = kind_of(row)
    if type(kind).penalty is AdapterKind.penalty:
        return None
    factors = factors_of(model, row, adapter)
    for name, factor in factors.values.items():
        if is_partitioned(factor):
            raise ConfigError(
                f"{row.name}: DeepSpeed has {name} in parts, and adapter_penalty needs it whole: call it in "
                "deepspeed.zero.GatheredParameters, or leave the penalty out"
            )
    roles = dict(zip(filter(None, factors.names.pair), ("a", "b"), strict=False))
    tensors = {roles.get(name, name): _whole(value) for name, value in factors.values.items()}
    holder = model.get_submodule(row.site.holder).get_submodule(factors.names.present[0])
    return kind.penalty(row, tensors, sites=sites, training=holder.training)


def _whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, with a gradient; any other tensor is returned itself."""
    parts: Any = tensor
    return parts.full_tensor() if is_sharded(tensor) else tensor


# --- several adapters in one batch ----------------------------------------------------------------
# Train several adapters with one batch, each with the loss of its own rows: in any loop, and in a
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
    """Return the mean cross entropy of each adapter over its rows of a batch.

    The sum of the means gives each adapter the gradient of a separate step with its rows alone. (A mean over
    the whole batch, as models of transformers compute it, would weigh each adapter by its share of the
    tokens.) Rows without an adapter train nothing and are left out.

    Args:
        logits: [samples, tokens, classes], or [samples, classes] if each row has a class.
        labels: [samples, tokens] or [samples]; -100 is left out, as in transformers.
        ids: The adapter of each sample, or None, as for :func:`lora_fx.adapter_ids`.
        shift: True if the label of a token is the next token, as in causal language models. Has no effect if
            each row has one class.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.
        counts: The number of labels over which the mean of each adapter is taken; by default the number in
            this batch. For gradient accumulation, and for several processes that each have a part of an
            adapter's rows.

    Returns:
        The mean of each adapter: a scalar with a gradient, or 0 if the adapter has no label.

    Raises:
        ConfigError: If shapes do not match, or ``ids`` has a different number of samples.
    """
    sums, label_counts = _sums(logits, labels, ids, shift=shift, label_smoothing=label_smoothing)
    return {name: sums[name] / max(1, (counts or label_counts)[name]) for name in sums}


def _sums(
    logits: Tensor,
    labels: Tensor,
    ids: Sequence[str | None],
    *,
    shift: bool,
    label_smoothing: float,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the sum of the losses of each adapter, and the number of labels in each sum."""
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
    label_counts = (labels != _IGNORED).unsqueeze(-1).flatten(1).sum(1).tolist()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, rows in _by_name(ids).items():
        sums[name] = of_rows[torch.tensor(rows, device=of_rows.device)].sum()
        counts[name] = sum(label_counts[row] for row in rows)
    return sums, counts


def _by_name(ids: Sequence[str | None]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return rows


def train_together(trainer: type[_TrainerT], column: str = "adapter") -> type[_TrainerT]:
    """Return a subclass of transformers' ``Trainer`` that trains all adapters of a batch in one step.

    A column of the dataset names the adapter that each row trains; None trains nothing. Each adapter gets the
    gradient of the mean loss of its rows, over all accumulated batches and all processes. Its gradient is
    clipped to ``max_grad_norm`` separately. An adapter without rows in a step is not stepped: its optimizer
    state and its weights stay, and it is not decayed. Each adapter is thus trained as with a separate
    trainer, with the learning rates of its parameter groups (:func:`lora_fx.parameter_groups` with
    ``adapter_name``). The logged loss is the sum over the adapters; ``loss_NAME`` is the loss of each.

    Args:
        trainer: ``transformers.Trainer``, or a subclass that uses the model's loss.
        column: The column, which is removed before the data collator sees the rows.

    Returns:
        The subclass. Its model has to be rewritten, with ``lora_fx.set_adapter(model, names,
        per_sample=True)``, and its arguments need ``remove_unused_columns=False``. Losses are cross entropies
        of the labels, of tokens or of rows; override ``adapter_losses(outputs, labels, ids, counts)`` for
        others.

    Raises:
        ConfigError: When it is constructed, if the model or the arguments do not meet these conditions. When
            it trains, if a row lacks the column or names no adapter, or the model's loss is not known.
    """
    make_class: Any = _class_over
    subclass: type[_TrainerT] = make_class(trainer, column)
    return subclass


@functools.cache
def _class_over(trainer: Any, column: str) -> Any:
    members = {"__module__": __name__, "adapter_column": column}
    return type(f"Together{trainer.__name__}", (_Together, trainer), members)


class _Collator:
    """A data collator that replaces the column of adapter names by a tensor of their indices."""

    def __init__(
        self, collate: Callable[[list[Any]], Any], names: Sequence[str], column: str
    ) -> None:
        self.collate, self.names, self.column = collate, tuple(names), column

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        samples, numbers = [], []
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
            samples.append({key: value for key, value in row.items() if key != self.column})
        batch = dict(self.collate(samples))
        sizes = {
            len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()
        }
        if sizes != {len(rows)}:
            raise ConfigError(
                f"the data collator makes tensors of {sorted(sizes)} rows out of {len(rows)} rows of the "
                "dataset: each sample has to stay a row of its own (no packing, no padding-free batches)"
            )
        return {**batch, IDS: torch.tensor(numbers)}


class _Tally:
    """Sums of losses by adapter, kept until they are logged."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        for name, loss_sum in sums.items():
            self.sums[name] = self.sums.get(name, 0) + loss_sum.detach()
            self.counts[name] = self.counts.get(name, 0) + counts[name]


# Loss functions of transformers that are cross entropies; True if they shift the labels of tokens.
_LOSSES = {
    "ForCausalLM": True,
    "ForMaskedLM": False,
    "ForTokenClassification": False,
    "ForSequenceClassification": False,
    "ForImageClassification": False,
}


class _Together:
    """The mixin that :func:`train_together` puts before a Trainer in the bases."""

    adapter_column = "adapter"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        self._names = _trained_together(me.model)
        _check_arguments(me)
        me.data_collator = _Collator(me.data_collator, self._names, self.adapter_column)
        # The Trainer does not divide the loss of such a function by the number of accumulated batches.
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
        """Return the loss of each adapter.

        Args:
            outputs: The outputs of the model.
            labels: The labels of the batch.
            ids: The adapter of each row.
            counts: The number of labels over which each mean is taken; None for the number in this batch.
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
        """Return the sum of the losses of all adapters in the batch."""
        me: Any = self
        inner = me.accelerator.unwrap_model(me.model)
        if _trained_together(inner) != self._names:
            raise ConfigError(
                f"the adapters of the model are not those that it had when the trainer was made "
                f"({', '.join(map(repr, self._names))}): make a new one"
            )
        batch = dict(inputs)
        labels = batch["labels"] if _makes_inputs_of_labels(inner) else batch.pop("labels", None)
        if labels is None:
            raise ConfigError("the batch has no 'labels': the loss of each adapter is made of them")
        ids = [self._names[index] if index >= 0 else None for index in batch[IDS].tolist()]
        outputs = model(**batch)
        counts = self._counts if model.training else None
        losses = self.adapter_losses(outputs, labels, ids, counts)
        own = self._labels_of(labels, ids)
        over = counts or own
        sums = {name: mean * max(1, over[name]) for name, mean in losses.items()}
        self._tallies["" if model.training else "eval_"].add(sums, own)
        loss = sum(losses.values(), torch.zeros((), device=labels.device))
        if not loss.requires_grad and model.training:
            # No row trains an adapter, but backward needs a graph.
            loss = loss + _first(outputs).sum() * 0.0
        if model.training:
            # DDP and FSDP average over processes, but the counts are already sums over all of them.
            loss = loss * me.accelerator.num_processes
        if not return_outputs:
            return loss
        return loss, outputs if isinstance(outputs, Mapping) else (loss, *outputs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step, after counting their labels."""
        me: Any = self
        batches_and_count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        counts = dict.fromkeys(self._names, 0)
        for batch in batches_and_count[0]:
            if "labels" not in batch:
                continue
            ids = [self._names[index] if index >= 0 else None for index in batch[IDS].tolist()]
            for name, count in self._labels_of(batch["labels"], ids).items():
                counts[name] += count
        totals = torch.tensor([*counts.values()], device=me.args.device)
        totals = me.accelerator.reduce(totals, "sum")
        self._counts = dict(zip(self._names, totals.tolist(), strict=True))
        return batches_and_count

    def _labels_of(self, labels: Tensor, ids: Sequence[str | None]) -> dict[str, int]:
        """Return the number of labels that each adapter has in a batch."""
        me: Any = self
        if labels.dim() == 2 and _shifts(me.accelerator.unwrap_model(me.model)):
            labels = labels[:, 1:]
        label_counts = (labels != _IGNORED).reshape(len(labels), -1).sum(1).tolist()
        return {
            name: sum(label_counts[row] for row in rows) for name, rows in _by_name(ids).items()
        }

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer. Its steps skip adapters that no label of the step belongs to."""
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
            yield (
                name,
                [
                    parameter
                    for parameter in adapter_parameters(model, name)
                    if parameter.requires_grad
                ],
            )

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradient of each adapter separately, and return their joint norm."""
        me: Any = self
        me.accelerator.unscale_gradients()
        norms = [
            nn.utils.clip_grad_norm_(parameters, me.args.max_grad_norm)
            for _, parameters in self._parameters()
        ]
        joint: Tensor = torch.linalg.vector_norm(
            torch.stack([norm.to(norms[0].device) for norm in norms])
        )
        return joint

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the metrics, together with the mean loss of each adapter since the last time."""
        me: Any = self
        for prefix, tally in self._tallies.items():
            if f"{prefix}loss" not in logs:
                continue
            zeros = torch.zeros((), device=me.args.device)
            sums = torch.stack([tally.sums.get(name, zeros).float() for name in self._names])
            numbers = [tally.counts.get(name, 0.0) for name in self._names]
            counts = torch.tensor(numbers, device=me.args.device)
            sums, counts = (me.accelerator.reduce(total, "sum") for total in (sums, counts))
            means = zip(self._names, sums.tolist(), counts.tolist(), strict=True)
            logs |= {f"{prefix}loss_{name}": total / count for name, total, count in means if count}
            self._tallies[prefix] = _Tally()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _trained_together(model: nn.Module) -> tuple[str, ...]:
    """Return the adapters that a batch can train: the active ones of a model with per-sample adapters.

    Raises:
        ConfigError: If the model is not set up for per-sample adapters.
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
    """Return True if the loss of a model shifts the labels: the label of a token is the next token.

    Raises:
        ConfigError: If the model's loss is not known.
    """
    config = getattr(model, "config", None)
    kind = getattr(model, "loss_type", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    other = getattr(config, "problem_type", None) not in (None, "single_label_classification")
    routed = getattr(config, "output_router_logits", False)
    if kind not in _LOSSES or other or routed:
        problem = "adds a loss of its routers (output_router_logits)" if routed else f"is {kind!r}"
        raise ConfigError(
            f"{type(model).__name__}: its loss {problem}, which is no cross entropy of its labels alone: "
            "override adapter_losses(outputs, labels, ids, counts) in a subclass of the trainer"
        )
    return _LOSSES[kind]


def _makes_inputs_of_labels(model: Any) -> bool:
    """Return True if a model derives the input of its decoder from the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _first(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits
