"""The configuration of existing adapters for PEFT: exact targets, ranks and alphas."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torch import nn

from lora_fx import torch_private
from lora_fx.config import LoraConfig, alpha_for, rank_for
from lora_fx.ir import AdapterRecord, PlannedSite, Site, join
from lora_fx.kinds import chosen_kind, is_plain
from lora_fx.passes.graph import is_conv1d, original_class
from lora_fx.passes.parameters import base_parameters
from lora_fx.passes.plan import expert_names

__all__ = [
    "WRAPPER",
    "Layout",
    "Target",
    "by_site",
    "is_attention",
    "layout_of",
    "origin_of",
    "targets_of",
    "with_patterns",
    "with_targets",
    "written_config",
]


WRAPPER = "base_layer"
"""Name of the wrapped module in a wrapper of PEFT."""

_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class Layout:
    """PEFT's wrappers around the modules of one model.

    Attributes:
        modules: Modules that have a wrapper.
        parameters: Names of the wrapped parameters of a module, the innermost first.
        attention: The modules that are an ``nn.MultiheadAttention``.
        transposed: The modules that declare their experts as stored [E, in, out].
    """

    modules: frozenset[str]
    parameters: Mapping[str, tuple[str, ...]]
    attention: frozenset[str]
    transposed: frozenset[str] = frozenset()

    @functools.cached_property
    def weights(self) -> frozenset[str]:
        """FQNs of the wrapped parameters."""
        return frozenset(
            join(owner, name) for owner, names in self.parameters.items() for name in names
        )

    def inside(self, name: str) -> str:
        """Return PEFT's name for a module or a tensor. For a wrapped module it is the outermost wrapper."""
        done, wrapped = "", ""
        for atom in name.split("."):
            wrapped = join(wrapped, *[WRAPPER] * self._depth(done), atom)
            done = join(done, atom)
        return wrapped

    def prefix(self, weight: str) -> str:
        """Return the name of the wrapper that holds the factors of a wrapped parameter."""
        owner, _, name = weight.rpartition(".")
        names = self.parameters[owner]
        return join(self.inside(owner), *[WRAPPER] * (len(names) - 1 - names.index(name)))

    def place(self, site: Site) -> str:
        """Return the name that PEFT adapts for this site: a weight, module or attention layer; or empty.

        Sites with the same name share one adapter of PEFT.
        """
        if site.weight in self.weights:
            return site.weight
        for owner in (site.owner, site.owner.rpartition(".")[0]):
            if owner in self.attention:
                return owner
        return site.owner if site.parameter == "weight" and site.owner in self.modules else ""

    def crossed(self, site: Site) -> bool:
        """Return True if PEFT swaps A and B of a wrapped parameter, because PEFT reads weights as [out, in].

        PEFT reads a weight as [in, out] only if it has experts and its module has ``is_transposed``.
        """
        theirs = "in_out" if site.experts and site.owner in self.transposed else "out_in"
        return site.layout != theirs

    def joins(self, site: Site) -> bool:
        """Return True if PEFT has no separate adapter for a site, but one for a whole weight or layer."""
        target = self.place(site)
        return bool(target) and (site.rows is not None or target in self.attention)

    def _depth(self, module: str) -> int:
        return (module in self.modules) + len(self.parameters.get(module, ()))


def layout_of(
    model: nn.Module, record: AdapterRecord, as_parameters: Collection[str] = ()
) -> Layout:
    """Choose the modules and parameters that PEFT wraps for an adapter, so that PEFT can load it.

    Args:
        model: The rewritten model.
        record: The adapter.
        as_parameters: FQNs of weights that are wrapped as parameters, although PEFT could wrap their module.
    """
    rows = [row for row in record.sites if not row.tied]
    # PEFT's wrappers of parameters and of attention layers have only A and B.
    plain = is_plain(record.config)
    modules: set[str] = {row.site.holder for row in record.sites if row.tied}
    parameters: dict[str, Site] = {}
    attention: set[str] = set()
    for row in rows:
        site, owner = row.site, model.get_submodule(row.site.owner)
        layer = _attention(model, site) if plain and site.weight not in as_parameters else None
        if layer is not None:
            attention.add(layer)
        elif _as_module(site, owner, plain) and site.weight not in as_parameters:
            modules.add(site.owner)
        elif plain and site.owner and _is_matrix(site):
            parameters[site.weight] = site
        elif site.owner and site.parameter == "weight" and site.rows is None:
            # PEFT cannot wrap this kind of module. It gets the names that PEFT's wrapper would have.
            modules.add(site.owner)
    _move_to_parameters(model, rows, modules, parameters, plain)
    kept = _reachable(model, parameters, record.saved_modules)
    for layer in attention:
        modules |= {layer, join(layer, "out_proj")}
    transposed = {
        site.owner
        for site in parameters.values()
        if getattr(model.get_submodule(site.owner), "is_transposed", False)
    }
    return Layout(
        frozenset(modules), _in_order(model, kept), frozenset(attention), frozenset(transposed)
    )


def is_attention(module: nn.Module) -> bool:
    """Return True for an ``nn.MultiheadAttention`` that PEFT can adapt: with a single ``in_proj_weight``."""
    return isinstance(module, nn.MultiheadAttention) and torch_private.projects_at_once(module)


def _attention(model: nn.Module, site: Site) -> str | None:
    """Return the attention layer that a site is a projection of, or None."""
    if site.parameter == "in_proj_weight" and is_attention(model.get_submodule(site.owner)):
        return site.owner
    outer, _, name = site.owner.rpartition(".")
    inner = name == "out_proj" and site.parameter == "weight" and site.rows is None
    return outer if inner and is_attention(model.get_submodule(outer)) else None


def _as_module(site: Site, owner: nn.Module, plain: bool) -> bool:
    if not site.owner or site.parameter != "weight":
        return False
    known = isinstance(owner, _KINDS) or is_conv1d(owner)
    return known if site.rows is None else known and plain and site.view is None


def _is_matrix(site: Site) -> bool:
    """Return True if PEFT reads a weight as the operation does: a matrix, or a matrix for each expert."""
    dims = len(site.weight_shape)
    return site.view is None and site.family != "conv" and dims == (3 if site.experts else 2)


def _move_to_parameters(
    model: nn.Module,
    rows: Iterable[PlannedSite],
    modules: set[str],
    parameters: dict[str, Site],
    plain: bool,
) -> None:
    """Move sites from modules to parameters if PEFT cannot wrap their module together with its parameters.

    PEFT wraps either a module or its parameters, not both. A Conv1D of transformers sets ``fan_in_fan_out``,
    which parameters do not allow. In some mixtures of experts PEFT takes names of modules for parameters of
    the experts.
    """
    experts = expert_names(model) if plain else {}
    owners = {site.owner for site in parameters.values()}
    for row in rows:
        site = row.site
        if site.owner not in modules or not _is_matrix(site):
            continue
        renamed = site.owner.rpartition(".")[2] in experts and site.quantized is None
        if (
            renamed
            or site.owner in owners
            or (owners and is_conv1d(model.get_submodule(site.owner)))
        ):
            modules.discard(site.owner)
            parameters[site.weight] = site


def _reachable(model: nn.Module, parameters: Mapping[str, Site], saved: Iterable[str]) -> list[str]:
    """Return the parameters that PEFT can find.

    PEFT finds a parameter if its name matches no other parameter, and its module is not inside a wrapped one.
    PEFT does not wrap a module that holds one of ``modules_to_save`` either.
    """
    owners = {site.owner for site in parameters.values()}
    ends = {f".{weight}" for weight in parameters}
    taken = [name for name in base_parameters(model) if name not in parameters]
    unclear = {end[1:] for end in ends if any(name.endswith(end) for name in taken)}
    around = {outer for name in saved for outer in _outer(name)}
    return [
        weight
        for weight, site in parameters.items()
        if weight not in unclear
        and site.owner not in around
        and not any(outer in owners for outer in _outer(site.owner))
    ]


def _outer(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _in_order(model: nn.Module, weights: Iterable[str]) -> dict[str, tuple[str, ...]]:
    names_by_owner: dict[str, set[str]] = {}
    for weight in weights:
        owner, _, name = weight.rpartition(".")
        names_by_owner.setdefault(owner, set()).add(name)
    return {
        owner: tuple(n for n in model.get_submodule(owner)._parameters if n in names)
        for owner, names in names_by_owner.items()
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """An entry of a configuration: the name of a module or parameter, with its rank and alpha.

    Attributes:
        name: FQN of a module, or of a parameter.
        rank, alpha: Rank and alpha of its adapter.
        parameter: True if the name is an entry of ``target_parameters``.
        within: Names of parts of the module. PEFT looks up rank and alpha by these names first.
    """

    name: str
    rank: int
    alpha: float
    parameter: bool = False
    within: tuple[str, ...] = ()


def with_targets(config: LoraConfig, targets: Iterable[Target], model: nn.Module) -> LoraConfig:
    """Return ``config`` with exactly these targets, each with its rank and alpha."""
    targets = tuple(targets)
    exact = dataclasses.replace(
        config,
        target_modules=_exactly(tuple(t.name for t in targets if not t.parameter), model),
        target_parameters=tuple(t.name for t in targets if t.parameter) or None,
        exclude_modules=None,
        scope=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=chosen_kind(config).chosen_start or True,
        loftq_config=None,
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )
    return with_patterns(exact, targets) if targets else exact


def by_site(rows: Iterable[PlannedSite]) -> list[Target]:
    """Return a target for each site by the site's name, even if PEFT has no such name."""
    return [Target(row.name, row.rank, row.alpha) for row in rows]


def targets_of(record: AdapterRecord, layout: Layout) -> list[Target]:
    """Return a target for each site that does not share an adapter of PEFT with other sites."""
    return [
        Target(row.site.weight, row.rank, row.alpha, parameter=True)
        if row.site.weight in layout.weights
        else Target(row.name, row.rank, row.alpha)
        for row in record.sites
        if row.tied or not layout.joins(row.site)
    ]


def written_config(
    model: nn.Module, record: AdapterRecord, targets: Iterable[Target]
) -> LoraConfig:
    """Return the configuration to save, with a resolved rank and alpha for each target."""
    targets = tuple(targets)
    parameters = any(target.parameter for target in targets)
    linear = [row.site.layout for row in record.sites if row.site.family == "linear"]
    config = dataclasses.replace(
        with_targets(record.config, targets, model),
        modules_to_save=record.saved_modules or None,
        inference_mode=True,
        # PEFT corrects a wrong fan_in_fan_out, with a warning at every module. If it wraps a parameter, it
        # allows neither fan_in_fan_out nor dropout.
        fan_in_fan_out=bool(linear)
        and not parameters
        and all(layout == "in_out" for layout in linear),
        lora_dropout=0.0 if parameters else record.config.lora_dropout,
        base_model_name_or_path=record.config.base_model_name_or_path or origin_of(model),
        auto_mapping=record.config.auto_mapping or _class_of(model, record.config),
    )
    if record.config.init_lora_weights == "loftq":
        config = dataclasses.replace(
            config, init_lora_weights="loftq", loftq_config=record.config.loftq_config
        )
    return config


def _class_of(model: nn.Module, config: LoraConfig) -> dict[str, str] | None:
    """Return the base's class for ``auto_mapping``. PEFT loads the base by it if the task type is not set."""
    if config.task_type is not None:
        return None
    cls = original_class(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def with_patterns(config: LoraConfig, targets: Sequence[Target]) -> LoraConfig:
    """Return ``config`` with the most frequent rank and alpha as defaults, and patterns for other targets.

    Kinds without factors have neither rank nor alpha.
    """
    if not chosen_kind(config).low_rank:
        return config
    ranks = {target.name: target.rank for target in targets}
    alphas = {
        target.name: int(target.alpha) if float(target.alpha).is_integer() else target.alpha
        for target in targets
    }
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))

    def resolved(key: Callable[[str], str]) -> LoraConfig:
        return dataclasses.replace(
            config,
            r=int(r),
            rank_pattern={key(name): rank for name, rank in ranks.items() if rank != r},
            lora_alpha=alpha,
            alpha_pattern={key(name): value for name, value in alphas.items() if value != alpha},
        )

    plain = resolved(str)
    if all(_decided(target, plain, ranks, alphas) for target in targets):
        return plain
    # A key is a regular expression for the end of a name: "0" would match "block.0" as well.
    return resolved(lambda name: f"^{re.escape(name)}")


def _decided(
    target: Target,
    config: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> bool:
    """Return True if ``config`` gives a target its rank and alpha, by each name that PEFT looks up."""
    return all(
        rank_for(names, config) == ranks[target.name]
        and alpha_for(names, config) == alphas[target.name]
        for names in ((target.name,), *((other, target.name) for other in target.within))
    )


def _exactly(names: tuple[str, ...], model: nn.Module) -> tuple[str, ...] | str:
    """Return ``target_modules`` that match these names and no others of the model.

    A name in a list also matches every longer name that ends in it. In that case the result is a regular
    expression.
    """
    ends = tuple(f".{name}" for name in names)
    wanted = set(names)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in wanted):
        return "|".join(re.escape(name) for name in names)
    return names


def origin_of(model: nn.Module) -> str | None:
    """Return the source of a transformers model (``name_or_path``), or None."""
    origin = model.__dict__.get("name_or_path")
    return origin if isinstance(origin, str) and origin else None
