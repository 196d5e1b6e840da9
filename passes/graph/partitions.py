"""Parameters that DeepSpeed's ZeRO-3 partitions: their shapes, copies over the same parts, model copies.

Each process has a part of such a parameter. The parameter itself is empty (shape [0]) except during a call.
Its attribute ``ds_shape`` is the full shape, and ``ds_tensor`` has the part of this process. Its methods
gather all parts, and are bound to this parameter object.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fx.errors import CaptureError

__all__ = [
    "copy_partitioned",
    "is_owned",
    "is_partitioned",
    "module_of_hook",
    "own_partition",
    "partition_of",
    "partitioned_twin",
    "put_partitions_back",
    "put_together",
    "show_shapes",
    "whole_shape",
    "without_zero_init",
]


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Return True if DeepSpeed's ZeRO-3 partitions a tensor, which is then empty between calls."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the full shape of a tensor, even if ZeRO-3 has partitioned the tensor."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def is_owned(model: nn.Module) -> bool:
    """Return True if ``deepspeed.initialize`` has put its hooks on a model."""
    return any(_is_owned(module) for module in model.modules())


def put_together(tensor: torch.Tensor, **options: Any) -> Any:
    """Return DeepSpeed's context that gathers a partitioned parameter. Every rank has to enter it."""
    deepspeed: Any = importlib.import_module("deepspeed")  # imported before, by the user
    return deepspeed.zero.GatheredParameters([tensor], **options)


def partitioned_twin(parameter: nn.Parameter, *, own: bool = False) -> nn.Parameter:
    """Return a frozen parameter over the same parts, registered with ZeRO-3. No data is sent.

    Args:
        parameter: A partitioned parameter. It is not touched.
        own: True to copy the parts.

    Raises:
        CaptureError: If the parts are on a disk, because ZeRO-3 finds them there by the original parameter.
    """
    original: Any = parameter
    part = original.ds_tensor
    if str(getattr(part, "final_location", None)).endswith("nvme") and not part.numel():
        raise CaptureError(
            "ZeRO-3 has the parameters on a disk (offload_param with device nvme), so that nothing else can "
            "be over the same parts: use the CPU (offload_param with device cpu), or rewrite the model "
            "before it is partitioned"
        )
    twin = _converted(original)
    _set_part(twin, part.detach().clone() if own else part.detach(), like=part)
    return twin


def partition_of(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """Partition a value that every process has into a frozen ZeRO-3 parameter. No data is sent.

    Args:
        value: The full value.
        like: A parameter of the same shape that is partitioned over the same processes.
    """
    pattern: Any = like
    before = pattern.ds_tensor
    start = before.ds_numel * pattern.ds_zero_partition_rank
    flat = value.detach().reshape(-1)
    mine = flat[start : start + before.ds_numel]
    part = flat.new_zeros(before.ds_numel, device=before.device)
    part[: len(mine)].copy_(mine)
    partitioned = _converted(pattern)
    partitioned.data = partitioned.data.to(value.dtype)
    _set_part(partitioned, part, like=before)
    return partitioned


def own_partition(parameter: nn.Parameter) -> None:
    """Replace this process's part of a parameter by a copy, so that writes do not reach shared memory."""
    partitioned: Any = parameter
    _set_part(partitioned, partitioned.ds_tensor.detach().clone(), like=partitioned.ds_tensor)


def _set_part(parameter: Any, part: torch.Tensor, like: torch.Tensor) -> None:
    """Set this process's part of a parameter, with DeepSpeed's attributes of the part `like`."""
    part.__dict__.update(vars(like))
    parameter.ds_tensor = part


def _converted(original: Any) -> nn.Parameter:
    """Return an empty parameter, registered with ZeRO-3 by the context that registered `original`."""
    result = nn.Parameter(original.detach().new_empty(0), requires_grad=False)
    group = getattr(original, _GROUP, None)
    if group is not None:
        setattr(result, _GROUP, group)
    # The only references to the context that partitions are in closures of the parameter's methods.
    context = inspect.getclosurevars(original.convert_to_zero_parameters).nonlocals["self"]
    context._convert_to_deepspeed_param(result)
    vars(result)["ds_status"] = type(original.ds_status).NOT_AVAILABLE
    for key, value in vars(original).items():
        # Other attributes belong to a DeepSpeed engine, which has set them.
        if key in ("ds_shape", "ds_numel", "ds_numel_aligned", "ds_persist") or (
            key not in vars(result) and not key.startswith("ds_") and isinstance(value, _PLAIN)
        ):
            setattr(result, key, value)
    return result


_GROUP = "ds_zero_partition_process_group"  # set unless the group is that of all processes
_PLAIN = (str, bytes, int, float, complex, bool, type(None))


_STANDS_FOR = "_lora_fx_stands_for"


def show_shapes(model: nn.Module) -> nn.Module:
    """Replace parameters that ZeRO-3 partitions by meta parameters of the full shape.

    Args:
        model: A copy. It is changed, and returned.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_partitioned(parameter):
                continue
            if id(parameter) not in stand_ins:
                shape = whole_shape(parameter)
                empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                shown = nn.Parameter(empty, requires_grad=False)
                setattr(shown, _STANDS_FOR, parameter)
                stand_ins[id(parameter)] = shown
            module._parameters[name] = stand_ins[id(parameter)]
    return model


def put_partitions_back(model: nn.Module) -> None:
    """Undo :func:`show_shapes`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            real = getattr(parameter, _STANDS_FOR, None)
            if real is not None:
                module._parameters[name] = real


def copy_partitioned(
    model: nn.Module, memo: dict[int, Any], copied: Callable[[Any, dict[int, Any]], Any]
) -> Callable[[nn.Module], None]:
    """Prepare a copy, without DeepSpeed's hooks, of a model that ``deepspeed.initialize`` has wrapped.

    Args:
        model: The model; it is not touched.
        memo: The memo of ``copy.deepcopy``. It has the copies of parameters. Replacements for the dicts of
            parameters and hooks are added.
        copied: Copies a value with the memo.

    Returns:
        A function that removes DeepSpeed's remaining attributes from the finished copy.
    """
    owned = [module for module in model.modules() if _is_owned(module)]
    for module in owned:
        parameters = dict(dict.items(module._parameters))
        plain = {
            name: None if parameter is None else memo[id(parameter)]
            for name, parameter in parameters.items()
        }
        memo[id(module._parameters)] = plain
    for module in model.modules() if owned else ():
        for key, value in vars(module).items():
            if key.endswith("_hooks") and isinstance(value, dict):
                hooks = {name: hook for name, hook in value.items() if not _is_hook(hook)}
                if len(hooks) < len(value):
                    memo[id(value)] = copied(type(value)(hooks), memo)

    def clean(result: nn.Module) -> None:
        for module in result.modules() if owned else ():
            for key in [key for key in vars(module) if key in _KEYS or key.startswith("ds_")]:
                del vars(module)[key]

    return clean


_KEYS = (
    *("_external_params", "_original_parameters", "all_parameters"),
    *("applied_pre_backward_ref_cnt", "post_bwd_fn", "pre_bwd_fn"),
)
"""Attributes of modules that belong to DeepSpeed, in addition to those that begin with ``ds_``."""


def _is_owned(module: nn.Module) -> bool:
    return type(module._parameters).__name__ == "ZeROOrderedDict"


def module_of_hook(hook: Any) -> str:
    """Return the name of the Python module that defines a hook."""
    hook = getattr(hook, "hook", hook)  # torch's wrapper around some
    owner = getattr(hook, "__self__", None)
    return str(getattr(hook, "__module__", None) if owner is None else type(owner).__module__)


def _is_hook(hook: Any) -> bool:
    return module_of_hook(hook).partition(".")[0] == "deepspeed"


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Remove the patches of ``deepspeed.zero.Init`` from functions and classes of torch in a context.

    With the patches, constructors of tensors return another dtype, and new modules are partitioned.
    """
    zero: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    context = None if zero is None else zero.top_level_context
    if context is None or not context.patched:
        yield
        return
    zero.shutdown_init_context()
    try:
        yield
    finally:
        zero.restore_init_context()
