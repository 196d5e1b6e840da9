"""Files of every kind for runtimes of ONNX, each with calls and what PyTorch gives for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.export.adapter_manifest import SLOTS_INPUT
from lora_fx.export.report import ExportReport
from tests import quantized
from tests.algebra import randomize
from tests.export import swapping
from tests.runtimes.test_genai import adapted

PROMPT = torch.tensor([[5, 9, 3, 7]])
MASKED = {
    "input_ids": torch.tensor([[5, 9, 3, 7, 2], [8, 2, 1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
FOLLOWING = [11, 4, 60, 23, 8, 8]


@dataclass(frozen=True)
class Call:
    """A call of a file.

    Attributes:
        feeds: Its inputs.
        want: Outputs by name, in PyTorch and fp32.
        adapter: The adapter that is active; None for the file alone.
        following: For a decoder, the tokens that are fed after the prompt, one by one.
    """

    feeds: Mapping[str, Tensor]
    want: Mapping[str, Tensor]
    adapter: Path | None = None
    following: list[int] | None = None


@dataclass(frozen=True)
class Case:
    """A file, and the calls that run on it in one session."""

    file: Path
    report: ExportReport
    calls: list[Call] = field(default_factory=list)


def encoder(activation: str = "gelu") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=64,
        num_hidden_layers=2,
        num_labels=3,
        hidden_act=activation,
    )
    return BertForSequenceClassification(config).eval()


def _classified(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model(**MASKED).logits}


def _answered(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"output": model(swapping.ids())}


def _decoded(model: nn.Module) -> dict[str, Tensor]:
    whole = torch.cat([PROMPT, torch.tensor([FOLLOWING])], dim=1)
    with torch.no_grad():
        return {"logits": model(whole).logits[:, PROMPT.shape[1] - 1 :]}


def case(kind: str, adapters: str, folder: Path, **options: Any) -> Case:
    """A file and its calls: the file alone, a swappable one with an adapter and alone again, a bank by rows.

    Args:
        kind: "encoder", "encoder-tanh" (its gelu is that with tanh), "decoder", "places" (an adapter at every
            kind of operation), or a scheme of ``tests.quantized``.
        adapters: As for ``export_onnx``.
        folder: Where the files are made.
        options: For ``export_onnx``.
    """
    if kind in quantized.SCHEMES:
        return _quantized_case(kind, folder, **options)
    decodes = kind == "decoder"
    model: nn.Module
    example: Any
    if decodes:
        model, example, answers = adapted(), PROMPT, _decoded
        options["task"] = "text-generation"
    elif kind == "places":
        model, example, answers = swapping.adapted(), {"ids": swapping.ids()}, _answered
    else:
        base = encoder("gelu_new" if kind == "encoder-tanh" else "gelu")
        model = lora_fx.rewrite(base, LoraConfig(r=4)).eval()
        randomize(model)
        example, answers = MASKED, _classified
    file = folder / "model.onnx"
    report = lora_fx.export_onnx(model, file, example, adapters=adapters, **options)
    mask = torch.ones_like(PROMPT)
    feeds = {"input_ids": PROMPT, "attention_mask": mask} if decodes else example
    following = FOLLOWING if decodes else None
    with_adapter = Call(feeds, answers(model), following=following)
    if adapters == "merge":
        return Case(file, report, [with_adapter])
    if adapters == "bank":
        with lora_fx.disable_adapter(model):
            base = answers(model)
        rows = len(next(iter(feeds.values())))
        slots = torch.tensor([0] + [-1] * (rows - 1))
        mixed = {
            name: torch.cat([value[:1], base[name][1:]])
            for name, value in with_adapter.want.items()
        }
        calls = [
            Call({**feeds, SLOTS_INPUT: torch.tensor([-1])}, base, following=following),
            Call({**feeds, SLOTS_INPUT: slots}, mixed, following=following),
            Call({**feeds, SLOTS_INPUT: slots[:1]}, with_adapter.want, following=following),
        ]
        return Case(file, report, calls)
    path = lora_fx.save_onnx_adapter(
        model,
        folder / "one.onnx_adapter",
        base=file,
        adapter_name=lora_fx.active_adapters(model)[0],
    )
    with lora_fx.disable_adapter(model):
        alone = Call(feeds, answers(model), following=following)
    swapped = Call(feeds, with_adapter.want, path, following)
    return Case(file, report, [alone, swapped, alone])


def _quantized_case(scheme: str, folder: Path, **options: Any) -> Case:
    base = quantized.quantized(quantized.llama(), scheme).eval()
    model = lora_fx.rewrite(base, LoraConfig(r=4)).eval()
    randomize(model)
    example = {"input_ids": quantized.IDS}
    with torch.no_grad():
        want = model(**example, use_cache=False).logits
    file = folder / "model.onnx"
    report = lora_fx.export_onnx(model, file, {**example, "use_cache": False}, **options)
    assert report.quantized
    return Case(file, report, [Call(example, {"logits": want})])


def check(
    case: Case,
    consume: Callable[..., Any],
    runtime: str,
    folder: Path,
    *,
    provider: str = "CPUExecutionProvider",
    cache: str = "cpu",
    tolerance: float = 1e-4,
) -> dict[str, list[str]]:
    """Run a case in a runtime, and compare every output with PyTorch's.

    Args:
        case: The file and its calls.
        consume: The fixture.
        runtime: Where: a folder of ``.peers``.
        folder: For what goes there and back.
        provider: The execution provider that is asked for.
        cache: The device on which the cache of a decoder is kept.
        tolerance: Over the largest magnitude of an output.

    Returns:
        Each provider with the operators that ran there.
    """
    calls = []
    for number, call in enumerate(case.calls):
        feeds = folder / f"{number}.npz"
        np.savez(feeds, **{name: value.numpy() for name, value in call.feeds.items()})
        adapter = None if call.adapter is None else str(call.adapter)
        calls.append({"feeds": str(feeds), "adapter": adapter, "next": call.following})
    request = {"file": str(case.file), "provider": provider, "cache": cache, "calls": calls}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    said = consume(runtime, "run_onnx.py", folder / "request.json", folder / "results.npz")
    found = np.load(folder / "results.npz")
    for number, call in enumerate(case.calls):
        for name, want in call.want.items():
            got = torch.from_numpy(found[f"{number}/{name}"]).double()
            error = (got - want.double()).abs().max() / want.abs().max()
            assert error <= tolerance, f"call {number}, {name}: {error:.2e}"
        if call.following is not None:
            assert (set(found[f"{number}/devices"]) == {"cpu"}) == (cache == "cpu")
    # An adapter that does nothing would be equal to nothing else.
    answers = [next(iter(call.want.values())) for call in case.calls]
    assert len(answers) == 1 or not torch.allclose(answers[0], answers[1], rtol=0.1)
    operators: dict[str, list[str]] = said["operators"]
    return operators
