"""Gives a model that was made on the meta device its values, apart from weights that are stored otherwise.

Parameters and persistent buffers come from wherever a model's weights are. A buffer that no file has
(the frequencies of rotary embeddings, positions) is what the model's code makes: a model of transformers
can make it again, since its own loader needs that, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from lora_fx.errors import QuantizationError
from lora_fx.ir import Capture, Kind, Pass, PassResult, join

__all__ = ["Materialize"]


@dataclasses.dataclass(frozen=True)
class Materialize(Pass):
    """The pass. It puts parameters and buffers into the model of the capture.

    Attributes:
        but: Weights that are left on the meta device, by FQN.
        values: Gives a parameter or buffer by its name.
        device: Where to put them.
    """

    name: ClassVar[str] = "materialize"
    kind: ClassVar[Kind] = "in place"
    but: frozenset[str]
    values: Callable[[str], torch.Tensor]
    device: torch.device

    def __call__(self, capture: Capture) -> PassResult:
        """One tensor after the other; a tied parameter once."""
        made: dict[int, nn.Parameter] = {}
        for fqn, module in capture.model.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                name = join(fqn, key)
                if parameter is None or name in self.but or not parameter.is_meta:
                    continue
                if id(parameter) not in made:
                    # The old one is kept alive by the tie, or its identity would be free for the next.
                    made[id(parameter)] = nn.Parameter(self._own(name), requires_grad=False)
                module._parameters[key] = made[id(parameter)]
            for key in module._buffers.keys() - module._non_persistent_buffers_set:
                if module._buffers[key] is not None:
                    module._buffers[key] = self._own(join(fqn, key))
        for fqn, module in capture.model.named_modules():
            self._computed(capture.model, module, fqn)
        return PassResult(capture, True)

    def _own(self, name: str) -> torch.Tensor:
        # Copied in any case: what is read may lie in a file.
        return self.values(name).to(self.device, copy=True)

    def _computed(self, model: nn.Module, module: nn.Module, fqn: str) -> None:
        """Buffers that are not saved, made by the code that makes them for transformers' own loader."""
        empty = [k for k, b in module._buffers.items() if b is not None and b.is_meta]
        if not empty:
            return
        initialize = _initializer(model, fqn)
        if initialize is not None and not any(True for _ in module.parameters(recurse=False)):
            for key in empty:
                module._buffers[key] = _blank(module._buffers[key], self.device)
            with torch.no_grad():
                initialize(module)
            empty = [key for key in empty if _is_blank(module._buffers[key])]
        if empty:
            raise QuantizationError(
                f"{join(fqn, empty[0])} is a buffer on the meta device that no file holds: make the model "
                "with its parameters there alone (with accelerate.init_empty_weights():)"
            )


def _initializer(model: nn.Module, fqn: str) -> Callable[[nn.Module], Any] | None:
    """``_init_weights`` of the model of transformers that a module is in; None where it is in none."""
    path = fqn.split(".") if fqn else []
    for length in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        found = getattr(type(owner), "_init_weights", None)
        if found is not None:
            return lambda module: found(owner, module)
    return None


def _blank(like: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """A tensor in which one sees what was never written."""
    assert like is not None
    fill: Any = True
    if like.is_floating_point() or like.is_complex():
        fill = float("nan")
    elif like.dtype != torch.bool:
        fill = torch.iinfo(like.dtype).min + 1
    return torch.full(like.shape, fill, dtype=like.dtype, device=device)


def _is_blank(tensor: torch.Tensor | None) -> bool:
    if tensor is None or tensor.numel() == 0:
        return False
    return torch.equal(tensor, _blank(tensor, tensor.device)) or bool(tensor.isnan().any())
