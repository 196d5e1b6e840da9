"""The storage for which adapters are trained (``deploy=`` of :func:`lora_fx.rewrite`), and its rounding.

A forward that is trained for a format multiplies with ``Q(W + s·BA)``. A merge stores the same value. Both
call :func:`rounded`, so that they have the same codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from lora_fx.errors import ConfigError, QuantizationError
from lora_fx.formats.base import Storage, format_of, formats, held, quantization_of, storage, stored
from lora_fx.ir import Deployment

__all__ = ["DTYPES", "deployment", "deployment_options", "rounded"]

DTYPES: Final[Mapping[str, torch.dtype]] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes for which adapters can be trained, by name."""


def deployment(name: str, option: str = "deploy") -> Deployment:
    """Return the storage with a name: a dtype of :data:`DTYPES`, or a format with its default options.

    Any other name is accepted, too, because it may be the format of a quantized base. The plan checks it.

    Args:
        name: The name.
        option: The option that has this value, for the error.

    Raises:
        ConfigError: If the name is empty or no string. The message lists the names.
        QuantizationError: If the library of the format is missing.
    """
    argument: object = name
    if not isinstance(argument, str) or not argument:
        raise ConfigError(
            f"{option}={name!r}: it is the name of a storage: {_names()}, or the format of a quantized base"
        )
    if name in DTYPES:
        return Deployment(name, DTYPES[name])
    if not any(name in known.names for known in formats()):
        return Deployment(name)
    how = storage(name)
    return Deployment(name, None, how.block_size, how.double)


def _names() -> str:
    return ", ".join(map(repr, (*DTYPES, *(name for known in formats() for name in known.names))))


def deployment_options(how: Deployment, option: str = "deploy") -> Storage:
    """Return the options with which a dense weight is stored in a format.

    Args:
        how: The format.
        option: The option that named it, for the error.

    Raises:
        ConfigError: If no format makes weights of that name.
    """
    try:
        return Storage(storage(how.format).format, how.block_size, how.double)
    except QuantizationError as error:
        if any(how.format in known.names for known in formats()):
            raise
        raise ConfigError(
            f"{option}={how.format!r}: no format makes such weights: use {_names()}, or a base in that format"
        ) from error


def rounded(values: Tensor, weight: Tensor, how: Deployment) -> Tensor:
    """Round an adapted weight to the dtype or the quantized format in which it will be stored.

    Args:
        values: The adapted weight, [out, in], in fp32 or fp64.
        weight: The weight of the base. If it is quantized, the result has the same format, and also the same
            scales if the format keeps them. If it is dense, the values are first rounded to its dtype.
        how: The dtype or the format.

    Returns:
        A tensor, or for a quantized format the library's parameter.

    Raises:
        QuantizationError: If the format is that of the base, and the weight is not quantized any more.
    """
    if how.dtype is not None:
        return values.to(how.dtype)
    if not how.as_base:
        options = Storage(how.format, how.block_size, how.double)
        return stored(values.to(weight.dtype), options)
    known = format_of(weight)
    if known is None or quantization_of(weight) is None:
        raise QuantizationError(
            f"the weight is a {type(weight).__name__} now, and was quantized when the model was rewritten: "
            "load it as it was stored"
        )
    return known.requantize(values.double(), held(weight))
