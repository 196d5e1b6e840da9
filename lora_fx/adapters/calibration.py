"""Second moments of the inputs of adapted operations, which rounding and its error depend on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.initialization import Data, Forward, moments, reporting, same_modes
from lora_fx.adapters.manage import disable_adapter
from lora_fx.errors import ConfigError
from lora_fx.ir import require_record
from lora_fx.passes.graph import share_copy
from lora_fx.passes.merge import is_matrix_product
from lora_fx.progress import Progress

__all__ = ["input_moments"]


def input_moments(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_names: Sequence[str],
    *,
    forward: Forward | None = None,
    progress: Progress = False,
) -> dict[str, torch.Tensor]:
    """Return the mean of ``XᵀX`` [in, in] for each site that multiplies its input X by a matrix.

    The result is by the name of the site. The mean is over all calls. The inputs are those of the base model
    in eval mode, without tokens that an ``attention_mask`` leaves out.

    Args:
        model: A rewritten model; it is not changed.
        batches: Batches of inputs, as for :func:`lora_fx.initialize`, or a single one.
        adapter_names: The adapters whose sites are observed.
        forward: A function that calls the model with a batch, if batches have another form.
        progress: As for :func:`lora_fx.initialize`.

    Raises:
        ConfigError: If the batches are empty, do not fit the model, do not reach a site, or give it values
            that are not finite.
    """
    if isinstance(batches, torch.Tensor) or hasattr(batches, "keys"):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise ConfigError(f"inputs is a {type(batches).__name__}: give a list of batches")
    twin = share_copy(model)
    record = require_record(twin)
    rows = {
        row.name: row
        for name in adapter_names
        for row in record.adapters[name].sites
        if is_matrix_product(row.site) and not row.tied
    }
    if not rows:
        return {}
    with ExitStack() as stack:
        report = stack.enter_context(reporting(progress, batches))
        stack.enter_context(same_modes(twin))
        stack.enter_context(disable_adapter(twin))
        device = next(twin.parameters()).device
        data = Data(batches, device, forward, report)
        return moments(twin, record, tuple(rows.values()), data)
