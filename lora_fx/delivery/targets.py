"""Targets of deliveries: servers that load folders at run time, and sessions of exported files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from lora_fx.checkpoint import adapter_state_dict, hash_tensors, read_tensors, save_adapter
from lora_fx.config import CONFIG_NAME
from lora_fx.delivery.probe import ProbeInputs, run_session
from lora_fx.delivery.receipt import LocalAnswers
from lora_fx.errors import ConfigError, DeliveryError
from lora_fx.export.session import OnnxSession
from lora_fx.servers import Server, ServerError, UpdatesOffError

__all__ = ["Staged", "Target", "VllmServer", "delivery_errors", "target_of"]

_FOLDERS: Final = (
    2  # the present version's folder, and the one that requests in flight may still read
)


@dataclasses.dataclass(frozen=True)
class Staged:
    """An adapter that is ready for a target.

    Attributes:
        digest: A hash of the adapter's content.
        folder: The folder with the adapter, for a server.
        is_new: True if the folder was written for this delivery.
        model: The rewritten model with the adapter, for a session.
        adapter_name: The name of the adapter in the model.
    """

    digest: str
    folder: Path | None = None
    is_new: bool = False
    model: nn.Module | None = None
    adapter_name: str = ""


class Target(Protocol):
    """A server or a session that takes adapters by name."""

    @property
    def title(self) -> str:
        """The name of the target in messages."""

    def check_probe(self, probe: ProbeInputs, local: LocalAnswers) -> None:
        """Raise if the target cannot answer this probe.

        Raises:
            ConfigError: If the probe or the answers are of another kind.
        """

    def stage(self, model: nn.Module, adapter_name: str, name: str) -> Staged:
        """Prepare an adapter for :meth:`load`: hash its content, and write its folder for a server."""

    def has(self, name: str, staged: Staged) -> bool | None:
        """Compare the target's adapter of a name with a staged adapter.

        Returns:
            True if the contents are equal, False if they differ or may differ, None if the target has no
            adapter of this name.
        """

    def load(self, name: str, staged: Staged, *, replace: bool) -> None:
        """Load an adapter, or replace the adapter of this name."""

    def discard(self, staged: Staged) -> None:
        """Delete the folder of a staged adapter that was not loaded."""

    def answer(self, name: str, probe: ProbeInputs, width: int) -> Tensor:
        """Return an adapter's answer to a probe, [rows, width], with NaN for values that are left out."""

    def answer_of_base(self, name: str, probe: ProbeInputs, width: int) -> Tensor | None:
        """Return the answer of an adapter's base to a probe; None if the target does not show its base."""

    def clean(self, name: str) -> None:
        """Delete the folders of older versions after a delivery."""


class VllmServer:
    """A server that speaks vLLM's protocol for adapters at run time, as a target of :func:`sync`.

    Start vLLM with ``--enable-lora``, ``--max-lora-rank`` of at least the adapter's rank, and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` in its environment.

    Each version of an adapter is written into a separate folder, named after its content. vLLM keys its
    prefix cache by the name and the path of an adapter. So it never answers from the cache of an older
    version. The last two folders of each adapter are kept, because the server may read them again.

    Args:
        url: The server's address, with or without ``/v1``. Requests go to no other address.
        directory: A folder that the server sees under the same path. By default a temporary folder, which
            works if the server runs on this machine.
        api_key: The server's key, if it was started with ``--api-key``.
        base_name: The name under which the server serves the base. By default the server is asked for it.
        timeout: Seconds to wait for an answer.

    Attributes:
        address: The server's address, with ``/v1``.
        folders: The folders that the server has loaded, by the name of the adapter.

    Raises:
        ConfigError: If ``url`` is not an HTTP address.
    """

    def __init__(
        self,
        url: str,
        *,
        directory: str | Path | None = None,
        api_key: str | None = None,
        base_name: str | None = None,
        timeout: float = 120.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{url!r} is no address of a server: give one such as http://127.0.0.1:8000"
            )
        address = url.rstrip("/")
        self.address = address if address.endswith("/v1") else f"{address}/v1"
        self.directory = None if directory is None else Path(directory)
        self.base_name = base_name
        self.connection = Server(self.address, timeout, api_key)
        self.folders: dict[str, list[Path]] = {}

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"


@dataclasses.dataclass(frozen=True)
class _ServerTarget:
    """A :class:`VllmServer` as a target."""

    server: VllmServer

    @property
    def title(self) -> str:
        return self.server.address

    def check_probe(self, probe: ProbeInputs, local: LocalAnswers) -> None:
        if probe.prompts is None or not local.tokens:
            raise ConfigError(
                "a server takes token ids and gives log-probabilities: give texts or token ids as the "
                "probe, and a model with logits"
            )

    def has(self, name: str, staged: Staged) -> bool | None:
        entry = self.server.connection.models().get(name)
        # The name of a folder is a hash of its content.
        assert staged.folder is not None
        return None if entry is None else Path(str(entry.get("root"))).name == staged.folder.name

    def load(self, name: str, staged: Staged, *, replace: bool) -> None:
        assert staged.folder is not None
        self.server.connection.load_adapter(name, staged.folder, replace=replace)
        folders = self.server.folders.setdefault(name, [])
        folders[:] = [*(path for path in folders if path != staged.folder), staged.folder]

    def discard(self, staged: Staged) -> None:
        if staged.folder is not None and staged.is_new:
            shutil.rmtree(staged.folder, ignore_errors=True)

    def answer(self, name: str, probe: ProbeInputs, width: int) -> Tensor:
        assert probe.prompts is not None
        answer = torch.full((len(probe.prompts), width), float("nan"), dtype=torch.float64)
        for row, values in enumerate(self.server.connection.next_tokens(name, probe.prompts)):
            for token, value in values.items():
                if token < width:
                    answer[row, token] = value if abs(value) < float("inf") else float("inf")
        return answer

    def answer_of_base(self, name: str, probe: ProbeInputs, width: int) -> Tensor | None:
        base_name = self.server.base_name
        if base_name is None:
            models = self.server.connection.models()
            parent = models.get(name, {}).get("parent")
            bases = [
                key for key, entry in models.items() if not entry.get("parent") and key != name
            ]
            base_name = str(parent) if parent else bases[0] if len(bases) == 1 else None
        return None if base_name in (None, name) else self.answer(str(base_name), probe, width)

    def clean(self, name: str) -> None:
        folders = self.server.folders.get(name, [])
        for path in folders[:-_FOLDERS]:
            shutil.rmtree(path, ignore_errors=True)
        del folders[:-_FOLDERS]

    def stage(self, model: nn.Module, adapter_name: str, name: str) -> Staged:
        if self.server.directory is None:
            self.server.directory = Path(tempfile.mkdtemp(prefix="lora-fx-"))
        self.server.directory.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=self.server.directory))
        try:
            written = save_adapter(model, staged, adapter_name, format="vllm")
            content = (written / CONFIG_NAME).read_bytes() + hash_tensors(
                read_tensors(written)[0]
            ).encode()
            digest = hashlib.sha256(content).hexdigest()
            folder = (self.server.directory / f"{_as_file_name(name)}-{digest[:16]}").resolve()
            is_new = not folder.exists()
            if is_new:
                # Servers may run as another user.
                written.chmod(0o755)
                written.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return Staged(digest, folder, is_new)


def _as_file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


@dataclasses.dataclass(frozen=True)
class _SessionTarget:
    """An :class:`OnnxSession` as a target."""

    session: OnnxSession

    @property
    def title(self) -> str:
        return str(self.session.path)

    def check_probe(self, probe: ProbeInputs, local: LocalAnswers) -> None:
        pass  # a session runs any inputs

    def stage(self, model: nn.Module, adapter_name: str, name: str) -> Staged:
        digest = hash_tensors(adapter_state_dict(model, adapter_name))
        return Staged(digest, model=model, adapter_name=adapter_name)

    def has(self, name: str, staged: Staged) -> bool | None:
        return False if name in self.session.adapters else None

    def load(self, name: str, staged: Staged, *, replace: bool) -> None:
        assert staged.model is not None
        self.session.load_adapter(name, staged.model, adapter_name=staged.adapter_name)

    def answer(self, name: str, probe: ProbeInputs, width: int) -> Tensor:
        return self._run(name, probe)

    def answer_of_base(self, name: str, probe: ProbeInputs, width: int) -> Tensor | None:
        return self._run(None, probe)

    def _run(self, name: str | None, probe: ProbeInputs) -> Tensor:
        outputs = [run_session(self.session, call, name) for call in probe.calls]
        return probe.read(outputs, logits_alone=True)[0]

    def clean(self, name: str) -> None:
        pass

    def discard(self, staged: Staged) -> None:
        pass


@functools.cache
def _server_at(url: str) -> VllmServer:
    """Return the :class:`VllmServer` of an address, always the same object for an address.

    The object keeps the versions that were delivered earlier.
    """
    return VllmServer(url)


def target_of(target: Any) -> tuple[Target, VllmServer | OnnxSession]:
    """Return a :class:`Target` for an address, server or session, and the object with its history.

    Raises:
        ConfigError: If adapters cannot be delivered to such an object.
    """
    if isinstance(target, str):
        target = _server_at(target)
    if isinstance(target, VllmServer):
        return _ServerTarget(target), target
    if isinstance(target, OnnxSession):
        return _SessionTarget(target), target
    raise ConfigError(
        f"an adapter cannot be delivered to a {type(target).__name__}: give the address of a server "
        "(http://127.0.0.1:8000), a VllmServer, or an OnnxSession"
    )


@contextmanager
def delivery_errors(start: str, *, accepted: bool = False) -> Iterator[None]:
    """Convert errors of a server within the context to :class:`DeliveryError`.

    Args:
        start: The beginning of the messages.
        accepted: True once the server has accepted the adapter. An unknown name (404) then means that the
            adapter is not applied.
    """
    try:
        yield
    except UpdatesOffError as error:
        raise DeliveryError(f"{start} was not delivered: {error}", "updates off") from error
    except ServerError as error:
        if accepted and error.status == 404:
            raise DeliveryError(
                f"{start} is not applied: the server accepted it, and knows no adapter of this name: {error}",
                "not applied",
            ) from error
        reason: Any = "no answer" if error.status is None else "refused"
        raise DeliveryError(f"{start} was not delivered: {error}", reason) from error
