"""Train adapters with Ray Train, in the same loop on a laptop and on a cluster. Each worker has a model.

By default two workers on the CPU of this machine train a tiny model. On a cluster, with your own model in a
folder that every node can read::

    python examples/ray_train.py --address auto --workers 16 --model FOLDER --storage s3://BUCKET/runs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_fx

TOKENS = 64


def build(folder: str | None) -> nn.Module:
    """Load a language model from a folder, or make a tiny one. It is the same on every worker."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, initializer_range=0.1, **sizes, **heads))


def work(options: dict[str, Any]) -> None:
    """Train the model in one worker, and report the losses. The first worker also reports the adapter."""
    model = lora_fx.rewrite(build(options["model"]), lora_fx.LoraConfig(r=8, lora_alpha=16))
    wrapped = prepare_model(model)  # DistributedDataParallel, if there are several workers
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-2)
    rank = train.get_context().get_world_rank()
    torch.manual_seed(rank)
    first = None
    for _ in range(options["steps"]):
        starts = torch.randint(TOKENS, (8, 1), device=model.device)
        ids = (starts + 3 * torch.arange(16, device=model.device)) % TOKENS
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    with TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:  # the adapter is the checkpoint
            lora_fx.save_adapter(model, folder)
            checkpoint = train.Checkpoint.from_directory(folder)
        train.report({"first": first, "last": loss.item()}, checkpoint=checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA under Ray Train")
    parser.add_argument("--address", help="a running cluster; without it, one is started here")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", metavar="PLACE", help="where results go; all nodes reach it")
    parser.add_argument("--model", metavar="FOLDER", help="a causal language model")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    local = {} if options.address else {"num_cpus": options.workers, "include_dashboard": False}
    ray.init(address=options.address, log_to_driver=False, **local)
    with TemporaryDirectory() as folder:
        result = TorchTrainer(
            work,
            train_loop_config={"model": options.model, "steps": options.steps},
            scaling_config=train.ScalingConfig(
                num_workers=options.workers,
                use_gpu=torch.cuda.is_available(),
                resources_per_worker=None if torch.cuda.is_available() else {"CPU": 1},
            ),
            run_config=train.RunConfig(storage_path=options.storage or folder),
        ).fit()
        before, after = result.metrics["first"], result.metrics["last"]
        with result.checkpoint.as_directory() as adapter:
            model = lora_fx.load_adapter(build(options.model), Path(adapter))
        state = str(lora_fx.status(model)).splitlines()[0]
    ray.shutdown()
    print(f"{options.workers} workers: loss {before:.3f} -> {after:.3f}")
    print(f"loaded from the checkpoint: {state}")
    if after >= before:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
