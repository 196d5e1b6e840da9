"""The formats in which a matrix can be stored in few bits, each as its library makes it.

====== ============ =========================================== ==========================
format library      scales                                      source
====== ============ =========================================== ==========================
nf4    bitsandbytes one for 64 values, quantised to 8 bits, too QLoRA, arXiv:2305.14314
fp4    bitsandbytes likewise                                    bitsandbytes
int8   torchao      one for each row                            ``Int8WeightOnlyConfig``
int4   torchao      one for 32 values of a row                  ``IntxWeightOnlyConfig``
====== ============ =========================================== ==========================

``int4`` has the values of four bits, and a byte for each: torchao packs two into one only for kernels of
CUDA that round activations to bfloat16, and PEFT refuses those tensors. ``nf4`` is what saves memory.

The libraries are imported when a weight is stored.
"""

from __future__ import annotations

import copyreg
import dataclasses
import importlib
import importlib.util
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_fx.errors import QuantizationError

__all__ = [
    "FORMATS",
    "Storage",
    "check_device",
    "pickle_by_class",
    "storage",
    "stored",
]


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


FORMATS: Final[Mapping[str, str]] = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "torchao",
    "int4": "torchao",
}
"""Library of each format."""

_BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """How weights are to be stored; :func:`storage` makes one that is valid.

    Attributes:
        format: One of :data:`FORMATS`.
        block_size: Values that share a scale; None for one scale a row.
        double: Whether the scales are quantised, too.
        compute_dtype: In which the product is computed; None for that of its input.
        chosen: Whether the block size was asked for: otherwise a smaller one does where it does not divide.
    """

    format: str
    block_size: int | None
    double: bool = False
    compute_dtype: torch.dtype | None = None
    chosen: bool = False

    def fitted(self, shape: Sequence[int]) -> Storage:
        """The same, with blocks that divide the rows of a matrix [out, in] if the size was not asked for."""
        smallest = _BLOCKS[0]
        divides = not self.block_size or not shape[1] % self.block_size
        if self.chosen or divides or shape[1] % smallest:
            return self
        return dataclasses.replace(self, block_size=smallest)

    @property
    def library(self) -> str:
        """Whose format it is."""
        return FORMATS[self.format]

    def __str__(self) -> str:
        blocks = "a scale a row" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.format} ({self.library}, {blocks}{', double' if self.double else ''})"

    def bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of a matrix [out, in], scales and all.

        Args:
            shape: Rows and columns.
            dtype: Of its values: scales of ``int4`` have it.
        """
        rows, columns = shape
        values, block = rows * columns, self.fitted(shape).block_size
        if self.library == "bitsandbytes":
            assert block is not None
            scales = math.ceil(values / block)
            # The code has 16 floats, that of the scales 256; 256 of those share a scale in their turn.
            held = 4 * (math.ceil(scales / 256) + 256 + 1) + scales if self.double else 4 * scales
            return math.ceil(values / 2) + held + 16 * 4
        if block is None:
            return values + rows * (4 + 1)
        return values + values // block * (dtype.itemsize + 1)

    def objection(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why a matrix [out, in] cannot be stored so, with what could be done; None if it can."""
        if dtype not in _FLOATS:
            return f"its weight is {dtype}, and {self.library} takes 16 and 32 bits: model.float() first"
        # Blocks of bitsandbytes run on from row to row, but its CPU kernel (0.50) takes other blocks' scales.
        block = self.fitted(shape).block_size
        if block and shape[1] % block:
            sizes = _BLOCKS if self.library == "bitsandbytes" else (16, *_BLOCKS)
            fitting = [b for b in sizes if shape[1] % b == 0]
            other = f"block_size={fitting[-1]} does, or " if fitting else ""
            return (
                f"blocks of {block} do not divide its rows of {shape[1]} values: {other}"
                "'int8', which has one scale a row"
            )
        return None


def storage(
    format: str,  # noqa: A002  the name that it has for users
    *,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Storage:
    """Checks what was asked for, and fills in the defaults of the format.

    Raises:
        QuantizationError: If the format is none, an argument means nothing for it, or its library is
            missing.
    """
    if format not in list(FORMATS):  # a list: what cannot be hashed is no format either
        raise QuantizationError(f"there is no format {format!r}: use {', '.join(FORMATS)}")
    _check_arguments(block_size, double)
    if FORMATS[format] == "torchao":
        given: dict[str, object] = {"double": double, "compute_dtype": compute_dtype}
        if format == "int8":
            given["block_size"] = block_size
        for name, value in given.items():
            if value is not None:
                fits = "'nf4', 'fp4' and 'int4' take it" if name == "block_size" else "'nf4' does"
                raise QuantizationError(f"{name}={value} means nothing for {format!r}: {fits}")
        size = None if format == "int8" else 32 if block_size is None else block_size
        if size is not None and (size < 2 or size & (size - 1)):
            raise QuantizationError(f"block_size={size}: it has to be a power of two, as 32 or 128")
        made = Storage(format, size, chosen=block_size is not None)
    else:
        size = 64 if block_size is None else block_size
        if size not in _BLOCKS:
            raise QuantizationError(
                f"block_size={size}: bitsandbytes takes {', '.join(map(str, _BLOCKS))}"
            )
        if compute_dtype is not None and compute_dtype not in _FLOATS:
            raise QuantizationError(
                f"compute_dtype={compute_dtype!r}: bitsandbytes computes in "
                f"{', '.join(map(str, _FLOATS))}, as lora_fx.quantize(..., compute_dtype=torch.bfloat16)"
            )
        made = Storage(format, size, double is not False, compute_dtype, block_size is not None)
    _imported(made)
    return made


def _check_arguments(block_size: object, double: object) -> None:
    # bool is a subclass of int, and True no number of values.
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int)):
        raise QuantizationError(
            f"block_size={block_size!r}: it is a whole number of values that share a scale, as 32 or 64"
        )
    if double is not None and not isinstance(double, bool):
        raise QuantizationError(
            f"double={double!r}: it is True or False, or None for what the format has by default"
        )


def check_device(how: Storage, device: torch.device) -> None:
    """Refuses a device on which the format does not run.

    Raises:
        QuantizationError: With a format that does.
    """
    if how.library != "bitsandbytes":
        return
    known = _imported(how).supported_torch_devices
    if device.type not in known:
        raise QuantizationError(
            f"{how.format!r} does not run on {device.type}: bitsandbytes has kernels for "
            f"{', '.join(sorted(known - {'npu', 'hpu'}))}. Use 'int8' or 'int4', or device='cpu'"
        )


def stored(values: Tensor, how: Storage) -> nn.Parameter:
    """A frozen parameter of the format's library with these values, rounded as it rounds them.

    Args:
        values: A matrix [out, in]; it is not kept.
        how: The format.
    """
    values = values.detach().contiguous()
    return _STORED[how.library](values, how.fitted(values.shape))


def _four_bits(values: Tensor, how: Storage) -> nn.Parameter:
    library = _imported(how)
    pickle_by_class(library.nn.Params4bit)
    packed, state = library.functional.quantize_4bit(
        values,
        blocksize=how.block_size,
        compress_statistics=how.double,
        quant_type=how.format,
        quant_storage=torch.uint8,
    )
    found: nn.Parameter = library.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=how.block_size,
        compress_statistics=how.double,
        quant_type=how.format,
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )
    return found


def _torchao(values: Tensor, how: Storage) -> nn.Parameter:
    _imported(how)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    config: Any = Int8WeightOnlyConfig()
    if how.block_size is not None:
        groups = PerGroup(how.block_size)
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)  # type: ignore[attr-defined]
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(values, requires_grad=False)
    quantize_(nn.ModuleList([layer]), config)
    return nn.Parameter(layer.weight.data, requires_grad=False)


_STORED = {"bitsandbytes": _four_bits, "torchao": _torchao}


def _imported(how: Storage) -> Any:
    try:
        return importlib.import_module(how.library)
    except (ImportError, OSError, RuntimeError) as error:
        other = next(name for name in FORMATS.values() if name != how.library)
        instead = [repr(name) for name, library in FORMATS.items() if library == other]
        there = importlib.util.find_spec(other) is not None
        raise QuantizationError(
            f"{how.format!r} needs {how.library}, which cannot be imported ({error}): "
            "pip install 'lora-fx[quant]'"
            + (f", or use {' or '.join(instead)}, for which {other} is there" if there else "")
        ) from error
