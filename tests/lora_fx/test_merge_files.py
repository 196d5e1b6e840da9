"""An adapter is merged into the files of a model, which is never loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig, MergeError
from lora_fx.tools.merge_files import WholeModelError
from tests.algebra import randomize
from tests.kills import killed

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
INDEX = "model.safetensors.index.json"
LAYERS = ["q_proj", "down_proj"]
ENDS = ["q_proj", "embed_tokens", "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def llama(**changes: Any) -> Any:
    config = {"num_key_value_heads": 2, "attention_bias": True, **SMALL, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def mixtral() -> Any:
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SMALL)
    return transformers.MixtralForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def regnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    return transformers.RegNetForImageClassification(transformers.RegNetConfig(**sizes))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **sizes))


def saved(
    folder: Path,
    make: Callable[[], Any] = llama,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shard: str = "20KB",
    **options: Any,
) -> type:
    """The base in several files, an adapter, and the class of the model."""
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    options = {"r": 4, "target_modules": LAYERS, **options}
    adapted = randomize(lora_fx.rewrite(model, LoraConfig(**options)), std=0.3)
    lora_fx.save_adapter(adapted, folder / "adapter")
    return type(model)


def merged_in_memory(folder: Path, kind: Any, dtype: torch.dtype | None = None) -> Any:
    loaded = lora_fx.load_adapter(kind.from_pretrained(folder / "base"), folder / "adapter")
    merged, report = lora_fx.merge(loaded, dtype=dtype, return_report=True)
    merged.save_pretrained(folder / "memory")
    return report


def merge(folder: Path, **options: Any) -> Any:
    return lora_fx.merge_files(folder / "base", folder / "adapter", folder / "out", **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        result |= safetensors.torch.load_file(path)
    return result


def bits(folder: Path) -> dict[str, Any]:
    return {
        name: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).tolist())
        for name, value in tensors(folder).items()
    }


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def settings(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def tied(**changes: Any) -> Any:
    return llama(tie_word_embeddings=True, **changes)


def in_half(make: Callable[[], Any]) -> tuple[Any, torch.dtype, None]:
    return make, torch.bfloat16, None


@pytest.mark.parametrize(
    ("base", "options"),
    [
        pytest.param(in_half(llama), {}, id="plain"),
        pytest.param((llama, torch.float32, torch.bfloat16), {}, id="narrower"),
        pytest.param((llama, torch.bfloat16, torch.float32), {"use_dora": True}, id="wider DoRA"),
        pytest.param(
            in_half(llama),
            {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
            id="ranks",
        ),
        pytest.param(in_half(llama), {"init_lora_weights": "pissa"}, id="PiSSA, converted"),
        pytest.param(
            (llama, torch.bfloat16, torch.float32),
            {"target_modules": ["q_proj"], "lora_bias": True},
            id="bias of B",
        ),
        pytest.param(in_half(llama), {"bias": "all"}, id="biases"),
        pytest.param(in_half(llama), {"modules_to_save": ["lm_head"]}, id="head in full"),
        pytest.param(in_half(tied), {"target_modules": ENDS[:2]}, id="tied, embedding"),
        pytest.param(in_half(tied), {"target_modules": ENDS}, id="tied, both"),
        pytest.param(
            in_half(tied), {"target_modules": ENDS, "ensure_weight_tying": True}, id="still tied"
        ),
        pytest.param(in_half(tied), {"modules_to_save": ["lm_head"]}, id="tied, head in full"),
        pytest.param(in_half(tied), {"trainable_token_indices": [3, 5]}, id="tied, tokens"),
        pytest.param(
            in_half(llama), {"trainable_token_indices": {"embed_tokens": [3, 5]}}, id="tokens"
        ),
        pytest.param(in_half(mixtral), {"target_modules": ["q_proj"]}, id="beside experts"),
        pytest.param(
            (mixtral, torch.bfloat16, torch.float32),
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
            id="experts",
        ),
        pytest.param(
            (bert, torch.float32, None), {"target_modules": ["query", "decoder"]}, id="BERT"
        ),
        pytest.param(
            (regnet, torch.float32, None),
            {"target_modules": ["convolution"], "use_dora": True},
            id="groups of channels",
        ),
    ],
)
def test_the_files_are_those_of_a_merge_in_memory(
    base: tuple[Callable[[], Any], torch.dtype, torch.dtype | None],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    make, stored, dtype = base
    kind = saved(tmp_path, make, stored, **options)
    before = contents(tmp_path / "base")
    report = merge(tmp_path, dtype=dtype, measure=True)
    expected = merged_in_memory(tmp_path, kind, dtype)
    assert bits(tmp_path / "out") == bits(tmp_path / "memory")
    assert bits(tmp_path / "out") != bits(tmp_path / "base")
    assert settings(tmp_path / "out") == settings(tmp_path / "memory")
    assert report.sites == expected.sites
    assert report.max_ulp <= 0.5
    assert set(report.untied) == set(expected.untied)
    assert contents(tmp_path / "base") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    shards = (tmp_path / "base").glob("*.safetensors")
    assert {p.name for p in shards} == {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    if (tmp_path / "base" / INDEX).exists():
        index = json.loads((tmp_path / "out" / INDEX).read_text(encoding="utf-8"))
        sizes = [value.nbytes for value in tensors(tmp_path / "out").values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        assert index["weight_map"].keys() == tensors(tmp_path / "out").keys()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ENDS[:2]}])
def test_a_folder_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind: Any = saved(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=LAYERS) if not options else None
    config = config or peft.LoraConfig(**{"r": 4, "target_modules": LAYERS, **options})
    adapted = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    shutil.rmtree(tmp_path / "adapter")
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    merged_in_memory(tmp_path, kind)
    assert bits(tmp_path / "out") == bits(tmp_path / "memory")


@pytest.mark.parametrize("targets", [["q", "shared"], ["q", "lm_head"], ["q", "shared", "lm_head"]])
def test_a_model_that_ties_several_weights_loads_again(targets: list[str], tmp_path: Path) -> None:
    kind: Any = saved(tmp_path, t5, torch.float32, target_modules=targets)
    merge(tmp_path)
    inputs = {
        "input_ids": torch.arange(8)[None],
        "decoder_input_ids": torch.arange(5)[None],
    }
    adapted = lora_fx.load_adapter(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged = kind.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = adapted.eval()(**inputs).logits
        torch.testing.assert_close(merged.eval()(**inputs).logits, expected)


def test_parameters_that_were_trained_by_hand(tmp_path: Path) -> None:
    kind: Any = saved(tmp_path)
    model = lora_fx.load_adapter(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    names = ("model.norm.weight", "model.layers.0.mlp.gate_proj.weight")
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    assert list(lora_fx.trainable_parameters(model))
    for name in names:
        torch.nn.init.normal_(model.get_parameter(name))
    lora_fx.save_adapter(model, tmp_path / "adapter")
    _check_changed(tmp_path, kind, names)


def test_buffers_that_training_has_changed(tmp_path: Path) -> None:
    kind: Any = saved(tmp_path, regnet, torch.float32, target_modules=["convolution"])
    model = lora_fx.load_adapter(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    model.train()(torch.randn(4, 3, 32, 32))
    lora_fx.save_adapter(model, tmp_path / "adapter")
    ends = ("running_mean", "num_batches_tracked")
    names = [name for name in tensors(tmp_path / "base") if name.endswith(ends)]
    _check_changed(tmp_path, kind, names)


def _check_changed(folder: Path, kind: type, names: Sequence[str]) -> None:
    merge(folder)
    merged_in_memory(folder, kind)
    assert bits(folder / "out") == bits(folder / "memory")
    before, after = tensors(folder / "base"), tensors(folder / "out")
    assert names
    assert not any(torch.equal(before[name], after[name]) for name in names)


def test_one_file_and_what_lies_beside_it(tmp_path: Path) -> None:
    kind = saved(tmp_path, shard="1GB")
    base = tmp_path / "base"
    (base / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    (base / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")
    (base / "optimizer.pt").write_bytes(b"no part of the model")
    merge(tmp_path)
    merged_in_memory(tmp_path, kind)
    assert bits(tmp_path / "out") == bits(tmp_path / "memory")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == '{"a": 1}'
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_report_without_errors_and_its_progress(tmp_path: Path) -> None:
    saved(tmp_path)
    seen: list[tuple[int, int, str]] = []
    report = merge(tmp_path, progress=lambda *step: seen.append(step))
    names = sorted(tensors(tmp_path / "base"))
    assert sorted(name for *_, name in seen) == names
    assert [done for done, *_ in seen] == list(range(len(names)))
    assert {total for _, total, _ in seen} == {len(names)}
    first, *lines = str(report).splitlines()
    assert re.fullmatch(r"4 weight\(s\) merged, [\d.]+ % of the change kept", first)
    assert any(line.startswith("  model.layers.0.mlp.down_proj: changed by") for line in lines)
    assert len(lines) == 4


# --- interruptions --------------------------------------------------------------------------------

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")


@forks
def test_a_killed_merge_leaves_all_or_nothing_and_continues(tmp_path: Path) -> None:
    saved(tmp_path)
    merge(tmp_path)
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    steps = []
    for step in killed(lambda: merge(tmp_path), tmp_path, every=9):
        steps.append(step)
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == expected
        else:
            merge(tmp_path)
            assert contents(tmp_path / "out") == expected
        # All but what the end of a merge leaves, which the next one deletes.
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / ".out.merging", ignore_errors=True)
    assert len(steps) > 5


@forks
def test_complete_files_are_not_written_again(tmp_path: Path) -> None:
    saved(tmp_path)
    _killed_at(tmp_path, 20)
    result = tmp_path / ".out.merging" / "model"
    complete = {p.name: p.stat().st_ino for p in result.iterdir() if p.suffix == ".safetensors"}
    assert complete
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    report = merge(tmp_path, progress=lambda done, total, name: seen.append(done))
    of_files = [safetensors.torch.load_file(tmp_path / "out" / name) for name in complete]
    assert seen[0] == sum(map(len, of_files))
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in complete} == complete
    assert len(report.sites) == 4
    _check_result(tmp_path)


@forks
@pytest.mark.parametrize("changed", ["adapter", "dtype", "weights"])
def test_other_inputs_start_over(changed: str, tmp_path: Path) -> None:
    kind = saved(tmp_path)
    _killed_at(tmp_path, 20)
    if changed == "adapter":
        model = lora_fx.load_adapter(llama().bfloat16(), tmp_path / "adapter")
        lora_fx.save_adapter(randomize(model, std=0.2), tmp_path / "adapter")
    elif changed == "weights":
        for path in (tmp_path / "base").glob("*.safetensors"):
            values = safetensors.torch.load_file(path)
            values = {name: value * 2 for name, value in values.items()}
            safetensors.torch.save_file(values, path, {"format": "pt"})
    dtype = torch.float32 if changed == "dtype" else None
    merge(tmp_path, dtype=dtype)
    merged_in_memory(tmp_path, kind, dtype)
    assert bits(tmp_path / "out") == bits(tmp_path / "memory")


@forks
def test_the_end_of_a_killed_merge_is_made_up_for(tmp_path: Path) -> None:
    saved(tmp_path)
    report = merge(tmp_path, measure=True)
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    ended = []
    for _ in killed(lambda: merge(tmp_path, measure=True), tmp_path, first=_last_steps(tmp_path)):
        if (tmp_path / "out").exists() and (tmp_path / ".out.merging" / "receipt.json").exists():
            ended.append(merge(tmp_path, measure=True))
            assert ended[-1] == report
            assert contents(tmp_path / "out") == expected
            assert not (tmp_path / ".out.merging").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert ended


def _last_steps(folder: Path) -> int:
    """The step of a merge before which its result gets its name."""
    steps = 0
    for step in killed(lambda: merge(folder), folder, every=4):
        steps = step
    shutil.rmtree(folder / "out")
    return max(0, steps - 12)


@forks
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    read, write = os.pipe()

    def wait(done: int, total: int, name: str) -> None:
        if done == 3:
            os.write(write, b"x")
            signal.pause()

    child = os.fork()
    if child == 0:
        try:
            merge(tmp_path, progress=wait)
        finally:
            os._exit(0)
    os.read(read, 1)
    try:
        with pytest.raises(MergeError, match="another process is merging"):
            merge(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    _check_result(tmp_path)


def _killed_at(folder: Path, tensor: int) -> None:
    """Kills a process in the middle of a file, before it writes a tensor."""

    def kill(done: int, total: int, name: str) -> None:
        if done == tensor:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            merge(folder, progress=kill)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def _check_result(folder: Path) -> None:
    if not (folder / "out").exists():
        merge(folder)
    shutil.move(folder / "out", folder / "first")
    merge(folder)
    assert contents(folder / "first") == contents(folder / "out")


# --- refusals -------------------------------------------------------------------------------------


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    saved(tmp_path)
    saved(tmp_path / "other", lambda: llama(hidden_size=16))
    with pytest.raises(
        CheckpointError, match=r"does not fit this LlamaForCausalLM[^\n]*\n  shape: .*_proj"
    ):
        lora_fx.merge_files(tmp_path / "base", tmp_path / "other" / "adapter", tmp_path / "out")
    saved(tmp_path / "bert", bert, target_modules=["query"])
    with pytest.raises(CheckpointError, match=r"was trained on BertForMaskedLM.*LlamaConfig"):
        lora_fx.merge_files(tmp_path / "base", tmp_path / "bert" / "adapter", tmp_path / "out")
    _check_nothing_written(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    saved(tmp_path)
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"{shard} is missing, truncated or damaged.*again"):
        merge(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard} is missing, truncated or damaged.*again"):
        merge(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "base" / INDEX).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        merge(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        lora_fx.merge_files(tmp_path / "none", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ConfigError, match="is not a folder on this machine"):
        lora_fx.merge_files(tmp_path / "base", tmp_path / "none", tmp_path / "out")
    _check_nothing_written(tmp_path)


def test_a_folder_of_other_shapes(tmp_path: Path) -> None:
    saved(tmp_path, shard="1GB")
    path = tmp_path / "base" / "model.safetensors"
    values = safetensors.torch.load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    values[name] = values[name][:, :-1].contiguous()
    safetensors.torch.save_file(values, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} in {path} is \[32, 63\].*\[32, 64\]"):
        merge(tmp_path)
    _check_nothing_written(tmp_path)


def test_what_needs_the_whole_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, modules_to_save=["lm_head"])
    path = tmp_path / "base" / "config.json"
    config = settings(tmp_path / "base")
    quantized = {**config, "quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(quantized), encoding="utf-8")
    with pytest.raises(WholeModelError, match=r"is quantized \(fp8\).*requantize=True"):
        merge(tmp_path)
    path.write_text(json.dumps(config), encoding="utf-8")
    index = tmp_path / "base" / INDEX
    listed = json.loads(index.read_text(encoding="utf-8"))
    del listed["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(WholeModelError, match=r"has no lm_head.weight.*lora_fx\.merge\("):
        merge(tmp_path)
    _check_nothing_written(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_the_base(start: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kind: Any = saved(tmp_path, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=start)
    shutil.rmtree(tmp_path / "adapter")
    model = kind.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(WholeModelError, match=rf"init_lora_weights='{start}'"):
        merge(tmp_path)
    _check_nothing_written(tmp_path)


def test_an_overflow(tmp_path: Path) -> None:
    saved(tmp_path, dtype=torch.float32, r=64, lora_alpha=10**7)
    with pytest.raises(MergeError, match=r"overflows torch\.float16"):
        merge(tmp_path, dtype=torch.float16)
    _check_nothing_written(tmp_path)


def test_a_result_that_exists(tmp_path: Path) -> None:
    saved(tmp_path)
    out = tmp_path / "out"
    out.write_text("a file", encoding="utf-8")
    with pytest.raises(MergeError, match="is a file"):
        merge(tmp_path)
    out.unlink()
    out.mkdir()
    (out / "model.safetensors").write_text("an older model", encoding="utf-8")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MergeError, match="is not empty: give another name, or force=True"):
        merge(tmp_path)
    assert len(list(out.iterdir())) == 2
    base = tmp_path / "base"
    with pytest.raises(MergeError, match="is the model that is merged"):
        lora_fx.merge_files(base, tmp_path / "adapter", base)
    merge(tmp_path, force=True)
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not (out / "model.safetensors").exists()
    assert not (tmp_path / ".out.merging").exists()
    (out / "notes.txt").unlink()
    _check_result(tmp_path)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "out").mkdir()
    merge(tmp_path)
    _check_result(tmp_path)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(MergeError, match=r"it takes \d+\.\d kB, and the disk has 0\.1 kB left"):
        merge(tmp_path)
    monkeypatch.undo()
    _check_result(tmp_path)


@forks
def test_a_write_that_fails_keeps_complete_files(tmp_path: Path) -> None:
    saved(tmp_path)
    import resource  # which Windows does not have

    sizes = sorted(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 100,) * 2)
            merge(tmp_path)
        except MergeError as error:
            code = 0 if "same call continues" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.merging" / "model").glob(".*"))
    _check_result(tmp_path)


def _check_nothing_written(folder: Path) -> None:
    assert not (folder / "out").exists()
    assert not (folder / ".out.merging").exists()


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import lora_fx

def memory(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
lora_fx.merge_files(folder / "small/base", folder / "small/adapter", folder / "small/out")
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
lora_fx.merge_files(folder / "base", folder / "adapter", folder / "out")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_a_fraction_of_a_shard(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    saved(tmp_path, lambda: llama(**sizes), shard="40MB")
    saved(tmp_path / "small")
    shards = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    assert len(shards) > 2
    code = [sys.executable, "-c", PEAK, str(tmp_path)]
    # Threads would keep memory of their own, which does not grow with the model.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(code, capture_output=True, text=True, check=True, env=environment)
    assert int(said.stdout) < 1.3 * max(shards)
