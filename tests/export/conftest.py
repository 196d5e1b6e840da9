"""Exports that several test files look at: each costs seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_fx.export.onnx import export_onnx
from lora_fx.export.session import OnnxSession
from tests.export.tiny import Pair, example, generator


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A model and the session of its file, exported once."""
    done: dict[str, Pair] = {}

    def pair(kind: str) -> Pair:
        if kind not in done:
            model = generator(kind)
            path = tmp_path_factory.mktemp(kind) / "model.onnx"
            task: Any = "text-generation"
            if model.config.is_encoder_decoder:
                task = "text2text-generation"
            report = export_onnx(model, path, example(kind), task=task)
            assert report.verified
            assert report.task == task
            assert report.max_rel_error < 1e-5
            done[kind] = model, OnnxSession(path, "cpu")
        return done[kind]

    return pair
