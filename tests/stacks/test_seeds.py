"""Processes whose generators have different seeds have the factors of the first one."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import lora_fx
from tests.numerics import assert_same_bits

RANKS = 2


def run_rank(rank: int, folder: str) -> None:
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    torch.manual_seed(rank)
    config = lora_fx.LoraConfig(r=2, init_lora_weights=False)
    model = lora_fx.rewrite(base, config)
    lora_fx.add_adapter(model, config, "other")
    if rank == 0:
        # One process alone does not wait for the others.
        lora_fx.save_adapter(model, Path(folder) / "adapter", "other")
        lora_fx.load_adapter(base, Path(folder) / "adapter" / "other")
    torch.save(dict(model.state_dict()), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_each_process_has_the_factors_of_the_first(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), RANKS)
    # As accelerate seeds them with device_specific=True.
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert_same_bits(first, second)


def left_alone(rank: int, folder: str) -> None:
    meeting, joined = f"file://{folder}/meeting", Path(folder, "joined")
    limit = dt.timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=limit)
    if rank == 0:
        # A process that leaves while another one still connects ends that one, too.
        while not joined.exists():
            time.sleep(0.05)
    else:
        joined.touch()
        try:
            lora_fx.rewrite(
                nn.Sequential(nn.Linear(4, 4)), lora_fx.LoraConfig(target_modules=["0"])
            )
        except lora_fx.ProcessError as error:
            Path(folder, "said").write_text(str(error))
        seeded = lora_fx.LoraConfig(target_modules=["0"], seed=1)
        lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4)), seeded)  # waits for nobody
    os._exit(0)


def test_a_process_whose_first_one_does_not_come_is_told_so(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(left_alone, (str(tmp_path),), RANKS)
    said = (tmp_path / "said").read_text()
    assert "LoraConfig(seed=...)" in said
