"""Decides what is trained beside the adapters: biases, and modules that are trained in full.

What training writes into gets storage of its own, so that the model that was given to ``rewrite`` does
not change with it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from lora_fx.types import Capture, PassResult, Plan

__all__ = ["Unfreeze"]


@dataclasses.dataclass(frozen=True)
class Unfreeze:
    """The pass.

    Attributes:
        plan: Names the biases and the modules.
    """

    name: ClassVar[str] = "unfreeze"
    plan: Plan

    def __call__(self, capture: Capture) -> PassResult:
        """Replaces frozen, shared parameters with trainable copies."""
        if not (self.plan.saved_modules or self.plan.biases):
            return PassResult(capture, False)
        for fqn in self.plan.saved_modules:
            # Not shared with anything outside: a tied weight is trained here and frozen there.
            copies: dict[int, nn.Parameter] = {}
            for module in capture.model.get_submodule(fqn).modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = copies.setdefault(id(parameter), _own(parameter))
        for fqn in self.plan.biases:
            owner, _, name = fqn.rpartition(".")
            old = capture.model.get_parameter(fqn)
            new = _own(old)
            for module in capture.model.modules():
                for key, parameter in module._parameters.items():
                    if parameter is old:
                        module._parameters[key] = new
            assert capture.model.get_submodule(owner)._parameters[name] is new
        return PassResult(capture, True)


def _own(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.is_floating_point())
