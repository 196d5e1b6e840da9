"""A model to export in place of the caller's: same weights, own modules, in eval mode.

Export switches modes, turns caches off and changes dtypes. All of it happens on a copy of the
module structure that shares the parameters, so that the argument is untouched also after an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_fx import torch_private
from lora_fx.errors import CaptureError, ExportError
from lora_fx.export.report import StoredFormat
from lora_fx.formats import dense, format_of, formats, held, quantization_of, quantized_linear
from lora_fx.ir import NoOperator, OnnxWeight, Quantization
from lora_fx.passes.capture import written_out_layer
from lora_fx.passes.graph import is_region, memory_of, share_copy
from lora_fx.passes.merge import KEPT_IN_FP32
from lora_fx.runtime import AdapterModule

__all__ = [
    "DTYPES",
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


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_DENSE_INSTEAD = (
    "export a dense model instead: lora_fx.merge(model, dtype=torch.float32) makes one of a rewritten "
    "model"
)


class StandIn(nn.Module):
    """The replacement of a quantized parameter [out, in].

    Attributes:
        where: FQN of the parameter.
        stored: How its library has stored it.
        dtype: What code that asks the parameter for its dtype is told.
    """

    def __init__(self, where: str, stored: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.where = where
        self.stored = stored
        self.dtype = dtype

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ`` in the dtype of x: [..., in] gives [..., out]."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        return torch.Size(self.stored.shape)

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return next(self.parameters()).device

    @property
    def T(self) -> _Turned:  # a tensor's name for it
        """The matrix as [in, out], for a product from the right."""
        return _Turned(self)

    def t(self) -> _Turned:
        """See ``T``."""
        return _Turned(self)

    def transpose(self, first: int, second: int) -> _Turned:
        """See ``T``."""
        if {first % 2, second % 2} != {0, 1}:
            raise self.refusal("transpose")
        return _Turned(self)

    def refusal(self, name: str) -> ExportError:
        """What to raise where it is read in another way than in a product."""
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
        raise _first(cls, (*args, *named.values())).refusal(_name(func))


class _Turned:
    """A stand-in as [in, out]."""

    def __init__(self, weight: StandIn) -> None:
        self.weight = weight

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.weight.product(x)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and isinstance(args[-1], cls):
            if func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
                return args[-1].weight.product(args[0])
            if func is torch.addmm:
                return _sum(args[-1].weight.product(args[1]), args[0])
        raise _first(cls, (*args, *(kwargs or {}).values())).weight.refusal(_name(func))


class HeldWeight(StandIn):
    """The parameter itself, as its library has it.

    Attributes:
        held: The parameter.
    """

    def __init__(self, where: str, stored: Quantization, parameter: nn.Parameter) -> None:
        super().__init__(where, stored, parameter.dtype)
        self.held = parameter

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`."""
        # Few bits in few digits would be rounded twice.
        return F.linear(x, dense(self.held, torch.float32).to(x.dtype))


def _hold_quantized(twin: nn.Module) -> None:
    """Replaces every quantized parameter by a stand-in.

    Args:
        twin: A copy of a model, over the same memory. It is changed.

    Raises:
        ExportError: A weight is one of these libraries, but in no form that is known.
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
                own = format_of(parameter)
                assert own is not None
                known[id(parameter)] = HeldWeight(where, stored, own.widened(parameter))
            _release(module)
            del module._parameters[name]
            module.add_module(name, known[id(parameter)])


def _release(module: nn.Module) -> None:
    """Makes a plain layer of a library's own, and drops what it remembers of its weight."""
    own = written_out_layer(module, type(module)) is not None
    for known in formats():
        known.layers.release(module)
    if own and not is_region(module):
        object.__setattr__(module, "__class__", nn.Linear)


def _refuse_foreign(where: str, parameter: nn.Parameter) -> None:
    kind = type(parameter)
    if any(known.owns(kind) for known in formats()):
        raise ExportError(
            f"'{where}' is a {kind.__name__} in a form that has no counterpart in a file (is it quantized "
            f"already? does it quantize activations?); {_DENSE_INSTEAD}"
        )


def _sum(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)


def _first(cls: type, values: Sequence[Any]) -> Any:
    """The first of its instances among values, or in a list among them."""
    flat = [
        one for value in values for one in (value if isinstance(value, list | tuple) else [value])
    ]
    return next(one for one in flat if isinstance(one, cls))


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


@torch.no_grad()
def _onnx_weight_of(weight: HeldWeight) -> OnnxWeight:
    """Asks the format of a weight for the form that an operator reads.

    Raises:
        ExportError: There is none that has its values, or its scales are not finite.
    """
    known = format_of(weight)
    assert known is not None
    found = known.onnx_weight(held(weight), weight.stored)
    if isinstance(found, NoOperator):
        instead = f"; {_DENSE_INSTEAD}" if found.remedy is None else f". {found.remedy}"
        raise ExportError(f"'{weight.where}' {found.reason}{instead}")
    if not bool(found.scales.isfinite().all()):
        raise ExportError(
            f"'{weight.where}' has scales that are not finite: it was quantized from a broken model"
        )
    return found


class PackedWeight(StandIn):
    """A quantized weight as ``weight.codes``, ``weight.scales`` and, where there are some, ``weight.zeros``.

    Args:
        weight: What it is made of.
        dtype: Of the model. Scales are in it where they lose nothing but digits, else in fp32.
        keep: Takes each tensor that is created, see ``Scratch.keep``.

    Attributes:
        operator: Of ONNX, which reads it.
        block: Values that share a scale there.
    """

    def __init__(
        self, weight: HeldWeight, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(weight.where, weight.stored, weight.dtype)
        found = _onnx_weight_of(weight)
        self.operator, self.block = found.operator, found.block
        scales = found.scales
        # Values that an operator makes are rounded after it: its scales may have all digits.
        if not self.operator.dequantizes and _in_range(scales, dtype):
            scales = scales.to(dtype)
        # Two codes a byte are new where the library has one; others lie where they lay.
        codes = keep(found.codes) if found.fresh else found.codes
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(keep(scales), requires_grad=False)
        zeros = None if found.zeros is None else nn.Parameter(found.zeros, requires_grad=False)
        self.register_parameter("zeros", zeros)

    def product(self, x: Tensor) -> Tensor:
        """See :class:`StandIn`: to be traced, not run."""
        product: Tensor = torch.ops.lora_fx.quantized_product(
            x if self.operator.dequantizes else x.to(self.scales.dtype),
            self.codes,
            self.scales,
            self.zeros,
            self.operator.name,
            *self.stored.shape,
            self.block,
            self.stored.scheme,
        )
        return product.to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return sum(parameter.nbytes for parameter in self.parameters())


def pack_quantized(twin: nn.Module, dtype: torch.dtype, keep: Callable[[Tensor], Tensor]) -> None:
    """Replaces quantized weights by arrays.

    Args:
        twin: A copy that is exported. It is changed.
        dtype: What most of its weights are in.
        keep: Takes each tensor that is created, see ``Scratch.keep``.

    Raises:
        ExportError: No operator has the values of a weight.
    """
    known: dict[int, PackedWeight] = {}
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            if not isinstance(child, HeldWeight):
                continue
            if id(child) not in known:
                known[id(child)] = PackedWeight(child, dtype, keep)
            module._modules[name] = known[id(child)]


def stored_formats(model: nn.Module, names: Container[str]) -> tuple[StoredFormat, ...]:
    """What of :func:`pack_quantized` is in a file, one entry a form.

    Args:
        model: The model that was traced: a file may have a part of it.
        names: Those of the file's weights.
    """
    found: dict[tuple[str, str, int | None], StoredFormat] = {}
    seen: set[PackedWeight] = set()
    for name, one in model.named_modules(remove_duplicate=False):
        if not isinstance(one, PackedWeight) or one in seen or f"{name}.codes" not in names:
            continue
        seen.add(one)
        by_row = one.operator.dequantizes and one.block == one.shape[1]
        key = (one.stored.scheme, one.operator.name, None if by_row else one.block)
        before = found.get(key, StoredFormat(*key, weights=0, values=0, bytes=0))
        found[key] = dataclasses.replace(
            before,
            weights=before.weights + 1,
            values=before.values + one.shape.numel(),
            bytes=before.bytes + one.nbytes,
        )
    return tuple(found.values())


def _in_range(scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales keep the leading digits of a dtype: none is too small for them, none too large."""
    limits, sizes = torch.finfo(dtype), scales.abs()
    normal = (sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))
    return bool(normal.all())


torch.library.define(
    "lora_fx::quantized_product",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, str operator, int rows, "
    "int columns, int block, str scheme) -> Tensor",
)


@torch.library.register_fake("lora_fx::quantized_product")  # type: ignore[untyped-decorator]
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
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


class Casts:
    """Casts parameters; those over the same memory become one parameter.

    So tied weights stay tied, and copies of one model that share its weights share the cast ones, too.

    Args:
        keep: Takes each tensor that is made, see ``Scratch.keep``.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self.keep = keep
        # The source is held so that no other tensor comes to lie at its address.
        self._made: dict[Hashable, tuple[Tensor, nn.Parameter]] = {}

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        """A frozen parameter of ``dtype`` with the values of ``parameter``."""
        if parameter.dtype == dtype:
            return parameter
        key = (memory_of(parameter), parameter.dtype, dtype)
        if key not in self._made:
            cast = nn.Parameter(self.keep(parameter.detach().to(dtype)), requires_grad=False)
            self._made[key] = parameter, cast
        return self._made[key][1]


def exportable_twin(
    model: nn.Module, dtype: str | None, casts: Casts, *, to_rewrite: bool = False
) -> nn.Module:
    """Copy the modules of ``model``, share its parameters, and make the copy fit for export.

    Args:
        model: Any module.
        dtype: One of ``DTYPES`` to cast to (only then are parameters copied), None to keep.
        casts: Makes the parameters that are cast.
        to_rewrite: Whether quantized weights stay what their libraries make, which a rewrite knows.

    Returns:
        The copy, in eval mode, without key-value caches, mixtures of experts as grouped
        products.

    Raises:
        ExportError: The weights are on the meta device or on several, or a module holds
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
    if dtype is not None:
        cast_model(twin, DTYPES[dtype], casts, kept=KEPT_IN_FP32)
    for module in twin.modules():
        config = vars(module).get("config")
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
        if getattr(config, "_experts_implementation", None) is not None:
            # The others loop over what the input chose, or copy a matrix for each row.
            config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    return twin


def dtype_name(model: nn.Module) -> str:
    """What most weights are in: a key of ``DTYPES``, or torch's name ("int8").

    Adapters do not count, nor do weights whose values are made when they are needed: these follow the others.
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
    """The model inside what ``torch.compile`` and DDP wrap around it."""
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
    """Make constants of weights that are computed from others (``torch.nn.utils.parametrize``)."""
    for module in twin.modules():
        if not parametrize.is_parametrized(module):
            continue
        # Not remove_parametrizations: it writes into the originals and edits the class, and both are the
        # caller's. Graphs of ours call what computes the weight, as the class does.
        computed: Any = module.parametrizations
        for name in list(computed):
            with torch.no_grad():
                computed[name] = _Computed(getattr(module, name).detach().clone())


class _Computed(nn.Module):
    """A constant weight, instead of the parametrization that computes it."""

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
    """Casts parameters and buffers in floating point; quantized weights stay as they are.

    Args:
        model: A copy. It is changed.
        dtype: What they become.
        casts: Makes the parameters.
        of: What is cast.
        kept: Names of buffers that become fp32 all the same.
    """
    for module in model.modules():
        if not isinstance(module, StandIn):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in of:
                    module._parameters[name] = casts(parameter, dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in of:
                module._buffers[name] = buffer.to(torch.float32 if name in kept else dtype)
