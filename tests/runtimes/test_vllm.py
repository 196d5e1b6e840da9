"""Folders of adapters in vLLM's build for the CPU: its tokens are PyTorch's, and receipts find its faults."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CheckpointError, DeliveryError, LoraConfig
from tests.algebra import randomize
from tests.runtimes.conftest import require

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]

PROMPT = [5, 9, 3, 7]
NEW = 10

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    require("vllm")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def base(folder: Path) -> nn.Module:
    """A Llama whose heads have a size that vLLM's attention takes, saved with a tokenizer of words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
        num_hidden_layers=2,
        max_position_embeddings=64,
        eos_token_id=95,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w95").save_pretrained(folder)
    return model


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    return randomize(lora_fx.rewrite(model, LoraConfig(**{"r": 4, **options})).eval(), 0.1)


def tokens(model: nn.Module) -> list[int]:
    made: Any = model
    out = made.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)
    found: list[int] = out[0, len(PROMPT) :].tolist()
    return found


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}


def test_its_tokens_are_those_of_pytorch(tmp_path: Path, consume: Callable[..., Any]) -> None:
    model = base(tmp_path / "base")
    wanted = {"": tokens(model)}
    folders = {}
    written: dict[str, dict[str, Any]] = {
        "plain": {},
        "patterns": PATTERNS,
        "embedding": {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    }
    for name, options in written.items():
        made = adapted(model, **options)
        wanted[name] = tokens(made)
        folders[name] = str(lora_fx.save_adapter(made, tmp_path / name, format="vllm"))
    made = adapted(model, r=8)
    wanted["peft"] = tokens(made)
    folders["peft"] = str(lora_fx.save_adapter(made, tmp_path / "peft"))
    # What is not written for vLLM, vLLM refuses as well.
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "dora": ({"use_dora": True}, "does not yet support DoRA"),
        "bias": ({"lora_bias": True}, "does not support LoRA bias"),
        "full": ({"modules_to_save": ["lm_head"]}, "supports modules_to_save"),
    }
    for name, (options, _) in refused.items():
        made = adapted(model, **options)
        folders[name] = str(lora_fx.save_adapter(made, tmp_path / name))
        with pytest.raises(CheckpointError, match="vLLM cannot serve this adapter"):
            lora_fx.save_adapter(made, tmp_path / f"{name}-vllm", format="vllm")
    found = consume(
        "vllm",
        "run_vllm.py",
        tmp_path / "base",
        json.dumps(folders),
        json.dumps(PROMPT),
        NEW,
    )
    for name, (_, says) in refused.items():
        assert says in found.pop(name)
    assert found == wanted
    assert len({tuple(one) for one in wanted.values()}) == len(wanted)


@contextmanager
def served(folder: Path, adapters: dict[str, Path], log: Path) -> Iterator[str]:
    """vLLM's server of OpenAI's protocol over a base and its adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(require("vllm") / "bin" / "python"),
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "base", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64"),
        *("--enforce-eager", "--enable-lora", "--max-lora-rank", "16", "--max-num-seqs", "4"),
    ]
    if adapters:
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, env=os.environ
        )
    address = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"{address}/models", timeout=5):
                    break
            except OSError:
                running = server.poll() is None and time.monotonic() < deadline
                assert running, log.read_text(encoding="utf-8")[-3000:]
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


def changed(folder: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of an adapter with other values, as a broken loader would have them."""
    shutil.copytree(folder, target)
    path = target / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    values = {key: change(key, value).contiguous() for key, value in tensors.items()}
    safetensors.torch.save_file(values, path, metadata={"format": "pt"})
    return target


def test_a_receipt_tells_whether_it_serves_the_adapter(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    made = adapted(model, **PATTERNS)
    ids = torch.tensor([PROMPT, [8, 2, 1, 30]])
    folder = lora_fx.save_adapter(made, tmp_path / "maths", format="vllm", receipt=ids)
    faults: dict[str, Callable[[str, Tensor], Tensor]] = {
        "idle": lambda key, value: value * ("lora_B" not in key),
        "twice": lambda key, value: value * (2 if "lora_B" in key else 1),
        "without": lambda key, value: value * ("layers.1.mlp" not in key),
    }
    adapters = {"maths": folder}
    for name, change in faults.items():
        adapters[name] = changed(folder, tmp_path / name, change)
    verdicts = {
        "maths": "applied",
        "idle": "not applied",
        "twice": "applied with another scale",
        "without": "applied otherwise",
    }
    with served(tmp_path / "base", adapters, tmp_path / "log.txt") as address:
        found = {name: lora_fx.verify(folder, address, name=name).verdict for name in verdicts}
    assert found == verdicts


def test_versions_are_delivered_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe has more than a block of tokens, so that it would meet the prefix cache of an old version."""
    model = base(tmp_path / "base")
    made = adapted(model)
    probe = torch.stack([torch.arange(3, 40), torch.arange(40, 3, -1)])
    with served(tmp_path / "base", {}, tmp_path / "off.txt") as address:
        with pytest.raises(DeliveryError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING") as caught:
            lora_fx.sync(made, address, probe=probe)
        assert caught.value.reason == "updates off"
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    with served(tmp_path / "base", {}, tmp_path / "on.txt") as address:
        server = lora_fx.VllmServer(address, directory=tmp_path / "versions")
        for step in (1, 2, 3):
            with torch.no_grad():
                for parameter in lora_fx.trainable_parameters(made):
                    parameter.mul_(0.5 + 0.5 * step)
            options = {"probe": probe, "name": "policy", "version": f"step {step}"}
            receipt = lora_fx.sync(made, server, **options)
            assert receipt.applied
            assert receipt.distance < 1e-4 < receipt.tolerance < receipt.effect
        with pytest.raises(DeliveryError, match="LoRA rank 32 is greater") as caught:
            lora_fx.sync(adapted(model, r=32), server, probe=probe, name="policy")
        assert caught.value.reason == "refused"
        assert lora_fx.sync(made, server, probe=probe, name="policy").applied
