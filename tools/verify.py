"""``verify``: asks a model, a file or a server what it makes of an adapter's canary inputs."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.checkpoint import Receipt, Verdict, call_with, read_receipt
from lora_fx.errors import ConfigError, some
from lora_fx.export.fuse import Provider

__all__ = ["verify"]

_SECONDS = 120
_AS_ID = "token_id:"
_OR = {"adapter": "", "subject": ", an address or a model"}


def verify(
    adapter: str | os.PathLike[str],
    subject: nn.Module | str | os.PathLike[str],
    *,
    name: str | None = None,
    base_name: str | None = None,
    provider: Provider = "cpu",
) -> Verdict:
    """Find out whether a runtime applies an adapter.

    Args:
        adapter: An adapter folder that was saved with ``receipt=``.
        subject: A model, an ``.onnx`` file (one that takes adapters is given this one), or the address of a
            server that speaks OpenAI's protocol (``http://127.0.0.1:8000/v1``) and reports tokens by their
            ids, as vLLM does.
        name: What the server calls the adapter.
        base_name: What it calls the base; by default what it says itself, if it does.
        provider: "cpu" or "cuda", for a file.

    Returns:
        The verdict, and the distances that it is drawn from.

    Raises:
        CheckpointError: If the folder has no receipt, or that of another model.
        ConfigError: If the model or the server cannot be asked so.
        ExportError, ProviderError: If the file cannot be run.
    """
    for what, given in (("adapter", adapter), ("subject", subject)):
        if not isinstance(given, str | os.PathLike) and not (
            what == "subject" and isinstance(given, nn.Module)
        ):
            raise ConfigError(f"{what} is a {type(given).__name__}: give a path{_OR[what]}")
    folder = Path(adapter)
    receipt = read_receipt(folder)
    at_server = str(subject).startswith(("http://", "https://"))
    if not at_server and not (name is None and base_name is None):
        raise ConfigError(
            "name= and base_name= are what a server calls its models: give its address"
        )
    if isinstance(subject, nn.Module):
        return receipt.judge(receipt.read(_run(subject, receipt)))
    if at_server:
        return _judge_server(receipt, str(subject).rstrip("/"), name, base_name)
    return _judge_file(receipt, Path(subject), folder, provider)


def _run(model: nn.Module, receipt: Receipt) -> Any:
    training = [(module, module.training) for module in model.modules()]
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    inputs = {key: value.to(device) for key, value in receipt.inputs.items()}
    model.eval()
    try:
        with torch.no_grad():
            return call_with(model, inputs)
    finally:
        for module, mode in training:
            module.training = mode


def _judge_file(receipt: Receipt, path: Path, folder: Path, provider: Provider) -> Verdict:
    from lora_fx.export.adapter_manifest import MANIFEST_KEY
    from lora_fx.export.session import OnnxSession

    session = OnnxSession(path, provider)
    answer = _Asked(session, receipt)
    if MANIFEST_KEY not in session.metadata:
        return receipt.judge(answer.with_adapter(None))
    session.load_adapter("verified", folder)
    return receipt.judge(answer.with_adapter("verified"), answer.with_adapter(None))


class _Asked:
    """A file that is asked."""

    def __init__(self, session: Any, receipt: Receipt) -> None:
        self._session, self._receipt = session, receipt

    def with_adapter(self, adapter: str | None) -> Tensor:
        """What it answers with an adapter; with None as it is."""
        from lora_fx.export.decoder import last_logits
        from lora_fx.export.decoder_cache import TASK_KEY

        inputs = self._receipt.inputs
        if TASK_KEY in self._session.metadata:
            ids = inputs.get("input_ids", inputs.get(""))
            if ids is None:
                raise ConfigError(
                    f"{self._session.path.name} takes input_ids, and the receipt has {some(list(inputs))}"
                )
            mask = inputs.get("attention_mask", torch.ones_like(ids))
            return self._receipt.read(last_logits(self._session, ids, mask, adapter))
        names = {port.name for port in self._session.inputs}
        given: Any = inputs[""] if "" in inputs else {k: v for k, v in inputs.items() if k in names}
        return self._receipt.read(self._session.run(given, adapter=adapter))


# --- servers --------------------------------------------------------------------------------------


def _judge_server(
    receipt: Receipt, address: str, name: str | None, base_name: str | None
) -> Verdict:
    if not receipt.tokens:
        raise ConfigError("a server gives log-probabilities of tokens, and this model has none")
    known = _models(address)
    if name is None or name not in known:
        raise ConfigError(
            f"{address} has no model {name!r}: give name= (--name) one of {some(list(known))}"
        )
    base = base_name or known[name]
    answer = _log_probabilities(receipt, address, name)
    without = None if base is None or base == name else _log_probabilities(receipt, address, base)
    return receipt.judge(answer, without)


def _models(address: str) -> dict[str, str | None]:
    """The models of a server, each with the base that it says it has."""
    found = _asked(f"{address}/models", None).get("data", ())
    return {str(one.get("id")): one.get("parent") for one in found if isinstance(one, Mapping)}


def _log_probabilities(receipt: Receipt, address: str, name: str) -> Tensor:
    """[rows, tokens]: what the server reports, NaN for tokens that it leaves out."""
    ids = receipt.inputs.get("input_ids", receipt.inputs.get(""))
    if ids is None:
        raise ConfigError("a server takes token ids, and the receipt has no input_ids")
    mask = receipt.inputs.get("attention_mask", torch.ones_like(ids))
    answer = torch.full(receipt.chosen.shape, float("nan"), dtype=torch.float64)
    for row, (tokens, counts) in enumerate(zip(ids, mask, strict=True)):
        reply = _asked(
            f"{address}/completions",
            {
                "model": name,
                "prompt": tokens[counts.bool()].tolist(),
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": receipt.chosen.shape[1] // 2,
                "return_tokens_as_token_ids": True,
            },
        )
        try:
            reported: Mapping[str, float] = reply["choices"][0]["logprobs"]["top_logprobs"][0]
        except (LookupError, TypeError) as error:
            raise ConfigError(f"{address} reports no log-probabilities of tokens") from error
        by_id = {
            int(k.removeprefix(_AS_ID)): v for k, v in reported.items() if k.startswith(_AS_ID)
        }
        if not by_id:
            raise ConfigError(
                f"{address} names tokens by their text, not by their ids (return_tokens_as_token_ids), so "
                "that they cannot be compared"
            )
        for place, token in enumerate(receipt.chosen[row].tolist()):
            answer[row, place] = by_id.get(token, float("nan"))
    return answer


def _asked(address: str, body: Mapping[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise ConfigError(f"{address} refuses ({error.code}): {said}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ConfigError(f"{address} does not answer: {error}") from error
