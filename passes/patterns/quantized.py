"""Products with a weight that is stored in few bits: the operation is opaque, and the branch goes beside it.

``y' = q(x) + s · (x Aᵀ) Bᵀ``, where q is the kernel of the library that the weight is of (QLoRA,
arXiv:2305.14314). Nothing of the base is dequantized for the branch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import fx

from lora_fx.formats import quantization_of, quantized_linear
from lora_fx.ir import BranchBuilder, Layout, Match, Region, Role, Site
from lora_fx.passes.graph import arguments, known_arguments, target_of
from lora_fx.passes.patterns.linear import LinearPattern
from lora_fx.passes.patterns.sites import make_site, reject, unknown

__all__ = ["ARGUMENTS", "QuantizedPattern"]

ARGUMENTS = "x weight bias=None compute_dtype=None threshold=0.0 training=False layout='out_in'"
"""Those of :func:`lora_fx.formats.weights.quantized_linear`."""


class QuantizedPattern(LinearPattern):
    """:func:`lora_fx.formats.weights.quantized_linear`, which capture writes where a weight is quantized."""

    name = "quantized"

    def match(self, node: fx.Node, region: Region) -> Match:
        """See :class:`lora_fx.ir.site.Pattern`."""
        if target_of(node) is not quantized_linear:
            return None
        named = known_arguments(node, ARGUMENTS)
        if named is None:
            return unknown(region, node, ARGUMENTS)
        weight: Any = named["weight"]
        layout: Layout = named["layout"]
        parameter = region.parameter(weight)
        found = quantization_of(parameter)
        if found is None:
            return reject(region, node, weight, "its quantized weight is not initialized")
        out_features, in_features = found.shape
        site = make_site(
            region,
            pattern=self.name,
            family="linear",
            weight=weight,
            bias=named["bias"],
            x=named["x"],
            output=node,
            sizes=(in_features, out_features),
            layout=layout,
        )
        shape = found.shape if layout == "out_in" else found.shape[::-1]
        return dataclasses.replace(site, weight_shape=shape, quantized=found)

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Two products beside the base one."""
        x = build.dropped(arguments(node, ARGUMENTS)["x"])
        down = build.call(Role.DOWN, F.linear, x, build.a)
        bias = () if build.bias is None else (build.bias,)
        return build.call(Role.UP, F.linear, down, build.b, *bias)
