"""Parameters that DeepSpeed's ZeRO-3 partitions: what they are, others over the same parts, copies of models.

Such a parameter is empty (shape [0]) but for the time of a call. What it was is in its attributes:
``ds_shape``, and ``ds_tensor``, the elements that this process has. Its methods gather it, and belong to this
one object.
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
    """Whether DeepSpeed's ZeRO-3 owns a tensor: it is empty between calls, and the parts lie elsewhere."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of all of a tensor, also where ZeRO-3 has left an empty one."""
    found: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return found


def is_owned(model: nn.Module) -> bool:
    """Whether ``deepspeed.initialize`` has put its hooks on a model."""
    return any(_is_owned(module) for module in model.modules())


def put_together(tensor: torch.Tensor, **options: Any) -> Any:
    """DeepSpeed's context in which a parameter of its own has its values. Every rank has to enter it."""
    deepspeed: Any = importlib.import_module("deepspeed")  # it has made the parameter
    return deepspeed.zero.GatheredParameters([tensor], **options)


def partitioned_twin(parameter: nn.Parameter, *, own: bool = False) -> nn.Parameter:
    """A frozen parameter that ZeRO-3 knows as another one, over the same parts. Nothing is sent.

    Args:
        parameter: A partitioned parameter. It is not touched.
        own: Whether the parts are copied.

    Raises:
        CaptureError: If the parts lie on a disk, where they are found by the parameter.
    """
    given: Any = parameter
    part = given.ds_tensor
    if str(getattr(part, "final_location", None)).endswith("nvme") and not part.numel():
        raise CaptureError(
            "ZeRO-3 has the parameters on a disk (offload_param with device nvme), so that nothing else can "
            "be over the same parts: use the CPU (offload_param with device cpu), or rewrite the model "
            "before it is partitioned"
        )
    made = _converted(given)
    _set_part(made, part.detach().clone() if own else part.detach(), like=part)
    return made


def partition_of(value: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A frozen parameter as ZeRO-3 partitions it, of a value that every process has. Nothing is sent.

    Args:
        value: The whole.
        like: A partitioned parameter of that shape, whose processes get the parts.
    """
    given: Any = like
    before = given.ds_tensor
    start = before.ds_numel * given.ds_zero_partition_rank
    flat = value.detach().reshape(-1)
    mine = flat[start : start + before.ds_numel]
    part = flat.new_zeros(before.ds_numel, device=before.device)
    part[: len(mine)].copy_(mine)
    made = _converted(given)
    made.data = made.data.to(value.dtype)
    _set_part(made, part, like=before)
    return made


def own_partition(parameter: nn.Parameter) -> None:
    """Gives a partitioned parameter parts of its own, before they are written into."""
    given: Any = parameter
    _set_part(given, given.ds_tensor.detach().clone(), like=given.ds_tensor)


def _set_part(parameter: Any, part: torch.Tensor, like: torch.Tensor) -> None:
    """What this process has of a parameter; how it is stored is said by attributes."""
    part.__dict__.update(vars(like))
    parameter.ds_tensor = part


def _converted(given: Any) -> nn.Parameter:
    """An empty parameter, made known to ZeRO-3 by what has made another one known."""
    made = nn.Parameter(given.detach().new_empty(0), requires_grad=False)
    group = getattr(given, _GROUP, None)
    if group is not None:
        setattr(made, _GROUP, group)
    # The context that partitions it is known to the parameter's own methods only.
    context = inspect.getclosurevars(given.convert_to_zero_parameters).nonlocals["self"]
    context._convert_to_deepspeed_param(made)
    vars(made)["ds_status"] = type(given.ds_status).NOT_AVAILABLE
    for key, value in vars(given).items():
        # What an engine has put on it belongs to the engine.
        if key in ("ds_shape", "ds_numel", "ds_numel_aligned", "ds_persist") or (
            key not in vars(made) and not key.startswith("ds_") and isinstance(value, _PLAIN)
        ):
            setattr(made, key, value)
    return made


_GROUP = "ds_zero_partition_process_group"  # where it is not that of all processes
_PLAIN = (str, bytes, int, float, complex, bool, type(None))


_STANDS_FOR = "_lora_fx_stands_for"


def show_shapes(model: nn.Module) -> nn.Module:
    """Puts parameters of the true shapes, without values, in the places of those that ZeRO-3 has emptied.

    Args:
        model: A copy. It is changed, and returned.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_partitioned(parameter):
                continue
            if id(parameter) not in made:
                shape = whole_shape(parameter)
                empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                shown = nn.Parameter(empty, requires_grad=False)
                setattr(shown, _STANDS_FOR, parameter)
                made[id(parameter)] = shown
            module._parameters[name] = made[id(parameter)]
    return model


def put_partitions_back(model: nn.Module) -> None:
    """Undoes :func:`show_shapes`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            real = getattr(parameter, _STANDS_FOR, None)
            if real is not None:
                module._parameters[name] = real


def copy_partitioned(
    model: nn.Module, memo: dict[int, Any], copied: Callable[[Any, dict[int, Any]], Any]
) -> Callable[[nn.Module], None]:
    """Prepares a copy of a model on which ``deepspeed.initialize`` has put its hooks: it will have none.

    Args:
        model: The model; it is not touched.
        memo: That of ``copy.deepcopy``: it has the copies of parameters, and gets what stands for the rest.
        copied: Copies a value with the memo.

    Returns:
        What is called with the copy, and takes off what is left.
    """
    owned = [module for module in model.modules() if _is_owned(module)]
    for module in owned:
        held = dict(dict.items(module._parameters))
        plain = {name: None if one is None else memo[id(one)] for name, one in held.items()}
        memo[id(module._parameters)] = plain
    for module in model.modules() if owned else ():
        for key, value in vars(module).items():
            if key.endswith("_hooks") and isinstance(value, dict):
                rest = {name: one for name, one in value.items() if not _is_hook(one)}
                if len(rest) < len(value):
                    memo[id(value)] = copied(type(value)(rest), memo)

    def clean(result: nn.Module) -> None:
        for module in result.modules() if owned else ():
            for key in [key for key in vars(module) if key in _KEYS or key.startswith("ds_")]:
                del vars(module)[key]

    return clean


_KEYS = (
    *("_external_params", "_original_parameters", "all_parameters"),
    *("applied_pre_backward_ref_cnt", "post_bwd_fn", "pre_bwd_fn"),
)
"""The attributes of modules that belong to DeepSpeed, beside those that begin with ``ds_``."""


def _is_owned(module: nn.Module) -> bool:
    return type(module._parameters).__name__ == "ZeROOrderedDict"


def module_of_hook(hook: Any) -> str:
    """Return the name of the module that a hook of a module comes from."""
    hook = getattr(hook, "hook", hook)  # torch's wrapper around some
    owner = getattr(hook, "__self__", None)
    return str(getattr(hook, "__module__", None) if owner is None else type(owner).__module__)


def _is_hook(hook: Any) -> bool:
    return module_of_hook(hook).partition(".")[0] == "deepspeed"


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Takes off what ``deepspeed.zero.Init`` has put around functions and classes of torch, for a while.

    Within it constructors of tensors return another dtype, and modules that are made are partitioned.
    """
    place: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    context = None if place is None else place.top_level_context
    if context is None or not context.patched:
        yield
        return
    place.shutdown_init_context()
    try:
        yield
    finally:
        place.restore_init_context()
