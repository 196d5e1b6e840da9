"""Exports of others, and runs of exported files: what is read, compared, counted and judged."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import lora_fx
from lora_fx.errors import ConfigError, ExportError
from lora_fx.tools.bench import export_peers, generation, goals, step_sections
from lora_fx.tools.bench.export_peers import (
    HERE,
    File,
    Row,
    describe,
    environment_of,
    exported,
    largest_error,
    read,
    runner,
    set_environments,
)
from lora_fx.tools.bench.generation import (
    ADAPTED,
    ALONE,
    BUILT,
    FILES,
    OPTIMIZED,
    PEER,
    Generated,
    Runs,
)
from lora_fx.tools.bench.generation import AGAIN as PEER_AGAIN
from lora_fx.tools.bench.generation import MERGED as GENERATED
from lora_fx.tools.bench.measure import Sample, Size
from lora_fx.tools.bench.onnx_latency import (
    AGAIN,
    BANK,
    BASE,
    MERGED,
    ONE,
    SEPARATE,
    SEPARATE_AGAIN,
    Latency,
    switch_time,
)
from lora_fx.tools.bench.workloads import RANK, randomize, served

TURNS, SAME = "two adapters in turn", "one adapter all the time"


class Lookup(nn.Module):
    """Takes ids as an encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.fc(self.embed(input_ids) + token_type_ids[..., None])


def lookup(path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model, ids = Lookup().eval(), torch.ones(2, 5, dtype=torch.int64)
    lora_fx.export_onnx(model, path / "model.onnx", {"input_ids": ids, "token_type_ids": ids})
    return model, path / "model.onnx"


def test_what_a_script_says_is_read_from_its_last_line() -> None:
    found = read('loading\n{"seconds": 1.5, "file": "a.onnx"}\nbye\n', "a warning\n")
    assert (found.seconds, found.file, found.adapter, found.error) == (1.5, "a.onnx", "", "")
    failed = read('{"error": "ValueError: \\n no such thing\\nand more"}\n', "")
    assert failed.error == "ValueError:"
    assert read("", "Traceback\nImportError: no olive\n").error == "ImportError: no olive"
    assert read("", "").error == "it ended without a word"


def test_environments_are_given_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_FX_PEER_OLIVE", "")
    assert environment_of(HERE) == Path(sys.executable)
    assert environment_of("olive", {}) is None
    for text in ("olive", "olive=", f"nonsense={tmp_path}"):
        with pytest.raises(ConfigError, match="give NAME=FOLDER"):
            set_environments([text])
    with pytest.raises(ConfigError, match="make bench-envs"):
        set_environments([f"olive={tmp_path}"])
    python = tmp_path / ".peers" / "olive" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    # The default place; and the link itself, since what it points to has other packages.
    assert environment_of("olive", {}) == python
    set_environments([f"olive={tmp_path / '.peers' / 'olive'}"])
    assert os.environ["LORA_FX_PEER_OLIVE"].endswith("olive")
    assert environment_of("olive") == python


def test_a_script_whose_library_is_missing_says_so() -> None:
    said = exported(Path(sys.executable), "olive", ("a", "b", "c", "text-generation", "merge"))
    assert said.file == ""
    assert said.error == "ModuleNotFoundError: No module named 'olive'"


def test_files_of_others_are_run_and_compared(tmp_path: Path) -> None:
    model, path = lookup(tmp_path)
    # The types of tokens are filled in: zeros, as transformers does.
    given = {"input_ids": torch.arange(6).view(3, 2), "attention_mask": torch.ones(3, 2).long()}
    zeros = torch.zeros_like(given["input_ids"])
    with torch.no_grad():
        expected = model(given["input_ids"], zeros)
    run = runner(path)
    assert largest_error(run, [(given, expected)]) < 1e-6
    off = expected + 0.1 * expected.abs().max()
    assert largest_error(run, [(given, expected), (given, off)]) == pytest.approx(0.1, rel=0.15)
    # The worst of several inputs, and not a number where there is one.
    assert torch.tensor(
        largest_error(run, [(given, expected * torch.nan), (given, expected)])
    ).isnan()
    with pytest.raises(ExportError, match=r"it gives \[3, 2, 3\] for \[3, 2\], PyTorch \[3, 2\]"):
        largest_error(run, [(given, expected[..., 0])])
    found = describe(path)
    assert found.size == path.stat().st_size
    assert found.nodes >= 3


def test_a_file_that_takes_something_else_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).eval()
    lora_fx.export_onnx(layer, tmp_path / "model.onnx", {"input": torch.ones(2, 4)})
    run = runner(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="it takes input as well"):
        run({"input_ids": torch.ones(2, 4).long()})


def test_an_adapter_in_the_format_of_onnxruntime_is_handed_over(tmp_path: Path) -> None:
    model, ids = Lookup().eval(), torch.ones(2, 5, dtype=torch.int64)
    adapted = randomize(lora_fx.rewrite(model, lora_fx.LoraConfig(r=2, target_modules=["fc"])))
    path = tmp_path / "model.onnx"
    example = {"input_ids": ids, "token_type_ids": ids}
    lora_fx.export_onnx(adapted, path, example, adapters="inputs")
    lora_fx.save_onnx_adapter(adapted, tmp_path / "a.onnx_adapter")
    given, zeros = {"input_ids": torch.arange(6).view(3, 2)}, torch.zeros(3, 2).long()
    with torch.no_grad():
        base, changed = (one(given["input_ids"], zeros) for one in (model, adapted))
    assert largest_error(runner(path), [(given, base)]) < 1e-6
    assert largest_error(runner(path, tmp_path / "a.onnx_adapter"), [(given, changed)]) < 1e-6
    assert largest_error(runner(path), [(given, changed)]) > 1e-5


def test_adapters_are_no_rounding_error(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    [model] = served(Size.TINY)
    for place, kind in enumerate(export_peers.KINDS):
        folder = tmp_path / str(place)
        folder.mkdir()
        expected = export_peers._write(model, kind, folder)
        base = model.make()

        def run(given: dict[str, Tensor], model: nn.Module = base) -> Tensor:
            with torch.no_grad():
                return model(**given)[0]

        assert largest_error(run, expected.base) < 1e-6
        assert largest_error(run, expected.adapted) > 20 * export_peers._EXACT
        # And lora-fx reads what PEFT wrote.
        adapted = lora_fx.load_adapter(base, folder / "adapter").eval()
        assert largest_error(functools.partial(run, model=adapted), expected.adapted) < 1e-5


def test_the_floor_of_a_run_is_counted_by_hand() -> None:
    [model] = served(Size.TINY)
    thin, base = RANK * (4 * (16 + 16) + 2 * (16 + 64)), 4 * 16 * 16 + 2 * 16 * 64
    # The pooler sees one of 16 tokens.
    assert model.floor() == pytest.approx(
        1 + (16 * thin + RANK * (16 + 16)) / (16 * base + 16 * 16)
    )


def test_an_export_that_is_not_equal_is_none() -> None:
    file = File(10, 2)
    assert Row("", 1.0, file, 1e-6).outcome == "yes"
    assert Row("", 1.0, file, 1e-3).outcome == "a file that computes something else"
    assert Row("", 1.0, file, float("nan")).outcome == "a file that computes something else"
    assert Row("a | b").outcome == "a | b"
    columns, [cells] = export_peers.SECTION.rows({("m", "LoRA", "x"): Row("a | b", 1.0, file)})
    assert dict(zip(columns, cells, strict=True))["equal to PyTorch"] == r"a \| b"


def latency(merged: float, one: float, turns: float) -> Latency:
    names = {BASE: 1.0, AGAIN: 1.02, MERGED: merged, ONE: one}
    runs = {8: {name: Sample((value,) * 5) for name, value in names.items()}}
    return Latency(1.04, runs, {SAME: Sample((1.0,) * 5), TURNS: Sample((turns,) * 5)})


def verdicts(section: str, found: object) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[3:5] for row in goals.rows({section: found})}


def test_runs_and_switches_are_judged_by_the_worst() -> None:
    good, bad = latency(1.01, 1.05, 1.0005), latency(1.05, 1.20, 1.003)
    assert switch_time(bad) == pytest.approx(0.003)
    found = verdicts("onnx_latency", {("m", "cpu"): good})
    assert [found[name][1] for name in list(found)[-3:]] == ["yes"] * 3
    found = verdicts("onnx_latency", {("m", "cpu"): good, ("n", "cpu"): bad})
    assert found["run, merged / base"][1] == "no, by 0.03"
    assert found["run, swappable / merged, r = 16"] == (
        "1.14; F 1.040; A/A 1.02 (1.02 to 1.02)",
        "no, by 0.033",
    )
    assert found["switch of adapters"][1] == "no, by 2 ms"


def text_times(merged: float, adapted: float) -> Generated:
    taken = {PEER: 1.0, PEER_AGAIN: 1.01, GENERATED: merged, ADAPTED: adapted, "a bare loop": 1.0}
    return Generated({name: Sample((value,) * 5) for name, value in taken.items()}, 64, ())


def test_generated_tokens_are_judged_beside_the_peer() -> None:
    adapted = "a generated token with an adapter of rank 16 / onnxruntime-genai's"
    found = verdicts("generation", text_times(1.05, 1.10))
    assert found["a generated token / onnxruntime-genai's"] == (
        "1.05; A/A 1.01 (1.01 to 1.01)",
        "yes",
    )
    assert found[adapted][1] == "yes"
    found = verdicts("generation", text_times(1.11, 1.30))
    assert found["a generated token / onnxruntime-genai's"][1] == "no, by 0.05"
    assert found[adapted][1] == "no, by 0.14"
    alone = Generated({GENERATED: Sample((1.0,) * 5)}, 64, (), "not installed: make bench-envs")
    assert verdicts("generation", alone)[adapted][1] == "–"


def single_runs(ours: float, peer: str, step: str, slower: float = 2.0) -> Runs:
    taken = {peer: 1.0, FILES[-1]: slower, PEER_AGAIN: 1.01, GENERATED: ours, ALONE: 1.0}
    samples = {name: Sample((value,) * 5) for name, value in {**taken, ADAPTED: 1.1}.items()}
    return Runs({("m", step): samples}, {"m": 1.06}, {})


def test_single_runs_are_judged_beside_the_fastest_file() -> None:
    prefill, decode, swapped, read = (
        "prefill of 128, of 8 × 128 / onnxruntime-genai's builder",
        "decode, past 128, 512, batch of 8 / onnxruntime-genai's builder",
        "decode with an adapter of rank 16 swapped in / ours without",
        "BERT, 1 and 8 × 128 / optimum, transformers.optimizer",
    )
    found = verdicts("peer_runs", single_runs(0.98, BUILT, "prefill, 128"))
    assert found[prefill] == ("0.98 (prefill, 128; A/A 1.01 (1.01 to 1.01))", "yes")
    assert [found[name][1] for name in (decode, swapped, read)] == ["–"] * 3
    found = verdicts("peer_runs", single_runs(1.05, BUILT, "decode, past 128"))
    assert found[decode][1] == "no, by 0.04"
    assert found[swapped] == ("1.10 (decode, past 128; F 1.060)", "no, by 0.02")
    found = verdicts("peer_runs", single_runs(1.0, OPTIMIZED, "read 1 × 128"))
    assert found[read][1] == "yes"
    found = verdicts("peer_runs", single_runs(1.0, OPTIMIZED, "read 1 × 128", slower=0.8))
    assert found[read][1] == "no, by 0.24"
    missing = Runs({}, {"m": 1.0}, {BUILT: "not installed: make bench-envs"})
    assert verdicts("peer_runs", missing)[prefill][1] == "–"
    [row] = generation.RUNS_SECTION.rows(missing)[1]
    assert row[2:4] == (BUILT, "not installed: make bench-envs")


def test_a_bank_is_judged_by_its_decoding_step() -> None:
    def step(bank: float) -> dict[str, Sample]:
        times = {SEPARATE: 1.0, SEPARATE_AGAIN: 1.0, BANK: bank}
        return {name: Sample((value,) * 5) for name, value in times.items()}

    goal = "bank: a batch of 8 rows with 8 adapters / 8 runs of one row, decode"
    found = verdicts("onnx_bank", {("m", "decode, past 128"): step(0.4), ("m", "prefill"): step(1)})
    assert found[goal] == ("0.40 (decode, past 128); A/A 1.00 (1.00 to 1.00)", "yes")
    found = verdicts("onnx_bank", {("m", "decode, past 128"): step(0.6)})
    assert found[goal][1] == "no, by 0.1"
    assert verdicts("onnx_bank", {("m", "prefill"): step(1)})[goal][0] == "not measured"


def test_a_step_of_several_adapters_is_judged_at_the_worst_length() -> None:
    def samples(joint: float) -> dict[str, Sample]:
        times = {step_sections.ONE: 1.0, step_sections.ONE_AGAIN: 1.0, step_sections.SEPARATE: 2.0}
        return {
            name: Sample((one,) * 5)
            for name, one in {**times, step_sections.TOGETHER: joint}.items()
        }

    beside, separate = (
        "step of 8 adapters of ranks 4 to 64, 8 rows / step of one adapter",
        "step of 8 adapters of ranks 4 to 64, 8 rows / 8 steps of one row",
    )
    found = verdicts("together_step", {"8 tokens": samples(1.2), "64 tokens": samples(0.9)})
    assert found[beside] == ("1.20 (8 tokens), 0.90 (64 tokens)", "yes")
    assert found[separate][1] == "no, by 0.1"


def test_reasons_fit_into_a_cell() -> None:
    assert export_peers._short("/a/b/x.onnx cannot be loaded", Path("/a/b")) == (
        "x.onnx cannot be loaded"
    )
    text = export_peers._short("ONNX Runtime failed" + " on" * 100 + " W: {16,0}", Path("/a"))
    assert text.startswith("ONNX Runtime failed on")
    assert text.endswith("on W: {16,0}")
    assert len(text) < 160


def test_every_file_of_ours_has_to_be_equal() -> None:
    good, bad = Row("", 1.0, File(1, 1), 1e-7), Row("refused")
    found = {("m", "LoRA", "lora-fx, merged"): good, ("m", "LoRA", "Olive, merged"): bad}
    assert verdicts("export_peers", found)["export, PEFT's folders"][1] == "yes"
    found["m", "DoRA", "lora-fx, merged"] = bad
    said = verdicts("export_peers", found)["export, PEFT's folders"]
    assert said == ("1 of 2 files, largest error 1.0e-07", "no, by 1 files")
