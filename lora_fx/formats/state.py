"""State dicts and pickles of weights that are stored in few bits.

A tensor subclass has its scales with it, and takes the values of its like only: anything else in a state dict
is refused in words. A format whose scales lie beside the weight has hooks of its own, which write and read
them.
"""

from __future__ import annotations

import abc
import copyreg
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from lora_fx.formats.base import format_of, formats, quantization_of
from lora_fx.ir import Quantization

__all__ = [
    "REMEDY",
    "FormatHook",
    "LoadHook",
    "SaveHook",
    "StateHooks",
    "follow_state",
    "is_format_hook",
    "pickle_by_class",
]

REMEDY: Final = (
    "quantize the model that the state dict is of with lora_fx.quantize, or load it before this one is "
    "quantized"
)


class FormatHook:
    """A hook of a module that is there for a quantized parameter: a merge that makes it dense takes it off.

    Attributes:
        parameter: Its name.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter


class SaveHook(FormatHook, abc.ABC):
    """Writes what lies beside a weight into a state dict."""

    @abc.abstractmethod
    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """Called once the module has written its own."""


class LoadHook(FormatHook, abc.ABC):
    """Reads what lies beside a weight, or refuses a state dict that it cannot be read from."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Called before the module reads its own; the last argument is the list of errors."""
        name = f"{prefix}{self.parameter}"
        if name in state:
            self.load(module._parameters.get(self.parameter), name, state, rest[-1])

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """Reads what a state dict has for a weight.

        Args:
            weight: The weight.
            name: Its name in the state dict.
            state: The state dict; what is taken out of it is read.
            errors: Takes what is wrong.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class StateHooks:
    """What a format has for a parameter whose scales lie beside it.

    Attributes:
        load: Reads them.
        save: Writes them; None where the layer does.
    """

    load: LoadHook
    save: SaveHook | None = None


def follow_state(module: nn.Module, parameter: str, *, layer: bool) -> None:
    """Has a module write and read a quantized parameter, or refuse what it cannot read.

    Args:
        module: Whose parameter it is.
        parameter: Its name there.
        layer: Whether the module has become a layer of the format's library.
    """
    found = format_of(module._parameters[parameter])
    assert found is not None
    hooks = found.state_hooks(parameter, layer=layer) or StateHooks(_Check(parameter))
    if hooks.save is not None:
        module.register_state_dict_post_hook(hooks.save)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(hooks.load)  # type: ignore[no-untyped-call]


class _Check(LoadHook):
    """Looks at how a weight of a state dict is stored."""

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """See :class:`LoadHook`."""
        own = quantization_of(weight)
        if own is None:
            return
        found = quantization_of(state[name])
        if found is not None and _format(found) == _format(own):
            return
        there = "has its values there" if found is None else f"as {found} in the state dict"
        errors.append(f"{name} is stored as {own} here and {there}: {REMEDY}")
        # So that nothing else is said of it: it is not missing, and copying it changes nothing.
        state[name] = weight


def _format(found: Quantization) -> tuple[Any, ...]:
    return found.library, found.scheme, found.block_size


def is_format_hook(hook: Any) -> bool:
    """Whether a hook of a module is there for a quantized weight: a library's, or one of those here."""
    hook = getattr(hook, "hook", hook)  # torch wraps some
    return isinstance(hook, FormatHook) or any(one.layers.owns_hook(hook) for one in formats())


def pickle_by_class(cls: type[nn.Parameter]) -> None:
    """Has all parameters of a class pickled as what they are.

    Args:
        cls: A subclass of ``nn.Parameter`` whose attributes are its state.
    """
    copyreg.pickle(cls, _reduced)


def _reduced(parameter: Any) -> tuple[Any, ...]:
    plain = parameter.detach().as_subclass(torch.Tensor)
    made: tuple[Any, ...] = (plain, parameter.requires_grad, OrderedDict())
    state = torch._utils._get_obj_state(parameter)  # type: ignore[no-untyped-call]
    return (
        torch._tensor._rebuild_from_type_v2,
        (torch._utils._rebuild_parameter, type(parameter), made, state),
    )
