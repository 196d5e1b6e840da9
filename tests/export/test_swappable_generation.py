"""Text with an adapter that is an input of the file: what the adapted model generates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.errors import ConfigError
from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from tests.export.tiny import VOCABULARY, example, generator


@pytest.mark.parametrize(
    ("kind", "task", "targets"),
    [
        ("llama", "text-generation", ["q_proj", "down_proj"]),
        pytest.param("t5", "text2text-generation", ["q", "v", "wo"], marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_adapted_model(
    tmp_path: Path, kind: str, task: Any, targets: list[str]
) -> None:
    base = generator(kind)
    adapted: Any = {}
    for name, rank in (("one", 2), ("two", 5)):
        config = lora_fx.LoraConfig(
            r=rank, target_modules=targets, init_lora_weights=False, seed=rank
        )
        adapted[name] = lora_fx.rewrite(base, config).eval()
    file = tmp_path / "m.onnx"
    report = export_onnx(adapted["one"], file, example(kind), task=task, adapters="inputs")
    # Each cache was compared with an adapter, too.
    assert {row.name for row in report.parity} >= {"logits", "logits with adapter 'default'"}
    session = OnnxSession(file, "cpu")
    for name, model in adapted.items():
        session.load_adapter(name, model)
    ids = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10}
    expected = {name: model.generate(ids, **options) for name, model in adapted.items()}
    alone = base.generate(ids, **options)
    assert not torch.equal(expected["one"], expected["two"])
    assert not torch.equal(expected["one"], alone)
    for name, tokens in expected.items():
        assert torch.equal(session.generate(ids, adapter=name, **options), tokens)
    assert torch.equal(session.generate(ids, **options), alone)

    # Adapters of several ranks by turns, each in a thread of its own, too.
    with ThreadPoolExecutor(3) as pool:
        names = ["one", "two", None] * 4
        runs = [pool.submit(session.generate, ids, adapter=name, **options) for name in names]
        for name, run in zip(names, runs, strict=True):
            assert torch.equal(run.result(), alone if name is None else expected[name])
    for name, model in adapted.items():
        beams = {**options, "num_beams": 3, "num_return_sequences": 2}
        got = session.generate(ids, adapter=name, **beams)
        assert torch.equal(got, model.generate(ids, **beams))
    if session.encoder is None:
        alone_row = list(session.stream(ids[:1], adapter="one", max_new_tokens=10))
        assert alone_row == expected["one"][0, 6 : 6 + len(alone_row)].tolist()

    class Swaps:
        """Loads another adapter by the name that is running, in the middle of a text."""

        def put(self, value: torch.Tensor) -> None:
            session.load_adapter("one", adapted["two"])

        def end(self) -> None:
            session.unload_adapter("two")

    swapped = session.generate(ids, adapter="one", streamer=Swaps(), **options)
    assert torch.equal(swapped, expected["one"])
    assert torch.equal(session.generate(ids, adapter="one", **options), expected["two"])
    session.unload_adapter("one")
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        session.generate(ids, adapter="one", **options)
