"""Servers that speak OpenAI's protocol over HTTP, as vLLM does: models, log-probabilities, runtime adapters.

Requests go to the given address only: redirects are refused. The standard library sends them.

Sources: vLLM 0.33, ``vllm/entrypoints/serve/lora/api_router.py`` and ``protocol.py`` (adapters),
``vllm/entrypoints/openai/completion/protocol.py`` (completions).
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lora_fx.errors import ConfigError

__all__ = ["MAX_TOKENS", "Server", "ServerError", "UpdatesOffError"]

MAX_TOKENS: Final = 20
"""Largest number of log-probabilities for a token that vLLM reports by default (``--max-logprobs``)."""

_AS_ID: Final = "token_id:"
_TEXT: Final = 500  # characters of a server's refusal in a message


class ServerError(ConfigError):
    """A server does not answer, or refuses a request.

    Attributes:
        status: The HTTP status; None if there was no answer.
        text: The reason from the server, or the reason why the connection failed.
    """

    def __init__(self, message: str, text: str, status: int | None = None) -> None:
        super().__init__(message)
        self.text, self.status = text, status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.text, self.status)


class UpdatesOffError(ServerError):
    """A server has no route for adapters at run time."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A handler that follows no redirect, so that no other address gets the request."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse a redirect. urllib then raises an error with its status."""


@dataclasses.dataclass(frozen=True)
class Server:
    """The address of a server, and the requests to it.

    Attributes:
        address: The address of the API, such as ``http://127.0.0.1:8000/v1``.
        timeout: Seconds to wait for an answer.
        api_key: The key that the server asks for, if any.
    """

    address: str
    timeout: float = 120.0
    api_key: str | None = dataclasses.field(default=None, repr=False)

    def models(self) -> dict[str, Mapping[str, Any]]:
        """Return the entries of the server's models by name.

        vLLM's entry of an adapter has its base as ``parent``, and its folder as ``root``.
        """
        reply = self._ask("models", None)
        entries = reply.get("data", ()) if isinstance(reply, Mapping) else ()
        return {str(entry.get("id")): entry for entry in entries if isinstance(entry, Mapping)}

    def load_adapter(self, name: str, folder: Path, *, replace: bool) -> None:
        """Load an adapter folder, which the server has to see at this path.

        Args:
            name: The name for the adapter.
            folder: The folder.
            replace: True if the server has an adapter of this name.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            self._change(
                "load_lora_adapter", {**body, **({"load_inplace": True} if replace else {})}
            )
        except ServerError as error:
            # Older servers ignore load_inplace, and refuse a name that is already loaded.
            if error.status != 400 or not replace or "already been loaded" not in error.text:
                raise
            self.unload_adapter(name)
            self._change("load_lora_adapter", body)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter from the server."""
        self._change("unload_lora_adapter", {"lora_name": name})

    def next_tokens(
        self, name: str, prompts: Sequence[Sequence[int]], count: int = MAX_TOKENS
    ) -> list[dict[int, float]]:
        """Return the log-probabilities of the likeliest next tokens after each prompt, by token id.

        The prefix cache of the server stays in use, so that a wrong answer from the cache of another adapter
        is noticed.

        Args:
            name: A model of the server.
            prompts: Token ids.
            count: The number of next tokens for each prompt.

        Raises:
            ServerError: If the server refuses, or does not report log-probabilities by token ids.
        """
        return [self._next_token(name, prompt, count) for prompt in prompts]

    def _next_token(self, name: str, prompt: Sequence[int], count: int) -> dict[int, float]:
        body = {
            "model": name,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": count,
            "return_tokens_as_token_ids": True,
        }
        reply = self._ask("completions", body)
        try:
            reported = reply["choices"][0]["logprobs"]["top_logprobs"][0]
            values = {
                int(key.removeprefix(_AS_ID)): float("nan") if value is None else float(value)
                for key, value in reported.items()
                if key.startswith(_AS_ID)
            }
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._error("reports no log-probabilities of tokens") from error
        if not values:
            raise self._error(
                "names tokens by their text, not by their ids (return_tokens_as_token_ids), so that they "
                "cannot be compared"
            )
        return values

    def _change(self, route: str, body: Mapping[str, Any]) -> None:
        try:
            self._ask(route, body, parse=False)
        except ServerError as error:
            # FastAPI answers so if the route does not exist. A refusal by vLLM has another text.
            if error.status in (404, 405) and _detail(error.text) in (
                "Not Found",
                "Method Not Allowed",
            ):
                raise UpdatesOffError(
                    f"{self.address} has no {route}: it does not change adapters at run time. Start vLLM "
                    "with --enable-lora, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment",
                    error.text,
                    error.status,
                ) from error
            raise

    def _ask(self, route: str, body: Mapping[str, Any] | None, *, parse: bool = True) -> Any:
        address = f"{self.address}/{route}"
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            request = urllib.request.Request(address, data, headers)
            opener = urllib.request.build_opener(_NoRedirect)
            with opener.open(request, timeout=self.timeout) as reply:
                content = reply.read()
            return json.loads(content) if parse else content
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")[:_TEXT]
            raise ServerError(
                f"{address} refuses ({error.code}): {text}", text, error.code
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{address} does not answer: {error}", str(error)) from error

    def _error(self, reason: str) -> ServerError:
        return ServerError(f"{self.address} {reason}", reason, 200)


def _detail(text: str) -> Any:
    """Return the field ``detail`` of an error response of FastAPI, or None if the text has none."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values.get("detail") if isinstance(values, Mapping) else None
