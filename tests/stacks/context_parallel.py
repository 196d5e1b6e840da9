"""What gloo processes do with models of which each has a part of every sequence.

PyTorch's ring of attention has no CPU kernel, so that ``context_parallel`` fails there for any model. The
processes register the CPU's flash attention. Patches, shards, the ring and its communication are PyTorch's.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from tests.algebra import randomize
from tests.docs.pages import ROOT, blocks
from tests.stacks.models import llama
from tests.stacks.tensor_parallel import gathered
from tests.zoo import seeded

__all__ = [
    "CASES",
    "GRAPHS",
    "TRAINERS",
    "VERBS",
    "attention_step",
    "base_loss",
    "trained",
    "training_step",
    "work",
]

# Options of `rewrite`, of the configuration, of the base, and how activations are checkpointed.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "canonical": {"rewrite": {"optimize": False}},
    "balanced": {"rewrite": {"memory": "balanced"}},
    "least": {"rewrite": {"memory": "least"}},
    "chunked": {"rewrite": {"loss": "chunked"}},
    "balanced, chunked": {"rewrite": {"memory": "balanced", "loss": "chunked"}},
    "checkpoints": {"checkpoints": "non-reentrant"},
    "checkpoints, reentrant": {"checkpoints": "reentrant"},
    "checkpoints, balanced, chunked": {
        "rewrite": {"memory": "balanced", "loss": "chunked"},
        "checkpoints": "non-reentrant",
    },
    "dora": {"config": {"use_dora": True}},
    "grouped heads": {"base": {"num_key_value_heads": 2}},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "default": {},
    "balanced, chunked": {"memory": "balanced", "loss": "chunked"},
}
IDS = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(32) < 5, -100, IDS)  # a prompt, which one process has as a whole


@cache
def guide() -> dict[str, Any]:
    """The names that the guide's code defines for a model."""
    page = (ROOT / "docs" / "guides" / "processes.md").read_text(encoding="utf-8")
    (code,) = (block.text for block in blocks(page) if "import context_parallel" in block.text)
    names: dict[str, Any] = {"torch": torch, "model": llama()}
    exec(compile(code, "docs/guides/processes.md", "exec"), names)
    return names


def base(case: str) -> Any:
    """A Llama in fp64 whose layers make no mask."""
    model = llama(**CASES[case].get("base", {})).double()
    guide()
    model.set_attn_implementation("sdpa_without_mask")
    return model


def build(case: str) -> Any:
    """The base with an adapter that changes its outputs, on all of its linear layers."""
    options = CASES[case]
    config = LoraConfig(r=2, target_modules="all-linear", **options.get("config", {}))
    model = randomize(lora_fx.rewrite(base(case), config, **options.get("rewrite", {})))
    if "checkpoints" in options:
        reentrant = options["checkpoints"] == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def gradients(model: nn.Module, mesh: Any) -> dict[str, Tensor]:
    """The gradients, averaged over the processes unless FSDP2 has done that."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: mean(grad, mesh) for name, grad in grads.items()}


def mean(value: Tensor, mesh: Any) -> Tensor:
    whole = gathered(value).clone()
    if mesh is not None and not hasattr(value, "full_tensor"):
        dist.all_reduce(whole)
        whole /= mesh.size()
    return whole


def total(loss: Tensor) -> Tensor:
    """The sum of the losses of all parts."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss


def alone(model: Any) -> Tensor:
    """The loss of one process, which shifts the labels itself."""
    loss: Tensor = model.train()(input_ids=IDS, labels=LABELS).loss
    return loss


def training_step(case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients in one process."""
    model = build(case)
    loss = alone(model)
    loss.backward()
    return loss.detach(), gradients(model, None)


def base_loss(case: str) -> Tensor:
    """The loss of the base in one process."""
    return alone(base(case)).detach()


def step_in_parts(case: str, mesh: Any, *, sharded: bool) -> dict[str, Any]:
    """The same over all processes, and the loss with the adapter disabled."""
    from torch.distributed.fsdp import fully_shard

    model = build(case)
    for unit in (*model.model.layers, model) if sharded else ():
        fully_shard(unit, mesh=mesh)
    step = guide()["training_step"]
    loss = total(step(model.train(), mesh, IDS, LABELS))
    result = {"loss": loss, "gradients": gradients(model, mesh)}
    if not sharded:
        # The embedding requires a gradient, so that there is a backward.
        with lora_fx.disable_adapter(model):
            model.get_input_embeddings().weight.requires_grad_()
            result["base"] = total(step(model, mesh, IDS, LABELS))
    return result


# --- modules with a graph that calls the attention ----------------------------------------------------------


class Attention(nn.Module):
    """Attention whose weight is a parameter of the module that computes it. A graph runs all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(48, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = F.linear(x, self.qkv).unflatten(-1, (3, 4, 4)).movedim(-3, 0).transpose(2, 3)
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """PyTorch's own attention, which lora-fx writes out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        out, _ = self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        return x + out


GRAPHS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "graph": (Attention, {"target_parameters": ["qkv"]}),
    "MultiheadAttention": (Layer, {"target_modules": "all-linear"}),
}
Verb = Callable[[Any, str], Any]


def add(model: Any, graph: str) -> Any:
    second = LoraConfig(r=3, init_lora_weights=False, seed=1, **GRAPHS[graph][1])
    lora_fx.add_adapter(model, second, "second")
    lora_fx.set_adapter(model, ["default", "second"])
    return model


def rewritten(model: Any, graph: str) -> Any:
    return randomize(lora_fx.rewrite(stack(graph), LoraConfig(r=2, **GRAPHS[graph][1])))


def pickled(model: Any, graph: str) -> Any:
    return pickle.loads(pickle.dumps(model))


def merged(model: Any, graph: str) -> Any:
    return lora_fx.merge(model)


def copied(model: Any, graph: str) -> Any:
    return copy.deepcopy(model)


def unchanged(model: Any, graph: str) -> Any:
    return model


# What is done while the attention is patched.
VERBS: dict[str, Verb] = {
    "call": unchanged,
    "two adapters": add,
    "rows": add,
    "disabled": unchanged,
    "rewrite": rewritten,
    "pickle": pickled,
    "copy": copied,
    "merge": merged,
}
X = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@seeded
def stack(graph: str) -> nn.Module:
    make, _ = GRAPHS[graph]
    return nn.Sequential(make(), nn.Linear(16, 16), make()).double()


def inside(verb: str, model: Any) -> contextlib.AbstractContextManager[Any]:
    if verb == "rows":
        return lora_fx.adapter_ids(model, ["second", "default"])
    return lora_fx.disable_adapter(model) if verb == "disabled" else contextlib.nullcontext()


def attention_step(graph: str, verb: str, mesh: Any = None) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the linear layer in between, in one process or in several."""
    model, x = rewritten(None, graph), X.clone()
    with parts(mesh, x):
        model = VERBS[verb](model, graph)
        with inside(verb, model):
            weight = model[1].weight
            weight = weight if type(weight) is nn.Parameter else model.get_parameter("1.weight")
            weight.requires_grad_()
            loss = model(x).square().sum()
            loss.backward()
    grad = weight.grad.clone()
    if mesh is not None:
        dist.all_reduce(grad)
        loss = total(loss)
    return loss.detach(), grad


@contextlib.contextmanager
def parts(mesh: Any, *buffers: Tensor) -> Iterator[None]:
    from torch.distributed.tensor.experimental import context_parallel

    if mesh is None:
        yield
        return
    lists = {"buffers": [*buffers], "buffer_seq_dims": [1] * len(buffers)}
    with context_parallel(mesh, **lists, no_restore_buffers={*buffers}):
        yield


def rewritten_inside(mesh: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of a model that was rewritten while the attention is patched."""
    with parts(mesh, IDS.clone()):
        model = build("balanced")
    loss = total(guide()["training_step"](model.train(), mesh, IDS, LABELS))
    return loss, gradients(model, mesh)


# --- the Trainer --------------------------------------------------------------------------------------------


def trained(options: dict[str, Any], folder: Path, ranks: int = 1) -> tuple[list[float], Any]:
    """The losses of the Trainer, and the adapter that it has trained."""
    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=2, target_modules="all-linear")
    model = randomize(lora_fx.rewrite(llama(), config, **options))
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=ParallelismConfig(cp_size=ranks) if ranks > 1 else None,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, lora_fx.adapter_state_dict(model)


def trained_in_parts(options: dict[str, Any], folder: Path) -> tuple[list[float], Any]:
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState

    # It admits accelerators only. All else that it does with context parallelism runs on the CPU.
    ParallelismConfig._validate_accelerator = lambda *_: None
    AcceleratorState._reset_state(reset_partial_state=True)
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    return trained(options, folder, dist.get_world_size())


# --- the ring -----------------------------------------------------------------------------------------------


def error_without_kernel(mesh: Any) -> str:
    """What PyTorch says of its own attention on the CPU."""
    x = torch.randn(2, 4, 32, 8)
    with parts(mesh, heads := x.transpose(1, 2).clone()):
        q = heads.transpose(1, 2)
        try:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
        except NotImplementedError as error:
            return str(error)
    return ""


def register_kernel() -> None:
    """Let the ring compute its steps with the CPU's flash attention, and merge them in fp64."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def handle(function: Any, args: Any, kwargs: Any) -> Any:
        names = [argument.name for argument in function._schema.arguments]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        mesh = inputs["query"].device_mesh
        local = {
            name: value._local_tensor if isinstance(value, DTensor) else value
            for name, value in inputs.items()
        }
        if local.pop("attn_mask", None) is not None:
            raise NotImplementedError("a mask is not supported")
        group = mesh.get_group()
        if function is forward:
            outputs = ring._templated_ring_attention(group, 2, forward, **local)
        else:
            named = {"grad_out_name": "grad_out", **local}
            outputs = ring._templated_ring_attention_backward(group, 2, backward, **named)
        return tuple(DTensor.from_local(out, mesh, [Shard(2)], run_check=False) for out in outputs)

    ring.custom_ops.update({forward: handle, backward: handle})
    ring._cp_options.convert_to_f32 = False


def work(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    results: dict[str, Any] = {"without kernel": error_without_kernel(mesh)}
    register_kernel()
    for case in CASES:
        for sharded in (False, True):
            results[case, sharded] = step_in_parts(case, mesh, sharded=sharded)
    for graph in GRAPHS:
        for verb in VERBS:
            results[graph, verb] = attention_step(graph, verb, mesh)
    results["rewritten inside"] = rewritten_inside(mesh)
    for name, options in TRAINERS.items():
        results["Trainer", name] = trained_in_parts(options, Path(folder) / "run")
    return results
