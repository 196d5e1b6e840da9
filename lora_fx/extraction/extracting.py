"""Make an adapter from the difference between two models.

A change may come from a tuned checkpoint, or from an adapter of another method: anything that gives the old
and the new value of each parameter. Weights of linear operations become factors, whatever their form
(layers, convolutions, einsums, embeddings, experts). Other parameters are stored in full.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, cast, overload

from torch import Tensor, nn

from lora_fx.adapters import Forward, Target, adapter_record, input_moments, with_targets
from lora_fx.checkpoint import Slot, fill, place_given
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.extraction.differences import Difference, names_of, weights_of
from lora_fx.extraction.ranks import RankChoice
from lora_fx.extraction.report import ExtractedSite, ExtractionReport
from lora_fx.ir import AdapterRecord, ModelT, Site, join
from lora_fx.passes.capture import Frontend
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.lowrank import (
    allocate,
    decompose,
    rank_of_energy,
    root_of,
    spectrum,
)
from lora_fx.passes.parameters import (
    as_factors,
    factors_of,
    inside,
    matrix_shape,
    own_value,
    persistent_buffers,
)
from lora_fx.passes.patterns import pattern_of
from lora_fx.passes.pipeline import RewriteOptions, find_operations, rewrite_model
from lora_fx.passes.plan import fresh_modules
from lora_fx.progress import Progress, show_progress

__all__ = ["extract", "extract_adapter"]


@overload
def extract_adapter(
    base: ModelT,
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int | None = ...,
    energy: float | None = ...,
    budget: int | str | None = ...,
    inputs: Iterable[Any] | None = ...,
    forward: Forward | None = ...,
    adapter_name: str = ...,
    example_inputs: Any = ...,
    frontend: Frontend = ...,
    progress: Progress = ...,
    return_report: Literal[False] = ...,
) -> ModelT: ...
@overload
def extract_adapter(
    base: ModelT,
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int | None = ...,
    energy: float | None = ...,
    budget: int | str | None = ...,
    inputs: Iterable[Any] | None = ...,
    forward: Forward | None = ...,
    adapter_name: str = ...,
    example_inputs: Any = ...,
    frontend: Frontend = ...,
    progress: Progress = ...,
    return_report: Literal[True],
) -> tuple[ModelT, ExtractionReport]: ...
@inside
def extract_adapter(
    base: ModelT,
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    inputs: Iterable[Any] | None = None,
    forward: Forward | None = None,
    adapter_name: str = "default",
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    progress: Progress = False,
    return_report: bool = False,
) -> ModelT | tuple[ModelT, ExtractionReport]:
    """Make a LoRA adapter from a fully fine-tuned model and its base.

    Changes of linear operations become factors: the leading singular triples of ``ΔW``. Norms and other
    modules without such an operation are stored in full (``modules_to_save``), biases and other parameters
    by their names. :func:`lora_fx.save_adapter` writes the result as a folder of PEFT.

    Args:
        base: The model before it was tuned. It is not changed.
        tuned: The tuned model, or a folder of its safetensors, which are read one tensor at a time.
        rank: The rank of all sites, by default 16. It is limited by the size of a site's weight.
        energy: Instead of ``rank``: each site gets the smallest rank that keeps this share of ``‖ΔW‖²``.
        budget: Instead of ``rank``: a number of parameters, or a size such as "20MB" (4 bytes each), for
            the whole adapter. Ranks go to the sites where they keep most of the change.
        inputs: Batches as for :func:`lora_fx.initialize`. The factors of products with a matrix are then
            those that change the outputs least for such inputs, and the report has the errors of outputs.
        forward: A function that calls the model with a batch of ``inputs``, if they have another form.
        adapter_name: The name of the adapter.
        example_inputs: As for :func:`lora_fx.rewrite`.
        frontend: As for :func:`lora_fx.rewrite`.
        progress: True to show a progress bar (if tqdm is installed), or a function that is called with
            (done, total, site name) before each site.
        return_report: True to return the report as well.

    Returns:
        A rewritten model, as :func:`lora_fx.rewrite` returns it, and the :class:`ExtractionReport` if
        requested.

    Raises:
        CheckpointError: If the tuned model is another one, has other shapes, or its files are damaged.
        ConfigError: If the models are equal, are rewritten already, or a choice of ranks makes no sense.
        QuantizationError: If a weight is quantized.
        CaptureError: If the base cannot be captured.
    """
    choice = RankChoice.of(rank, energy, budget)
    before = weights_of(base, base)
    adapted, report = extract(
        base,
        Difference(before, weights_of(tuned, base)),
        choice,
        inputs=inputs,
        forward=forward,
        adapter_name=adapter_name,
        example_inputs=example_inputs,
        frontend=frontend,
        progress=progress,
    )
    return (adapted, report) if return_report else adapted


# --- the adapter ----------------------------------------------------------------------------------


def extract(
    model: ModelT,
    difference: Difference,
    choice: RankChoice,
    *,
    inputs: Iterable[Any] | None = None,
    forward: Forward | None = None,
    adapter_name: str = "default",
    example_inputs: Any = None,
    frontend: Frontend = "auto",
    progress: Progress = False,
    config: LoraConfig | None = None,
) -> tuple[ModelT, ExtractionReport]:
    """Add an adapter that approximates the change of the weights, and report its errors.

    Args:
        model: The base; it may be on the meta device.
        difference: The values before and after the change.
        choice: The rule for the ranks.
        inputs: As for :func:`extract_adapter`.
        forward: As for :func:`extract_adapter`.
        adapter_name: The name of the adapter.
        example_inputs: As for :func:`lora_fx.rewrite`.
        frontend: As for :func:`lora_fx.rewrite`.
        progress: As for :func:`extract_adapter`.
        config: Other fields of the adapter's configuration, such as the task.

    Returns:
        The rewritten model with the adapter, and the report.

    Raises:
        ConfigError: If nothing has changed, or the budget is too small for any rank.
        CheckpointError: As :func:`extract_adapter`.
        CaptureError: As :func:`extract_adapter`.
    """
    matches = find_operations(capture_model(model, example_inputs, frontend=frontend))
    changed = _Changed.of(model, difference, matches.sites)
    sites, groups = changed.sites, changed.groups

    def build(kept: Iterable[Site], ranks: Mapping[str, int]) -> nn.Module:
        exact = _config(model, kept, ranks, changed.heads, changed.in_full, config)
        options = RewriteOptions(adapter_name, loaded=True, quiet=True)
        return rewrite_model(model, exact, options=options, frontend=frontend)

    roots = {}
    if inputs is not None and sites:
        least = {site.name: site.groups for site in sites}
        observed = build(sites, least)
        moments = input_moments(
            observed, inputs, [adapter_name], forward=forward, progress=progress
        )
        roots = {name: root_of(values) for name, values in moments.items()}
    rules = _Ranks(choice, roots, difference.ranks)
    with show_progress(progress, "site") as tell:
        rules.allocate(sites, difference, changed.in_full.elements(model))
        factors, rows = {}, []
        for index, site in enumerate(sites):
            tell(index, len(sites), site.name)
            weight, change = difference.matrices(site)
            unit = rules.rank(site, change)
            if not unit:
                continue
            row, pair = _decomposed(site, weight, change, unit, roots.get(site.name))
            rows.append(row)
            factors[site.name] = pair
    kept = [site for site in sites if site.name in factors]
    ranks = {row.name: row.rank for row in rows}
    adapted = build(kept, ranks)
    left_out = [site for site in sites if site.name not in factors]
    uncovered = changed.names - {name for site in left_out for name in groups[site.weight]}
    placed = _fill(adapted, adapter_name, factors, difference, uncovered, changed.buffers, groups)
    record = adapter_record(adapted, adapter_name)
    report = ExtractionReport(
        sites=tuple(rows),
        saved_modules=record.saved_modules,
        values=(*record.biases, *placed),
        buffers=changed.buffers,
        left_out=tuple(site.name for site in left_out),
        unchanged=len({*groups.values()}) - len({groups[name] for name in changed.names}),
        parameters=_parameters(adapted, record, adapter_name, placed),
    )
    return cast("ModelT", adapted), report


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Return True if a parameter is inside one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def _sites(
    sites: Iterable[Site], changed: Set[str], difference: Difference
) -> tuple[list[Site], dict[Site, Site]]:
    """Return the operations that get factors, because their weights changed.

    A head that is tied to an embedding uses the embedding's factors, if both weights are still equal.

    Returns:
        The operations with their own factors. For each tied head, the embedding whose factors it uses.
    """
    affected = [site for site in sites if site.weight in changed]
    heads = {
        head: site
        for site in affected
        for head in affected
        if site.family == "embedding" != head.family
        and head.weight in site.tied_to
        and difference.same(site.weight, head.weight)
    }
    return [site for site in affected if site not in heads], heads


@dataclasses.dataclass(frozen=True)
class _InFull:
    """The parameters that an adapter stores in full.

    Attributes:
        modules: Modules that the adapter stores as a whole.
        biases: Biases of adapted layers. PEFT stores them all if it stores one.
        names: Other parameters.
    """

    modules: frozenset[str]
    biases: frozenset[str]
    names: frozenset[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sites: Iterable[Site],
        changed: Iterable[str],
        fresh: Iterable[str],
        groups: Mapping[str, tuple[str, ...]],
    ) -> _InFull:
        """Choose how to store each changed parameter that gets no factors."""
        owners = {site.owner for site in sites}
        modules, names, with_biases = set(fresh), set(), False
        for name in changed:
            owner, _, leaf = name.rpartition(".")
            if _is_in(name, modules):
                continue
            own = {f"{owner}.{key}" for key in model.get_submodule(owner)._parameters}
            shared = any(not own.issuperset(groups.get(other, ())) for other in own)
            if owner in owners and leaf.endswith("bias"):
                with_biases = True
            elif owner and owner not in owners and not shared and _is_leaf(model, owner):
                modules.add(owner)
            else:
                names.add(name)
        biases = {f"{owner}.bias" for owner in owners} & groups.keys() if with_biases else set()
        return cls(frozenset(modules), frozenset(biases), frozenset(names))

    def elements(self, model: nn.Module) -> int:
        """Return the number of elements of all parameters that the adapter stores in full."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return sum(
            parameter.numel()
            for name, parameter in parameters.items()
            if name in self.biases or name in self.names or _is_in(name, self.modules)
        )


@dataclasses.dataclass(frozen=True)
class _Changed:
    """The changed tensors of a model, and where an adapter stores each of them.

    Attributes:
        groups: All names of a parameter, by each of its names.
        names: The changed parameters, by FQN.
        buffers: The changed buffers, by FQN.
        sites: The operations that get factors.
        heads: For each tied head that uses the factors of an embedding, that embedding.
        in_full: The parameters that are stored in full.
    """

    groups: Mapping[str, tuple[str, ...]]
    names: Set[str]
    buffers: tuple[str, ...]
    sites: Sequence[Site]
    heads: Mapping[Site, Site]
    in_full: _InFull

    @classmethod
    def of(cls, model: nn.Module, difference: Difference, sites: Iterable[Site]) -> _Changed:
        """Find the changed tensors of a model, and choose where an adapter stores each of them.

        Args:
            model: The base.
            difference: The values before and after the change.
            sites: The linear operations of the base.

        Raises:
            ConfigError: If nothing has changed.
        """
        groups = names_of(dict(model.named_parameters(remove_duplicate=False)))
        fresh = set(fresh_modules(model))
        states = {name: difference.compare(name) for name in groups if not _is_in(name, fresh)}
        fresh |= {name.rpartition(".")[0] for name, state in states.items() if state == "new"}
        names = {name for name in groups if _is_in(name, fresh) or states[name] != "same"}
        buffers = tuple(name for name in persistent_buffers(model) if difference.changed(name))
        if not names and not buffers:
            raise ConfigError(
                "no parameter differs between the two models: give the base first, then the tuned one"
            )
        if not names:
            fresh |= {name.rpartition(".")[0] for name in buffers}
        present = (site for site in sites if not _is_in(site.weight, fresh))
        with_factors, heads = _sites(present, names, difference)
        adapted = [*with_factors, *heads]
        factored = {name for site in adapted for name in groups[site.weight]}
        in_full = _InFull.of(model, adapted, names - factored, fresh, groups)
        return cls(groups, names, buffers, with_factors, heads, in_full)


def _is_leaf(model: nn.Module, name: str) -> bool:
    return not list(model.get_submodule(name).children())


def _cost(site: Site) -> int:
    """Return the number of elements of A and B at a site with the smallest possible rank."""
    return pattern_of(site).factors(site, site.groups).numel


class _Ranks:
    """The rank of each site, by the user's :class:`RankChoice`.

    A grouped convolution has a matrix for each group. Its rank here is the rank of one such matrix.
    """

    def __init__(
        self, choice: RankChoice, roots: Mapping[str, Tensor], bounds: Mapping[str, int]
    ) -> None:
        self._choice, self._roots, self._bounds = choice, roots, bounds
        self._allocated: dict[str, int] = {}

    def _squares(self, site: Site, change: Tensor) -> Tensor:
        root = self._roots.get(site.name)
        return spectrum(change if root is None else change @ root.to(change))

    def allocate(self, sites: Iterable[Site], difference: Difference, in_full: int) -> None:
        """Distribute a budget over the sites, by the singular values of their changes.

        Args:
            sites: The sites.
            difference: The change.
            in_full: The number of elements that the adapter stores in full.

        Raises:
            ConfigError: If the budget is too small for any rank.
        """
        if self._choice.budget is None:
            return
        sites = list(sites)
        squares = {site.name: self._squares(site, difference.matrices(site)[1]) for site in sites}
        costs = {site.name: _cost(site) for site in sites}
        left = self._choice.budget - in_full
        if left < min(costs.values(), default=0):
            name = min(costs, key=costs.__getitem__)
            raise ConfigError(
                f"budget: {self._choice.budget:,} parameters are too few. Norms and other parameters take "
                f"{in_full:,}, and the smallest site, {name}, needs {costs[name]:,} for rank 1"
            )
        gains = {name: values.tolist() for name, values in squares.items()}
        self._allocated = allocate(gains, costs, left)

    def rank(self, site: Site, change: Tensor) -> int:
        """Return the rank of each matrix of a site; 0 for a site that gets no adapter."""
        bound = self._bounds.get(site.weight, max(change.shape))
        most: int = min(*change.shape[1:], max(bound, 1))
        if self._choice.budget is not None:
            return self._allocated[site.name]
        if self._choice.energy is not None:
            return min(rank_of_energy(self._squares(site, change), self._choice.energy), most)
        assert self._choice.rank is not None
        return min(max(self._choice.rank // site.groups, 1), most)


def _decomposed(
    site: Site, weight: Tensor, change: Tensor, unit: int, root: Tensor | None
) -> tuple[ExtractedSite, tuple[Tensor, Tensor]]:
    """Approximate the change of a site by factors. Return its row of the report, and the factors.

    Args:
        site: The site.
        weight: Its weight before the change, [n, out, in].
        change: The change, in the same shape.
        unit: The rank of each matrix.
        root: The Cholesky factor of the second moments of the inputs, if these are known.
    """
    root = None if root is None else root.to(change)
    a, b = decompose(change, unit, root)
    error = change - b @ a
    size, total = float(change.norm()), float(weight.norm())
    outputs = math.nan
    if root is not None and size:
        outputs = float((error @ root).norm()) / float((change @ root).norm())
    groups = site.groups
    row = ExtractedSite(
        name=site.name,
        weight=site.weight,
        rank=unit * groups,
        largest_rank=min(matrix_shape(site)[1:]) * groups,
        relative_change=size / total if total else math.inf,
        error=float(error.norm()) / size if size else 0.0,
        change=size,
        output_error=outputs,
    )
    return row, as_factors(pattern_of(site).factors(site, unit * groups), a, b)


def _config(
    model: nn.Module,
    sites: Iterable[Site],
    ranks: Mapping[str, int],
    heads: Mapping[Site, Site],
    in_full: _InFull,
    config: LoraConfig | None,
) -> LoraConfig:
    """Return the configuration of an adapter for these sites and for the parameters stored in full."""
    names = {site.name: ranks[site.name] for site in sites}
    shared = {head.name: names[site.name] for head, site in heads.items() if site.name in names}
    base = dataclasses.replace(
        LoraConfig() if config is None else config,
        bias="lora_only" if in_full.biases else "none",
        modules_to_save=tuple(sorted(in_full.modules)) or None,
        ensure_weight_tying=bool(shared),
    )
    targets = [Target(name, rank, float(rank)) for name, rank in {**names, **shared}.items()]
    return with_targets(base, targets, model)


def _fill(
    adapted: nn.Module,
    adapter: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    difference: Difference,
    changed: Set[str],
    buffers: Iterable[str],
    groups: Mapping[str, tuple[str, ...]],
) -> list[str]:
    """Write all changes into an adapter. Return the parameters that its configuration does not cover."""
    record = adapter_record(adapted, adapter)
    values: list[tuple[Slot, Tensor]] = []
    covered: set[str] = set()
    for row in record.sites:
        # A tied weight that has an adapter of its own is another site.
        covered |= {
            name for name in groups[row.site.weight] if difference.same(name, row.site.weight)
        }
        if row.tied:
            continue
        stored = factors_of(adapted, row, adapter)
        for name, tensor, value in zip(
            stored.names.pair, stored.pair, factors[row.name], strict=True
        ):
            values.append((Slot("", join(row.site.holder, name, adapter), tensor), value))
    for name in record.own:
        covered |= {*groups.get(name, ())}
        values.append((Slot("", name, own_value(adapted, adapter, name)), difference.after(name)))
    by_name = {
        other: difference.after(other).to(adapted.get_parameter(other).dtype)
        for name in sorted(changed - covered)
        for other in groups[name]
    }
    place_given(adapted, adapter, by_name)
    values += [
        (Slot("", name, adapted.get_buffer(name)), difference.after(name))
        for name in buffers
        if name not in record.own
    ]
    fill(adapted, adapter, values)
    return list(by_name)


def _parameters(
    adapted: nn.Module, record: AdapterRecord, adapter: str, placed: Iterable[str]
) -> int:
    of_factors = sum(
        value.numel()
        for row in record.sites
        if not row.tied
        for value in factors_of(adapted, row, adapter).present
    )
    values = (own_value(adapted, adapter, name) for name in {*record.own, *placed})
    return of_factors + sum(value.numel() for value in values if isinstance(value, nn.Parameter))
