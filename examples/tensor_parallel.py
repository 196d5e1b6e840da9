"""Train adapters of a language model with tensor parallelism, and with FSDP2 in addition.

By default the model is tiny and untrained. Without torchrun there is one process. On two processes, and on
eight processes of which pairs split each layer::

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 8 examples/tensor_parallel.py --tp 2 --model FOLDER
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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_fx

TOKENS = 64
BATCH = 8
# The layers of a block that are split along their outputs, and those that are split along their inputs.
COLWISE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


def build(folder: str | None) -> nn.Module:
    """Load a language model from a folder, or make a tiny one. It is the same on every process."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA under tensor parallelism")
    parser.add_argument("--model", metavar="FOLDER", help="a causal language model, as Llama is")
    parser.add_argument("--out", metavar="FOLDER", help="where the adapter is saved")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tp", type=int, help="processes that hold a layer together; default: all")
    options = parser.parse_args()

    device = join()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    together = options.tp or ranks
    groups = ranks // together
    if groups * together != ranks or BATCH % groups:
        raise SystemExit(f"--tp {together} does not go with {ranks} processes")
    mesh = init_device_mesh(device.type, (groups, together), mesh_dim_names=("fsdp", "tp"))

    # Parallelize, then rewrite, then shard. The factors are then split like the weights.
    base = build(options.model).to(device)
    plan = {name: ColwiseParallel() for name in COLWISE}
    plan |= {name: RowwiseParallel() for name in ROWWISE}
    for block in base.model.layers:
        parallelize_module(block, mesh["tp"], plan)
    torch.manual_seed(0)  # the same starting values everywhere
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16, use_dora=True))
    if groups > 1:
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh["fsdp"])

    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-2)
    losses = []
    model.train()
    for step in range(options.steps):
        # All processes draw the same batch. The processes that split a layer take the same share of it.
        seeded = torch.Generator().manual_seed(step)
        starts = torch.randint(TOKENS, (BATCH, 1), generator=seeded)
        mine = starts.chunk(groups)[mesh.get_local_rank("fsdp")]
        ids = (mine + 3 * torch.arange(16)).to(device) % TOKENS
        loss = whole(model(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)

    factor = model.model.layers[0].mlp.down_proj.lora_A.default
    with TemporaryDirectory() as temporary:
        # Every process must save, because saving gathers the parts. The folder of the first one is kept.
        keep = options.out if options.out and rank == 0 else temporary
        folder = Path(keep, "adapter")
        lora_fx.save_adapter(model, folder)
        probe = torch.arange(12, device=device).view(1, 12)
        merged = lora_fx.merge(model).eval()
        with torch.no_grad():
            cut = whole(merged(input_ids=probe).logits)
        dist.barrier()
        if rank == 0:
            alone = lora_fx.load_adapter(build(options.model).to(device), folder).eval()
            torch.testing.assert_close(alone(input_ids=probe).logits, cut, rtol=1e-4, atol=1e-4)
            print(
                f"{ranks} process(es), {together} for each layer: loss {losses[0]:.3f} -> "
                f"{losses[-1]:.3f}, A of down_proj lies as {factor.placements}; the merged model computes "
                "what the saved adapter does on one process"
            )
    dist.barrier()
    dist.destroy_process_group()
    if losses[-1] >= losses[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
