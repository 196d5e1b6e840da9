"""A small stand-in for vLLM's server: a Llama of transformers, with adapters that PEFT loads from folders.

It speaks the part of the protocol that ``lora_fx.sync`` uses, as vLLM 0.32 and 0.33 do: models,
completions with log-probabilities, and adapters at run time. It runs in a process of its own::

    python -m tests.lora_server BASE [--fault FAULT]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FAULTS = {
    "off": "runtime updates are off, as without VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "old": "knows no load_inplace, as before vLLM 0.12",
    "ignore": "says that it loads, and does not",
    "keep": "loads the first adapter, and says so of others",
    "base": "knows the adapter, and runs the base",
    "zero": "loads other values",
    "nan": "computes values that are not finite",
    "text": "names tokens by their text",
    "redirect": "sends clients elsewhere",
}


class Models:
    """The base and its adapters, as vLLM's ``OpenAIServingModels`` has them."""

    def __init__(self, folder: str, fault: str | None) -> None:
        from transformers import AutoModelForCausalLM

        self.base = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.folder, self.fault = folder, fault
        self.paths: dict[str, str] = {}
        self.model: Any = None

    def list(self) -> list[dict[str, Any]]:
        adapters = [
            {"id": name, "root": path, "parent": "base"} for name, path in self.paths.items()
        ]
        return [{"id": "base", "root": self.folder, "parent": None}, *adapters]

    def load(self, lora_name: str, lora_path: str, load_inplace: bool = False) -> tuple[int, Any]:
        from peft import PeftModel

        known = lora_name in self.paths
        if known and (self.fault == "old" or not load_inplace):
            return refusal(400, f"The lora adapter '{lora_name}' has already been loaded.")
        if self.fault == "ignore":
            return 200, "Success"
        if not Path(lora_path, "adapter_config.json").is_file():
            return refusal(404, f"Loading lora {lora_name} failed: No adapter found")
        if json.loads(Path(lora_path, "adapter_config.json").read_text())["r"] > 16:
            return refusal(500, "LoRA rank 32 is greater than max_lora_rank 16.")
        if not (known and self.fault == "keep"):
            if known:
                self.model.delete_adapter(lora_name)
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, lora_path, lora_name).eval()
            else:
                self.model.load_adapter(lora_path, lora_name)
            if self.fault == "zero":
                for key, value in self.model.named_parameters():
                    if f"lora_A.{lora_name}" in key:
                        value.data.neg_()
        self.paths[lora_name] = lora_path
        return 200, f"Success: LoRA adapter '{lora_name}' added successfully."

    def unload(self, lora_name: str) -> tuple[int, Any]:
        if lora_name not in self.paths:
            return refusal(404, f"The lora adapter '{lora_name}' cannot be found.")
        del self.paths[lora_name]
        if self.paths:
            self.model.delete_adapter(lora_name)
        else:
            self.base, self.model = self.model.unload(), None
        return 200, "Success"

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        if name not in {"base", *self.paths}:
            return refusal(404, f"The model `{name}` does not exist.")
        model = self.base if self.model is None else self.model
        plain = name == "base" or self.fault == "base"
        if not plain:
            model.set_adapter(name)
        with model.disable_adapter() if plain and self.model is not None else nullcontext():
            logits = model(torch.tensor([body["prompt"]])).logits[0, -1]
        if self.fault == "nan" and not plain:
            logits = logits * float("nan")
        best = logits.log_softmax(-1).topk(body["logprobs"])
        form = "w{}" if self.fault == "text" else "token_id:{}"
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = {form.format(token): value for token, value in pairs}
        return 200, {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


def refusal(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


class Handler(BaseHTTPRequestHandler):
    models: Models

    def do_GET(self) -> None:
        if self.models.fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/v1/models")
            self.end_headers()
            return
        self.reply(200, {"data": self.models.list()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        routes = {
            "/v1/completions": lambda: self.models.complete(body),
            "/v1/load_lora_adapter": lambda: self.models.load(**body),
            "/v1/unload_lora_adapter": lambda: self.models.unload(**body),
        }
        off = self.models.fault == "off" and "lora" in self.path
        if off or self.path not in routes:
            self.reply(404, {"detail": "Not Found"})
            return
        self.reply(*routes[self.path]())

    def reply(self, status: int, values: Any) -> None:
        self.send_response(status)
        self.end_headers()
        text = values if isinstance(values, str) else json.dumps(values)
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(base: Path, fault: str | None = None) -> Iterator[str]:
    """The address of a server in another process."""
    command = [sys.executable, "-m", "tests.lora_server", str(base)]
    command += ["--fault", fault] if fault else []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server has died"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--fault", choices=FAULTS)
    options = parser.parse_args()
    Handler.models = Models(options.base, options.fault)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
