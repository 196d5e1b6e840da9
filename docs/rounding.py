"""Measure how much of an adapter merges keep, and write the table of ``guides/deploying.md``.

python docs/rounding.py            # print it: minutes on one core, no network
python docs/rounding.py --write    # into docs/guides/deploying.md
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import show_or_write
from torch import Tensor, nn

import lora_fx
from lora_fx.formats import dense
from lora_fx.ir import require_record
from lora_fx.passes.merge import delta_weight
from lora_fx.passes.parameters import factors_of
from lora_fx.tools.demo import (
    LIBRARIES,
    DemoSettings,
    SentenceClassifier,
    batches,
    collect,
    logits,
    tokens,
    train,
)

PAGE = Path(__file__).with_name("guides") / "deploying.md"
HEADINGS = (
    "model",
    "stored in",
    "‖ΔW‖ / ‖W‖",
    "rounding",
    "ΔW kept",
    "entries moved",
    "output of a site",
    "output of the model",
)
CHANGES: Mapping[str, tuple[float, ...]] = {
    "bf16": (1e-3, 3e-3, 1e-2),
    "nf4": (3e-2,),
    "int4": (3e-2,),
    "int8": (3e-3,),
}
Inputs = list[dict[str, Tensor]]


def text() -> tuple[Inputs, Inputs]:
    """Return calibration batches, 256 sentences, and held-out batches, 128 sentences."""
    corpus = collect(256, 128, seed=0)
    parts = (corpus.train, corpus.held_out)
    first, second = (
        [dict(part.inputs) for part in batches(tokens(some, 48), corpus.labels(some), 32)]
        for some in parts
    )
    return first, second


def encoder() -> nn.Module:
    """Return MiniLM, the encoder of the demo, with weights in bf16 that are held in fp32."""
    return SentenceClassifier.pretrained(2).encoder.bfloat16().float().eval()


def decoder() -> nn.Module:
    """Return a Llama with random weights in bf16 that are held in fp32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=30522,
    )
    return transformers.LlamaModel(config).bfloat16().float().eval()


def adapted(base: nn.Module, share: float) -> nn.Module:
    """Return a rewritten model whose adapters change each weight by a share of its norm."""
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8))
    generator = torch.Generator().manual_seed(1)
    for row in require_record(model).adapters["default"].sites:
        factors = factors_of(model, row, "default")
        size = dense(model.get_parameter(row.site.weight), torch.float64).norm()
        with torch.no_grad():
            for factor in (factors.a, factors.b):
                factor.copy_(torch.randn(factor.shape, generator=generator))
            factors.b.mul_(share * size / delta_weight(model, row, "default").norm())
    return model


def outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the hidden states that a model gives in fp32, without those of padding, flat."""
    wide = copy.deepcopy(model).float()
    with torch.no_grad():
        states = [
            wide(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in inputs
        ]
    return torch.cat([state.flatten() for state in states]).double()


def rows(name: str, base: nn.Module, target: str, share: float) -> Iterator[tuple[str, ...]]:
    """Yield a row for each rounding."""
    calibration, held_out = text()
    start = base if target == "bf16" else lora_fx.quantize(base, target)
    model = adapted(start, share)
    exact = outputs(lora_fx.merge(model, dtype=torch.float32), held_out)
    plain = lora_fx.merge(adapted(start, 0.0), dtype=torch.float32)
    effect = (exact - outputs(plain, held_out)).norm()
    ways: dict[str, dict[str, Any]] = {
        "nearest": {},
        "compensated, no inputs": {"rounding": "compensated"},
        "compensated": {"rounding": "compensated"},
        "stochastic": {"rounding": "stochastic"},
    }
    form = {"dtype": torch.bfloat16} if target == "bf16" else {"requantize": True}
    for way, options in ways.items():
        inputs = calibration if way in ("nearest", "compensated") else None
        result, report = lora_fx.merge(model, inputs=inputs, return_report=True, **form, **options)
        whole = result
        if target != "bf16":
            untouched = lora_fx.rewrite(result, lora_fx.LoraConfig(r=1))
            whole = lora_fx.merge(untouched, dtype=torch.float32)
        error = (outputs(whole, held_out) - exact).norm() / effect
        site = "" if inputs is None else f"{report.output_error:.2f}"
        figures = (f"{report.kept:.2f}", f"{report.moved:.0%}", site, f"{float(error):.2f}")
        yield (name, target, f"{share:g}", way, *figures)


def table() -> str:
    """Return the table in Markdown."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS)]
    for name, make in (("MiniLM", encoder), ("small Llama", decoder)):
        for target, changes in CHANGES.items():
            for share in changes:
                lines += rows(name, make(), target, share)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracies(seed: int) -> dict[str, float]:
    """Return the accuracy of the demo's classifier on held-out text, by the way to its int4 file."""
    settings = DemoSettings(train=150, held_out=100, epochs=2, seed=seed, compare=False)
    corpus = collect(settings.train, settings.held_out, seed=seed)
    base = SentenceClassifier.pretrained(len(LIBRARIES))
    stored = lora_fx.quantize(base, "int4")
    config = lora_fx.LoraConfig(r=8, lora_alpha=16, modules_to_save=["head"])
    length = settings.max_length
    held_out = batches(tokens(corpus.held_out, length), corpus.labels(corpus.held_out), 64)
    calibration = [
        dict(part.inputs)
        for part in batches(tokens(corpus.train, length), corpus.labels(corpus.train), 64)[:8]
    ]

    def trained(start: nn.Module, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = lora_fx.rewrite(start, config, **options)
        train(model, corpus, settings)
        return model

    def judged(model: nn.Module) -> float:
        labels = torch.cat([part.labels for part in held_out])
        return float(
            (logits(lambda inputs: model(**inputs), held_out).argmax(1) == labels).double().mean()
        )

    merged, over_int4 = lora_fx.merge(trained(base)), trained(stored)
    compensated = lora_fx.merge(
        over_int4, requantize=True, rounding="compensated", inputs=calibration
    )
    return {
        "fp32 base, merged": judged(merged),
        "the same in int4, by `quantize`": judged(lora_fx.quantize(merged, "int4")),
        'fp32 base, trained with `deploy="int4"`, merged': judged(
            lora_fx.merge(trained(base, deploy="int4"))
        ),
        "int4 base, adapter not merged": judged(over_int4),
        "int4 base, merged to nearest": judged(lora_fx.merge(over_int4, requantize=True)),
        "int4 base, merged with compensated rounding": judged(compensated),
    }


def accuracy_table(seeds: int = 5) -> str:
    """Return the accuracies over several seeds in Markdown."""
    runs = [accuracies(seed) for seed in range(seeds)]
    lines = ["| model | mean accuracy | of each seed |", "| --- | --- | --- |"]
    for name in runs[0]:
        values = [100 * run[name] for run in runs]
        mean = sum(values) / len(values)
        lines.append(f"| {name} | {mean:.1f} % | {', '.join(f'{v:.1f}' for v in values)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables or write them into the page."""
    torch.set_num_threads(1)
    logging.getLogger("lora_fx").setLevel(logging.ERROR)
    show_or_write(table(), PAGE, "rounding")
    show_or_write(accuracy_table(), PAGE, "accuracy")


if __name__ == "__main__":
    main()
