"""The whole story on a real model: plan, rewrite, train, save, load, merge, export, run.

The task is to say which library wrote a sentence (:mod:`lora_fx.tools.demo.task`). A frozen
sentence encoder with a trained head is compared with the same encoder under LoRA, which starts from
that head.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_fx.api import merge, plan, rewrite, trainable_parameters
from lora_fx.checkpoint import load_adapter, save_adapter
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.ir import Plan
from lora_fx.tools.demo.task import (
    Batch,
    Corpus,
    DemoSettings,
    SentenceClassifier,
    batches,
    collect,
    fit_head,
    logits,
    tokens,
    train,
)

__all__ = ["CONFIG", "DemoReport", "claim_folder", "run_demo"]


_MARKER = ".lora-fx-demo"


@dataclass(frozen=True)
class DemoReport:
    """The results of the demo.

    Attributes:
        accuracy: On held-out text: ``frozen``, ``LoRA``, ``LoRA, merged``, and
            ``merged, in ONNX Runtime``.
        sentences: Size of the training and of the held-out part.
        libraries: The classes.
        trainable, parameters: Elements that were trained, and all.
        reload_error: Largest difference of the reloaded adapter's outputs; 0 is every bit.
        merge_ulp: Largest error of a merged weight, in units in the last place.
        merge_error: Largest difference of the merged model's outputs on the held-out text.
        parity_error: The same of ONNX Runtime against the merged model.
        files: What was written, with sizes in bytes.
        seconds: Of each stage.
    """

    accuracy: dict[str, float]
    sentences: tuple[int, int]
    libraries: tuple[str, ...]
    trainable: int
    parameters: int
    reload_error: float
    merge_ulp: float
    merge_error: float
    parity_error: float
    files: dict[str, int]
    seconds: dict[str, float]


class Listener(Protocol):
    """Receives the progress of the demo."""

    def stage(self, name: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """A stage, as a context that gives (done, total, detail) to report within."""

    def note(self, text: str) -> None:
        """A result of the stage."""

    def planned(self, made: Plan) -> None:
        """The dry run."""


def claim_folder(folder: Path, *, force: bool = False) -> None:
    """Makes the folder, or takes over that of an earlier demo.

    Raises:
        ConfigError: Something else is there.
        LoraFxError: The folder cannot be made.
    """
    marker = folder / _MARKER
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give a folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not marker.exists() and not force:
        raise ConfigError(
            f"{folder} holds files that are not of the demo: give another folder with --out, or "
            "--force to write into it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise LoraFxError(f"{folder} cannot be written: {error}") from error


CONFIG = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, modules_to_save=["head"])
"""The output head, which target_modules=None leaves out, is trained in full."""


def run_demo(folder: Path, settings: DemoSettings, listener: Listener) -> DemoReport:
    """Runs it.

    Args:
        folder: Where to write; one that :func:`lora_fx.tools.demo.report.claim_folder` gave.
        settings: How much text, and how it is trained on.
        listener: Is told about every stage.

    Raises:
        ConfigError: A package of the extra ``demo`` is missing.
        LoraFxError: The reloaded adapter gives other outputs.
    """
    return _Demo(folder, settings, listener).run()


class _Demo:
    def __init__(self, folder: Path, settings: DemoSettings, listener: Listener) -> None:
        self.folder = folder
        self.settings = settings
        self.listener = listener
        self.seconds: dict[str, float] = {}
        self.accuracy: dict[str, float] = {}

    def run(self) -> DemoReport:
        torch.manual_seed(self.settings.seed)
        corpus, held_out = self._text()
        base = self._frozen(corpus, held_out)
        model = self._rewritten(base)
        self._train(model, corpus)
        with self._stage("judge it on held-out text"):
            adapted = self._judged("LoRA", model, held_out)
        reload_error = self._save_and_reload(model, corpus, held_out, adapted)
        with self._stage("merge") as advance:
            merged, report = merge(model, return_report=True, progress=advance)
            after = self._judged("LoRA, merged", merged, held_out)
            merge_error = float((after - adapted).abs().max())
            self.listener.note(f"{type(merged).__name__}, {str(report).splitlines()[0]}")
        parity_error = self._export_and_run(merged, held_out, after)
        self._draw(model)
        result = DemoReport(
            accuracy=self.accuracy,
            sentences=(len(corpus.train), len(corpus.held_out)),
            libraries=corpus.libraries,
            trainable=sum(p.numel() for p in trainable_parameters(model)),
            parameters=sum(p.numel() for p in model.parameters()),
            reload_error=reload_error,
            merge_ulp=report.max_ulp,
            merge_error=merge_error,
            parity_error=parity_error,
            files=self._files(),
            seconds=self.seconds,
        )
        text = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
        (self.folder / "report.json").write_text(text, encoding="utf-8")
        return result

    def _text(self) -> tuple[Corpus, list[Batch]]:
        settings = self.settings
        with self._stage("read docstrings") as advance:
            corpus = collect(
                settings.train, settings.held_out, seed=settings.seed, progress=advance
            )
            example = corpus.held_out[0]
            self.listener.note(
                f"{len(corpus.train):,} sentences to train on, {len(corpus.held_out):,} held out, "
                f"of {', '.join(corpus.libraries)}"
            )
            self.listener.note(f"such as “{example.text}” ({example.library})")
            ids = tokens(corpus.held_out, settings.max_length)
            return corpus, batches(ids, corpus.labels(corpus.held_out), 2 * settings.batch)

    def _frozen(self, corpus: Corpus, held_out: list[Batch]) -> SentenceClassifier:
        with self._stage("frozen encoder, trained head") as advance:
            base = SentenceClassifier.pretrained(len(corpus.libraries))
            ids = tokens(corpus.train, self.settings.max_length)
            parts = batches(ids, corpus.labels(corpus.train), 2 * self.settings.batch)

            def count() -> Iterator[None]:
                for done in range(len(parts)):
                    advance(done + 1, len(parts), "")
                    yield

            fit_head(base, parts, count())
            self._judged("frozen", base, held_out)
        return base

    def _rewritten(self, base: nn.Module) -> nn.Module:
        with self._stage("plan"):
            self.listener.planned(plan(base, CONFIG))
        with self._stage("rewrite"):
            return rewrite(base, CONFIG)

    def _train(self, model: nn.Module, corpus: Corpus) -> None:
        with self._stage("train with LoRA") as advance:
            train(model, corpus, self.settings, advance=advance, epoch_done=self.listener.note)

    def _save_and_reload(
        self, model: nn.Module, corpus: Corpus, held_out: list[Batch], expected: Tensor
    ) -> float:
        with self._stage("save the adapter, load it onto a fresh model"):
            save_adapter(model, self.folder / "adapter", force=True)
            fresh = SentenceClassifier.pretrained(len(corpus.libraries))
            reloaded = load_adapter(fresh, self.folder / "adapter").eval()
            outputs = logits(lambda inputs: reloaded(**inputs), held_out)
            error = float((outputs - expected).abs().max())
            if error > 1e-5:
                raise LoraFxError(f"the reloaded adapter gives other outputs: by up to {error:.2e}")
            equal = "every output bit is the same" if error == 0 else f"equal within {error:.1e}"
            self.listener.note(f"reloaded: {equal}")
        return error

    def _export_and_run(self, merged: nn.Module, held_out: list[Batch], expected: Tensor) -> float:
        from lora_fx.export.onnx import export_onnx
        from lora_fx.export.session import OnnxSession

        path = self.folder / "model.onnx"
        stages = iter(range(1, 100))
        with self._stage("export to ONNX, compared with PyTorch") as advance:
            report = export_onnx(
                merged,
                path,
                held_out[0].inputs,
                force=True,
                progress=lambda stage: advance(next(stages), 5, stage),
            )
            self.listener.note(f"opset {report.opset}, {report.nodes} nodes, {report.provider}")
        with self._stage("run in ONNX Runtime"):
            session: Any = OnnxSession(path, "cpu")
            (output,) = (port.name for port in session.outputs)
            outputs = self._judged(
                "merged, in ONNX Runtime", lambda **inputs: session.run(inputs)[output], held_out
            )
            return float((outputs - expected).abs().max())

    def _draw(self, model: nn.Module) -> None:
        from lora_fx.tools.draw import visualize

        with self._stage("draw the rewritten graph"):
            for name in ("graph.html", "graph.svg"):
                visualize(model, self.folder / name, force=True)

    def _judged(self, name: str, model: Callable[..., Tensor], held_out: list[Batch]) -> Tensor:
        if isinstance(model, nn.Module):
            model.eval()
        outputs = logits(lambda inputs: model(**inputs), held_out)
        labels = torch.cat([part.labels for part in held_out])
        self.accuracy[name] = float((outputs.argmax(-1) == labels).double().mean())
        self.listener.note(f"{name}: {100 * self.accuracy[name]:.1f} % of held-out text right")
        return outputs

    def _files(self) -> dict[str, int]:
        paths = (
            self.folder / "adapter" / "adapter_model.safetensors",
            *(self.folder / name for name in ("model.onnx", "graph.html", "graph.svg")),
        )
        return {str(path): path.stat().st_size for path in paths}

    @contextmanager
    def _stage(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        began = time.perf_counter()
        with self.listener.stage(name) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - began
