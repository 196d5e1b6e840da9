"""The demo's text: which library wrote this sentence?

The first sentences of docstrings of libraries that the demo has installed anyway. Their sources are
parsed, not imported: nothing of theirs runs, and the same files give the same corpus. Names of the
libraries are masked, and no sentence is both in the text to train on and in the held-out part.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fx.errors import ConfigError

__all__ = ["LIBRARIES", "Corpus", "Sentence", "collect"]

LIBRARIES = ("networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
MASK = "library"
"""What stands for the name of a library: a word that the encoder knows."""

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
    """One example.

    Attributes:
        text: The sentence, names of libraries masked.
        library: Which library it is from.
        file: The source file, relative to the library.
    """

    text: str
    library: str
    file: str


@dataclass(frozen=True)
class Corpus:
    """Balanced text with a held-out part.

    Attributes:
        libraries: The classes, in the order of their labels.
        train, held_out: In a random but fixed order. No sentence is in both, not even with other
            numbers or punctuation.
    """

    libraries: tuple[str, ...]
    train: tuple[Sentence, ...]
    held_out: tuple[Sentence, ...]

    def labels(self, part: Sequence[Sentence]) -> list[int]:
        """The class of each sentence."""
        return [self.libraries.index(sentence.library) for sentence in part]


def collect(
    train: int,
    held_out: int,
    *,
    seed: int = 0,
    libraries: Sequence[str] = LIBRARIES,
    progress: Callable[[int, int, str], None] | None = None,
) -> Corpus:
    """Makes the corpus.

    Args:
        train: Sentences of each library to train on, fewer where a library has less.
        held_out: Sentences of each library to judge by.
        seed: Decides which files are read, and the split.
        libraries: Import names.
        progress: Called with (done, total, library) before each library is read.

    Raises:
        ConfigError: A library is not installed, or has too little text.
    """
    found: dict[str, list[Sentence]] = {}
    for done, library in enumerate(libraries):
        if progress is not None:
            progress(done, len(libraries), library)
        # With room for the sentences that another library turns out to have as well.
        with _no_collection():
            found[library] = list(_walk(library, round((train + held_out) * 1.1) + 5, seed))
    ambiguous = _ambiguous(found)
    chosen: dict[str, list[Sentence]] = {}
    for library, sentences in found.items():
        chosen[library] = [s for s in sentences if key(s.text) not in ambiguous]
        random.Random(seed).shuffle(chosen[library])
    # Balanced whatever the versions of the libraries: as many of each as the smallest one has.
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
    """The text without names of libraries."""
    return _NAMES.sub(MASK, text)


def key(text: str) -> str:
    """What two sentences share that differ in numbers, case and punctuation alone."""
    return " ".join(re.sub(r"[\d_\W]+", " ", text.lower()).split())


def _ambiguous(found: Mapping[str, Sequence[Sentence]]) -> frozenset[str]:
    """Sentences that more than one library has: their class is ambiguous."""
    owners: dict[str, set[str]] = {}
    for library, sentences in found.items():
        for sentence in sentences:
            owners.setdefault(key(sentence.text), set()).add(library)
    return frozenset(text for text, libraries in owners.items() if len(libraries) > 1)


def _walk(library: str, wanted: int, seed: int) -> Iterator[Sentence]:
    """Reads files in a random order until there is enough, a little of each."""
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
    """Syntax trees are many objects without cycles: looking for cycles doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _root(library: str) -> Path:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the demo reads {library}, which is missing: pip install 'lora-fx[demo]'"
        )
    return Path(spec.origin).parent


def _sentences(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # a template, or a file for another Python: no text of ours
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
