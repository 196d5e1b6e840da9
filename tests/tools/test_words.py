"""The count of what is hard to read, which ``make lint`` keeps from growing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_fx.tools.words import count, main

CODE = '''
"""Whether a file is read."""

def pick(given):
    """Return what is read anew."""
    found = [one for one in given]
    return found
'''
LONG = " ".join(["word"] * 33) + "."


def test_names_and_sentences_are_counted(tmp_path: Path) -> None:
    code, page, table = (tmp_path / name for name in ("code.py", "page.md", "zoo.md"))
    code.write_text(CODE)
    page.write_text(f"{LONG}\n\n```\n{LONG}\n```\n\n| a table | anew |\n")
    table.write_text(LONG)
    kinds = [finding.kind for finding in count(code)]
    assert sorted(kinds) == ["clause", "odd", "odd", "vague", "vague", "vague"]
    assert [finding.kind for finding in count(page)] == ["long"]
    assert list(count(table)) == []


def test_more_than_a_limit_is_an_error_with_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "code.py"
    path.write_text(CODE)
    monkeypatch.setattr(sys, "argv", ["words", str(path), "--vague=3"])
    main()
    monkeypatch.setattr(sys, "argv", ["words", str(path), "--vague=2"])
    with pytest.raises(SystemExit, match="vague names"):
        main()
    assert f"{path}:6: vague names: found" in capsys.readouterr().out
