"""What patterns share: naming a site after its weight, and one way of making a Site."""

from __future__ import annotations

from typing import Any

from torch import fx

from lora_fx.types import Call, Layout, Region, Rejection, Site, join

__all__ = ["itemised", "make_site", "reject", "site_name"]


def site_name(weight: str) -> str:
    """A site's FQN: the module's, or the parameter's where it is not the module's ``weight``.

    The weight of a root module has no module name to go by and keeps its own.
    """
    owner, _, name = weight.rpartition(".")
    return owner if name == "weight" and owner else weight


def make_site(
    region: Region,
    *,
    pattern: str,
    family: str,
    weight: fx.Node,
    bias: object,
    x: fx.Node,
    output: fx.Node,
    sizes: tuple[int, int],
    layout: Layout,
    groups: int = 1,
) -> Site:
    """A site with one call.

    Args:
        region: Where it was found.
        pattern: The pattern's name.
        family: ``linear``, ``conv`` or ``embedding``.
        weight: The ``get_attr`` node of the weight.
        bias: The bias argument, whatever it is.
        x: The input node.
        output: The node that makes the output.
        sizes: ``(in_features, out_features)``.
        layout: How the weight is stored.
        groups: Groups of a convolution.
    """
    parameter = region.parameter(weight)
    assert parameter is not None
    name = join(region.fqn, str(weight.target))
    has_bias = region.parameter(bias) is not None
    return Site(
        name=site_name(name),
        pattern=pattern,
        family=family,
        weight=name,
        bias=join(region.fqn, str(bias.target)) if has_bias and isinstance(bias, fx.Node) else None,
        in_features=sizes[0],
        out_features=sizes[1],
        layout=layout,
        weight_shape=tuple(parameter.shape),
        calls=(Call(region.fqn, x.name, output.name, pattern),),
        groups=groups,
    )


def reject(region: Region, node: fx.Node, weight: fx.Node | None, reason: str) -> Rejection:
    """A refusal that is named after the weight where there is one."""
    name = (
        site_name(join(region.fqn, str(weight.target))) if weight else join(region.fqn, node.name)
    )
    return Rejection(name, reason, region.fqn, node.name)


def itemised(value: Any) -> str:
    """A short name for what a node calls, for refusals."""
    return getattr(value, "__name__", str(value))
