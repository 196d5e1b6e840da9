"""Scripts of PEFT, and the same scripts with the import of lora_fx.peft: both print the same."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

SCRIPTS = sorted((ROOT / "examples" / "from_peft").glob("*.py"))
PAGE = (ROOT / "docs" / "from-peft.md").read_text(encoding="utf-8")


def before(script: Path) -> str:
    return script.read_text(encoding="utf-8").replace("lora_fx.peft", "peft")


def printed(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a script in a folder; what it prints, without what depends on how factors are drawn.

    That are the Trainer's losses, and the number of all parameters: PEFT has a second copy of the weights
    in ``modules_to_save``.
    """
    folder.mkdir()
    monkeypatch.chdir(folder)
    values: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, "exec"), values)
    lines = out.getvalue().splitlines()
    return [re.sub(r" \|\| all params.*", "", line) for line in lines if not line.startswith("{")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_of_peft_needs_another_import_and_no_more(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script.stem == "quantized_training":
        pytest.importorskip("bitsandbytes")
    ours = printed(script.read_text(encoding="utf-8"), script.name, tmp_path / "ours", monkeypatch)
    assert not [line for line in ours if line.endswith("False")]
    assert ours
    try:
        theirs = printed(before(script), script.name, tmp_path / "theirs", monkeypatch)
    except AttributeError as error:  # PEFT 0.21.0 with transformers 5.23 generates nothing with T5
        pytest.skip(f"PEFT itself cannot run it with this transformers: {error}")
    assert ours == theirs


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_page_shows_the_line_before_and_after(script: Path) -> None:
    old, new = before(script).splitlines(), script.read_text(encoding="utf-8").splitlines()
    changed = [
        line
        for line in difflib.unified_diff(old, new, n=0, lineterm="")
        if line.startswith(("-", "+")) and not line.startswith(("---", "+++"))
    ]
    assert len(changed) == 2  # one line
    assert f"examples/from_peft/{script.name}" in PAGE
    assert "\n".join(changed) in PAGE
