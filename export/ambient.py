"""What may be switched on around an export and has no part in the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lora_fx.runtime.fused_calls import without_autocast

__all__ = ["without_ambient_autocast"]


@contextlib.contextmanager
def without_ambient_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast off wherever the model is: it would be traced, and the dtype of a file is an argument.

    Autocast that the model enters by itself stays as it is.
    """
    # On the CPU in any case: that is where weights are merged and cast.
    kinds = {"cpu", *(tensor.device.type for tensor in model.parameters())}
    with contextlib.ExitStack() as stack:
        for kind in sorted(kinds):
            stack.enter_context(without_autocast(kind))
        yield
