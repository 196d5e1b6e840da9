"""Which rows of which embedding are trained: ``trainable_token_indices`` by PEFT's rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from lora_fx.config import LoraConfig, bad
from lora_fx.errors import ConfigError
from lora_fx.ir import Capture, Matches, PlannedSite, PlannedTokens, Site
from lora_fx.passes.parameters import base_modules
from lora_fx.passes.patterns import lookup

__all__ = ["planned_tokens"]

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
        found = list(_named(model, matches, sites, wanted))
    else:
        name = _input_embedding(model, matches)
        found = [(site, wanted) for site in sites.values() if site.name == name]
        if not found:
            raise bad(_NAME, wanted, _why(name, matches))
    planned = {site.name: PlannedTokens(site, tuple(indices)) for site, indices in found}
    if config.ensure_weight_tying or _declares_tying(model):
        planned = _with_tied(planned, sites, config)
    for row in planned.values():
        _check(capture, row, rows, saved)
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
    """The embedding that a list is about."""
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


def _named(
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
                raise bad(_NAME, key, _why(name, matches))
            yield by_name[name], indices


def _why(name: str, matches: Matches) -> str:
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
    """Gives what shares the weight of an embedding the rows of that, unless it has others of its own."""
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


def _check(
    capture: Capture, row: PlannedTokens, rows: Sequence[PlannedSite], saved: Sequence[str]
) -> None:
    size = row.site.weight_shape[0]
    outside = [index for index in row.indices if index >= size]
    if outside:
        raise bad(_NAME, outside, f"{row.name} has {size} rows, 0 to {size - 1}")
    if any(one.site.weight == row.site.weight for one in rows):
        raise bad(
            _NAME,
            list(row.indices),
            f"{row.name} is adapted as well; take it out of the targets, or leave out its tokens",
        )
    for module in saved:
        if row.site.weight.startswith(f"{module}."):
            raise bad(
                _NAME,
                list(row.indices),
                f"{row.name} is trained in full as part of {module} (modules_to_save); choose one of both",
            )
    for call in row.site.calls if row.lookup else ():
        graph = capture.regions[call.region].graph
        node = next(node for node in graph.nodes if node.name == call.output)
        if lookup(node)[2]:
            raise bad(
                _NAME,
                list(row.indices),
                f"{row.name} scales gradients by the frequency of a token (scale_grad_by_freq), which is "
                "not known of some tokens alone",
            )
