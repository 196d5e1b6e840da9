"""Weights and layers of bitsandbytes: parameters of special classes, whose scales are stored outside them.

====== =========================================== =======================
format scales                                      source
====== =========================================== =======================
nf4    one for 64 values, quantized to 8 bits, too QLoRA, arXiv:2305.14314
fp4    the same                                    bitsandbytes
====== =========================================== =======================

Weights of LLM.int8() (arXiv:2208.07339) can be read, but not made: it rounds activations in evaluation.

The modules of bitsandbytes change themselves in their forward (they set attributes and repack their weight).
The forwards in this file replace them, over the same weight and kernels. The library is imported when a
weight is stored; a model that has such a weight has imported it already.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from lora_fx import torch_private
from lora_fx.errors import QuantizationError
from lora_fx.formats.base import (
    BLOCKS,
    CONTRIB,
    DEQUANTIZE_LINEAR,
    FLOATS,
    LibraryLayers,
    Storage,
    WeightFormat,
    dense_layers,
    import_library,
    is_loadable,
    packed_sizes,
    quantization_of,
)
from lora_fx.formats.grids import CodeGrid, Grid, integer_levels
from lora_fx.formats.weights import (
    REMEDY,
    LoadHook,
    SaveHook,
    StateHooks,
    dense,
    pickle_by_class,
    quantized_linear,
)
from lora_fx.ir import (
    NoOperator,
    OnnxBuilder,
    OnnxOperator,
    OnnxProduct,
    OnnxWeight,
    Quantization,
    Site,
)

__all__ = ["BitsandbytesFormat", "BitsandbytesName"]

BitsandbytesName: TypeAlias = Literal["nf4", "fp4", "int8"]
"""Names of its formats."""

fx.wrap("quantized_linear")

# The extra does not install bitsandbytes on macOS, whose wheels begin at 0.49 and need macOS 14 or newer.
_REQUIREMENT: Final = "bitsandbytes>=0.49" if sys.platform == "darwin" else "lora-fx[quant]"


def _library() -> Any:
    """Return the library, which is already imported."""
    return sys.modules["bitsandbytes"]


# --- weights -----------------------------------------------------------------------------------------


def _is_of_four_bits(weight: object) -> bool:
    return type(weight).__name__ == "Params4bit"


def _row_scales(weight: Any) -> Any:
    """Return the largest magnitude in each row of an 8-bit weight, [out]; None if it has no scales."""
    # The layer's own forward removes SCB from the weight. Copies keep it in a second attribute, row_scales.
    return weight.SCB if weight.SCB is not None else getattr(weight, "row_scales", None)


def _like(old: Any, data: Tensor, **attributes: Any) -> nn.Parameter:
    """Return a parameter over ``data`` with the class and attributes of ``old``, some of them replaced."""
    parameter: nn.Parameter = torch_private.make_subclass(type(old), data, False)
    parameter.__dict__.update({name: copy.copy(value) for name, value in old.__dict__.items()})
    parameter.__dict__.update(attributes)
    return parameter


def _requantize_four_bits(values: Tensor, old: Any) -> nn.Parameter:
    functional, state = _library().functional, old.quant_state
    data, new_state = functional.quantize_4bit(
        values.to(torch.float32).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.dtype,
    )
    new_state.dtype = state.dtype
    return _like(old, data, quant_state=new_state, bnb_quantized=True, module=None)


def _requantize_eight_bits(values: Tensor, old: Any) -> nn.Parameter:
    # The library rounds to half precision before it divides. This rounds the values only once.
    wide = values.to(torch.float32)
    largest = wide.abs().amax(1)
    steps = torch.round(wide * (127 / largest.clamp_min(torch.finfo(wide.dtype).tiny))[:, None])
    data = steps.to(torch.int8)
    return _like(old, data, CB=data, SCB=largest, row_scales=largest)


@functools.cache
def _table(kind: str, device: torch.device) -> Tensor:
    """Return the value of each code of a data type: ``nf4``, ``fp4``, or ``dynamic`` for quantized scales."""
    functional = _library().functional
    if kind == "dynamic":
        table: Tensor = functional.create_dynamic_map().to(device)
    else:
        table = functional.get_4bit_type(kind, device=device)
    return table


def _copied_state(state: Any, memo: dict[int, Any]) -> Any:
    if id(state) not in memo:
        twin = memo[id(state)] = copy.copy(state)
        if getattr(twin, "state2", None) is not None:
            twin.state2 = copy.copy(twin.state2)
    return memo[id(state)]


def _unpacked(weight: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undo the packing of a 4-bit weight for a CPU kernel. Return the weight and its state.

    The library packs the weight in a call in eval mode. The scales stay in bfloat16, as the CPU kernel stores
    them.

    Args:
        weight: The packed weight.
        state: The quantization state of the weight. It is changed.
    """
    functional = _library().functional
    unpacked: tuple[Tensor, Any] = functional._convert_weight_packed_for_cpu_inverse(weight, state)
    return unpacked


# --- state dicts -------------------------------------------------------------------------------------

_PACKED = "quant_state.bitsandbytes__"


class _Save(SaveHook):
    """A hook that adds the scales of a 4-bit weight to a state dict, under the library's own keys."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """See :class:`SaveHook`."""
        weight: Any = module._parameters.get(self.parameter)
        scales = getattr(weight, "quant_state", None)
        if scales is None or f"{prefix}{self.parameter}" not in state:
            return
        for key, value in scales.as_dict(packed=True).items():
            state[f"{prefix}{self.parameter}.{key}"] = value.detach()


class _Load(LoadHook):
    """A hook that copies the scales in a state dict into the scales of the module's weight.

    ``Linear4bit`` writes the scales of its weight next to it, and no module of PyTorch reads them back:
    ``model.load_state_dict(model.state_dict())`` fails on them.
    """

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """See :class:`LoadHook`. With ``assign=True`` a layer gets the scales of its new weight, too."""
        super().__call__(module, state, prefix, *args)
        loaded = state.get(f"{prefix}{self.parameter}")
        assigned = args[0].get("assign_to_params_buffers") and _is_of_four_bits(loaded)
        if assigned and "quant_state" in module.__dict__:
            module.__dict__["quant_state"] = loaded.quant_state  # type: ignore[union-attr]

    def load(self, weight: Any, name: str, state: dict[str, Any], errors: list[str]) -> None:
        """See :class:`LoadHook`."""
        current = getattr(weight, "quant_state", None)
        if current is None:
            return
        entries = {k: state[k] for k in list(state) if k.startswith(f"{name}.")}
        for key in entries:
            del state[key]
        if not any(_PACKED in key for key in entries):
            errors.append(
                f"{name} is stored in {current.quant_type} here and comes without its scales: {REMEDY}"
            )
            del state[name]
            return
        packed = {key.removeprefix(f"{name}."): value for key, value in entries.items()}
        scales = _library().functional.QuantState.from_dict(packed, state[name].device)
        if _storage_settings(scales) != _storage_settings(current):
            errors.append(
                f"{name} is stored as {_storage_settings(current)} here, and as "
                f"{_storage_settings(scales)} in the state dict"
            )
            return
        with torch.no_grad():
            current.absmax.copy_(scales.absmax)
            if current.state2 is not None:
                current.offset.copy_(scales.offset)
                current.state2.absmax.copy_(scales.state2.absmax)
        # With assign=True the module takes this object, whose class and scales it needs.
        state[name] = _like(weight, state[name], quant_state=scales)


def _storage_settings(scales: Any) -> tuple[Any, ...]:
    inner = None if scales.state2 is None else scales.state2.blocksize
    return scales.quant_type, scales.blocksize, scales.nested, tuple(scales.shape), inner


# --- layers ------------------------------------------------------------------------------------------


def _linear_4bit(self: Any, x: Tensor) -> Any:
    return quantized_linear(x, self.weight, self.bias, self.compute_dtype)


def _linear_8bit(self: Any, x: Tensor) -> Any:
    return quantized_linear(
        x, self.weight, self.bias, None, self.state.threshold, training=self.training
    )


_FORWARDS: Final[Mapping[str, Callable[..., Any]]] = {
    "Linear4bit": _linear_4bit,
    "LinearFP4": _linear_4bit,
    "LinearNF4": _linear_4bit,
    "Linear8bitLt": _linear_8bit,
}
_PLAIN: Final[Mapping[str, type[nn.Module]]] = {
    **dict.fromkeys(_FORWARDS, nn.Linear),
    "Embedding4bit": nn.Embedding,
    "EmbeddingFP4": nn.Embedding,
    "EmbeddingNF4": nn.Embedding,
    "Embedding8bit": nn.Embedding,
}


class _Layers(LibraryLayers):
    """``Linear4bit``, ``Linear8bitLt``, and the embeddings."""

    module = "bitsandbytes.nn"
    attributes = (
        "compute_dtype",
        "compute_type_is_set",
        "dtype",
        "index",
        "quant_state",
        "quant_storage",
        "state",
        "support_avx512bf16_for_cpu",
    )

    def _is_known(self, cls: type[nn.Module]) -> bool:
        # A subclass from another package may compute something else.
        modules = sys.modules.get("bitsandbytes.nn.modules")
        return getattr(modules, cls.__qualname__, None) is cls

    def forward(self, cls: type[nn.Module]) -> Callable[..., Any] | None:
        """See :class:`LibraryLayers`."""
        function = _FORWARDS.get(cls.__qualname__)
        return function if function is not None and self._is_known(cls) else None

    def setup(self, layer: nn.Module) -> tuple[Any, ...]:
        """Return the storage of the weight, and the attributes of the layer that its forward reads."""
        state, bias = getattr(layer, "state", None), layer._parameters.get("bias")
        compute = getattr(layer, "compute_dtype", None)
        weight = quantization_of(layer._parameters["weight"])
        return (weight, bias is None, compute, getattr(state, "threshold", None))

    def plain(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """See :class:`LibraryLayers`."""
        return _PLAIN.get(cls.__qualname__) if self._is_known(cls) else None

    def become(self, layer: nn.Module, how: Storage) -> None:
        """See :class:`LibraryLayers`."""
        weight: Any = layer._parameters["weight"]
        template = _library().nn.Linear4bit(
            *(1, 1, False, how.compute_dtype, how.double, how.format, weight.quant_storage),
            device="meta",
        )
        attributes = {k: v for k, v in template.__dict__.items() if k not in layer.__dict__}
        layer.__class__ = type(template)
        layer.__dict__.update(attributes, quant_state=weight.quant_state)
        self.settle(layer)

    def objection(self, layer: nn.Module, named: str) -> str | None:
        """Return the missing step if the weight of one of the library's layers is not quantized yet."""
        weight: Any = layer._parameters.get("weight")
        if not isinstance(layer, nn.Linear) or weight is None or not weight.is_floating_point():
            return None
        # Packed codes may be stored in a parameter of any dtype, also a floating-point one.
        if getattr(weight, "bnb_quantized", False):
            return None
        if getattr(weight, "has_fp16_weights", False):
            return (
                f"its weight is not quantized ({named} with has_fp16_weights=True): make the layer with "
                "has_fp16_weights=False and move it to a device, or use nn.Linear"
            )
        return (
            f"it is not quantized yet ({named}): move the model to a device first, which quantizes it "
            '(model.to("cpu"))'
        )

    def owns_hook(self, hook: object) -> bool:
        """See :class:`LibraryLayers`."""
        return str(getattr(hook, "__module__", "")).startswith("bitsandbytes.")

    def share(self, layer: nn.Module, memo: dict[int, Any]) -> None:
        """Copy the state of an 8-bit layer but not its tensors, and set the scales on the copied weight."""
        if isinstance(layer, torch.jit.ScriptModule):
            return
        weight, state = layer._parameters.get("weight"), layer.__dict__.get("state")
        if type(weight).__name__ != "Int8Params" or state is None:
            return
        memo[id(state)] = copy.copy(state)
        twin, source = memo[id(weight)], weight
        # The layer's first call moves the scales from the weight to the state.
        twin.CB = source.CB if source.CB is not None else state.CB  # type: ignore[union-attr]
        twin.SCB = source.SCB if source.SCB is not None else state.SCB  # type: ignore[union-attr]
        twin.row_scales = twin.SCB

    def settle(self, layer: nn.Module) -> None:
        """Keep a 4-bit layer from a kernel of the CPU that rounds x and the scales to bfloat16.

        The layer would pack its weight for that kernel, in place, in its first call in eval mode. The model
        would then compute something else in eval mode than in training.
        """
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    def renew(self, layer: nn.Module) -> None:
        """Update the scales in the layer's attributes, which its own forward reads."""
        weight, state = layer._parameters.get("weight"), layer.__dict__.get("state")
        if _is_of_four_bits(weight):
            layer.__dict__["quant_state"] = weight.quant_state  # type: ignore[union-attr]
        elif type(weight).__name__ == "Int8Params" and state is not None:
            state.reset_grads()

    def scales_hook(self, layer: nn.Module) -> Callable[..., None] | None:
        """See :class:`LibraryLayers`. A 4-bit layer has a second reference to the scales."""
        if type(layer.__dict__.get("quant_state")).__name__ != "QuantState":
            return None
        weight = layer._parameters.get("weight")
        if weight is None or _is_of_four_bits(weight):
            return None
        return functools.partial(_give_scales, weight.dtype)

    def release(self, layer: nn.Module) -> None:
        """See :class:`LibraryLayers`."""
        for name in ("state", "quant_state"):
            remembered = layer.__dict__.get(name)
            if type(remembered).__module__.startswith("bitsandbytes."):
                layer.__dict__[name] = _settings(remembered) if name == "state" else None

    def describe_model(
        self, model: nn.Module, how: Storage, sites: Sequence[Site], dtype: torch.dtype
    ) -> None:
        """Set the configuration of a transformers model whose quantized weights are all in layers.

        With it, ``from_pretrained`` loads the folder that ``save_pretrained`` writes. If a quantized weight
        is not in a layer, log a warning instead, because ``from_pretrained`` cannot load such a model.
        """
        model.__dict__["is_loaded_in_4bit"] = True
        library: Any = sys.modules.get("transformers")
        if library is None or not isinstance(model, library.PreTrainedModel):
            return
        if not is_loadable(model, sites, _library().nn.Linear4bit, "bitsandbytes"):
            return
        model.config.quantization_config = library.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=how.format,
            bnb_4bit_use_double_quant=how.double,
            bnb_4bit_compute_dtype=how.compute_dtype or dtype,
            llm_int8_skip_modules=dense_layers(model),
        )


def _give_scales(stored: torch.dtype, layer: Any, inputs: Any) -> None:
    """Restore the class and the scales of a 4-bit weight that FSDP2 has gathered. A forward pre-hook.

    Raises:
        QuantizationError: If FSDP2 has converted the bytes as if they were values.
    """
    weight = layer._parameters["weight"]
    if weight.dtype != stored:
        raise QuantizationError(
            f"FSDP2 has converted the packed bytes of a {type(layer).__name__} from {stored} to "
            f"{weight.dtype}: store them in uint8, or in the param_dtype of MixedPrecisionPolicy "
            "(bnb_4bit_quant_storage)"
        )
    _library().nn.modules.fix_4bit_weight_quant_state_from_module(layer)


def _settings(state: Any) -> Any:
    """Return a copy of an 8-bit layer's state without tensors, to free the data of its weight.

    The graph of the layer depends on the other attributes of the state.
    """
    result = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(result, name, None)
    return result


# --- export ------------------------------------------------------------------------------------------

_QUANT_TYPES: Final = {"fp4": 0, "nf4": 1}


def _matmul(build: OnnxBuilder, product: OnnxProduct) -> Any:
    """Make the node of ``MatMulBnb4``, ONNX Runtime's operator with the library's table of values."""
    kind = {"quant_type": _QUANT_TYPES[product.scheme], "transB": 1}
    inputs = [product.x, *product.arrays[:2]]
    return build.product("MatMulBnb4", inputs, {**packed_sizes(product), **kind}, domain=CONTRIB)


_MATMUL_BNB4: Final = OnnxOperator("MatMulBnb4", _matmul)


def _blocks_in_order(weight: Any, stored: Quantization) -> bool:
    """Return True if the kernel of this device decodes each block with its own scale.

    CPU kernels begin a new block in each row, which is wrong if the blocks do not divide the rows. An export
    then refuses the weight.
    """
    state = weight.quant_state
    if stored.shape[1] % int(state.blocksize) == 0:
        return True
    flat = copy.copy(weight)
    flat.quant_state = copy.copy(state)
    flat.quant_state.shape = torch.Size((1, stored.shape[0] * stored.shape[1]))
    return torch.equal(dense(flat).flatten(), dense(weight).flatten())


def _absmax(state: Any) -> Tensor:
    """Return the scale of each block of a 4-bit weight, its largest magnitude. Decode quantized scales."""
    absmax: Tensor = state.absmax
    if state.nested:
        absmax = _library().functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax


# --- the format --------------------------------------------------------------------------------------


class BitsandbytesFormat(WeightFormat):
    """The format of ``Params4bit`` and ``Int8Params``."""

    library = "bitsandbytes"
    title = "NF4, FP4, LLM.int8()"
    names = ("nf4", "fp4")
    classes = frozenset({"Params4bit", "Int8Params"})
    kernel_packages = frozenset({"bitsandbytes"})
    blocks = BLOCKS
    # The weights report the dtype and the shape of their bytes.
    shows_values = False
    row_operators: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("gemm_4bit", "gemv_4bit", "int8_linear_matmul", "int8_scaled_mm"), "A"
    )
    layers: ClassVar[LibraryLayers] = _Layers()
    operators = (_MATMUL_BNB4,)

    def owns(self, cls: type) -> bool:
        """See :class:`WeightFormat`."""
        return cls.__module__.startswith("bitsandbytes.")

    def describe(self, weight: Any) -> Quantization | None:
        """See :class:`WeightFormat`."""
        if _is_of_four_bits(weight):
            state = weight.quant_state
            if state is None or getattr(state, "packing_format_for_cpu", False):
                return None
            shape = (int(state.shape[0]), int(state.shape[1]))
            scheme, double, block = str(state.quant_type), bool(state.nested), int(state.blocksize)
            return Quantization(scheme, 4, "bitsandbytes", shape, state.dtype, block, double)
        if weight.dtype != torch.int8 or weight.dim() != 2 or _row_scales(weight) is None:
            return None
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        return Quantization("int8", 8, "bitsandbytes", shape, torch.float32)

    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """See :class:`WeightFormat`."""
        if not _is_of_four_bits(weight):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            scaled: Tensor = weight.data.to(wide) * (_row_scales(weight).to(wide) / 127).unsqueeze(
                1
            )
            return scaled
        # In fp32 the values are not rounded to the weight's own dtype first.
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32 if dtype == torch.float64 else dtype
        dequantized: Tensor = _library().functional.dequantize_4bit(weight.data, state)
        return dequantized

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
        """See :class:`WeightFormat`."""
        output: Tensor
        if _is_of_four_bits(weight):
            inputs = x if compute_dtype is None else x.to(compute_dtype)
            # In any other dtype its kernels return wrong numbers without an error.
            if inputs.dtype not in FLOATS:
                return None
            output = _library().matmul_4bit(inputs, weight, weight.quant_state, bias=bias)
            return output.to(x.dtype)
        state = _library().MatmulLtState()
        state.CB, state.SCB = weight.data, _row_scales(weight)
        state.threshold, state.use_pool = threshold, threshold > 0
        state.has_fp16_weights, state.is_training = False, training
        output = _library().matmul(x, weight, bias=bias, state=state)
        return output

    def storage(
        self,
        name: str,
        *,
        block_size: int | None,
        double: bool | None,
        compute_dtype: torch.dtype | None,
    ) -> Storage:
        """See :class:`WeightFormat`."""
        size = 64 if block_size is None else block_size
        if size not in BLOCKS:
            raise QuantizationError(
                f"block_size={size}: bitsandbytes takes {', '.join(map(str, BLOCKS))}"
            )
        if compute_dtype is not None and compute_dtype not in FLOATS:
            raise QuantizationError(
                f"compute_dtype={compute_dtype!r}: bitsandbytes computes in "
                f"{', '.join(map(str, FLOATS))}, as lora_fx.quantize(..., compute_dtype=torch.bfloat16)"
            )
        return Storage(name, size, double is not False, compute_dtype, block_size is not None)

    def load(self, name: str) -> Any:
        """See :class:`WeightFormat`."""
        return import_library(self.library, name, _REQUIREMENT)

    def device_objection(self, how: Storage, device: torch.device) -> str | None:
        """See :class:`WeightFormat`."""
        supported = self.load(how.format).supported_torch_devices
        if device.type in supported:
            return None
        return (
            f"{how.format!r} does not run on {device.type}: bitsandbytes has kernels for "
            f"{', '.join(sorted(supported - {'npu', 'hpu'}))}. Use 'int8' or 'int4', or device='cpu'"
        )

    # If a block continues in the next row, the CPU kernel (0.50) reads wrong scales. So objection() refuses
    # sizes that do not divide a row.

    def bytes(self, how: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """See :class:`WeightFormat`."""
        assert how.block_size is not None
        values = math.prod(shape)
        scales = math.ceil(values / how.block_size)
        # The table has 16 floats, the table of the scales 256. Each 256 scales share a scale, too.
        overhead = 4 * (math.ceil(scales / 256) + 256 + 1) + scales if how.double else 4 * scales
        return math.ceil(values / 2) + overhead + 16 * 4

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        library = self.load(how.format)
        pickle_by_class(library.nn.Params4bit)
        options = {
            "blocksize": how.block_size,
            "compress_statistics": how.double,
            "quant_type": how.format,
            "quant_storage": torch.uint8,
        }
        packed, state = library.functional.quantize_4bit(values, **options)
        parameter: nn.Parameter = library.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, **options
        )
        return parameter

    def requantize(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        make = _requantize_four_bits if _is_of_four_bits(weight) else _requantize_eight_bits
        return make(values, weight)

    def grid(self, weight: Any) -> Grid | None:
        """See :class:`WeightFormat`. None if the blocks of a 4-bit weight do not divide the rows."""
        if not _is_of_four_bits(weight):
            levels, scales = integer_levels(8)[1:], _row_scales(weight).reshape(-1, 1) / 127
            return CodeGrid.of_blocks(levels, scales, weight.shape, None)
        state = weight.quant_state
        rows, columns = state.shape
        if columns % state.blocksize:
            return None
        levels = _table(state.quant_type, weight.device)
        scales = _absmax(state).reshape(rows, -1)
        return CodeGrid.of_blocks(levels, scales, state.shape, state.blocksize)

    def fill(self, values: Tensor, weight: Any) -> nn.Parameter:
        """See :class:`WeightFormat`. Not by the library, which would compute new scales."""
        if not _is_of_four_bits(weight):
            scales = _row_scales(weight)
            codes = torch.round(values.float() / scales.reshape(-1, 1) * 127)
            codes = codes.nan_to_num().to(torch.int8)
            return _like(weight, codes, CB=codes, SCB=scales, row_scales=scales)
        state = weight.quant_state
        scales = _absmax(state).reshape(-1, 1)
        levels = values.float().reshape(len(scales), -1) / scales
        table, order = _table(state.quant_type, weight.device).sort()
        nearest = torch.bucketize(levels.nan_to_num(), (table[1:] + table[:-1]) / 2)
        codes = order[nearest].flatten().to(torch.uint8)
        pairs = (codes[::2] << 4) | codes[1::2]
        old = weight.detach().as_subclass(torch.Tensor)
        return _like(weight, pairs.view(old.dtype).reshape(old.shape))

    def take_apart(self, weight: Any) -> tuple[dict[str, Tensor], Any]:
        """See :class:`WeightFormat`."""
        state, plain = weight.quant_state, weight.detach().as_subclass(torch.Tensor)
        parts = {state.quant_type: plain, "absmax": state.absmax}
        if state.nested:
            parts |= {"offset": state.offset, "nested_absmax": state.state2.absmax}
        shape, inner = tuple(state.shape), state.state2.blocksize if state.nested else None
        return parts, (shape, state.quant_type, state.dtype, state.blocksize, inner)

    def put_together(self, tensors: Mapping[str, Tensor], context: Any) -> Any:
        """See :class:`WeightFormat`."""
        shape, kind, dtype, block, inner = context
        make, data = _library().functional.QuantState, tensors[kind]
        nested = inner and make(
            absmax=tensors["nested_absmax"],
            code=_table("dynamic", data.device),
            blocksize=inner,
            dtype=torch.float32,
        )
        state = make(
            absmax=tensors["absmax"],
            shape=torch.Size(shape),
            code=_table(kind, data.device),
            blocksize=block,
            quant_type=kind,
            dtype=dtype,
            offset=tensors.get("offset"),
            state2=nested,
        )
        return _library().nn.Params4bit(
            data,
            quant_state=state,
            blocksize=block,
            compress_statistics=inner is not None,
            quant_type=kind,
            quant_storage=data.dtype,
            bnb_quantized=True,
        )

    def twin(self, parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter | None:
        """Copy the objects that have the scales: ``.to()`` and the layer's forward change them in place."""
        pickle_by_class(type(parameter))
        plain = parameter.detach().as_subclass(torch.Tensor)
        twin: Any = torch_private.make_subclass(type(parameter), plain, False)
        twin.__dict__.update(parameter.__dict__)
        if getattr(twin, "quant_state", None) is not None:
            twin.quant_state = _copied_state(twin.quant_state, memo)
            if getattr(twin.quant_state, "packing_format_for_cpu", False):
                twin.data, _ = _unpacked(plain, twin.quant_state)
        # The copied weight would set a new state on this module, which is the layer of the original.
        if hasattr(twin, "module"):
            twin.module = None
        return twin  # type: ignore[no-any-return]

    def state_hooks(self, parameter: str, *, layer: bool) -> StateHooks | None:
        """Return both hooks, or for a layer only the hook that loads: ``Linear4bit`` saves the scales."""
        return StateHooks(_Load(parameter), None if layer else _Save(parameter))

    def widened(self, parameter: nn.Parameter) -> nn.Parameter:
        """See :class:`WeightFormat`."""
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = torch.float32  # the copy has a separate state
        return parameter

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """See :class:`WeightFormat`."""
        plain = weight.detach().as_subclass(torch.Tensor)
        if not _is_of_four_bits(weight):
            # The largest code of a row is 127.
            scales = _row_scales(weight).float().flatten() / 127
            return OnnxWeight(DEQUANTIZE_LINEAR, plain, scales, None, plain.shape[1])
        if not _blocks_in_order(weight, stored):
            return NoOperator(
                f"has rows of {stored.shape[1]} values in blocks of {stored.block_size}, whose scales "
                "bitsandbytes mixes up on this device: what PyTorch computes here is not what is stored",
                "Quantize it with a block size that divides the rows, or move the model to CUDA",
            )
        state = weight.quant_state
        scales = _absmax(state)
        codes = plain.contiguous().view(torch.uint8).flatten()
        return OnnxWeight(_MATMUL_BNB4, codes, scales.float().flatten(), None, int(state.blocksize))
