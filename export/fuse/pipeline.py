"""List of the fusions in order, the targets of each, and the function that applies them to a graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lora_fx.errors import ExportError
from lora_fx.export.fuse.attention import drop_nan_guards, group_heads, mask_rows_once
from lora_fx.export.fuse.experts import EXPERTS_SINCE, quantized_experts, remove_marks
from lora_fx.export.fuse.fused_attention import (
    CUDA_SINCE,
    group_query_attention,
    multi_head_attention,
    share_cache,
    whole_attention,
)
from lora_fx.export.fuse.graph import Rewriting, remove_dead, remove_unused
from lora_fx.export.fuse.pointwise import (
    bias_gelu,
    divide_by_root,
    fast_gelu,
    quick_gelu,
    skip_layer_norms,
    skip_norms,
)
from lora_fx.export.fuse.products import fold_scales, pack_products
from lora_fx.export.fuse.shapes import (
    drop_moves,
    fix_shapes,
    index_all,
    keep_last_token,
    slice_positions,
)
from lora_fx.export.providers import Provider
from lora_fx.versions import release

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "FUSIONS",
    "LEVELS",
    "Fused",
    "Fusion",
    "Level",
    "Provider",
    "Target",
    "check_target",
    "fuse",
    "fusion_table",
]


_log = logging.getLogger("lora_fx")

Level: TypeAlias = Literal["standard", "runtime", "none"]
LEVELS = ("standard", "runtime", "none")

_ALL = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Target:
    """Target of the fusions: operator set, execution provider and dtype.

    Attributes:
        level: "standard" for operators of ONNX, "runtime" for those of ONNX Runtime as well, "none" for no
            fusion.
        provider: Execution provider for which the operators of ONNX Runtime are chosen.
        dtype: "fp32", "fp16", "bf16" or another name of torch's.
        version: Version of the installed ONNX Runtime, "" for none. A fusion that needs a later one is left
            out.
    """

    level: Level
    provider: Provider = "cpu"
    dtype: str = "fp32"
    version: str = ""

    def lower(self) -> Target | None:
        """Return the target to fall back to, or None if the level is "none"."""
        below: Mapping[str, Level] = {"runtime": "standard", "standard": "none"}
        if self.level == "none":
            return None
        return replace(self, level=below[self.level])


@dataclass(frozen=True)
class Fusion:
    """One rewriting of a graph.

    Attributes:
        name: Name in reports.
        description: Description for the table in the documentation.
        apply: Function that changes a graph, see :data:`lora_fx.export.fuse.graph.Rewriting`.
        holds: Map from execution provider to the dtypes for which it has kernels. None for operators of
            ONNX, which run everywhere.
        since: First version of ONNX Runtime whose operators were compared with PyTorch and are fast.
        later: Map from execution provider to a later first version that it requires.
        reads_marks: True if the fusion reads the marks of :mod:`lora_fx.export.mixtures`. The marks are
            removed before the first fusion that does not read marks.
    """

    name: str
    description: str
    apply: Rewriting
    holds: Mapping[str, tuple[str, ...]] | None = None
    since: str = "1.22"
    later: Mapping[str, str] = field(default_factory=dict)
    reads_marks: bool = False

    @property
    def level(self) -> Level:
        """Lowest level at which the fusion is applied."""
        return "standard" if self.holds is None else "runtime"

    def objection(self, target: Target) -> str:
        """Return the reason why the fusion cannot be applied for a target, or ""."""
        if self.holds is None:
            return ""
        dtypes = self.holds.get(target.provider, ())
        if not dtypes:
            return f"it is not for the {target.provider} provider"
        if target.dtype not in dtypes:
            return f"the {target.provider} provider has no kernel for it in {target.dtype}"
        if target.version and release(target.version) < release(self.since):
            return f"it is for ONNX Runtime from {self.since} on, and this is {target.version}"
        return ""


@dataclass(frozen=True)
class Fused:
    """Report of the fusions in a graph.

    Attributes:
        done: Map from the name of a fusion to how often it was applied.
        refused: Map from the name of a fusion to the reasons why it was not applied, everywhere or at some
            nodes.
    """

    done: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


_KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32", "fp16"),
    "cuda": _ALL,
    "webgpu": ("fp32", "fp16"),
}
_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32", "fp16"),
    "cuda": ("fp16", "bf16"),
    "webgpu": ("fp32", "fp16"),
}

_ENCODER: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32",),
    "cuda": ("fp32", "fp16"),
    "webgpu": ("fp32", "fp16"),
}

FUSIONS: tuple[Fusion, ...] = (
    Fusion(
        "experts",
        "the experts of a mixture in 4 bits are one operator, which computes only those that a token chose: "
        "`QMoE`",
        quantized_experts,
        {"cpu": ("fp32", "fp16")},
        since=EXPERTS_SINCE,
        reads_marks=True,
    ),
    Fusion(
        "last-token",
        "if only the last token is read, operations that treat tokens separately compute only that one",
        keep_last_token,
    ),
    Fusion(
        "branch-scale",
        "the constant scale of a low-rank branch is folded into its factor B",
        fold_scales,
    ),
    Fusion(
        "rms-norm",
        "`x · (1 / root)` becomes `x / root`, the form that ONNX Runtime fuses",
        divide_by_root,
    ),
    Fusion(
        "padding-mask",
        "a padding mask is read as a whole, not element by element",
        index_all,
    ),
    Fusion(
        "positions",
        "the positions of the new tokens are a slice of those of the text",
        slice_positions,
    ),
    Fusion(
        "nan-guard",
        "`Where(IsNaN(p), 0, p)` over probabilities is left out where no row can be masked whole",
        drop_nan_guards,
    ),
    Fusion(
        "row-mask",
        "elsewhere the guard becomes one mask of rows, applied to the output",
        mask_rows_once,
    ),
    Fusion(
        "skip-norm",
        "an RMSNorm is one operator, which adds the residual itself: `SkipSimplifiedLayerNormalization`",
        skip_norms,
        _KERNELS,
    ),
    Fusion(
        "skip-layer-norm",
        "a layer norm adds the residual itself: `SkipLayerNormalization`",
        skip_layer_norms,
        # The kernel of the CPU provider is slower than a sum and a layer norm from 1.30 on.
        {"cuda": _ALL, "webgpu": ("fp32", "fp16")},
    ),
    Fusion(
        "silu",
        "`x · sigmoid(a·x)` becomes `QuickGelu`",
        quick_gelu,
        # WebGPU's shader for fp16 does not compile in 1.25. Later versions fuse on their own.
        {"cpu": ("fp32",), "cuda": _ALL, "webgpu": ("fp32",)},
    ),
    Fusion(
        "fast-gelu",
        "gelu with tanh becomes `FastGelu`",
        fast_gelu,
        _KERNELS,
    ),
    Fusion(
        "bias-gelu",
        "a gelu adds the bias in front of it: `BiasGelu`, `FastGelu`",
        bias_gelu,
        {"cpu": ("fp32",), "cuda": ("fp32", "fp16"), "webgpu": ("fp32", "fp16")},
    ),
    Fusion(
        "group-query-attention",
        "attention over a cache becomes `GroupQueryAttention`, its rotary embedding `RotaryEmbedding`; no "
        "key is repeated, the cache is appended to in the operator, padding is its `attention_bias`",
        group_query_attention,
        _ATTENTION,
        later={"cuda": CUDA_SINCE},
    ),
    Fusion(
        "multi-head-attention",
        "attention over the tokens of a call becomes `MultiHeadAttention`",
        multi_head_attention,
        _ENCODER,
    ),
    Fusion(
        "whole-attention",
        "it computes query, key and value itself: `Attention`",
        whole_attention,
        _ENCODER,
    ),
    Fusion(
        "grouped-heads",
        "keys and values are neither repeated for the heads of a group nor scaled",
        group_heads,
    ),
    Fusion(
        "constant-shapes",
        "shapes that `Reshape` takes become constants",
        fix_shapes,
    ),
    Fusion(
        "moves",
        "reshapes and transposes that give back what was there are left out",
        drop_moves,
    ),
    Fusion(
        "packed-products",
        "query, key, value and the constant factors A of adapters at them are columns of one product",
        pack_products,
        _ATTENTION,
    ),
    Fusion(
        "shared-cache",
        "past positions are counted by the mask: `OnnxSession.generate` appends to a cache where it is",
        share_cache,
        {"cpu": ("fp32", "fp16"), "webgpu": ("fp32", "fp16")},
    ),
)
"""All fusions, in the order in which they are applied."""


def fuse(model: ir.Model, target: Target) -> Fused:
    """Apply the fusions of a target.

    Args:
        model: Changed in place.
        target: The target, which selects the fusions.

    Returns:
        The report of applied and refused fusions.
    """
    if target.level == "none":
        remove_marks(model)
        return Fused()
    done: dict[str, int] = {}
    refused: dict[str, str] = {}
    for fusion in FUSIONS:
        if not fusion.reads_marks:
            remove_marks(model)
        if target.level == "standard" and fusion.level == "runtime":
            continue
        if objection := fusion.objection(target):
            if fusion.apply(model.clone())[0]:
                refused[fusion.name] = objection
            continue
        count, reasons = fusion.apply(model)
        if count:
            done[fusion.name] = count
        if reasons:
            counted_reasons = (f"{reason} ({number}×)" for reason, number in reasons.items())
            refused[fusion.name] = "; ".join(counted_reasons)
        remove_dead(model)
    remove_unused(model)
    _log.info(
        "export: fused %s", ", ".join(f"{name} {n}×" for name, n in done.items()) or "nothing"
    )
    return Fused(done, refused)


def fusion_table() -> str:
    """Return a Markdown table of the fusions: the effect and the targets of each."""
    lines = ["| fusion | `optimize=` | what it does | where |", "|---|---|---|---|"]
    for fusion in FUSIONS:
        where = "everywhere"
        if fusion.holds is not None:
            parts = [
                f"{name} {', '.join(dtypes)}"
                + (f" (≥ {fusion.later[name]})" if name in fusion.later else "")
                for name, dtypes in fusion.holds.items()
            ]
            where = "; ".join((*parts, f"ONNX Runtime ≥ {fusion.since}"))
        lines.append(f"| {fusion.name} | {fusion.level} | {fusion.description} | {where} |")
    return "\n".join(lines)


def check_target(optimize: object, provider: object) -> None:
    """Raise if a level or provider does not exist, or they do not go together.

    Raises:
        ExportError: The message names the valid values.
    """
    if optimize not in LEVELS:
        raise ExportError(
            f"optimize={optimize!r} is unknown: give 'standard' for operators of ONNX, 'runtime' for those "
            "of ONNX Runtime as well, or 'none'"
        )
    providers: tuple[Any, ...] = ("cpu", "cuda", "webgpu", None)
    if provider not in providers:
        raise ExportError(
            f"provider={provider!r} is unknown: give 'cpu', 'cuda' or 'webgpu', which optimize='runtime' "
            "is for"
        )
    if provider is not None and optimize != "runtime":
        raise ExportError(
            f"provider={provider!r} is for optimize='runtime': leave it out, because the other files run on "
            "every provider"
        )
