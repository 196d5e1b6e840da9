"""How GPUs are laid out, and how a model is spread over them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lora_fx.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Mesh", "blocks_of", "devices_of", "shard"]

_ENTRY = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<size>\d+)\s*")


@dataclass(frozen=True)
class Mesh:
    """A mesh of GPUs.

    Attributes:
        replicate: Groups that each hold a whole copy of the model between them (HSDP, or DDP with
            ``fsdp=1``).
        fsdp: GPUs that the weights of one such copy are sharded over.
    """

    replicate: int = 1
    fsdp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read ``fsdp=8`` or ``replicate=2,fsdp=8``.

        Raises:
            ConfigError: An entry is no dimension of a mesh, is there twice, or its size is below 1.
        """
        sizes: dict[str, int] = {}
        for entry in text.split(","):
            found = _ENTRY.fullmatch(entry)
            if found is None or found["name"] not in ("replicate", "fsdp") or not int(found["size"]):
                raise ConfigError(
                    f"--mesh {text!r}: {entry.strip()!r} is no dimension of a mesh: write fsdp=8, "
                    "or replicate=2,fsdp=8"
                )
            if found["name"] in sizes:
                raise ConfigError(f"--mesh {text!r}: {found['name']} is there twice")
            sizes[found["name"]] = int(found["size"])
        return cls(**sizes)

    @property
    def size(self) -> int:
        """How many GPUs there are."""
        return self.replicate * self.fsdp

    def __str__(self) -> str:
        parts = [("replicate", self.replicate), ("fsdp", self.fsdp)]
        return " x ".join(f"{name} {size}" for name, size in parts if size > 1) or "one GPU"


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, which are sharded each on its own: children of its outermost module lists."""
    pending: list[nn.Module] = [model]
    while pending:
        for child in pending.pop().children():
            if isinstance(child, nn.ModuleList):
                yield from (one for one in child if any(True for _ in one.parameters()))
            else:
                pending.append(child)


def devices_of(mesh: Mesh) -> DeviceMesh:
    """Return the mesh over the members of the default process group, which are as many."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if mesh.size != dist.get_world_size():
        raise ConfigError(f"the mesh has {mesh.size} members, the group {dist.get_world_size()}")
    if mesh.replicate == 1:
        return init_device_mesh("cpu", (mesh.fsdp,), mesh_dim_names=("fsdp",))
    sizes = (mesh.replicate, mesh.fsdp)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "fsdp"))


def shard(model: nn.Module, devices: DeviceMesh) -> None:
    """Spread a model over a mesh in place: FSDP2 for each block and for what is left."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=devices)
    fully_shard(model, mesh=devices)
