"""The protocol of a weight format, the registry, and how a weight is to be stored.

A format is how a library stores a quantized matrix: a parameter of a class of its own, which it alone can
read. All others ask the format, which is found by the name of that class. Where a library has layers of its
own, :class:`LibraryLayers` says what copying, tracing, merging and exporting a model ask of them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import ConfigError, QuantizationError
from lora_fx.extras import is_installed, load_optional
from lora_fx.ir import (
    NoOperator,
    OnnxBuilder,
    OnnxOperator,
    OnnxProduct,
    OnnxWeight,
    Quantization,
    Site,
)

if TYPE_CHECKING:
    from lora_fx.formats.weights import StateHooks

__all__ = [
    "BLOCKS",
    "CONTRIB",
    "DEQUANTIZE_LINEAR",
    "FLOATS",
    "MATMUL_N_BITS",
    "STANDARD_OPERATORS",
    "LibraryLayers",
    "Storage",
    "WeightFormat",
    "format_named",
    "format_of",
    "formats",
    "held",
    "import_library",
    "operator_named",
    "packed_sizes",
    "quantization_of",
    "register_format",
    "row_operators",
    "storage",
    "stored",
    "whole_numbers",
]

# --- operators of ONNX ----------------------------------------------------------------------------
# Operators of ONNX that read weights of few bits, whichever library they are of, and how codes lie
# in them.
#
# ``MatMulNBits`` is ONNX Runtime's own. A dequantized weight is read by a Gemm, not by a MatMul:
# ONNX Runtime fuses ``DequantizeLinear → MatMul`` into a product that rounds its input to 8 bits
# (level 4 of ``session.qdq_matmulnbits_accuracy_level``, the default), which is off by 6e-3.


CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_OPERATOR_BLOCKS = (128, 64, 32, 16)
"""Those that every provider has a kernel for."""


def packed_sizes(product: OnnxProduct) -> dict[str, int]:
    """The attributes that ONNX Runtime's products have in common."""
    return {"N": product.rows, "K": product.columns, "block_size": product.block}


def _n_bits(build: OnnxBuilder, product: OnnxProduct) -> Any:
    # Level 1: the product is computed in fp32, its input is not rounded to 8 bits.
    attributes = {**packed_sizes(product), "bits": 4, "accuracy_level": 1}
    inputs = [product.x, *product.arrays]
    return build.product("MatMulNBits", inputs, attributes, domain=CONTRIB)


def _dequantize(build: OnnxBuilder, product: OnnxProduct) -> Any:
    x, rows, columns = product.x, product.rows, product.columns
    weight = build.op("DequantizeLinear", product.arrays, {"axis": 0})
    if product.block != columns:
        weight = build.op("Reshape", [weight, build.ints([rows, columns])])
    if not build.same_dtype(x, product.arrays[1]):
        weight = build.op("CastLike", [weight, x])
    if build.rank(x) == 2:
        return build.product("Gemm", [x, weight], {"transB": 1})
    flat = build.op("Reshape", [x, build.ints([-1, columns])], like=x)
    made = build.product("Gemm", [flat, weight], {"transB": 1}, like=x)
    outer = build.op("Shape", [x], {"start": 0, "end": -1})
    shape = build.op("Concat", [outer, build.ints([rows])], {"axis": 0})
    return build.op("Reshape", [made, shape])


MATMUL_N_BITS = OnnxOperator("MatMulNBits", _n_bits)
DEQUANTIZE_LINEAR = OnnxOperator("DequantizeLinear", _dequantize, dequantizes=True)
STANDARD_OPERATORS = (MATMUL_N_BITS, DEQUANTIZE_LINEAR)
"""Those that any format may name."""


def whole_numbers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, block: int, bits: int
) -> OnnxWeight | None:
    """``(code - zero) · scale`` in blocks along rows; None if the zero points are no whole numbers.

    Args:
        codes: int8 [out, in], from -8 to 7 for 4 bits.
        scales: [out, blocks], or one row for several rows of codes.
        zeros: Likewise; None for none.
        block: Values of a row that share a scale.
        bits: 4 or 8.
    """
    rows, columns = codes.shape
    scales = _spread(scales, rows).float()
    zeros = None if zeros is None else _spread(zeros, rows)
    if zeros is not None and not bool((zeros == zeros.round()).all()):
        return None
    size = next((size for size in _OPERATOR_BLOCKS if block % size == 0), None)
    if bits == 4 and size is None and block == columns:
        size = _OPERATOR_BLOCKS[-1]  # one scale a row: the last block need not be full
    if bits == 4 and size is not None:
        return _blocks_of_four_bits(codes, scales, zeros, size)
    if zeros is not None:
        zeros = zeros.to(torch.int8).flatten() if bool(zeros.any()) else None
    lines = codes.reshape(-1, block)
    return OnnxWeight(DEQUANTIZE_LINEAR, lines, scales.flatten(), zeros, block)


def _blocks_of_four_bits(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, size: int
) -> OnnxWeight:
    rows, columns = codes.shape
    blocks = -(-columns // size)
    # Codes from -8 to 7 are stored from 0 to 15; without zero points the middle is 8.
    kept = F.pad((codes + 8).to(torch.uint8), (0, blocks * size - columns), value=8)
    # A block of the library is several of the operator's, or a row that they do not fill.
    scales = scales.repeat_interleave(-(-blocks // scales.shape[1]), 1)
    if zeros is not None and bool(zeros.any()):
        zeros = zeros.repeat_interleave(-(-blocks // zeros.shape[1]), 1)
        zeros = _packed_pairs(F.pad((zeros + 8).to(torch.uint8), (0, blocks % 2), value=8))
    else:
        zeros = None
    pairs = _packed_pairs(kept).view(rows, blocks, size // 2)
    return OnnxWeight(MATMUL_N_BITS, pairs, scales, zeros, size, fresh=True)


def _packed_pairs(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first in the lower half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _spread(value: Tensor, rows: int) -> Tensor:
    """What there is one of for each block, [rows, blocks]: a block may be several rows."""
    return value.repeat_interleave(rows // value.shape[0], 0)


# --- the protocol ---------------------------------------------------------------------------------


class LibraryLayers:
    """The layers of a library that has none of its own; subclass it for one that has.

    Attributes:
        attributes: Names of what the library keeps in a layer beside its parameters.
    """

    attributes: tuple[str, ...] = ()

    def owns(self, cls: type[nn.Module]) -> bool:
        """Whether a class is the library's."""
        return False

    def forward(self, cls: type[nn.Module]) -> Callable[..., Any] | None:
        """What to trace in place of a layer's ``forward``, with ``quantized_linear``; None for its own.

        Args:
            cls: Of the layer. A subclass may compute something else: it has its own forward.
        """
        return None

    def setup(self, layer: nn.Module) -> tuple[Any, ...]:
        """All that the graph of a layer depends on, which :meth:`forward` is traced for."""
        return ()

    def plain(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """The class of PyTorch that a layer is with a dense weight in it; None if it is not the library's."""
        return None

    def become(self, layer: nn.Module, how: Storage) -> None:
        """Make an ``nn.Linear`` one of the library's, over the weight that was just packed for it.

        It stays the same object, with its hooks and bias.
        """

    def unfinished(self, layer: nn.Module, named: str) -> str | None:
        """Say what a layer of the library lacks whose weight is not quantized; None if it lacks nothing.

        Args:
            layer: The layer.
            named: Its class, as it is called.
        """
        return None

    def owns_hook(self, hook: object) -> bool:
        """Whether the library has put a hook on a layer, which a dense weight does not need."""
        return False

    def share(self, layer: nn.Module, memo: dict[int, Any]) -> None:
        """Have a copy of a layer keep objects of its own over the same tensors.

        Args:
            layer: Any module of the model that is copied; its parameters are in ``memo``.
            memo: For ``copy.deepcopy``.
        """

    def settle(self, layer: nn.Module) -> None:
        """Put right what a module of a copy, any of them, or one just made may not have."""

    def renew(self, layer: nn.Module) -> None:
        """Have a layer use the scales of another weight of the format, which was put into it."""

    def release(self, layer: nn.Module) -> None:
        """Drop what a module, any of a copy that is exported, remembers of its weight beside it."""

    def describe_model(
        self, model: nn.Module, how: Storage, sites: Sequence[Site], dtype: torch.dtype
    ) -> None:
        """Set what others ask before they take a model for a quantized one.

        Args:
            model: A quantized model that is used nowhere else; neither is its configuration.
            how: The format.
            sites: The operations whose weights are stored so.
            dtype: Of the first one's values.
        """


BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


class WeightFormat(abc.ABC):
    """How one library stores weights: subclass it, and register an instance with ``register_format``.

    A weight is given to its methods as the library has it: a parameter of its own class, or the tensor
    subclass that a parameter wraps. It always holds a matrix [out, in].

    Attributes:
        library: The library's name, which is that of its package.
        names: The formats that :func:`lora_fx.quantize` makes, none if they can only be read.
        classes: Names of the classes of its tensors.
        blocks: Sizes of blocks that are proposed where one does not fit; none for a scale a row.
        shows_values: Whether a weight shows the dtype and the shape of its values to code that asks, and any
            code can be given a dense one in its place. A subclass of ``Tensor`` does.
        any_dtype: Whether its products take an input of any dtype, whatever that of its values.
        kernel_packages: Packages whose code is a part of the operation that calls it, and never a model's.
        row_operators: Operators of the library that keep rows apart, with the argument whose rows they are.
        layers: What its own layers need.
        operators: Operators of ONNX that no other format has.
    """

    library: ClassVar[str]
    names: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[frozenset[str]]
    blocks: ClassVar[tuple[int, ...]] = ()
    shows_values: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True
    kernel_packages: ClassVar[frozenset[str]] = frozenset()
    row_operators: ClassVar[Mapping[str, str]] = {}
    layers: ClassVar[LibraryLayers] = LibraryLayers()
    operators: ClassVar[tuple[OnnxOperator, ...]] = ()

    def owns(self, cls: type) -> bool:
        """Whether a class is one of the library's tensors, in a form that is known or not."""
        return cls.__name__ in self.classes

    # --- a weight as it is ---

    @abc.abstractmethod
    def describe(self, weight: Any) -> Quantization | None:
        """Say how a weight is stored; None if that is in no form that is known."""

    @abc.abstractmethod
    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """Its values, [out, in], as its kernel has them for an input of a dtype; they may be wider."""

    def product(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None,
        *,
        compute_dtype: torch.dtype | None,
        threshold: float,
        training: bool,
    ) -> Tensor | None:
        """``x Wᵀ + b`` by a kernel that is differentiable in x and b; None if none takes such an input.

        Args are those of :func:`lora_fx.formats.quantized_linear`. Without it the product is :meth:`values`'
        or, where it :meth:`multiplies`, that of ``F.linear``; neither keeps the values for the backward pass.
        """
        return None

    def multiplies(self, weight: Any, dtype: torch.dtype) -> bool:
        """Whether ``F.linear`` multiplies an input of a dtype by the weight itself."""
        return False

    # --- to be stored ---

    def storage(
        self,
        name: str,
        *,
        block_size: int | None,
        double: bool | None,
        compute_dtype: torch.dtype | None,
    ) -> Storage:
        """Check what was asked for, and fill in defaults. Here nothing can be asked for.

        Raises:
            QuantizationError: If an argument does not apply to the format.
        """
        given = {"block_size": block_size, "double": double, "compute_dtype": compute_dtype}
        for key, value in given.items():
            if value is not None:
                raise QuantizationError(f"{key}={value} means nothing for {name!r}: leave it out")
        return Storage(name, None)

    def load(self, name: str) -> Any:
        """Import the library, with :func:`import_library`, for a format that is asked for by name."""
        return None

    def device_objection(self, how: Storage, device: torch.device) -> str | None:
        """Why a format does not run on a device, with what does; None if it runs."""
        return None

    def objection(self, how: Storage, shape: Sequence[int], dtype: torch.dtype) -> str | None:
        """Why a matrix [out, in] cannot be stored so, with what could be done; None if it can."""
        if dtype not in FLOATS:
            return f"its weight is {dtype}, and {self.library} takes 16 and 32 bits: model.float() first"
        block = how.block_size
        if block and shape[1] % block:
            fitting = [b for b in self.blocks if shape[1] % b == 0]
            other = f"block_size={fitting[-1]} does, or " if fitting else ""
            return (
                f"blocks of {block} do not divide its rows of {shape[1]} values: {other}"
                "'int8', which has one scale a row"
            )
        return None

    def bytes(self, how: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of a matrix [out, in] of a dtype, scales and all.

        Raises:
            QuantizationError: If it makes none.
        """
        raise QuantizationError(f"{self.library} makes no weight in {how.format!r}")

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """A frozen parameter with these values, rounded as the library rounds them.

        Args:
            values: A matrix [out, in], contiguous; it is not kept.
            how: What :meth:`storage` gave, with blocks that divide the rows.

        Raises:
            QuantizationError: If it makes none.
        """
        raise QuantizationError(f"{self.library} makes no weight in {how.format!r}")

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """A frozen parameter that holds other values, [out, in] in fp64, as a weight holds its own."""
        found = self.describe(weight)
        assert found is not None
        how = Storage(found.scheme, found.block_size, found.double, chosen=True)
        return self.pack(values.to(found.dtype).contiguous(), how)

    # --- copies, state dicts ---

    def twin(self, parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter | None:
        """A frozen parameter of the same class over the same memory; None if ``detach`` gives it.

        Args:
            parameter: A parameter of the format's own class.
            memo: For ``copy.deepcopy``: scales that lie in the layer, too, become the same object.
        """
        return None

    def state_hooks(self, parameter: str, *, layer: bool) -> StateHooks | None:
        """What writes scales into state dicts, and reads them; None if they are in the tensor itself.

        Args:
            parameter: Its name in its module.
            layer: Whether that is a layer that :attr:`layers` made.
        """
        return None

    # --- export ---

    def widened(self, parameter: nn.Parameter) -> nn.Parameter:
        """The same codes and scales, whose values are not rounded to half precision when they are made.

        Args:
            parameter: One of a copy, which may be changed.
        """
        return parameter

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """The arrays that a file holds, and the operator that reads them, with the same values.

        Args:
            weight: The weight, as :meth:`widened` has it.
            stored: How it is stored.
        """
        return NoOperator(f"is stored as {stored}, for which its format names no operator of ONNX")


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """How weights are to be stored; :func:`storage` makes one that is valid.

    Attributes:
        format: A name that a registered format has.
        block_size: Values that share a scale; None for one scale a row.
        double: Whether the scales are quantized, too.
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
        smallest = BLOCKS[0]
        divides = not self.block_size or not shape[1] % self.block_size
        if self.chosen or divides or shape[1] % smallest:
            return self
        return dataclasses.replace(self, block_size=smallest)

    @property
    def made_by(self) -> WeightFormat:
        """The format that stores so."""
        return format_named(self.format)

    @property
    def library(self) -> str:
        """Whose format it is."""
        return self.made_by.library

    def __str__(self) -> str:
        blocks = "a scale a row" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.format} ({self.library}, {blocks}{', double' if self.double else ''})"

    def bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of a matrix [out, in] of a dtype, scales and all."""
        return self.made_by.bytes(self.fitted(shape), shape, dtype)

    def objection(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why a matrix [out, in] cannot be stored so, with what could be done; None if it can."""
        return self.made_by.objection(self.fitted(shape), shape, dtype)


_formats: tuple[WeightFormat, ...] = ()
_by_class: dict[str, WeightFormat] = {}


def formats() -> tuple[WeightFormat, ...]:
    """Every format, those of lora_fx first."""
    return _formats


def register_format(weight_format: WeightFormat) -> None:
    """Add a format of quantized weights, for this process.

    Args:
        weight_format: An instance of a subclass of :class:`lora_fx.formats.WeightFormat`, which says what
            there is to implement.

    Raises:
        ConfigError: If it is none, or a name or class of it is taken.
    """
    global _formats  # noqa: PLW0603  to register is to change what every later weight is looked up in
    kind = type(weight_format).__name__
    if not isinstance(weight_format, WeightFormat):
        raise ConfigError(f"{kind} is no weight format: subclass lora_fx.formats.WeightFormat")
    lacking = [key for key in ("library", "classes") if not hasattr(weight_format, key)]
    if lacking:
        raise ConfigError(f"{kind} is not a weight format: it lacks {', '.join(lacking)}")
    _check_operators(weight_format)
    for known in _formats:
        for name in known.names:
            if name in weight_format.names:
                raise ConfigError(
                    f"a format named {name!r} is registered already, by {known.library}: choose another "
                    "name"
                )
        for name in known.classes & weight_format.classes:
            raise ConfigError(
                f"weights of a class named {name} are {known.library}'s already: name the class otherwise"
            )
    _formats = (*_formats, weight_format)
    _by_class.update(dict.fromkeys(weight_format.classes, weight_format))


def _check_operators(weight_format: WeightFormat) -> None:
    taken = {one.name: one for known in _formats for one in known.operators}
    taken |= {one.name: one for one in STANDARD_OPERATORS}
    for one in weight_format.operators:
        if taken.get(one.name, one) != one:
            raise ConfigError(
                f"an operator named {one.name!r} is known already: choose another name"
            )


def format_named(name: str) -> WeightFormat:
    """The format that makes weights of a name.

    Raises:
        QuantizationError: If there is none; it names the formats that exist.
    """
    for one in _formats:
        if name in one.names:
            return one
    known = [name for one in _formats for name in one.names]
    raise QuantizationError(f"there is no format {name!r}: use {', '.join(known)}")


def held(weight: Any) -> Any:
    """What a parameter holds: some libraries' parameters are classes of their own, others wrap a tensor.

    An export replaces a parameter by a module, whose ``held`` it is.
    """
    weight = getattr(weight, "held", weight)
    cls = type(weight)
    # An ordinary parameter holds an ordinary tensor; Dynamo cannot read its data under torch.func.
    if cls is nn.Parameter or cls.__name__ in _by_class or not isinstance(weight, nn.Parameter):
        return weight
    return weight.data


def format_of(weight: object) -> WeightFormat | None:
    """The format that a weight's class belongs to; None for any other weight.

    Args:
        weight: A parameter, or what it holds.
    """
    return _by_class.get(type(held(weight)).__name__)


def quantization_of(weight: object) -> Quantization | None:
    """How a weight is stored; None if it is not quantized, or in a way that is not known here."""
    kept = held(weight)
    found = _by_class.get(type(kept).__name__)
    return None if found is None else found.describe(kept)


def row_operators() -> Mapping[str, str]:
    """Operators of all libraries that keep rows apart, with the argument whose rows they are."""
    return {name: rows for one in _formats for name, rows in one.row_operators.items()}


def operator_named(name: str) -> OnnxOperator:
    """The operator of ONNX that some format names so."""
    several = (STANDARD_OPERATORS, *(one.operators for one in _formats))
    return next(one for operators in several for one in operators if one.name == name)


def storage(
    format: str,  # noqa: A002  the name that it has for users
    *,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Storage:
    """Checks what was asked for, and fills in the defaults of the format.

    Raises:
        QuantizationError: If the format does not exist, an argument does not apply to it, or its library is
            missing.
    """
    found = format_named(format)
    _check_arguments(block_size, double)
    made = found.storage(format, block_size=block_size, double=double, compute_dtype=compute_dtype)
    found.load(format)
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


def stored(values: Tensor, how: Storage) -> nn.Parameter:
    """A frozen parameter of the format's library with these values, rounded as it rounds them.

    Args:
        values: A matrix [out, in]; it is not kept.
        how: The format.
    """
    values = values.detach().contiguous()
    return how.made_by.pack(values, how.fitted(values.shape))


def import_library(library: str, name: str, requirement: str = "lora-fx[quant]") -> Any:
    """Import a library for a format of it.

    Args:
        library: The module to import.
        name: Of the format, for the error.
        requirement: What pip installs to have the library.

    Raises:
        QuantizationError: If that fails, with a format of another library that is there.
    """
    try:
        return load_optional(library, repr(name), requirement, error=QuantizationError)
    except QuantizationError as error:
        other = next(one for one in _formats if one.library != library and one.names)
        if not is_installed(other.library):
            raise
        instead = " or ".join(repr(name) for name in other.names)
        raise QuantizationError(
            f"{error}, or use {instead}, for which {other.library} is there"
        ) from error.__cause__
