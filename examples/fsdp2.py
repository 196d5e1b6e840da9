"""Train adapters with FSDP2 on any number of processes. The blocks of a language model are sharded.

By default the model is tiny and untrained. Without torchrun there is one process. On two processes, and on
two machines::

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/fsdp2.py

The processes share one batch, so that any number of processes trains the same adapter.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_fx

TOKENS = 64


def build(folder: str | None) -> nn.Module:
    """Load a language model from a folder, or make a tiny one. It is the same on every process."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, initializer_range=0.1, **sizes, **heads))


def join() -> torch.device:
    """Join the process group of torchrun, or a group of this process alone. Return the device to train on."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA under FSDP2")
    parser.add_argument("--model", metavar="FOLDER", help="a causal language model")
    parser.add_argument("--out", metavar="FOLDER", help="where each machine saves the adapter")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="samples of all processes in a step")
    options = parser.parse_args()

    device = join()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.batch % ranks:
        raise SystemExit(f"--batch {options.batch} is no multiple of the {ranks} processes")
    base = build(options.model).to(device)
    # Rewrite first, then shard. The factors are then sharded together with the weights of their block.
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16, seed=0))
    mesh = init_device_mesh(device.type, (ranks,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-2)
    losses = []
    model.train()
    for step in range(options.steps):
        # All processes draw the same batch, and each takes its share of the samples.
        seeded = torch.Generator().manual_seed(step)
        starts = torch.randint(TOKENS, (options.batch, 1), generator=seeded)
        ids = (starts.chunk(ranks)[rank] + 3 * torch.arange(16)).to(device) % TOKENS
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / ranks)

    with TemporaryDirectory() as temporary:
        # Every process must save, because saving gathers the shards. The folder of the first process on each
        # machine is kept.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        keep = options.out if options.out and first else temporary
        folder = Path(keep, "adapter")
        lora_fx.save_adapter(model, folder)
        probe = torch.arange(12, device=device).view(1, 12)
        sharded = model.eval()(input_ids=probe).logits.detach()
        dist.barrier()
        if rank == 0:
            alone = lora_fx.load_adapter(build(options.model).to(device), folder).eval()
            torch.testing.assert_close(alone(input_ids=probe).logits, sharded, rtol=1e-4, atol=1e-4)
            print(
                f"{ranks} process(es): loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
                "the saved adapter on one process computes the same"
            )
    dist.barrier()
    dist.destroy_process_group()
    if losses[-1] >= losses[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
