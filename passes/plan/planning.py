"""The dry run: decide which sites are adapted, and with which adapters.

PEFT's rules (:mod:`lora_fx.config.selection`) decide which names the configuration selects. The matches say
which operations have these names. With ``target_modules=None`` every matrix product and convolution is
selected except the output head and the routers of mixtures of experts. These, and lookups in an embedding,
are adapted only if they are named.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from lora_fx.config import (
    ALL_LINEAR,
    LoraConfig,
    Verdict,
    judge,
    nearest_names,
    parameter_entry,
    saved_module,
    scale_of,
    unmatched,
    unmatched_saved,
    unmatched_targets,
    uses_default_targets,
)
from lora_fx.errors import CaptureError, ConfigError, NoMatchError, PartialMatchError, some
from lora_fx.formats import quantization_of
from lora_fx.ir import (
    DEFAULT_LOSS,
    Capture,
    Deployment,
    Loss,
    Matches,
    Pass,
    PassResult,
    Plan,
    PlannedSite,
    Rejection,
    Site,
    Skipped,
    grouped,
    join,
)
from lora_fx.kinds import (
    AdapterKind,
    base_change,
    chosen_kind,
    kind_objection,
    kind_of,
    kinds,
    site_kind,
)
from lora_fx.passes.graph import elements, storage_of
from lora_fx.passes.parameters import (
    DROPOUT,
    base_modules,
    base_parameters,
    check_layouts,
    factor_names,
    matrix_shape,
    module_at,
    other_rows,
)
from lora_fx.passes.patterns import pattern_of
from lora_fx.passes.plan.choice import Choice, choices, planned_tokens, priced
from lora_fx.passes.plan.deploying import with_deployment
from lora_fx.passes.plan.peft_experts import with_experts
from lora_fx.runtime.modules import AdapterDropouts, AdapterFactors, Holder

__all__ = [
    "MakePlan",
    "at_rank",
    "choose",
    "foreign_factors",
    "fresh_modules",
    "idle_entries",
    "idle_parameters",
    "make_plan",
    "refusals",
    "start_objection",
    "target_names",
]


def start_objection(site: Site, rank: int, config: LoraConfig) -> str | None:
    """Return the reason why ``init_lora_weights`` cannot be applied to a site; None if it can.

    In such cases PEFT fails, or uses the default initialization, in most cases without a message.
    """
    start = config.init_lora_weights
    if start in (True, False, "gaussian", chosen_kind(config).chosen_start):
        return None
    leave_out = "take it out of target_modules, or use init_lora_weights=True"
    if site.family == "embedding":
        return (
            f"init_lora_weights={start!r} is for matrix products, not for embeddings: {leave_out}"
        )
    if start in ("eva", "corda", "loftq") and (site.family == "conv" or site.groups > 1):
        return (
            f"init_lora_weights={start!r} is for matrix products, not for convolutions: {leave_out}"
        )
    if start in ("eva", "corda") and not site.reads_vectors:
        return (
            f"init_lora_weights={start!r} looks at the inputs as vectors, which this operation does not read "
            f"one after the other: {leave_out}"
        )
    count, out, inner = matrix_shape(site)
    if count * out * inner != math.prod(site.shape):
        return f"init_lora_weights={start!r} needs a weight that is a matrix: {leave_out}"
    return _rank_objection(str(start), rank // site.groups, inner, out, site.groups)


def _rank_objection(start: str, rank: int, inner: int, out: int, groups: int) -> str | None:
    note = f" (for each of {groups} groups)" if groups > 1 else ""
    if start == "orthogonal":
        if rank % 2 == 0:
            return None
        return f"init_lora_weights={start!r} needs an even rank{note}, not {rank}: set one with rank_pattern"
    needed = 2 * rank if start == "lora_ga" else rank
    most = inner if start == "eva" else min(inner, out)
    if needed <= most:
        return None
    return (
        f"init_lora_weights={start!r} at rank {rank}{note} takes {needed} directions of a matrix "
        f"[{out}, {inner}]: set a smaller rank with rank_pattern"
    )


def _refuse_quantized(
    model: nn.Module, config: LoraConfig, saved: Iterable[str], sites: Iterable[Site]
) -> None:
    """Raise if a configuration would train quantized weights in full, or change them by an initialization.

    Args:
        model: The model.
        config: The configuration.
        saved: The modules to train in full.
        sites: The sites to adapt.

    Raises:
        ConfigError: With the name of the weight, and a remedy.
    """
    for name in saved:
        for leaf, parameter in model.get_submodule(name).named_parameters():
            stored = quantization_of(parameter)
            if stored is not None:
                raise ConfigError(
                    f"modules_to_save names {name}, and {leaf} in it is stored as {stored}, which cannot be "
                    f"trained: leave it out, or quantize the model with exclude=[{name!r}]"
                )
    setting, kind = base_change(config), chosen_kind(config)
    if not setting:
        return
    remedy = (
        kind.remedy
        if kind.new_base
        else "use True here and then lora_fx.replace_lora_weights_loftq(model, original), which makes up for "
        "what quantizing lost; 'eva', 'orthogonal' and 'gaussian' leave the base as it is"
    )
    for site in sites:
        if site.quantized is not None:
            raise ConfigError(
                f"{setting} changes the base weight, and {site.weight} is stored as {site.quantized}. Use it "
                f"over the dense model, or {remedy}"
            )


def at_rank(
    model: nn.Module, row: PlannedSite, rank: int, alpha: float, config: LoraConfig
) -> PlannedSite:
    """Return a planned site with another rank and alpha, and with its costs computed again."""
    scale = scale_of(rank, alpha, config)
    return priced(model, dataclasses.replace(row, rank=rank, alpha=alpha, scale=scale))


_TIED = Verdict(True, "tied to an embedding that is adapted")


@dataclasses.dataclass(frozen=True)
class MakePlan(Pass):
    """The pass that decides which operations are adapted, and with which adapters.

    Attributes:
        config: The configuration.
        strict: True if an entry of the configuration that selects nothing is an error.
        loss: With "chunked", the plan lists the heads and how their loss is computed.
        deploy: The storage to train for; None for no rounding.
    """

    name: ClassVar[str] = "plan"
    needs: ClassVar[str] = "matches"
    config: LoraConfig
    strict: bool = False
    loss: Loss = DEFAULT_LOSS
    deploy: Deployment | None = None

    def __call__(self, capture: Capture) -> PassResult:
        """Set the plan of the capture."""
        assert capture.matches is not None
        plan = make_plan(capture, capture.matches, self.config, strict=self.strict)
        if self.loss == "chunked":
            heads = tuple((site.name, site.loss) for site in capture.matches.sites if site.loss)
            plan = dataclasses.replace(plan, loss=heads)
        if self.deploy is not None:
            plan = with_deployment(capture, plan, self.deploy)
        return PassResult.of(capture, plan=plan)


def make_plan(
    capture: Capture, matches: Matches, config: LoraConfig, *, strict: bool = False
) -> Plan:
    """Plan a rewrite. Nothing is changed.

    Args:
        capture: The model as graphs.
        matches: Its linear operations, with the head marked.
        config: The configuration.
        strict: True if an entry of the configuration that selects nothing is an error.

    Raises:
        NoMatchError: If nothing at all is selected, or an entry of a list of targets selects only operations
            that cannot be adapted.
        PartialMatchError: With ``strict``, if an entry selects nothing.
        CaptureError: If the model has adapters of another library.
        ConfigError: If ``trainable_token_indices`` names a module without such rows, or a quantized weight
            or a scripted module is to be trained in full or changed by a start.
    """
    _refuse_adapters(capture.model)
    config = with_experts(config, capture.model, matches.sites)
    saved = tuple(_saved_modules(capture.model, config))
    chosen, skipped = choose(matches, config, saved)
    _refuse_quantized(capture.model, config, saved, (choice.site for choice in chosen))
    rows = [_row(capture, choice, config) for choice in chosen]
    check_layouts(capture.model, tuple(rows))
    if config.ensure_weight_tying:
        rows, skipped = _keep_tied(capture, matches, config, rows, skipped)
    biases = tuple(_biases(capture.model, config, rows, saved))
    _refuse_scripted(capture.model, saved, biases)
    plan = Plan(
        sites=tuple(rows),
        skipped=tuple(skipped),
        rejections=matches.rejections,
        unmatched=tuple(
            idle_entries(capture, config, matches, chosen, tied=_ties(capture, config, rows))
        ),
        config=config,
        frontend=capture.frontend,
        notes=capture.notes,
        saved_modules=saved,
        biases=biases,
        base_parameters=sum(elements(p) for p in dict(_named_once(capture.model)).values()),
        extra_parameters=_extra_parameters(capture.model, saved, biases),
        tokens=planned_tokens(capture, matches, config, rows, saved),
        kinds=_kinds_of(rows),
        fresh=tuple(fresh_modules(capture.model, saved, [row.site for row in rows])),
    )
    _check(capture, plan, matches, chosen, strict)
    return plan


_LOADED = "_is_hf_initialized"
"""Attribute that transformers sets on the parameters that it has read from a checkpoint."""


def fresh_modules(
    model: nn.Module, saved: Iterable[str] = (), sites: Iterable[Site] = ()
) -> Iterator[str]:
    """Yield modules whose values are not from the checkpoint and that nothing trains, such as a new head.

    Only the FQNs of outermost modules are yielded.

    Args:
        model: A model of transformers, which marks the parameters that it has loaded.
        saved: FQNs of the modules that are trained in full.
        sites: The adapted operations.
    """
    loaded = {name: hasattr(p, _LOADED) for name, p in base_parameters(model).items()}
    if not any(loaded.values()) or all(loaded.values()):
        return
    trained = tuple(f"{name}." for name in saved)
    adapted = [site.weight for site in sites]
    outer: list[str] = []
    for name, _ in base_modules(model):
        inside = [known for leaf, known in loaded.items() if leaf.startswith(f"{name}.")]
        known = f"{name}.".startswith((*trained, *outer))
        if name and inside and not any(inside) and not known:
            outer.append(f"{name}.")
            if not any(weight.startswith(f"{name}.") for weight in adapted):
                yield name


def _kinds_of(rows: Iterable[PlannedSite]) -> tuple[tuple[str, str], ...]:
    kinds_by_name = {row.kind: kind_of(row) for row in rows}
    order = kinds()

    def place(kind: AdapterKind) -> int:
        return next(index for index, known in enumerate(order) if known.name == kind.name)

    named = sorted((kind for kind in kinds_by_name.values() if kind.trains), key=place)
    return tuple((kind.name, kind.trains) for kind in named)


def choose(
    matches: Matches, config: LoraConfig, saved: Iterable[str]
) -> tuple[list[Choice], list[Skipped]]:
    """Return the operations that a configuration adapts, and the skipped ones with the reasons.

    Args:
        matches: The linear operations.
        config: The configuration.
        saved: FQNs of the modules that are trained in full.
    """
    inside = tuple(f"{name}." for name in saved)
    chosen: list[Choice] = []
    skipped: list[Skipped] = []
    for choice in choices(matches, config):
        site, verdict = choice.site, choice.verdict
        objection = (
            _objection(choice, config)
            if verdict.selected
            else _why_not(site, config, verdict.reason)
        )
        if objection is None and site.weight.startswith(inside):
            objection = "trained in full: its weight is in modules_to_save, or tied to what is"
        if objection is None:
            chosen.append(choice)
        else:
            skipped.append(Skipped(site, objection))
    return chosen, skipped


def _why_not(site: Site, config: LoraConfig, reason: str) -> str:
    if uses_default_targets(config) and site.head and "target_modules" in reason:
        return "the output head: name it in target_modules to adapt it"
    if uses_default_targets(config) and site.router and "target_modules" in reason:
        return "the router of a mixture of experts: name it in target_modules to adapt it"
    if uses_default_targets(config) and site.family == "embedding" and "target_modules" in reason:
        return "an embedding: name it in target_modules to adapt it"
    return reason


def _objection(choice: Choice, config: LoraConfig) -> str | None:
    site, rank = choice.site, choice.rank(config)
    if not chosen_kind(config).low_rank:
        return kind_objection(site, 0, config)
    if site.groups > 1 and rank % site.groups:
        return (
            f"a convolution with {site.groups} groups needs a rank that they divide, not {rank}: "
            "set one with rank_pattern"
        )
    return (
        kind_objection(site, rank, config)
        or _shape_objection(site, rank, config)
        or start_objection(site, rank, config)
    )


def _shape_objection(site: Site, rank: int, config: LoraConfig) -> str | None:
    """Return the reason why ``init_lora_weights`` does not fit the factors of a kind; None if it fits.

    Initializations from the weight need factors of the same shape as LoRA's.
    """
    start, shapes = config.init_lora_weights, pattern_of(site).factors(site, rank)
    if not isinstance(start, str) or start == "gaussian":
        return None
    kind = site_kind(site, config)
    if kind.factors(site, shapes) == shapes:
        return None
    return (
        f"init_lora_weights={start!r} gives A and B the values of whole matrices, which the kind "
        f"{kind.name!r} does not store: use init_lora_weights=True"
    )


def _row(capture: Capture, choice: Choice, config: LoraConfig) -> PlannedSite:
    site, kind = choice.site, site_kind(choice.site, config)
    low_rank = kind.low_rank
    row = PlannedSite(
        site=site,
        rank=choice.rank(config) if low_rank else 0,
        alpha=choice.alpha(config) if low_rank else 1.0,
        scale=choice.scale(config) if low_rank else 1.0,
        dropout=0.0 if site.family == "embedding" else float(config.lora_dropout),
        parameters=0,
        flops=0,
        saved=0,
        kind=kind.name,
        options=kind.options,
        reason=choice.verdict.reason,
    )
    row = priced(capture.model, row)
    read = sum(other.flops for _, other in other_rows(capture.model, row))
    return dataclasses.replace(row, flops=row.flops + read)


def _keep_tied(
    capture: Capture,
    matches: Matches,
    config: LoraConfig,
    rows: list[PlannedSite],
    skipped: list[Skipped],
) -> tuple[list[PlannedSite], list[Skipped]]:
    """Add to a plan the heads that share the weight of an adapted embedding.

    They use the factors of the embedding, transposed.
    """
    sites = {site.weight: site for site in matches.sites}
    tied: dict[str, PlannedSite] = {}
    for source in rows:
        for weight in source.site.tied_to if source.site.family == "embedding" else ():
            head = sites.get(weight)
            if head is None or head.family != "linear" or head.layout != "out_in":
                continue
            row = _row(capture, Choice(head, _TIED, (head.name,)), config)
            like = dataclasses.replace(
                row, rank=source.rank, alpha=source.alpha, scale=source.scale, tied=source.name
            )
            tied[head.name] = priced(capture.model, like)
    order = {site.name: index for index, site in enumerate(matches.sites)}
    planned = [row for row in rows if row.name not in tied]
    planned = sorted([*planned, *tied.values()], key=lambda row: order.get(row.name, -1))
    return planned, [operation for operation in skipped if operation.site.name not in tied]


def foreign_factors(model: nn.Module) -> Iterator[str]:
    """Yield the FQNs of the modules that hold LoRA factors of another library (PEFT, loralib)."""
    for name, module in base_modules(model):
        # Not hasattr: a module may have a __getattr__ that accepts every name.
        members = (*module.named_children(), *module.named_parameters(recurse=False))
        names = {key for key, value in members if not isinstance(value, AdapterFactors)}
        if {"lora_A", "lora_embedding_A"} & names:
            yield name


def _refuse_adapters(model: nn.Module) -> None:
    for name in foreign_factors(model):
        raise CaptureError(
            f"{name or 'the model'} has LoRA factors already (a PEFT or loralib model?): give "
            "lora_fx the base model, for PEFT the result of merge_and_unload() or unload()"
        )


def _saved_modules(model: nn.Module, config: LoraConfig) -> Iterator[str]:
    outer: list[str] = []
    for name, _ in base_modules(model):
        if name and saved_module(name, config) and not any(name.startswith(f"{o}.") for o in outer):
            outer.append(name)
            yield name
    if config.ensure_weight_tying:
        yield from _tied_modules(model, outer)


def _tied_modules(model: nn.Module, saved: list[str]) -> Iterator[str]:
    """Yield the modules that share a parameter with a module that is trained in full."""
    inside = tuple(f"{name}." for name in saved)
    named = list(base_parameters(model).items())
    storages = {storage_of(p) for name, p in named if name.startswith(inside)}
    owners = {
        name.rpartition(".")[0]: None
        for name, p in named
        if not name.startswith(inside) and storage_of(p) in storages
    }
    yield from owners


def _biases(
    model: nn.Module, config: LoraConfig, rows: list[PlannedSite], saved: tuple[str, ...]
) -> Iterator[str]:
    adapted = {row.site.bias for row in rows}
    for name, _ in _named_once(model):
        inside = any(name.startswith(f"{module}.") for module in saved)
        is_bias = config.bias == "all" and name.rpartition(".")[2] == "bias"
        if not inside and (is_bias or (config.bias == "lora_only" and name in adapted)):
            yield name


def _refuse_scripted(model: nn.Module, saved: Iterable[str], biases: Iterable[str]) -> None:
    """Refuse to train scripted modules: no parameter of a TorchScript module can be replaced."""
    scripted = [n for n, m in base_modules(model) if isinstance(m, torch.jit.ScriptModule)]
    inside = tuple(f"{name}." for name in scripted)
    named = [(f"modules_to_save: {name}", f"{name}.") for name in saved]
    named += [(f"bias: {name}", name) for name in biases]
    for entry, name in named:
        if name.startswith(inside) or any(prefix.startswith(name) for prefix in inside):
            raise ConfigError(
                f"{entry} is, or holds, a TorchScript module, whose parameters cannot be exchanged: leave it "
                "out of the configuration, or put the module that it was scripted from into the model"
            )


def _named_once(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter of the base once, with the first of its names."""
    seen: set[int] = set()
    for name, parameter in base_parameters(model).items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _extra_parameters(model: nn.Module, saved: tuple[str, ...], biases: tuple[str, ...]) -> int:
    inside = sum(
        elements(p) for name in saved for p in dict(_named_once(model.get_submodule(name))).values()
    )
    return inside + sum(elements(model.get_parameter(name)) for name in biases)


def _ties(capture: Capture, config: LoraConfig, rows: list[PlannedSite]) -> bool:
    """Return True if ``ensure_weight_tying`` changes the plan, and so is not an idle option."""
    untied = dataclasses.replace(config, ensure_weight_tying=False)
    modules = (list(_saved_modules(capture.model, variant)) for variant in (config, untied))
    return any(row.tied for row in rows) or len(next(modules)) > len(next(modules))


def _check(
    capture: Capture, plan: Plan, matches: Matches, chosen: list[Choice], strict: bool
) -> None:
    config = plan.config
    if not plan.sites and (config.target_modules != () or config.target_parameters):
        raise NoMatchError(_nothing(plan, matches))
    idle = unmatched_targets(target_names(matches, chosen), config)
    _check_holders(capture.model, plan)
    refused = list(refusals(idle, matches.rejections, config))
    for target, hopeless, why in idle_parameters(capture.model, config, matches, chosen):
        refused += [(target, why)] if hopeless else []
    if refused:
        lines = [f"{target!r}: {why}" for target, why in refused]
        raise NoMatchError(
            "the configuration names what cannot be adapted; take it out of the list:\n  "
            + "\n  ".join(lines),
            tuple(dict.fromkeys(target for target, _ in refused)),
        )
    if strict and plan.unmatched:
        raise PartialMatchError(
            "strict=True, and part of the configuration selects nothing:\n  "
            + "\n  ".join(plan.idle_entries())
        )


def _check_holders(model: nn.Module, plan: Plan) -> None:
    """Raise if the factors of a site would get the name of another site's factors, or of a module."""
    taken: dict[str, str] = {}
    for row in plan.sites:
        holder = row.site.holder
        if holder == row.site.owner:
            _check_names(module_at(model, holder), row)
            continue
        outer, _, leaf = holder.rpartition(".")
        existing = getattr(module_at(model, outer), leaf, None)
        other = taken.setdefault(holder, row.name)
        if other != row.name or not (existing is None or isinstance(existing, Holder)):
            owner = f"those of {other}" if other != row.name else f"a {type(existing).__name__}"
            raise CaptureError(
                f"{row.name}: its factors are kept in {holder!r}, which is the name of {owner}; rename "
                "the attribute, or leave one of them out of target_modules"
            )


def _check_names(holder: nn.Module, row: PlannedSite) -> None:
    """Raise if a layer already has an attribute with the name under which its factors would be stored."""
    for name in (*factor_names(row).present, *([DROPOUT] if row.dropout else [])):
        existing = getattr(holder, name, None)
        if not (existing is None or isinstance(existing, AdapterFactors | AdapterDropouts)):
            raise CaptureError(
                f"{row.name}: its factors are kept in {join(row.site.holder, name)!r}, which is the name of "
                f"a {type(existing).__name__}; rename the attribute, or name {row.name!r} in exclude_modules"
            )


def _nothing(plan: Plan, matches: Matches) -> str:
    lines = ["the configuration selects no operation of the model", *plan.idle_entries()]
    if not matches.sites:
        lines.append("the model has no linear operation that lora_fx can see")
    left_out = [(skipped.site.name, skipped.reason) for skipped in plan.skipped]
    refused = [(rejection.name or "(root)", rejection.reason) for rejection in matches.rejections]
    for rows in map(grouped, (left_out, refused)):
        reasons = [f"{row.name}: {row.cells[0]}" for row in rows]
        lines += [some(reasons, 8, "\n  ")] if reasons else []
    if plan.skipped and choose(matches, LoraConfig(), ())[0]:
        lines.append("lora_fx.plan(model, lora_fx.LoraConfig()) lists what can be adapted")
    return "\n  ".join(lines)


# --- entries that select nothing ------------------------------------------------------------------


def _named_by(target: str, rejections: Iterable[Rejection], config: LoraConfig) -> list[Rejection]:
    """Return the rejected operations that an entry of ``target_modules`` names, without excluded ones.

    Args:
        target: The entry: the full name of a module or a weight, or the end of such a name.
        rejections: All rejected operations.
        config: The configuration, which may exclude modules, save them in full, or select some layers only.
    """
    return [
        rejection
        for rejection in rejections
        if any(_named(target, name) and judge(name, config).selected for name in rejection.names)
    ]


def refusals(
    targets: Iterable[str], rejections: tuple[Rejection, ...], config: LoraConfig
) -> Iterator[tuple[str, str]]:
    """Yield each entry that names only operations that cannot be adapted, with the reason.

    Args:
        targets: The entries of a list ``target_modules`` that selected no site.
        rejections: All rejected operations.
        config: The configuration.
    """
    for target in targets:
        selected = _named_by(target, rejections, config)
        reasons: dict[str, list[str]] = {}
        for rejection in selected:
            reasons.setdefault(rejection.reason, []).append(rejection.name)
        for reason, names in reasons.items():
            yield target, f"{some(names, 3)} cannot be adapted: {reason}"


def target_names(matches: Matches, chosen: Iterable[Choice]) -> list[str]:
    """Return names that an entry of ``target_modules`` can select: sites, parts, attention layers."""
    names = [site.name for site in matches.sites]
    names += [f"{site.name}.{part}" for site in matches.sites for part, _ in site.parts]
    names += [choice.site.name for choice in chosen if choice.site.part_of]
    return names + list(dict.fromkeys(site.attention for site in matches.sites if site.attention))


def idle_entries(
    capture: Capture,
    config: LoraConfig,
    matches: Matches,
    chosen: Sequence[Choice],
    *,
    tied: bool,
) -> Iterator[str]:
    """Yield a message for each entry of the configuration that selects nothing.

    Args:
        capture: The model.
        config: The configuration.
        matches: The linear operations, and the rejected ones.
        chosen: The adapted sites.
        tied: True if ``ensure_weight_tying`` has an effect on the plan.
    """
    names = target_names(matches, chosen)
    selected = [name for choice in chosen for name in (choice.site.name, *choice.names)]
    idle = unmatched(names, config, selected=selected)
    as_expression = isinstance(config.target_modules, str)
    for target in idle.targets:
        why = (
            _why_not_whole(target, names)
            if as_expression
            else _why(target, capture, matches, names)
        )
        yield f"target_modules {target!r}: {why}"
    for target in idle.filtered:
        yield f"target_modules {target!r}: {_filtered(target, chosen)}"
    for target, _, why in idle_parameters(capture.model, config, matches, chosen):
        yield f"target_parameters {target!r}: {why}"
    if config.ensure_weight_tying and not tied:
        yield (
            "ensure_weight_tying: no embedding that is adapted shares its weight with a linear head, and "
            "no module that is saved with another"
        )
    modules = [name for name, _ in capture.model.named_modules() if name]
    for scope in idle.scopes:
        yield f"scope {scope!r}: matches nothing{_nearest(nearest_names(scope, modules))}"
    for title, entries in (
        ("exclude_modules", idle.excludes),
        ("rank_pattern", idle.rank_keys),
        ("alpha_pattern", idle.alpha_keys),
        ("layers_to_transform", idle.layers),
        ("layers_pattern", idle.layers_patterns),
    ):
        for entry in entries:
            yield f"{title} {entry!r}: matches nothing"
    for entry in unmatched_saved(modules, config):
        near = _nearest(nearest_names(entry, modules))
        yield f"modules_to_save {entry!r}: matches nothing{near}"


def idle_parameters(
    model: nn.Module, config: LoraConfig, matches: Matches, chosen: Iterable[Choice]
) -> Iterator[tuple[str, bool, str]]:
    """Yield entries of ``target_parameters`` that adapt nothing, each with a flag and a reason.

    The flag is True if the entry's weight cannot be adapted at all.

    Args:
        model: The model.
        config: The configuration.
        matches: The linear operations, and the rejected ones.
        chosen: The adapted sites.
    """
    used = {parameter_entry(choice.site.weight, config) for choice in chosen}
    weights = [site.weight for site in matches.sites]
    for target in config.target_parameters or ():
        if target in used:
            continue
        single = dataclasses.replace(config, target_parameters=(target,))
        if any(parameter_entry(weight, single) for weight in weights):
            # If a longer entry has selected the same weight, this entry is not idle.
            if not any(parameter_entry(choice.site.weight, single) for choice in chosen):
                yield target, False, "all that it names is left out (see 'not selected')"
            continue
        refused = [
            rejection for rejection in matches.rejections if _names_weight(target, rejection)
        ]
        if refused:
            first = refused[0]
            yield target, True, f"{first.name} cannot be adapted: {first.reason}"
            continue
        named = [(n, p) for n, p in base_parameters(model).items() if parameter_entry(n, single)]
        if named:
            name, parameter = named[0]
            shape = list(parameter.shape)
            yield target, True, f"{name} {shape} is the weight of no linear operation that was seen"
            continue
        nearest = nearest_names(target, weights)
        yield target, False, "matches nothing" + _nearest(nearest)


def _names_weight(target: str, rejection: Rejection) -> bool:
    return any(_named(target, name) for name in rejection.names)


def _filtered(target: str, chosen: Iterable[Choice] | Iterable[PlannedSite]) -> str:
    whole = next((choice.site.name for choice in chosen if _part_of(target, choice.site)), None)
    if whole:
        return f"part of {whole}, which is adapted as a whole"
    return "all that it names is left out (see 'not selected')"


def _part_of(target: str, site: Site) -> bool:
    return any(_named(target, f"{site.name}.{part}") for part, _ in site.parts)


def _why_not_whole(expression: str, names: Sequence[str]) -> str:
    why = "a string is a regular expression for whole names, and this one matches none"
    if any(_named(expression, name) for name in names):
        return f"{why}; give a list, [{expression!r}], to select by the ends of names"
    if difflib.get_close_matches(expression.lower(), [ALL_LINEAR], cutoff=0.45):
        return f"{why}; did you mean {ALL_LINEAR!r}?"
    return why + _nearest(nearest_names(expression, names))


def _why(target: str, capture: Capture, matches: Matches, names: list[str]) -> str:
    for rejection in matches.rejections:
        if _named(target, rejection.name):
            return f"{rejection.name} cannot be adapted: {rejection.reason}"
    for name, module in capture.model.named_modules():
        if name and _named(target, name):
            inner = [n for n in names if n.startswith(f"{name}.")]
            holds = f"; name what it holds, e.g. {inner[0]!r}" if inner else ""
            return f"{name} is a {type(module).__name__}, not a linear operation{holds}"
    for name in base_parameters(capture.model):
        if _named(target, name):
            layers = {site.weight: site.name for site in matches.sites}
            if name in layers:
                return f"{name} is the weight of a layer: name the layer, {layers[name]!r}"
            if name in {site.bias for site in matches.sites}:
                return f"{name} is a bias, which has no adapter: bias='lora_only' trains it"
            return f"{name} is a parameter, and no linear operation over it was seen"
    return "matches nothing" + _nearest(nearest_names(target, names))


def _nearest(names: Sequence[str]) -> str:
    return f"; nearest: {', '.join(map(repr, names))}" if names else ""


def _named(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
