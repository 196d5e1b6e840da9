"""What a rewritten model runs at training time, and the modules that hold its factors."""

from __future__ import annotations

import enum
import keyword
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from types import (
    SimpleNamespace,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.parts import factor_beside, is_in_parts, note_whole

__all__ = [
    "OMITTED",
    "AdapterDropout",
    "AdapterDropouts",
    "AdapterFactors",
    "AdapterModule",
    "Holder",
    "KeptIndices",
    "KeptTensors",
    "OffloadedFactors",
    "cast_like",
    "check_adapter_name",
    "given",
    "in_place",
    "output_padding",
    "pad_features",
    "spread",
    "tensors_in",
]


# Of modules, and of lora_fx.runtime.samples.SampleRows.
_TAKEN = (
    *(
        "training",
        "thread",
        "threads",
        "inherited",
        "samples",
        "repeats",
        "state",
        "proofs",
        "folded",
    ),
    *("assign", "assigned", "of_blocks", "reassign", "settle", "lay_out"),
)


_HOOK = "_hf_hook"  # where accelerate keeps its hook


class _NoLayer(ConfigError, AttributeError):
    """Says that a module of an adapter is taken for a layer."""


class AdapterModule(nn.Module):
    """A module that lora_fx puts into a model: no part of the base."""

    def __getattr__(self, name: str) -> Any:
        """An attribute. Styles of tensor parallelism ask every module in a layer for its ``weight``."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise _NoLayer(
                "a module that holds an adapter has no weight, and is no layer: parallelize the model first "
                "(parallelize_module), and rewrite what that gives"
            ) from error


class AdapterFactors(AdapterModule):
    """One factor of a site, for every adapter: ``layer.lora_A.default`` is a parameter.

    It has no forward: the graph reads the parameters. Hooks that accelerate puts on it to load parameters
    before a call never run, so that it then asks them itself.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; with accelerate's hook it becomes one whose factors are somewhere else.

        FSDP2 puts its parts in so.
        """
        if isinstance(value, nn.Parameter):
            note_whole(self, name, value)
        super().__setattr__(name, value)
        if name == _HOOK and type(self) is AdapterFactors:
            object.__setattr__(self, "__class__", OffloadedFactors)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Registers a hook.

        Raises:
            ConfigError: If it is to compute gradients of single samples: no call of this module would run it.
        """
        library = type(getattr(getattr(hook, "func", hook), "__self__", None)).__module__
        if library.partition(".")[0] == "opacus":
            raise ConfigError(
                "Opacus computes the gradients of single samples by hooks on layers, and the factors of an "
                "adapter are read by the graph of the layer that they adapt: no hook on them runs. Use "
                "grad_sample_mode='ew' with a model of lora_fx.rewrite(..., optimize=False), where linear "
                "layers have LoRA; or grad_sample_mode='no_op', and set grad_sample of the parameters from "
                "torch.func (vmap over grad of functional_call), which any adapter goes with"
            )
        return super().register_full_backward_hook(hook, prepend)

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Adds an adapter's factor, or puts another one in its place.

        Args:
            adapter: The adapter's name.
            value: A of shape [r, in, ...] or B of shape [out, r, ...]; a parameter is taken as it is.
        """
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        self.register_parameter(adapter, parameter)

    def extra_repr(self) -> str:
        """Names and shapes."""
        shapes = ((name, tuple(p.shape)) for name, p in self.named_parameters())
        return ", ".join(f"{name}={shape}" for name, shape in shapes)


class OffloadedFactors(AdapterFactors):
    """Factors that accelerate has offloaded to a disk or to the CPU: each read loads one, to compute with."""

    def __getattr__(self, name: str) -> Any:
        """An attribute; a factor with its values.

        Raises:
            ConfigError: If it would be trained: the gradient of a loaded value reaches nothing.
        """
        value = super().__getattr__(name)
        hook: Any = self.__dict__.get(_HOOK)
        stored = getattr(hook, "weights_map", None)
        if not isinstance(value, nn.Parameter) or not value.is_meta or stored is None:
            return value
        if self.training and torch.is_grad_enabled():
            raise ConfigError(
                f"the factors of adapter {name!r} are offloaded by accelerate, which is for inference: call "
                "model.eval(), or take the hooks off (accelerate.hooks.remove_hook_from_submodules)"
            )
        loaded = stored[name].to(hook.execution_device, value.dtype)
        return nn.Parameter(loaded, requires_grad=False)

    def __delattr__(self, name: str) -> None:
        """Deletes an attribute; without the hook it is as it was."""
        super().__delattr__(name)
        if name == _HOOK:
            object.__setattr__(self, "__class__", AdapterFactors)


class KeptIndices(AdapterFactors):
    """Which rows of a weight an adapter trains: buffers that are no part of the state."""

    def add(self, adapter: str, value: torch.Tensor) -> None:
        """Adds an adapter's indices.

        Args:
            adapter: The adapter's name.
            value: Integers, [n].
        """
        self.register_buffer(adapter, value, persistent=False)


class AdapterDropout(AdapterModule, nn.Dropout):
    """The dropout of an adapter's branch at a site.

    It is an ``nn.Dropout``, so that code that looks for these finds it (``model.eval()``, TRL's
    ``disable_dropout``, a schedule of probabilities). The graph reads ``p`` and ``training`` at each call; it
    never calls the module, whose hooks do not run.
    """


class AdapterDropouts(AdapterModule):
    """The dropouts of a site, by adapter: ``layer.lora_dropout.default.p``, where PEFT has it."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute.

        Raises:
            ConfigError: If another module would take the place of a dropout: the graph would not call it.
        """
        if isinstance(value, nn.Module) and not isinstance(value, AdapterDropout):
            raise ConfigError(
                f"lora_dropout.{name} is the dropout of an adapter, and a {type(value).__name__} in its "
                "place would not be called: set its p instead (p = 0 for no dropout)"
            )
        super().__setattr__(name, value)

    def add(self, adapter: str, p: float) -> None:
        """Adds an adapter's dropout, or puts another one in its place.

        Args:
            adapter: The adapter's name.
            p: The probability that the graph begins with.
        """
        self.add_module(adapter, AdapterDropout(p).train(self.training))


class Holder(AdapterModule):
    """Holds the factors of a weight that no module stands for: it lies beside the weight."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse to be called.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "code goes through the children of a module and calls each, and one of them holds the adapter of "
            "a parameter: leave out what is a lora_fx.runtime.AdapterModule, or leave the parameter out of "
            "target_parameters"
        )


class KeptTensors(AdapterFactors):
    """What an adapter keeps beside a parameter and does not train: it is no factor."""


def check_adapter_name(name: object) -> None:
    """Refuses names that cannot be an attribute of :class:`AdapterFactors`.

    Raises:
        ConfigError: If the name is empty, has other characters than letters, digits, "_" and "-",
            or is taken by Python or ``nn.Module``.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"adapter_name must be a string that is not empty, found {name!r}")
    if not re.fullmatch(r"[\w-]+", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"adapter_name {name!r} has to be letters, digits, '_' and '-', and no word of Python: "
            "it is part of parameter and folder names"
        )
    if hasattr(AdapterFactors, name) or name in _TAKEN:
        raise ConfigError(f"adapter_name {name!r} is an attribute of nn.Module: choose another")


def cast_like(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A factor in the dtype of an output, and in parts where that is.

    ``type_as`` would also want the layout of a nested tensor, which a factor cannot have.

    Raises:
        ConfigError: If a layer was parallelized after the rewrite.
    """
    if is_in_parts(factor) or is_in_parts(like):
        factor = factor_beside(factor, like)
    return factor.to(like.dtype)


def pad_features(part: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Zeros for the output features that a part of an operation does not have.

    Args:
        part: [..., n].
        before: How many come before it.
        after: How many come after it.
    """
    if not part.is_nested:
        return F.pad(part, (before, after))
    # What is nested cannot be padded, and can be multiplied.
    own = torch.eye(part.size(-1), dtype=part.dtype, device=part.device)
    return F.linear(part, F.pad(own, (0, 0, before, after)))


def in_place(operation: str, left: Any, right: Any) -> Any:
    """``left += right`` and the like: changes a tensor in place, and gives a new number.

    Args:
        operation: A name in :mod:`operator`, such as ``iadd``.
        left: What stands on the left.
        right: What stands on the right.
    """
    return getattr(operator, operation)(left, right)


class _Omitted(enum.Enum):
    """The default of an argument that tells whether it was given."""

    OMITTED = "omitted"


OMITTED = _Omitted.OMITTED
"""What an argument is that was not given, where a decorator looks whether it was."""


def given(**named: Any) -> dict[str, Any]:
    """The arguments that were given.

    Args:
        named: Arguments by name.
    """
    return {name: value for name, value in named.items() if value is not OMITTED}


_SIMPLE = (bool, int, float, complex, str, bytes)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Go through the tensors in arguments or results, in containers and objects, too, but not in modules."""
    seen: set[int] = set()

    def visit(one: Any, depth: int) -> Iterator[torch.Tensor]:
        if isinstance(one, torch.Tensor):
            yield one
        elif depth and id(one) not in seen and not isinstance(one, (*_SIMPLE, nn.Module, type)):
            seen.add(id(one))
            if isinstance(one, Mapping):
                one = one.values()
            elif not isinstance(one, list | tuple | set):
                one = getattr(one, "__dict__", {}).values()
            for item in one:
                yield from visit(item, depth - 1)

    return visit(value, 8)


def output_padding(
    x: torch.Tensor,
    output_size: Sequence[int] | None,
    default: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
) -> Sequence[int]:
    """What a transposed convolution adds to its output, so that it has the size that a call asks for.

    Args:
        x: The input.
        output_size: The size, with or without the dimensions before the spatial ones; or None.
        default: What the layer adds if no size is asked for.
        stride: Of the layer; what follows, too.
        padding: Likewise.
        kernel_size: Likewise.
        dilation: Likewise.

    Raises:
        ValueError: PyTorch's own, for a size that the layer cannot give.
    """
    if output_size is None:
        return default
    layer: Any = SimpleNamespace(output_padding=default)
    geometry: tuple[Any, ...] = (stride, padding, kernel_size, len(kernel_size), dilation)
    size: Any = output_size
    found: Sequence[int] = torch_private.OUTPUT_PADDING(layer, x, size, *geometry)
    return found


def spread(
    vector: torch.Tensor, like: torch.Tensor, axes: Sequence[int], sizes: Sequence[int]
) -> torch.Tensor:
    """A vector of the output features in the shape in which it meets an output.

    Args:
        vector: [out].
        like: The output. A matrix times a vector has its features where a product has its rows.
        axes: Where the features lie in an output, counted from its end.
        sizes: Their sizes, where they are several dimensions.

    Returns:
        A view with 1 for every other dimension behind the first of the axes.
    """
    if like.dim() < -min(axes):
        return vector
    if len(axes) > 1:
        order = sorted(range(len(axes)), key=lambda place: axes[place])
        vector = vector.view(tuple(sizes)).permute(order)
    kept = iter(vector.shape)
    first = min(axes)
    return vector.reshape([next(kept) if axis in axes else 1 for axis in range(first, 0)])
