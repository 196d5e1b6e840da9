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
from tests.algebra import randomize
from tests.stacks.models import llama

__all__ = [
    "CASES",
    "IDS",
    "RANKS",
    "WAYS",
    "begin",
    "build",
    "run_rank",
    "said",
    "samples",
    "tuned",
]

RANKS = 2
IDS = torch.arange(48).view(4, 12)
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "by hand": {"target_modules": ["q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
}
WAYS = {
    "before": ["plain", "DoRA", "modules_to_save"],
    "within": ["plain"],
    "after": list(CASES),
}
"""When the base is partitioned, seen from the rewrite, and the cases of each."""
_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def tuned(model: Any, case: str) -> Any:
    """Factors that change the outputs; a start of PiSSA has a meaning of its own."""
    if case == "by hand":
        model.model.norm.requires_grad_(True)
    return (model if case == "PiSSA" else randomize(model)).train()


def build(case: str) -> Any:
    return tuned(lora_fx.rewrite(llama(), LoraConfig(r=2, **CASES[case])), case)


def samples(rank: int) -> torch.Tensor:
    return IDS.chunk(RANKS)[rank]


def begin(rank: int, port: int) -> None:
    """Makes this process one of those that DeepSpeed knows."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), DS_ACCELERATOR="cpu"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import deepspeed

    # Nothing is compiled for this test: gloo and PyTorch's operators do.
    operators = deepspeed.ops.__compatible_ops__
    operators.update(dict.fromkeys(operators, False))
    deepspeed.init_distributed("gloo")


def run_rank(rank: int, folder: str, port: int) -> None:
    begin(rank, port)
    found: dict[str, Any] = {"built in": nn.functional.linear is torch._C._nn.linear}
    for way, cases in WAYS.items():
        for case in cases:
            name = f"{way} {case}"
            base, model = rewritten(case, way)
            found[name] = trained(model, case, rank, Path(folder) / name)
            if base is not None:
                found[name]["base"] = values(base)
    found["loaded"] = loaded(Path(folder) / "before plain")
    found["replaced"] = nn.functional.linear is not torch._C._nn.linear
    # The next model of the process, which nothing partitions.
    dense = build("plain")
    with torch.no_grad():
        found["dense"] = dense.eval()(IDS).logits
        found["dense, merged"] = lora_fx.merge(dense)(IDS).logits
    found["unused"] = unused()
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def rewritten(case: str, way: str) -> tuple[Any, Any]:
    """A base that is partitioned (None if it is later), and the model that is made of it."""
    import deepspeed

    if way == "before":
        return None, build(case)
    config = LoraConfig(r=2, **CASES[case])
    wanted = llama().state_dict()
    with deepspeed.zero.Init(config_dict_or_path=_CONFIG):
        base = llama()
        if way == "within":
            fill(base, wanted)
            model = lora_fx.rewrite(base, config)
            assert torch.empty(0).dtype == torch.float32
    if way == "after":
        fill(base, wanted)
        model = lora_fx.rewrite(base, config)
    return base, tuned(model, case)


def fill(base: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Gives a partitioned model values, as loaders of checkpoints do."""
    import deepspeed

    for name, parameter in base.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(state[name])


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole of every parameter."""
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def engine_of(model: Any) -> Any:
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1) if parameters else None
    return deepspeed.initialize(model=model, optimizer=optimizer, config=_CONFIG)[0]


def trained(model: Any, case: str, rank: int, folder: Path) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

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
    lora_fx.save_adapter(model, folder)
    engine.eval()
    merged = lora_fx.merge(model)
    into = lora_fx.merge(model, into=llama())
    found["merged in fp64"] = values(lora_fx.merge(model, dtype=torch.float64))
    found["merged"] = values(merged)
    found["merged into"] = dict(into.state_dict())
    found["merged, empty"] = all(not p.numel() for p in merged.parameters())
    with torch.no_grad():
        found["on"] = engine(IDS).logits
        with lora_fx.disable_adapter(model):
            found["off"] = engine(IDS).logits
        found["on again"] = engine(IDS).logits
        lora_fx.load_adapter_state_dict(model, found["start"])
        found["loaded"] = lora_fx.adapter_state_dict(model)
    inputs = {"input_ids": IDS}
    found["said"] = {
        "save_pretrained": said(lambda: model.save_pretrained(folder / f"{rank}")),
        "export": said(lambda: lora_fx.export_onnx(model, folder / "no.onnx", inputs)),
        "add": said(lambda: lora_fx.add_adapter(model, LoraConfig(r=2, **CASES[case]), "more")),
        "check": said(lambda: lora_fx.check(model, inputs)),
    }
    engine.destroy()
    if case == "plain":
        # What was merged is a model of its own, which DeepSpeed runs.
        runs = engine_of(merged)
        with torch.no_grad():
            found["merged, run"] = runs(IDS).logits
        runs.destroy()
    return found


def loaded(folder: Path) -> torch.Tensor:
    """What a folder gives, which has base weights too, over a partitioned base and its copy."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=_CONFIG):
        base = llama()
    fill(base, llama().state_dict())
    model = lora_fx.load_adapter(base, folder)
    engine = engine_of(lora_fx.reference(model))
    with torch.no_grad():
        logits: torch.Tensor = engine(IDS).logits
    engine.destroy()
    return logits


def unused() -> dict[str, str]:
    """What is asked of a partitioned base that no engine runs."""
    import deepspeed

    config = LoraConfig(r=2, **CASES["plain"])
    with deepspeed.zero.Init(config_dict_or_path=_CONFIG):
        base = llama()
    model = lora_fx.rewrite(base, config)
    lora_fx.add_adapter(model, config, "more")
    return {
        "example inputs": said(lambda: lora_fx.rewrite(base, config, {"input_ids": IDS})),
        "export": said(lambda: lora_fx.export_onnx(base, "no.onnx", {"input_ids": IDS})),
        "quantize": said(lambda: lora_fx.quantize(base, "int8")),
        "plan": str(lora_fx.plan(base, config)),
        "adapters": " ".join(one.name for one in lora_fx.status(model).adapters),
    }


def said(verb: Callable[[], object]) -> str:
    try:
        verb()
    except lora_fx.LoraFxError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train(base: Any, folder: Path, callbacks: list[Any], batch: int, **options: Any) -> Any:
    """Runs transformers' Trainer over all rows in each step; gives the losses and the model.

    Args:
        base: Gives a base, once the arguments of the Trainer are there: from then on transformers partitions
            what it loads.
        folder: Of the checkpoints.
        callbacks: Of the Trainer.
        batch: Rows of one process.
        options: ``deepspeed``, and ``resume_from_checkpoint``.
    """
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=5.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=options.get("deepspeed"),
    )
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = tuned(lora_fx.rewrite(base(), config), "plain")
    trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return [one["loss"] for one in trainer.state.log_history if "loss" in one], model


def train_rank(rank: int, folder: str, port: int) -> None:
    """The Trainer with a configuration of ZeRO-3, from ``from_pretrained`` to a run that is resumed."""
    begin(rank, port)
    from transformers import AutoModelForCausalLM

    there = Path(folder)
    found: dict[str, Any] = {}

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(there / "origin")
        found["partitioned"] = all(not p.numel() for p in model.parameters())
        return model

    def run(name: str, *, gather: bool, resume: str | None = None) -> None:
        callback = lora_fx.trainer_callback(there / f"{name} callback")
        zero = {**_CONFIG["zero_optimization"], "stage3_gather_16bit_weights_on_model_save": gather}
        config = {**_CONFIG, "gradient_clipping": "auto", "zero_optimization": zero}
        losses, model = train(base, there / name, [callback], 2, deepspeed=config, resume=resume)
        found[name] = {"losses": losses, "state": lora_fx.adapter_state_dict(model)}

    run("whole", gather=True)
    run("resumed", gather=True, resume=str(there / "whole" / "checkpoint-2"))
    run("bare", gather=False)
    run("bare, resumed", gather=False, resume=str(there / "bare" / "checkpoint-2"))
    torch.save(found, there / f"{rank}.pt")
    torch.distributed.destroy_process_group()
