"""The demo: its text, its model, and the whole of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.ir import Plan
from lora_fx.tools import demo
from lora_fx.tools.demo import (
    LIBRARIES,
    MASK,
    Batch,
    Corpus,
    batches,
    claim_folder,
    collect,
    fit_head,
    key,
    masked,
)

SMALL = ("networkx", "numpy", "torch")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return collect(30, 10, libraries=SMALL)


def test_it_is_the_same_each_time(corpus: Corpus) -> None:
    assert collect(30, 10, libraries=SMALL) == corpus
    assert collect(30, 10, libraries=SMALL, seed=1) != corpus


def test_it_is_balanced(corpus: Corpus) -> None:
    assert Counter(corpus.labels(corpus.train)) == dict.fromkeys(range(3), 30)
    assert Counter(corpus.labels(corpus.held_out)) == dict.fromkeys(range(3), 10)


def test_no_sentence_is_in_both_parts_or_twice(corpus: Corpus) -> None:
    keys = [key(sentence.text) for sentence in corpus.train + corpus.held_out]
    assert len(set(keys)) == len(keys)


def test_no_name_of_a_library_is_left(corpus: Corpus) -> None:
    names = re.compile("|".join([*LIBRARIES, "scikit", "onnx"]), re.IGNORECASE)
    for sentence in corpus.train + corpus.held_out:
        assert not names.search(sentence.text), sentence


def test_the_sentences_are_sentences(corpus: Corpus) -> None:
    for sentence in corpus.train + corpus.held_out:
        assert len(sentence.text.split()) in range(5, 25)
        assert "\n" not in sentence.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A PyTorch tensor.", f"A {MASK} tensor."),
        ("Convert np.ndarray to torch.Tensor.", f"Convert {MASK}.ndarray to {MASK}.Tensor."),
        ("For scikit-learn estimators", f"For {MASK} estimators"),
        ("Save with TorchScript or ONNXRuntime", f"Save with {MASK} or {MASK}"),
        ("The transformer of a torchless np", "The transformer of a library np"),
    ],
)
def test_names_are_masked_where_they_stand(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_keys_do_not_see_numbers_case_and_punctuation() -> None:
    assert key("Returns the 3-d Array.") == key("returns the 4 d array")
    assert key("Returns the array.") != key("Returns the arrays.")


def test_only_the_first_sentence_is_taken() -> None:
    first = demo._first_sentence("Return ``x`` as :class:`~a.B`.\nIt is fast.\n\nMore.")
    assert first == "Return x as a.B."


def test_a_sentence_of_two_libraries_is_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(library: str, wanted: int, seed: int) -> list[demo.Sentence]:
        own = (f"What only {library} says, {letter}" for letter in "abcdefgh")
        texts = ("What everybody says.", *own)
        return [demo.Sentence(text, library, "x.py") for text in texts]

    monkeypatch.setattr(demo, "_walk", walk)
    made = collect(4, 2, libraries=("one", "two"))
    assert len(made.train) == 8
    assert all("everybody" not in sentence.text for sentence in made.train + made.held_out)
    # More than there is: less of everything, and still balanced.
    assert Counter(s.library for s in collect(12, 4, libraries=("one", "two")).train) == {
        "one": 6,
        "two": 6,
    }


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"no_such_library.*lora-fx\[demo\]"):
        collect(5, 5, libraries=("no_such_library",))


def test_batches_hold_every_sentence_once_and_pad_at_the_end() -> None:
    ids = [[7] * (1 + n % 9) for n in range(50)]
    for shuffle in (None, random.Random(0)):
        made = batches(ids, list(range(50)), 8, shuffle)
        assert sorted(torch.cat([part.labels for part in made]).tolist()) == list(range(50))
        for part in made:
            inputs, mask = part.inputs["input_ids"], part.inputs["attention_mask"]
            assert torch.equal(inputs, 7 * mask)
            assert mask.sum(1).tolist() == [len(ids[i]) for i in part.labels.tolist()]
            assert (mask.diff(dim=1) <= 0).all()


class Vectors(nn.Module):
    """A classifier whose sentences are vectors already."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def embed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors


def test_the_head_is_fitted_with_the_regularization_that_is_best_on_text_left_out() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    selection = pytest.importorskip("sklearn.model_selection")
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = (x @ torch.randn(6, 3) + torch.randn(300, 3)).argmax(-1)
    parts = [Batch({"vectors": x[i : i + 50]}, y[i : i + 50]) for i in range(0, 300, 50)]
    model: Any = Vectors()
    fit_head(model, parts, iter(()))
    folds = selection.PredefinedSplit([place % 3 for place in range(300)])

    def score(c: float) -> float:
        fitted = linear_model.LogisticRegression(C=c, max_iter=2000, tol=1e-8)
        return float(selection.cross_val_score(fitted, x, y, cv=folds).mean())

    best = max((0.03, 0.1, 0.3, 1.0), key=score)
    reference = linear_model.LogisticRegression(C=best, max_iter=2000, tol=1e-8).fit(x, y)
    np.testing.assert_allclose(model.head.weight.detach(), reference.coef_, atol=1e-3)
    np.testing.assert_allclose(model.head.bias.detach(), reference.intercept_, atol=1e-3)


def test_the_folder_of_an_earlier_demo_is_taken_over_and_no_other(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new")
    (tmp_path / "new" / "model.onnx").touch()
    claim_folder(tmp_path / "new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="--force"):
        claim_folder(tmp_path / "other")
    claim_folder(tmp_path / "other", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        claim_folder(tmp_path / "file")


def judge(folder: Path) -> dict[str, float]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    accuracy: dict[str, float] = report["accuracy"]
    assert accuracy["LoRA, merged"] == pytest.approx(accuracy["LoRA"], abs=0.01)
    assert accuracy["merged, in ONNX Runtime"] == pytest.approx(accuracy["LoRA"], abs=0.01)
    assert report["reload_error"] <= 1e-5
    assert report["merge_ulp"] <= 0.5 + 1e-6
    assert report["parity_error"] <= 1e-4
    for name in report["files"]:
        assert Path(name).stat().st_size > 0
    return accuracy


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    from lora_fx.tools.cli.app import app

    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    accuracy = judge(tmp_path / "demo")
    assert accuracy["LoRA"] > 2 / len(LIBRARIES)
    assert "frozen" not in accuracy
    titles = re.findall(r"^\[(\d+)/11\] (.*)$", result.output, re.MULTILINE)
    assert [int(number) for number, _ in titles] == list(range(1, 12))
    # The adapters are in before any text is read, and the encoder can be found.
    assert [title for _, title in titles[:4]] == [
        "load the encoder",
        "plan",
        "rewrite",
        "read docstrings",
    ]
    # A long path is folded onto several indented lines.
    assert str(demo.encoder_folder()) in "".join(result.output.split())


class Silent:
    """A listener that counts."""

    def __init__(self) -> None:
        self.stages = 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Any]:
        self.stages += 1
        yield lambda done, total, detail: None

    def note(self, text: str) -> None:
        pass

    def planned(self, made: Plan) -> None:
        pass


def test_the_demo_goes_on_with_one_thread_where_more_are_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    threads: list[int] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

        def planned(self, made: Plan) -> None:
            threads.append(torch.get_num_threads())
            raise ConfigError("that is enough")

    class Tiny(nn.Module):
        @classmethod
        def pretrained(cls, classes: int) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, classes))

    monkeypatch.setattr(demo, "SentenceClassifier", Tiny)
    monkeypatch.setattr(demo, "CONFIG", LoraConfig(r=2))
    monkeypatch.setattr(demo, "thread_advice", lambda: "2 threads are slower")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ConfigError, match="that is enough"):
            demo.run_demo(tmp_path, demo.QUICK, Notes())
        assert threads == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "2 threads are slower. The demo goes on with one" in notes
    assert f"from {demo.encoder_folder()}" in notes


@pytest.mark.slow
def test_the_full_demo_compares_with_the_frozen_encoder(tmp_path: Path) -> None:
    settings = dataclasses.replace(demo.FULL, train=60, held_out=40, epochs=1)
    claim_folder(tmp_path / "demo")
    listener = Silent()
    demo.run_demo(tmp_path / "demo", settings, listener)
    assert listener.stages == settings.stages == 12
    accuracy = judge(tmp_path / "demo")
    # So little training gains little over the head that it starts from.
    assert accuracy["LoRA"] > accuracy["frozen"] - 0.05 > 2 / len(LIBRARIES)


@pytest.mark.parametrize(
    ("options", "settings"),
    [([], demo.QUICK), (["--quick"], demo.QUICK), (["--full"], demo.FULL)],
)
def test_the_demo_is_quick_unless_all_of_it_is_wanted(
    options: list[str], settings: demo.DemoSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fx.tools.cli.app import app

    ran: list[demo.DemoSettings] = []

    def run(folder: Path, chosen: demo.DemoSettings, listener: Any) -> None:
        ran.append(chosen)
        raise ConfigError("that is enough")

    monkeypatch.setattr(demo, "run_demo", run)
    CliRunner().invoke(app, ["demo", *options, "--out", str(tmp_path / "demo")])
    assert ran == [settings]
    shown = CliRunner().invoke(app, ["demo", "--help"]).output
    assert "--full" in shown
    assert "--quick" not in shown
