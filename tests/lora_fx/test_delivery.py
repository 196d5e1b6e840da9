"""lora_fx.sync: an adapter reaches a server or a session, or an error says what answers instead."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import ConfigError, DeliveryError, LoraConfig
from tests.lora_server import served
from tests.numerics import assert_same_bits
from tests.stacks.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
PROBE = torch.tensor([[5, 9, 3, 7], [8, 2, 11, 30]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama(vocab_size=96).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serve(base: Path) -> Iterator[Callable[..., str]]:
    """Starts each kind of server once."""
    addresses: dict[str | None, str] = {}
    with ExitStack() as stack:

        def start(fault: str | None = None) -> str:
            if fault not in addresses:
                addresses[fault] = stack.enter_context(served(base, fault))
            return addresses[fault]

        yield start


def adapted(seed: int = 0, **options: Any) -> Any:
    config = dataclasses.replace(CONFIG, **options)
    return change(lora_fx.rewrite(llama(vocab_size=96), config), seed)


def change(model: nn.Module, seed: int, std: float = 0.2) -> Any:
    """Other factors for each seed, as after some steps."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.normal_(0.0, std, generator=draws)
    return model


def failure(*arguments: Any, **options: Any) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        lora_fx.sync(*arguments, probe=PROBE, **options)
    return caught.value


def test_versions_arrive_and_the_model_is_as_before(
    serve: Callable[..., str], tmp_path: Path
) -> None:
    model = adapted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    server = lora_fx.VllmServer(serve(), directory=tmp_path)
    for seed in range(4):
        receipt = lora_fx.sync(model, server, probe=PROBE, name="policy", version=f"step {seed}")
        assert receipt.applied
        assert receipt.answers_as == (f"step {seed}",)
        assert receipt.distance < 1e-5 < receipt.noise + 1e-4 < receipt.tolerance < receipt.effect
        if seed == 0:
            assert_same_bits(model.state_dict(), before)
            assert model.training
            assert torch.equal(torch.get_rng_state(), random)
        change(model, seed + 1)
    # The present folder and the one before.
    assert receipt.folder in (folders := sorted(tmp_path.iterdir()))
    assert len(folders) == 2
    assert "applied; distance" in str(receipt)


def test_the_same_version_twice_is_no_rival(serve: Callable[..., str]) -> None:
    model = adapted(7)
    for target in (serve(), serve(), lora_fx.VllmServer(serve()), f"{serve()}/v1/"):
        assert lora_fx.sync(model, target, probe=PROBE, name="again").applied


def test_a_server_without_load_inplace(serve: Callable[..., str]) -> None:
    server = lora_fx.VllmServer(serve("old"))
    for seed in (1, 2):
        assert lora_fx.sync(adapted(seed), server, probe=PROBE).applied


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("base", "the base alone"),
        ("zero", "neither the base alone nor a version that was delivered from here"),
        ("nan", "values that are not finite"),
    ],
)
def test_what_answers_instead_is_named(serve: Callable[..., str], fault: str, says: str) -> None:
    error = failure(adapted(), serve(fault), version="step 50")
    assert error.reason == error.delivery.verdict == "not applied"
    assert f"adapter 'default' (step 50) is not applied. The answer is that of {says}" in str(error)


def test_an_old_version_is_named(serve: Callable[..., str]) -> None:
    server, model = lora_fx.VllmServer(serve("keep")), adapted()
    assert lora_fx.sync(model, server, probe=PROBE, version="step 10").applied
    for step in (20, 30):
        error = failure(change(model, step), server, version=f"step {step}")
        assert error.delivery.answers_as == ("step 10",)
    # Another process knows no versions, but sees that nothing has changed.
    error = failure(change(model, 40), lora_fx.VllmServer(serve("keep")))
    assert error.delivery.answers_as == ("the previous adapter",)


def test_refusals_have_the_text_of_the_server(serve: Callable[..., str], tmp_path: Path) -> None:
    model = adapted()
    cases = {
        "off": ("updates off", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        "ignore": ("not applied", "accepted it, and knows no adapter of this name"),
        "text": ("refused", "names tokens by their text"),
        "redirect": ("refused", "302"),
    }
    for fault, (reason, says) in cases.items():
        error = failure(model, serve(fault))
        assert error.reason == reason
        assert says in str(error)
    server = lora_fx.VllmServer(serve(), directory=tmp_path)
    error = failure(adapted(r=32), server, name="large")
    assert (error.reason, "LoRA rank 32 is greater" in str(error)) == ("refused", True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(lora_fx.CheckpointError, match="vLLM cannot serve this adapter"):
        lora_fx.sync(adapted(use_dora=True), serve(), probe=PROBE)


def test_a_server_that_is_down(tmp_path: Path) -> None:
    server = lora_fx.VllmServer("http://127.0.0.1:9", directory=tmp_path, timeout=2)
    error = failure(adapted(), server)
    assert error.reason == "no answer"
    assert "http://127.0.0.1:9/v1: adapter 'default' (version 1) was not delivered" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason) == (str(error), error.reason)
    assert not list(tmp_path.iterdir())


def test_a_probe_that_does_not_tell(serve: Callable[..., str], caplog: Any) -> None:
    fresh = lora_fx.rewrite(llama(vocab_size=96), LoraConfig(r=4))
    error = failure(fresh, serve(), name="fresh")
    assert error.reason == "inconclusive"
    assert "cannot be told from the base alone by this probe" in str(error)
    server, model = lora_fx.VllmServer(serve()), adapted()
    assert lora_fx.sync(model, server, probe=PROBE, name="slow", version="step 1").applied
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.mul_(1 + 1e-4)
    options = {"probe": PROBE, "name": "slow", "version": "step 2", "on_inconclusive": "warn"}
    receipt = lora_fx.sync(model, server, **options)
    assert not receipt.applied
    assert receipt.answers_as == ("step 2", "step 1")
    assert "cannot be told from step 1" in caplog.text
    # A finer tolerance tells them apart, since both compute in fp32.
    assert lora_fx.sync(model, server, probe=PROBE, name="slow", tolerance=1e-6).applied


def test_an_adapter_that_diverged_is_not_delivered(serve: Callable[..., str]) -> None:
    model = adapted()
    with torch.no_grad():
        next(lora_fx.trainable_parameters(model)).fill_(float("nan"))
    error = failure(model.eval(), serve(), name="diverged")
    assert error.reason == "not finite"


def test_texts_names_and_models_that_cannot_be_used(serve: Callable[..., str]) -> None:
    model = adapted()
    for options, says in {
        "a text": ({"probe": "w1"}, "texts need tokenizer="),
        "no token": ({"probe": []}, "probe= is a text"),
        "no ids": ({"probe": {"x": 1}}, "give tensors by argument"),
        "numbers": ({"probe": torch.randn(2, 3)}, None),
    }.values():
        with pytest.raises(ConfigError, match=says):
            lora_fx.sync(model, serve(), **options)
    for target in ("localhost:8000", "file:///etc", 3):
        with pytest.raises(ConfigError, match="address"):
            lora_fx.sync(model, target, probe=PROBE)
    with pytest.raises(ConfigError, match="no rewritten model"):
        lora_fx.sync(llama(), serve(), probe=PROBE)
    with pytest.raises(ConfigError, match="several rewritten models"):
        lora_fx.sync(nn.ModuleList([model, adapted()]), serve(), probe=PROBE)


def test_one_adapter_of_several(serve: Callable[..., str]) -> None:
    """The others do not matter, active or not, and the choice stays."""
    model = adapted()
    lora_fx.add_adapter(model, LoraConfig(r=2), "other")
    lora_fx.set_adapter(model, ["default", "other"])
    change(model, 3)
    server = lora_fx.VllmServer(serve())
    for name in ("default", "other"):
        receipt = lora_fx.sync(model, server, probe=PROBE, adapter_name=name, name=f"of/{name}")
        assert receipt.applied
    assert lora_fx.active_adapters(model) == ("default", "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(serve: Callable[..., str], dtype: torch.dtype) -> None:
    """The server computes in fp32, so that the bases are apart by the rounding here."""
    model = change(lora_fx.rewrite(llama(vocab_size=96).to(dtype), CONFIG), 0, 1.0)
    receipt = lora_fx.sync(model, serve(), probe=PROBE, name="policy")
    assert receipt.applied
    assert 0 < receipt.noise < receipt.tolerance < receipt.effect


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", ["inputs", "bank"])
@pytest.mark.parametrize("task", [None, "text-generation"])
def test_sessions_and_banks(adapters: str, task: str | None, tmp_path: Path) -> None:
    model = adapted().eval()
    kinds = {} if task is None else {"task": task}
    lora_fx.export_onnx(model, tmp_path / "m.onnx", PROBE, adapters=adapters, verify=False, **kinds)
    session = lora_fx.OnnxSession(tmp_path / "m.onnx", "cpu")
    for step in (1, 2):
        change(model, step)
        receipt = lora_fx.sync(model, session, probe=PROBE, name="policy", version=f"step {step}")
        assert receipt.applied
        assert receipt.folder is None
    assert lora_fx.sync(model, session, probe=PROBE, name="policy").applied
    # A model over another base.
    other = lora_fx.rewrite(llama(vocab_size=96, initializer_range=0.5), CONFIG)
    error = failure(change(other, 0), session, name="other")
    assert error.reason in ("not applied", "inconclusive")
    assert error.delivery.noise > 0.01


def test_a_session_of_images(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    made = change(lora_fx.rewrite(model, LoraConfig(r=2)), 0)
    x = torch.randn(2, 3, 6, 6)
    lora_fx.export_onnx(made, tmp_path / "m.onnx", x, adapters="inputs")
    session = lora_fx.OnnxSession(tmp_path / "m.onnx", "cpu")
    for probe in (x, {session.inputs[0].name: x}):
        assert lora_fx.sync(made, session, probe=probe, name="a").applied
    lora_fx.export_onnx(lora_fx.merge(made), tmp_path / "merged.onnx", x)
    session = lora_fx.OnnxSession(tmp_path / "merged.onnx", "cpu")
    with pytest.raises(ConfigError, match="takes no adapters"):
        lora_fx.sync(made, session, probe=x)
