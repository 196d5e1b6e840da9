"""The protocol of a weight format, the registry of formats, and the storage options of a weight.

A format is a library's way to store a quantized matrix: a parameter of a special class, which only the
library can read. All other code calls the methods of the format, which :func:`format_of` looks up by the name
of that class. If a library has its own layers, :class:`LibraryLayers` has the methods to copy, trace, merge
and export a model with them.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import ConfigError, QuantizationError, some
from lora_fx.extras import is_installed, load_optional
from lora_fx.formats.grids import Grid
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
    "dense_layers",
    "format_named",
    "format_of",
    "format_of_class",
    "formats",
    "held",
    "import_library",
    "is_loadable",
    "multiply_values",
    "operator_named",
    "pack_integers",
    "packed_sizes",
    "quantization_of",
    "register_format",
    "row_operators",
    "storage",
    "stored",
]

_log = logging.getLogger("lora_fx")

# --- operators of ONNX ----------------------------------------------------------------------------
# ONNX operators that read weights of at most 8 bits from any library, and functions that pack codes for them.
#
# ``MatMulNBits`` is ONNX Runtime's own operator. A dequantized weight goes into a Gemm and not into a MatMul,
# because ONNX Runtime fuses ``DequantizeLinear → MatMul`` into a product that rounds its input to 8 bits.
# That is level 4 of ``session.qdq_matmulnbits_accuracy_level``, the default, and causes errors of 6e-3.


CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_OPERATOR_BLOCKS = (128, 64, 32, 16)
"""Block sizes for which every provider has a kernel."""


def packed_sizes(product: OnnxProduct) -> dict[str, int]:
    """Return the attributes N, K and block_size of an ONNX node that multiplies with a packed weight."""
    return {"N": product.rows, "K": product.columns, "block_size": product.block}


def _n_bits(build: OnnxBuilder, product: OnnxProduct) -> Any:
    # Level 1: the product is computed in fp32, its input is not rounded to 8 bits.
    attributes = {**packed_sizes(product), "bits": 4, "accuracy_level": 1}
    inputs = [product.x, *product.arrays]
    return build.product("MatMulNBits", inputs, attributes, domain=CONTRIB)


def _dequantize(build: OnnxBuilder, product: OnnxProduct) -> Any:
    weight = build.op("DequantizeLinear", product.arrays, {"axis": 0})
    if product.block != product.columns:
        weight = build.op("Reshape", [weight, build.ints([product.rows, product.columns])])
    return multiply_values(build, product, weight)


def multiply_values(build: OnnxBuilder, product: OnnxProduct, weight: Any) -> Any:
    """Make the nodes that multiply the input by a dequantized weight, ``x Wᵀ``.

    Args:
        build: The builder of the nodes.
        product: The product.
        weight: The value W, [out, in], in the dtype of the scales.

    Returns:
        [..., out], in the dtype of x.
    """
    x, rows, columns = product.x, product.rows, product.columns
    if not build.same_dtype(x, product.arrays[1]):
        weight = build.op("CastLike", [weight, x])
    if build.rank(x) == 2:
        return build.product("Gemm", [x, weight], {"transB": 1})
    flat = build.op("Reshape", [x, build.ints([-1, columns])], like=x)
    product_node = build.product("Gemm", [flat, weight], {"transB": 1}, like=x)
    outer = build.op("Shape", [x], {"start": 0, "end": -1})
    shape = build.op("Concat", [outer, build.ints([rows])], {"axis": 0})
    return build.op("Reshape", [product_node, shape])


MATMUL_N_BITS = OnnxOperator("MatMulNBits", _n_bits)
DEQUANTIZE_LINEAR = OnnxOperator("DequantizeLinear", _dequantize, dequantizes=True)
STANDARD_OPERATORS = (MATMUL_N_BITS, DEQUANTIZE_LINEAR)
"""Operators that any format may name."""


def pack_integers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, block: int, bits: int
) -> OnnxWeight | NoOperator:
    """Pack the codes, scales and zero points of a matrix for an operator of ONNX Runtime.

    The values are ``(code - zero) · scale``, with a scale for each block of a row.

    Args:
        codes: Integers [out, in]: uint8 from 0 to ``2**bits - 1``, or int8 from ``-2**(bits - 1)``.
        scales: [out, blocks of a row]. If there are fewer rows of scales than of codes, each row of scales
            applies to several rows of codes.
        zeros: The zero points, in the shape of the scales; None if the codes have no zero points.
        block: Values of a row that share a scale.
        bits: Bits of a code, at most 8. Codes of 4 bits or less are stored in 4, others in 8.

    Returns:
        Arrays for :data:`MATMUL_N_BITS` if the codes are stored in 4 bits and the block is a multiple of 16
        or a whole row. Otherwise arrays for :data:`DEQUANTIZE_LINEAR`. The latter is refused if a zero point
        is no integer in the range of the codes, or if blocks do not divide the rows.
    """
    rows, columns = codes.shape
    bits = 4 if bits <= 4 else 8
    scales = _spread(scales, rows).float()
    zeros = None if zeros is None else _spread(zeros, rows).float()
    middle = 1 << (bits - 1)
    if codes.dtype == torch.uint8:
        codes = (codes.short() - middle).to(torch.int8)
        zeros = (torch.zeros_like(scales) if zeros is None else zeros) - middle
    whole = zeros is None or bool((zeros == zeros.round().clamp(-middle, middle - 1)).all())
    size = next((size for size in _OPERATOR_BLOCKS if block % size == 0), None)
    if bits == 4 and size is None and block == columns:
        size = _OPERATOR_BLOCKS[-1]  # one scale a row: the last block need not be full
    if bits == 4 and size is not None:
        return _blocks_of_four_bits(codes, scales, zeros, size, whole=whole)
    if not whole:
        return NoOperator(
            f"has zero points that are no integers of {bits} bits, and DequantizeLinear takes no others"
        )
    if columns % block:
        return NoOperator(
            f"has blocks of {block}, which do not divide its rows of {columns} values, and operators of ONNX "
            "Runtime take whole blocks"
        )
    if zeros is not None:
        zeros = zeros.to(torch.int8).flatten() if bool(zeros.any()) else None
    lines = codes.reshape(-1, block)
    return OnnxWeight(DEQUANTIZE_LINEAR, lines, scales.flatten(), zeros, block)


def _blocks_of_four_bits(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, size: int, *, whole: bool
) -> OnnxWeight:
    rows, columns = codes.shape
    blocks = -(-columns // size)
    # Codes from -8 to 7 are stored from 0 to 15; without zero points the middle is 8.
    padded = F.pad((codes + 8).to(torch.uint8), (0, blocks * size - columns), value=8)
    # A block of the library covers several blocks of the operator. The last one of a row may be padded.
    scales = scales.repeat_interleave(-(-blocks // scales.shape[1]), 1)
    if zeros is not None and bool(zeros.any()):
        zeros = zeros.repeat_interleave(-(-blocks // zeros.shape[1]), 1)
        zeros = zeros + 8
        if whole:
            zeros = _packed_pairs(F.pad(zeros.to(torch.uint8), (0, blocks % 2), value=8))
    else:
        zeros = None
    pairs = _packed_pairs(padded).view(rows, blocks, size // 2)
    return OnnxWeight(MATMUL_N_BITS, pairs, scales, zeros, size, fresh=True)


def _packed_pairs(codes: Tensor) -> Tensor:
    """Pack two codes of 4 bits into a byte, the first in the lower half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _spread(value: Tensor, rows: int) -> Tensor:
    """Repeat rows of scales or zero points, to one row for each row of codes, [rows, blocks of a row]."""
    return value.repeat_interleave(rows // value.shape[0], 0)


# --- the protocol ---------------------------------------------------------------------------------


class LibraryLayers:
    """The layers of a library. Subclass it for a library with layers; this base class is for all others.

    Attributes:
        module: The module or package that defines the classes of its layers; empty if they are PyTorch's.
        attributes: Names of the attributes that the library sets on a layer, besides its parameters.
    """

    module: str = ""
    attributes: tuple[str, ...] = ()

    def owns(self, cls: type[nn.Module]) -> bool:
        """Return True if a class is one of the library's layers."""
        return bool(self.module) and f"{cls.__module__}.".startswith(f"{self.module}.")

    def quantizers(self) -> Mapping[str, type]:
        """Return quantizers for transformers that load weights as they are stored, by ``quant_method``.

        They replace transformers' own quantizers, which dequantize on some devices; see
        :func:`lora_fx.keep_quantized`.
        """
        return {}

    def forward(self, cls: type[nn.Module]) -> Callable[..., Any] | None:
        """Return a function to trace instead of a layer's ``forward``; None to trace the layer's own.

        The function calls ``quantized_linear``.

        Args:
            cls: The class of the layer. A subclass may compute something else and keeps its own forward.
        """
        return None

    def setup(self, layer: nn.Module) -> tuple[Any, ...]:
        """Return a key of everything on which the traced graph of a layer depends.

        Layers with equal keys share a graph.
        """
        return ()

    def plain(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """Return PyTorch's class for a library's layer whose weight a merge has made dense.

        None if ``cls`` is no layer class of the library.
        """
        return None

    def become(self, layer: nn.Module, how: Storage) -> None:
        """Turn an ``nn.Linear`` whose weight was just packed into a layer of the library.

        The object stays the same, with its hooks and bias.
        """

    def objection(self, layer: nn.Module, named: str) -> str | None:
        """Return the reason why a library's layer cannot have an adapter, with a remedy.

        If the result is None, the caller uses a general message.

        Args:
            layer: A layer whose weight no format describes.
            named: The name of its class, for messages.
        """
        return None

    def owns_hook(self, hook: object) -> bool:
        """Return True if the library added this hook, and a merge to a dense weight has to remove it."""
        return False

    def adopt(self, model: nn.Module) -> None:
        """Replace the tensors that together store a weight by one parameter, in each layer of a copied model.

        This base class does nothing. :class:`lora_fx.formats.PackedLayers` implements the method, for
        libraries that store a weight in several tensors.
        """

    def share(self, layer: nn.Module, memo: dict[int, Any]) -> None:
        """Add copies of a layer's objects, which share their tensors, to the memo of ``copy.deepcopy``.

        Called for each module of a model before the model is copied.

        Args:
            layer: Any module of the model to copy. The copies of its parameters are in ``memo``.
            memo: The memo of ``copy.deepcopy``.
        """

    def settle(self, layer: nn.Module) -> None:
        """Correct the attributes of a copied or new module that still fit only the original layer.

        For example, a method may be bound to the original layer. Called for any module.
        """

    def renew(self, layer: nn.Module) -> None:
        """Update a layer's references to scales, after its weight was replaced by another of its format."""

    def scales_hook(self, layer: nn.Module) -> Callable[..., None] | None:
        """Return a forward pre-hook that restores the scales that FSDP2 has removed from a layer's weight.

        None if the weight still has its scales, or if the layer has no copy of them. Called for any module.
        """
        return None

    def release(self, layer: nn.Module) -> None:
        """Drop references to a weight's data that a module has in other attributes.

        Called for any module of an export.
        """

    def describe_model(
        self, model: nn.Module, how: Storage, sites: Sequence[Site], dtype: torch.dtype
    ) -> None:
        """Set the attributes by which other libraries recognize a quantized model.

        Args:
            model: A quantized model. Nothing else uses the model or its configuration.
            how: The format.
            sites: The operations whose weights are stored in the format.
            dtype: The dtype of the values of the first weight.
        """


BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


class WeightFormat(abc.ABC):
    """The weight format of one library: subclass it, and register an instance with ``register_format``.

    Methods receive a weight in the library's own type: either a parameter of the library's class, or the
    tensor subclass that a parameter wraps. It always holds a matrix [out, in].

    Attributes:
        library: The library's name, which is also the name of its package.
        title: The formats of the library in words, for messages; empty to leave it out of messages.
        names: The formats that :func:`lora_fx.quantize` can make; empty if they can only be read.
        classes: Names of the classes of its tensors.
        blocks: Block sizes that users can choose; empty for one scale a row. :meth:`storage` takes the first
            by default, and messages propose another if it does not divide the rows.
        shows_values: True if a weight reports the dtype and the shape of its values, as a subclass of
            ``Tensor`` does. Any code then accepts a dense weight in its place.
        any_dtype: True if its products take an input of any dtype, whatever the dtype of its values.
        kernel_packages: Packages whose stack frames count as a part of the operation that calls them, and
            not as code of a model.
        row_operators: Operators of the library that compute each row separately, each with the name of the
            argument that has the rows.
        layers: The layers of the library.
        operators: ONNX operators that only this format uses.
        required: Names of the attributes that a subclass has to set.
    """

    library: ClassVar[str]
    title: ClassVar[str] = ""
    names: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[frozenset[str]]
    blocks: ClassVar[tuple[int, ...]] = ()
    shows_values: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True
    kernel_packages: ClassVar[frozenset[str]] = frozenset()
    row_operators: ClassVar[Mapping[str, str]] = {}
    layers: ClassVar[LibraryLayers] = LibraryLayers()
    operators: ClassVar[tuple[OnnxOperator, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ("library", "classes")

    def owns(self, cls: type) -> bool:
        """Return True if a class is a tensor class of the library, even if its form is not supported."""
        return cls.__name__ in self.classes

    # --- existing weights ---

    @abc.abstractmethod
    def describe(self, weight: Any) -> Quantization | None:
        """Return how a weight is quantized; None if its form is not supported."""

    @abc.abstractmethod
    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """Dequantize a weight to [out, in], with the precision that its kernel has for inputs of ``dtype``.

        The result may have a wider dtype.
        """

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
        """Compute ``x Wᵀ + b`` by a kernel differentiable in x and b; None if no kernel takes the input.

        The arguments are those of :func:`lora_fx.formats.quantized_linear`. If the result is None, the caller
        multiplies with :meth:`values`, or calls ``F.linear`` with the weight if :meth:`multiplies` is True.
        In both cases the values are not saved for the backward pass.
        """
        return None

    def multiplies(self, weight: Any, dtype: torch.dtype) -> bool:
        """Return True if ``F.linear`` accepts the quantized weight itself with inputs of ``dtype``."""
        return False

    # --- new weights ---

    def storage(
        self,
        name: str,
        *,
        block_size: int | None,
        double: bool | None,
        compute_dtype: torch.dtype | None,
    ) -> Storage:
        """Check storage options and fill in defaults. This base class accepts one of :attr:`blocks`.

        Raises:
            QuantizationError: If an argument does not apply to the format.
        """
        options: dict[str, object] = {"double": double, "compute_dtype": compute_dtype}
        if not self.blocks:
            options["block_size"] = block_size
        for key, value in options.items():
            if value is not None:
                raise QuantizationError(f"{key}={value} means nothing for {name!r}: leave it out")
        if block_size not in (None, *self.blocks):
            sizes = ", ".join(map(str, self.blocks))
            raise QuantizationError(f"block_size={block_size}: {name!r} takes {sizes}")
        default = self.blocks[0] if self.blocks else None
        return Storage(name, block_size or default, chosen=block_size is not None)

    def load(self, name: str) -> Any:
        """Import the library for a format that was chosen by name, with :func:`import_library`."""
        return None

    def device_objection(self, how: Storage, device: torch.device) -> str | None:
        """Return why a format does not run on a device, with an alternative; None if it runs."""
        return None

    def objection(self, how: Storage, shape: Sequence[int], dtype: torch.dtype) -> str | None:
        """Return why a matrix [out, in] cannot be stored in a format, with a remedy; None if it can."""
        if dtype not in FLOATS:
            return f"its weight is {dtype}, and {self.library} takes 16 and 32 bits: model.float() first"
        block = how.block_size
        if block and shape[1] % block:
            sizes = [b for b in self.blocks if shape[1] % b == 0]
            advice = f"block_size={max(sizes)} does, or " if sizes else ""
            return (
                f"blocks of {block} do not divide its rows of {shape[1]} values: {advice}"
                "'int8', which has one scale a row"
            )
        return None

    def bytes(self, how: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes of a stored matrix [out, in] of a dtype, including its scales.

        This base class packs a matrix on the meta device, which the library has to support.

        Raises:
            QuantizationError: If the format can only be read.
        """
        parameter = self.pack(torch.empty(shape, dtype=dtype, device="meta"), how)
        return sum(tensor.nbytes for tensor in self.take_apart(parameter)[0].values())

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """Return a frozen parameter with these values, rounded as the library rounds them.

        Args:
            values: A contiguous matrix [out, in]; no reference to it is kept.
            how: The result of :meth:`storage`, with blocks that divide the rows.

        Raises:
            QuantizationError: If the format can only be read.
        """
        raise QuantizationError(f"{self.library} makes no weight in {how.format!r}")

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """Quantize new values, [out, in] in fp64, as ``weight`` is quantized. Return a frozen parameter."""
        quantization = self.describe(weight)
        assert quantization is not None
        how = Storage(
            quantization.scheme, quantization.block_size, quantization.double, chosen=True
        )
        return self.pack(values.to(quantization.dtype).contiguous(), how)

    def grid(self, weight: Any) -> Grid | None:
        """Return the values that the elements of a weight can have with its scales; None if not known.

        Rounding with error feedback chooses among these values.
        """
        return None

    def fill(self, values: Tensor, weight: Any) -> nn.Parameter:
        """Quantize new values with the scales of ``weight``, and return a frozen parameter.

        Each value has to be in the :meth:`grid` of the weight. This base class calls :meth:`requantize`,
        which is enough for formats that keep scales if the values fit.
        """
        return self.requantize(values, weight)

    # --- stacks of matrices ---

    def take_apart(self, weight: Any) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors of a weight by name, and a context with everything else that defines it.

        Weights that are stored in the same way have equal names, shapes and contexts, so that their tensors
        can be stacked.
        """
        tensor = held(weight)
        names, context = tensor.__tensor_flatten__()
        return {name: getattr(tensor, name) for name in names}, (type(tensor), context)

    def put_together(self, tensors: Mapping[str, Tensor], context: Any) -> Any:
        """Return the weight with these tensors and this context: the inverse of :meth:`take_apart`."""
        kind, remainder = context
        return kind.__tensor_unflatten__(dict(tensors), remainder, None, None)

    # --- copies, state dicts ---

    def twin(self, parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter | None:
        """Return a frozen parameter of the same class over the same memory; None if ``detach`` is enough.

        Args:
            parameter: A parameter of the format's own class.
            memo: The memo of ``copy.deepcopy``. Scales that the layer shares are copied once, by this memo.
        """
        return None

    def state_hooks(self, parameter: str, *, layer: bool) -> StateHooks | None:
        """Return the hooks that save and load scales in state dicts; None if the tensor has its scales.

        Args:
            parameter: The name of the parameter in its module.
            layer: True if the module has become a layer of the library.
        """
        return None

    # --- export ---

    def widened(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return a weight with the same codes and scales that decodes without rounding to half precision.

        An export calls this for each quantized weight.

        Args:
            parameter: A parameter of a copy, which may be changed.
        """
        return parameter

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """Return the arrays that store a weight in an ONNX file, and the operator that decodes them.

        Args:
            weight: The weight, from :meth:`widened`.
            stored: The storage of the weight, from :meth:`describe`.
        """
        return NoOperator(f"is stored as {stored}, for which its format names no operator of ONNX")


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Options for the storage of weights; :func:`storage` returns valid ones.

    Attributes:
        format: A name of a registered format.
        block_size: Values that share a scale; None for one scale a row.
        double: True if the scales are quantized, too.
        compute_dtype: The dtype in which the product is computed; None for the dtype of the input.
        chosen: True if the user chose the block size. Otherwise a smaller one may replace a size that does
            not divide the rows.
    """

    format: str
    block_size: int | None
    double: bool = False
    compute_dtype: torch.dtype | None = None
    chosen: bool = False

    def fitted(self, shape: Sequence[int]) -> Storage:
        """Return these options with a block size that divides the rows of a matrix [out, in].

        A block size that the user chose is not changed.
        """
        smallest = BLOCKS[0]
        divides = not self.block_size or not shape[1] % self.block_size
        if self.chosen or divides or shape[1] % smallest or smallest not in self.made_by.blocks:
            return self
        return dataclasses.replace(self, block_size=smallest)

    @property
    def made_by(self) -> WeightFormat:
        """The weight format that quantizes weights with these options."""
        return format_named(self.format)

    @property
    def library(self) -> str:
        """The library of the format."""
        return self.made_by.library

    def __str__(self) -> str:
        blocks = "a scale a row" if self.block_size is None else f"blocks of {self.block_size}"
        return f"{self.format} ({self.library}, {blocks}{', double' if self.double else ''})"

    def bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Return the bytes of a stored matrix [out, in] of a dtype, including its scales."""
        return self.made_by.bytes(self.fitted(shape), shape, dtype)

    def objection(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Return why these options cannot store a matrix [out, in], with a remedy; None if they can."""
        return self.made_by.objection(self.fitted(shape), shape, dtype)


_formats: tuple[WeightFormat, ...] = ()
_by_class: dict[str, WeightFormat] = {}


def formats() -> tuple[WeightFormat, ...]:
    """Return every format, those of lora_fx first."""
    return _formats


def register_format(weight_format: WeightFormat) -> None:
    """Add a format of quantized weights, for this process.

    Args:
        weight_format: An instance of a subclass of :class:`lora_fx.formats.WeightFormat`, which lists the
            methods to implement.

    Raises:
        ConfigError: If the argument is no such instance, or one of its names or classes is taken.
    """
    global _formats, _by_class  # noqa: PLW0603  later weights are looked up in them
    kind = type(weight_format).__name__
    if not isinstance(weight_format, WeightFormat):
        raise ConfigError(f"{kind} is no weight format: subclass lora_fx.formats.WeightFormat")
    missing = [key for key in weight_format.required if not hasattr(weight_format, key)]
    if missing:
        raise ConfigError(f"{kind} is not a weight format: it lacks {', '.join(missing)}")
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
    _by_class = {**_by_class, **dict.fromkeys(weight_format.classes, weight_format)}


def _check_operators(weight_format: WeightFormat) -> None:
    operators = {operator.name: operator for known in _formats for operator in known.operators}
    operators |= {operator.name: operator for operator in STANDARD_OPERATORS}
    for operator in weight_format.operators:
        if operators.get(operator.name, operator) != operator:
            raise ConfigError(
                f"an operator named {operator.name!r} is known already: choose another name"
            )


def format_named(name: str) -> WeightFormat:
    """Return the weight format for a name of a storage, such as ``nf4``.

    Raises:
        QuantizationError: If there is no such format. The message lists the names.
    """
    for weight_format in _formats:
        if name in weight_format.names:
            return weight_format
    known = [name for weight_format in _formats for name in weight_format.names]
    raise QuantizationError(f"there is no format {name!r}: use {', '.join(known)}")


def held(weight: Any) -> Any:
    """Return the quantized tensor of a weight: the tensor inside a parameter, or the parameter itself.

    A parameter whose own class belongs to a format is returned unchanged. An export replaces a parameter by a
    module, which has the tensor as its attribute ``held``.
    """
    weight = getattr(weight, "held", weight)
    cls = type(weight)
    # The data of an ordinary parameter is an ordinary tensor. Dynamo cannot read ``.data`` under torch.func.
    if cls is nn.Parameter or cls.__name__ in _by_class or not isinstance(weight, nn.Parameter):
        return weight
    return weight.data


def format_of(weight: object) -> WeightFormat | None:
    """Return the format that a weight's class belongs to; None for any other weight.

    Args:
        weight: A parameter, or its tensor.
    """
    return _by_class.get(type(held(weight)).__name__)


def format_of_class(name: str) -> WeightFormat:
    """Return the format of weights whose class has this name."""
    return _by_class[name]


def quantization_of(weight: object) -> Quantization | None:
    """Describe how a weight is quantized. Return None for a dense weight or an unsupported storage."""
    tensor = held(weight)
    weight_format = _by_class.get(type(tensor).__name__)
    return None if weight_format is None else weight_format.describe(tensor)


def row_operators() -> Mapping[str, str]:
    """Return the operators of all libraries that compute each row separately.

    The values are the names of the arguments that have the rows.
    """
    return {
        name: rows
        for weight_format in _formats
        for name, rows in weight_format.row_operators.items()
    }


def operator_named(name: str) -> OnnxOperator:
    """Return the ONNX operator of a name, from the standard operators and those of all formats."""
    groups = (STANDARD_OPERATORS, *(known.operators for known in _formats))
    return next(operator for group in groups for operator in group if operator.name == name)


def storage(
    format: str,  # noqa: A002  the name that it has for users
    *,
    block_size: int | None = None,
    double: bool | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Storage:
    """Check storage options, fill in the defaults of the format, and import its library.

    Raises:
        QuantizationError: If the format does not exist, an argument does not apply to it, or its library is
            missing.
    """
    weight_format = format_named(format)
    _check_arguments(block_size, double)
    options = weight_format.storage(
        format, block_size=block_size, double=double, compute_dtype=compute_dtype
    )
    weight_format.load(format)
    return options


def _check_arguments(block_size: object, double: object) -> None:
    # bool is a subclass of int, but True is not a number of values.
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int)):
        raise QuantizationError(
            f"block_size={block_size!r}: it is a whole number of values that share a scale, as 32 or 64"
        )
    if double is not None and not isinstance(double, bool):
        raise QuantizationError(
            f"double={double!r}: it is True or False, or None for what the format has by default"
        )


def stored(values: Tensor, how: Storage) -> nn.Parameter:
    """Quantize a matrix with the library of a format, and return a frozen parameter.

    Args:
        values: A matrix [out, in]; no reference to it is kept.
        how: The format.
    """
    values = values.detach().contiguous()
    return how.made_by.pack(values, how.fitted(values.shape))


def is_loadable(
    model: nn.Module, sites: Sequence[Site], layer: type[nn.Module], library: str
) -> bool:
    """Return True if ``from_pretrained`` can load the model: all its quantized weights are in layers.

    Otherwise, log a warning with the names of the other weights.

    Args:
        model: A quantized model of transformers.
        sites: The operations whose weights are quantized.
        layer: The class of the layers.
        library: The library of the format.
    """
    names = [site.name for site in sites if not isinstance(model.get_submodule(site.owner), layer)]
    if names:
        _log.warning(
            "from_pretrained cannot load what save_pretrained writes of this %s: %s are no layers of "
            "%s. Keep the dense model, or torch.save(model.state_dict()) for one that is "
            "quantized the same way",
            type(model).__name__,
            some(names, 3),
            library,
        )
    return not names


def dense_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose weight is not quantized."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and quantization_of(module.weight) is None
    ]


def import_library(library: str, name: str, requirement: str = "lora-fx[quant]") -> Any:
    """Import a library for one of its formats.

    Args:
        library: The module to import.
        name: The name of the format, for the error.
        requirement: The requirement with which pip installs the library.

    Raises:
        QuantizationError: If the import fails. The message names formats of another installed library.
    """
    try:
        return load_optional(library, repr(name), requirement, error=QuantizationError)
    except QuantizationError as error:
        alternative = next(known for known in _formats if known.library != library and known.names)
        if not is_installed(alternative.library):
            raise
        names = " or ".join(repr(name) for name in alternative.names)
        raise QuantizationError(
            f"{error}, or use {names}, for which {alternative.library} is there"
        ) from error.__cause__
