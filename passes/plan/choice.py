"""Apply a configuration to sites: by module, by parameter, by the attention layer that holds several weights.

PEFT adapts modules and parameters. Here the sites are operations, so that a name of either kind can mean
several: ``nn.MultiheadAttention`` is four, and a weight that is applied in parts is one for each part. The
rank and alpha of a site come from the pattern for its own name or, failing that, for the name that chose it.
The costs of an adapter at a site follow from its kind and its pattern. Which rows of which embedding are
trained (``trainable_token_indices``) follows PEFT's rules, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

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
from lora_fx.passes.parameters import base_dtype, base_modules
from lora_fx.passes.patterns import lookup, pattern_of
from lora_fx.torch_private import pytree

__all__ = ["Choice", "choices", "planned_tokens", "priced", "with_sample_cost"]

_ROWS = re.compile(r"(?P<name>.+)\.(?P<start>\d+)_(?P<stop>\d+)")


def _choose_parts(site: Site, config: LoraConfig, whole: Verdict) -> list[tuple[Site, Verdict]]:
    """Return the parts of a site that are adapted instead of it; empty if the site itself is selected.

    Args:
        site: Any site.
        config: What the user asks for.
        whole: What the configuration says of the site.

    Raises:
        ConfigError: If rows are named that the weight does not have, or that overlap.
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
    # Rows that have a name, too, are called what the configuration calls them.
    parts = [part for part in parts if part.rows not in numbered] + list(numbered.values())
    verdicts = [(part, judge(part.name, config)) for part in parts]
    selected = [part for part, verdict in verdicts if verdict.selected]
    _check(site, selected)
    return verdicts if selected else []


def _by_number(site: Site, config: LoraConfig) -> Iterator[Site]:
    targets = config.target_modules
    for target in targets if isinstance(targets, tuple) else ():
        found = _ROWS.fullmatch(target)
        if found is None or not f".{site.name}".endswith(f".{found['name']}"):
            continue
        rows = int(found["start"]), int(found["stop"])
        if not rows[0] < rows[1] <= site.out_features:
            raise ConfigError(
                f"target_modules {target!r}: {site.name} has the rows 0 to {site.out_features}, "
                "written start_stop as in a slice"
            )
        yield site.part(f"{found['start']}_{found['stop']}", rows)


def _check(site: Site, parts: list[Site]) -> None:
    ordered = sorted(part.rows or (0, 0) for part in parts)
    for one, other in itertools.pairwise(ordered):
        if one[1] > other[0]:
            raise ConfigError(
                f"target_modules names rows of {site.name} that overlap: {one[0]}_{one[1]} and "
                f"{other[0]}_{other[1]}; a row has one adapter"
            )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A site and what the configuration says about it.

    Attributes:
        site: The site.
        verdict: Whether it is selected, and why or why not.
        names: By which ranks and alphas are looked up, the first that a pattern knows.
        parameter: Whether ``target_parameters`` chose it.
    """

    site: Site
    verdict: Verdict
    names: tuple[str, ...]
    parameter: bool = False

    def rank(self, config: LoraConfig) -> int:
        """The rank of the adapter."""
        return rank_for(self.names, config)

    def alpha(self, config: LoraConfig) -> float:
        """The alpha of the adapter."""
        return float(alpha_for(self.names, config))

    def scale(self, config: LoraConfig) -> float:
        """The factor of the branch."""
        return scale_of(self.rank(config), self.alpha(config), config)


def choices(capture: Capture, matches: Matches, config: LoraConfig) -> Iterator[Choice]:
    """Return all sites in order; instead of a fused one its parts, if those are selected.

    ``target_parameters`` comes first: a weight that it names is adapted whole, whatever
    ``exclude_modules`` and the layer filters say of the module. With ``ensure_weight_tying`` a head means
    the embedding whose weight it has: factors are an embedding's, and the head gets them transposed.
    """
    every = list(_choices(capture, matches, config))
    heads = {
        weight: one.site.name
        for one in every
        if config.ensure_weight_tying and one.verdict.selected and one.site.family == "linear"
        for weight in one.site.tied_to
    }
    for one in every:
        head, site = heads.get(one.site.weight), one.site
        if head is None or site.family != "embedding" or excluded(site.name, config):
            yield one
        else:
            verdict = Verdict(True, f"{head} is tied to it, which is selected")
            yield one if one.verdict.selected else dataclasses.replace(one, verdict=verdict)


def _choices(capture: Capture, matches: Matches, config: LoraConfig) -> Iterator[Choice]:
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
    """Decide about a projection by the name of its attention layer, if its own name is not selected."""
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
    """A planned site with what it costs: trainable elements, FLOPs and bytes saved for backward.

    Args:
        model: The model, rewritten or not.
        row: The site, with its rank, dropout, kind and what it is tied to.
    """
    site, kind = row.site, kind_of(row)
    itemsize = base_dtype(model, site).itemsize
    extra = kind.costs(site)
    parameters, flops, saved = extra.parameters, extra.flops, extra.saved * itemsize
    if kind.low_rank:
        pattern = pattern_of(site)
        parameters += 0 if row.tied else pattern.factors(site, row.rank).numel
        flops += pattern.flops(site, row.rank)
        # An index is saved as it is; a vector a second time, masked, with its mask, for dropout.
        saved += 8 if site.family == "embedding" else site.in_features * itemsize
        saved += site.in_features * (itemsize + 1) if row.dropout else 0
        saved += row.rank * itemsize
    # A region of a whole model and the regions below it show the same application twice.
    applied = max(Counter(call.region for call in site.calls).values())
    return dataclasses.replace(
        row, parameters=parameters, flops=flops * applied, saved=saved * applied
    )


_NAME = "trainable_token_indices"


def planned_tokens(
    capture: Capture,
    matches: Matches,
    config: LoraConfig,
    rows: Sequence[PlannedSite],
    saved: Sequence[str],
) -> tuple[PlannedTokens, ...]:
    """The embeddings, and heads, of which rows are trained.

    A list is about the model's input embedding. The keys of a dict are names of modules, or their ends; a
    key that ends several names is about all of them. A head that the model declares as tied to an embedding
    gets the rows of that; so does, with ``ensure_weight_tying``, any that shares its weight.

    Args:
        capture: The model as graphs.
        matches: Its linear operations.
        config: The configuration.
        rows: What gets factors.
        saved: Modules that are trained in full.

    Raises:
        ConfigError: If there is no such embedding, it has no such row, it is adapted or trained in full as
            well, or its rows cannot be trained each by itself.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return ()
    model = capture.model
    sites = {site.weight: site for site in matches.sites if _has_rows(site)}
    if isinstance(wanted, Mapping):
        found = list(_named_tokens(model, matches, sites, wanted))
    else:
        name = _input_embedding(model, matches)
        found = [(site, wanted) for site in sites.values() if site.name == name]
        if not found:
            raise bad(_NAME, wanted, _why_no_tokens(name, matches))
    planned = {site.name: PlannedTokens(site, tuple(indices)) for site, indices in found}
    if config.ensure_weight_tying or _declares_tying(model):
        planned = _with_tied(planned, sites, config)
    for row in planned.values():
        _check_tokens(capture, row, rows, saved)
    return tuple(planned.values())


def _has_rows(site: Site) -> bool:
    """Whether a token is a row of the weight: of a lookup, or of a product that makes the vocabulary."""
    if site.rows is not None or site.experts or site.view or any(c.left for c in site.calls):
        return False
    if site.family == "embedding":
        return all(call.pattern == "embedding" for call in site.calls)
    # A registered pattern may do more than a product, and an einsum has its outputs anywhere.
    known = all(call.pattern in ("linear", "matmul", "quantized") for call in site.calls)
    return site.family == "linear" and site.layout == "out_in" and known


def _input_embedding(model: nn.Module, matches: Matches) -> str:
    """Return the embedding that a list of token indices is for."""
    names = {id(module): name for name, module in base_modules(model)}
    getter = getattr(model, "get_input_embeddings", None)
    # Some models have the method and raise in it, or answer with something else.
    try:
        own = names.get(id(getter())) if callable(getter) else None
    except NotImplementedError:
        own = None
    if own is not None:
        return own
    lookups = [site.name for site in matches.sites if site.family == "embedding"]
    tokens = [name for name in lookups if name.rpartition(".")[2] == "embed_tokens"] or lookups
    if len(tokens) != 1:
        has = f"it has {', '.join(tokens)}: give a dict by name" if tokens else "it has none"
        raise ConfigError(f"LoraConfig.{_NAME}: a list is about the model's one embedding; {has}")
    return tokens[0]


def _named_tokens(
    model: nn.Module,
    matches: Matches,
    sites: Mapping[str, Site],
    wanted: Mapping[str, Collection[int]],
) -> Iterator[tuple[Site, Collection[int]]]:
    by_name = {site.name: site for site in sites.values()}
    names = [name for name, _ in base_modules(model, every_name=True) if name]
    for key, indices in wanted.items():
        meant = [name for name in names if name.endswith(key)]
        if not meant:
            lookups = [site.name for site in sites.values() if site.family == "embedding"]
            has = ", ".join(lookups) or "none"
            raise bad(_NAME, key, f"no module has a name that ends so; the embeddings are {has}")
        for name in meant:
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
    """Let what shares the weight of an embedding share its trained rows, unless it has its own."""
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
            own = planned.get(tied.name)
            if own is None or own.indices == row.indices:
                result[tied.name] = PlannedTokens(tied, row.indices, row.name)
            elif config.ensure_weight_tying:
                raise bad(
                    _NAME,
                    list(own.indices),
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
        raise bad(_NAME, outside, f"{row.name} has {size} rows, 0 to {size - 1}")
    for objection in _token_objections(capture, row, rows, saved):
        raise bad(_NAME, list(row.indices), f"{row.name} {objection}")


def _token_objections(
    capture: Capture, row: PlannedTokens, rows: Sequence[PlannedSite], saved: Sequence[str]
) -> Iterator[str]:
    """Why rows cannot be trained, each by itself."""
    if any(one.site.weight == row.site.weight for one in rows):
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
# What the adapters of a network with convolutions cost for one sample.
#
# A convolution computes an output at each position, and layers differ in how many they have, so
# that costs for one position do not add up. A run on the meta device, which computes shapes and
# nothing else, counts them.


_log = logging.getLogger("lora_fx")


@dataclasses.dataclass
class _Positions:
    inputs: int = 0
    outputs: int = 0


def with_sample_cost(plan: Plan, capture: Capture, example_inputs: Any) -> Plan:
    """Return a plan that says what a sample costs, if it has convolutions and the inputs are known.

    Args:
        plan: The plan.
        capture: What it was made for: a copy of the user's model, whose modules are called.
        example_inputs: As for :func:`lora_fx.plan`; None for inputs that the model says it takes.
    """
    if plan.unit == "token":
        return plan
    inputs = synthesise(capture.model).inputs if example_inputs is None else example_inputs
    if inputs is None:
        return plan
    try:
        samples, found = _positions(capture.model, [row.site for row in plan.sites], inputs)
    except Exception as error:  # noqa: BLE001  whatever the user's code raises without values
        _log.debug("no cost of a sample: %s: %s", type(error).__name__, error)
        return plan
    if not samples or any(row.name not in found for row in plan.sites):
        return plan
    each = [_cost(capture.model, row, found[row.name]) for row in plan.sites]
    flops, saved = (sum(one) // samples for one in zip(*each, strict=True))
    return dataclasses.replace(plan, sample_cost=(flops, saved))


def _cost(model: nn.Module, row: PlannedSite, positions: _Positions) -> tuple[int, int]:
    """FLOPs and bytes of a site for all positions of a batch."""
    applied = max(Counter(call.region for call in row.site.calls).values())
    itemsize = base_dtype(model, row.site).itemsize
    looked_up = row.site.family == "embedding"  # by ids, one for each output
    of_inputs = 0 if looked_up else row.site.in_features * itemsize
    of_inputs += row.site.in_features * (itemsize + 1) if row.dropout else 0
    of_outputs = row.saved // applied - of_inputs
    # A transposed convolution multiplies with A at each position of its input.
    scattered = row.site.family == "conv" and row.site.layout == "in_out" and row.rank > 0
    kernel = math.prod(row.site.shape[2:])
    of_a = 2 * row.rank * row.site.in_features // row.site.groups * kernel if scattered else 0
    return (
        of_a * positions.inputs + (row.flops // applied - of_a) * positions.outputs,
        of_inputs * positions.inputs + of_outputs * positions.outputs,
    )


def _positions(
    model: nn.Module, sites: list[Site], example_inputs: Any
) -> tuple[int | None, dict[str, _Positions]]:
    """Count positions of each site over a batch, and the samples of the batch, 0 where they are not seen.

    They are what the first convolution takes as its batch, if an input has so many rows. A model that folds
    other axes into that batch (frames of videos), or goes through its samples one by one, has another number.
    """

    def meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(meta, normalize(example_inputs))
    given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    gpus = {one.device for one in tensors.values() if one.device.type == "cuda"}
    values = {name: value.detach().to("meta") for name, value in tensors.items()}
    products = _Products(sites, values, given)
    with torch.no_grad(), torch.random.fork_rng(devices=list(gpus)), products:
        torch.func.functional_call(model, values, args, kwargs)
    found = {name: one for name, one in products.found.items() if name not in products.elsewhere}
    return products.samples, found


class _Products(Listener):
    """Counts the positions of each product with the weight of a site.

    Args:
        sites: The sites.
        values: Tensors of the model by name.
        given: What the model is called with.

    Attributes:
        found: Name of a site to what was counted.
        elsewhere: Sites whose weight is also computed with otherwise.
        samples: Rows of the batch of the first convolution, if an input has so many; else 0.
    """

    def __init__(
        self, sites: Sequence[Site], values: Mapping[str, Tensor], given: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self._sites: dict[int, list[Site]] = defaultdict(list)
        for site in sites:
            if site.weight in values and not site.experts:
                self._sites[id(values[site.weight])].append(site)
        self._given = [(one.dim(), one.shape[:1]) for one in given]
        self.found: dict[str, _Positions] = defaultdict(_Positions)
        self.elsewhere: set[str] = set()
        self.samples: int | None = None

    def hear(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Looks for weights among the arguments."""
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if isinstance(out, Tensor):
            for weight in tensors:
                others = [one for one in tensors if one is not weight]
                for site in self._sites.get(id(weight), ()):
                    self._count(site, others, out)

    def _count(self, site: Site, others: Sequence[Tensor], out: Tensor) -> None:
        if not others:
            self.elsewhere.add(site.name)  # a view, say, with which something is multiplied later
            return
        x = max(others, key=Tensor.numel)  # the other one is a bias
        spatial = len(site.shape) - 2 if site.family == "conv" else 0
        found = self.found[site.name]
        found.inputs += x.numel() // x.shape[-1 - spatial]
        found.outputs += out.numel() // out.shape[-1 - spatial]
        if spatial and self.samples is None:
            alone = x.dim() == spatial + 1
            seen = any(d == x.dim() if alone else rows == x.shape[:1] for d, rows in self._given)
            self.samples = (1 if alone else x.shape[0]) if seen else 0
