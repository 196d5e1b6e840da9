"""What quantising merged weights again does to a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_fx.adapters.manage import set_adapter
from lora_fx.ir.record import require_record
from lora_fx.passes.capture.check import run_reference
from lora_fx.passes.graph.copies import share_copy
from lora_fx.passes.merge.report import OutputError
from lora_fx.passes.merge.strip import stripped

__all__ = ["output_error"]


def output_error(
    model: nn.Module,
    merged: nn.Module,
    example_inputs: Any,
    adapter_names: Sequence[str] | str | None = None,
) -> OutputError:
    """Runs the adapted model, the merged one and the base in eval mode, over shared weights.

    Args:
        model: The rewritten model; it is not changed.
        merged: What was merged of it.
        example_inputs: As for :func:`lora_fx.rewrite`.
        adapter_names: Which adapters were merged; those that are active by default.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """
    adapted = model
    if adapter_names is not None:
        adapted = share_copy(model)
        set_adapter(adapted, adapter_names)
    wanted = _floats(run_reference(adapted, example_inputs))
    found = _floats(run_reference(merged, example_inputs))
    base = _floats(run_reference(stripped(model, require_record(model)), example_inputs))
    size = float(wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
    error = found - wanted
    return OutputError(
        relative_error=float(error.norm()) / size,
        largest=float(error.abs().max()) if len(error) else 0.0,
        relative_change=float((wanted - base).norm()) / size,
    )


def _floats(output: Any) -> Tensor:
    """All floating numbers of an output, in fp64."""
    leaves = [one for one in pytree.tree_leaves(output) if isinstance(one, Tensor)]
    parts = [one.detach().double().flatten() for one in leaves if one.is_floating_point()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
