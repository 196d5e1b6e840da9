"""Every example runs as it stands, in a process of its own; those of a stack where it is installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.numerics import assert_close, assert_same_bits

EXAMPLES = Path(__file__).parents[2] / "examples"
# What an example needs that is in no extra of the tests.
NEEDS = {"export_and_serve": "fastapi", "ray_train": "ray"}
# What each of them does, in docs/integrations.md.
DOES = {
    "diffusers_unet": ("diffusers", "train", "save", "merge"),
    "ray_train": ("Ray Train", "train", "save"),
    "sentence_transformers_embedding": ("sentence-transformers", "train", "save"),
    "vit_timm": ("timm", "train", "merge"),
}


def run(script: str, folder: Path, *before: str, after: tuple[str, ...] = ()) -> str:
    path = str(EXAMPLES / f"{script}.py")
    ran = subprocess.run(
        [sys.executable, *before, path, *after],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def case(name: str) -> object:
    marks = [pytest.mark.feature(*DOES[name])] if name in DOES else []
    if name in NEEDS:
        reason = f"{NEEDS[name]} is not installed"
        missing = pytest.mark.skipif(find_spec(NEEDS[name]) is None, reason=reason)
        marks += [pytest.mark.stack, missing]
    return pytest.param(name, id=name, marks=marks)


@pytest.mark.parametrize("name", [case(path.stem) for path in sorted(EXAMPLES.glob("*.py"))])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path)


TORCHRUN = ("-m", "torch.distributed.run")
SHARED = [
    pytest.param(
        "fsdp2", "2 process(es): loss", marks=pytest.mark.feature("FSDP2", "train", "save")
    ),
    pytest.param(
        "tensor_parallel",
        "2 process(es), 2 for each layer: loss",
        marks=pytest.mark.feature("tensor parallel", "train", "save", "merge", "DoRA"),
    ),
]


@pytest.mark.parametrize(("name", "says"), SHARED)
def test_processes_share_a_model(name: str, says: str, tmp_path: Path) -> None:
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    printed = run(name, tmp_path, *torchrun, after=("--out", str(tmp_path / "out")))
    assert says in printed
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.feature("FSDP2", "several machines")
def test_two_machines_train_what_one_process_trains(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"

    def start(node: int) -> str:
        meeting = ("--rdzv-backend", "static", "--rdzv-endpoint", endpoint)
        group = ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *meeting)
        return run("fsdp2", tmp_path, *TORCHRUN, *group, after=out(f"node {node}"))

    def out(folder: str) -> tuple[str, ...]:
        return ("--steps", "4", "--out", str(tmp_path / folder))

    with ThreadPoolExecutor() as machines:
        printed = list(machines.map(start, range(2)))
    assert "2 process(es): loss" in printed[0]
    run("fsdp2", tmp_path, after=out("alone"))
    alone = adapter(tmp_path / "alone")
    assert alone
    assert_same_bits(adapter(tmp_path / "node 1"), adapter(tmp_path / "node 0"))
    assert_close(adapter(tmp_path / "node 0"), alone, 1e-4)


TRL = [
    pytest.param("dpo", "TRL:", marks=pytest.mark.feature("TRL DPO", "train")),
    pytest.param("grpo", "TRL:", marks=pytest.mark.feature("TRL GRPO", "train")),
    pytest.param("llama_sft", "SFTTrainer:", marks=pytest.mark.feature("TRL SFT", "save")),
]


@pytest.mark.stack
@pytest.mark.parametrize(("name", "says"), TRL)
def test_trl_does_it_where_it_is_installed(name: str, says: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    assert says in run(name, tmp_path)


@pytest.mark.stack
def test_each_request_gets_the_adapter_that_it_names(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    printed = run("export_and_serve", tmp_path).splitlines()
    assert printed[2:4] == ["has seven: [1, 0]", "has nine: [0, 1]"]
    assert printed[5].startswith("unknown: 404")
    assert printed[6].startswith("has seven: 404")
