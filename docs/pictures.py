"""Pictures of ``guides/visualizing.md``, drawn with a headless Chromium: ``make pictures``.

The models have random weights, or no weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image

import lora_fx
from lora_fx.tools.cluster import Mesh, Settings, plan_step, step_inputs
from lora_fx.tools.timeline import Timeline, write_page
from tests.tools.browser import Page, browser

FOLDER = Path(__file__).with_name("img")


class Shot(NamedTuple):
    """A picture.

    Attributes:
        name: Name of the file.
        draw: Function that writes the page to a path.
        width, height: Size of the window.
        dark: True for the dark color scheme.
        steps: JavaScript to run before the picture is taken.
    """

    name: str
    draw: Callable[[Path], object]
    width: int = 1200
    height: int = 760
    dark: bool = False
    steps: str = ""


def llama() -> torch.nn.Module:
    """Return a Llama of 7B on the meta device, with adapters on attention and ``up_proj``."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = lora_fx.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    return lora_fx.rewrite(model, config)


def bert() -> torch.nn.Module:
    """Return a small BERT with two adapters whose values look trained."""
    torch.manual_seed(0)
    settings = transformers.BertConfig(num_hidden_layers=4)
    model = transformers.BertForSequenceClassification(settings)
    first = lora_fx.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = lora_fx.rewrite(model, first)
    second = lora_fx.LoraConfig(r=4, target_modules=["query", "dense"])
    lora_fx.add_adapter(model, second, "tone")
    lora_fx.set_adapter(model, ["default", "tone"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02 * (1 + len(name) % 3))
    return model


def mixtral() -> torch.nn.Module:
    """Return a Mixtral of four layers on the meta device."""
    with torch.device("meta"):
        settings = transformers.MixtralConfig(num_hidden_layers=4)
        model = transformers.MixtralForCausalLM(settings)
    return lora_fx.rewrite(model, lora_fx.LoraConfig(r=8))


def plan_and_model() -> list[Any]:
    """Return the plan of a small Llama, and the rewritten model."""
    settings = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
    )
    model = transformers.LlamaForCausalLM(settings)
    config = lora_fx.LoraConfig(r=8, target_modules=r".*\.(q_proj|v_proj|up_proj)")
    return [lora_fx.plan(model, config), lora_fx.rewrite(model, config)]


def page_of(build: Callable[[], Any]) -> Callable[[Path], object]:
    """Return a function that visualizes the result of ``build``."""
    return lambda path: lora_fx.visualize(build(), path)


def timeline(path: Path) -> None:
    """Write the timeline of a step of a Llama of 8B that computes its blocks again."""
    settings = transformers.LlamaConfig(
        intermediate_size=14336, num_key_value_heads=8, vocab_size=128256
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    record = Timeline()
    inputs = step_inputs(model, None, batch=1, sequence=4096)
    plan_step(
        model,
        lora_fx.LoraConfig(r=16),
        Mesh(),
        inputs,
        Settings(dtype=torch.bfloat16, checkpointing=True),
        ledger=record,
    )
    facts = {"step": "AdamW on one GPU, 1 sample of 4096 tokens, bf16, blocks computed again"}
    write_page(record, path, "Llama 8B", facts)


QUERY = "bert.encoder.layer.0.attention.self.query"
LAYER = "loraFx.graphs[0].fit(loraFx.graphs[0].boxOf('bert.encoder.layer.0.attention'));"
SITES = "document.querySelector('#show-sites').click();"
ROUTER = "loraFx.select('model.layers.0.mlp.gate');"
COLOR = """
const color = document.querySelector("#color");
color.value = "share";
color.dispatchEvent(new Event("change"));
"""
SHOTS = (
    Shot("page-llama-sites", page_of(llama), width=1360, steps=SITES),
    Shot("page-bert-two-adapters", page_of(bert), steps=f"loraFx.select('{QUERY}');"),
    Shot("page-bert-color", page_of(bert), dark=True, steps=COLOR + LAYER),
    Shot("page-mixtral-router", page_of(mixtral), dark=True, steps=ROUTER),
    Shot(
        "page-compare",
        page_of(plan_and_model),
        steps="loraFx.select('model.layers.0.self_attn.q_proj');",
    ),
    Shot("page-timeline", timeline, steps="document.querySelector('#key button').click();"),
)


def take(page: Page, shot: Shot, folder: Path) -> None:
    """Draw one picture. 256 colors keep the file small."""
    path = folder / f"{shot.name}.html"
    shot.draw(path)
    page.size(shot.width, shot.height, dark=shot.dark)
    page.open(path.as_uri())
    page.run(f"(() => {{ {shot.steps} }})()")
    page.run("new Promise((done) => setTimeout(done, 400))")
    if page.complaints:
        raise RuntimeError(f"{shot.name}: {page.complaints}")
    with Image.open(page.screenshot(folder / f"{shot.name}.png")) as image:
        few = image.convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
        few.save(FOLDER / f"{shot.name}.png", optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for shot in SHOTS:
            with browser() as page:
                take(page, shot, Path(folder))
