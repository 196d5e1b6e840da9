"""What two gloo processes do with a sharded model: each case writes what it found, for the tests to judge."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx import LoraConfig
from tests.stacks.models import IDS, adapted, llama

__all__ = ["ADAPTER", "CASES", "RANKS", "base", "build", "drawn", "run_rank"]

RANKS = 2
# What belongs to an adapter, in the name of a parameter.
ADAPTER = re.compile(r"\.lora_|\.token_adapter").search
# A configuration, whether the embedding and the head are units of their own, as accelerate shards them, and
# what is special about the base.
CASES: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "plain": ({"target_modules": ["q_proj"]}, False, {}),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False, {}),
    "modules_to_save in a unit": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        True,
        {},
    ),
    "pissa": ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, False, {}),
    "branches in units": ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, True, {}),
    "parts of two sizes": (
        {"target_modules": ["up_proj"], "use_dora": True},
        False,
        {"intermediate_size": 25, "vocab_size": 65},
    ),
    "tied": (
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        False,
        {"tie_word_embeddings": True},
    ),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
        False,
        {},
    ),
}


def base(case: str) -> Any:
    return llama(**CASES[case][2])


def build(case: str) -> Any:
    model = adapted(LoraConfig(r=2, **CASES[case][0]), base(case))
    if "modules_to_save" in CASES[case][0]:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    return model


def shard(model: Any, ends: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    units = [*model.model.layers, *((model.model.embed_tokens, model.lm_head) if ends else ())]
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    return model


def switch(case: str) -> dict[str, Any]:
    """Outputs with the adapter and without, before and after each switch."""
    model = shard(build(case), CASES[case][1])
    found = {"on": model(IDS).logits}
    with lora_fx.disable_adapter(model):
        found["disabled"] = model(IDS).logits
        loss = model(IDS, labels=IDS).loss
        if loss.requires_grad:
            loss.backward()  # FSDP puts its parts in again
        found["disabled, again"] = model(IDS).logits
    model.zero_grad()
    found["on, after it"] = model(IDS).logits
    lora_fx.set_adapter(model, [])
    found["off"] = model(IDS).logits
    lora_fx.set_adapter(model, "default")
    found["on, chosen again"] = model(IDS).logits
    state = lora_fx.adapter_state_dict(model)
    return {
        "outputs": {name: one.detach() for name, one in found.items()},
        "state": state,
        "base": type(model.lm_head).__name__,
    }


class Gathered(TorchDispatchMode):
    """Counts the bytes of tensors that were gathered and are still there.

    Attributes:
        most: The greatest number of them at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if "all_gather" in str(function):
            size = found.untyped_storage().nbytes()
            self.here += size
            self.most = max(self.most, self.here)
            weakref.finalize(found.untyped_storage(), self.leave, size)
        return found

    def leave(self, size: int) -> None:
        self.here -= size


def merged(case: str) -> dict[str, Any]:
    """A merge of a sharded model, and what its own training does."""
    model = shard(build(case), CASES[case][1])
    before = model(IDS).logits.detach()
    with Gathered() as count:
        result = lora_fx.merge(model)
    found = {
        "class": type(result).__mro__[2].__name__,
        "state": {name: whole(value) for name, value in result.state_dict().items()},
        "placements": {name: placed(p) for name, p in result.named_parameters()},
        "base": {name: placed(p) for name, p in model.named_parameters() if not ADAPTER(name)},
        "held": {name: memory(p) for name, p in result.named_parameters()},
        "logits": result(IDS).logits.detach(),
        "trained": [name for name, p in result.named_parameters() if p.requires_grad],
        "most": count.most,
    }
    own = lora_fx.merge(model, own=True)
    own(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    found["trained on"] = own(IDS).logits.detach()
    found["unchanged"] = before, model(IDS).logits.detach()
    return found


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def memory(tensor: Any) -> tuple[int, int]:
    """The bytes of the memory that a part keeps, and those of the largest part of the tensor."""
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    kept = tensor.to_local().detach().untyped_storage().nbytes()
    return kept, rows * tensor[:1].numel() * tensor.element_size()


def placed(tensor: Any) -> str:
    return f"{tensor.placements} over {tensor.device_mesh.size()}"


def drawn(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """A combination of adapters that draws, in processes that draw other numbers."""
    options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, seed=0)
    lora_fx.add_adapter(model, options, "second")
    torch.manual_seed(rank)
    names = ["default", "second"]
    lora_fx.add_weighted_adapter(model, names, [1.0, 0.5], "drawn", "dare_linear", density=0.5)
    return lora_fx.adapter_state_dict(model, "drawn")


def refused(model: Any) -> dict[str, str]:
    """What the verbs say that make parameters, or copies."""
    verbs = {
        "add_adapter": lambda: lora_fx.add_adapter(
            model, LoraConfig(r=2, modules_to_save=["lm_head"]), "new"
        ),
        "merge into a sharded model": lambda: lora_fx.merge(model, into=shard(llama(), False)),
        "rewrite": lambda: lora_fx.rewrite(shard(llama(), False), LoraConfig(r=2)),
    }
    said = {}
    for name, verb in verbs.items():
        try:
            verb()
        except lora_fx.LoraFxError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def save(model: Any, folder: Path, rank: int) -> None:
    """What a trainer does: all gather the state, one process saves."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found: dict[str, Any] = {case: switch(case) for case in CASES}
    model: nn.Module = shard(build("plain"), False)
    found["refused"] = refused(model)
    found["merged"] = {case: merged(case) for case in CASES}
    found["drawn"] = drawn(shard(build("plain"), False), rank)
    save(model, Path(folder) / "saved", rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    del model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
