"""What two gloo processes do with a model that DeepSpeed's ZeRO-3 partitions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from tests.stacks.models import adapted, llama

__all__ = ["CASES", "IDS", "RANKS", "build", "run_rank", "samples"]

RANKS = 2
IDS = torch.arange(48).view(4, 12)
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def build(case: str) -> Any:
    return adapted(LoraConfig(r=2, **CASES[case])).train()


def samples(rank: int) -> torch.Tensor:
    return IDS.chunk(RANKS)[rank]


def run_rank(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), DS_ACCELERATOR="cpu"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    # Nothing is compiled for this test: gloo and PyTorch's operators do.
    operators = deepspeed.ops.__compatible_ops__
    operators.update(dict.fromkeys(operators, False))
    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {"built in": nn.functional.linear is torch._C._nn.linear}
    found |= {case: trained(case, rank, folder) for case in CASES}
    found["replaced"] = nn.functional.linear is not torch._C._nn.linear
    # The next model of the process, which nothing partitions.
    dense = build("plain")
    with torch.no_grad():
        found["dense"] = dense.eval()(IDS).logits
        found["dense, merged"] = lora_fx.merge(dense)(IDS).logits
    found["within"] = within()
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def engine_of(model: Any) -> Any:
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=_CONFIG)[0]


def trained(case: str, rank: int, folder: str) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    model = build(case)
    engine = engine_of(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Any] = {
        "empty": all(not p.numel() for p in model.parameters()),
        "start": lora_fx.adapter_state_dict(model),
    }
    ids = samples(rank)
    loss = engine(ids, labels=ids).loss
    engine.backward(loss)
    found["loss"] = loss.detach()
    found["gradients"] = {name: safe_get_full_grad(p) for name, p in named.items()}
    engine.step()
    found["state"] = lora_fx.adapter_state_dict(model)
    lora_fx.save_adapter(model, Path(folder) / case)
    engine.eval()
    with torch.no_grad():
        found["on"] = engine(IDS).logits
        with lora_fx.disable_adapter(model):
            found["off"] = engine(IDS).logits
        found["on again"] = engine(IDS).logits
        lora_fx.load_adapter_state_dict(model, found["start"])
        found["loaded"] = lora_fx.adapter_state_dict(model)
    found["said"] = {
        "merge": said(lambda: lora_fx.merge(model)),
        "save_pretrained": said(lambda: model.save_pretrained(Path(folder) / f"{case} {rank}")),
        "export": said(
            lambda: lora_fx.export_onnx(model, Path(folder) / "no.onnx", {"input_ids": IDS})
        ),
        "merge of all, gathered": said(lambda: merged_of(model)),
        "add": said(lambda: lora_fx.add_adapter(model, LoraConfig(r=2, **CASES[case]), "more")),
    }
    engine.destroy()
    return found


def merged_of(model: Any) -> Any:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return lora_fx.merge(model)


def within() -> dict[str, Any]:
    """A base that is partitioned before it is rewritten."""
    import deepspeed

    config = LoraConfig(r=2, **CASES["plain"])
    with deepspeed.zero.Init(config_dict_or_path=_CONFIG):
        base = llama()
        inside = said(lambda: lora_fx.rewrite(base, config))
    with deepspeed.zero.GatheredParameters(list(base.parameters())):
        gathered = said(lambda: lora_fx.rewrite(base, config))
    return {
        "inside": inside,
        "gathered": gathered,
        "after": said(lambda: lora_fx.rewrite(base, config)),
        "plan": said(lambda: lora_fx.plan(base, config)),
    }


def said(verb: Callable[[], object]) -> str:
    try:
        verb()
    except lora_fx.LoraFxError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
