r"""Serve many adapters over one ONNX file, with FastAPI and ONNX Runtime. Each request names its adapter.

By default a tiny classifier and two adapters are trained, exported and called in this process. To listen on
127.0.0.1, with your own model and adapters (folders that lora-fx or PEFT wrote)::

    pip install '.[serve,hf,cpu]'
    python examples/export_and_serve.py --serve --model FOLDER --adapter maths=FOLDER --adapter code=FOLDER
    curl -H 'Content-Type: application/json' -d '{"input_ids": [[5, 7, 2]], "adapter": "maths"}' \
        http://127.0.0.1:8000/classify

Adapters can be added and removed while the server runs. New ones are in folders below ``--adapters``::

    curl -X PUT -H 'Content-Type: application/json' -d '{"folder": "law"}' http://127.0.0.1:8000/adapters/law
    curl -X DELETE http://127.0.0.1:8000/adapters/maths
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fastapi import FastAPI, HTTPException
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from pydantic import BaseModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

import lora_fx

TOKENS = 32
MADE = {"has seven": 7, "has nine": 9}  # the token that each example adapter detects


class Question(BaseModel):
    """Request of a client: rows of token ids of equal length, and the adapter (None for the base model)."""

    input_ids: list[list[int]]
    adapter: str | None = None


def train(base: nn.Module, token: int) -> nn.Module:
    """Return a rewritten model with an adapter that detects if a token is in a row."""
    torch.manual_seed(token)
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16)).train()
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=1e-2)
    for _ in range(150):
        ids, labels = torch.randint(TOKENS, (32, 6)), torch.randint(2, (32,))
        ids[ids == token] = 0
        there = labels.nonzero().squeeze(-1)
        ids[there, torch.randint(6, there.shape)] = token
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained to look for token {token}: loss {loss.item():.3f}")
    return model.eval()


class Source(BaseModel):
    """Location of a new adapter: a folder below the folder of all adapters."""

    folder: str


def serve(session: lora_fx.OnnxSession, root: Path | None = None) -> FastAPI:
    """Return the application. Its handlers run in threads that share the session.

    A run uses the same adapter from start to end, even if the adapter is removed meanwhile. So no lock is
    needed, and the list of adapters is only in the session.
    """
    app = FastAPI(title="adapters")
    # A web page could reach this port under another host name, so only local names are allowed.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.get("/adapters")
    def list_adapters() -> list[str]:
        return list(session.adapters)

    @app.put("/adapters/{name}", status_code=204)
    def load(name: str, source: Source) -> None:
        if root is None:
            raise HTTPException(403, "the server was started without --adapters")
        folder = (root / source.folder).resolve()
        if not folder.is_relative_to(root.resolve()):
            raise HTTPException(403, f"{source.folder!r} is not below the folder of the adapters")
        try:
            session.load_adapter(name, folder)
        except lora_fx.LoraFxError as error:
            raise HTTPException(422, str(error)) from error

    @app.delete("/adapters/{name}", status_code=204)
    def unload(name: str) -> None:
        try:
            session.unload_adapter(name)
        except lora_fx.ConfigError as error:
            raise HTTPException(404, str(error)) from error

    @app.post("/classify")
    def classify(question: Question) -> dict[str, list[int]]:
        try:
            ids = torch.tensor(question.input_ids)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = session.run(inputs, adapter=question.adapter)["logits"]
        # There is no check before the run, because the adapter may be removed after a check.
        except lora_fx.ConfigError as error:
            raise HTTPException(404, str(error)) from error
        except (
            lora_fx.ExportError,
            ValueError,
        ) as error:  # no such token, or rows of unequal length
            raise HTTPException(422, str(error)) from error
        return {"labels": logits.argmax(-1).tolist()}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="serve adapters over one ONNX file")
    parser.add_argument("--model", metavar="FOLDER", help="a sequence classifier of transformers")
    parser.add_argument("--adapter", metavar="NAME=FOLDER", action="append", default=[])
    parser.add_argument("--adapters", metavar="FOLDER", type=Path, help="where new adapters are")
    parser.add_argument("--serve", action="store_true", help="listen on 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.model is not None:
        base = AutoModelForSequenceClassification.from_pretrained(options.model)
        adapters = dict(one.split("=", 1) for one in options.adapter)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=TOKENS, num_attention_heads=4, **sizes)
        config.initializer_range = 0.2
        base = BertForSequenceClassification(config)
        adapters = {name: train(base, token) for name, token in MADE.items()}

    with TemporaryDirectory() as folder:
        # The base is in one file. Each adapter is loaded into the session, from a folder or from a model.
        file, ids = Path(folder, "base.onnx"), torch.randint(TOKENS, (2, 6))
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lora_fx.export_onnx(base.eval(), file, example, adapters="inputs")
        session = lora_fx.OnnxSession(file, provider="cpu")
        for name, adapter in adapters.items():
            session.load_adapter(name, adapter)
        app = serve(session, options.adapters)
        if options.serve:
            import uvicorn

            uvicorn.run(app, host="127.0.0.1", port=options.port)
            return

        from fastapi.testclient import TestClient

        client = TestClient(app, base_url="http://127.0.0.1")
        for name in [*adapters, None]:
            question = {
                "input_ids": [[5, 7, 11, 12, 13, 14], [9, 12, 1, 14, 15, 16]],
                "adapter": name,
            }
            print(f"{name or 'base'}: {client.post('/classify', json=question).json()['labels']}")
        refused = client.post("/classify", json={"input_ids": [[1]], "adapter": "unknown"})
        print(f"unknown: {refused.status_code}, {refused.json()['detail']}")
        gone = next(iter(adapters))
        client.delete(f"/adapters/{gone}").raise_for_status()
        refused = client.post("/classify", json={"input_ids": [[1]], "adapter": gone})
        print(f"{gone}: {refused.status_code}, {refused.json()['detail']}")


if __name__ == "__main__":
    main()
