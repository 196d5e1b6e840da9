"""Values that readers of adapter files and methods exchange: layers, changes of parameters, adapters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from lora_fx.errors import CheckpointError
from lora_fx.ir import join
from lora_fx.passes.graph import is_conv1d

__all__ = ["CONVERTER", "ForeignAdapter", "Layer", "Method", "ParameterChange"]

CONVERTER: Final = (
    "lora_fx.convert_adapter(model, path, rank=...) or lora-fx convert makes LoRA of it"
)
"""Remedy in errors about adapters of other methods."""

_Adapted = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ParameterChange:
    """A change that an adapter makes to a parameter of the base model.

    Attributes:
        parameter: FQN of the parameter: a weight, or a bias.
        adapted: A function that returns the adapted value of the parameter, in its shape and dtype. A value
            in half precision is computed in fp32 and rounded once.
        rank: An upper bound of the rank of the change, as a matrix [outputs, everything else]. None if the
            method guarantees none.
        tied: True if the change applies to all modules that share the parameter, False for this module only.
    """

    parameter: str
    adapted: _Adapted
    rank: int | None = None
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another method than LoRA.

    Attributes:
        method: Names of the methods in the file, joined by "and".
        changes: Changes of parameters. No two change the same parameter.
        whole: Parameters and buffers that the file stores in full, by FQN.
        config: ``task_type``, ``base_model_name_or_path`` and ``modules_to_save`` as the folder has them.
            Empty for a single file.
    """

    method: str
    changes: tuple[ParameterChange, ...]
    whole: Mapping[str, Tensor]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that a file adapts.

    Attributes:
        source: The file, for errors.
        name: FQN of the module in the model.
        written: Name of the layer in the file.
        module: The module.
        tensors: Its tensors, by role: the end of the key.
        keys: Keys in the file, by role.
        config: ``adapter_config.json``. Empty for a single file.
        shared: Tensors that all layers share, by role.
    """

    source: Path
    name: str
    written: str
    module: nn.Module
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight. For a quantized layer, it follows from the numbers of features."""
        if not is_conv1d(self.module) and hasattr(self.module, "in_features"):
            return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]
        return tuple(self.module.get_parameter("weight").shape)

    @property
    def features(self) -> tuple[int, int]:
        """Numbers of output and input features of a linear layer, for either layout of its weight."""
        self.check_dims(2)
        first, last = self.shape
        return (last, first) if is_conv1d(self.module) else (first, last)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the weight as a matrix: outputs, and inputs times the kernel."""
        if is_conv1d(self.module):
            return self.features
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for any other layer."""
        return int(getattr(self.module, "groups", 1))

    def setting(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a value of the configuration.

        Raises:
            CheckpointError: If the value is missing and there is no default, or has another type.
        """
        value = self.config.get(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise CheckpointError(
                f"{self.source}: {name} is {value!r} in adapter_config.json, which this method needs; save "
                "the adapter again"
            )
        return value

    def check_dims(self, *allowed: int) -> None:
        """Raise if the weight has another number of dimensions."""
        if len(self.shape) not in allowed:
            raise self.error(
                f"its weight is {list(self.shape)}, and the method adapts "
                + " or ".join(_KINDS[dims] for dims in allowed)
            )

    def error(self, problem: str) -> CheckpointError:
        """Return an error about the layer."""
        return CheckpointError(f"{self.source}: {self.name}: {problem}")

    def misfit(self, problem: str) -> CheckpointError:
        """Return an error about shapes, with the shapes of all tensors of the layer."""
        tensors = {**self.tensors, **self.shared}
        shapes = [
            f"{self.keys.get(role, role)} {list(value.shape)}" for role, value in tensors.items()
        ]
        return self.error(
            f"{problem}: the file is damaged, or for another model. Its weight is {list(self.shape)}, and "
            f"the file has {', '.join(shapes)}"
        )

    def take(self, role: str, *sizes: int | None, shared: bool = False) -> Tensor:
        """Return a tensor of the layer after checks.

        Args:
            role: Its role.
            sizes: Sizes of its dimensions, None for any size. Without sizes, any shape is right.
            shared: True for a tensor that all layers share. Its sizes are lower bounds.

        Raises:
            CheckpointError: If the tensor is missing, has another shape, or is not of finite floating-point
                numbers.
        """
        tensors = self.shared if shared else self.tensors
        if role not in tensors:
            raise self.error(f"the file has no {role} for it. It was cut short, or edited")
        value = tensors[role]
        key = self.keys.get(role, role)
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            kind = value.dtype if not value.is_floating_point() else "not finite"
            raise CheckpointError(
                f"{self.source}: {key} is {kind}, and {role} has finite floating-point numbers: the file is "
                "damaged"
            )
        wrong = sizes and len(sizes) != value.dim()
        for size, expected in zip(value.shape, sizes, strict=False):
            if expected is not None:
                wrong = wrong or (size < expected if shared else size != expected)
        if wrong:
            shape = ", ".join("any" if size is None else str(size) for size in sizes)
            least = "at least " if shared else ""
            raise self.misfit(f"{key} is {list(value.shape)}, and {role} is {least}[{shape}]")
        return value

    def scale(self, rank: int | None) -> float:
        """Return alpha / r of a method that has both.

        In a file alpha is a tensor. In a folder it is in the configuration, with patterns for single layers.

        Args:
            rank: r, from the shapes of the tensors; None if no shape tells it.
        """
        if self.config:
            default = self.setting("r", int)
            if rank is None:
                rank = int(self._pattern("rank_pattern", default))
            return float(self._pattern("alpha_pattern", self.setting("alpha", (int, float)))) / rank
        if "alpha" not in self.tensors or rank is None:
            return 1.0
        alpha = self.tensors["alpha"]
        if alpha.numel() != 1 or not math.isfinite(float(alpha)) or float(alpha) == 0:
            raise self.error(
                f"{self.keys['alpha']} is {alpha.tolist()}, and alpha is a number other than 0: write the "
                "alpha that is meant into the file"
            )
        return float(alpha) / rank

    def _pattern(self, field: str, default: float) -> float:
        """Return the value of the first pattern that matches the end of the layer's name, as PEFT does."""
        for pattern, value in (self.config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.written):
                return float(value)
        return default

    def change(
        self, adapted: _Adapted, rank: int | None = None, leaf: str = "weight"
    ) -> ParameterChange:
        """Return the change of a parameter of the layer.

        Args:
            adapted: A function that returns the adapted value of a parameter in fp32 or fp64.
            rank: A bound of the rank of the change.
            leaf: Name of the parameter in the module.

        Raises:
            CheckpointError: If the module has no such parameter.
        """
        if self.module._parameters.get(leaf) is None:
            raise self.error(
                f"the file changes its {leaf}, and this model's {type(self.module).__name__} has none: the "
                "adapter is for another model"
            )

        def computed(value: Tensor) -> Tensor:
            wide = value if value.dtype == torch.float64 else value.float()
            return adapted(wide).to(value.dtype)

        if rank is not None:
            rank = min(rank, *self.matrix)
        return ParameterChange(join(self.name, leaf), computed, rank)

    def addition(self, delta: Callable[[], Tensor], rank: int | None = None) -> ParameterChange:
        """Return the change that adds a matrix or kernel to the weight.

        Args:
            delta: A function that returns the addition in fp64, in the order [out, in, *kernel]. It may have
                any shape with as many elements.
            rank: A bound of the rank of the addition.
        """
        transposed = is_conv1d(self.module)

        def adapted(weight: Tensor) -> Tensor:
            added = delta().to(weight)
            added = added.reshape(self.features).T if transposed else added.reshape(weight.shape)
            return weight + added

        return self.change(adapted, rank)


_KINDS: Final = {
    1: "vectors",
    2: "linear layers",
    3: "1d convolutions",
    4: "2d convolutions",
    5: "3d convolutions",
}


class Method:
    """A method of adapting a model, as the change that it makes to parameters.

    An instance is registered by the ``METHODS`` of its file.

    Attributes:
        name: Name for messages.
        does: Short description: "products of two low-rank matrices, element by element".
        peft_type: ``peft_type`` of PEFT's folders; "" if PEFT has no such folders.
        in_files: True if files of LyCORIS, kohya or ComfyUI hold such layers.
        roles: Ends of the keys of a layer's tensors.
        scaled: True if files have an alpha for each layer.
        shared: Roles of tensors that all layers share, in a folder.
        ties: True if PEFT ties the adapter of the input embedding to modules that share its weight, in a
            model that declares this.
    """

    name: ClassVar[str]
    does: ClassVar[str]
    peft_type: ClassVar[str] = ""
    in_files: ClassVar[bool] = False
    scaled: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    ties: ClassVar[bool] = False

    def is_file_layer(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if a layer of a file of LyCORIS is of this method, by the roles of its tensors."""
        return self.in_files and any(role in tensors for role in self.roles)

    def derive_shared(
        self, layers: Sequence[Layer], shared: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the tensors that all layers share, including those that PEFT computes when it loads them.

        Args:
            layers: All layers, in the order of the model.
            shared: Tensors in the file that all layers share, by role.
        """
        return shared

    def changes(self, layer: Layer) -> Iterable[ParameterChange]:
        """Return the changes of the parameters of a layer, computed from their values.

        Raises:
            CheckpointError: If a tensor is missing or does not fit the layer.
        """
        return ()

    def whole(self, layer: Layer) -> Mapping[str, Tensor]:
        """Return the parameters that the file stores in full, by FQN.

        Raises:
            CheckpointError: If a tensor does not fit the layer.
        """
        return {}
