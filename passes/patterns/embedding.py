"""Pattern of embedding lookups: ``y' = W[i] + s · (Aᵀ[i]) Bᵀ``.

A is [r, vocabulary] and starts at zero, B is [width, r] and starts random. A lookup in Aᵀ costs as little as
a lookup in W. The factors have PEFT's names, ``lora_embedding_A`` and ``lora_embedding_B``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.ir import BranchBuilder, Factors, Match, Region, Role, Site
from lora_fx.passes.graph import arguments, known_arguments, target_of
from lora_fx.passes.patterns.sites import make_site, reject, unknown
from lora_fx.passes.patterns.weights import weight_of

__all__ = ["EmbeddingPattern", "lookup"]

# sparse is ignored, because it concerns the gradient of the weight, which is frozen.
_FUNCTIONAL = (
    "input weight padding_idx=None max_norm=None norm_type=2.0 scale_grad_by_freq=False "
    "sparse=False"
)
_ATEN = "weight input|indices padding_idx=-1 scale_grad_by_freq=False sparse=False"


def lookup(node: fx.Node) -> tuple[fx.Node, int | None, bool]:
    """Return the arguments of an embedding node: input, ``padding_idx``, ``scale_grad_by_freq``."""
    named = arguments(node, _FUNCTIONAL if node.target is F.embedding else _ATEN)
    padding = named["padding_idx"]
    if node.target is not F.embedding and padding == -1:
        padding = None  # for aten, -1 means no padding; for F.embedding it means the last row
    return named["input"], padding, bool(named["scale_grad_by_freq"])


class EmbeddingPattern:
    """Pattern of ``F.embedding`` and ``aten.embedding``."""

    name = "embedding"

    def match(self, node: fx.Node, region: Region) -> Match:
        """Match a node; see :class:`lora_fx.ir.site.Pattern`."""
        target = target_of(node)
        if target is F.embedding_bag:
            view = weight_of(arguments(node, "input weight")["weight"], region)
            return reject(
                region, node, view.source if view else None, "embedding bags have no adapter yet"
            )
        if target not in (F.embedding, torch.ops.aten.embedding.default):
            return None
        names = _FUNCTIONAL if target is F.embedding else _ATEN
        named = known_arguments(node, names)
        if named is None:
            return unknown(region, node, names)
        view = weight_of(named["weight"], region)
        if view is None or not view.plain or not isinstance(named["input"], fx.Node):
            return None
        if named.get("max_norm") is not None:
            return reject(
                region, node, view.source, "max_norm renormalizes the weight at every lookup"
            )
        parameter = region.parameter(view.source)
        assert parameter is not None
        if parameter.dim() != 2:
            reason = f"its weight has {parameter.dim()} dimensions; a table of embeddings has 2"
            return reject(region, node, view.source, reason)
        vocabulary, width = parameter.shape
        return make_site(
            region,
            pattern=self.name,
            family="embedding",
            weight=view,
            bias=None,
            x=named["input"],
            output=node,
            sizes=(vocabulary, width),
            layout="in_out",
        )

    def factors(self, site: Site, rank: int) -> Factors:
        """Return the shapes of A [r, vocabulary] and B [width, r]."""
        return Factors(
            (rank, site.in_features),
            (site.out_features, rank),
            "lora_embedding_A",
            "lora_embedding_B",
        )

    def branch(self, site: Site, node: fx.Node, region: Region, build: BranchBuilder) -> fx.Node:
        """Write a lookup in Aᵀ, then a product with B. Indices have no dropout."""
        x, padding, by_frequency = lookup(node)
        table = build.call(Role.DOWN, torch.t, build.a)
        down = build.call(Role.DOWN, F.embedding, x, table, padding, None, 2.0, by_frequency)
        return build.call(Role.UP, F.linear, down, build.b)

    def delta(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``(B A)ᵀ``, [vocabulary, width]."""
        return (b @ a).mT

    def flops(self, site: Site, rank: int) -> int:
        """Return ``2 r width``, because a lookup has no FLOPs."""
        return 2 * rank * site.out_features
