"""Weights that a library keeps as several tensors of a layer, and a tensor subclass that joins them.

Many checkpoints have codes, scales and zero points as separate parameters of each layer. In a copy of such a
model, :meth:`PackedLayers.adopt` replaces them by one parameter, ``weight``. It is a :class:`PackedTensor`,
which looks like the matrix and has the separate tensors as its parts. State dicts keep the library's own
keys.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.formats.base import FLOATS, LibraryLayers, WeightFormat, format_of
from lora_fx.formats.weights import (
    REMEDY,
    CheckStorage,
    SaveHook,
    StateHooks,
    dense,
    follow_state,
    quantized_linear,
)
from lora_fx.ir import Quantization

__all__ = ["PackedFormat", "PackedLayers", "PackedTensor", "Parts", "dtype_of_plain", "form_of"]

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of a layer that together store one weight.

    Attributes:
        tensors: The tensors, by their names in the layer.
        shape: Rows and columns of the matrix, [out, in].
        options: The remaining settings of the weight. Weights with equal options are decoded alike.
        dtype: The dtype of the layer's output. None for the dtype of most values that are not quantized; see
            :func:`dtype_of_plain`.
    """

    tensors: Mapping[str, Tensor]
    shape: Sequence[int]
    options: Any
    dtype: torch.dtype | None = None


class PackedTensor(Tensor):
    """A matrix [out, in] that is stored as several tensors. Subclass it for each format.

    It has the shape and the dtype of the values. A product is computed by ``quantized_linear``, and any other
    operation with the values of :func:`lora_fx.formats.dense`.

    Attributes:
        part_names: The names of the tensors in the layer, which are also attributes of the weight.
        options: The remaining settings of the weight.
        key: The key with which :func:`form_of` returns the class, the part names and the options. Operators
            take it as an argument.
    """

    part_names: tuple[str, ...]
    options: Any
    key: str

    def __new__(cls, parts: Parts, dtype: torch.dtype) -> PackedTensor:
        """Return a tensor without memory for the values."""
        device = next(iter(parts.tensors.values())).device
        tensor = torch_private.make_wrapper_subclass(
            cls, tuple(parts.shape), dtype=dtype, device=device
        )
        # Set attributes, because Dynamo does not find values that __getattr__ returns.
        tensor.__dict__.update(parts.tensors)
        tensor.part_names, tensor.options = tuple(parts.tensors), parts.options
        tensor.key = _registered(cls, tensor.part_names, parts.options)
        return tensor  # type: ignore[no-any-return]

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        pass

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors, by their names in the layer."""
        return {name: self.__dict__[name] for name in self.part_names}

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the parts, and a context with the shape, the dtype and the options."""
        return list(self.part_names), (tuple(self.shape), self.dtype, self.options)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> PackedTensor:
        """Return the tensor with these parts and this context: the inverse of :meth:`__tensor_flatten__`."""
        shape, dtype, options = context
        return cls(Parts(inner, shape, options), dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Reduce to the bytes of the parts: ``pickle`` cannot read tensors of FP8."""
        parts = {name: (_bytes_of(part), part.dtype) for name, part in self.parts.items()}
        known = {*self.part_names, "part_names", "options", "key"}
        state = {name: value for name, value in vars(self).items() if name not in known}
        return _unpickled, (type(self), parts, tuple(self.shape), self.options, self.dtype, state)

    def mapped(
        self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedTensor:
        """Call a function on each part, and return a packed tensor with the results and the same options."""
        tensors = {name: function(part) for name, part in self.parts.items()}
        return type(self)(Parts(tensors, self.shape, self.options), dtype or self.dtype)

    def with_parts(self, tensors: Mapping[str, Tensor]) -> nn.Parameter:
        """Return a frozen parameter with the same options and some parts replaced, by their names."""
        parts = Parts({**self.parts, **tensors}, self.shape, self.options)
        return nn.Parameter(type(self)(parts, self.dtype), requires_grad=False)

    def decoded(self) -> Tensor:
        """Dequantize the matrix.

        Under a compiler, which cannot trace the library's code, a single operator does this.
        """
        if type(self.__dict__[self.part_names[0]]) is Tensor:
            return _format(self).decode(self)
        values: Tensor = _decode_operator()(list(self.parts.values()), self.key, list(self.shape))
        return values

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute ``F.linear`` without keeping the values for the backward pass."""
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and isinstance(args[1], PackedTensor):
            return quantized_linear(*args, **kwargs)
        with torch_private.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Apply copies to the parts. Run any other operator with the dequantized values."""
        first, kwargs = args[0], dict(kwargs or {})
        if func in (_aten.detach.default, _aten.clone.default, torch_private.TO_COPY):
            dtype = kwargs.pop("dtype", None)
            kwargs.pop("memory_format", None)
            return first.mapped(lambda part: func(part, **kwargs), dtype)
        if func is _aten.copy_.default and all(isinstance(t, PackedTensor) for t in args[:2]):
            for name, part in first.parts.items():
                part.copy_(args[1].parts[name])
            return first
        if func is _aten.dequantize.self:
            return first.decoded()
        if func is _aten.copy_.default and torch.equal(args[1], dense(first, args[1].dtype)):
            return first  # DistributedDataParallel sends values that all processes already have
        if torch_private.schema_of(func).is_mutable:
            raise NotImplementedError(f"{func} would write into values, which are not stored")
        args, kwargs = torch_private.pytree.tree_map_only(PackedTensor, dense, (args, kwargs))
        return func(*args, **kwargs)


def _bytes_of(part: Tensor) -> Tensor:
    is_fp8 = part.is_floating_point() and part.element_size() == 1
    return part.view(torch.uint8) if is_fp8 else part


def _unpickled(
    cls: type[PackedTensor],
    parts: Mapping[str, tuple[Tensor, torch.dtype]],
    shape: Sequence[int],
    options: Any,
    dtype: torch.dtype,
    state: Mapping[str, Any],
) -> PackedTensor:
    tensors = {name: part.view(of) for name, (part, of) in parts.items()}
    weight = cls(Parts(tensors, shape, options), dtype)
    weight.__dict__.update(state)
    return weight


_Layout = tuple[type["PackedTensor"], tuple[str, ...], Any]
_forms: dict[str, _Layout] = {}
_keys: dict[tuple[type, tuple[str, ...], int], tuple[str, Any]] = {}


def _registered(cls: type[PackedTensor], names: tuple[str, ...], options: Any) -> str:
    """Store the class, the part names and the options of a tensor, and return a key for :func:`form_of`.

    Each tensor calls this in its constructor, because Dynamo writes the globals of traced code only after the
    graph has run.
    """
    form = (cls, names, id(options))
    if form not in _keys:
        _check_names(cls, names)
        key = f"{cls.__name__} {names} {options}"
        _keys[form] = key, options  # a reference, so that no other options get this id
        _forms[key] = cls, names, options
    return _keys[form][0]


def _check_names(cls: type[PackedTensor], names: tuple[str, ...]) -> None:
    """Raise if the name of a part is an attribute of tensors already, such as ``shape``."""
    for name in names:
        if name in PackedTensor.__annotations__ or inspect.isdatadescriptor(
            getattr(cls, name, None)
        ):
            raise ConfigError(
                f"{cls.__name__}: a part cannot be named {name!r}, because a tensor has an attribute of that "
                "name: choose another name, or return it from saved_settings if it only tells how to decode"
            )


def form_of(key: str) -> _Layout:
    """Return the class, the part names and the options that are registered under a key."""
    return _forms[key]


@functools.cache
def _decode_operator() -> Callable[..., Any]:
    """Return the operator that decodes a weight, in fp32."""

    def decode(parts: list[Tensor], key: str, shape: list[int]) -> Tensor:
        cls, names, options = form_of(key)
        tensors = dict(zip(names, parts, strict=True))
        weight = cls(Parts(tensors, shape, options), torch.float32)
        return _format(weight).decode(weight).float()

    operator = torch.library.custom_op(
        "lora_fx::decode",
        decode,
        mutates_args=(),
        schema="(Tensor[] parts, str key, int[] shape) -> Tensor",
    )
    operator.register_fake(lambda parts, key, shape: parts[0].new_empty(shape, dtype=torch.float32))
    return operator


def _format(weight: PackedTensor) -> PackedFormat:
    weight_format = format_of(weight)
    assert isinstance(weight_format, PackedFormat)
    return weight_format


class PackedFormat(WeightFormat):
    """The format of one class of packed tensors.

    Attributes:
        tensor: The class of the weights.
    """

    tensor: ClassVar[type[PackedTensor]]
    required = ("library", "tensor")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "tensor" in cls.__dict__:
            cls.classes = frozenset({cls.tensor.__name__})
            if isinstance(cls.layers, PackedLayers):
                cls.layers.tensor = cls.tensor

    def describe_as(
        self, weight: Any, scheme: str, bits: int, block_size: int | None = None
    ) -> Quantization:
        """Return the storage of a weight; see :class:`lora_fx.ir.Quantization` for the arguments."""
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        return Quantization(scheme, bits, self.library, shape, weight.dtype, block_size)

    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """See :class:`WeightFormat`."""
        values: Tensor = weight.dequantize()
        return values

    @abc.abstractmethod
    def decode(self, weight: Any) -> Tensor:
        """Dequantize a weight to [out, in], with the library's code and in the dtype of its result."""

    def saved_settings(self, weight: Any) -> Mapping[str, Tensor]:
        """Return settings that the library's layers save as tensors, by their names in a state dict.

        They follow from the options of the weight. A state dict with other settings is refused.
        """
        return {}

    def widened(self, parameter: nn.Parameter) -> nn.Parameter:
        """See :class:`WeightFormat`. Scales in half precision become fp32, so :meth:`decode` rounds less."""
        weight: Any = parameter.detach()
        wide = weight.mapped(lambda part: part.float() if part.dtype in FLOATS else part)
        return nn.Parameter(wide, requires_grad=False)

    def state_hooks(self, parameter: str, *, layer: bool) -> StateHooks:
        """See :class:`WeightFormat`."""
        # A layer keeps the library's names. Another module may have several weights, so it adds a prefix.
        start = "" if layer else f"{parameter}_"
        return StateHooks(_LoadParts(parameter, start), _SaveParts(parameter, start))


class PackedLayers(LibraryLayers, abc.ABC):
    """Layers whose weight is stored in several tensors.

    Attributes:
        tensor: The class of the weights, which :attr:`PackedFormat.tensor` sets.
    """

    tensor: type[PackedTensor]

    @abc.abstractmethod
    def parts(self, layer: nn.Module) -> Parts | None:
        """Return the tensors that store the weight of a layer; None if the layer is not supported.

        The layer has to compute ``x Wᵀ + layer.bias``, because :meth:`adopt` turns it into an ``nn.Linear``.
        """

    def share(self, layer: nn.Module, memo: dict[int, Any]) -> None:
        """See :class:`LibraryLayers`. ``deepcopy`` would duplicate parts that are no parameters."""
        parts = self._parts(layer)
        for tensor in () if parts is None else parts.tensors.values():
            memo.setdefault(id(tensor), tensor.detach())

    def adopt(self, model: nn.Module) -> None:
        """Replace the parts of each layer by one parameter, ``weight``."""
        of_model: torch.dtype | None = None
        for layer in model.modules():
            parts = self._parts(layer)
            if parts is None:
                continue
            if of_model is None:
                of_model = dtype_of_plain(model)
            dtype = parts.dtype or of_model
            for name in parts.tensors:
                layer._parameters.pop(name, None)
                layer._buffers.pop(name, None)
            if not isinstance(layer, nn.Linear):
                _become_linear(layer, parts.shape, dtype)
            detached = {name: part.detach() for name, part in parts.tensors.items()}
            weight = self.tensor(dataclasses.replace(parts, tensors=detached), dtype)
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            follow_state(layer, "weight", layer=True)

    def _parts(self, layer: nn.Module) -> Parts | None:
        # Operators of TorchScript have no parameters that can be replaced.
        return None if isinstance(layer, torch.jit.ScriptModule) else self.parts(layer)


def _become_linear(layer: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Turn a layer of a library into an ``nn.Linear`` without a weight. The object keeps its hooks."""
    bias = getattr(layer, "bias", None)
    for name in vars(layer).keys() - {*vars(nn.Module()), "_is_hf_initialized"}:
        del layer.__dict__[name]
    layer._parameters.clear()
    layer._buffers.clear()
    torch_private.transient_buffers(layer).clear()
    layer.__class__ = nn.Linear
    layer.out_features, layer.in_features = shape
    bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    layer.register_parameter("bias", bias)


def dtype_of_plain(model: nn.Module) -> torch.dtype:
    """Return the dtype of most values outside of quantized weights; bfloat16 for a model without any."""
    counts = dict.fromkeys(FLOATS, 0)
    for parameter in model.parameters():
        # Count elements, not parameters: scales and norms are fp32 in many models, but small.
        if parameter.dtype in counts and not isinstance(parameter, PackedTensor):
            counts[parameter.dtype] += parameter.numel()
    best = max(counts, key=lambda dtype: counts[dtype])
    return best if counts[best] else torch.bfloat16


# --- state dicts -------------------------------------------------------------------------------------


class _SaveParts(SaveHook):
    """A hook that replaces a weight in a state dict by its parts.

    Attributes:
        start: The prefix of the names of the parts.
    """

    def __init__(self, parameter: str, start: str) -> None:
        super().__init__(parameter)
        self.start = start

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
    ) -> None:
        """See :class:`SaveHook`."""
        weight = state.get(f"{prefix}{self.parameter}")
        if isinstance(weight, PackedTensor):
            del state[f"{prefix}{self.parameter}"]
            start = f"{prefix}{self.start}"
            entries = {**weight.parts, **_format(weight).saved_settings(weight)}
            state.update({f"{start}{name}": entry for name, entry in entries.items()})


class _LoadParts(CheckStorage):
    """A hook that replaces the parts of a weight in a state dict by the weight.

    Attributes:
        start: The prefix of the names of the parts.
    """

    def __init__(self, parameter: str, start: str) -> None:
        super().__init__(parameter)
        self.start = start

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """See :class:`LoadHook`."""
        weight: Any = module._parameters.get(self.parameter)
        name = f"{prefix}{self.parameter}"
        if isinstance(weight, PackedTensor) and not isinstance(state.get(name), PackedTensor):
            start = f"{prefix}{self.start}"
            tensors = {part: state.pop(f"{start}{part}", None) for part in weight.part_names}
            expected = _format(weight).saved_settings(weight)
            settings = {key: state.pop(f"{start}{key}", value) for key, value in expected.items()}
            if any(tensor is not None for tensor in tensors.values()):
                state[name] = self._joined(weight, name, tensors, settings, args[-1])
        super().__call__(module, state, prefix, *args)

    @staticmethod
    def _joined(
        weight: PackedTensor,
        name: str,
        tensors: Mapping[str, Any],
        settings: Mapping[str, Tensor],
        errors: list[str],
    ) -> PackedTensor:
        """Return the weight with the loaded parts.

        If a part does not fit, add an error and return the present weight, to avoid a second error.
        """
        expected = _format(weight).saved_settings(weight)
        present = {part: _form(tensor) for part, tensor in weight.parts.items()}
        present |= {key: str(setting.tolist()) for key, setting in expected.items()}
        loaded = {part: _form(tensor) for part, tensor in tensors.items()}
        loaded |= {key: str(setting.tolist()) for key, setting in settings.items()}
        wrong = [key for key in present if loaded[key] != present[key]]
        if not wrong:
            return type(weight)(Parts(tensors, weight.shape, weight.options), weight.dtype)
        errors.append(
            f"{name} is stored with {wrong[0]}: {present[wrong[0]]} here, and the state dict has "
            f"{loaded[wrong[0]]}: {REMEDY}"
        )
        return weight


def _form(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
