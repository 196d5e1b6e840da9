"""Adapters of transformers 4 on the models of transformers 5: equal outputs, through match="graph".

The files were written by ``tests/migration/write.py`` in environments of transformers 4.51 and 4.57, with the
PEFT of that time. They say what the outputs were there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx import CheckpointError
from tests.migration import folders
from tests.migration.write import adapter_value
from tests.numerics import assert_close

FILES = sorted((Path(__file__).parent / "transformers4").glob("*.json"))
# Its experts were stacks before.
SAME = ("gpt-oss-4.57",)


def write(record: Any, folder: Path) -> tuple[nn.Module, Path]:
    """Write the folders of a model and an adapter as transformers 4 and PEFT wrote them."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps(record["config"]), encoding="utf-8")
    named = {key: folders.weight(key, shape) for key, shape in record["weights"].items()}
    save_file(named, base / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps(record["adapter_config"])
    (adapter / "adapter_config.json").write_text(config, encoding="utf-8")
    tensors = {key: adapter_value(key, shape) for key, shape in record["adapter"].items()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, record["config"]["architectures"][0])
    return kind.from_pretrained(base, attn_implementation="eager").eval(), adapter


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_outputs_are_those_of_transformers_4(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    model, adapter = write(record, tmp_path)
    inputs = folders.inputs_of(record["inputs"])
    with torch.no_grad():
        base = folders.spread(model(**inputs))
    assert_close(base, torch.tensor(record["base"]))
    planned = lora_fx.plan_migration(model, adapter)
    assert not planned.problems
    assert planned.confidence == 1.0
    if path.stem in SAME:
        assert not planned.changed
    else:
        with pytest.raises(CheckpointError, match=r'match="graph"\) loads it'):
            lora_fx.load_adapter(model, adapter)
    adapted = lora_fx.load_adapter(model, adapter, match="graph").eval()
    with torch.no_grad():
        output = folders.spread(adapted(**inputs))
    expected = torch.tensor(record["adapted"])
    assert (expected - base).abs().max() > 0.01 * base.abs().max()
    assert_close(output, expected)
    # Written again, it has the names of this version.
    lora_fx.save_adapter(adapted, tmp_path / "moved")
    with torch.no_grad():
        again = folders.spread(lora_fx.load_adapter(model, tmp_path / "moved").eval()(**inputs))
    assert_close(again, expected)
