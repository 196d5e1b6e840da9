"""Passes for parameters that are trained in full: rows of embeddings, biases, and modules.

Trained parameters get separate storage, so that training does not change the model that was passed to
``rewrite``.

For embeddings, the trained rows are a parameter ``T`` next to the weight ``W``. It starts as a copy of the
base's rows. ``place[i]`` is the row of token ``i`` in ``T``, or negative if that token is not trained. A
lookup becomes ``y' = where(place[i] >= 0, T[place[i]], W[i])``. If an output head has the same weight, or the
configuration names the head, its trained outputs ``i`` become ``y'ᵢ = yᵢ + x (T - W[i])ᵀ``. Both leave the
output unchanged to the last bit as long as ``T`` is untrained. Neither creates a tensor of the size of the
weight.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.errors import ConfigError
from lora_fx.ir import (
    Call,
    Capture,
    Kind,
    Pass,
    PassResult,
    PlannedTokens,
    Region,
    Role,
    Tag,
    relative,
    tag_of,
)
from lora_fx.passes.graph import arguments, copy_graph, is_partitioned, partitioned_twin
from lora_fx.passes.insert.insert_branches import Writer, read_base
from lora_fx.passes.parameters import (
    adapter_dtype,
    add_tokens,
    base_modules,
    base_statistics,
    gathered,
    indices_name,
    module_at,
    rows_name,
    tokens_of,
)
from lora_fx.passes.patterns import ARGUMENTS, Product, lookup, product_of

__all__ = [
    "AddTokens",
    "TrainTokens",
    "Unfreeze",
]


@dataclasses.dataclass(frozen=True)
class AddTokens(Pass):
    """Pass that adds parameters for the embedding rows of the plan.

    Attributes:
        adapter: The adapter's name.
        loaded: True if a checkpoint overwrites the rows next, so that the base's own rows are not needed.
    """

    name: ClassVar[str] = "add-tokens"
    kind: ClassVar[Kind] = "in place"
    needs: ClassVar[str] = "plan"
    adapter: str = "default"
    loaded: bool = False

    def __call__(self, capture: Capture) -> PassResult:
        """Add a parameter for the trained rows of each planned embedding or head that has none yet.

        A head that is tied to an embedding shares its parameter.
        """
        model, changed = capture.model, False
        assert capture.plan is not None
        rows = capture.plan.tokens
        for row in sorted(rows, key=lambda row: bool(row.tied)):
            try:
                tokens_of(model, row, self.adapter)
                continue
            except AttributeError:
                changed = True
            weight = gathered(model.get_parameter(row.site.weight), row.site.weight)
            if weight.is_meta and not self.loaded:
                raise ConfigError(
                    f"{row.site.weight} is on the meta device, and trainable_token_indices start as rows of "
                    "it; give the model its weights first"
                )
            source = next((candidate for candidate in rows if candidate.name == row.tied), None)
            if source is not None:
                add_tokens(model, row, self.adapter, tokens_of(model, source, self.adapter))
            else:
                start = weight[list(row.indices)].to(adapter_dtype(weight), copy=True)
                add_tokens(model, row, self.adapter, start)
        return PassResult(capture, changed)


@dataclasses.dataclass(frozen=True)
class TrainTokens(Pass):
    """Pass that replaces embedding rows of the base by trained rows, in every graph that reads them.

    Attributes:
        rows: The trained rows by weight; None for those of the capture's plan.
        adapter: The adapter's name.
    """

    name: ClassVar[str] = "train-tokens"
    needs: ClassVar[str] = "plan"
    rows: tuple[PlannedTokens, ...] | None = None
    adapter: str = "default"

    def __call__(self, capture: Capture) -> PassResult:
        """Write the trained rows into each graph that applies one of the weights, once."""
        rows, regions = self.rows, dict(capture.regions)
        if rows is None:
            assert capture.plan is not None
            rows = capture.plan.tokens
        for row in rows:
            for call in row.site.calls:
                region = regions.get(call.region)
                if region is None or _done(region, _tag(row, region, self.adapter)):
                    continue
                graph = copy_graph(region.graph)
                safe = region.falls_back([row.site])
                edited = region.with_graph(graph, fallback=safe)
                for other in row.site.calls:
                    if other.region == call.region:
                        _Edit(capture, edited, row, other, self.adapter).apply()
                graph.lint()
                regions[call.region] = edited
        return PassResult.of(capture, regions=regions)


class _Edit(Writer):
    """Writer of the nodes that replace the output of a lookup or a head by the output with trained rows."""

    def __init__(
        self, capture: Capture, region: Region, row: PlannedTokens, call: Call, adapter: str
    ) -> None:
        self._row, self._region = row, region
        self._base = next(node for node in region.graph.nodes if node.name == call.output)
        tag = _tag(row, region, adapter)
        super().__init__(region.graph, self._base, lambda _: tag)
        self._x = self._read_now()
        self._names = {
            "rows": relative(rows_name(row, adapter), region.fqn),
            "indices": relative(indices_name(row, adapter), region.fqn),
            "weight": relative(row.site.weight, region.fqn),
        }
        weight = capture.model.get_parameter(row.site.weight)
        self._cast = adapter_dtype(weight) != weight.dtype or call.cast

    def apply(self) -> None:
        """Write the nodes, and replace the operation's output by the output with trained rows."""
        read_base(self._region, self._base, self._names["weight"])
        result = self._lookup() if self._row.lookup else self._product()
        self.replace(self._base, result)

    def _lookup(self) -> fx.Node:
        position = self._call(operator.getitem, self._read("indices"), self._x)
        hit = self._call(torch.unsqueeze, self._call(operator.ge, position, 0), -1)
        rows = self._typed(self._read("rows"))
        _, padding, _ = lookup(self._base)
        if padding is not None:
            padding %= self._row.site.in_features
        # The row of the padding index gets no gradient, as in the base's own lookup.
        own = self._row.indices.index(padding) if padding in self._row.indices else None
        trained = self._call(F.embedding, self._call(torch.clamp, position, 0), rows, own)
        return self._call(torch.where, hit, trained, self._base)

    def _product(self) -> fx.Node:
        indices = self._read("indices")
        old = self._call(torch.index_select, self._read("weight"), 0, indices)
        change = self._typed(self._call(operator.sub, self._read("rows"), old))
        added = self._call(F.linear, self._x, change)
        return self._call(torch.index_add, self._base, -1, indices, added)

    def _typed(self, node: fx.Node) -> fx.Node:
        if not self._cast:
            return node
        return self.make(Role.TOKENS, "call_method", "type_as", node, self._base)

    def _read_now(self) -> fx.Node:
        """Return the current input node of the operation. Earlier edits may have replaced the input."""
        base = self._base
        if self._row.lookup:
            return lookup(base)[0]
        product = product_of(base, self._region)
        if isinstance(product, Product):
            return product.x
        x: fx.Node = arguments(base, ARGUMENTS)["x"]
        return x

    def _read(self, key: str) -> fx.Node:
        return self.make(Role.TOKENS, "get_attr", self._names[key])

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.call(Role.TOKENS, target, *args)


def _done(region: Region, tag: Tag) -> bool:
    return tag in map(tag_of, region.graph.nodes)


def _tag(row: PlannedTokens, region: Region, adapter: str) -> Tag:
    return Tag(relative(row.site.weight, region.fqn), Role.TOKENS, adapter)


@dataclasses.dataclass(frozen=True)
class Unfreeze(Pass):
    """Pass that trains the biases and the modules of the plan in full."""

    name: ClassVar[str] = "unfreeze"
    kind: ClassVar[Kind] = "in place"
    needs: ClassVar[str] = "plan"

    def __call__(self, capture: Capture) -> PassResult:
        """Replace frozen parameters that are shared with the user's model by trainable copies.

        Parameters that are trainable already stay as they are.
        """
        copies: dict[nn.Parameter, nn.Parameter] = {}
        done = []
        plan = capture.plan
        assert plan is not None
        for name in plan.saved_modules:
            done.append(_unfreeze_module(capture.model.get_submodule(name), copies))
            if not plan.config.ensure_weight_tying:
                copies = {}
        done += [_unfreeze_bias(capture.model, name) for name in plan.biases]
        return PassResult(capture, any(done))


def _unfreeze_module(root: nn.Module, copies: dict[nn.Parameter, nn.Parameter]) -> bool:
    """Make all parameters of a module trainable, and copy its statistics.

    If a parameter also belongs to a module outside of `root`, that module keeps the frozen one.

    Args:
        root: The module.
        copies: The trainable copy of each parameter so far. New copies are added to it.
    """
    changed = False
    # Skip the modules of other adapters inside: their starts, and their replacements of weights.
    for _, module in base_modules(root):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad or not parameter.is_floating_point():
                continue
            if parameter not in copies:
                copies[parameter] = _trained_copy(parameter)
            module._parameters[name] = copies[parameter]
            changed = True
    for name, buffer in base_statistics(root).items():
        owner, _, leaf = name.rpartition(".")
        module_at(root, owner)._buffers[leaf] = buffer.clone()
    return changed


def _unfreeze_bias(model: nn.Module, fqn: str) -> bool:
    """Make a bias trainable, in all modules that use it."""
    old = model.get_parameter(fqn)
    if old.requires_grad:
        return False
    new = _trained_copy(old)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    return True


def _trained_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter that requires a gradient, with a copy of the values."""
    if is_partitioned(parameter):
        twin = partitioned_twin(parameter, own=True)
        twin.requires_grad_(True)
        return twin
    trained = nn.Parameter(parameter.detach().clone())
    # Keep the attributes with which transformers marks loaded parameters.
    vars(trained).update(vars(parameter))
    return trained
