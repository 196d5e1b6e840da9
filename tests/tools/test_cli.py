"""The command line, in this process through typer's runner, and once as a user runs it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("typer")

import typer
from typer.testing import CliRunner, Result

import lora_fx
from lora_fx.tools.cli.app import COMMANDS, app
from lora_fx.tools.cli.options import as_options
from tests.quantized import IDS, llama
from tests.zoo import tiny_llama

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)

def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(3, 8),)

class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x @ self.kernel if int(x.shape[-1]) == 8 else x)

opaque = Opaque

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x, mask=None):
        x = nn.functional.linear(x, self.mix)
        return self.head(x if mask is None else x * mask)

masked = Masked

def tied():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    net[1].weight = net[0].weight
    return net

def pair():
    return Opaque(), (torch.randn(3, 8),)

def rows():
    return {"x": torch.randn(3, 8)}

def misfits():
    return torch.randn(3, 7)

class Lossy(Net):
    def forward(self, x, labels=None):
        out = super().forward(x)
        return out if labels is None else nn.functional.mse_loss(out, labels)

def lossy():
    torch.manual_seed(0)
    return Lossy()

def labeled():
    torch.manual_seed(1)
    return {"x": torch.randn(30, 8), "labels": torch.randn(30, 4)}
"""
MODEL = "cli_net_for_tests:net"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "cli_net_for_tests.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "cli_net_for_tests", raising=False)
    log = logging.getLogger("lora_fx")
    handlers, level = list(log.handlers), log.level
    yield tmp_path
    log.handlers, log.level = handlers, level


def lora(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def worked(*args: str) -> str:
    result = lora(*args)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args: str) -> str:
    result = lora(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def adapter(here: Path) -> Path:
    from cli_net_for_tests import net

    model = lora_fx.rewrite(net()[0], lora_fx.LoraConfig(r=2, init_lora_weights=False))
    lora_fx.save_adapter(model, here / "adapter")
    return here / "adapter"


def test_every_command_has_a_help_text() -> None:
    overview = worked("--help")
    for command in COMMANDS:
        assert command.__name__.replace("_", "-") in overview
        assert "Usage" in worked(command.__name__.replace("_", "-"), "--help")
    assert lora_fx.__version__ in worked("--version")


WITHOUT_TORCH = """
import contextlib, io, sys
from lora_fx.tools.cli import main

for words in eval(sys.argv[1]):
    sys.argv = ["lora-fx", *words]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main()
    print(words, "Usage" in said.getvalue() or "plan" in said.getvalue(), "torch" in sys.modules)
"""


def test_help_and_completion_come_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch takes seconds to import."""

    def asked(*lines: list[str]) -> list[str]:
        code = [sys.executable, "-c", WITHOUT_TORCH, repr(lines)]
        return subprocess.run(code, capture_output=True, text=True, check=True).stdout.splitlines()

    names = [command.__name__.replace("_", "-") for command in COMMANDS]
    lines: list[list[str]] = [["--help"], *([name, "--help"] for name in names)]
    assert asked(*lines) == [f"{line} True False" for line in lines]
    monkeypatch.setenv("_LORA_FX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lora-fx pl")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert asked([]) == ["[] True False"]


WRONG = [
    ("export", MODEL, "net.pt"),
    ("export", MODEL, "net.onnx", "--adapter", "nowhere"),
    ("export", MODEL, "net.onnx", "--dtype", "int3"),
    ("export", MODEL, "net.onnx", "--provider", "tpu"),
    ("export", "hf:nowhere", "net.onnx"),
    ("export-adapter", "nowhere", "a.onnx_adapter"),
    ("export-adapter", ".", "a.onnx_adapter", "--base", "none.onnx"),
    ("merge", MODEL, ".", "merged.bin"),
    ("merge", MODEL, "nowhere", "merged.safetensors"),
    ("merge", "no-model", ".", "merged.safetensors"),
    ("plan", MODEL, "--config", "nofile.json"),
    ("plan", MODEL, "--diff", "nofile.json"),
    ("plan", MODEL, "--r", "0"),
    ("plan", "hf:org/model"),
    ("plan", MODEL, "--mesh", "fsdp=2", "--batch", "0"),
    ("rewrite", MODEL, "--out", "net.pt"),
    ("visualize", MODEL, "net.bmp"),
    ("visualize", MODEL, "net.svg", "--adapter", "nowhere"),
    ("run", "none.onnx"),
    ("run", "none.onnx", "--provider", "tpu"),
    ("generate", "none.onnx"),
    ("generate", "none.onnx", "--text", "hello"),
    ("inspect", "nowhere"),
    ("verify", ".", "--onnx", "none.onnx"),
]
CHECKED = """
import contextlib, io, sys
from lora_fx.tools.cli import main

for words in eval(sys.argv[1]):
    sys.argv = ["lora-fx", *words]
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as error:
            code = error.code
    print(words, code, said.getvalue().count("error: "), "torch" in sys.modules)
"""


def test_what_is_typed_wrong_is_said_before_torch_is_imported(here: Path) -> None:
    code = [sys.executable, "-c", CHECKED, repr(WRONG)]
    said = subprocess.run(code, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{line} 2 1 False" for line in WRONG]


def test_swapped_arguments_are_told(here: Path, adapter: Path) -> None:
    swapped = " ".join(refused("merge", str(adapter), MODEL, "out.safetensors").split())
    assert "adapter is the folder of an adapter, and a model is needed here" in swapped
    (here / "base").mkdir()
    (here / "base" / "config.json").write_text("{}", encoding="utf-8")
    words = "base is the folder of a model, and an adapter is needed here: the model comes first"
    assert words in " ".join(refused("merge", MODEL, "base", "out.safetensors").split())


def test_a_wrong_name_of_an_adapter_is_told_with_those_that_exist(
    here: Path, adapter: Path
) -> None:
    for name in ("code", "maths"):
        shutil.copytree(adapter, here / "several" / name)
    for args in (("merge", MODEL, "several/cod", "out.safetensors"), ("inspect", "several/cod")):
        text = " ".join(refused(*args).split())
        assert "Adapters that exist: several/code, several/maths" in text
    text = " ".join(refused("inspect", "several").split())
    assert "did you mean several/code or several/maths?" in text
    assert "exist" not in " ".join(refused("inspect", "nowhere/cod").split())


def test_the_suffixes_of_pictures_are_those_of_visualize() -> None:
    from lora_fx.tools.cli import model_commands
    from lora_fx.tools.draw import FORMATS

    assert tuple(FORMATS) == model_commands._PICTURES


def test_choices_are_checked_before_a_model_is_loaded() -> None:
    for option, value, known in (
        ("task", "summarization", "text2text-generation"),
        ("target", "browser", "transformers.js"),
        ("adapters", "both", "bank"),
        ("optimize", "most", "standard"),
    ):
        text = refused("export", "gone_for_tests:net", "x.onnx", f"--{option}", value)
        assert f"--{option} {value} is unknown: give one of " in text
        assert known in text
    assert "use nf4" in refused("plan", "gone_for_tests:net", "--quantize", "int3")


def test_an_adapter_of_a_classifier_merges_over_its_base(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    from tests.tools.test_models import adapted_bert

    adapted: Any = adapted_bert(here, of="AutoModelForSequenceClassification", task="SEQ_CLS")
    adapted.config.id2label = dict(enumerate("abcde"))
    lora_fx.save_adapter(adapted, "adapter")
    worked("merge", "hf:base", "adapter", "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(here / "merged").eval()
    assert merged.config.id2label == dict(enumerate("abcde"))
    ids = torch.arange(12).reshape(2, 6)
    # The first sentence of a pair has type 0, the second type 1.
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
    with torch.no_grad():
        expected = adapted(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    worked("export", "hf:base", "net.onnx", "--adapter", "adapter")
    session = lora_fx.OnnxSession("net.onnx", "cpu")
    assert {port.name for port in session.inputs} == set(inputs)
    found = session.run(inputs)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_refusal_advises_the_command() -> None:
    text = " ".join(refused("plan", MODEL, "--target", "lost").split())
    assert "lora-fx plan MODEL lists what can be adapted" in text
    assert "lora_fx.plan" not in text


def test_plan_folds_equal_layers() -> None:
    text = worked("plan", MODEL, "--r", "4")
    assert "layers.{0-2}" in text
    assert "×3" in text
    assert "3 sites, 192 trainable" in text
    assert "the output head" in text
    assert "layers.1" in worked("plan", MODEL, "--all")


def test_plan_as_json() -> None:
    made = json.loads(worked("plan", MODEL, "--json", "--alpha", "16", "--rslora"))
    assert made["config"]["lora_alpha"] == 16
    assert made["config"]["use_rslora"] is True
    assert [site["name"] for site in made["sites"]] == ["layers.0", "layers.1", "layers.2"]


def test_a_configuration_from_a_file_or_an_adapter_can_be_changed(
    here: Path, adapter: Path
) -> None:
    made = json.loads(worked("plan", MODEL, "--config", str(adapter), "--json"))
    assert made["config"]["r"] == 2
    (here / "lora.json").write_text('{"r": 3, "lora_dropout": 0.5}', encoding="utf-8")
    changed = ("--dropout", "0.25", "--target", "layers.0,layers.2", "--target", "head")
    made = json.loads(worked("plan", MODEL, "--config", "lora.json", *changed, "--json"))
    assert (made["config"]["r"], made["config"]["lora_dropout"]) == (3, 0.25)
    assert [site["name"] for site in made["sites"]] == ["layers.0", "layers.2", "head"]


def test_targets_by_expression_and_all_linear() -> None:
    made = json.loads(worked("plan", MODEL, "--target-regex", r".*\.[01]", "--json"))
    assert len(made["sites"]) == 2
    made = json.loads(worked("plan", MODEL, "--target", "all-linear", "--json"))
    assert made["config"]["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--r", "0"), "LoraConfig.r: found 0"),
        (("--alpha", "nan"), "a finite number"),
        (("--dropout", "1"), "below 1"),
        (("--target", "layer.0"), "matches nothing; nearest: "),
        (("--target", "layers.0", "--target", "nothing", "--strict"), "'nothing'"),
        (("--target-regex", "("), "not a regular expression"),
        (("--target", "a", "--target-regex", "b"), "give one of them"),
        (("--bias", "some"), "lora_only"),
        (("--config", "nowhere"), "does not exist"),
        (("--config", "cli_net_for_tests.py"), "not readable JSON"),
    ],
)
def test_bad_input_is_one_message(args: tuple[str, ...], words: str) -> None:
    assert words in refused("plan", MODEL, *args)


def test_a_traceback_only_for_debugging() -> None:
    assert isinstance(lora("plan", MODEL, "--r", "0").exception, SystemExit)
    for args in (("--debug", "plan", MODEL, "--r", "0"), ("plan", MODEL, "--r", "0", "--debug")):
        assert isinstance(lora(*args).exception, lora_fx.ConfigError)


def test_plan_advises() -> None:
    text = " ".join(worked("plan", MODEL, "--target", "layers.0", "--tokens", "5000").split())
    assert "only 33 % of the FLOPs of linear operations are adapted" in text
    assert "layers.{1-2} 67 %" in text
    assert "5,000 tokens hold at most about 5 kbit: to store all" in text
    assert "10 times that of full fine-tuning" in text
    made = json.loads(worked("plan", MODEL, "--target", "layers.0", "--tokens", "5000", "--json"))
    assert made["advice"]["capacity"]["tokens"] == 5000


def test_plan_chooses_ranks_for_a_budget(here: Path) -> None:
    lossy = ("plan", "cli_net_for_tests:lossy", "--inputs", "cli_net_for_tests:labeled")
    text = worked(*lossy, "--budget", "200", "--out", "ranks.json")
    assert "of 200 parameters; the ranks hold" in text
    made = json.loads(worked(*lossy, "--config", "ranks.json", "--json"))
    again = json.loads(worked(*lossy, "--budget", "0.8kB", "--json"))
    ranks = [site["rank"] for site in made["sites"]]
    assert ranks == [site["rank"] for site in again["sites"]]
    assert 192 == made["trainable_parameters"] == again["spent"]["used"] / 4
    assert sum(ranks) == 12
    assert "exists: give another name" in refused(*lossy, "--budget", "200", "--out", "ranks.json")
    assert "--budget needs --inputs" in refused("plan", MODEL, "--budget", "200")
    assert "--out is for the ranks of --budget" in refused("plan", MODEL, "--out", "x.json")
    assert "no size and no number of parameters" in refused(*lossy, "--budget", "much")


def test_plan_says_what_the_text_of_a_plan_says(here: Path) -> None:
    text = worked("plan", "cli_net_for_tests:tied")
    assert "tied weights, untied by a merge (2):" in text
    assert "shared with 1.weight" in text
    config = here / "dora.json"
    config.write_text(json.dumps({"use_dora": True}), encoding="utf-8")
    assert "magnitude" in worked("plan", MODEL, "--config", str(config))


def test_rewrite_prints_the_graph_between_passes(here: Path) -> None:
    text = worked("rewrite", MODEL, "--print-after", "insert", "--region", "layers.0")
    assert "after insert" in text
    assert "lora_A" in text
    assert "# layers.1" not in text
    text = worked("rewrite", MODEL, "--print-after", "capture", "--print-after", "plan")
    assert "# layers.1" in text
    assert "lora_A" not in text
    assert "site(s)" in text
    text = worked("rewrite", MODEL, "--print-after", "all", "--region", "layers.0")
    assert text.index("after capture") < text.index("after match") < text.index("after install")
    # What no pass has changed is there once: before, with the branch, and with both as one function.
    assert text.count("# layers.0\n") == 3
    assert "(1 of 1 graphs as printed above)" in text
    assert "nearest: insert" in refused("rewrite", MODEL, "--print-after", "inserts")
    assert "nearest: 'layers.0'" in refused(
        "rewrite", MODEL, "--print-after", "insert", "--region", "layers.00"
    )


def test_rewrite_shows_regions_code_and_graphs(here: Path) -> None:
    assert "branches" in worked("rewrite", MODEL)
    rows = [line.split() for line in worked("rewrite", "cli_net_for_tests:masked").splitlines()]
    found = {row[0]: (row[1], row[3]) for row in rows if len(row) == 4}
    assert found["(root)"] == ("Masked", "1")
    assert found["head"] == ("Linear", "0")
    text = worked("rewrite", MODEL)
    assert re.search(r"layers\.\{0-2\} +Linear +\d+ +1 +×3", text)
    assert "layers.1" not in text
    assert re.search(r"layers\.1 +Linear +\d+ +1", worked("rewrite", MODEL, "--all"))
    code = worked("rewrite", MODEL, "--region", "layers.0")
    assert "def forward(self" in code
    assert "lora_A" in code
    assert "get_attr" in worked("rewrite", MODEL, "--region", "layers.0", "--graph")
    assert "nearest: 'layers.0'" in refused("rewrite", MODEL, "--region", "layers.00")
    worked("rewrite", MODEL, "--out", "all.txt")
    assert "# layers.2" in (here / "all.txt").read_text(encoding="utf-8")
    worked("rewrite", MODEL, "--out", "all.txt")
    assert "exists" in refused("rewrite", MODEL, "--out", "all.txt", "--no-force")


def test_a_frontend_and_inputs_can_be_named(here: Path) -> None:
    opaque, rows = "cli_net_for_tests:opaque", ("--inputs", "cli_net_for_tests:rows")
    assert "no graph" in refused("plan", opaque)
    assert '"frontend": "export"' in worked("plan", opaque, *rows, "--json")
    export = ("--frontend", "export")
    assert "needs example_inputs" in refused("plan", opaque, *export)
    assert '"frontend": "export"' in worked("plan", opaque, *export, *rows, "--json")
    assert '"frontend": "export"' in worked("plan", "cli_net_for_tests:pair", *export, "--json")
    assert "(root)" in worked("rewrite", opaque, *rows)
    worked("visualize", opaque, "net.svg", *rows)
    worked("visualize", opaque, "base.svg", "--base", *export, *rows)
    assert '"frontend": "regions"' in worked("plan", MODEL, "--frontend", "regions", "--json")
    assert "must be auto, symbolic" in refused("plan", MODEL, "--frontend", "dynamo")
    assert "nearest: rows" in refused("plan", MODEL, "--inputs", "cli_net_for_tests:row")
    assert "names no inputs" in refused("plan", MODEL, "--inputs", "rows")
    assert "does not run" in refused("plan", MODEL, "--inputs", "cli_net_for_tests:misfits")


def test_models_that_say_what_they_take_need_no_inputs(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        architectures=["BertModel"],
    ).save_pretrained(here / "bert")
    made = json.loads(worked("plan", "hf:bert", "--frontend", "export", "--json"))
    assert made["frontend"] == "export"
    made = json.loads(worked("plan", "timm:test_vit", "--frontend", "export", "--json"))
    assert made["frontend"] == "export"


def test_visualize(here: Path) -> None:
    worked("visualize", MODEL, "net.svg")
    assert "<svg" in (here / "net.svg").read_text(encoding="utf-8")
    assert "exists" in refused("visualize", MODEL, "net.svg", "--no-force")
    worked("visualize", MODEL, "net.svg", "--plan")
    assert "Plan" in (here / "net.svg").read_text(encoding="utf-8")
    worked("visualize", MODEL, "base.json", "--base")
    assert "suffix" in refused("visualize", MODEL, "net.bmp")


def test_visualize_an_adapter_and_more(here: Path, adapter: Path) -> None:
    worked("visualize", MODEL, "net.json", "--adapter", str(adapter))
    drawn = json.loads((here / "net.json").read_text("utf-8"))
    assert drawn["adapters"] == ["default"]
    worked("visualize", MODEL, "two.html", "--compare")
    worked("visualize", str(adapter), "folder.svg")
    worked("visualize", MODEL, "explorer.json", "--format", "model-explorer")
    assert (here / "explorer.nodes.json").is_file()
    assert "model-explorer" in refused("visualize", MODEL, "other.json", "--format", "netron")
    assert "--plan" in refused("visualize", MODEL, "x.svg", "--adapter", str(adapter), "--plan")


@pytest.mark.parametrize(
    ("command", "suffix"),
    [
        (("export", MODEL), ".onnx"),
        (("export-adapter", "adapter"), ".onnx_adapter"),
        (("visualize", MODEL), ".svg"),
        (("merge", MODEL, "adapter"), ".safetensors"),
        (("rewrite", MODEL, "--out"), ".svg"),
        (("run", "m.onnx", "--output"), ".npz"),
    ],
)
def test_a_folder_or_another_kind_of_file_is_refused(
    here: Path, adapter: Path, command: tuple[str, ...], suffix: str
) -> None:
    (here / "folder").mkdir()
    before = sorted(here.rglob("*"))
    for path in ("folder", "new/", f"new{suffix}/"):
        assert "is a folder: give the name of the file" in " ".join(refused(*command, path).split())
    for path in ("net.pt", "net"):
        assert f"{suffix}" in refused(*command, path)
    assert sorted(here.rglob("*")) == before


def test_merge_writes_the_weights_of_the_merged_model(here: Path, adapter: Path) -> None:
    from cli_net_for_tests import net

    text = worked("merge", MODEL, str(adapter), "merged.safetensors")
    assert "3 weight(s) merged" in text
    adapted = lora_fx.load_adapter(net()[0], adapter).eval()
    model, (x,) = net()
    model.load_state_dict(load_file(here / "merged.safetensors"))
    torch.testing.assert_close(model(x), adapted(x))
    assert not torch.equal(net()[0](x), adapted(x))
    assert "--force" in refused("merge", MODEL, str(adapter), "merged.safetensors")
    worked("merge", MODEL, str(adapter), "merged.safetensors", "--force", "--all")
    assert ".safetensors" in refused("merge", MODEL, str(adapter), "merged.bin")
    assert "is not a folder on this machine" in refused(
        "merge", MODEL, "nowhere", "other.safetensors"
    )
    assert sorted(path.name for path in here.iterdir() if "merged" in path.name) == [
        "merged.safetensors"
    ]


def test_merge_casts_and_quantizes_again(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    llama().save_pretrained(here / "dense")
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(here / "dense", quantization_config=how)
    base.save_pretrained(here / "nf4")
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, init_lora_weights=False))
    lora_fx.save_adapter(adapted, here / "nf4-adapter")
    text = worked("merge", "hf:nf4", "nf4-adapter", "again", "--requantize", "--all")
    assert "14 quantized again" in text
    assert "lost by quantizing again" in text
    assert load(here / "again").is_quantized
    worked("merge", "hf:nf4", "nf4-adapter", "merged", "--dtype", "bf16")
    merged = load(here / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        torch.testing.assert_close(merged.float()(IDS).logits, expected, atol=0.02, rtol=0)
    assert "leave out dtype" in refused(
        "merge", "hf:nf4", "nf4-adapter", "other", "--requantize", "--dtype", "bf16"
    )
    assert "fp32, fp16, bf16" in refused("merge", "hf:nf4", "nf4-adapter", "o", "--dtype", "int8")
    dense = ("merge", "hf:dense", "nf4-adapter", "other", "--requantize")
    assert "base is not quantized" in " ".join(refused(*dense).split())


def test_merge_does_not_load_a_folder_of_transformers(here: Path) -> None:
    pytest.importorskip("transformers")
    base, _ = tiny_llama()
    base.save_pretrained(here / "base", max_shard_size="8KB")
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, init_lora_weights=False))
    lora_fx.save_adapter(adapted, here / "adapter")
    assert worked("merge", "hf:base", "adapter", "merged").startswith(
        "14 weight(s) merged, 100 % of the change kept\nwrote"
    )
    # In memory it would be written as one file.
    names = {path.name for path in (here / "base").glob("*.safetensors")}
    assert len(names) > 1
    assert {path.name for path in (here / "merged").glob("*.safetensors")} == names
    assert "exists" in refused("merge", "hf:base", "adapter", "merged")
    report = json.loads(worked("merge", "hf:base", "adapter", "merged", "--force", "--json"))
    assert all(site["max_ulp"] <= 0.5 for site in report["sites"])
    assert "0.4" in worked("merge", "hf:base", "adapter", "measured", "--all")


def test_merge_writes_a_folder_of_transformers(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    base = transformers.BertModel(config).eval()
    base.save_pretrained(here / "bert")
    (here / "bert" / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=2, init_lora_weights=False))
    lora_fx.save_adapter(adapted, here / "bert-adapter")
    worked("merge", "hf:bert", "bert-adapter", "merged")
    merged = transformers.BertModel.from_pretrained(here / "merged").eval()
    ids = torch.arange(8).reshape(1, 8)
    torch.testing.assert_close(merged(ids)[0], adapted(ids)[0], rtol=1e-5, atol=1e-5)
    assert (here / "merged" / "vocab.txt").exists()
    assert "--force" in refused("merge", "hf:bert", "bert-adapter", "merged")
    assert "give another folder" in refused("merge", "hf:bert", "bert-adapter", "bert", "--force")
    (here / "merged" / "notes.txt").write_text("mine", encoding="utf-8")
    worked("merge", "hf:bert", "bert-adapter", "merged", "--force")
    assert (here / "merged" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_export_and_run(here: Path, adapter: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert "parity" in worked("export", MODEL, "net.onnx", "--adapter", str(adapter))
    assert "--force" in refused("export", MODEL, "net.onnx")
    found = json.loads(worked("export", MODEL, "net.onnx", "--force", "--json"))
    assert (found["path"], list(found["files"])) == ("net.onnx", ["net.onnx"])
    worked("export", MODEL, "net.onnx", "--adapter", str(adapter), "--force")
    assert "fp32, fp16, bf16" in refused("export", MODEL, "other.onnx", "--dtype", "int3")
    text = worked("run", "net.onnx", "--repeat", "2", "--size", "batch=5")
    assert "5×8" in text
    assert "ms a run" in text
    assert "random values were used for x: for your own, give --input NAME=FILE.npy" in text
    assert "cpu: " in worked("run", "net.onnx", "--provider", "CPUExecutionProvider")
    x = np.ones((4, 8), np.float32)
    np.save("x.npy", x)
    assert "random" not in worked("run", "net.onnx", "--input", "x=x.npy", "--output", "out.npz")
    from cli_net_for_tests import net

    expected = lora_fx.load_adapter(net()[0], adapter).eval()(torch.from_numpy(x))
    (found,) = np.load("out.npz").values()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    for args, words in (
        (("--output", "out.npz"), "--force"),
        (("--output", "out.txt"), ".npz"),
        (("--input", "y=x.npy"), "the inputs are x float32"),
        (("--input", "x"), "name=value"),
        (("--input", "x=missing.npy"), "not a readable .npy"),
        (("--size", "length=3"), "dynamic axes (batch)"),
        (("--provider", "tpu"), "unknown provider"),
    ):
        assert words in refused("run", "net.onnx", *args)
    assert "there is no file" in refused("run", "none.onnx")


def test_errors_name_options(here: Path, adapter: Path) -> None:
    pytest.importorskip("onnxruntime")
    worked("export", MODEL, "net.onnx", "--adapter", str(adapter))
    text = refused("run", "net.onnx", "--adapter", str(adapter))
    assert "--adapters inputs" in text
    assert "adapters='inputs'" not in text
    assert "with --task text-generation" in refused("generate", "net.onnx", "--ids", "1 2")
    commands = typer.main.get_command(app).commands.values()
    for message, spelled in (
        ("verify=False, force=True", "--no-verify, force=True"),
        ("give max_new_tokens=4 or r=2", "give --max-new-tokens 4 or --r 2"),
        ("call f(x, dtype='fp16'), g(dtype='fp16')", "call f(x, dtype='fp16'), g(dtype='fp16')"),
        ("no such thing=True or dtype=x", "no such thing=True or dtype=x"),
    ):
        assert as_options(message, commands) == spelled


def test_random_inputs_have_the_sizes_of_given_ones(here: Path) -> None:
    pytest.importorskip("onnxruntime")

    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    lora_fx.export_onnx(Two(), "two.onnx", (torch.randn(3, 4), torch.randn(3, 4)))
    np.save("b.npy", np.ones((7, 5), np.float32))
    assert "7×5" in worked("run", "two.onnx", "--input", "b=b.npy", "--repeat", "1")
    words = "--size batch=3: b.npy has 7 there"
    assert words in refused("run", "two.onnx", "--input", "b=b.npy", "--size", "batch=3")


def test_export_of_a_bank(here: Path, adapter: Path) -> None:
    pytest.importorskip("onnxruntime")
    shutil.copytree(adapter, here / "other.v2")
    adapters = ("--adapter", str(adapter), "--adapter", "other.v2")
    assert "--adapters bank" in refused("export", MODEL, "bank.onnx", *adapters)
    how = ("--adapters", "bank", "--max-adapters", "3", "--max-rank", "4")
    text = " ".join(worked("export", MODEL, "bank.onnx", *adapters, *how).split())
    assert "one for each row of a batch" in text
    assert "2 of at most 3 adapters, filled up to rank 4" in text
    assert lora_fx.OnnxSession("bank.onnx", "cpu").adapters == ("adapter", "other-v2")
    assert "2 of at most 3 adapters" in " ".join(worked("doctor", "bank.onnx").split())
    for chosen in (str(adapter), "other-v2"):
        worked("run", "bank.onnx", "--adapter", chosen, "--repeat", "1")
    text = " ".join(refused("run", "bank.onnx", "--adapter", "other-v3").split())
    assert "exist: adapter (in the file), other-v2 (in the file), adapter, other.v2" in text
    each = [word for name in (str(adapter), "none", "other-v2") for word in ("--adapter", name)]
    worked("run", "bank.onnx", *each, "--size", "batch=3", "--output", "rows.npz", "--repeat", "1")
    session, rows = lora_fx.OnnxSession("bank.onnx", "cpu"), np.load("rows.npz")
    drawn = np.random.default_rng(0).standard_normal((3, *session.inputs[0].shape[1:]))
    alone = session.run(drawn.astype(np.float32), adapter=["adapter", None, "other-v2"])
    for name, value in alone.items():
        np.testing.assert_allclose(rows[name], value, rtol=1e-5, atol=1e-6)
    shutil.copytree(adapter, here / "more" / adapter.name)
    twice = ("--adapter", str(adapter), "--adapter", f"more/{adapter.name}")
    assert "another one is named adapter" in refused("run", "bank.onnx", *twice)
    assert "adapter has 3 names" in refused("run", "bank.onnx", *each, "--size", "batch=2")


def test_export_with_adapters_as_inputs(here: Path, adapter: Path) -> None:
    pytest.importorskip("onnxruntime")
    text = worked("export", MODEL, "base.onnx", "--adapter", str(adapter), "--adapters", "inputs")
    assert "adapters of any rank are inputs, at " in " ".join(text.split())
    assert "give one of merge, inline, inputs, bank" in refused(
        "export", MODEL, "other.onnx", "--adapters", "both"
    )
    assert "kB" in worked("export-adapter", str(adapter), "a.onnx_adapter", "--base", "base.onnx")
    assert "--force" in refused("export-adapter", str(adapter), "a.onnx_adapter")
    worked("export-adapter", str(adapter), "b.onnx_adapter", "--model", MODEL)
    assert "no file none.onnx" in refused(
        "export-adapter", str(adapter), "c.onnx_adapter", "--base", "none.onnx"
    )
    x = np.ones((4, 8), np.float32)
    np.save("x.npy", x)
    found = {}
    for name in ("none", "a.onnx_adapter", "b.onnx_adapter", str(adapter)):
        chosen = () if name == "none" else ("--adapter", name)
        worked("run", "base.onnx", "--input", "x=x.npy", "--output", "y.npz", "--force", *chosen)
        (found[name],) = np.load("y.npz").values()
    from cli_net_for_tests import net

    base = net()[0]
    with torch.no_grad():
        alone = base.eval()(torch.from_numpy(x)).numpy()
        want = lora_fx.load_adapter(base, adapter).eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found.pop("none"), alone, atol=1e-5)
    assert np.abs(want - alone).max() > 1e-3
    for got in found.values():
        np.testing.assert_allclose(got, want, atol=1e-5)
    text = " ".join(refused("run", "base.onnx", "--adapter", "gone").split())
    assert (
        "there is no such adapter. Those that exist: adapter, a.onnx_adapter, b.onnx_adap" in text
    )


def test_a_model_without_inputs_cannot_be_exported(here: Path) -> None:
    (here / "bare_for_tests.py").write_text(
        "from torch import nn\ndef net(): return nn.Linear(2, 2)\n", encoding="utf-8"
    )
    assert "does not say what it takes" in refused("export", "bare_for_tests:net", "x.onnx")


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fx.export import providers

    assert "versions" in worked("doctor")
    rows = json.loads(worked("doctor", "--json"))
    assert {"topic", "name", "state", "detail", "remedy"} == set(rows[0])
    monkeypatch.setattr(providers, "wheel_conflict", lambda: "uninstall both")
    assert "uninstall both" in worked("doctor")
    assert lora("doctor", "--strict").exit_code == 1


def test_warnings_of_the_library_are_shown_once() -> None:
    worked("plan", MODEL)
    worked("plan", MODEL)
    handlers = [type(one).__name__ for one in logging.getLogger("lora_fx").handlers]
    assert handlers.count("RichHandler") == 1


def test_as_a_user_runs_it(here: Path) -> None:
    program = Path(sys.executable).with_name("lora-fx")
    if not program.exists():
        pytest.skip("lora-fx is not installed as a program")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *args], cwd=here, capture_output=True, text=True, check=False
        )

    done = run("plan", MODEL, "--target", "layers.0")
    assert done.returncode == 0, done.stderr
    assert "1 site, 128 trainable" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    failed = run("plan", "cli_net_for_tests:nett")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == (
        "error: 'cli_net_for_tests:nett': cli_net_for_tests has no 'nett'; nearest: net, Net\n"
    )


def test_a_plan_on_a_mesh_says_what_each_gpu_needs() -> None:
    text = worked("plan", MODEL, "--mesh", "replicate=2,fsdp=4", "--batch", "3")
    assert "a step of AdamW on replicate 2 x fsdp 4: 3 samples on each GPU, bf16" in text
    assert "kept activations" in text
    assert re.search(r"on each GPU +MB", text), "a small model is not shown in 1e-06 GB"
    made = json.loads(worked("plan", MODEL, "--mesh", "fsdp=2", "--dtype", "fp32", "--json"))
    assert made["training"]["traffic"]["gather"] > 0
    assert "training" not in json.loads(worked("plan", MODEL, "--json"))


def test_a_plan_with_a_timeline_names_the_largest_tensors(here: Path) -> None:
    text = worked("plan", MODEL, "--timeline", "step.html", "--batch", "3")
    assert "a step of AdamW on one GPU: 3 samples on each GPU, bf16" in text
    assert "the largest tensors at the peak" in text
    assert "wrote step.html" in text
    assert "timeline-data" in (here / "step.html").read_text(encoding="utf-8")
    args = ("plan", MODEL, "--mesh", "fsdp=2", "--timeline", "mesh.html", "--json")
    answer = json.loads(worked(*args))
    sizes = [row["size"] for row in answer["training"]["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < sizes[0] <= answer["training"]["peak"]
    assert (here / "mesh.html").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--timeline", "step.png"), "has .html"),
        (("--timeline", "step.html", "--batch", "0"), "at least 1"),
        (("--mesh", "tp"), "is no dimension of a mesh"),
        (("--mesh", "fsdp=2", "--dtype", "int8"), "fp32, fp16, bf16"),
        (("--mesh", "fsdp=2", "--batch", "0"), "at least 1"),
        (("--mesh", "fsdp=2", "--checkpointing"), "leave out --checkpointing"),
    ],
)
def test_what_no_mesh_can_be(args: tuple[str, ...], words: str) -> None:
    assert words in refused("plan", MODEL, *args)


def test_why_one_operation_is_adapted() -> None:
    assert "adapted: " in worked("plan", MODEL, "--why", "layers.1")
    no = lora("plan", MODEL, "--why", "head")
    assert no.exit_code == 1
    assert "not selected: the output head" in no.output
    told = json.loads(worked("plan", MODEL, "--why", "layers", "--json"))
    assert set(told) == {"layers.0", "layers.1", "layers.2"}
    assert lora("plan", MODEL, "--why", "nothing").exit_code == 2


def test_what_another_configuration_would_do(here: Path) -> None:
    (here / "other.yaml").write_text("r: 4\ntarget_modules: [layers.0]\n", encoding="utf-8")
    differs = lora("plan", MODEL, "--diff", "other.yaml")
    assert differs.exit_code == 1
    assert "layers.{1-2}" in differs.output
    same = lora("plan", MODEL, "--config", "other.yaml", "--diff", "other.yaml")
    assert same.exit_code == 0
    told = json.loads(lora("plan", MODEL, "--diff", "other.yaml", "--json").stdout)
    assert set(told) == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("r: [", "is not readable YAML"),
        ("- 1", "does not hold a YAML object"),
        ("rank: 3", "did you mean 'r'"),
    ],
)
def test_bad_yaml_is_refused(here: Path, text: str, words: str) -> None:
    (here / "bad.yaml").write_text(text, encoding="utf-8")
    result = lora("plan", MODEL, "--config", "bad.yaml")
    assert result.exit_code == 2
    assert words in result.output


def test_columns_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert "not shown at this width: pattern" in " ".join(worked("plan", MODEL).split())


def test_reports_as_json(here: Path) -> None:
    regions = json.loads(worked("rewrite", MODEL, "--json"))
    assert {row["region"]: row["branches"] for row in regions}["layers.0"] == 1
    torch.manual_seed(0)
    import cli_net_for_tests

    model, _ = cli_net_for_tests.net()
    lora_fx.save_adapter(lora_fx.rewrite(model, lora_fx.LoraConfig(r=2)), here / "adapter")
    merged = json.loads(worked("merge", MODEL, "adapter", "merged.safetensors", "--json"))
    assert len(merged["sites"]) == 3
    report = json.loads(worked("inspect", "adapter", "--json"))
    assert [one["rank"] for one in report["sites"]] == [2, 2, 2]
    assert "no update at 3 site(s)" in worked("inspect", "adapter", "--all")
    assert lora("inspect", "nowhere").exit_code == 2


def test_python_runs_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_fx", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("lora-fx ")
    assert "--install-completion" in worked("--help")


def test_one_adapter_is_compared_with_its_base(here: Path) -> None:
    import cli_net_for_tests

    model, _ = cli_net_for_tests.net()
    lora_fx.save_adapter(lora_fx.rewrite(model, lora_fx.LoraConfig(r=2)), here / "adapter")
    worked("visualize", MODEL, "two.html", "--adapter", "adapter", "--compare")
    text = (here / "two.html").read_text(encoding="utf-8")
    assert "base: Net" in text
    assert "adapter: Net" in text


@pytest.mark.parametrize("command", ["bench", "zoo"])
def test_commands_of_a_clone_say_so_elsewhere(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"lora_fx.tools.{command}", None)
    words = " ".join(refused(command).split())
    assert f"lora-fx {command} needs a clone of the repository" in words
    assert f"run make {command} in the clone" in words
