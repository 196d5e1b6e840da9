"""Golden graphs: what a pass makes of a graph, printed, in tests/golden/.

`LORA_FX_UPDATE_GOLDEN=1 make test` writes them anew; the diff is the review.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from torch import fx

from lora_fx.ir.graph import META_KEY

__all__ = ["check_golden", "printed"]

FOLDER = Path(__file__).resolve().parent / "golden"


def printed(graph: fx.Graph) -> str:
    """The code that a graph runs as, then its tags."""
    lines = [line.rstrip() for line in graph.python_code("self").src.splitlines()]
    code = "\n".join(line for line in lines if line)
    tags = [
        f"# {node.name}: {tag.role.value} of {tag.weight}"
        + (f" ({tag.adapter})" if tag.adapter else "")
        for node in graph.nodes
        if (tag := node.meta.get(META_KEY)) is not None
    ]
    return "\n".join([code, *tags]) + "\n"


def check_golden(name: str, text: str) -> None:
    """`text` is what tests/golden/NAME.txt holds."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("LORA_FX_UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    assert path.is_file(), f"{path} is missing: LORA_FX_UPDATE_GOLDEN=1 writes it"
    expected = path.read_text(encoding="utf-8")
    difference = "\n".join(
        difflib.unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "found", lineterm=""
        )
    )
    assert text == expected, f"{path.name} changed (LORA_FX_UPDATE_GOLDEN=1 accepts):\n{difference}"
