"""What gloo processes do with models that tensor parallelism has cut: each writes what it found."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir import Site
from lora_fx.kinds import AdapterKind, Slot
from tests.algebra import randomize
from tests.stacks.models import IDS, llama

__all__ = [
    "CASES",
    "FOLDERS",
    "TARGETS",
    "alone",
    "filled",
    "gathered",
    "parallelized",
    "run_rank",
    "said",
    "sent",
    "step",
    "whole",
    "with_samples",
    "with_two",
]

Case = dict[str, Any]

# The style of tensor parallelism, and options of the configuration.
CASES: dict[str, Case] = {
    "torch": {"style": "torch"},
    "torch, canonical": {"style": "torch", "optimize": False},
    "torch, dropout": {"style": "torch", "lora_dropout": 0.5},
    "torch, biases": {"style": "torch", "biases": True},
    "torch, pissa": {"style": "torch", "init_lora_weights": "pissa"},
    "torch, dora": {"style": "torch", "use_dora": True},
    "torch, dora and biases": {
        "style": "torch",
        "biases": True,
        "use_dora": True,
        "lora_dropout": 0.5,
    },
    "torch, bias of B": {"style": "torch", "biases": True, "lora_bias": True},
    "torch, all biases": {"style": "torch", "biases": True, "bias": "all"},
    "torch, dora and all biases": {
        "style": "torch",
        "biases": True,
        "use_dora": True,
        "bias": "lora_only",
    },
    "transformers": {"style": "transformers"},
    "transformers, dora": {"style": "transformers", "use_dora": True},
    "transformers, dora and biases": {"style": "transformers", "biases": True, "use_dora": True},
    "transformers, bias of B": {"style": "transformers", "biases": True, "lora_bias": True},
    "transformers, all biases": {"style": "transformers", "biases": True, "bias": "all"},
    "transformers, dropout": {"style": "transformers", "lora_dropout": 0.5},
}
# Adapters of which folders are written and read.
FOLDERS: dict[str, Case] = {
    "torch": {"style": "torch"},
    "torch, dora": {"style": "torch", "use_dora": True, "biases": True},
    "torch, bias of B": {"style": "torch", "lora_bias": True, "biases": True},
    "transformers": {"style": "transformers"},
    "transformers, dora": {"style": "transformers", "use_dora": True, "biases": True},
}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
_COLWISE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
_ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


_NOT_OPTIONS = ("style", "optimize", "biases")


def config(case: Case) -> LoraConfig:
    options = {key: value for key, value in case.items() if key not in _NOT_OPTIONS}
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "seed": 0, **options})


def parallelized(model: Any, mesh: Any) -> Any:
    """A Llama, cut by PyTorch's own styles."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {}
    for name, _ in model.named_modules():
        if name.endswith(_COLWISE):
            plan[name] = ColwiseParallel()
        elif name.endswith(_ROWWISE):
            plan[name] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def base(case: Case, folder: str) -> Any:
    """The base in fp64, cut over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    if case["style"] == "transformers":
        options = DistributedConfig(tp_size=dist.get_world_size())
        model = LlamaForCausalLM.from_pretrained(
            Path(folder) / ("base with biases" if case.get("biases") else "base"),
            distributed_config=options,
            dtype=torch.float64,
        )
        return model.eval()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelized(whole(case), mesh)


def build(case: Case, model: nn.Module) -> Any:
    """A cut model with an adapter whose values are those of :func:`alone`."""
    adapted = lora_fx.rewrite(model, config(case), optimize=case.get("optimize", True))
    return filled(adapted, alone(case))


def alone(case: Case) -> Any:
    """The model of one process, with an adapter that changes its outputs."""
    optimize = case.get("optimize", True)
    return randomize(lora_fx.rewrite(whole(case), config(case), optimize=optimize))


def whole(case: Case) -> Any:
    """The base of one process, in fp64."""
    if not case.get("biases"):
        return llama().double()
    model = llama(attention_bias=True, mlp_bias=True).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return model


def filled(model: nn.Module, source: nn.Module) -> Any:
    """Writes the adapter of another model into the parts of a model that processes hold."""
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" not in name:
                continue
            new: Any = source.get_parameter(name).detach()
            if hasattr(value, "full_tensor"):
                place: Any = value
                new = distribute_tensor(
                    new, place.device_mesh, place.placements, src_data_rank=None
                )
            value.copy_(new)
    return model


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    found: Any = tensor.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def step(
    model: Any, seed: int = 0, ids: torch.Tensor = IDS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step, and the gradients."""
    model.train()
    torch.manual_seed(seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {name: gathered(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return loss.detach(), found


def placements(model: nn.Module) -> dict[str, str]:
    return {
        name: str(getattr(p, "placements", None))
        for name, p in model.named_parameters()
        if "lora_" in name
    }


def counted(model: Any) -> dict[str, int]:
    """The collectives of a forward."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        model(IDS)
    return {str(name): count for name, count in mode.get_comm_counts().items()}


def sent(case: Case, before: dict[str, int]) -> dict[str, int]:
    """The collectives of a forward with an adapter, from those of the base.

    The norms of DoRA are sums over the inputs: one vector for each layer that is cut along them.
    """
    if not case.get("use_dora"):
        return before
    name = next(key for key in before if "all_reduce" in key)
    rowwise = [one for one in TARGETS if one in ("o_proj", "down_proj")]
    return {**before, name: before[name] + len(rowwise) * whole(case).config.num_hidden_layers}


def trained(case: Case, folder: str) -> dict[str, Any]:
    model = base(case, folder)
    calls = counted(model)
    adapted = build(case, model)
    loss, gradients = step(adapted)
    with torch.no_grad():
        logits = gathered(adapted(IDS).logits)
    with lora_fx.disable_adapter(adapted), torch.no_grad():
        off = gathered(adapted(IDS).logits)
    return {
        "calls": (calls, counted(adapted)),
        "loss": loss,
        "gradients": gradients,
        "placements": placements(adapted),
        "logits": logits,
        "off": off,
        "untouched": gathered(model(IDS).logits.detach()),
        "state": lora_fx.adapter_state_dict(adapted),
    }


def said(verb: Callable[[], Any]) -> str:
    """What a verb refuses, in words."""
    try:
        verb()
    except lora_fx.LoraFxError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def saved_and_loaded(name: str, folder: str, rank: int) -> dict[str, Any]:
    """A folder of a cut model, and of one process, loaded into a cut model; and merges."""
    case = FOLDERS[name]
    model = build(case, base(case, folder))
    lora_fx.save_adapter(model, Path(folder) / f"{name} {rank}")
    loaded = lora_fx.load_adapter(base(case, folder), Path(folder) / f"one process, {name}")
    merged = lora_fx.merge(model)
    with torch.no_grad():
        found = {
            "loaded": gathered(loaded(IDS).logits),
            "merged": gathered(merged(IDS).logits),
            "weight": gathered(merged.model.layers[0].mlp.up_proj.weight),
            "placements": str(merged.model.layers[0].mlp.up_proj.weight.placements),
        }
    sample = lora_fx.rewrite(base(case, folder), config(case), (IDS,))
    return {
        **found,
        "class": type(merged).__name__,
        "with inputs": gathered(sample(IDS).logits.detach()),
        "check": said(lambda: lora_fx.check(model, (IDS,))),
        "two": gathered(with_two(model, case)),
        "samples": gathered(with_samples(model)),
    }


def with_two(model: Any, case: Case) -> torch.Tensor:
    """Outputs with another adapter, which is added now, and the first one."""
    lora_fx.add_adapter(model, config({**case, "r": 3, "init_lora_weights": False}), "second")
    lora_fx.set_adapter(model, ["default", "second"])
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def with_samples(model: Any) -> torch.Tensor:
    """Outputs where each sample has its own adapter."""
    with lora_fx.adapter_ids(model, ["second", "default"]):
        logits: torch.Tensor = model(IDS).logits
    return logits.detach()


class Elsewhere(AdapterKind):
    """Somebody's own kind, which says nothing of parts."""

    name = "elsewhere"
    low_rank = False
    transforms = True
    keys = ("elsewhere",)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        return (Slot("elsewhere", "elsewhere", (site.out_features,), "a vector", neutral=1.0),)


def refusals(folder: str) -> dict[str, str]:
    lora_fx.register_adapter_kind(Elsewhere())
    plain: Case = {"style": "torch"}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    uneven = parallelized(llama(intermediate_size=25), mesh)
    cut = base(plain, folder)
    layer = lora_fx.rewrite(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    return {
        "rowwise, afterwards": said(
            lambda: parallelize_module(layer, mesh, {"0": RowwiseParallel()})
        ),
        "parallelized afterwards": said(lambda: parallelized(build(plain, llama().double()), mesh)),
        "another kind": said(lambda: lora_fx.rewrite(cut, LoraConfig(r=2, kind="elsewhere"))),
        "uneven": said(
            lambda: lora_fx.rewrite(uneven, LoraConfig(r=2, target_modules=["up_proj"]))
        ),
    }


def run(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(case, folder) for name, case in CASES.items()}
    for name in FOLDERS:
        found[f"folders, {name}"] = saved_and_loaded(name, folder, rank)
    found["refused"] = refusals(folder)
    return found


def run_rank(rank: int, folder: str, ranks: int, work: Callable[[int, str], Any] = run) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting {ranks} {work.__name__}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    try:
        torch.save(work(rank, folder), Path(folder) / f"{work.__name__} {ranks} {rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
