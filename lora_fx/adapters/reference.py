"""A frozen copy of a rewritten model as it is now: the reference of DPO and GRPO, a teacher."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.errors import CaptureError
from lora_fx.ir import require_record
from lora_fx.passes.graph import copy_without_trainers
from lora_fx.passes.parameters import in_adapter, inside, protect, trained_by_hand
from lora_fx.runtime import watch

__all__ = ["reference"]


@inside
def reference(model: nn.Module) -> nn.Module:
    """Copies a rewritten model as it is now, frozen and in eval mode, for what compares with it.

    The copy runs with the adapters that are active, whose values it has of its own: what ``model`` is trained
    to later does not reach it. Weights that nobody trains are shared, so that the copy takes no more memory
    than the adapters do. The model that was passed to :func:`lora_fx.rewrite` is the reference without
    adapters, and takes none.

    Args:
        model: A rewritten model; it is not changed.

    Returns:
        A rewritten model of the same class, no parameter of which wants a gradient. What trainers have set on
        ``model`` is left out.

    Raises:
        ConfigError: If the model is not rewritten.
        CaptureError: If it is sharded, or a layer that has an adapter was deleted or replaced.
    """
    record = require_record(model)
    by_hand = trained_by_hand(model, record)
    own = {name for adapter in record.adapters.values() for name in adapter.own}
    trained = own | by_hand.keys()
    result = copy_without_trainers(model, record.forwards, CaptureError)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in trained or in_adapter(result, name):
                parameter.data = parameter.detach().clone()
            parameter.requires_grad_(False)
    protect(result)
    watch.arm(result)
    return result.eval()
