"""Pass that finds every linear operation, by matching the patterns against every node of every region.

It does not edit graphs, and it does not select layers. A weight that is applied several times is one site.
A weight that other code reads as well is refused, because folding an adapter into it would change the result
of that code, too.

A merge writes ``W + s·BA`` back into the weight. So the weight must be dense (or have a known quantized
format), hold real floating-point numbers, and not be computed from other tensors before each call. Any other
weight is refused, regardless of its use in a graph.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from lora_fx import torch_private
from lora_fx.errors import CaptureError, LoraFxError
from lora_fx.formats import LibraryLayers, formats, quantization_of
from lora_fx.ir import Capture, Match, Matches, Pass, PassResult, Region, Rejection, Site, join
from lora_fx.passes.graph import (
    UNINITIALIZED,
    is_built_in,
    is_lazy,
    is_matrix,
    original_class,
    storage_of,
)
from lora_fx.passes.match.readers import Read, nameless, no_product, readers
from lora_fx.passes.patterns import path_to_weight, patterns, site_name

__all__ = ["FindOperations", "ask", "match"]


@dataclasses.dataclass(frozen=True)
class FindOperations(Pass):
    """Pass that matches every pattern against every node."""

    name: ClassVar[str] = "match"

    def __call__(self, capture: Capture) -> PassResult:
        """Set the matches of the capture."""
        return PassResult.of(capture, matches=match(capture))


def match(capture: Capture) -> Matches:
    """Match the patterns of :func:`lora_fx.passes.patterns.patterns` against all regions.

    Returns:
        Sites in the order of the model's parameters, with ties marked.
    """
    applied, rejections = _asked(capture)
    read, one_of_several = readers(capture), nameless(capture)
    sites: dict[str, list[Site]] = {}
    for weight, applications in applied.items():
        applications, other_reads = _split_by_branch(applications)
        reads = [*read.pop(weight, ()), *other_reads]
        mixed = [
            weight_read
            for weight_read in reads
            if not _can_read_adapted_weight(weight_read, applications, capture)
        ]
        joined = one_of_several.get(weight) or _joined(applications, mixed)
        if isinstance(joined, Rejection):
            rejections[joined.name] = joined
        else:
            sites[weight] = joined
    for weight, reads in read.items():
        unused = no_product(weight, reads)
        if unused is not None:
            rejections.setdefault(unused.name, unused)
    rejections.update(_opaque(capture, rejections, sites))
    for weight, rejection in _unfit(capture.model):
        sites.pop(weight, None)
        originals = join(rejection.region, "parametrizations", weight.rpartition(".")[2])
        rejections.pop(originals, None)
        # A parametrization may multiply by its own parameters, such as to compute the norm of a matrix. These
        # products are no sites.
        for name in [name for name in sites if name.startswith(f"{originals}.")]:
            del sites[name]
        rejections[rejection.name] = rejection
    return Matches(tuple(_ordered(capture.model, sites)), tuple(rejections.values()))


def _asked(capture: Capture) -> tuple[dict[str, list[Site]], dict[str, Rejection]]:
    """Match the patterns against all nodes. Return the sites by weight, and the refusals by name."""
    sites: dict[str, list[Site]] = defaultdict(list)
    rejections: dict[str, Rejection] = {}
    for region in capture.regions.values():
        for node in region.graph.nodes:
            seen = ask(node, region)
            if isinstance(seen, Site):
                sites[seen.weight].append(seen)
            elif isinstance(seen, Rejection):
                rejections.setdefault(seen.name, seen)
    return sites, rejections


def ask(node: fx.Node, region: Region) -> Match:
    """Match a node with the patterns, in order. Return the first site or refusal, or None."""
    for pattern in patterns():
        try:
            seen = pattern.match(node, region)
        except LoraFxError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the pattern {pattern.name!r} failed on node {node.name!r} of {region.fqn or '(root)'}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if seen is not None:
            return seen
    return None


def _joined(sites: list[Site], reads: list[Read] | tuple[Read, ...]) -> list[Site] | Rejection:
    """Join all operations on a weight into a site, or into a site for each range of rows that they apply.

    Return a refusal if other nodes read the weight, or if the ranges overlap.
    """
    whole = site_name(sites[0].weight)
    own = {(call.region, call.output) for site in sites for call in site.calls}
    for read in reads:
        if (read.region, read.node) not in own:
            reason = (
                f"its weight is also read by {read.operation}: an adapter would change one use, a merge "
                "both"
            )
            return Rejection(whole, reason, read.region, read.node)
    parts: dict[tuple[int, int] | None, Site] = {}
    for site in sites:
        known = parts.get(site.rows)
        if known is None:
            parts[site.rows] = site
            continue
        parts[site.rows] = dataclasses.replace(
            known, bias=known.bias or site.bias, calls=known.calls + site.calls
        )
    ordered = sorted(parts.values(), key=lambda site: site.rows or (0, 0))
    for first, second in itertools.pairwise(ordered):
        if first.rows is None or second.rows is None or first.rows[1] > second.rows[0]:
            reason = "its weight is applied in parts that overlap"
            return Rejection(whole, reason, second.calls[0].region, second.calls[0].output)
    return ordered


def _split_by_branch(sites: list[Site]) -> tuple[list[Site], list[Read]]:
    """Split the operations on a weight into those that get a branch, and the others, which become reads.

    Operations with a branch share one pair of factors. The others read the adapted weight. Operations in the
    module that owns the weight get a branch first, then those that apply the whole weight.
    """

    def order(site: Site) -> tuple[bool, bool]:
        return site.calls[0].region != site.owner, site.rows is not None

    first = min(sites, key=order)
    whole = first.rows is None
    same = [s for s in sites if s.is_like(first) and (s.rows is None) == whole]
    calls = [call for site in sites if site not in same for call in site.calls]
    return same, [Read(call.region, call.output, call.pattern) for call in calls]


def _can_read_adapted_weight(read: Read, sites: list[Site], capture: Capture) -> bool:
    """Return True if a read can get the adapted weight while operations with branches get the base weight.

    The two need separate nodes in the graph. So the views between the weight and these operations must be
    known.
    """
    if sites[0].opaque:
        return False
    for call in (call for site in sites for call in site.calls if call.region == read.region):
        region = capture.regions[call.region]
        nodes = (node for node in region.graph.nodes if node.name == call.output)
        if not any(
            path_to_weight(value, region) for node in nodes for value in node.all_input_nodes
        ):
            return False
    return True


def _opaque(
    capture: Capture, known: dict[str, Rejection], applied: Collection[str]
) -> dict[str, Rejection]:
    """Return refusals for modules without a graph that own a matrix which no operation applies."""
    result = {}
    for fqn, reason in capture.opaque.items():
        module = capture.model.get_submodule(fqn)
        built_in = is_built_in(module)
        own = [join(fqn, name) for name, p in module._parameters.items() if is_matrix(p)]
        reached = own and all(weight in applied for weight in own)
        if (own or built_in) and fqn not in known and not reached:
            result[fqn] = Rejection(fqn, reason if built_in else f"no graph: {reason}", fqn)
    return result


def _ordered(model: nn.Module, sites: dict[str, list[Site]]) -> Iterator[Site]:
    """Yield the sites in parameter order, each with its tied weights and its attention layer."""
    tied: dict[int, list[str]] = defaultdict(list)
    layers = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention)
    }
    named = list(model.named_parameters(remove_duplicate=False))

    def owner(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    for name, parameter in named:
        tied[storage_of(parameter)].append(name)
    for name, parameter in named:
        sharing = tied[storage_of(parameter)]
        # A module with two names is not tied to itself.
        ties = tuple(n for n in sharing if n != name and owner(n) is not owner(name))
        for site in sites.get(name, ()):
            # in_proj_weight and the three separate weights belong to the layer itself, out_proj to a child.
            owners = (site.owner, site.owner.rpartition(".")[0])
            attention = next((owner_name for owner_name in owners if owner_name in layers), "")
            yield dataclasses.replace(site, tied_to=ties, attention=attention)


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTIZED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")


def _remedy() -> str:
    known = [f"{format_.title} ({format_.library})" for format_ in formats() if format_.title]
    return (
        "adapt the model before it is quantized, merge, and quantize the result. Formats that can be trained "
        f"over: {', '.join(known)}"
    )


def _unfit(model: nn.Module) -> Iterator[tuple[str, Rejection]]:
    """Yield the FQN and the refusal of each weight that no operation could adapt, such as a sparse weight."""
    for fqn, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        known = isinstance(module, nn.Linear) and quantization_of(module._parameters.get("weight"))
        cls = original_class(module)
        layers = _library_of(cls)
        foreign = layers is not None or cls.__module__.startswith(_QUANTIZED)
        if foreign and not known and _holds_weights(module):
            named = f"{cls.__module__}.{cls.__qualname__}"
            objection = None if layers is None else layers.objection(module, named)
            reason = objection or f"it is quantized ({named}): {_remedy()}"
            # A module of experts has several weights, with names of their own.
            for weight in (join(fqn, name) for name in _codes(module)):
                yield weight, Rejection(site_name(weight), reason, fqn)
            continue
        for name, reason in (
            *_contained(module),
            *_tensors(module),
            *_parametrized(module),
            *_hooked(module),
        ):
            weight = join(fqn, name)
            yield weight, Rejection(site_name(weight), reason, fqn)


def _contained(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each matrix that a container of layers owns, with a refusal.

    The module of an adapter would count as a layer of the container.
    """
    holder = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    if holder and not isinstance(module, parametrize.ParametrizationList):
        for name, parameter in module._parameters.items():
            if is_matrix(parameter):
                yield (
                    name,
                    "it belongs to a container of layers, in which its adapter would be a layer",
                )


def _library_of(cls: type[nn.Module]) -> LibraryLayers | None:
    """Return the library whose layers include a class, or None."""
    return next((format_.layers for format_ in formats() if format_.layers.owns(cls)), None)


def _holds_weights(module: nn.Module) -> bool:
    """Return True if a module of a quantization library is a layer, and not a child with packed weights."""
    return "Packed" not in original_class(module).__name__


def _codes(module: nn.Module) -> list[str]:
    """Return the names of the quantized matrices of a module.

    If it has none, return the names of all its matrices; without any matrix, ``weight``.
    """
    codes = [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and is_matrix(parameter) and parameter.dtype not in _FLOATS
    ]
    # Quantized numbers that were cast to a floating-point dtype look like dense weights.
    matrices = [name for name, parameter in module._parameters.items() if is_matrix(parameter)]
    return codes or matrices or ["weight"]


def _tensors(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if is_lazy(parameter):
            if "bias" not in name:
                yield name, UNINITIALIZED
        elif is_matrix(parameter) and (reason := _reason(parameter)):
            yield name, reason
    for name, buffer in module._buffers.items():
        # Integer buffers with other names are positions and masks.
        if buffer is not None and buffer.dim() > 1 and "weight" in name:
            small = buffer.dtype not in _FLOATS and not buffer.is_complex()
            if small and (reason := _reason(buffer)):
                yield name, reason


def _reason(weight: torch.Tensor) -> str | None:
    if quantization_of(weight) is not None:
        return None
    if not weight.numel():
        return "its weight has no elements"
    if weight.layout is not torch.strided:
        kind = str(weight.layout).removeprefix("torch.")
        return f"its weight is sparse ({kind}), and B A is dense: use a dense weight (to_dense())"
    if weight.is_complex():
        return f"its weight is {weight.dtype}, and an adapter is real"
    if weight.dtype not in _FLOATS:
        remark = "a quantized format" if weight.is_floating_point() else "not floating point"
        return f"its weight is {weight.dtype}, {remark}: {_remedy()}"
    tensor: Any = weight.data if isinstance(weight, nn.Parameter) else weight
    if torch_private.is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        inner = [part for part in parts if isinstance(part, torch.Tensor)]
        if any(t.dtype not in _FLOATS and t.dim() > 1 for t in inner):
            return f"its weight is a {type(tensor).__name__}, which holds quantized numbers: {_remedy()}"
    return None


def _parametrized(module: nn.Module) -> Iterator[tuple[str, str]]:
    if not parametrize.is_parametrized(module):
        return
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    for name, steps in parametrizations.items():
        if all(p.dim() < 2 for p in steps.parameters(recurse=False)):
            continue
        how = ", ".join(type(step).__name__.strip("_") for step in steps.children())
        reason = (
            f"its {name} is computed by a parametrization ({how}), into which no merge could fold an "
            "adapter: take it off with torch.nn.utils.parametrize.remove_parametrizations first"
        )
        yield name, reason


def _hooked(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield weights that a hook computes before each call: old weight_norm, spectral_norm, pruning."""
    for hook in torch_private.forward_pre_hooks(module).values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if not isinstance(name, str) or name in module._parameters:
            continue
        sources = [n for n in module._parameters if n in (f"{name}_orig", f"{name}_v", f"{name}_g")]
        if not sources:
            continue
        reason = (
            f"its {name} is computed from {' and '.join(sources)} before each call by a hook "
            f"({type(hook).__name__}), into which no merge could fold an adapter: take it off first "
            "(torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove)"
        )
        yield name, reason
