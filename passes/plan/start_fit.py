"""Whether a site can start as the configuration says: in words where it cannot."""

from __future__ import annotations

import math

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.starts import needs_data
from lora_fx.ir.values import Site
from lora_fx.passes.parameters.matrices import matrix_shape

__all__ = ["start_note", "start_objection"]


def start_objection(site: Site, rank: int, config: LoraConfig) -> str | None:
    """Why a site cannot start so; None if it can.

    PEFT gives such sites a plain start, most of the time without a word, or fails.
    """
    start = config.init_lora_weights
    if not isinstance(start, str) or start == "gaussian":
        return None
    leave_out = "take it out of target_modules, or use init_lora_weights=True"
    if site.family == "embedding":
        return (
            f"init_lora_weights={start!r} is for matrix products, not for embeddings: {leave_out}"
        )
    if start in ("eva", "corda", "loftq") and (site.family == "conv" or site.groups > 1):
        return (
            f"init_lora_weights={start!r} is for matrix products, not for convolutions: {leave_out}"
        )
    if start in ("eva", "corda") and not _reads_vectors(site):
        return (
            f"init_lora_weights={start!r} looks at the inputs as vectors, which this operation does not read "
            f"one after the other: {leave_out}"
        )
    count, out, inner = matrix_shape(site)
    if count * out * inner != math.prod(site.shape):
        return f"init_lora_weights={start!r} needs a weight that is a matrix: {leave_out}"
    return _rank_objection(str(start), rank // site.groups, inner, out, site.groups)


def _reads_vectors(site: Site) -> bool:
    """Whether the inputs are the last dimension of what it reads, or the one before for a left factor."""
    return not site.experts and {call.pattern for call in site.calls} <= {
        "linear",
        "matmul",
        "quantized",
    }


def _rank_objection(start: str, rank: int, inner: int, out: int, groups: int) -> str | None:
    each = f" (for each of {groups} groups)" if groups > 1 else ""
    if start == "orthogonal":
        if rank % 2 == 0:
            return None
        return f"init_lora_weights={start!r} needs an even rank{each}, not {rank}: set one with rank_pattern"
    wanted = 2 * rank if start == "lora_ga" else rank
    most = inner if start == "eva" else min(inner, out)
    if wanted <= most:
        return None
    return (
        f"init_lora_weights={start!r} at rank {rank}{each} takes {wanted} directions of a matrix "
        f"[{out}, {inner}]: set a smaller rank with rank_pattern"
    )


def start_note(config: LoraConfig) -> tuple[str, ...]:
    """What a plan has to say about the start."""
    if not needs_data(config.init_lora_weights):
        return ()
    note = (
        f"init_lora_weights={config.init_lora_weights!r} needs data: after rewrite, call "
        "lora_fx.initialize(model, dataloader); until then the start is that of True"
    )
    return (note,)
