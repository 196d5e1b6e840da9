"""Exports that several test files look at: each costs seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from lora_fx.export.onnx import export_onnx
from lora_fx.export.report import ExportReport
from lora_fx.export.session import OnnxSession
from tests.export.fuse.small import VOCABULARY, decoder


class Exported(NamedTuple):
    model: Any
    report: ExportReport
    session: OnnxSession


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A decoder and its file for ONNX Runtime's CPU provider, exported once."""
    done: dict[tuple[str, Any], Exported] = {}

    def make(kind: str, dtype: Any = None) -> Exported:
        if (kind, dtype) not in done:
            model = decoder(kind)
            path = tmp_path_factory.mktemp(kind) / "model.onnx"
            ids = torch.randint(3, VOCABULARY, (2, 6))
            report = export_onnx(
                model, path, ids, task="text-generation", optimize="runtime", dtype=dtype
            )
            assert report.verified
            done[kind, dtype] = Exported(model, report, OnnxSession(path, "cpu"))
        return done[kind, dtype]

    return make
