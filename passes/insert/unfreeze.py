"""Decides what is trained beside the adapters: biases, and modules that are trained in full.

What training writes into gets storage of its own, so that the model that was given to ``rewrite``
does not change with it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from lora_fx.ir import Capture, Kind, Pass, PassResult, Plan
from lora_fx.passes.graph import is_partitioned, partitioned_twin
from lora_fx.passes.parameters import base_modules

__all__ = ["Unfreeze"]


@dataclasses.dataclass(frozen=True)
class Unfreeze(Pass):
    """The pass.

    Attributes:
        plan: Names the biases and the modules; None for the plan of the capture.
    """

    name: ClassVar[str] = "unfreeze"
    kind: ClassVar[Kind] = "in place"
    needs: ClassVar[str] = "plan"
    plan: Plan | None = None

    def __call__(self, capture: Capture) -> PassResult:
        """Replaces frozen, shared parameters with trainable copies; what is trainable stays."""
        copies: dict[nn.Parameter, nn.Parameter] = {}
        done = []
        plan = self.plan or capture.plan
        assert plan is not None
        for name in plan.saved_modules:
            done.append(_unfreeze_module(capture.model.get_submodule(name), copies))
            if not plan.config.ensure_weight_tying:
                copies = {}
        done += [_unfreeze_bias(capture.model, name) for name in plan.biases]
        return PassResult(capture, any(done))


def _unfreeze_module(root: nn.Module, copies: dict[nn.Parameter, nn.Parameter]) -> bool:
    """Trains a module in full: a weight tied to one outside is trained here, frozen there.

    Args:
        root: The module.
        copies: What stands for which parameter; extended.
    """
    changed = False
    # What other adapters have inside is theirs: their starts, and what they have in place of a weight.
    for _, module in base_modules(root):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad or not parameter.is_floating_point():
                continue
            if parameter not in copies:
                copies[parameter] = _trained_copy(parameter)
            module._parameters[name] = copies[parameter]
            changed = True
    return changed


def _unfreeze_bias(model: nn.Module, fqn: str) -> bool:
    """Trains a bias, everywhere where it is used."""
    old = model.get_parameter(fqn)
    if old.requires_grad:
        return False
    new = _trained_copy(old)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    return True


def _trained_copy(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter that wants a gradient, with the same values in memory of its own."""
    if is_partitioned(parameter):
        made = partitioned_twin(parameter, own=True)
        made.requires_grad_(True)
        return made
    return nn.Parameter(parameter.detach().clone())
