"""Passes of a rewrite, in order, and the functions that run them.

A rewrite is a capture (:mod:`lora_fx.passes.capture`), followed by the passes of :func:`rewrite_passes`. A
dry run stops after ``plan``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, get_args

from torch import Tensor, fx, nn

from lora_fx.config import LoraConfig, needs_data
from lora_fx.errors import CaptureError, ConfigError, LoraFxError, NoMatchError
from lora_fx.formats import deployment
from lora_fx.garbage import collector_paused
from lora_fx.ir import (
    DEFAULT_LOSS,
    DEFAULT_MEMORY,
    AdapterRecord,
    Base,
    Capture,
    Deployment,
    Kind,
    Loss,
    Matches,
    Memory,
    Pass,
    PassResult,
    Plan,
    PlannedSite,
    PlannedTokens,
    Record,
    Region,
    Savings,
    record_of,
)
from lora_fx.passes.capture import Frontend, holds_quantized
from lora_fx.passes.capture import capture as capture_model
from lora_fx.passes.effective import arm
from lora_fx.passes.graph import (
    class_name,
    install,
    kept_graph,
    put_partitions_back,
    without_zero_init,
)
from lora_fx.passes.insert import AddFactors, AddTokens, Insert, SelectRows, TrainTokens, Unfreeze
from lora_fx.passes.match import LOSSES, MARKS, FindOperations
from lora_fx.passes.optimize import (
    CheapDropout,
    ChunkLoss,
    Deploy,
    Fuse,
    FuseRows,
    Recompute,
    ShareInputs,
)
from lora_fx.passes.oracle import check_rewritten
from lora_fx.passes.parameters import (
    base_parameters,
    base_statistics,
    buffer_digests,
    check_alike,
    detached,
    mark_adapted,
    protect,
)
from lora_fx.passes.plan import FindSavings, MakePlan, with_advice, with_sample_cost
from lora_fx.passes.trainers import instance_forwards
from lora_fx.runtime import watch
from lora_fx.runtime.modules import check_adapter_name

__all__ = [
    "Callback",
    "RewriteOptions",
    "add_adapter_parameters",
    "branch_passes",
    "check_config",
    "check_trains",
    "find_operations",
    "plan_all",
    "plan_capture",
    "plan_model",
    "regions_to_install",
    "rewrite_model",
    "rewrite_passes",
    "run_passes",
    "warn_of_idle_entries",
]

_log = logging.getLogger("lora_fx")

Callback: TypeAlias = Callable[[str, Capture], None]
"""Function called after each pass with its name and the new capture, and first of all with ``"capture"``."""


def rewrite_passes(
    config: LoraConfig,
    adapter: str = "default",
    *,
    optimize: bool = True,
    memory: Memory = DEFAULT_MEMORY,
    loss: Loss = DEFAULT_LOSS,
    strict: bool = False,
    loaded: bool = False,
    deploy: Deployment | None = None,
) -> tuple[Pass, ...]:
    """Return the passes of a rewrite, in the order in which they run.

    Args:
        config: The configuration of the adapter.
        adapter: The adapter's name.
        optimize: True to fuse branches with their operations.
        memory: Memory setting for the backward; see :func:`lora_fx.rewrite`.
        loss: Computation of the loss, at once or in chunks; see :func:`lora_fx.rewrite`.
        strict: True to raise for entries of the configuration that select nothing.
        loaded: True if the values of the adapter are loaded next, so that no initial values are computed.
        deploy: The storage to train for; None for no rounding.
    """
    return (
        *_plan_passes(config, memory, loss, strict, deploy),
        *_parameter_passes(adapter, loaded=loaded),
        Insert(adapter=adapter),
        TrainTokens(adapter=adapter),
        *_deploy_passes(deploy is not None),
        *(_optimize_passes(memory) if optimize else ()),
        *_loss_passes(loss),
        _Install(),
    )


def _plan_passes(
    config: LoraConfig, memory: Memory, loss: Loss, strict: bool, deploy: Deployment | None = None
) -> tuple[Pass, ...]:
    """Return the passes of a dry run."""
    savings = (FindSavings(),) if memory == "least" else ()
    return (*_find_passes(loss), MakePlan(config, strict, loss, deploy), *savings)


def _deploy_passes(deploys: bool) -> tuple[Pass, ...]:
    """Return the pass that rounds adapted weights to the storage of ``deploy=``, or () if it is not set."""
    return (Deploy(),) if deploys else ()


def _find_passes(loss: Loss = DEFAULT_LOSS) -> tuple[Pass, ...]:
    return FindOperations(), *MARKS, *((LOSSES,) if loss == "chunked" else ())


def _parameter_passes(adapter: str, *, loaded: bool = False) -> tuple[Pass, ...]:
    return (
        AddFactors(adapter=adapter, loaded=loaded),
        AddTokens(adapter=adapter, loaded=loaded),
        Unfreeze(),
    )


def _optimize_passes(memory: Memory) -> tuple[Pass, ...]:
    return Fuse(memory), ShareInputs(), *_cheaper_passes(memory)


def _cheaper_passes(memory: Memory) -> tuple[Pass, ...]:
    """Return the passes that save memory in training, which also support an adapter for each sample."""
    return CheapDropout(), *((Recompute(),) if memory != "fast" else ())


def _loss_passes(loss: Loss) -> tuple[Pass, ...]:
    return (ChunkLoss(),) if loss == "chunked" else ()


def branch_passes(
    adapters: Mapping[str, AdapterRecord],
    *,
    optimize: bool,
    memory: Memory = DEFAULT_MEMORY,
    loss: Loss = DEFAULT_LOSS,
    per_sample: bool = False,
) -> tuple[Pass, ...]:
    """Return the passes that insert the branches of these adapters.

    Args:
        adapters: The adapters by name, in the order in which their branches are added.
        optimize: True to fuse branches with their operations.
        memory: Memory setting for the backward; see :func:`lora_fx.rewrite`.
        loss: Computation of the loss, at once or in chunks; see :func:`lora_fx.rewrite`.
        per_sample: True if each sample of a batch has one of the adapters, or none.
    """
    inserted = [Insert(record.sites, name) for name, record in adapters.items()]
    trained: list[Pass] = []
    if not per_sample:
        trained += [TrainTokens(record.tokens, name) for name, record in adapters.items()]
    trained += _deploy_passes(
        any(row.deploy for record in adapters.values() for row in record.sites)
    )
    if per_sample:
        sites = (row.site for record in adapters.values() for row in record.sites)
        select = SelectRows(frozenset(site.weight for site in sites if site.experts))
        if not optimize:
            return (*inserted, *trained, select)
        return (*inserted, *trained, FuseRows(), select, *_cheaper_passes(memory))
    optimized = _optimize_passes(memory) if optimize else ()
    return (*inserted, *trained, *optimized, *_loss_passes(loss))


def run_passes(
    capture: Capture, passes: Sequence[Pass], callback: Callback | None = None
) -> Capture:
    """Run passes one after the other, and check the contract of each.

    Raises:
        LoraFxError: Errors of a pass, with a note that names the pass.
        CaptureError: If a pass raises anything else, or breaks its contract. The message names the pass.
    """
    for pass_ in passes:
        if lack := pass_.requires(capture):
            raise CaptureError(f"pass {pass_.name!r} cannot run: {lack}")
        before = _sizes(capture)
        try:
            result = pass_(capture)
        except LoraFxError as error:
            error.add_note(f"in pass {pass_.name!r}")
            raise
        except Exception as error:
            raise CaptureError(
                f"pass {pass_.name!r} failed: {type(error).__name__}: {error}"
            ) from error
        if broken := _broken(pass_, capture, before, result) or pass_.ensures(
            capture, result.capture
        ):
            raise CaptureError(f"pass {pass_.name!r} broke its contract: {broken}")
        _log.debug("pass %s: %s", pass_.name, "modified" if result.modified else "nothing to do")
        capture = result.capture
        if callback is not None:
            callback(pass_.name, capture)
    return capture


def _sizes(capture: Capture) -> dict[str, tuple[int, int]]:
    """Return the id and the number of nodes of each region's graph, to detect edits by a pass."""
    return {
        key: (id(region.graph), len(region.graph.nodes)) for key, region in capture.regions.items()
    }


def _broken(
    pass_: Pass, capture: Capture, before: Mapping[str, tuple[int, int]], result: PassResult
) -> str | None:
    """Return how a pass has broken the contract of its kind, or None."""
    if pass_.kind == "functional":
        if _sizes(capture) != before:
            return "it is functional, and edited a graph of its argument"
        same = result.capture is capture
        if result.modified and same:
            return "it says that it modified something, and returns its argument"
        if not result.modified and not same:
            return "it returns another capture, and says that it modified nothing"
    elif result.capture is not capture:
        return "it works in place, and returns another capture"
    return None


@dataclasses.dataclass(frozen=True)
class _Install(Pass):
    """Pass that makes the modules of the model run their graphs."""

    name: ClassVar[str] = "install"
    kind: ClassVar[Kind] = "in place"
    needs: ClassVar[str] = "plan"

    def __call__(self, capture: Capture) -> PassResult:
        """Install the graph of each region."""
        assert capture.plan is not None
        rows: tuple[PlannedSite | PlannedTokens, ...] = (*capture.plan.sites, *capture.plan.tokens)
        install(regions_to_install(capture, rows))
        return PassResult(capture, True)


@without_zero_init()
def plan_model(
    model: nn.Module,
    config: Any,
    example_inputs: Any = None,
    *,
    memory: Memory = DEFAULT_MEMORY,
    loss: Loss | None = None,
    strict: bool = False,
    frontend: Frontend = "auto",
    deploy: str | None = None,
    captured: Capture | None = None,
) -> tuple[Capture, Plan]:
    """Capture a model, unless there is a capture of it already, and plan its rewrite.

    Raises:
        ConfigError: If ``config`` is no :class:`LoraConfig`, or the model is rewritten already.
    """
    options = RewriteOptions(memory=memory, loss=loss, strict=strict, deploy=deploy)
    options.check()
    if captured is None:
        captured = _captured(model, config, example_inputs, frontend)
    plan = plan_capture(
        captured,
        config,
        memory=memory,
        loss=options.computed_loss,
        strict=strict,
        deploy=options.deployment,
    )
    return captured, with_sample_cost(plan, captured, example_inputs)


def plan_all(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    example_inputs: Any = None,
    *,
    frontend: Frontend = "auto",
) -> dict[str, Plan]:
    """Capture a model once, and plan its rewrite by each configuration.

    Raises:
        ConfigError: If a value is no :class:`LoraConfig`, or the model is rewritten already.
        NoMatchError: If a configuration selects nothing.
    """
    for config in configs.values():
        check_config(config)
    captured = _captured(model, next(iter(configs.values())), example_inputs, frontend)
    plans: dict[str, Plan] = {}
    for name, config in configs.items():
        try:
            plan = plan_capture(captured, config)
            check_trains(plan)
        except LoraFxError as error:
            error.add_note(f"in the configuration {name!r}")
            raise
        plans[name] = plan
    mixed = len({plan.unit for plan in plans.values()}) > 1
    for name, plan in plans.items():
        priced = with_sample_cost(plan, captured, example_inputs, compared=mixed)
        plans[name] = with_advice(priced, captured, example_inputs)
    return plans


def _captured(
    model: nn.Module,
    config: object,
    example_inputs: Any,
    frontend: Frontend,
    *,
    verify: bool = True,
) -> Capture:
    check_config(config)
    if record_of(model) is not None:
        raise ConfigError(
            "the model is rewritten already: use lora_fx.add_adapter to put another adapter on it, "
            "or rewrite the original model, which was not changed"
        )
    return capture_model(model, example_inputs, frontend=frontend, verify=verify)


def plan_capture(
    capture: Capture,
    config: LoraConfig,
    *,
    memory: Memory = DEFAULT_MEMORY,
    loss: Loss = DEFAULT_LOSS,
    strict: bool = False,
    deploy: Deployment | None = None,
) -> Plan:
    """Plan the rewrite of a capture, with passes that edit nothing."""
    plan = run_passes(capture, _plan_passes(config, memory, loss, strict, deploy)).plan
    assert plan is not None
    return plan


def find_operations(capture: Capture) -> Matches:
    """Find every linear operation of a capture, and mark the head and the parts of fused weights."""
    matches = run_passes(capture, _find_passes()).matches
    assert matches is not None
    return matches


def check_config(config: object) -> None:
    """Raise unless `config` is a configuration of lora_fx.

    Raises:
        ConfigError: If `config` is anything else, such as a configuration of PEFT.
    """
    if isinstance(config, nn.Module):
        raise ConfigError(
            f"config is a {type(config).__name__}, and has to be a lora_fx.LoraConfig: the model comes "
            "first, then the configuration, as in lora_fx.rewrite(model, config)"
        )
    if isinstance(config, str):
        raise ConfigError(
            f"config must be a lora_fx.LoraConfig, found {config!r}: the configuration comes before the name "
            "of an adapter, and lora_fx.LoraConfig.from_pretrained(folder) reads one"
        )
    if isinstance(config, Mapping):
        raise ConfigError(
            "config must be a lora_fx.LoraConfig, found a dict; lora_fx.LoraConfig.from_dict(config) makes "
            "one of it"
        )
    if isinstance(config, Collection):
        raise ConfigError(
            f"config must be a lora_fx.LoraConfig, found a {type(config).__name__}: names of layers are one "
            "of its fields, lora_fx.LoraConfig(target_modules=[...])"
        )
    if not isinstance(config, LoraConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"config must be a lora_fx.LoraConfig, found {kind}; "
            "lora_fx.LoraConfig.from_dict(config.to_dict()) takes over PEFT's"
        )


@dataclasses.dataclass(frozen=True)
class RewriteOptions:
    """Options of a rewrite; see :func:`lora_fx.rewrite`.

    Attributes:
        adapter_name: Name of the adapter.
        optimize: True to fuse branches with their operations.
        memory: Memory setting for the backward.
        loss: Computation of the loss, at once or in chunks. None chooses by ``memory``.
        strict: True to raise for entries of the configuration that select nothing.
        quiet: True to log no warning about entries that select nothing.
        loaded: True if the values of the adapter are loaded next, so that no initial values are computed.
        deploy: Name of the storage to train for; None for no rounding.
    """

    adapter_name: str = "default"
    optimize: bool = True
    memory: Memory = DEFAULT_MEMORY
    loss: Loss | None = None
    strict: bool = False
    quiet: bool = False
    loaded: bool = False
    deploy: str | None = None

    @property
    def deployment(self) -> Deployment | None:
        """The storage to train for.

        Raises:
            ConfigError: If ``deploy`` is no name of a storage.
            QuantizationError: If the library of the format is missing.
        """
        return None if self.deploy is None else deployment(self.deploy)

    @property
    def computed_loss(self) -> Loss:
        """Computation of the loss: in chunks with the least memory, unless the user has chosen."""
        return self.loss or ("chunked" if self.memory == "least" else DEFAULT_LOSS)

    def check(self) -> None:
        """Raise if an option has an unknown value.

        Raises:
            ConfigError: With the name of the option.
        """
        check_adapter_name(self.adapter_name)
        _check_option("memory", self.memory)
        _check_option("loss", self.computed_loss)


@collector_paused()
@without_zero_init()
def rewrite_model(
    model: nn.Module,
    config: Any,
    example_inputs: Any = None,
    *,
    options: RewriteOptions | None = None,
    frontend: Frontend = "auto",
    callback: Callback | None = None,
) -> nn.Module:
    """Capture a model and run the passes of a rewrite; see :func:`lora_fx.rewrite`."""
    options = RewriteOptions() if options is None else options
    options.check()
    passes = rewrite_passes(
        config,
        options.adapter_name,
        optimize=options.optimize,
        memory=options.memory,
        loss=options.computed_loss,
        strict=options.strict,
        loaded=options.loaded,
        deploy=options.deployment,
    )

    def made(*, verify: bool) -> nn.Module:
        capture = _captured(model, config, example_inputs, frontend, verify=verify)
        return _rewritten(model, capture, passes, options, example_inputs, callback)

    try:
        return made(verify=False)
    except CaptureError:
        if example_inputs is None or frontend != "auto":
            raise
    # A graph may compute something else than its module. With verify=True such graphs are dropped.
    return made(verify=True)


def _rewritten(
    model: nn.Module,
    capture: Capture,
    passes: Sequence[Pass],
    options: RewriteOptions,
    example_inputs: Any,
    callback: Callback | None,
) -> nn.Module:
    if callback is not None:
        callback("capture", capture)
    looking, adding, branching = _stages(passes)
    capture = run_passes(capture, looking, callback)
    put_partitions_back(capture.model)
    plan, matches = capture.plan, capture.matches
    assert plan is not None
    assert matches is not None
    check_trains(plan)
    if not options.quiet:
        warn_of_idle_entries(plan, losses=options.loss is not None)
    base = Base(
        graphs={fqn: region.graph for fqn, region in capture.regions.items()},
        classes={fqn: class_name(region.module) for fqn, region in capture.regions.items()},
        fallback={fqn: region.fallback for fqn, region in capture.regions.items()},
        not_run={fqn: region.not_run for fqn, region in capture.regions.items() if region.not_run},
        matches=matches,
        notes=capture.notes,
        kept=frozenset(name for name, module in model.named_modules() if kept_graph(module)),
        written_out=frozenset(key for key, region in capture.regions.items() if region.written_out),
    )
    trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    record = Record(
        {},
        (),
        capture.frontend,
        trainable,
        buffer_digests(capture.model),
        base,
        optimize=options.optimize,
        forwards=instance_forwards(model),
        memory=options.memory,
        loss=options.computed_loss,
        savings=plan.savings or Savings(),
    )
    record = add_adapter_parameters(capture, record, options.adapter_name, adding, callback)
    result = run_passes(capture, branching, callback).model
    check_alike(result, record.adapters[options.adapter_name].sites, options.adapter_name)
    mark_adapted(result, adapted=True)
    result.__dict__["_lora_fx"] = dataclasses.replace(record, active=(options.adapter_name,))
    protect(result)
    arm(result)
    if options.loss == "chunked":
        _check_scoped(result)
    if example_inputs is not None and not any(p.is_meta for p in model.parameters()):
        # Find errors now that would otherwise appear in a later call.
        check_rewritten(result, example_inputs)
    return result


_OPTIONS: Mapping[str, tuple[Any, str]] = {
    "memory": (
        Memory,
        (
            "'least' for the longest sequences, 'balanced' to make cheap inputs of products again in the "
            "backward, or 'fast' to keep them"
        ),
    ),
    "loss": (
        Loss,
        "'chunked' to compute it in training calls without all logits at once, or 'whole' as the model does",
    ),
}


def _check_option(name: str, value: object) -> None:
    values, choices = _OPTIONS[name]
    if value not in get_args(values):
        raise ConfigError(f"{name}={value!r} is unknown: give {choices}")


def _check_scoped(model: nn.Module) -> None:
    """Raise if the class of a model cannot be replaced, because ``loss="chunked"`` has to replace it."""
    if not watch.is_scoped(model):
        raise CaptureError(
            f"loss='chunked' needs another class for the whole model, and {type(model).__qualname__} makes "
            "copies of itself in its own way, or is a GraphModule: leave loss out"
        )


def _stages(
    passes: Sequence[Pass],
) -> tuple[Sequence[Pass], Sequence[Pass], Sequence[Pass]]:
    """Split the passes into those up to the plan, those that add parameters, and the rest."""
    names = [pass_.name for pass_ in passes]
    planned, inserted = names.index(AddFactors.name), names.index(Insert.name)
    return passes[:planned], passes[planned:inserted], passes[inserted:]


def check_trains(plan: Plan) -> None:
    """Raise for a plan that trains nothing. Such a plan is only good for inspection.

    Raises:
        NoMatchError: If it has no site, module, bias or row of an embedding.
    """
    if not (plan.sites or plan.saved_modules or plan.biases or plan.tokens):
        raise NoMatchError(
            "the configuration selects nothing, so that nothing would be trained: name operations in "
            "target_modules or target_parameters, or leave target_modules out to have all of them"
        )


def warn_of_idle_entries(plan: Plan, *, losses: bool = True) -> None:
    """Log warnings for entries that select nothing, and for random modules that nothing trains.

    Args:
        plan: The plan.
        losses: True to warn of losses that are not computed in chunks. Set it if the user asked for chunks.
    """
    if plan.unmatched:
        _log.warning(
            "part of the configuration selects nothing (strict=True makes that an error): %s",
            "; ".join(plan.unmatched),
        )
    for remark in plan.losses_left if losses else ():
        _log.warning("loss='chunked' changes nothing: %s", remark)
    for name in plan.fresh:
        _log.warning("%s starts at random and nothing trains it: put it into modules_to_save", name)


def add_adapter_parameters(
    capture: Capture,
    record: Record,
    adapter_name: str,
    passes: Sequence[Pass] | None = None,
    callback: Callback | None = None,
) -> Record:
    """Add the parameters of an adapter to the model of a capture.

    Args:
        capture: A model in which no other adapter has replaced a parameter of the base. Its plan
            describes the adapter.
        record: The record of the model.
        adapter_name: The adapter's name.
        passes: Passes that add the parameters; by default, those of a rewrite.
        callback: Called after each pass.

    Returns:
        The record with the adapter. It is not active yet, because no graph is changed.

    Raises:
        ConfigError: If the adapter would train a parameter of the base that the user has unfrozen.
    """
    plan = capture.plan
    assert plan is not None
    before = _replaceable(capture.model, plan)
    _check_frozen(before, plan)
    run_passes(capture, _parameter_passes(adapter_name) if passes is None else passes, callback)
    after = _replaceable(capture.model, plan)
    own = tuple(name for name, tensor in after.items() if tensor is not before[name])
    adapter = AdapterRecord(
        plan.config,
        plan.sites,
        plan.saved_modules,
        plan.biases,
        own,
        tokens=plan.tokens,
        initialized=not needs_data(plan.config.init_lora_weights),
    )
    originals = {name: detached(before[name]) for name in own}
    return dataclasses.replace(
        record,
        adapters={**record.adapters, adapter_name: adapter},
        originals={**record.originals, **originals},
    )


def _replaceable(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of the base that an adapter may replace, by FQN."""
    statistics = base_statistics(model) if plan.saved_modules else {}
    return {**base_parameters(model), **statistics}


def _check_frozen(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Raise if the adapter would train a parameter that the user has unfrozen for an optimizer."""
    inside = tuple(f"{name}." for name in plan.saved_modules)
    for name, tensor in tensors.items():
        if tensor.requires_grad and (name in plan.biases or name.startswith(inside)):
            raise ConfigError(
                f"{name} was unfrozen by hand, and the adapter is to have its own value of it "
                "(modules_to_save, bias): freeze it first, with requires_grad_(False). The adapter starts "
                "with what it is then"
            )


def regions_to_install(
    capture: Capture, rows: Iterable[PlannedSite | PlannedTokens]
) -> Iterator[Region]:
    """Yield the regions that run their graph: those that a pass has changed, and those of quantized weights.

    A graph of a written-out forward runs only in modules with an adapter, and in their parents. Other layers
    keep their own forward with its fast paths, unless that forward would read quantized weights.
    """
    calling: set[str] = set()  # modules with branches, and their parents
    for name in [call.region for row in rows for call in row.site.calls]:
        while name and name not in calling:
            calling.add(name)
            name = name.rpartition(".")[0]
    for region in capture.regions.values():
        adapted = not region.fqn or region.fqn in calling
        stored = not region.fallback or (region.written_out and holds_quantized(region.module))
        # A GraphModule has its own __deepcopy__, which would lose the other contents of the module.
        edited = region.edited or isinstance(region.module, fx.GraphModule)
        changed = adapted if region.written_out else edited
        if (changed or stored) and not region.not_run:
            yield region
