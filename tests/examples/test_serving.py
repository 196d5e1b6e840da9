"""The server of the examples, asked by several clients while adapters come and go."""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx

pytestmark = pytest.mark.stack

EXAMPLE = Path(__file__).parents[2] / "examples" / "export_and_serve.py"
IDS = [[5, 7, 11, 12], [9, 12, 1, 14]]


class Classifier(nn.Module):
    """Token ids and mask to logits of two labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 2)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        tokens = self.embedding(input_ids) * attention_mask[..., None]
        return {"logits": self.head(tokens.mean(1))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of the base, and two adapters that give all rows one label or the other."""
    folder = tmp_path_factory.mktemp("served")
    ids = torch.tensor(IDS)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = lora_fx.LoraConfig(r=2, target_modules=["head"], lora_bias=True)
    model = lora_fx.rewrite(Classifier().eval(), config, adapter_name="zero")
    lora_fx.add_adapter(model, config, "one")
    for label, name in enumerate(("zero", "one")):
        lora_fx.set_adapter(model, name)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if f".{name}" in key and value.shape == (2,):
                    value[label] = 100.0
        lora_fx.save_adapter(model, folder)
    lora_fx.export_onnx(model, folder / "base.onnx", example, adapters="inputs")
    return folder


@pytest.fixture
def client(root: Path) -> Iterator[Any]:
    testclient = pytest.importorskip("fastapi.testclient")
    spec = importlib.util.spec_from_file_location("export_and_serve", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    session = lora_fx.OnnxSession(root / "base.onnx", "cpu")
    # An error of a handler is what a client sees: 500.
    with testclient.TestClient(
        example.serve(session, root),
        base_url="http://127.0.0.1",
        raise_server_exceptions=False,
    ) as client:
        yield client


def classify(client: Any, adapter: str | None, ids: list[list[int]] = IDS) -> Any:
    return client.post("/classify", json={"input_ids": ids, "adapter": adapter})


def put(client: Any, name: str, folder: str) -> Any:
    return client.put(f"/adapters/{name}", json={"folder": folder})


def test_adapters_are_added_and_removed(client: Any) -> None:
    assert client.get("/adapters").json() == []
    assert classify(client, None).status_code == 200
    for folder, labels in (("zero", [0, 0]), ("one", [1, 1])):  # the second replaces the first
        assert put(client, "law", folder).status_code == 204
        assert classify(client, "law").json() == {"labels": labels}
    assert client.get("/adapters").json() == ["law"]
    assert client.delete("/adapters/law").status_code == 204
    for refused in (classify(client, "law"), client.delete("/adapters/law")):
        assert refused.status_code == 404
        assert "no adapter 'law'" in refused.json()["detail"]


def test_what_is_refused(client: Any) -> None:
    assert put(client, "law", "..").status_code == 403
    assert put(client, "law", "/").status_code == 403
    assert put(client, "law", "missing").status_code == 422
    assert classify(client, None, [[1], [1, 2]]).status_code == 422
    assert classify(client, None, [[99]]).status_code == 422
    assert client.get("/adapters", headers={"host": "pages.example"}).status_code == 400
    assert client.get("/adapters").json() == []


def test_requests_run_while_adapters_come_and_go(client: Any) -> None:
    done = threading.Event()
    answers: Counter[tuple[str, int]] = Counter()
    wrong: list[Any] = []

    def ask(name: str, label: int) -> None:
        while not done.is_set():
            answer = classify(client, name)
            answers[name, answer.status_code] += 1
            if answer.status_code == 200 and answer.json()["labels"] != [label, label]:
                wrong.append(answer.json())

    def swap(name: str) -> list[int]:
        codes = []
        for _ in range(40):
            codes += [
                put(client, name, name).status_code,
                client.delete(f"/adapters/{name}").status_code,
            ]
        return codes

    with ThreadPoolExecutor(6) as threads:
        asking = [
            threads.submit(ask, *pair) for pair in (("zero", 0), ("one", 1)) for _ in range(2)
        ]
        swapping = [threads.submit(swap, name) for name in ("zero", "one")]
        codes = [future.result() for future in swapping]
        done.set()
        for future in asking:
            future.result()
    assert codes == [[204] * 80] * 2
    assert not wrong
    assert {code for _, code in answers} == {200, 404}, answers


def test_one_of_several_clients_removes_an_adapter(client: Any) -> None:
    assert put(client, "law", "one").status_code == 204
    with ThreadPoolExecutor(4) as threads:
        codes = list(threads.map(lambda _: client.delete("/adapters/law").status_code, range(4)))
    assert sorted(codes) == [204, 404, 404, 404]
