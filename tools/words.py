"""Count names, docstrings and sentences that make code and documentation hard to read, for ``make lint``.

It counts variables with names that say nothing, docstrings that begin with a clause, long sentences and
phrases that no native speaker would use. ``python -m lora_fx.tools.words --list PATH`` shows where they are.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Finding", "count", "main"]

_VAGUE: Final = frozenset(
    {
        *("asked", "found", "given", "held", "here", "made", "one", "others", "place", "places"),
        *("rest", "there", "those", "told", "what"),
    }
)
_CLAUSE = re.compile(
    r"(What|How|Whether|That|Those|Who|Whose|Where|Which|As|All that|Everything that|Of|With|Without|From|For"
    r"|To)\b"
)
_ODD = re.compile(
    r"\b(anew|beside|beneath|where(?:in|upon|by)|there are none|of its own|of (?:it|them|those) that"
    r"|that there (?:is|are)|what (?:is|was|has|it|they) \w+|who(?:ever)? \w+s|by (?:it|them)self"
    r"|come[s]? to lie|make[s]? (?:graphs|one|it) of|take[s]? .{0,20} for one)\b",
    re.IGNORECASE,
)
_LONGEST: Final = 32
_SKIPPED: Final = frozenset({"benchmarks.md", "zoo.md"})  # commands write these
_ROOTS: Final = (
    *("lora_fx", "passes", "export", "tools"),
    *("docs", "README.md", "CONTRIBUTING.md"),
)
KINDS: Final[Mapping[str, str]] = {
    "vague": "vague names",
    "clause": "docstrings that begin with a clause",
    "long": f"sentences over {_LONGEST} words",
    "odd": "odd phrases",
}
"""The kinds of findings, with their names in a report."""


class Finding(NamedTuple):
    """A passage that is hard to read.

    Attributes:
        kind: A key of :data:`KINDS`.
        where: File and line of the passage.
        text: The name, or the beginning of the sentence.
    """

    kind: str
    where: str
    text: str


def count(path: Path) -> Iterator[Finding]:
    """Yield the findings in one file of Python or Markdown; nothing for any other file."""
    if path.suffix == ".py":
        yield from _in_code(path)
    elif path.suffix == ".md" and path.name not in _SKIPPED:
        yield from _in_prose(path.read_text("utf-8"), str(path))


def _in_code(path: Path) -> Iterator[Finding]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        else:
            name = node.arg if isinstance(node, ast.arg) else ""
        if name in _VAGUE:
            yield Finding("vague", f"{path}:{getattr(node, 'lineno', 1)}", name)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            where = f"{path}:{getattr(node, 'lineno', 1)}"
            first = docstring.split("\n\n")[0].replace("\n", " ")
            if _CLAUSE.match(first):
                yield Finding("clause", where, first[:110])
            yield from _in_prose(docstring, where)


def _in_prose(text: str, where: str) -> Iterator[Finding]:
    for sentence in _sentences(text):
        if len(sentence.split()) > _LONGEST:
            yield Finding("long", where, sentence[:110])
        for match in _ODD.finditer(sentence):
            yield Finding("odd", where, f"{match.group(0)} | {sentence[:110]}")


def _sentences(text: str) -> list[str]:
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = re.sub(r"^\s*[|#>].*$", " ", text, flags=re.MULTILINE)
    return re.split(r"(?<=[.!?:])\s+", re.sub(r"\s+", " ", text))


def main() -> None:
    """Print the counts; exit with 1 if one is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m lora_fx.tools.words", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders; all by default")
    parser.add_argument("--list", action="store_true", help="show where they are")
    for kind, name in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, metavar="N", help=f"allow at most N {name}")
    options = parser.parse_args()
    findings: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for root in options.paths or map(Path, _ROOTS):
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            for finding in count(path):
                findings[finding.kind].append(finding)
    limits = {kind: getattr(options, kind) for kind in KINDS}
    above = [
        kind for kind, limit in limits.items() if limit is not None and len(findings[kind]) > limit
    ]
    for kind in KINDS if options.list else above:
        for finding in findings[kind]:
            print(f"{finding.where}: {KINDS[kind]}: {finding.text}")
    print("; ".join(f"{KINDS[kind]} {len(rows)}" for kind, rows in findings.items()))
    if above:
        raise SystemExit(
            f"more than the Makefile allows: {', '.join(KINDS[kind] for kind in above)}"
        )


if __name__ == "__main__":
    main()
