"""Parameters that a library has cut into parts: each process holds one, and the library owns the parameter.

FSDP2 puts the whole parameter in before a call and its own part afterwards, whatever is there in between. So
such a parameter is not exchanged: values are copied into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError, LoraFxError, ProcessError
from lora_fx.passes.graph import is_partitioned, is_unit, partition_of, put_together, whole_shape

__all__ = [
    "agreed",
    "answering",
    "check_not_sharded",
    "check_whole",
    "detached",
    "distributed",
    "distributed_as",
    "gathered",
    "is_sharded",
    "own_part",
    "reshard",
    "with_part",
    "write",
]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is cut into parts (a DTensor)."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; the tensor itself where it is whole."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its gradient; the parameter itself where ZeRO-3 finds the values by its attributes."""
    return tensor if is_partitioned(tensor) else tensor.detach()


def gathered(tensor: torch.Tensor, name: str = "a parameter") -> torch.Tensor:
    """All of a tensor, which FSDP2 shards (a DTensor) or ZeRO-3: then every rank has to call this.

    Args:
        tensor: Any.
        name: What it is, for an error.

    Raises:
        ProcessError: If another process that holds a part of it does not answer.
    """
    if is_partitioned(tensor) and tensor.shape != whole_shape(tensor):
        return _from_partitions(tensor, name)
    found: Any = tensor.detach()
    whole: torch.Tensor = found
    if is_sharded(found):
        with answering(name):
            whole = found.full_tensor()
    return whole


def _from_partitions(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A copy of what the processes of ZeRO-3 hold of a parameter: the parameter itself is empty again."""
    with answering(name), put_together(tensor):
        return tensor.detach().clone()


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Says what was being sent where another process does not answer.

    Raises:
        ProcessError: If that is so.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"{name}: another process that holds a part of it has ended, or has not called this within the "
            "timeout of the process group (init_process_group(timeout=...)). Every process has to call it; "
            f"look for the first error of the others, and start all of them again: {error}"
        ) from error


def distributed(value: torch.Tensor, mesh: Any, placements: tuple[Any, ...]) -> torch.Tensor:
    """This process's part of a value that every process has: nothing is sent.

    Args:
        value: The whole.
        mesh: The processes (a ``DeviceMesh``).
        placements: How it is cut, one for each dimension of the mesh.
    """
    # The package loads with the first DTensor, not with lora_fx.
    from torch.distributed.tensor import DTensor, distribute_tensor

    made = distribute_tensor(value, mesh, placements, src_data_rank=None)
    part: torch.Tensor = made.to_local()
    if part.untyped_storage().nbytes() == part.nbytes:
        return made
    # Not a view, which would keep the memory of the whole.
    own = part.detach().clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=made.shape, stride=made.stride()
    )


def with_part(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A tensor that is cut as another one is, of this process's part; nothing is sent."""
    from torch.distributed.tensor import DTensor

    there: Any = like
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        part,
        there.device_mesh,
        there.placements,
        run_check=False,
        shape=like.shape,
        stride=stride,
    )


def distributed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole value as another tensor lies; the value itself where that one is whole.

    Of a tensor that ZeRO-3 partitions it is a parameter, which ZeRO-3 knows.
    """
    if is_partitioned(like):
        return value if is_partitioned(value) else partition_of(value, like)
    if not is_sharded(like) or is_sharded(value):
        return value
    there: Any = like
    return distributed(value.to(like.device), there.device_mesh, there.placements)


def agreed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value that each process has drawn for itself, as the first of those that share a tensor has it.

    Args:
        value: The whole.
        like: A tensor that they hold in parts; nothing is sent where it is whole.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    there: Any = like
    everywhere = [Replicate()] * there.device_mesh.ndim
    found: torch.Tensor = distribute_tensor(value, there.device_mesh, everywhere).to_local()
    return found


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole value into a tensor of a model, into this rank's part of it where it is sharded.

    Every rank has to call this where it is: what the first one has is taken.
    """
    if is_partitioned(tensor):
        value = gathered(value)
        with put_together(tensor, modifier_rank=0), torch.no_grad():
            tensor.copy_(value)
        return
    value = distributed_as(value, tensor)
    with torch.no_grad():
        tensor.copy_(value)


def reshard(model: nn.Module) -> None:
    """Has FSDP2 put its parts of all parameters in, also where it keeps whole ones after a call."""
    for module in model.modules():
        if is_unit(module):
            owner: Any = module
            owner.reshard()


def check_whole(named: Iterable[tuple[str, torch.Tensor]], error: type[LoraFxError]) -> None:
    """Refuses parameters that DeepSpeed's ZeRO-3 owns, for what runs the model outside of its engine.

    Args:
        named: Parameters by name.
        error: What is raised.
    """
    for name, tensor in named:
        if is_partitioned(tensor):
            raise error(
                f"{name} is partitioned by ZeRO-3, which takes its values away between calls: save the "
                "adapter on every rank (lora_fx.save_adapter, which gathers it), load it onto a model that "
                "is not partitioned, and use that"
            )


def check_not_sharded(model: nn.Module, what: str, remedy: str) -> None:
    """Refuses a model whose parameters are sharded, for what would make parameters that are not.

    Raises:
        ConfigError: With the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or is_partitioned(parameter):
            raise ConfigError(
                f"{name} is sharded, and {what} would be whole in every process, where nothing keeps it "
                f"equal: {remedy}"
            )
