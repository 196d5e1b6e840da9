"""Apply a configuration to sites: select them, find their rank and alpha, and compute their costs.

PEFT adapts modules and parameters. In lora-fx the sites are operations, so that one name can select several
sites. ``nn.MultiheadAttention`` has four, and a weight that is applied in parts has one for each part. The
rank and alpha of a site come from the entry of ``rank_pattern`` and ``alpha_pattern`` for its own name. If
there is none, the name that selected the site counts. The costs of an adapter follow from its kind and its
pattern. Trained rows of embeddings (``trainable_token_indices``) follow PEFT's rules, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.config import (
    LoraConfig,
    Verdict,
    alpha_for,
    bad,
    excluded,
    judge,
    parameter_entry,
    rank_for,
    saved_by,
    scale_of,
    uses_default_targets,
)
from lora_fx.errors import ConfigError
from lora_fx.ir import Capture, Matches, Plan, PlannedSite, PlannedTokens, Site
from lora_fx.kinds import kind_of
from lora_fx.passes.capture import Listener, normalize, synthesise
from lora_fx.passes.parameters import base_dtype, base_modules, matrix_shape, shapes_of
from lora_fx.passes.patterns import lookup, pattern_of
from lora_fx.torch_private import pytree

__all__ = [
    "Choice",
    "Positions",
    "SampleCost",
    "base_flops",
    "choices",
    "planned_tokens",
    "positions_of",
    "positions_read",
    "priced",
    "sample_cost",
    "tied_embedding",
    "with_sample_cost",
]

_ROWS = re.compile(r"(?P<name>.+)\.(?P<start>\d+)_(?P<stop>\d+)")


def _choose_parts(site: Site, config: LoraConfig, whole: Verdict) -> list[tuple[Site, Verdict]]:
    """Return the parts of a fused weight that replace its site in the plan; empty if the site stays whole.

    Args:
        site: Any site.
        config: The configuration.
        whole: The verdict of the configuration about the site.

    Raises:
        ConfigError: If the configuration names rows that the weight does not have, or rows that overlap.
    """
    if not site.divisible:
        return []
    parts = [site.part(name, rows) for name, rows in site.parts]
    if whole.selected:
        if not any(excluded(part.name, config) for part in parts):
            return []
        return [
            (part, judge(part.name, config) if excluded(part.name, config) else whole)
            for part in parts
        ]
    if uses_default_targets(config) or excluded(site.name, config):
        return []
    numbered = {part.rows: part for part in _by_number(site, config)}
    # If the same rows are known by a name and by numbers, use the numbers, as the configuration does.
    parts = [part for part in parts if part.rows not in numbered] + list(numbered.values())
    verdicts = [(part, judge(part.name, config)) for part in parts]
    selected = [part for part, verdict in verdicts if verdict.selected]
    _check(site, selected)
    return verdicts if selected else []


def _by_number(site: Site, config: LoraConfig) -> Iterator[Site]:
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ():
        match = _ROWS.fullmatch(target)
        if match is None or not f".{site.name}".endswith(f".{match['name']}"):
            continue
        rows = int(match["start"]), int(match["stop"])
        if not rows[0] < rows[1] <= site.out_features:
            raise ConfigError(
                f"target_modules {target!r}: {site.name} has the rows 0 to {site.out_features}, "
                "written start_stop as in a slice"
            )
        yield site.part(f"{match['start']}_{match['stop']}", rows)


def _check(site: Site, parts: list[Site]) -> None:
    ordered = sorted(part.rows or (0, 0) for part in parts)
    for first, second in itertools.pairwise(ordered):
        if first[1] > second[0]:
            raise ConfigError(
                f"target_modules names rows of {site.name} that overlap: {first[0]}_{first[1]} and "
                f"{second[0]}_{second[1]}; a row has one adapter"
            )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A site and the verdict of the configuration about the site.

    Attributes:
        site: The site.
        verdict: The verdict: whether the site is selected, and the reason.
        names: Names for the lookup of rank and alpha. The first name with an entry in the configuration
            counts.
        parameter: True if ``target_parameters`` chose it.
    """

    site: Site
    verdict: Verdict
    names: tuple[str, ...]
    parameter: bool = False

    def rank(self, config: LoraConfig) -> int:
        """Return the rank of the site's adapter."""
        return rank_for(self.names, config)

    def alpha(self, config: LoraConfig) -> float:
        """Return the alpha of the site's adapter."""
        return float(alpha_for(self.names, config))

    def scale(self, config: LoraConfig) -> float:
        """Return the number by which the site's branch is multiplied."""
        return scale_of(self.rank(config), self.alpha(config), config)


def choices(matches: Matches, config: LoraConfig) -> Iterator[Choice]:
    """Yield the verdict about each site, in order. If parts of a site are selected, yield theirs instead.

    ``target_parameters`` comes first: a weight that it names is adapted whole, even if ``exclude_modules``
    or the layer filters leave out the module. With ``ensure_weight_tying`` the name of a head selects the
    embedding whose weight it shares. The factors then belong to the embedding, and the head gets them
    transposed.
    """
    candidates = list(_choices(matches, config))
    heads = {
        weight: choice.site.name
        for choice in candidates
        if config.ensure_weight_tying and choice.verdict.selected and choice.site.family == "linear"
        for weight in choice.site.tied_to
    }
    for choice in candidates:
        head, site = heads.get(choice.site.weight), choice.site
        if head is None or site.family != "embedding" or excluded(site.name, config):
            yield choice
        else:
            verdict = Verdict(True, f"{head} is tied to it, which is selected")
            yield (
                choice if choice.verdict.selected else dataclasses.replace(choice, verdict=verdict)
            )


def _choices(matches: Matches, config: LoraConfig) -> Iterator[Choice]:
    for site in matches.sites:
        entry = parameter_entry(site.weight, config)
        if entry is not None:
            yield _as_parameter(site, entry, config)
            continue
        whole = judge(site.name, config, in_default=_in_default(site, config))
        parts = _choose_parts(site, config, whole)
        if parts:
            yield from (Choice(part, verdict, (part.name,)) for part, verdict in parts)
            continue
        if site.attention and not whole.selected and not excluded(site.name, config):
            yield _in_attention(site, whole, config)
            continue
        yield Choice(site, whole, (site.name,))


def _as_parameter(site: Site, entry: str, config: LoraConfig) -> Choice:
    saved = saved_by(site.name, config)
    if saved is not None:
        verdict = Verdict(False, f"trained in full: modules_to_save {saved!r}")
    else:
        verdict = Verdict(True, f"matches {entry!r} in target_parameters")
    return Choice(site, verdict, (site.weight,), parameter=True)


def _in_attention(site: Site, alone: Verdict, config: LoraConfig) -> Choice:
    """Return the verdict about a projection of an attention layer whose own name is not selected.

    The name of the layer may select it.
    """
    layer = site.attention
    named = not uses_default_targets(config) and judge(layer, config).selected
    if not named:
        return Choice(site, alone, (site.name,))
    verdict = Verdict(True, f"a projection of {layer}, which target_modules names")
    return Choice(site, verdict, (site.name, layer))


def _in_default(site: Site, config: LoraConfig) -> bool:
    if config.target_modules is None:
        return site.family != "embedding" and not site.head and not site.router
    return site.all_linear


def priced(model: nn.Module, row: PlannedSite) -> PlannedSite:
    """Return a planned site with its costs: trainable elements, FLOPs and bytes saved for backward.

    Args:
        model: The model, rewritten or not.
        row: The site, with its rank, dropout, kind and tied site.
    """
    site, kind = row.site, kind_of(row)
    itemsize = base_dtype(model, site).itemsize
    costs = kind.costs(site, row.rank)
    parameters, flops, saved = costs.parameters, costs.flops, costs.saved * itemsize
    frozen = 0
    if kind.low_rank:
        pattern = pattern_of(site)
        shapes = shapes_of(row)
        sizes = {"a": math.prod(shapes.a), "b": math.prod(shapes.b)}
        frozen = 0 if row.tied else sum(sizes[letter] for letter in kind.frozen)
        parameters += 0 if row.tied else sum(sizes.values()) - frozen
        flops += pattern.flops(site, row.rank)
        # A lookup saves the index (8 bytes). With dropout, the masked input and its mask are saved as well.
        saved += 8 if site.family == "embedding" else site.in_features * itemsize
        saved += site.in_features * (itemsize + 1) if row.dropout else 0
        saved += row.rank * itemsize
    # The graph of the whole model and those of its modules may have the same call. It counts once.
    times = max(Counter(call.region for call in site.calls).values())
    return dataclasses.replace(
        row, parameters=parameters, frozen=frozen, flops=flops * times, saved=saved * times
    )


_NAME = "trainable_token_indices"


def planned_tokens(
    capture: Capture,
    matches: Matches,
    config: LoraConfig,
    rows: Sequence[PlannedSite],
    saved: Sequence[str],
) -> tuple[PlannedTokens, ...]:
    """Return the embeddings and heads with trained rows (``trainable_token_indices``).

    A list applies to the model's input embedding. The keys of a dict are names of modules or ends of names.
    A key applies to all modules whose name ends with it. If the model declares a head as tied to an
    embedding, the head gets the same rows. With ``ensure_weight_tying``, so does any head that shares the
    weight of an embedding.

    Args:
        capture: The model as graphs.
        matches: Its linear operations.
        config: The configuration.
        rows: The sites with factors.
        saved: Modules that are trained in full.

    Raises:
        ConfigError: If there is no such embedding, it has no such row, it is adapted or trained in full as
            well, or its rows cannot be trained separately.
    """
    setting = config.trainable_token_indices
    if setting is None:
        return ()
    model = capture.model
    sites = {site.weight: site for site in matches.sites if _has_rows(site)}
    if isinstance(setting, Mapping):
        pairs = list(_named_tokens(model, matches, sites, setting))
    else:
        name = _input_embedding(model, matches)
        pairs = [(site, setting) for site in sites.values() if site.name == name]
        if not pairs:
            raise bad(_NAME, setting, _why_no_tokens(name, matches))
    planned = {site.name: PlannedTokens(site, tuple(indices)) for site, indices in pairs}
    if config.ensure_weight_tying or _declares_tying(model):
        planned = _with_tied(planned, sites, config)
    for row in planned.values():
        _check_tokens(capture, row, rows, saved)
    return tuple(planned.values())


def _has_rows(site: Site) -> bool:
    """Return True if each row of a site's weight belongs to a token, so that rows can be trained separately.

    This is so for a lookup, and for a product over the vocabulary.
    """
    if site.rows is not None or site.experts or site.view or any(c.left for c in site.calls):
        return False
    if site.family == "embedding":
        return all(call.pattern == "embedding" for call in site.calls)
    # A pattern of the user may do more than a product, and an einsum may have its outputs in any axis.
    is_product = all(call.pattern in ("linear", "matmul", "quantized") for call in site.calls)
    return site.family == "linear" and site.layout == "out_in" and is_product


def _input_embedding(model: nn.Module, matches: Matches) -> str:
    """Return the name of the embedding to which a list of token indices applies."""
    names = {id(module): name for name, module in base_modules(model)}
    declared = names.get(id(_declared_embedding(model)))
    if declared is not None:
        return declared
    lookups = [site.name for site in matches.sites if site.family == "embedding"]
    tokens = [name for name in lookups if name.rpartition(".")[2] == "embed_tokens"] or lookups
    if len(tokens) != 1:
        has = f"it has {', '.join(tokens)}: give a dict by name" if tokens else "it has none"
        raise ConfigError(f"LoraConfig.{_NAME}: a list is about the model's one embedding; {has}")
    return tokens[0]


def _declared_embedding(model: nn.Module) -> object:
    """Return the result of a transformers model's ``get_input_embeddings``, or None."""
    getter = getattr(model, "get_input_embeddings", None)
    # Some models have the method, but raise in it or return something else.
    try:
        return getter() if callable(getter) else None
    except NotImplementedError:
        return None


def tied_embedding(model: nn.Module) -> nn.Module | None:
    """Return the input embedding of a model that declares its embeddings as tied, or None."""
    embedding = _declared_embedding(model) if _declares_tying(model) else None
    return embedding if isinstance(embedding, nn.Module) else None


def _named_tokens(
    model: nn.Module,
    matches: Matches,
    sites: Mapping[str, Site],
    indices_by_key: Mapping[str, Collection[int]],
) -> Iterator[tuple[Site, Collection[int]]]:
    by_name = {site.name: site for site in sites.values()}
    names = [name for name, _ in base_modules(model, every_name=True) if name]
    for key, indices in indices_by_key.items():
        selected = [name for name in names if name.endswith(key)]
        if not selected:
            lookups = [site.name for site in sites.values() if site.family == "embedding"]
            has = ", ".join(lookups) or "none"
            raise bad(_NAME, key, f"no module has a name that ends so; the embeddings are {has}")
        for name in selected:
            if name not in by_name:
                raise bad(_NAME, key, _why_no_tokens(name, matches))
            yield by_name[name], indices


def _why_no_tokens(name: str, matches: Matches) -> str:
    for rejection in matches.rejections:
        if rejection.name in (name, f"{name}.weight"):
            return f"{name} cannot be used so: {rejection.reason}"
    return f"{name} is neither an embedding whose lookup is seen nor a linear layer"


def _declares_tying(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def _with_tied(
    planned: Mapping[str, PlannedTokens], sites: Mapping[str, Site], config: LoraConfig
) -> dict[str, PlannedTokens]:
    """Plan the trained rows of an embedding also for sites that share its weight and have no rows."""
    result = dict(planned)
    for row in planned.values():
        for weight in row.site.tied_to if row.lookup else ():
            tied = sites.get(weight)
            if tied is None:
                raise bad(
                    _NAME,
                    list(row.indices),
                    f"{row.name} shares its weight with {weight}, which no operation is seen to apply by "
                    "rows, so that both cannot be trained alike",
                )
            existing = planned.get(tied.name)
            if existing is None or existing.indices == row.indices:
                result[tied.name] = PlannedTokens(tied, row.indices, row.name)
            elif config.ensure_weight_tying:
                raise bad(
                    _NAME,
                    list(existing.indices),
                    f"{tied.name} is to stay tied to {row.name} (ensure_weight_tying), which has others: "
                    f"{list(row.indices)}",
                )
    return result


def _check_tokens(
    capture: Capture, row: PlannedTokens, rows: Sequence[PlannedSite], saved: Sequence[str]
) -> None:
    size = row.site.weight_shape[0]
    outside = [index for index in row.indices if index >= size]
    if outside:
        needed = max(outside) + 1
        raise bad(
            _NAME,
            outside,
            f"{row.name} has {size} rows, 0 to {size - 1}. For new tokens, give the model {needed} rows "
            f"first (transformers: model.resize_token_embeddings({needed}))",
        )
    for objection in _token_objections(capture, row, rows, saved):
        raise bad(_NAME, list(row.indices), f"{row.name} {objection}")


def _token_objections(
    capture: Capture, row: PlannedTokens, rows: Sequence[PlannedSite], saved: Sequence[str]
) -> Iterator[str]:
    """Yield the reasons why ``trainable_token_indices`` cannot train the planned rows of a weight."""
    if any(adapted.site.weight == row.site.weight for adapted in rows):
        yield "is adapted as well; take it out of the targets, or leave out its tokens"
    for module in saved:
        if row.site.weight.startswith(f"{module}."):
            yield f"is trained in full as part of {module} (modules_to_save); choose one of both"
    for call in row.site.calls if row.lookup else ():
        graph = capture.regions[call.region].graph
        node = next(node for node in graph.nodes if node.name == call.output)
        if lookup(node)[2]:
            yield (
                "scales gradients by the frequency of a token (scale_grad_by_freq), which is not known of "
                "some tokens alone"
            )


# --- the cost of a sample -------------------------------------------------------------------------
# The cost of the adapters of a network with convolutions for one sample.
#
# A convolution computes an output at each position. Layers differ in their number of positions, so
# costs for one position cannot be added. The positions are counted in a run on the meta device, which
# computes only shapes.


_log = logging.getLogger("lora_fx")


@dataclasses.dataclass
class Positions:
    """Numbers of vectors (tokens or pixels) that an operation reads and writes in a call of the model."""

    inputs: int = 0
    outputs: int = 0


def with_sample_cost(
    plan: Plan, capture: Capture, example_inputs: Any, *, compared: bool = False
) -> Plan:
    """Return a plan with the FLOPs and saved bytes of one sample, for a model with convolutions.

    The plan stays as it is if no convolution is adapted, or if the inputs are unknown.

    Args:
        plan: The plan.
        capture: The capture of the plan: a copy of the user's model, whose modules are called.
        example_inputs: As for :func:`lora_fx.plan`; None to make inputs from the model's own description.
        compared: True to compute the cost even without adapted convolutions, to compare with plans that have
            some.
    """
    if plan.unit == "token" and not compared:
        return plan
    # If no convolution is adapted, one of the others shows the size of the batch.
    skipped = [row.site for row in plan.skipped] if compared else []
    unadapted = [row.site for row in plan.skipped]
    cost = sample_cost(capture.model, plan.sites, example_inputs, skipped, unadapted)
    if cost is None:
        return plan
    return dataclasses.replace(
        plan, sample_cost=(cost.flops, cost.saved), site_costs=cost.sites, sample_flops=cost.base
    )


class SampleCost(NamedTuple):
    """Cost of a sample.

    Attributes:
        flops, saved: Extra FLOPs and saved bytes of all adapters.
        sites: The same of each adapted site.
        base: Forward FLOPs of the linear operations without adapters; None if the positions of one of them
            are unknown.
    """

    flops: int
    saved: int
    sites: tuple[tuple[int, int], ...]
    base: int | None

    @property
    def share(self) -> float | None:
        """Return the extra FLOPs relative to those of the base, or None if these are unknown."""
        return self.flops / self.base if self.base else None


def sample_cost(
    model: nn.Module,
    rows: Sequence[PlannedSite],
    example_inputs: Any,
    skipped: Sequence[Site] = (),
    unadapted: Sequence[Site] = (),
) -> SampleCost | None:
    """Return the cost of one sample, or None if its positions are unknown.

    Args:
        model: The model. It is called without data.
        rows: The adapted sites.
        example_inputs: As for :func:`lora_fx.plan`; None to make inputs from the model's own description.
        skipped: Sites that are not adapted, whose positions are counted to find the number of samples.
        unadapted: Further sites that are not adapted. They count only for the FLOPs of the base.
    """
    sites = [*(row.site for row in rows), *skipped]
    samples, positions = _positions_or_none(model, sites, example_inputs, unadapted)
    if not samples or any(row.name not in positions for row in rows):
        return None
    costs = [_cost(model, row, positions[row.name]) for row in rows]
    flops, saved = (sum(column) // samples for column in zip(*costs, strict=True))
    each = tuple((flops // samples, saved // samples) for flops, saved in costs)
    base = _base_flops_of([*sites, *unadapted], positions)
    return SampleCost(flops, saved, each, None if base is None else base // samples)


def _base_flops_of(sites: Sequence[Site], positions: Mapping[str, Positions]) -> int | None:
    """Return the FLOPs of operations at all their positions, or None if those of one are unknown."""
    # The parts of a fused operation have the positions of the whole.
    named = {site.part_of or site.name: (site.whole or site, site.name) for site in sites}
    costs = [(site, base_flops(site), name) for site, name in named.values()]
    costs = [cost for cost in costs if cost[1]]
    if any(name not in positions for _, _, name in costs):
        return None
    return sum(flops * positions_read(site, positions[name]) for site, flops, name in costs)


def positions_of(
    model: nn.Module, sites: Sequence[Site], example_inputs: Any
) -> dict[str, Positions]:
    """Return the numbers of vectors that operations read and write in a call, by name.

    Operations with unknown numbers are left out.

    Args:
        model: The model. It is called without data.
        sites: The operations.
        example_inputs: As for :func:`lora_fx.plan`; None to make inputs from the model's own description.
    """
    return _positions_or_none(model, list(sites), example_inputs)[1]


def base_flops(site: Site) -> int:
    """Return the forward FLOPs of an operation without adapters.

    They are those of a token or, for a convolution, of a position. Of several experts, one counts. A lookup
    costs nothing.
    """
    if site.family == "embedding":
        return 0
    count, out, inner = matrix_shape(site)
    times = max(Counter(call.region for call in site.calls).values(), default=1)
    return 2 * (1 if site.experts else count) * out * inner * times


def positions_read(site: Site, positions: Positions) -> int:
    """Return the number of vectors that an operation multiplies with its weight."""
    transposed = site.family == "conv" and site.layout == "in_out"
    return positions.inputs if transposed else positions.outputs


def _positions_or_none(
    model: nn.Module, sites: list[Site], example_inputs: Any, unadapted: Sequence[Site] = ()
) -> tuple[int | None, dict[str, Positions]]:
    """Count positions as :func:`_positions` does; return (None, {}) if the model cannot be called."""
    inputs = synthesise(model).inputs if example_inputs is None else example_inputs
    if inputs is None:
        return None, {}
    try:
        return _positions(model, sites, inputs, unadapted)
    except Exception as error:  # noqa: BLE001  the user's code may raise anything without values
        _log.debug("no count of positions: %s: %s", type(error).__name__, error)
        return None, {}


def _cost(model: nn.Module, row: PlannedSite, positions: Positions) -> tuple[int, int]:
    """Return the extra FLOPs and the saved bytes of a site, for all positions of a batch."""
    times = max(Counter(call.region for call in row.site.calls).values())
    itemsize = base_dtype(model, row.site).itemsize
    looked_up = row.site.family == "embedding"  # it reads an id for each output, and no vector
    of_inputs = 0 if looked_up else row.site.in_features * itemsize
    of_inputs += row.site.in_features * (itemsize + 1) if row.dropout else 0
    of_outputs = row.saved // times - of_inputs
    # A transposed convolution multiplies with A at each position of its input.
    scattered = row.site.family == "conv" and row.site.layout == "in_out" and row.rank > 0
    kernel = math.prod(row.site.shape[2:])
    of_a = 2 * row.rank * row.site.in_features // row.site.groups * kernel if scattered else 0
    return (
        of_a * positions.inputs + (row.flops // times - of_a) * positions.outputs,
        of_inputs * positions.inputs + of_outputs * positions.outputs,
    )


def _positions(
    model: nn.Module, sites: list[Site], example_inputs: Any, unadapted: Sequence[Site]
) -> tuple[int | None, dict[str, Positions]]:
    """Call a model without data. Return the number of samples (0 if unknown) and the positions of each site.

    The number of samples is the batch size of the first convolution, if an input has as many rows. This
    number is wrong for a model that folds other axes into that batch (frames of videos), or processes its
    samples one by one.
    """

    def meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(meta, normalize(example_inputs))
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    gpus = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
    values = {name: value.detach().to("meta") for name, value in tensors.items()}
    products = _Products(sites, values, inputs, unadapted)
    with torch.no_grad(), torch.random.fork_rng(devices=list(gpus)), products:
        torch.func.functional_call(model, values, args, kwargs)
    counted = {
        name: count for name, count in products.found.items() if name not in products.elsewhere
    }
    return products.samples, counted


class _Products(Listener):
    """Listener that counts the positions of each product with the weight of a site.

    Args:
        sites: The sites.
        values: Tensors of the model by name.
        inputs: Tensors among the arguments of the model.
        unadapted: Further sites, which do not decide the number of samples.

    Attributes:
        found: The counted positions, by name of the site.
        elsewhere: Sites whose weight is also used by other operations.
        samples: Batch size of the first convolution, if an input has as many rows; else 0.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        values: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        unadapted: Sequence[Site] = (),
    ) -> None:
        super().__init__()
        self._sites: dict[int, list[Site]] = defaultdict(list)
        self._unadapted = {site.name for site in unadapted} - {site.name for site in sites}
        distinct = {site.name: site for site in (*sites, *unadapted)}
        for site in distinct.values():
            if site.weight in values and not site.experts:
                self._sites[id(values[site.weight])].append(site)
        self._given = [(tensor.dim(), tensor.shape[:1]) for tensor in inputs]
        self.found: dict[str, Positions] = defaultdict(Positions)
        self.elsewhere: set[str] = set()
        self.samples: int | None = None

    def hear(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count the positions of a call, if an argument is the weight of a site."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if isinstance(out, Tensor):
            for weight in tensors:
                operands = [tensor for tensor in tensors if tensor is not weight]
                for site in self._sites.get(id(weight), ()):
                    self._count(site, operands, out)

    def _count(self, site: Site, operands: Sequence[Tensor], out: Tensor) -> None:
        if not operands:
            self.elsewhere.add(site.name)  # such as a view of the weight that is multiplied later
            return
        x = max(operands, key=Tensor.numel)  # a smaller operand is a bias
        spatial = len(site.shape) - 2 if site.family == "conv" else 0
        positions = self.found[site.name]
        positions.inputs += x.numel() // x.shape[-1 - spatial]
        positions.outputs += out.numel() // out.shape[-1 - spatial]
        if spatial and self.samples is None and site.name not in self._unadapted:
            unbatched = x.dim() == spatial + 1
            is_batch = any(
                d == x.dim() if unbatched else rows == x.shape[:1] for d, rows in self._given
            )
            self.samples = (1 if unbatched else x.shape[0]) if is_batch else 0
