"""Receipts: what a runtime does with an adapter is told from what it should do."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig
from lora_fx.checkpoint import read_receipt
from tests.algebra import randomize

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[5, 9, 3, 7], [8, 2, 11, 4]])


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval()


def adapted(seed: int = 0, **options: Any) -> nn.Module:
    model = lora_fx.rewrite(llama(), LoraConfig(**{"r": 4, **options})).eval()
    torch.manual_seed(seed)
    randomize(model)
    return model


def saved(folder: Path, **options: Any) -> tuple[nn.Module, Path]:
    model = adapted(**options)
    return model, lora_fx.save_adapter(model, folder, receipt=IDS)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_receipt_changes_nothing_and_is_met_by_the_model(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    folder = lora_fx.save_adapter(model, tmp_path / "a", receipt={"input_ids": IDS})
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    verdict = lora_fx.verify(folder, model)
    assert verdict.verdict == "applied"
    assert "distance to base and adapter" in str(verdict)
    assert lora_fx.verify(folder, lora_fx.merge(model)).applied
    assert lora_fx.verify(folder, PeftModel.from_pretrained(llama(), folder)).applied
    half = lora_fx.merge(model).to(torch.bfloat16)
    assert lora_fx.verify(folder, half).applied
    again = lora_fx.load_adapter(llama(), folder)
    assert lora_fx.verify(folder, again).applied


def _nothing(model: nn.Module) -> None:
    for parameter in _bs(model):
        parameter.data.zero_()


def _twice(model: nn.Module) -> None:
    for parameter in _bs(model):
        parameter.data.mul_(2)


def _three_halves(model: nn.Module) -> None:
    for parameter in _bs(model):
        parameter.data.mul_(1.5)


def _turned(model: nn.Module) -> None:
    for parameter in _bs(model):
        parameter.data.copy_(parameter.data.flip(0))


def _layer_missing(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "layers.0" in name:
            parameter.data.zero_()


def _other_base(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.05


def _bs(model: nn.Module) -> Iterator[nn.Parameter]:
    return (one for name, one in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        (_nothing, "not applied"),
        (_twice, "applied with another scale"),
        (_three_halves, "applied with another scale"),
        (_turned, "applied otherwise"),
        (_layer_missing, "applied otherwise"),
        (_other_base, "applied otherwise"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_seeded_faults_are_seen(
    fault: Callable[[nn.Module], None], verdict: str, seed: int, tmp_path: Path
) -> None:
    model, folder = saved(tmp_path / "a", seed=seed)
    wrong = copy.deepcopy(model)
    fault(wrong)
    found = lora_fx.verify(folder, wrong)
    assert found.verdict == verdict, str(found)
    if verdict == "applied with another scale":
        assert found.scale == pytest.approx(2.0 if fault is _twice else 1.5, rel=0.1)


@pytest.mark.slow
def test_a_file_is_asked_merged_swappable_and_with_a_cache(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "a")
    options = {"task": "text-generation"}
    for name, adapters in (("merged", "merge"), ("swappable", "inputs")):
        path = tmp_path / f"{name}.onnx"
        lora_fx.export_onnx(model, path, IDS, adapters=adapters, **options)
        found = lora_fx.verify(folder, path)
        assert found.applied, str(found)
    lora_fx.export_onnx(llama(), tmp_path / "base.onnx", IDS, **options)
    assert lora_fx.verify(folder, tmp_path / "base.onnx").verdict == "not applied"
    other = lora_fx.rewrite(llama(3), LoraConfig(r=4))
    lora_fx.export_onnx(other, tmp_path / "other.onnx", IDS, adapters="inputs", **options)
    assert lora_fx.verify(folder, tmp_path / "other.onnx").verdict == "another base"


def test_a_model_of_pictures_is_compared_by_its_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    made = lora_fx.rewrite(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    randomize(made)
    x = torch.randn(2, 3, 8, 8)
    folder = lora_fx.save_adapter(made, tmp_path / "a", receipt=x)
    assert lora_fx.verify(folder, made).applied
    assert lora_fx.verify(folder, model).verdict == "not applied"
    lora_fx.export_onnx(made, tmp_path / "m.onnx", x)
    assert lora_fx.verify(folder, tmp_path / "m.onnx").applied


@contextmanager
def served(models: dict[str, nn.Module], parents: dict[str, str]) -> Iterator[str]:
    """The models behind OpenAI's protocol, as vLLM speaks it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            rows = [{"id": name, "parent": parents.get(name)} for name in models]
            self._reply({"data": rows})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with torch.no_grad():
                logits: Tensor = models[asked["model"]](torch.tensor([asked["prompt"]])).logits
            best = logits[0, -1].log_softmax(-1).topk(asked["logprobs"])
            tops = {
                f"token_id:{token}": value
                for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            }
            self._reply({"choices": [{"logprobs": {"top_logprobs": [tops]}}]})

        def _reply(self, values: Any) -> None:
            data = json.dumps(values).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_is_asked_for_the_adapter_and_its_base(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "a")
    twice = copy.deepcopy(model)
    _twice(twice)
    models = {"base": llama(), "maths": model, "idle": llama(), "twice": twice, "other": llama(4)}
    parents = dict.fromkeys(("maths", "idle", "twice"), "base")
    with served(models, parents) as address:
        wanted = {
            "maths": "applied",
            "idle": "not applied",
            "twice": "applied with another scale",
        }
        for name, verdict in wanted.items():
            found = lora_fx.verify(folder, address, name=name)
            assert found.verdict == verdict, str(found)
        found = lora_fx.verify(folder, address, name="maths", base_name="other")
        assert found.verdict == "another base"
        with pytest.raises(
            ConfigError, match=r"has no model 'physics': give name= .* one of base, maths"
        ):
            lora_fx.verify(folder, address, name="physics")
    with pytest.raises(ConfigError, match="does not answer"):
        lora_fx.verify(folder, "http://127.0.0.1:9/v1", name="maths")


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="changes what is compared by 0"):
        lora_fx.save_adapter(
            lora_fx.rewrite(llama(), LoraConfig(r=2)), tmp_path / "untrained", receipt=IDS
        )
    assert not (tmp_path / "untrained").exists()
    with pytest.raises(ConfigError, match="receipt= is a tensor"):
        lora_fx.save_adapter(model, tmp_path / "b", receipt="text")
    lora_fx.save_adapter(model, folder, force=True)
    with pytest.raises(CheckpointError, match=r"has no adapter_receipt\.safetensors"):
        lora_fx.verify(folder, model)
    _, folder = saved(tmp_path / "c")
    (folder / "adapter_receipt.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        lora_fx.verify(folder, model)
    _, folder = saved(tmp_path / "d")
    other = nn.Sequential(nn.Embedding(64, 4), nn.Linear(4, 6))
    with pytest.raises((CheckpointError, TypeError)):
        lora_fx.verify(folder, other)


def test_the_command_says_so_and_exits_with_it(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lora_fx.tools.cli.app import app

    model, folder = saved(tmp_path / "a")
    path = tmp_path / "m.onnx"
    lora_fx.export_onnx(model, path, IDS, task="text-generation")
    done = CliRunner().invoke(app, ["verify", str(folder), "--onnx", str(path)])
    assert done.exit_code == 0
    assert done.output.startswith("applied")
    lora_fx.export_onnx(llama(), path, IDS, task="text-generation", force=True)
    done = CliRunner().invoke(app, ["verify", str(folder), "--onnx", str(path), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["verdict"] == "not applied"
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 2


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(num_layers=1, **sizes)).eval()


@pytest.mark.parametrize("length", [2, 4, 6])
def test_an_encoder_decoder_is_compared_after_the_last_token_of_its_decoder(
    length: int, tmp_path: Path
) -> None:
    model = lora_fx.rewrite(_t5(), LoraConfig(r=4, target_modules=["q", "v"])).eval()
    randomize(model)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    decoder = torch.arange(2 * length).reshape(2, length)
    inputs = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": decoder}
    folder = lora_fx.save_adapter(model, tmp_path / "a", receipt=inputs)
    assert lora_fx.verify(folder, model).applied
    receipt = read_receipt(folder)
    with torch.no_grad():
        last = model(**inputs).logits[:, -1].double().log_softmax(-1)
    assert torch.allclose(receipt.answers[1.0], last.gather(-1, receipt.chosen), atol=1e-5)


class _Scaled(nn.Module):
    """A layer whose output has any size."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.layer = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.layer(x)) * self.size
        return out


def _scaled(size: float, factor: float = 1.0) -> nn.Module:
    model = lora_fx.rewrite(_Scaled(size), LoraConfig(r=4, target_modules=["layer"]))
    randomize(model)
    for parameter in _bs(model):
        parameter.data.mul_(factor)
    return model


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_the_effect_on_an_output_is_a_share_of_it(size: float, tmp_path: Path) -> None:
    folder = lora_fx.save_adapter(_scaled(size), tmp_path / "a", receipt=X)
    assert lora_fx.verify(folder, _scaled(size)).applied
    with pytest.raises(ConfigError, match="changes what is compared by"):
        lora_fx.save_adapter(_scaled(size, 1e-4), tmp_path / "b", receipt=X)
    assert not (tmp_path / "b").exists()


class Broken(nn.Module):
    """Gives what it should for all rows but one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _scaled(1.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return torch.cat([out[:3], out[3:] * float("nan")])


def test_what_is_not_a_number_is_not_applied(tmp_path: Path) -> None:
    folder = lora_fx.save_adapter(_scaled(1.0), tmp_path / "a", receipt=X)
    assert lora_fx.verify(folder, Broken()).verdict == "applied otherwise"
    with pytest.raises(ConfigError, match="is not finite"):
        lora_fx.save_adapter(_scaled(float("inf")), tmp_path / "b", receipt=X)


def test_the_command_writes_json_without_infinity_and_wants_an_address(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lora_fx.tools.cli.app import app

    folder = str(lora_fx.save_adapter(_scaled(1.0), tmp_path / "a", receipt=X))
    done = CliRunner().invoke(app, ["verify", folder, "--model", f"{__name__}:Broken", "--json"])
    assert done.exit_code == 1
    assert "Infinity" not in done.stdout
    assert json.loads(done.stdout)["evidence"]["distance to the base"] is None
    done = CliRunner().invoke(app, ["verify", folder, "--url", "localhost:8000/v1"])
    assert done.exit_code == 2
    assert "begins with http://" in done.output


def test_modes_of_submodules_stay_as_they_are(tmp_path: Path) -> None:
    model = _scaled(1.0)
    folder = lora_fx.save_adapter(model, tmp_path / "a", receipt=X)
    model.train()
    model.get_submodule("drop").eval()
    before = {name: module.training for name, module in model.named_modules()}
    lora_fx.verify(folder, model)
    assert before == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"y": X}, r"this _Scaled.* cannot be called with .*y \[4, 8\]"),
        (X[:, :3], "cannot be called with the inputs of the receipt"),
        ({"": X}, "receipt= is a tensor"),
        ({0: X}, "receipt= is a tensor"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(
    inputs: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        lora_fx.save_adapter(_scaled(1.0), tmp_path / "a", receipt=inputs)
    assert not (tmp_path / "a").exists()


def test_a_receipt_of_another_adapter_is_refused(tmp_path: Path) -> None:
    model = _scaled(1.0)
    folder = lora_fx.save_adapter(model, tmp_path / "a", receipt=X)
    other = lora_fx.save_adapter(_scaled(1.0, 2.0), tmp_path / "b", receipt=X)
    name = "adapter_receipt.safetensors"
    (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CheckpointError, match="of another adapter than the one in"):
        lora_fx.verify(folder, model)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('{"format": 2}', "written in format 2: update lora_fx"),
        ("[1]", "damaged"),
        ('{"format": 1, "tokens": false, "facts": []}', "damaged"),
    ],
)
def test_a_damaged_receipt_is_refused(written: str, says: str, tmp_path: Path) -> None:
    model = _scaled(1.0)
    folder = lora_fx.save_adapter(model, tmp_path / "a", receipt=X)
    path = folder / "adapter_receipt.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"lora_fx.receipt": written})
    with pytest.raises(CheckpointError, match=says):
        lora_fx.verify(folder, model)


def test_other_subjects_are_refused(tmp_path: Path) -> None:
    model = _scaled(1.0)
    folder = lora_fx.save_adapter(model, tmp_path / "a", receipt=X)
    with pytest.raises(ConfigError, match="subject is a NoneType"):
        lora_fx.verify(folder, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="what a server calls its models"):
        lora_fx.verify(folder, model, name="a")
