"""Stores the weights of linear operations in few bits, and has the operations read them so.

A layer that is ``nn.Linear`` becomes the library's own, if it has one, and stays ``nn.Linear`` over the
library's tensor if not. Everywhere else the operation becomes one node,
:func:`lora_fx.formats.weights.quantized_linear`, in the graph of the module that applies the weight, and that
graph is the module's forward from then on. A weight that is stored [in, out] is stored [out, in] then.

At most one weight at a time is dense.

A model on the meta device gets its values in the same way. A buffer that no file has (the frequencies of
rotary embeddings, positions) is what the model's code makes: a model of transformers can make it again, since
its own loader needs that, too.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx, nn

from lora_fx.errors import MergeError, QuantizationError
from lora_fx.formats import Storage, follow_state, quantized_linear, stored
from lora_fx.ir import Capture, Kind, Pass, PassResult, Region, Site, join, relative
from lora_fx.passes.graph import copy_graph, erase_unread, exchange, original_class
from lora_fx.passes.patterns import Product, product_of
from lora_fx.passes.quantize.planning import PlannedWeight

__all__ = ["Materialize", "Quantize", "Values"]


Values = Callable[[str], torch.Tensor]
"""Gives the values of a parameter by its name."""


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """The pass. It puts parameters into the model of the capture, and edits copies of its graphs.

    Attributes:
        rows: Which weights.
        how: The format.
        values: Where they come from; by default, from the model.
        device: Where they are stored; by default, where they lie.
        progress: Called with (done, total, name) before each weight, and once when all are done.
    """

    name: ClassVar[str] = "quantize"
    rows: tuple[PlannedWeight, ...]
    how: Storage
    values: Values | None = None
    device: torch.device | None = None
    progress: Callable[[int, int, str], None] | None = None

    def __call__(self, capture: Capture) -> PassResult:
        """Edits the graphs, then stores one weight after the other."""
        if not self.rows:
            return PassResult(capture, False)
        regions = self._regions(capture)
        before = list(capture.model.named_parameters(remove_duplicate=False))
        for done, row in enumerate(self.rows):
            if self.progress is not None:
                self.progress(done, len(self.rows), row.name)
            self._store(capture.model, row)
        _hand_on(capture.model, before)
        if self.progress is not None:
            self.progress(len(self.rows), len(self.rows), "")
        return PassResult(dataclasses.replace(capture, regions=regions), True)

    def _regions(self, capture: Capture) -> dict[str, Region]:
        work: dict[str, dict[str, Site]] = defaultdict(dict)
        for row in self.rows:
            if not _is_layer(capture.model, row.site):
                for call in row.site.calls:
                    work[call.region][call.output] = row.site
        regions, known = dict(capture.regions), {}
        for fqn, nodes in work.items():
            region = regions[fqn]
            # Equal layers share their graph before the pass, and after it.
            key = (id(region.graph), *sorted(nodes))
            if key not in known:
                known[key] = self._edited(region, nodes)
            regions[fqn] = dataclasses.replace(region, graph=known[key], fallback=False)
        return regions

    def _edited(self, region: Region, sites: dict[str, Site]) -> fx.Graph:
        edited = dataclasses.replace(region, graph=copy_graph(region.graph))
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
            made = region.graph.call_function(quantized_linear, operands, options)
            if not own:
                added: Any = (made, seen.bias)
                made = region.graph.call_function(operator.add, added)
        node.replace_all_uses_with(made)
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
        matrix = values if site.layout == "out_in" else values.T
        owner = model.get_submodule(site.owner)
        layer = _is_layer(model, site)
        owner._parameters[site.parameter] = stored(matrix, self.how)
        if layer:
            self.how.made_by.layers.become(owner, self.how)
        follow_state(owner, site.parameter, layer=layer)


def _hand_on(model: nn.Module, before: list[tuple[str, nn.Parameter]]) -> None:
    """Puts what is stored wherever lists, objects and functions of the model held the dense weight."""
    try:
        exchange(model, before)
    except MergeError as error:
        raise QuantizationError(
            f"{str(error).partition(':')[0]}: several layers have this weight in common, not all of them "
            "apply it in a way that can be quantized, and something beside them holds it, too: name those "
            "that do in exclude="
        ) from error


def _is_layer(model: nn.Module, site: Site) -> bool:
    """Whether an operation is all that an ``nn.Linear`` does, and nobody else applies its weight."""
    exact = original_class(model.get_submodule(site.owner)) is nn.Linear
    own = all(call.region == site.owner for call in site.calls)
    return exact and own and relative(site.weight, site.owner) == "weight"


def _is_bias(region: Region, bias: object, site: Site) -> bool:
    found = region.parameter(bias)
    return found is not None and tuple(found.shape) == (site.out_features,)


@dataclasses.dataclass(frozen=True)
class Materialize(Pass):
    """The pass. It puts parameters and buffers into the model of the capture.

    Attributes:
        but: Weights that are left on the meta device, by FQN.
        values: Gives a parameter or buffer by its name.
        device: Where to put them.
    """

    name: ClassVar[str] = "materialize"
    kind: ClassVar[Kind] = "in place"
    but: frozenset[str]
    values: Callable[[str], torch.Tensor]
    device: torch.device

    def __call__(self, capture: Capture) -> PassResult:
        """One tensor after the other; a tied parameter once."""
        made: dict[int, nn.Parameter] = {}
        for fqn, module in capture.model.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                name = join(fqn, key)
                if parameter is None or name in self.but or not parameter.is_meta:
                    continue
                if id(parameter) not in made:
                    # The old one is kept alive by the tie, or its identity would be free for the next.
                    made[id(parameter)] = nn.Parameter(self._own(name), requires_grad=False)
                module._parameters[key] = made[id(parameter)]
            for key in module._buffers.keys() - module._non_persistent_buffers_set:
                if module._buffers[key] is not None:
                    module._buffers[key] = self._own(join(fqn, key))
        for fqn, module in capture.model.named_modules():
            self._computed(capture.model, module, fqn)
        return PassResult(capture, True)

    def _own(self, name: str) -> torch.Tensor:
        # Copied in any case: what is read may lie in a file.
        return self.values(name).to(self.device, copy=True)

    def _computed(self, model: nn.Module, module: nn.Module, fqn: str) -> None:
        """Buffers that are not saved, made by the code that makes them for transformers' own loader."""
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
    """``_init_weights`` of the model of transformers that a module is in; None where it is in none."""
    path = fqn.split(".") if fqn else []
    for length in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        found = getattr(type(owner), "_init_weights", None)
        if found is not None:
            return lambda module: found(owner, module)
    return None


def _blank(like: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """A tensor in which one sees what was never written."""
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
