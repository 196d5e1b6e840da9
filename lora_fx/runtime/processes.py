"""What the processes that share a model tell each other before they send parts of it.

They write into the store by which they have found each other. So nothing is taken for anything else where one
of them does something else, and the ones that are missing have names.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lora_fx.errors import ConfigError, ProcessError

__all__ = ["called_by_all", "check_equal", "note_whole"]

_calls: Counter[str] = Counter()
_SHORTEST, _LONGEST = 0.001, 0.1  # seconds between two looks
_NOTES = "_lora_fx_whole"


def called_by_all(tensors: Iterable[torch.Tensor], what: str, word: str = "") -> dict[int, str]:
    """Waits until every process that holds parts of some tensors has come here, too.

    What one process sends alone the others would take for something else. Nothing is asked where all tensors
    are whole.

    Args:
        tensors: What is gathered afterwards.
        what: What that is for, for an error.
        word: What this process tells the others.

    Returns:
        What each of them has told, by its rank.

    Raises:
        ProcessError: With the ranks that have not come within the timeout of the process group.
    """
    ranks = _holders(tensors)
    if len(ranks) < 2:
        return {}
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    place = f"lora_fx {what} {ranks}"
    number = _calls[place]
    keys = {rank: f"{place} {number} {rank}" for rank in ranks}
    mine = dist.get_rank()
    store.set(keys[mine], word)
    end, pause = time.monotonic() + store.timeout.total_seconds(), _SHORTEST
    while missing := [rank for rank, key in keys.items() if not store.check([key])]:
        if time.monotonic() > end:
            # A later call begins where the others are.
            store.delete_key(keys[mine])
            raise ProcessError(
                f"{what}: every process that holds a part has to call this, and rank "
                f"{', '.join(map(str, missing))} has ended, or has not called this within the timeout of the "
                "process group (init_process_group(timeout=...)). Call it on every rank, not on the first "
                "alone: that one writes. Else look for the first error of the others, and start all again"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    told = {rank: bytes(store.get(key)).decode() for rank, key in keys.items()} if word else {}
    _calls[place] = number + 1
    if number:
        # All have passed the call before this one.
        store.delete_key(f"{place} {number - 1} {mine}")
    return told


def _holders(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """The ranks of the processes that hold parts of some tensors; none where nothing can be sent."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_backend() == "fake":
        return ()
    meshes: dict[int, Any] = {}
    groups: dict[int, Any] = {}
    for tensor in tensors:
        one: Any = tensor
        if _is_cut(one):
            meshes[id(one.device_mesh)] = one.device_mesh
        elif hasattr(one, "ds_process_group"):  # of DeepSpeed's ZeRO-3
            groups[id(one.ds_process_group)] = one.ds_process_group
    found = {rank for mesh in meshes.values() for rank in mesh.mesh.flatten().tolist()}
    found |= {rank for one in groups.values() for rank in dist.get_process_group_ranks(one)}
    return tuple(sorted(found))


def _is_cut(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "device_mesh")


def note_whole(module: nn.Module, name: str, value: Any) -> None:
    """Notes what a factor was when it is cut into parts (``fully_shard``), for :func:`check_equal`.

    Args:
        module: Holds the factor.
        name: The factor's.
        value: What is about to take its place.
    """
    if not _is_cut(value):
        return
    whole = module._parameters.get(name)
    notes = vars(module).setdefault(_NOTES, {})
    if whole is None or name in notes or _is_cut(whole):
        return
    notes[name] = (_digest(whole), value, _version(value))


def _digest(whole: torch.Tensor) -> str:
    found = hashlib.blake2b(f"{list(whole.shape)} {whole.dtype}".encode(), digest_size=8)
    try:
        values = whole.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    except (NotImplementedError, RuntimeError):  # on the meta device, or fake: there are none
        return _UNKNOWN
    found.update(values.tobytes())
    return found.hexdigest()


_UNKNOWN = "?"


def _version(value: Any) -> int:
    """How often a tensor was written into: what is done to the whole is not counted for the part."""
    return int(value._version) + int(value._local_tensor._version)


def check_equal(model: nn.Module) -> None:
    """Refuses a model whose factors were not the same in all processes when FSDP2 has cut them, once.

    Each process has kept its part of its own, and all of them would train a mixture. Factors that were
    written into since are taken for equal, and so are those that had no values.

    Raises:
        ConfigError: In every process, with the first factor that differs.
        ProcessError: If a process does not come here.
    """
    noted = list(_noted(model))
    if not noted:
        return
    mine = {
        name: digest if _version(value) == version else _UNKNOWN
        for name, (digest, value, version) in noted
    }
    several = called_by_all(
        (value for _, (_, value, _) in noted), "the first use", json.dumps(mine)
    )
    for module in model.modules():
        # The names stay: a factor that is cut is put in again at each call.
        for name in vars(module).get(_NOTES, ()):
            vars(module)[_NOTES][name] = None
    told = {rank: json.loads(word) for rank, word in several.items()}
    first = min(told, default=0)
    for rank, theirs in told.items():
        for name in (*told[first], *theirs):
            pair = told[first].get(name), theirs.get(name)
            if pair[0] != pair[1] and _UNKNOWN not in pair:
                raise ConfigError(
                    f"{name}: on rank {rank} it was another one than on rank {first} when fully_shard cut "
                    "it, so that what is trained would be a mixture: give every process the same "
                    "configuration, and load the same folder"
                )


def _noted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for fqn, module in model.named_modules():
        for name, note in vars(module).get(_NOTES, {}).items():
            if note is not None:
                yield f"{fqn}.{name}", note
