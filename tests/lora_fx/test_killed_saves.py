"""A process that is killed while it saves leaves the adapter that was there, or the new one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.kills import killed, torn
from tests.numerics import assert_same_bits
from tests.zoo import Residual, seeded

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
IDS = torch.arange(12).view(3, 4) % 11
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


base = seeded(Residual)


def adapted(rank: int) -> nn.Module:
    # A scale of its own, which is in the configuration alone.
    config = LoraConfig(r=rank, lora_alpha=rank**2, target_modules=["up", "down"])
    return randomize(lora_fx.rewrite(base(), config), std=0.1 * rank)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {**lora_fx.adapter_state_dict(model), "output": model.eval()(IDS)}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return state(lora_fx.load_adapter(base(), folder))


def is_one_of(found: dict[str, torch.Tensor], *models: nn.Module) -> int:
    """Which of the models it is, whole."""
    for place, model in enumerate(models):
        wanted = {name: value for name, value in state(model).items() if name in found}
        if found.keys() == wanted.keys() and all(
            torch.equal(found[name], value) for name, value in wanted.items()
        ):
            return place
    raise AssertionError("neither the adapter that was there nor the new one")


@pytest.mark.parametrize("rank", [2, 3], ids=["the same shapes", "other shapes"])
def test_an_adapter_is_the_old_or_the_new_one(rank: int, tmp_path: Path) -> None:
    old, new, seen = adapted(2), randomize(adapted(rank), std=0.7), []
    folder = tmp_path / "adapter"
    lora_fx.save_adapter(old, folder)
    for _ in killed(lambda: _save(new, folder), folder):
        seen.append(is_one_of(loaded(folder), old, new))
        # Over what it has left behind the old one can be saved again.
        lora_fx.save_adapter(old, folder, force=True)
        assert is_one_of(loaded(folder), old, new) == 0
        shutil.rmtree(folder)
        lora_fx.save_adapter(old, folder)
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_a_first_save_is_there_or_is_not(tmp_path: Path) -> None:
    model, there = adapted(2), []
    for step in killed(lambda: _save(model, tmp_path / str(len(there))), tmp_path):
        folder = tmp_path / str(len(there))
        try:
            found = loaded(folder)
        except lora_fx.CheckpointError:
            there.append(False)
        else:
            assert_same_bits(found, state(model))
            there.append(True)
        assert step + 1 == len(there)
    assert there == sorted(there)
    assert set(there) == {False, True}


def test_torn_tensors_are_not_seen(tmp_path: Path) -> None:
    old, new = adapted(2), adapted(3)
    lora_fx.save_adapter(old, tmp_path)
    torn(lambda: _save(new, tmp_path), 0)
    assert_same_bits(loaded(tmp_path), state(old))


def test_every_reader_sees_one_adapter_where_the_configuration_is_the_same(tmp_path: Path) -> None:
    peft_reads = _plain(tmp_path)
    old, new = adapted(2), randomize(adapted(2), std=0.7)
    lora_fx.save_adapter(old, tmp_path)
    before = peft_reads()
    for _ in killed(lambda: _save(new, tmp_path), tmp_path):
        assert peft_reads()[CONFIG] == before[CONFIG]
        found = _tensors(tmp_path)
        assert found.keys() == state(old).keys() - {"output"}
        assert is_one_of(found, old, new) in (0, 1)


def test_what_killed_processes_leave_is_deleted_later(tmp_path: Path) -> None:
    model = adapted(2)
    lora_fx.save_adapter(model, tmp_path)
    for _ in killed(lambda: _save(adapted(3), tmp_path), tmp_path):
        pass
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left
    lora_fx.save_adapter(model, tmp_path, force=True)
    assert all(path.exists() for path in left)  # another process may be at work there
    for path in left:
        os.utime(path, (0, 0))
    lora_fx.save_adapter(model, tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    assert_same_bits(loaded(tmp_path), state(model))


def test_later_saves_count_over_what_was_left_behind(tmp_path: Path) -> None:
    """Also where a later configuration is that from before the one that was left behind."""
    old, new = adapted(2), adapted(3)
    lora_fx.save_adapter(old, tmp_path)
    for _ in killed(lambda: _save(new, tmp_path), tmp_path):
        if any(tmp_path.glob(f".placing-*/{CONFIG}")) or any(
            tmp_path.glob(f".placing-*/{WEIGHTS}")
        ):
            break
    assert_same_bits(loaded(tmp_path), state(new))
    assert LoraConfig.from_pretrained(tmp_path).r == 3
    lora_fx.save_adapter(old, tmp_path, force=True)
    assert_same_bits(loaded(tmp_path), state(old))
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["r"] == 2


def _save(model: nn.Module, folder: Path) -> None:
    lora_fx.save_adapter(model, folder, force=True)


def _plain(folder: Path) -> Callable[[], dict[str, bytes]]:
    """What is in the files, for a reader that knows nothing of lora_fx."""
    return lambda: {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)
