"""Helpers of patterns: names of sites and parts, construction of a Site, and refusals."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from lora_fx.formats import quantization_of
from lora_fx.ir import Call, Layout, Region, Rejection, Site, join
from lora_fx.passes.graph import is_matrix, target_of, unknown_arguments
from lora_fx.passes.patterns.weights import WeightView, constant_of, weight_of

__all__ = [
    "computed",
    "itemised",
    "make_site",
    "not_floating",
    "part_names",
    "reject",
    "site_name",
    "unknown",
    "with_call",
]


# Names of the parts of a fused weight by their number, and substrings of weight names to which they apply.
_PARTS: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    2: (("gate", "up"), ("gate_up", "gate_and_up", "w12", "w13")),
    3: (("q", "k", "v"), ("qkv", "in_proj", "c_attn", "query_key_value")),
}


def site_name(weight: str) -> str:
    """Return a site's FQN: the name of the module, or of the parameter if it is not called ``weight``.

    The weight of the root module is called ``weight``, because the root has an empty name.
    """
    owner, _, name = weight.rpartition(".")
    return owner if name == "weight" and owner else weight


def make_site(
    region: Region,
    *,
    pattern: str,
    family: str,
    weight: fx.Node | WeightView,
    bias: object,
    x: fx.Node,
    output: fx.Node,
    sizes: tuple[int, int],
    layout: Layout,
) -> Site:
    """Return a site with one call. Its output has the features in the last axis.

    For other outputs, change the site with ``dataclasses.replace``, or its call with :func:`with_call`.

    Args:
        region: The region of the node.
        pattern: The pattern's name.
        family: ``linear``, ``conv`` or ``embedding``.
        weight: The ``get_attr`` node of the weight, or the view of it.
        bias: The bias argument of the call.
        x: The input node.
        output: The output node.
        sizes: ``(in_features, out_features)``.
        layout: The layout of the weight as stored.
    """
    view = weight_of(weight, region) if isinstance(weight, fx.Node) else weight
    assert view is not None, f"{weight} reads no parameter"
    parameter = region.parameter(view.source)
    assert parameter is not None
    name, rows = join(region.fqn, str(view.source.target)), view.rows
    added = _bias_parameter(bias, view.rows, region)
    call = Call(
        region=region.fqn,
        input=x.name,
        output=output.name,
        pattern=pattern,
        cast=view.cast,
        bias=bias.name if isinstance(bias, fx.Node) else "",
    )
    return Site(
        name=site_name(name) if rows is None else _part_name(name, rows, len(parameter)),
        pattern=pattern,
        family=family,
        weight=name,
        bias=join(region.fqn, str(added.target)) if added is not None else None,
        in_features=sizes[0],
        out_features=sizes[1],
        layout=layout,
        weight_shape=tuple(parameter.shape),
        calls=(call,),
        rows=rows,
        view=view.shape if view.viewed else None,
        order=view.order,
    )


def with_call(site: Site, **changes: Any) -> Site:
    """Return a site with fields of its only call changed; see :class:`lora_fx.ir.Call`."""
    (call,) = site.calls
    return dataclasses.replace(site, calls=(dataclasses.replace(call, **changes),))


def _bias_parameter(bias: object, rows: tuple[int, int] | None, region: Region) -> fx.Node | None:
    """Return the parameter node of a bias argument, or None.

    The argument may be the whole parameter, or its range for the rows of the weight.
    """
    if not isinstance(bias, fx.Node):
        return None
    if region.parameter(bias) is not None:
        return bias
    if rows is None or target_of(bias) is not operator.getitem or bias.args[1] != slice(*rows):
        return None
    source = bias.args[0]
    return source if isinstance(source, fx.Node) and region.parameter(source) is not None else None


def _part_name(weight: str, rows: tuple[int, int], size: int) -> str:
    """Return the name of a range of rows: ``qkv.q``, ``gate_up_proj.up``, ``attn.k``, or the numbers."""
    width = rows[1] - rows[0]
    if size % width or rows[0] % width:
        return join(_fused_name(weight), f"{rows[0]}_{rows[1]}")
    ranges = [(start, start + width) for start in range(0, size, width)]
    return join(_fused_name(weight), part_names(weight, ranges)[rows[0] // width])


def _fused_name(weight: str) -> str:
    owner, _, key = weight.rpartition(".")
    # nn.MultiheadAttention has one weight for q, k and v, and "attn.q" is clear.
    return owner if key == "in_proj_weight" else site_name(weight)


def part_names(weight: str, ranges: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Return names of the parts of a fused weight: q, k, v or gate, up if its name shows it; else ranges."""
    names, hints = _PARTS.get(len(ranges), ((), ()))
    if any(hint in weight.lower() for hint in hints):
        return names
    return tuple(f"{start}_{stop}" for start, stop in ranges)


def reject(region: Region, node: fx.Node, weight: fx.Node | None, reason: str) -> Rejection:
    """Return a refusal, named after the weight or else after the node."""
    name = (
        site_name(join(region.fqn, str(weight.target))) if weight else join(region.fqn, node.name)
    )
    return Rejection(name, reason, region.fqn, node.name)


def not_floating(region: Region, node: fx.Node, weight: fx.Node) -> Rejection | None:
    """Return a refusal of an integer or quantized weight, or None for any other."""
    parameter = region.parameter(weight)
    assert parameter is not None
    stored = quantization_of(parameter)
    if stored is not None and stored.stacked is None:
        reason = (
            f"its weight is quantized, {stored}, and this is no plain product with all of it: only x Wᵀ can "
            "have an adapter then"
        )
        return reject(region, node, weight, reason)
    if parameter.dtype.is_floating_point:
        return None
    return reject(region, node, weight, f"its weight is {parameter.dtype}, not floating point")


_CUTS = frozenset({"detach", "detach_", "detach.default"})


def computed(region: Region, node: fx.Node, weight: Any) -> Rejection | None:
    """Return a refusal if a weight is computed from a parameter before an operation applies it, or None."""
    source = constant_of(weight, region)
    if source is None:
        return None
    how = itemised(target_of(weight) or weight.target)
    if how in _CUTS or (how == "getattr" and weight.args[1] == "data"):
        reason = "the code cuts its gradient (detach, .data): an adapter would have none"
        return reject(region, node, source, reason)
    return reject(
        region, node, source, f"the weight is computed from it ({how}) before it is applied"
    )


def unknown(region: Region, node: fx.Node, names: str) -> Rejection | None:
    """Return a refusal of an operation that reads a weight and is called with an unknown argument.

    Args:
        region: The region of the node.
        node: The operation.
        names: The known arguments, as in :func:`lora_fx.passes.graph.nodes.arguments`.

    Returns:
        The refusal, or None if all arguments are known, or the operation reads no parameter.
    """
    passed = unknown_arguments(node, names)
    source = _weight_read(node, region) if passed else None
    if source is None:
        return None
    name = itemised(target_of(node)).partition(".")[0]
    return reject(
        region,
        node,
        source,
        f"{name} is called with {', '.join(passed)}, and nothing says what that does to the product: call it "
        "without",
    )


def _weight_read(node: fx.Node, region: Region) -> fx.Node | None:
    """Return the matrix that an operation reads, or None."""
    for read in node.all_input_nodes:
        view = weight_of(read, region)
        source = constant_of(read, region) if view is None else view.source
        if is_matrix(region.parameter(source)):
            return source
    return None


def itemised(value: Any) -> str:
    """Return a short name of a node's target, for messages."""
    return getattr(value, "__name__", str(value))
