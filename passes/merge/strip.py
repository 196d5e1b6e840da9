"""Takes everything that is lora_fx's out of a copy of a rewritten model."""

from __future__ import annotations

from torch import nn

from lora_fx.errors import MergeError
from lora_fx.ir import Record, module_of
from lora_fx.passes.graph import (
    CONSTANT,
    copy_without_trainers,
    install,
    uninstall,
)
from lora_fx.passes.parameters import mark_adapted, place_base, trained_by_hand, unprotect
from lora_fx.runtime import AdapterModule, unwatch_calls

__all__ = ["drop_graph", "stripped"]


def stripped(model: nn.Module, record: Record) -> nn.Module:
    """A copy of the base model: its own classes, no factors, ``requires_grad`` as it was.

    Modules that ran a graph before the rewrite, over quantized weights, run it again. What trainers have set
    since is left out.

    Raises:
        MergeError: If that cannot be told from what somebody else has set.
    """
    by_hand = trained_by_hand(model, record)
    result = copy_without_trainers(model, record.forwards, MergeError)
    for name in record.active:
        place_base(result, name, record.adapters[name].own, record.originals, keep=False)
    del result.__dict__["_lora_fx"]
    unwatch_calls(result)
    unprotect(result)
    kept = {name: result.get_submodule(name) for name in record.base.kept}
    for module in list(result.modules()):
        if module in kept.values():
            uninstall(module)
        else:
            drop_graph(module)
        for name, child in list(module.named_children()):
            if isinstance(child, AdapterModule):
                del module._modules[name]
    for name, parameter in result.named_parameters():
        # What somebody has put into the model since was not there before.
        new = name in by_hand and by_hand[name].requires_grad
        parameter.requires_grad = name in record.trainable or new
    mark_adapted(result, adapted=False)
    base = record.base
    install(
        (
            base.region(key, kept[module_of(key)], record.frontend)
            for key in base.graphs
            if module_of(key) in kept
        ),
        kept=True,
    )
    return result


def drop_graph(module: nn.Module) -> None:
    """Has a module run its own forward, without what only its graph has read."""
    uninstall(module)
    # A script module has its buffers in something that says their names by no iteration.
    for name in [name for name in module._buffers.keys() if name.startswith(CONSTANT)]:  # noqa: SIM118
        del module._buffers[name]
