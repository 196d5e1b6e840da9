"""What exports that were killed leave behind, and what those at work keep."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_fx.export import staging as ownership
from lora_fx.export.onnx import export_onnx
from lora_fx.export.staging import abandoned, owned

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs flock")

# An export that stops when its file is written and not yet moved.
_EXPORT = """
import sys, time
import torch
from torch import nn
from lora_fx import export_onnx

def stop(stage):
    if stage.startswith("comparing"):
        print("written", flush=True)
        time.sleep(600)

export_onnx(nn.Linear(2, 2), sys.argv[1], torch.randn(2, 2), progress=stop, external_data_bytes=0)
"""


@unix
def test_the_next_export_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    signals = {"term.onnx": signal.SIGTERM, "kill.onnx": signal.SIGKILL}
    command = [sys.executable, "-c", _EXPORT]
    children = {
        name: subprocess.Popen([*command, str(tmp_path / name)], stdout=subprocess.PIPE)
        for name in signals
    }
    try:
        for name, child in children.items():
            assert child.stdout is not None
            assert child.stdout.readline() == b"written\n"
            (folder,) = tmp_path.glob(f".{name}.*")
            written = {file.name: file.read_bytes() for file in folder.iterdir()}
            assert name in written
            export_onnx(nn.Linear(2, 2), tmp_path / name, torch.randn(2, 2))
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == written

            child.send_signal(signals[name])
            assert child.wait(10) == -signals[name]
            assert folder.exists()
            export_onnx(nn.Linear(2, 2), tmp_path / name, torch.randn(2, 2), force=True)
            assert not folder.exists()
        assert {file.name for file in tmp_path.iterdir()} == set(signals)
    finally:
        for child in children.values():
            child.kill()
            child.communicate()


@unix
def test_a_folder_is_never_free_while_its_owner_sets_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = ownership._locks.flock
    seen: list[bool] = []

    def looked_at(file: object, kind: int) -> None:
        if kind == ownership._locks.LOCK_EX:
            monkeypatch.undo()
            seen.append(abandoned(tmp_path))  # what another process would find right now
        flock(file, kind)

    monkeypatch.setattr(ownership._locks, "flock", looked_at)
    with owned(tmp_path):
        seen.append(abandoned(tmp_path))
    assert seen == [False, False]
    assert abandoned(tmp_path)
