"""The demo's text: which library wrote this sentence?

The first sentences of docstrings of libraries that the demo has installed anyway. Their sources are
parsed, not imported: nothing of theirs runs, and the same files give the same corpus. Names of the
libraries are masked, and no file gives text both to training and to the held-out part.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fx.errors import ConfigError

__all__ = ["LIBRARIES", "MASK", "Corpus", "Sentence", "collect", "key", "masked"]

LIBRARIES = (
    "networkx",
    "numpy",
    "onnxscript",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "transformers",
)
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
_WORDS = range(5, 41)
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
        train, held_out: In a random but fixed order. No sentence and no source file is in both.
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
        train: Sentences of each library to train on.
        held_out: Sentences of each library to judge by.
        seed: Decides which files are read, and the split.
        libraries: Import names.
        progress: Called with (done, total, library) before each library is read.

    Raises:
        ConfigError: A library is not installed, or has too little text.
    """
    parts: dict[bool, dict[str, list[Sentence]]] = {True: {}, False: {}}
    for done, library in enumerate(libraries):
        if progress is not None:
            progress(done, len(libraries), library)
        # Room for the sentences that another library turns out to have as well.
        parts[True][library] = []
        parts[False][library] = []
        for kept_out, sentence in _walk(library, (train, held_out), seed):
            parts[kept_out][library].append(sentence)
    ambiguous = _ambiguous(parts)
    chosen = {
        kept_out: [
            sentence
            for library in libraries
            for sentence in _first(parts[kept_out][library], ambiguous, wanted, library)
        ]
        for kept_out, wanted in ((False, train), (True, held_out))
    }
    for part in chosen.values():
        random.Random(seed).shuffle(part)
    return Corpus(tuple(libraries), tuple(chosen[False]), tuple(chosen[True]))


def masked(text: str) -> str:
    """The text without names of libraries."""
    return _NAMES.sub(MASK, text)


def key(text: str) -> str:
    """What two sentences share that differ in numbers, case and punctuation alone."""
    return " ".join(re.sub(r"[\d_\W]+", " ", text.lower()).split())


def _first(
    found: list[Sentence], ambiguous: frozenset[str], wanted: int, library: str
) -> list[Sentence]:
    chosen = [sentence for sentence in found if key(sentence.text) not in ambiguous][:wanted]
    if len(chosen) < wanted:
        raise ConfigError(
            f"{library} has {len(chosen)} sentences of the {wanted} that were asked for: ask for less"
        )
    return chosen


def _ambiguous(parts: dict[bool, dict[str, list[Sentence]]]) -> frozenset[str]:
    """Sentences that more than one library has: nobody can tell whose they are."""
    owners: dict[str, set[str]] = {}
    for part in parts.values():
        for library, sentences in part.items():
            for sentence in sentences:
                owners.setdefault(key(sentence.text), set()).add(library)
    return frozenset(text for text, libraries in owners.items() if len(libraries) > 1)


def _walk(library: str, wanted: tuple[int, int], seed: int) -> Iterator[tuple[bool, Sentence]]:
    """Reads files in a random order until both parts have enough, each file for one part only."""
    root = _root(library)
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    generator = random.Random(f"{seed}:{library}")
    generator.shuffle(files)
    share = wanted[1] / max(1, sum(wanted))
    counts = {False: 0, True: 0}
    limits = {False: wanted[0] * 1.1 + 5, True: wanted[1] * 1.1 + 5}
    seen: set[str] = set()
    for path in files:
        kept_out = generator.random() < share
        if all(counts[part] >= limits[part] for part in counts):
            return
        sentences = [s for s in _sentences(path) if key(s) not in seen]
        generator.shuffle(sentences)
        for text in sentences[:_PER_FILE]:
            if key(text) not in seen:
                seen.add(key(text))
                counts[kept_out] += 1
                yield kept_out, Sentence(text, library, path.relative_to(root).as_posix())


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
        if len(text.split()) in _WORDS and text[0].isalpha():
            yield text


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    plain = _ROLE.sub(r"\1", paragraph).replace("``", "").replace("`", "")
    return _SENTENCE_END.split(plain)[0]
