"""Pickles of bitsandbytes' parameters, which keep their class.

``nn.Parameter`` is pickled as a plain one, whatever its class: a 4-bit weight comes back as bytes with its
scales among the attributes, and ``.to(device)`` then moves the bytes alone. What is registered here is made
of PyTorch's own functions: such a pickle needs PyTorch and bitsandbytes to be read, and nothing else.
"""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["pickle_by_class"]


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
