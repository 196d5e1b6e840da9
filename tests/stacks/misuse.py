"""What processes say where one of them does something else than the others, or nothing at all."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lora_fx
from tests.algebra import randomize
from tests.stacks.meshes import config, shard
from tests.stacks.models import IDS, llama
from tests.stacks.tensor_parallel import parallelized, said

__all__ = ["RANKS", "TIMEOUT", "left_alone", "misuse"]

RANKS = 2
TIMEOUT = 5.0  # of the process group, in seconds


def cut() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    return parallelized(llama().double(), mesh)


def sharded() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return shard(lora_fx.rewrite(llama(), config({})), init_device_mesh("cpu", (RANKS,)))


def mixed(place: int, **options: Any) -> Any:
    """Is given something else in each process, and cut then."""
    from torch.distributed.device_mesh import init_device_mesh

    model = lora_fx.rewrite(llama(), config(options))
    if place:
        randomize(model)
    return shard(model, init_device_mesh("cpu", (RANKS,)))


@torch.no_grad()
def zeroed(model: Any) -> Any:
    """Has the same values everywhere again."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.zero_()
    return model


def misuse(rank: int, folder: str) -> dict[str, str]:
    """Verbs that are given something else in each process."""
    late, loading = sharded(), lora_fx.rewrite(cut(), config({}))
    targets = [["q_proj"], ["q_proj", "v_proj"]][rank]
    found = {
        "another rank": said(lambda: lora_fx.rewrite(cut(), config({"r": 2 + rank}))),
        "other layers": said(lambda: lora_fx.rewrite(cut(), config({"target_modules": targets}))),
        "another folder": said(lambda: lora_fx.load_adapter(cut(), Path(folder) / f"{rank}")),
        "loaded again": said(lambda: lora_fx.load_adapter(loading, Path(folder) / f"{rank}")),
        "added later": said(lambda: lora_fx.add_adapter(late, config({"r": 2 + rank}), "late")),
        "cut, other values": said(lambda: mixed(rank)(IDS)),
        "cut, written since": said(lambda: zeroed(mixed(rank))(IDS)),
        "cut, other ranks": said(lambda: mixed(0, r=2 + rank)(IDS)),
        "saved, other values": said(
            lambda: lora_fx.save_adapter(mixed(rank), Path(folder) / "mixed")
        ),
        "merged, other layers": said(lambda: lora_fx.merge(mixed(0, target_modules=targets))),
        "the same": said(lambda: lora_fx.rewrite(cut(), config({}))),
    }
    # What was refused is not there.
    found["adapters"] = " ".join(one.name for one in lora_fx.status(late).adapters)
    return found


def left_alone(rank: int, folder: str, how: str) -> None:
    """One process ends, comes too late or does something else; the other one writes what it is told.

    Also after how long.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting {how}",
        rank=rank,
        world_size=RANKS,
        timeout=dt.timedelta(seconds=TIMEOUT),
    )
    verbs = {
        "merge": lambda: lora_fx.merge(model),
        "save": lambda: lora_fx.save_adapter(model, Path(folder) / "out"),
        "rewrite": lambda: lora_fx.rewrite(base, config({})),
    }
    model, base = sharded(), cut()
    dist.barrier()
    if rank == 1:
        if how == "elsewhere":
            # What it sends is for a forward, and would be taken for something else.
            with contextlib.suppress(RuntimeError):
                model(IDS)
        time.sleep(0 if how == "ended" else 4 * TIMEOUT)
        os._exit(0)
    found = {}
    for name, verb in verbs.items():
        begun = time.monotonic()
        found[name] = (said(verb), time.monotonic() - begun)
    torch.save(found, Path(folder) / f"{how}.pt")
    os._exit(0)  # without the other one there is nothing to say goodbye to
