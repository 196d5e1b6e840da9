"""Every form of files in a session, on a GPU and on the CPU: what PyTorch gives, and where it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lora_fx.export.adapter_manifest import SLOTS_INPUT
from lora_fx.export.decoder import Decoder
from lora_fx.export.session import OnnxSession
from tests import quantized
from tests.runtimes.files import Call, Case, case

CPU = pytest.param("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def adapter_of(session: OnnxSession, call: Call) -> Any:
    """What a call runs with, as a session takes it."""
    if call.adapter is not None:
        session.load_adapter("one", call.adapter)
        return "one"
    if SLOTS_INPUT not in call.feeds:
        return None
    names = [session.adapters[slot] if slot >= 0 else None for slot in call.feeds[SLOTS_INPUT]]
    return names if len(names) > 1 else names[0]


def answer(session: OnnxSession, call: Call, device: str) -> dict[str, Tensor]:
    """The outputs; for a decoder the logits after the prompt and after each token that follows."""
    feeds = {name: value for name, value in call.feeds.items() if name != SLOTS_INPUT}
    chosen = adapter_of(session, call)
    if call.following is None:
        found = session.run({k: v.to(device) for k, v in feeds.items()}, adapter=chosen)
        assert {value.device.type for value in found.values()} == {device}
        return {name: value.cpu() for name, value in found.items()}
    length = feeds["input_ids"].shape[1] + len(call.following)
    steps = Decoder(session, feeds["attention_mask"], {}, chosen, length=length)
    rows = len(feeds["input_ids"])
    tokens = [feeds["input_ids"], *(torch.full((rows, 1), one) for one in call.following)]
    return {"logits": torch.stack([steps.step(one) for one in tokens], dim=1)}


def compare(one: Case, device: Literal["cpu", "cuda"], tolerance: float) -> None:
    session = OnnxSession(one.file, device)
    for _ in range(2):  # the second time with what is bound by then
        for number, call in enumerate(one.calls):
            found = answer(session, call, device)
            for name, want in call.want.items():
                got = found[name].double()
                error = float((got - want.double()).abs().max() / want.abs().max())
                assert error <= tolerance, f"call {number}, {name}: {error:.2e}"
    if device == "cuda":
        assert session.placement().elsewhere == ()


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("adapters", ["merge", "inputs", "bank"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("optimize", "dtype"),
    [
        ("runtime", "fp32"),
        pytest.param("standard", "fp32", marks=pytest.mark.slow),
        pytest.param("standard", "fp16", marks=pytest.mark.slow),
        pytest.param("runtime", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_session_gives_what_pytorch_does(
    device: Any, adapters: str, kind: str, optimize: str, dtype: str, tmp_path: Path
) -> None:
    options = {"provider": device} if optimize == "runtime" else {}
    one = case(kind, adapters, tmp_path, optimize=optimize, dtype=dtype, **options)
    compare(one, device, 2e-2 if dtype == "fp16" else 1e-4)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("scheme", ["nf4", "int4 torchao", "int8 torchao"])
def test_quantized_weights_in_a_session(device: Any, scheme: str, tmp_path: Path) -> None:
    assert scheme in quantized.SCHEMES
    compare(case(scheme, "inline", tmp_path), device, 1e-3)
