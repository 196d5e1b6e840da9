"""What fits on a card: sizes, formats, searches, and plans beside what steps use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.runtime.memory import offload
from lora_fx.tools.cluster import Ledger, Mesh, Settings, plan_step, step_inputs, without_memory
from lora_fx.tools.fit import best_format, fits, size_of, stored_bytes
from tests.allocator import allocator_growth

CONFIG = LoraConfig(r=4)
TEXT: dict[str, Any] = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 192}
LAYERS: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4}


def llama(layers: int = 3) -> nn.Module:
    sizes = {**TEXT, **LAYERS, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=600, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    sizes = {"image_size": 96, "patch_size": 4, "hidden_size": 64, "intermediate_size": 192}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **LAYERS))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **TEXT, **LAYERS, num_key_value_heads=2, num_local_experts=4, use_cache=False
    )
    return transformers.MixtralForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=600,
        d_model=64,
        d_kv=16,
        d_ff=192,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "vit": vit,
    "mixtral": mixtral,
    "t5": t5,
}


def inputs_of(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(1, 3, 96, 96), "labels": torch.tensor([1])}
    inputs = step_inputs(model, None, batch=1, sequence=700)
    ids = torch.randint(0, 600, (1, 700))
    return {name: ids if torch.is_tensor(value) else value for name, value in inputs.items()}


@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_what_a_step_uses(name: str, memory: Any) -> None:
    torch.manual_seed(0)
    # The grouped product of experts has no other dtype on tensors without memory.
    dtype = torch.bfloat16 if name == "mixtral" else torch.float32
    model = MODELS[name]().to(dtype)
    inputs = inputs_of(model)
    need = plan_step(model, CONFIG, Mesh(), inputs, Settings(memory=memory))
    adapted = lora_fx.rewrite(model, CONFIG, memory=memory).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ledger = Ledger()
    ledger.hold([*adapted.parameters(), *adapted.buffers()])
    for _ in range(2):
        with ledger, offload.simulated(ledger.host_copy):
            ledger.peak = ledger.host = 0
            adapted(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert need.peak == pytest.approx(ledger.peak, rel=0.03)
    assert need.host == ledger.host
    assert bool(need.host) == (memory == "least")


@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_what_the_allocator_gives(name: str, memory: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.bfloat16 if name == "mixtral" else torch.float32)
    inputs = inputs_of(model)
    need = plan_step(model, CONFIG, Mesh(), inputs, Settings(memory=memory))
    adapted = lora_fx.rewrite(model, CONFIG, memory=memory).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    def step() -> None:
        adapted(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    ledger = Ledger()
    states = [value for state in optimizer.state.values() for value in state.values()]
    ledger.hold([*adapted.parameters(), *adapted.buffers(), *states])
    peak = ledger.live + allocator_growth(step, tmp_path / "trace.json")
    # A CPU holds the inputs of blocks that a card keeps on the host; not all of them at the peak.
    assert 0.97 * need.peak <= peak <= 1.03 * (need.peak + need.host)


@pytest.mark.parametrize("layers", [2, 4])
def test_the_peak_grows_with_tokens_and_not_with_layers(layers: int) -> None:
    width = 128
    sizes = {"hidden_size": width, "intermediate_size": 448, "num_attention_heads": 8}
    config = transformers.LlamaConfig(
        vocab_size=96, num_hidden_layers=layers, num_key_value_heads=2, use_cache=False, **sizes
    )
    model = without_memory(transformers.LlamaForCausalLM(config))
    peaks = []
    for tokens in (1024, 2048, 4096, 8192):
        inputs = step_inputs(model, None, batch=1, sequence=tokens)
        need = plan_step(model, CONFIG, Mesh(), inputs, Settings(memory="least"))
        assert need.host == layers * tokens * width * 4
        peaks.append(need.peak)
    for before, after, tokens in zip(peaks[1:], peaks[2:], (2048, 4096), strict=False):
        assert after - before <= 12 * tokens * width * 4


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("16GiB", 16 * 2**30), ("0.5 gb", 5 * 10**8), ("80g", 80 * 10**9)],
)
def test_sizes_of_cards(text: str, size: int) -> None:
    assert size_of("fit", text) == size


@pytest.mark.parametrize("text", ["", "GB", "24", "24 apples", "-1GB", "0GB"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="write 24GB or 16GiB"):
        size_of("fit", text)


def test_the_longest_context_fits_and_a_longer_one_does_not() -> None:
    model, room = llama(1), 40_000_000
    settings = Settings(dtype=torch.bfloat16)
    rows = [*fits(model, CONFIG, room, settings, memories=["fast", "least"], sequence=512)]
    fast, least = rows
    assert 0 < 4 * fast.context < least.context
    assert 0 < fast.batch < least.batch
    for row in rows:
        assert row.need.peak <= room
        inputs = step_inputs(model, None, batch=1, sequence=int(row.context * 1.03) + 256)
        assert plan_step(model, CONFIG, Mesh(), inputs, row.settings).peak > room
        inputs = step_inputs(model, None, batch=row.batch, sequence=512)
        assert plan_step(model, CONFIG, Mesh(), inputs, row.settings).peak <= room


def test_the_memory_of_the_host_is_a_limit() -> None:
    model, host = llama(1), 1_000_000
    settings = Settings(dtype=torch.bfloat16)
    how: dict[str, Any] = {"memories": ["least"], "sequence": 1 << 30}
    (row,) = fits(model, CONFIG, 60_000_000, settings, host=host, **how)
    assert row.need.peak < 50_000_000
    assert 0.95 * host < row.need.host <= host


def test_nothing_fits() -> None:
    (row,) = fits(llama(), CONFIG, 1000, Settings(), memories=["least"], sequence=512)
    assert (row.context, row.batch) == (0, 0)
    assert row.need.peak > 1000


@pytest.mark.parametrize(
    ("name", "bits"), [("nf4", 5.5), ("int8", 9), ("mxfp4", 4.25), ("gptq", 4.3), ("fp8", 8.1)]
)
def test_weights_in_a_format(name: str, bits: float) -> None:
    if name in ("nf4", "int8"):
        pytest.importorskip({"nf4": "bitsandbytes", "int8": "torchao"}[name])
    model = without_memory(llama(), torch.bfloat16)
    plan = lora_fx.plan_quantization(model, "int8")
    whole = sum(p.nbytes for p in model.parameters())
    stored = stored_bytes(model, name) - (whole - plan.dense_bytes)
    assert plan.dense_bytes * (bits - 0.6) / 16 <= stored <= plan.dense_bytes * bits / 16


def test_planned_weights_have_the_size_of_real_ones() -> None:
    pytest.importorskip("bitsandbytes")
    model = llama().bfloat16()
    real = lora_fx.quantize(model, "nf4")
    need = plan_step(
        model,
        CONFIG,
        Mesh(),
        step_inputs(model, None, batch=1, sequence=64),
        Settings(quantize="nf4"),
    )
    tensors = [*real.parameters(), *real.buffers()]
    states = [p.quant_state for p in real.parameters() if hasattr(p, "quant_state")]
    scales = [s.absmax for s in states] + [s.state2.absmax for s in states]
    scales += [t for s in states for t in (s.code, s.state2.code, s.offset)]
    weights = sum(t.nbytes for t in (*tensors, *scales))
    assert need.weights == pytest.approx(weights, rel=0.01)


def test_state_of_optimizers() -> None:
    inputs = step_inputs(llama(), None, batch=1, sequence=64)
    states = {
        name: plan_step(llama(), CONFIG, Mesh(), inputs, Settings(optimizer=name)).optimizer
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd")
    }
    assert states["adamw"] == pytest.approx(4 * states["adamw_8bit"], rel=0.01)
    assert states["paged_adamw_8bit"] == states["sgd"] == 0


def test_a_format_that_would_fit() -> None:
    pytest.importorskip("bitsandbytes")
    model = llama()
    whole = sum(p.numel() for p in model.parameters()) * 2
    assert best_format(model, int(0.9 * whole), torch.bfloat16) is not None
    assert best_format(model, 1000, torch.bfloat16) is None


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = llama(1)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    return f"hf:{tmp_path}"


def test_the_command(folder: str) -> None:
    from tests.tools.test_cli import refused, worked

    text = worked("plan", folder, "--fit", "0.6GB", "--memory", "least")
    assert "on a card of 0.6 GB: 0.1 GB are usable" in text
    assert "longest context" in text
    assert "a tile of tokens at a time" in text
    assert "write 24GB" in refused("plan", folder, "--fit", "much")
    assert "leave --mesh out" in refused("plan", folder, "--fit", "1GB", "--mesh", "fsdp=2")
    assert "--memory little is unknown: give one of" in refused(
        "plan", folder, "--memory", "little"
    )
    text = refused("plan", folder, "--fit", "0.5001GB", "--memory", "least")
    assert "are usable, and a short step needs" in text
    assert "GB are missing" in text
