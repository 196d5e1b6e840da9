"""The migration page: every name in it exists in the library that it is said to be in."""

from __future__ import annotations

import re
from pathlib import Path

import peft

import lora_fx
import lora_fx.peft
from lora_fx.config import fields as _config_fields

PAGE = (Path(__file__).parents[2] / "docs" / "from-peft.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]
SOURCE = "\n".join(
    path.read_text(encoding="utf-8") for path in Path(peft.__file__).parent.rglob("*.py")
)


def test_our_names_exist() -> None:
    named = set(re.findall(r"lora_fx\.(\w+)", PAGE))
    assert len(named) > 25
    assert named <= {*lora_fx.__all__, "peft"}
    assert all(hasattr(lora_fx.peft, name) for name in re.findall(r"lora_fx\.peft\.(\w+)", PAGE))


def test_the_page_names_every_verb() -> None:
    """What a user of PEFT would look for has a place on it."""
    verbs = {name for name in lora_fx.__all__ if name.islower() and not name.startswith("_")}
    elsewhere = {"capture", "export_onnx", "save_onnx_adapter", "trainable_parameters", "verify"}
    elsewhere |= {"visualize", "compare", "inspect_adapter"}
    assert verbs - elsewhere <= set(re.findall(r"lora_fx\.(\w+)", PAGE))


def test_the_page_names_all_of_lora_fx_peft() -> None:
    names = {*lora_fx.peft.__all__, *lora_fx.peft._CONFIGS, "PeftModel", "AutoPeftModel"}
    assert not [name for name in names if f"`{name}`" not in PAGE]


def test_pefts_names_exist() -> None:
    calls = {n for row in ROWS for n in re.findall(r"(\w+)\(", row.split("|")[1])} - {"model"}
    assert len(calls) > 25
    # Read, not imported: some of its modules need packages that it does not require.
    assert not [name for name in calls if not re.search(rf"(def|class) {name}\b", SOURCE)]


def test_every_foreign_field_is_named() -> None:
    silent = {"megatron_core", "qalora_group_size", "runtime_config"}
    assert not [f for f in _config_fields.FOREIGN if f not in silent and f"`{f}`" not in PAGE]
