from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.ir.graph import Capture, Kind, Pass, PassResult
from lora_fx.passes.capture.auto import capture
from lora_fx.passes.parameters.rewritten import buffer_digests
from lora_fx.passes.pipeline import plan_model, rewrite_passes, run_passes
from tests.zoo import Mlp, Residual


@dataclasses.dataclass(frozen=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def __call__(self, captured: Capture) -> PassResult:
        return PassResult(captured, False)


@dataclasses.dataclass(frozen=True)
class Note(Pass):
    name: ClassVar[str] = "note"
    text: str

    def __call__(self, captured: Capture) -> PassResult:
        return PassResult(dataclasses.replace(captured, notes=(*captured.notes, self.text)), True)


@dataclasses.dataclass(frozen=True)
class Raises(Pass):
    name: ClassVar[str] = "raises"
    error: Exception

    def __call__(self, captured: Capture) -> PassResult:
        raise self.error


def test_passes_run_in_order() -> None:
    captured = capture(Mlp())
    assert run_passes(captured, [Note("a"), Nothing(), Note("b")]).notes[-2:] == ("a", "b")


def test_no_passes_change_nothing() -> None:
    captured = capture(Mlp())
    assert run_passes(captured, []) is captured
    assert run_passes(captured, [Nothing()]) is captured


def test_each_pass_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lora_fx")
    run_passes(capture(Mlp()), [Note("a"), Nothing()])
    assert [r.message for r in caplog.records if r.message.startswith("pass ")] == [
        "pass note: modified",
        "pass nothing: nothing to do",
    ]


@dataclasses.dataclass(frozen=True)
class Wants(Pass):
    name: ClassVar[str] = "wants"

    def requires(self, captured: Capture) -> str | None:
        return "nothing is planned" if captured.plan is None else None

    def __call__(self, captured: Capture) -> PassResult:
        return PassResult(captured, False)


@dataclasses.dataclass(frozen=True)
class Edits(Pass):
    name: ClassVar[str] = "edits"

    def __call__(self, captured: Capture) -> PassResult:
        graph = captured.regions[""].graph
        graph.call_function(torch.neg, (next(iter(graph.nodes)),))
        return PassResult(dataclasses.replace(captured), True)


@dataclasses.dataclass(frozen=True)
class Lies(Pass):
    name: ClassVar[str] = "lies"
    modified: bool

    def __call__(self, captured: Capture) -> PassResult:
        return PassResult(
            captured if self.modified else dataclasses.replace(captured), self.modified
        )


@dataclasses.dataclass(frozen=True)
class Copies(Pass):
    name: ClassVar[str] = "copies"
    kind: ClassVar[Kind] = "in place"

    def __call__(self, captured: Capture) -> PassResult:
        return PassResult(dataclasses.replace(captured), True)


@dataclasses.dataclass(frozen=True)
class Regrets(Pass):
    name: ClassVar[str] = "regrets"

    def ensures(self, before: Capture, after: Capture) -> str | None:
        return "it did not do what it is for"

    def __call__(self, captured: Capture) -> PassResult:
        return PassResult(captured, False)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (Wants(), "pass 'wants' cannot run: nothing is planned"),
        (
            Edits(),
            "'edits' broke its contract: it is functional, and edited a graph of its argument",
        ),
        (Lies(True), "'lies' broke its contract: it says that it modified something, and returns"),
        (Lies(False), "'lies' broke its contract: it returns another capture, and says"),
        (Copies(), "'copies' broke its contract: it works in place, and returns another capture"),
        (Regrets(), "'regrets' broke its contract: it did not do what it is for"),
    ],
)
def test_the_contract_is_enforced(one: Pass, words: str) -> None:
    with pytest.raises(lora_fx.CaptureError, match=words):
        run_passes(capture(Mlp()), [one])


def test_the_callback_sees_every_pass_in_order() -> None:
    seen: dict[str, Capture] = {}
    config = LoraConfig(r=2)
    lora_fx.rewrite(Mlp(), config, callback=seen.__setitem__)
    assert list(seen) == ["capture", *(one.name for one in rewrite_passes(config))]
    assert seen["match"].plan is None
    assert seen["plan"].plan is not None
    assert "lora" not in str(seen["unfreeze"].regions["first"].graph)
    assert "lora_A" in str(seen["insert"].regions["first"].graph)
    assert "lora_linear" in str(seen["fuse"].regions["first"].graph)


def test_a_second_run_of_every_pass_modifies_nothing() -> None:
    config = LoraConfig(r=2, lora_dropout=0.1, bias="all", modules_to_save=["head"])
    passes = rewrite_passes(config)
    captured = run_passes(capture(Residual()), passes)
    again = [one.name for one in passes if one.kind == "in place" and one.name != "install"]
    for one in passes:
        if one.name in again:
            assert not one(captured).modified, one.name


def test_an_error_of_a_pass_has_a_note_of_its_name() -> None:
    error = lora_fx.MergeError("as it is")
    with pytest.raises(lora_fx.MergeError):
        run_passes(capture(Mlp()), [Raises(error)])
    assert error.__notes__ == ["in pass 'raises'"]


def test_an_unexpected_failure_names_the_pass_and_is_chained() -> None:
    cause = KeyError("layer")
    with pytest.raises(lora_fx.CaptureError, match="pass 'raises' failed: KeyError") as caught:
        run_passes(capture(Mlp()), [Raises(cause)])
    assert caught.value.__cause__ is cause


def test_an_error_of_ours_comes_through_as_it_is() -> None:
    error = lora_fx.MergeError("as it is")
    with pytest.raises(lora_fx.MergeError) as caught:
        run_passes(capture(Mlp()), [Raises(error)])
    assert caught.value is error


@pytest.mark.parametrize("config", [None, {"r": 8}, "all-linear", LoraConfig])
def test_a_config_that_is_none_is_refused(config: object) -> None:
    with pytest.raises(lora_fx.ConfigError, match=r"config must be a lora_fx\.LoraConfig, found"):
        plan_model(Mlp(), config)


@pytest.mark.parametrize("verb", [lora_fx.rewrite, lora_fx.plan])
def test_a_rewritten_model_is_refused_with_the_remedy(verb) -> None:
    adapted = lora_fx.rewrite(Mlp(), LoraConfig())
    with pytest.raises(lora_fx.ConfigError, match=r"rewritten already: use lora_fx\.add_adapter"):
        verb(adapted, LoraConfig())


@pytest.mark.parametrize("verb", [lora_fx.rewrite, lora_fx.plan])
def test_so_is_a_model_that_holds_one(verb) -> None:
    outer = nn.Sequential(lora_fx.rewrite(Mlp(), LoraConfig()), nn.Linear(3, 3))
    with pytest.raises(lora_fx.LoraFxError, match="already"):
        verb(outer, LoraConfig())


def test_the_record_knows_the_adapter_and_what_was_trainable() -> None:
    model = Residual(1)
    model.norm.requires_grad_(False)
    config = LoraConfig(r=2, bias="lora_only", modules_to_save=["head"], seed=1)
    record = lora_fx.rewrite(model, config, adapter_name="mine")._lora_fx
    (adapter,) = record.adapters.values()
    assert list(record.adapters) == ["mine"]
    assert adapter.config == config
    assert [row.name for row in adapter.sites] == ["blocks.0.up", "blocks.0.down"]
    assert adapter.biases == ("blocks.0.up.bias", "blocks.0.down.bias")
    assert adapter.saved_modules == ("head",)
    assert record.trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert record.frontend == "symbolic"


def test_a_captured_model_without_passes_is_the_model() -> None:
    model, x = Mlp().eval(), torch.randn(3, 5)
    assert torch.equal(lora_fx.capture(model).model(x), model(x))


def test_fingerprints_tell_buffers_apart() -> None:
    model = Mlp().train()
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("bf16", torch.ones(3, dtype=torch.bfloat16).t())
    model.register_buffer("cache", torch.ones(3), persistent=False)
    model.register_buffer("far", torch.ones(3, device="meta"))
    before = buffer_digests(model)
    assert {"norm.running_mean", "norm.num_batches_tracked", "mask", "empty", "bf16"} == set(
        before
    ) - {"norm.running_var"}
    model(torch.randn(4, 5))
    after = buffer_digests(model)
    changed = {name for name, digest in after.items() if digest != before[name]}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def test_a_first_rewrite_of_a_librarys_model_loads_no_networkx() -> None:
    """Its import takes as long as all else; a model that names its head does without."""
    code = (
        "import sys, lora_fx\n"
        "from tests.zoo import tiny_llama\n"
        "lora_fx.rewrite(tiny_llama()[0], lora_fx.LoraConfig(r=2))\n"
        "assert 'networkx' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
