"""Loading of experts of compressed-tensors as stacks of compressed matrices.

Without the quantizer of this file, transformers decompresses the experts.

A checkpoint has a separate tensor for each matrix of an expert (``experts.0.gate_proj.weight_packed``). The
model has one parameter for the matrices of all experts (``experts.gate_up_proj``). This parameter becomes a
stack, with a piece for each matrix of an expert: two for ``gate_up_proj``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.formats.compressed_tensors import CompressedTensor, options_of, pack_zero_points
from lora_fx.formats.packed import Parts
from lora_fx.formats.stacks import StackedTensor, follow_stacks, stack_parts

__all__ = ["experts_quantizer"]


@functools.cache
def _stack_operation() -> type:
    """Return the class of an operation of transformers' loader that stacks compressed experts."""
    from transformers.integrations.compressed_tensors import (
        CompressedTensorsDequantize,
        get_experts_scheme,
    )

    class Stack(CompressedTensorsDequantize):  # type: ignore[misc]
        """Stacks the compressed matrices of experts.

        Attributes:
            plain: The conversion that transformers has for a dense checkpoint.
        """

        plain: Any = None

        def convert(self, input_dict: Any, **options: Any) -> Any:
            name, model = options["full_layer_name"], options["model"]
            config = self.hf_quantizer.compressor.quantization_config
            scheme = self.scheme or get_experts_scheme(config)
            return {name: _stack(input_dict, options["source_patterns"], name, model, scheme)}

    return Stack


@functools.cache
def experts_quantizer() -> type:
    """Return the class of a transformers quantizer that keeps experts compressed."""
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    class Quantizer(CompressedTensorsHfQuantizer):  # type: ignore[misc]
        """Keeps experts compressed, and makes room for packed zero points.

        Attributes:
            projections: The names of an expert's matrices in the order of their rows, by the end of the
                name of the stack.
        """

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.projections: dict[str, tuple[str, ...]] = {}

        def get_load_operations(self) -> dict[str, type]:
            return {"dequantize": _stack_operation()}

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
            plain = {_targets(conversion): conversion for conversion in weight_conversions}
            conversions = super().update_weight_conversions(weight_conversions, model)
            for conversion in conversions:
                if isinstance(_first_operation(conversion), _stack_operation()):
                    projections = _stacked_by(conversion, plain[_targets(conversion)], self)
                    self.projections.update(projections)
            return conversions

        def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, **options)
            pack_zero_points(model)

        def _process_model_after_weight_loading(self, model: nn.Module, **options: Any) -> Any:
            follow_stacks(model)
            _convert_dense_only(model)
            return super()._process_model_after_weight_loading(model, **options)

        def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
            return _state_dict(model, self.projections), {}

        def __reduce__(self) -> Any:
            return _new_quantizer, (), self.__dict__

    return Quantizer


def _stacked_by(conversion: Any, plain: Any, quantizer: Any) -> dict[str, tuple[str, ...]]:
    """Change a conversion of transformers' loader so that it stacks compressed experts.

    Args:
        conversion: A conversion whose first operation is a ``Stack``; it is changed. If later operations do
            more than join matrices, the conversion decompresses the experts as usual.
        plain: The conversion that transformers has for a dense checkpoint.
        quantizer: The quantizer.

    Returns:
        The names of an expert's matrices, such as ``gate_proj``, by the end of the name of the stack. Empty
        if the conversion decompresses.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    first, *following = conversion.operations
    kinds = [type(operation) for operation in following]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
        conversion.operations[0] = CompressedTensorsDequantize(quantizer, first.scheme)
        return {}
    conversion.operations[1:] = []
    first.plain = plain
    (target,) = _targets(conversion)
    return {target: _projections(conversion.source_patterns)}


def _convert_dense_only(model: Any) -> None:
    """Restore the conversions for dense experts in a model that was just loaded.

    Stacks need no conversion to be saved, because :func:`_state_dict` uses the names of the checkpoint.
    """
    vars(model)["_weight_conversions"] = [
        getattr(_first_operation(conversion), "plain", None) or conversion
        for conversion in vars(model).get("_weight_conversions", ())
    ]


def _state_dict(model: nn.Module, projections: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return the state dict of a model, with separate entries for the matrices of each expert."""
    state = model.state_dict()
    for name, stack in model.named_parameters():
        for end, names in projections.items():
            if isinstance(stack, StackedTensor) and name.endswith(end):
                state.update(_taken_apart(state, name, stack, names))
    return state


def _first_operation(conversion: Any) -> Any:
    return next(iter(getattr(conversion, "operations", ())), None)


def _new_quantizer() -> Any:
    return object.__new__(experts_quantizer())


def _targets(conversion: Any) -> tuple[str, ...]:
    return tuple(conversion.target_patterns)


def _projections(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the matrices, from patterns like ``experts.*.gate_proj.weight_packed``."""
    return tuple(dict.fromkeys(pattern.rsplit(".", 2)[-2] for pattern in patterns))


def _stack(
    tensors: dict[str, list[Tensor]], patterns: list[str], name: str, model: nn.Module, scheme: Any
) -> nn.Parameter:
    """Return one parameter that holds the packed matrices of all experts.

    Args:
        tensors: The tensors of all experts, by the pattern of their names in the checkpoint.
        patterns: The patterns of the matrices. If the stack joins several, such as gate and up, they are in
            the order of their rows.
        name: The FQN of the parameter.
        model: The model. It still has the dense parameter, which gives the shape.
        scheme: The settings of compressed-tensors for the experts.
    """
    parts: dict[str, list[Tensor]] = {}
    for pattern in patterns:
        if pattern in tensors:
            parts.setdefault(pattern.rpartition(".")[2], []).append(torch.stack(tensors[pattern]))
    dense, leaf, pieces = (
        model.get_parameter(name),
        name.rpartition(".")[2],
        len(_projections(patterns)),
    )
    rows, columns = dense.shape[1] // pieces, dense.shape[2]
    options = options_of(scheme, nn.Linear(columns, rows, bias=False, device="meta"))
    stacked = {
        f"{leaf}_{part}": each[0] if pieces == 1 else torch.stack(each, 1)
        for part, each in parts.items()
    }
    joined = Parts(stacked, dense.shape, options)
    return stack_parts(CompressedTensor, tuple(parts), joined, dense.dtype, pieces=pieces)


def _taken_apart(
    state: dict[str, Tensor], name: str, stack: StackedTensor, projections: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of each expert's matrices, and remove the stack's tensors from the state dict."""
    owner, _, leaf = name.rpartition(".")
    for key in stack.options.keys:
        for expert, tensor in enumerate(state.pop(f"{owner}.{leaf}_{key}")):
            pieces = [tensor] if len(projections) == 1 else list(tensor)
            for projection, piece in zip(projections, pieces, strict=True):
                yield f"{owner}.{expert}.{projection}.{key}", piece.contiguous()
