"""The copy of a model that is exported: same weights, its own modules, in eval mode.

Export switches modes, turns caches off and changes dtypes. All of this happens on a copy of the
module structure that shares the parameters, so the caller's model stays unchanged even after an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import (
    Collection,
    Container,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ExportError
from lora_fx.export.report import StoredFormat
from lora_fx.formats import (
    StackedTensor,
    dense,
    format_of,
    formats,
    grouped_product,
    held,
    is_grouped_product,
    quantization_of,
    quantized_linear,
)
from lora_fx.ir import NoOperator, OnnxWeight, Quantization
from lora_fx.passes.capture import experts_implementation, written_out_layer
from lora_fx.passes.graph import is_region, memory_of, share_copy
from lora_fx.passes.merge import KEPT_IN_FP32, Keep
from lora_fx.runtime import experts
from lora_fx.runtime.modules import AdapterModule

__all__ = [
    "DTYPES",
    "EXPERTS",
    "Casts",
    "HeldWeight",
    "PackedWeight",
    "StandIn",
    "cast_model",
    "dtype_name",
    "exportable_twin",
    "pack_quantized",
    "stored_formats",
    "unwrapped",
]


EXPERTS = "QMoE"
"""The operator of ONNX Runtime that reads the stacks of a mixture of experts."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_DENSE_INSTEAD = (
    "export a dense model instead: lora_fx.merge(model, dtype=torch.float32) makes one of a rewritten "
    "model"
)


class StandIn(nn.Module):
    """Module in place of a quantized parameter, which supports only products with the weight.

    The parameter is a matrix [out, in] or a stack of such matrices.

    Attributes:
        where: FQN of the parameter.
        stored: The format in which its library stores it.
        dtype: The dtype that code sees when it reads the parameter's dtype.
        turned: True for a stack that code sees as [E, in, out].
    """

    def __init__(self, where: str, stored: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.where = where
        self.stored = stored
        self.dtype = dtype
        self.turned = False

    def product(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ`` in the dtype of x: [..., in] to [..., out]."""
        raise NotImplementedError

    def grouped_product(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return ``x[i] W[e(i)]ᵀ`` for a stack; see :func:`lora_fx.formats.grouped_product`."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, [out, in], or of the stack, [E, out, in]."""
        stacked = self.stored.stacked
        return torch.Size((*(() if stacked is None else (stacked,)), *self.stored.shape))

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return next(self.parameters()).device

    @property
    def T(self) -> _Turned:  # named as on a tensor
        """Transpose of the matrix, [in, out], for a product from the right."""
        return _Turned(self)

    def t(self) -> _Turned:
        """Return :attr:`T`, as on a tensor."""
        return _Turned(self)

    def transpose(self, first: int, second: int) -> _Turned:
        """Return :attr:`T`, as on a tensor. The axes must be the last two."""
        count = len(self.shape)
        if {first % count, second % count} != {count - 2, count - 1}:
            raise self.refusal("transpose")
        return _Turned(self)

    def refusal(self, name: str) -> ExportError:
        """Return the error for a use of the weight other than a product.

        Args:
            name: Name of the function that reads the weight.
        """
        return ExportError(
            f"'{self.where}' is stored as {self.stored}, and {name} reads it: products x Wᵀ with quantized "
            f"weights can be exported, nothing else; {_DENSE_INSTEAD}"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(zip(("x", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        x: Any = named.get("x", named.get("input"))
        weight = named.get("weight")
        if func in (F.linear, quantized_linear) and isinstance(weight, cls):
            return _sum(weight.product(x), named.get("bias"))
        if _is_grouped(func) and isinstance(weight, cls) and weight.turned:
            return weight.grouped_product(x, _ends(args, named))
        raise _first(cls, (*args, *named.values())).refusal(_name(func))


class _Turned:
    """Transpose of a :class:`StandIn`, [in, out], for products such as ``x @ weight.T``."""

    def __init__(self, weight: StandIn) -> None:
        self.weight = weight

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.weight.dtype

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.weight.product(x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and isinstance(args[-1], cls):
            if func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
                return args[-1].weight.product(args[0])
            if func is torch.addmm:
                return _sum(args[-1].weight.product(args[1]), args[0])
        if _is_grouped(func) and isinstance(args[1], cls) and not args[1].weight.turned:
            return args[1].weight.grouped_product(args[0], _ends(args, kwargs or {}))
        raise _first(cls, (*args, *(kwargs or {}).values())).weight.refusal(_name(func))


class HeldWeight(StandIn):
    """Stand-in that keeps the parameter as its library stores it.

    Attributes:
        held: The parameter.
    """

    def __init__(self, where: str, stored: Quantization, parameter: nn.Parameter) -> None:
        super().__init__(where, stored, parameter.dtype)
        self.held = parameter
        tensor: Any = held(parameter)
        self.turned = isinstance(tensor, StackedTensor) and tensor.options.turned

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`."""
        # In fp32, because dequantizing in the dtype of x could round twice.
        return F.linear(x, dense(self.held, torch.float32).to(x.dtype))

    def grouped_product(self, x: Tensor, ends: Tensor) -> Tensor:
        """See :class:`StandIn`."""
        stack: Any = self.held.detach()
        return grouped_product(x, stack if self.turned else stack.mT, ends)


def _hold_quantized(twin: nn.Module) -> None:
    """Replace every quantized parameter by a :class:`HeldWeight`.

    Args:
        twin: A copy of a model that shares its memory. It is changed.

    Raises:
        ExportError: A weight belongs to a quantization library, and lora_fx does not know its layout.
    """
    known: dict[int, HeldWeight] = {}
    for prefix, module in list(twin.named_modules()):
        if isinstance(module, StandIn):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            where = f"{prefix}.{name}" if prefix else name
            stored = quantization_of(parameter)
            if stored is None:
                _refuse_foreign(where, parameter)
                continue
            if id(parameter) not in known:
                weight_format = format_of(parameter)
                assert weight_format is not None
                known[id(parameter)] = HeldWeight(where, stored, weight_format.widened(parameter))
            _release(module)
            del module._parameters[name]
            module.add_module(name, known[id(parameter)])


def _release(module: nn.Module) -> None:
    """Turn a layer of a quantization library into ``nn.Linear``, and drop the library's state in it."""
    is_quantized_layer = written_out_layer(module, type(module)) is not None
    for weight_format in formats():
        weight_format.layers.release(module)
    if is_quantized_layer and not is_region(module):
        object.__setattr__(module, "__class__", nn.Linear)


def _refuse_foreign(where: str, parameter: nn.Parameter) -> None:
    kind = type(parameter)
    if any(weight_format.owns(kind) for weight_format in formats()):
        raise ExportError(
            f"'{where}' is a {kind.__name__} in a form that has no counterpart in a file (is it quantized "
            f"already? does it quantize activations?); {_DENSE_INSTEAD}"
        )


def _is_grouped(func: Any) -> bool:
    return func is experts.grouped_mm or is_grouped_product(func)


def _ends(args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """Return the argument of a grouped product that has the end of each group of rows."""
    ends: Tensor = args[2] if len(args) > 2 else named["offs"]
    return ends


def _sum(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)


def _first(cls: type, values: Sequence[Any]) -> Any:
    """Return the first instance of a class among values, or in lists among them."""
    flat = [
        item for value in values for item in (value if isinstance(value, list | tuple) else [value])
    ]
    return next(item for item in flat if isinstance(item, cls))


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


@torch.no_grad()
def _onnx_weight_of(weight: HeldWeight) -> OnnxWeight:
    """Convert a weight to the arrays that an ONNX operator reads.

    Raises:
        ExportError: No operator can represent its values, or its scales are not finite.
    """
    weight_format = format_of(weight)
    assert weight_format is not None
    onnx_weight = weight_format.onnx_weight(held(weight), weight.stored)
    if isinstance(onnx_weight, NoOperator):
        instead = f"; {_DENSE_INSTEAD}" if onnx_weight.remedy is None else f". {onnx_weight.remedy}"
        raise ExportError(f"'{weight.where}' {onnx_weight.reason}{instead}")
    if not bool(onnx_weight.scales.isfinite().all()):
        raise ExportError(
            f"'{weight.where}' has scales that are not finite: it was quantized from a broken model"
        )
    return onnx_weight


class PackedWeight(StandIn):
    """Stand-in that keeps a weight as an ONNX operator reads it: codes, scales and, for some formats, zeros.

    Args:
        weight: The quantized weight.
        dtype: Dtype of the model. Scales are cast to it if they stay in its range, otherwise fp32.
        keep: Called with each new tensor, see ``Scratch.keep``.

    Attributes:
        operator: The ONNX operator that reads the weight.
        block: Number of values that share a scale in the operator.
        order: Indices that reorder the features of the input for the operator; None to keep their order.
    """

    order: nn.Parameter | None

    def __init__(self, weight: HeldWeight, dtype: torch.dtype, keep: Keep) -> None:
        super().__init__(weight.where, weight.stored, weight.dtype)
        onnx_weight = _onnx_weight_of(weight)
        self.turned = weight.turned
        self.operator, self.block = onnx_weight.operator, onnx_weight.block
        scales = onnx_weight.scales
        # The values of a dequantizing operator are rounded afterwards, so its scales may stay in fp32.
        if not self.operator.dequantizes and _in_range(scales, dtype):
            scales = scales.to(dtype)
        # Codes repacked to two a byte are new memory. Other codes share the memory of the weight.
        codes = keep(onnx_weight.codes) if onnx_weight.fresh else onnx_weight.codes
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(keep(scales), requires_grad=False)
        zeros = onnx_weight.zeros
        if zeros is not None and zeros.is_floating_point():
            zeros = keep(zeros.to(scales.dtype))
        zeros = None if zeros is None else nn.Parameter(zeros, requires_grad=False)
        self.register_parameter("zeros", zeros)
        order = onnx_weight.order
        order = None if order is None else nn.Parameter(keep(order), requires_grad=False)
        self.register_parameter("order", order)

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`. It can be traced, but not run."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        product: Tensor = torch.ops.lora_fx.quantized_product(*self._arguments(x))
        return product.to(x.dtype)

    def grouped_product(self, x: Tensor, ends: Tensor) -> Tensor:
        """See :class:`StandIn`. It can be traced, but not run."""
        operator = torch.ops.lora_fx.grouped_quantized_product
        product: Tensor = operator(*self._arguments(x), ends)
        return product.to(x.dtype)

    def _arguments(self, x: Tensor) -> tuple[Any, ...]:
        return (
            x if self.operator.dequantizes else x.to(self.scales.dtype),
            self.codes,
            self.scales,
            self.zeros,
            self.operator.name,
            *self.stored.shape,
            self.block,
            self.stored.scheme,
        )

    @property
    def nbytes(self) -> int:
        """Size in a file, in bytes."""
        return sum(parameter.nbytes for parameter in self.parameters())


def pack_quantized(twin: nn.Module, dtype: torch.dtype, keep: Keep) -> None:
    """Replace quantized weights by the arrays of their ONNX operators.

    Args:
        twin: The copy that is exported. It is changed.
        dtype: Dtype of most of its weights.
        keep: Called with each new tensor, see ``Scratch.keep``.

    Raises:
        ExportError: No operator can represent the values of a weight.
    """
    known: dict[int, PackedWeight] = {}
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            if not isinstance(child, HeldWeight):
                continue
            if id(child) not in known:
                known[id(child)] = PackedWeight(child, dtype, keep)
            module._modules[name] = known[id(child)]


def stored_formats(
    model: nn.Module, names: Container[str], fused: Container[str]
) -> tuple[StoredFormat, ...]:
    """Return an entry for each quantized format in a file.

    Args:
        model: The traced model after :func:`pack_quantized`. A file may have only a part of it.
        names: Names of the weights in the graph before the fusions.
        fused: Names of the weights in the file.
    """
    entries: dict[tuple[str, str, int | None], StoredFormat] = {}
    seen: set[PackedWeight] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PackedWeight) or module in seen:
            continue
        # Each matrix of a stack has arrays of its own, unless one operator reads the stack.
        codes, stacked = f"{name}.codes", module.stored.stacked is not None
        if (f"{codes}.0" if stacked else codes) not in names:
            continue
        operator = EXPERTS if stacked and codes in fused else module.operator.name
        seen.add(module)
        by_row = module.operator.dequantizes and module.block == module.shape[-1]
        key = (module.stored.scheme, operator, None if by_row else module.block)
        before = entries.get(key, StoredFormat(*key, weights=0, values=0, bytes=0))
        entries[key] = dataclasses.replace(
            before,
            weights=before.weights + (module.stored.stacked or 1),
            values=before.values + module.shape.numel(),
            bytes=before.bytes + module.nbytes,
        )
    return tuple(entries.values())


def _in_range(scales: Tensor, dtype: torch.dtype) -> bool:
    """Return True if all scales are zero or normal numbers in a dtype: none too small, none too large."""
    limits, sizes = torch.finfo(dtype), scales.abs()
    normal = (sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))
    return bool(normal.all())


_QUANTIZED = (
    "Tensor x, Tensor codes, Tensor scales, Tensor? zeros, str operator, int rows, int columns, int block, "
    "str scheme"
)
torch.library.define("lora_fx::quantized_product", f"({_QUANTIZED}) -> Tensor")
torch.library.define("lora_fx::grouped_quantized_product", f"({_QUANTIZED}, Tensor ends) -> Tensor")


@torch.library.register_fake("lora_fx::quantized_product")  # type: ignore[untyped-decorator]
@torch.library.register_fake("lora_fx::grouped_quantized_product")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    operator: str,
    rows: int,
    columns: int,
    block: int,
    scheme: str,
    ends: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


class Casts:
    """Cache of cast parameters. Parameters over the same memory become one parameter.

    So tied weights stay tied. Copies of a model that share its weights share the cast weights too.

    Args:
        keep: Called with each new tensor, see ``Scratch.keep``.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        # A reference to the source prevents another tensor from being allocated at its address.
        self._made: dict[Hashable, tuple[Tensor, nn.Parameter]] = {}

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """Return a frozen parameter of ``dtype`` with the values of ``parameter``."""
        if parameter.dtype == dtype:
            return parameter
        key = (memory_of(parameter), parameter.dtype, dtype)
        if key not in self._made:

            def convert() -> Tensor:
                return parameter.detach().to(dtype)

            cast = nn.Parameter(self.keep(convert(), convert), requires_grad=False)
            self._made[key] = parameter, cast
        return self._made[key][1]


def exportable_twin(
    model: nn.Module, dtype: str | None, casts: Casts, *, to_rewrite: bool = False
) -> nn.Module:
    """Copy the modules of ``model``, share its parameters, and prepare the copy for export.

    Args:
        model: Any module.
        dtype: One of ``DTYPES`` to cast to (only then are parameters copied), None to keep.
        casts: Cache of the cast parameters.
        to_rewrite: True keeps quantized weights as their libraries store them, as a rewrite expects.

    Returns:
        The copy, in eval mode, without key-value caches, and with experts as grouped products.

    Raises:
        ExportError: The weights are on the meta device or on several devices, or a module holds
            something that cannot be copied.
    """
    _check_devices(model)
    try:
        twin = share_copy(model)
    except CaptureError as error:
        raise ExportError(str(error)) from error
    twin.eval()
    _compute_parametrized(twin)
    if not to_rewrite:
        _hold_quantized(twin)
        _refuse_other_implementations(twin)
    if dtype is not None:
        cast_model(twin, DTYPES[dtype], casts, kept=KEPT_IN_FP32)
    for module in twin.modules():
        config = vars(module).get("config")
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
        if getattr(config, "_experts_implementation", None) is not None:
            # Other implementations loop over the chosen experts, or copy a matrix for each row.
            config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    return twin


def _refuse_other_implementations(twin: nn.Module) -> None:
    """Raise if a rewritten model has quantized experts but no grouped products, the only form in a file."""
    for module in twin.modules():
        chosen = experts_implementation(module)
        stacks = [child for child in module.children() if isinstance(child, StandIn)]
        if chosen not in (None, "grouped_mm") and stacks and is_region(module):
            raise ExportError(
                f"'{stacks[0].where}' is stored as {stacks[0].stored}, and the model was rewritten with the "
                f"implementation {chosen!r} of experts: call model.set_experts_implementation('grouped_mm') "
                "before lora_fx.rewrite"
            )


def dtype_name(model: nn.Module) -> str:
    """Return the dtype of most weights: a key of ``DTYPES``, or torch's name ("int8").

    Adapters and quantized weights do not count. The values of quantized weights follow the other dtypes.
    """
    counts: dict[torch.dtype, int] = {}
    for parameter in _plain_parameters(model):
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(most, str(most).removeprefix("torch."))


def _plain_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, AdapterModule):
            continue
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or quantization_of(parameter) is not None:
                continue
            seen.add(id(parameter))
            yield parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of ``torch.compile`` and DDP."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch_private.compiled_module_class()):
            model = torch_private.original_module(model)
        else:
            return model


def _check_devices(model: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    for device, name in devices.items():
        if device.type == "meta":
            raise ExportError(
                f"'{name}' is on the meta device and has no values: load the weights first"
            )
    if len(devices) > 1:
        where = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
        raise ExportError(f"the model is on several devices ({where}): move it to one first")


def _compute_parametrized(twin: nn.Module) -> None:
    """Replace weights that ``torch.nn.utils.parametrize`` computes by constants with the same values."""
    for module in twin.modules():
        if not parametrize.is_parametrized(module):
            continue
        # Not remove_parametrizations, because it writes into the originals and edits the class, and both
        # belong to the caller. Our graphs call the module that computes the weight, as the class does.
        computed: Any = module.parametrizations
        for name in list(computed):
            with torch.no_grad():
                computed[name] = _Computed(getattr(module, name).detach().clone())


class _Computed(nn.Module):
    """A constant weight in place of the parametrization that computes it."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.value


def cast_model(
    model: nn.Module,
    dtype: torch.dtype,
    casts: Casts,
    *,
    of: Collection[torch.dtype] = (*DTYPES.values(), torch.float64),
    kept: Container[str] = (),
) -> None:
    """Cast floating-point parameters and buffers. Quantized weights stay unchanged.

    Args:
        model: A copy. It is changed.
        dtype: The new dtype.
        casts: Cache of the cast parameters.
        of: Dtypes that are cast.
        kept: Names of buffers that are cast to fp32 instead.
    """
    for module in model.modules():
        if not isinstance(module, StandIn):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in of:
                    module._parameters[name] = casts(parameter, dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in of:
                module._buffers[name] = buffer.to(torch.float32 if name in kept else dtype)
