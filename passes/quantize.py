"""Passes that quantize the weights of linear operations, so that the operations read quantized weights.

The weights of matrix products are selected, except that of the output head. The plan has a reason for each
operation that is left as it is. Planning edits nothing.

An ``nn.Linear`` layer becomes the library's own layer, if it has one. Otherwise it stays ``nn.Linear`` over
the library's tensor. Any other operation becomes one node,
:func:`lora_fx.formats.weights.quantized_linear`, in the graph of the module that applies the weight. That
graph is the module's forward from then on. A weight of shape [in, out] is then stored as [out, in].

At most one weight at a time is dense.

The weights of a model on the meta device are read one at a time, and its other tensors are filled in. A
buffer that no file has (the frequencies of rotary embeddings, positions) is computed by the model's code. A
transformers model has a method for that, because transformers' own loader needs it, too.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import itertools
import logging
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import fx, nn

from lora_fx import torch_private
from lora_fx.config import LoraConfig, excluded, nearest_names, unmatched
from lora_fx.errors import ConfigError, MergeError, QuantizationError
from lora_fx.formats import (
    Storage,
    follow_state,
    quantization_of,
    quantized_linear,
    stack_matrices,
    stored,
)
from lora_fx.ir import Capture, Kind, Matches, Pass, PassResult, Region, Site, join, relative
from lora_fx.passes.graph import (
    copy_graph,
    erase_unread,
    exchange,
    is_built_in,
    is_matrix,
    original_class,
)
from lora_fx.passes.patterns import Product, product_of

__all__ = [
    "Materialize",
    "PlannedWeight",
    "QuantizationPlan",
    "Quantize",
    "Values",
    "plan_quantization",
]


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedWeight:
    """Weight that will be quantized.

    Attributes:
        site: The operation.
        shape: Shape in which the matrix will be stored, [out, in]; [E, out, in] for the matrices of experts.
        dtype: Dtype of its values.
        bytes: Size when quantized, scales included.
    """

    site: Site
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int

    @property
    def name(self) -> str:
        """Return the FQN of the operation."""
        return self.site.name

    @property
    def dense_bytes(self) -> int:
        """Return the size in bytes before quantization."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """Plan of a :func:`lora_fx.quantize` call, which can be printed.

    Attributes:
        storage: The format.
        weights: The weights to store in it.
        left: Names of operations and weights that stay as they are, each with the reason.
    """

    storage: Storage
    weights: tuple[PlannedWeight, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        """Return the size of the quantized weights in bytes, scales included."""
        return sum(row.bytes for row in self.weights)

    @property
    def dense_bytes(self) -> int:
        """Return the size of the weights in bytes before quantization."""
        return sum(row.dense_bytes for row in self.weights)

    @property
    def largest_bytes(self) -> int:
        """Return the size of the largest dense weight, the only one in memory at a time in ``quantize``."""
        return max(row.dense_bytes for row in self.weights)

    @property
    def decoded_bytes(self) -> int:
        """Return the size of the largest matrix, the only one that is decoded at a time in a step."""
        return max(math.prod(row.shape[-2:]) * row.dtype.itemsize for row in self.weights)

    def __iter__(self) -> Iterator[PlannedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def summary(self) -> str:
        """Return one line for the weights, and one for each reason to leave operations as they are."""
        sizes = f"{_mib(self.dense_bytes)} become {_mib(self.bytes)}"
        reasons = Counter(reason for _, reason in self.left)
        first = {reason: name for name, reason in reversed(self.left)}
        lines = [
            f"{len(self.weights)} weights in {self.storage}: {sizes}",
            f"dense at a time: {_mib(self.largest_bytes)} now, {_mib(self.decoded_bytes)} in a step",
        ]
        for reason, count in reasons.items():
            more = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  as it is: {first[reason]}{more}: {reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, ready for JSON."""
        return {
            "format": self.storage.format,
            "library": self.storage.library,
            "block_size": self.storage.block_size,
            "double": self.storage.double,
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "largest_bytes": self.largest_bytes,
            "decoded_bytes": self.decoded_bytes,
            "weights": [
                {"name": row.name, "shape": list(row.shape), "bytes": row.bytes}
                for row in self.weights
            ],
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
        }

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.weights)
        lines = self.summary().splitlines()[:2]
        lines += [
            f"  {row.name:{width}}  {'x'.join(map(str, row.shape))}  {_mib(row.bytes)}"
            for row in self.weights
        ]
        lines += [f"  as it is: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


_log = logging.getLogger("lora_fx")

_PRODUCTS = ("linear", "matmul")


def plan_quantization(
    capture: Capture, matches: Matches, how: Storage, exclude: Sequence[str] | str | None = None
) -> QuantizationPlan:
    """Plan which weights :class:`Quantize` stores, and which it leaves and why.

    Args:
        capture: The model.
        matches: Its linear operations, the head marked.
        how: The format.
        exclude: Operations to leave as they are, by the rules of ``exclude_modules``.

    Raises:
        QuantizationError: If the model is quantized already, ``exclude`` is neither a list of names nor a
            regular expression, a weight does not fit the format, or there is nothing to quantize.
    """
    _check_plain(capture.model)
    config = _exclusion(exclude)
    inspected, computed = _inspected(capture), _computed(capture)
    left: dict[str, str] = {}
    rows: list[PlannedWeight] = []
    for site in matches.sites:
        reason = (
            f"exclude={exclude!r}"
            if excluded(site.name, config)
            else _left(site, how, inspected, computed) or _needs_forward(capture, site)
        )
        if reason is not None:
            left[site.name] = reason
            continue
        dtype = capture.model.get_parameter(site.weight).dtype
        shape = (site.out_features, site.in_features)
        objection = how.objection(shape, dtype)
        if objection is not None:
            raise QuantizationError(
                f"{site.name}: {objection}. Or leave it as it is: exclude=[{site.name!r}]"
            )
        rows.append(_planned(site, how, dtype))
    left |= {rejection.name: rejection.reason for rejection in matches.rejections}
    _warn_of_idle(matches, config)
    if not rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise QuantizationError(
            f"there is nothing to quantize in this {type(capture.model).__name__}"
            + (f" ({reasons})" if reasons else ": it has no linear operation")
        )
    return QuantizationPlan(how, tuple(rows), tuple(left.items()))


def _planned(site: Site, how: Storage, dtype: torch.dtype) -> PlannedWeight:
    matrices = (site.experts or 1, site.out_features, site.in_features)
    size = how.bytes((matrices[0] * matrices[1], matrices[2]), dtype)
    return PlannedWeight(site, matrices if site.experts else matrices[1:], dtype, size)


def _check_plain(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        storage = quantization_of(parameter)
        if storage is not None:
            raise QuantizationError(
                f"{name} is quantized already, {storage}: quantize the model that it was made of, which has "
                "all of the bits, or give this one to lora_fx.rewrite as it is"
            )


def _exclusion(exclude: Sequence[str] | str | None) -> LoraConfig:
    try:
        return LoraConfig(exclude_modules=exclude)
    except ConfigError as error:
        # The message names exclude_modules, which the user did not set
        problem = str(error).partition(": ")[2]
        raise QuantizationError(f"exclude: {problem}") from error


# Attributes of a weight that code reads for another purpose than a product.
_FORM = frozenset({"dtype", "shape", "size", "dim", "ndim", "numel", "element_size", "stride"})


def _inspected(capture: Capture) -> dict[str, str]:
    """Return the weights whose dtype or shape a method may read, each with the name of that method.

    For example, a layer of T5 casts its input to the dtype of the next layer's weight.
    """
    return {
        join(fqn, name): method.__qualname__
        for fqn, module in capture.model.named_modules()
        if not is_built_in(module)
        for method in _methods(module)
        if not _FORM.isdisjoint(names := method.__code__.co_names)
        for name, parameter in module.named_parameters()
        if is_matrix(parameter) and {*name.split(".")} <= {*names}
        if "." in name or "dtype" in names
    }


def _computed(capture: Capture) -> dict[str, str]:
    """Return the weights of child modules that a method without a graph may compute with.

    For example, Jamba's mixer multiplies with the weight of a linear layer from the left.
    """
    return {
        join(fqn, name): method.__qualname__
        for fqn, module in capture.model.named_modules()
        if not is_built_in(module) and fqn not in capture.regions
        for method in _methods(module)
        for name in _read_weights(method)
        if is_matrix(dict(module.named_parameters()).get(name))
    }


def _read_weights(method: FunctionType) -> Iterator[str]:
    """Yield each expression ``child.weight`` in a method's code that may read the values of a weight.

    Expressions that only read the class, the dtype, the device or the shape are left out.
    """
    code = [i for i in dis.get_instructions(method) if i.opname != "EXTENDED_ARG"]
    for index, (child, leaf) in enumerate(itertools.pairwise(code)):
        if child.opname not in _ATTRIBUTES or leaf.opname not in _ATTRIBUTES:
            continue
        function, after = code[max(index - 2, 0)].argval, code[min(index + 2, len(code) - 1)]
        form = after.argval if after.opname in _ATTRIBUTES else None
        if leaf.argval == "weight" and function != "isinstance" and form not in (*_FORM, "device"):
            yield f"{child.argval}.{leaf.argval}"


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def _methods(module: nn.Module) -> Iterator[FunctionType]:
    """Yield the functions of a module's class and its base classes, up to ``nn.Module``."""
    for cls in original_class(module).__mro__:
        if cls is nn.Module:
            return
        yield from (
            inspect.unwrap(function)
            for function in vars(cls).values()
            if inspect.isfunction(function)
        )


def _left(
    site: Site, how: Storage, inspected: Mapping[str, str], computed: Mapping[str, str]
) -> str | None:
    """Return the reason why a site's weight is not quantized, or None if it can be."""
    if site.head:
        return "it is the output head"
    reason = next(_objections(site, how), None)
    shown = site.experts is not None or (how.made_by.shows_values and site.layout == "out_in")
    if reason is None and site.weight in inspected and not shown:
        return (
            f"{inspected[site.weight]} asks for its dtype or shape, and would be told those of the bytes in "
            "which it is stored"
        )
    if reason is None and site.weight in computed and site.experts is None:
        return (
            f"{computed[site.weight]} may compute with it in a way that is no call of the layer, and no "
            "graph can replace that code"
        )
    return reason


def _needs_forward(capture: Capture, site: Site) -> str | None:
    """Return the reason why a product must run in its module's own forward, or None if a graph can run it."""
    if site.experts is not None or _is_layer(capture.model, site):
        return None
    regions = [capture.regions[call.region] for call in site.calls]
    reason = next((region.not_run for region in regions if region.not_run), None)
    if reason is None:
        return None
    return f"a forward computes this product itself, and no graph can take its place: {reason}"


def _objections(site: Site, how: Storage) -> Iterator[str]:
    """Yield the reasons why a site's operation cannot read a quantized weight."""
    if site.router:
        yield "it is the router of a mixture of experts, and few bits may choose other experts"
    if site.family != "linear":
        operation = "a lookup" if site.family == "embedding" else "a convolution"
        yield f"it is {operation}: the formats are of matrix products"
    if site.tied_to:
        yield f"its weight is tied to {', '.join(site.tied_to)}"
    if site.rows is not None:
        yield f"rows {site.rows[0]} to {site.rows[1]} of its weight are applied by themselves"
    if site.experts is not None:
        return  # a stack can be read in any way
    if any(call.pattern not in _PRODUCTS for call in site.calls) or site.view is not None:
        yield f"it is written as {site.pattern}: F.linear(x, weight) or x @ weight can be quantized"
    if any(call.left for call in site.calls):
        yield "its weight is the left operand of the product"
    if not how.made_by.any_dtype and any(call.cast for call in site.calls):
        yield f"its weight is cast before it is applied, which {how.library}'s formats cannot be"


def _warn_of_idle(matches: Matches, config: LoraConfig) -> None:
    names = [site.name for site in matches.sites] + [
        rejection.name for rejection in matches.rejections
    ]
    for entry in unmatched(names, config).excludes:
        near = nearest_names(entry, names)
        # No name is similar: show examples of names instead.
        some = near or tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))[:5]
        _log.warning(
            "exclude names no operation with %r; %s: %s",
            entry,
            "nearest" if near else "operations end in",
            ", ".join(map(repr, some)),
        )


Values = Callable[[str], torch.Tensor]
"""Function that returns the values of a parameter by its name."""


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Pass that stores weights of the captured model in a format, and edits copies of its graphs.

    Attributes:
        rows: The weights.
        how: The format.
        values: Function that returns the values of a weight; by default they are read from the model.
        device: Device for the quantized weights; by default that of each dense weight.
        progress: Called with (done, total, name) before each weight, and once when all are done.
    """

    name: ClassVar[str] = "quantize"
    rows: tuple[PlannedWeight, ...]
    how: Storage
    values: Values | None = None
    device: torch.device | None = None
    progress: Callable[[int, int, str], None] | None = None

    def __call__(self, capture: Capture) -> PassResult:
        """Edit the graphs, then store one weight after the other."""
        if not self.rows:
            return PassResult(capture, False)
        regions = self._regions(capture)
        before = list(capture.model.named_parameters(remove_duplicate=False))
        for done, row in enumerate(self.rows):
            if self.progress is not None:
                self.progress(done, len(self.rows), row.name)
            self._store(capture.model, row)
        _replace_references(capture.model, before)
        if self.progress is not None:
            self.progress(len(self.rows), len(self.rows), "")
        return PassResult(dataclasses.replace(capture, regions=regions), True)

    def _regions(self, capture: Capture) -> dict[str, Region]:
        work: dict[str, dict[str, Site]] = defaultdict(dict)
        for row in self.rows:
            if row.site.experts is None and not _is_layer(capture.model, row.site):
                for call in row.site.calls:
                    work[call.region][call.output] = row.site
        regions, known = dict(capture.regions), {}
        for fqn, nodes in work.items():
            region = regions[fqn]
            # Equal layers share their graph before and after the pass.
            key = (id(region.graph), *sorted(nodes))
            if key not in known:
                known[key] = self._edited(region, nodes)
            regions[fqn] = region.with_graph(known[key], fallback=False)
        return regions

    def _edited(self, region: Region, sites: dict[str, Site]) -> fx.Graph:
        edited = region.with_graph(copy_graph(region.graph))
        nodes = {node.name: node for node in edited.graph.nodes}
        for output, site in sites.items():
            self._replace(edited, nodes[output], site)
        edited.graph.lint()
        return edited.graph

    def _replace(self, region: Region, node: fx.Node, site: Site) -> None:
        seen = product_of(node, region)
        assert isinstance(seen, Product)
        own = seen.bias is None or seen.family == "linear" or _is_bias(region, seen.bias, site)
        options: dict[str, Any] = {}
        if self.how.compute_dtype is not None:
            options["compute_dtype"] = self.how.compute_dtype
        if site.layout == "in_out":
            options["layout"] = "in_out"
        bias: Any = seen.bias if own else None
        operands: Any = (seen.x, seen.view.source, *(() if bias is None else (bias,)))
        with region.graph.inserting_before(node):
            result = region.graph.call_function(quantized_linear, operands, options)
            if not own:
                added: Any = (result, seen.bias)
                result = region.graph.call_function(operator.add, added)
        node.replace_all_uses_with(result)
        region.graph.erase_node(node)
        erase_unread(region.graph, seen.operand)

    def _store(self, model: nn.Module, row: PlannedWeight) -> None:
        site = row.site
        values = self.values(site.weight) if self.values else model.get_parameter(site.weight)
        values = values.detach()
        if self.device is not None:
            values = values.to(self.device)
        if values.is_meta:
            raise QuantizationError(
                f"{site.weight} is on the meta device and has no values: weights=FOLDER reads them from "
                "safetensors"
            )
        if not torch.isfinite(values).all():
            raise QuantizationError(
                f"{site.weight} has values that are not finite, and a block shares its scale: look where "
                f"they come from, or exclude=[{site.name!r}]"
            )
        owner, turned = model.get_submodule(site.owner), site.layout == "in_out"
        layer = _is_layer(model, site)
        if site.experts is None:
            parameter = stored(values.T if turned else values, self.how)
        else:
            parameter = stack_matrices(values, self.how, site.parameter, turned=turned)
        owner._parameters[site.parameter] = parameter
        if layer:
            self.how.made_by.layers.become(owner, self.how)
        follow_state(owner, site.parameter, layer=layer)


def _replace_references(model: nn.Module, before: list[tuple[str, nn.Parameter]]) -> None:
    """Replace the dense weights in lists, objects and functions of a model by the quantized weights."""
    try:
        exchange(model, before)
    except MergeError as error:
        raise QuantizationError(
            f"{str(error).partition(':')[0]}: several layers have this weight in common, not all of them "
            "apply it in a way that can be quantized, and something beside them holds it, too: name those "
            "that do in exclude="
        ) from error


def _is_layer(model: nn.Module, site: Site) -> bool:
    """Return True if a site is an ``nn.Linear`` that alone applies its weight.

    Such a layer can become a layer of the format's library.
    """
    exact = original_class(model.get_submodule(site.owner)) is nn.Linear
    own = all(call.region == site.owner for call in site.calls)
    return exact and own and relative(site.weight, site.owner) == "weight"


def _is_bias(region: Region, bias: object, site: Site) -> bool:
    parameter = region.parameter(bias)
    return parameter is not None and tuple(parameter.shape) == (site.out_features,)


@dataclasses.dataclass(frozen=True)
class Materialize(Pass):
    """Pass that fills the parameters and buffers of a model on the meta device.

    Attributes:
        but: FQNs of weights that stay on the meta device.
        values: Returns a parameter or buffer by its name.
        device: Device for the filled tensors.
    """

    name: ClassVar[str] = "materialize"
    kind: ClassVar[Kind] = "in place"
    but: frozenset[str]
    values: Callable[[str], torch.Tensor]
    device: torch.device

    def __call__(self, capture: Capture) -> PassResult:
        """Fill one tensor after the other, and each tied parameter once."""
        parameters: dict[int, nn.Parameter] = {}
        for fqn, module in capture.model.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                name = join(fqn, key)
                if parameter is None or name in self.but or not parameter.is_meta:
                    continue
                if id(parameter) not in parameters:
                    # The tied modules keep the old parameter alive, so its id is not reused.
                    parameters[id(parameter)] = nn.Parameter(self._own(name), requires_grad=False)
                module._parameters[key] = parameters[id(parameter)]
            for key in module._buffers.keys() - torch_private.transient_buffers(module):
                if module._buffers[key] is not None:
                    module._buffers[key] = self._own(join(fqn, key))
        for fqn, module in capture.model.named_modules():
            self._computed(capture.model, module, fqn)
        return PassResult(capture, True)

    def _own(self, name: str) -> torch.Tensor:
        # Always copied, because the source may be mapped from a file.
        return self.values(name).to(self.device, copy=True)

    def _computed(self, model: nn.Module, module: nn.Module, fqn: str) -> None:
        """Compute unsaved buffers with the code that transformers' own loader runs for them."""
        empty = [k for k, b in module._buffers.items() if b is not None and b.is_meta]
        if not empty:
            return
        initialize = _initializer(model, fqn)
        if initialize is not None and not any(True for _ in module.parameters(recurse=False)):
            for key in empty:
                module._buffers[key] = _blank(module._buffers[key], self.device)
            with torch.no_grad():
                initialize(module)
            empty = [key for key in empty if _is_blank(module._buffers[key])]
        if empty:
            raise QuantizationError(
                f"{join(fqn, empty[0])} is a buffer on the meta device that no file holds: make the model "
                "with its parameters there alone (with accelerate.init_empty_weights():)"
            )


def _initializer(model: nn.Module, fqn: str) -> Callable[[nn.Module], Any] | None:
    """Return ``_init_weights`` of the innermost transformers model around a module, or None."""
    path = fqn.split(".") if fqn else []
    for length in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        initialize = getattr(type(owner), "_init_weights", None)
        if initialize is not None:
            return lambda module: initialize(owner, module)
    return None


def _blank(like: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return a tensor filled with a value that marks elements never written."""
    assert like is not None
    fill: Any = True
    if like.is_floating_point() or like.is_complex():
        fill = float("nan")
    elif like.dtype != torch.bool:
        fill = torch.iinfo(like.dtype).min + 1
    return torch.full(like.shape, fill, dtype=like.dtype, device=device)


def _is_blank(tensor: torch.Tensor | None) -> bool:
    if tensor is None or tensor.numel() == 0:
        return False
    return torch.equal(tensor, _blank(tensor, tensor.device)) or bool(tensor.isnan().any())
