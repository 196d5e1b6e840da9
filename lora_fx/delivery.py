"""Delivery of adapters to running servers and sessions while training goes on, with a check of the result.

Only the adapter travels: vLLM loads a folder in PEFT's format, and a session takes the values of the model.
Then the target answers a *probe*, a few inputs. Its answer is compared with the answers of the adapter as it
is here, of the base, and of earlier versions. So a target with an old adapter, another one, or none is found.

Let ``d`` be the root mean square of a difference of log-probabilities (of elements, as a share of their size,
if a model has no logits). An answer fits a version if ``d`` is at most the tolerance. By the triangle
inequality it cannot fit two versions that are more than twice the tolerance apart. If two versions are
nearer, the probe does not distinguish them, and the delivery is inconclusive.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from lora_fx.adapters import active_adapters, disable_adapter, reference, set_adapter, the_adapter
from lora_fx.checkpoint import (
    adapter_state_dict,
    call_with,
    callback_class,
    log_probabilities,
    main_output,
    read_tensors,
    rewritten_models,
    save_adapter,
)
from lora_fx.config import CONFIG_NAME
from lora_fx.errors import ConfigError, DeliveryError, some
from lora_fx.passes.parameters import is_partitioned, is_sharded
from lora_fx.servers import Server, ServerError, UpdatesOffError

if TYPE_CHECKING:
    from lora_fx.export.session import OnnxSession

__all__ = ["Delivery", "VllmServer", "run_session", "sync", "sync_callback"]

_log = logging.getLogger("lora_fx")

Probe: TypeAlias = str | Sequence[str] | Sequence[int] | Tensor | Mapping[str, Tensor]
"""Inputs to compare answers for: texts, token ids, or tensors by argument."""

_Verdict: TypeAlias = Literal["applied", "not applied", "inconclusive"]
_Reaction: TypeAlias = Literal["raise", "warn"]
_Target: TypeAlias = "str | VllmServer | OnnxSession"

# The least tolerance by the dtype of the model's outputs. Other kernels change log-probabilities by a few
# units in the last place of logits of size 1 to 10.
_LEAST: Final = {
    torch.float64: 3e-4,
    torch.float32: 3e-4,
    torch.float16: 3e-3,
    torch.bfloat16: 1e-2,
}
# The tolerance as a multiple of the distance between the target's base and the base here, and of the least
# tolerance if that distance is unknown.
_MARGIN: Final = 3.0
_VERSIONS: Final = 8  # the answers of so many versions are kept, each [rows, vocabulary]
_FOLDERS: Final = (
    2  # the present version's folder, and the one that requests in flight may still read
)


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A receipt: which adapter a target was given, and which one answers.

    Attributes:
        target: The address of the server, or the file of the session.
        name: The target's name of the adapter.
        version: The name of the version, such as "step 50".
        verdict: "applied" if the target answers with this version, and with none of those that it was
            compared with. "not applied" if it answers otherwise. "inconclusive" if it answers as this version
            does, but another one answers the probe alike.
        answers_as: The versions whose answers the target's answer fits: ``version``, "the base alone", the
            names of earlier versions, or "what it had before" for an adapter that was not delivered from
            here. Empty if it fits none.
        distance: The distance between the target's answer and that of this version.
        effect: The distance between the answers of the base and of this version.
        noise: The distance between the base there and the base here; None if the target does not show it.
        tolerance: The largest distance of answers that fit.
        folder: The delivered folder, if there is one.
    """

    target: str
    name: str
    version: str
    verdict: _Verdict
    answers_as: tuple[str, ...]
    distance: float
    effect: float
    noise: float | None
    tolerance: float
    folder: Path | None = None

    @property
    def applied(self) -> bool:
        """True if the target answers with this version and no other."""
        return self.verdict == "applied"

    def __str__(self) -> str:
        noise = "unknown" if self.noise is None else f"{self.noise:.2g}"
        return (
            f"{self.target}: adapter {self.name!r} ({self.version}): {self.verdict}; distance "
            f"{self.distance:.2g}, tolerance {self.tolerance:.2g}, effect of the adapter {self.effect:.2g}, "
            f"distance of the bases {noise}"
        )


# --- probes ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Inputs for a model and a target.

    Attributes:
        calls: Inputs of each call by argument. Texts of different lengths are separate calls.
        prompts: Token ids for a server; None if the inputs are no token ids alone.
    """

    calls: tuple[Mapping[str, Tensor], ...]
    prompts: tuple[tuple[int, ...], ...] | None

    @property
    def key(self) -> str:
        """A hash of the inputs."""
        digest = hashlib.sha256()
        for call in self.calls:
            for name, value in call.items():
                digest.update(f"{name} {value.dtype} {list(value.shape)} {value.tolist()}".encode())
        return digest.hexdigest()

    def read(
        self, outputs: Sequence[Any], *, logits_alone: bool = False
    ) -> tuple[Tensor, torch.dtype, bool]:
        """Return the compared values of a model's outputs, one output for each call.

        Returns:
            Log-probabilities of the next token, [rows, vocabulary], or elements, [calls, elements]; the dtype
            of the outputs; True for log-probabilities.
        """
        rows, dtype, logits = [], torch.float32, False
        for call, output in zip(self.calls, outputs, strict=True):
            value = main_output(output).detach().cpu()
            dtype = value.dtype
            # A session returns the logits after the last token alone, [rows, vocabulary].
            logits = self.prompts is not None and (value.dim() == 3 or logits_alone)
            values = log_probabilities(value, call) if logits else value.double().flatten()[None]
            # NaN stands for values that are unknown, so a NaN of the model is replaced.
            rows.append(values.nan_to_num(float("inf"), float("inf"), float("-inf")))
        return torch.cat(rows), dtype, logits


def _read_probe(probe: Any, tokenizer: Any) -> _Probe:
    if isinstance(probe, Mapping):
        if not probe or not all(isinstance(value, Tensor) for value in probe.values()):
            raise ConfigError("probe= is a mapping: give tensors by argument")
        call = {str(name): value.detach().cpu() for name, value in probe.items()}
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        if ids is None or call.keys() - {"input_ids", "attention_mask"} or ids.dim() != 2:
            return _Probe((call,), None)
        masks = torch.ones_like(ids) if mask is None else mask
        return _of_rows([row[kept.bool()] for row, kept in zip(ids, masks, strict=True)])
    if isinstance(probe, Tensor):
        if probe.is_floating_point() or probe.dim() not in (1, 2):
            return _Probe(({"": probe.detach().cpu()},), None)
        return _of_rows(list(probe.detach().cpu().reshape(-1, probe.shape[-1])))
    values = [probe] if isinstance(probe, str) else list(probe)
    if values and all(isinstance(value, str) for value in values):
        if tokenizer is None:
            raise ConfigError(
                f"probe={some([repr(value) for value in values], 1)}: texts need tokenizer="
            )
        return _of_rows([torch.tensor(tokenizer(value)["input_ids"]) for value in values])
    if values and all(isinstance(value, int) for value in values):
        return _of_rows([torch.tensor(values)])
    raise ConfigError(
        "probe= is a text, several texts, token ids, a tensor, or tensors by argument"
    )


def _of_rows(rows: Sequence[Tensor]) -> _Probe:
    if not rows or any(not len(row) for row in rows):
        raise ConfigError("probe= has a text without tokens: there is nothing to compare")
    prompts = tuple(tuple(row.tolist()) for row in rows)
    return _Probe(tuple({"": row[None]} for row in rows), prompts)


def run_session(session: OnnxSession, inputs: Mapping[str, Tensor], adapter: str | None) -> Any:
    """Run a session on inputs of the model that it was made from.

    Args:
        session: A session. If its file generates text, it runs the token ids alone.
        inputs: Inputs by argument, or a single tensor as ``""``.
        adapter: The session's name of an adapter, or None for the base.

    Returns:
        Outputs by name, or the logits after the last token of each row.
    """
    from lora_fx.export.decoder import last_logits
    from lora_fx.export.decoder_cache import TASK_KEY

    names = [port.name for port in session.inputs]
    if TASK_KEY in session.metadata:
        ids = inputs.get("input_ids", inputs.get(""))
        if ids is None:
            raise ConfigError(
                f"{session.path.name} takes input_ids, and there are {some(list(inputs))}"
            )
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return last_logits(session, ids, mask, adapter)
    if "" not in inputs:
        return session.run({k: v for k, v in inputs.items() if k in names}, adapter=adapter)
    first = inputs[""]
    if names[1:] == ["attention_mask"]:
        return session.run([first, torch.ones_like(first)], adapter=adapter)
    return session.run(first, adapter=adapter)


# --- answers --------------------------------------------------------------------------------------


_BASE: Final = "the base alone"
_BEFORE: Final = "what it had before"
_BROKEN: Final = "values that are not finite"


def _distance(left: Tensor, right: Tensor) -> float:
    """Return the root mean square of the difference of the values that are known in both."""
    if left.shape != right.shape:
        return float("inf")
    known = ~(left.isnan() | right.isnan())
    if not known.any():
        return float("inf")
    left, right = left[known], right[known]
    difference = torch.where(left == right, 0.0, left - right)
    value = float(difference.square().mean().sqrt())
    return value if value == value else float("inf")


@dataclasses.dataclass(frozen=True)
class _Version:
    """A version of an adapter, as it answers here.

    Attributes:
        label: Its name, such as "step 50".
        digest: A hash of its values.
        probe: The key of the probe.
        values: Its answer to the probe.
    """

    label: str
    digest: str
    probe: str
    values: Tensor


# The delivered versions of each target by the name of the adapter, the oldest first.
_HISTORIES: weakref.WeakKeyDictionary[Any, dict[str, list[_Version]]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class _Local:
    """The model here: the answers of the adapter and of the base, and the dtype of its outputs."""

    values: Tensor
    base: Tensor
    dtype: torch.dtype
    tokens: bool

    @property
    def unit(self) -> float:
        """The size that distances are relative to: 1 for log-probabilities."""
        return 1.0 if self.tokens else float(self.base.square().mean().sqrt()) or 1.0


@torch.no_grad()
def _answer_here(model: nn.Module, adapter_name: str, probe: _Probe) -> _Local:
    """Run a copy, so that neither modes nor active adapters of the model change."""
    twin = reference(model)
    if active_adapters(twin) != (adapter_name,):
        set_adapter(twin, adapter_name)
    device = next((parameter.device for parameter in twin.parameters()), torch.device("cpu"))
    calls = [{name: value.to(device) for name, value in call.items()} for call in probe.calls]
    values, dtype, tokens = probe.read([call_with(twin, call) for call in calls])
    with disable_adapter(twin):
        base, _, _ = probe.read([call_with(twin, call) for call in calls])
    state = adapter_state_dict(model, adapter_name)
    # A kernel may hide such a value from the answer.
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken or values.isposinf().any():
        raise DeliveryError(
            f"adapter {adapter_name!r} was not delivered: {some(broken, 3) or 'its answer to the probe'} is "
            "not finite: its training has diverged, or the probe is none of its inputs",
            "not finite",
        )
    return _Local(values, base, dtype, tokens)


def _judge(
    what: tuple[str, str, str, Path | None],
    here: _Local,
    answer: Tensor,
    base: Tensor | None,
    others: Mapping[str, Tensor],
    tolerance: float | None,
) -> Delivery:
    """Return a receipt with its verdict.

    Args:
        what: The target, the name of the adapter there, the name of the version, and its folder.
        here: The answers of the model.
        answer: The answer of the target with the adapter; NaN for values that it leaves out.
        base: That of the target's base, if it shows it.
        others: The answers of other versions by their names.
        tolerance: The largest distance that fits; None to derive it.
    """
    unit = here.unit
    noise = None if base is None else _distance(base, here.base) / unit
    # Versions are compared on the values that the target shows.
    shown = torch.where(answer.isnan(), answer, here.values)
    effect = _distance(shown, here.base) / unit
    if tolerance is None:
        least = _LEAST.get(here.dtype, 3e-4)
        tolerance = _MARGIN * least if noise is None else max(least, _MARGIN * noise)
        tolerance *= max(1.0, effect) if here.tokens else 1.0
    rivals = {_BASE: here.base if base is None else base, **others}
    distance = _distance(answer, here.values) / unit
    fits = _within(tolerance * unit, answer, rivals)
    alike = _within(2 * tolerance * unit, shown, rivals)
    target, name, version, folder = what
    verdict: _Verdict = "not applied"
    if answer.isinf().any() and distance == float("inf"):
        fits = [_BROKEN]
    elif distance <= tolerance and alike:
        verdict, fits = "inconclusive", [version, *alike]
    elif distance <= tolerance:
        verdict, fits = "applied", [version]
    return Delivery(
        target, name, version, verdict, tuple(fits), distance, effect, noise, tolerance, folder
    )


def _within(most: float, answer: Tensor, rivals: Mapping[str, Tensor]) -> list[str]:
    """Return the versions at most so far from an answer; the adapter from before only if it has no name."""
    labels = [label for label, values in rivals.items() if _distance(answer, values) <= most]
    return [label for label in labels if label != _BEFORE or len(labels) == 1]


def _message(receipt: Delivery) -> str:
    """Return what a target has, and what to do."""
    start = f"{receipt.target}: adapter {receipt.name!r} ({receipt.version})"
    figures = str(receipt).partition("; ")[2]
    if receipt.verdict == "inconclusive":
        return (
            f"{start} cannot be told from {some(receipt.answers_as[1:])} by this probe ({figures}): give a "
            "probe like the inputs that it is trained on, or more of them, or deliver it less often"
        )
    has = " or ".join(receipt.answers_as) or (
        "neither the base alone nor a version that was delivered from here: another adapter, another scale, "
        "or another base. If the server computes in lower precision, give tolerance="
    )
    return (
        f"{start} is not applied. The answer is that of {has} ({figures}). The model here is unchanged: "
        "deliver it again, or restart the target"
    )


# --- targets --------------------------------------------------------------------------------------


class VllmServer:
    """A server that speaks vLLM's protocol for adapters at run time, as a target of :func:`sync`.

    Start vLLM with ``--enable-lora``, ``--max-lora-rank`` of at least the adapter's rank, and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` in its environment.

    Each version is written into a folder of its own, named after its content. vLLM keys its prefix cache by
    the name and the path of an adapter, so it answers no request from the cache of an older version. The last
    two folders of each name stay. The server may read them again at any time.

    Args:
        url: Its address, with or without ``/v1``. Nothing else is asked.
        directory: A folder that the server sees under the same path. By default a temporary one, for a server
            on this machine.
        api_key: Its key, if it needs one (``--api-key``).
        base_name: Its name of the base. By default the one that it reports.
        timeout: Seconds to wait for an answer.

    Raises:
        ConfigError: If the address is none of HTTP.
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
        self._server = Server(self.address, timeout, api_key)
        self._folders: dict[str, list[Path]] = {}

    def __repr__(self) -> str:
        return f"VllmServer({self.address!r})"

    @property
    def _title(self) -> str:
        return self.address

    def _check_probe(self, probe: _Probe, here: _Local) -> None:
        if probe.prompts is None or not here.tokens:
            raise ConfigError(
                "a server takes token ids and gives log-probabilities: give texts or token ids as the "
                "probe, and a model with logits"
            )

    def _has(self, name: str, staged: _Staged) -> bool | None:
        """Return True if the server has this content by this name, False for another, None for no adapter."""
        entry = self._server.models().get(name)
        # The name of a folder is a hash of its content.
        assert staged.folder is not None
        return None if entry is None else Path(str(entry.get("root"))).name == staged.folder.name

    def _load(self, name: str, staged: _Staged, *, replace: bool) -> None:
        assert staged.folder is not None
        self._server.load_adapter(name, staged.folder, replace=replace)
        folders = self._folders.setdefault(name, [])
        folders[:] = [*(path for path in folders if path != staged.folder), staged.folder]

    def _discard(self, name: str, staged: _Staged) -> None:
        """Remove a folder that the server did not load."""
        if staged.folder is not None and staged.folder not in self._folders.get(name, ()):
            shutil.rmtree(staged.folder, ignore_errors=True)

    def _answer(self, name: str, probe: _Probe, width: int) -> Tensor:
        """Return the answers of a model, [rows, vocabulary], with NaN for tokens that are left out."""
        assert probe.prompts is not None
        answer = torch.full((len(probe.prompts), width), float("nan"), dtype=torch.float64)
        for row, values in enumerate(self._server.next_tokens(name, probe.prompts)):
            for token, value in values.items():
                if token < width:
                    answer[row, token] = value if abs(value) < float("inf") else float("inf")
        return answer

    def _answer_of_base(self, name: str, probe: _Probe, width: int) -> Tensor | None:
        base_name = self.base_name
        if base_name is None:
            models = self._server.models()
            parent = models.get(name, {}).get("parent")
            bases = [
                key for key, entry in models.items() if not entry.get("parent") and key != name
            ]
            base_name = str(parent) if parent else bases[0] if len(bases) == 1 else None
        return None if base_name in (None, name) else self._answer(str(base_name), probe, width)

    def _clean(self, name: str) -> None:
        """Remove the folders of older versions."""
        folders = self._folders.get(name, [])
        for path in folders[:-_FOLDERS]:
            shutil.rmtree(path, ignore_errors=True)
        del folders[:-_FOLDERS]

    def _stage(self, model: nn.Module, adapter_name: str, name: str) -> _Staged:
        """Write the adapter into a folder that is named after its content."""
        if self.directory is None:
            self.directory = Path(tempfile.mkdtemp(prefix="lora-fx-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=self.directory))
        try:
            written = save_adapter(model, staged, adapter_name, format="vllm")
            digest = _hash_folder(written)
            folder = (self.directory / f"{_as_file_name(name)}-{digest[:16]}").resolve()
            if not folder.exists():
                # Servers may run as another user.
                written.chmod(0o755)
                written.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return _Staged(digest, folder)


def _hash_folder(folder: Path) -> str:
    """Return a hash of the tensors and the configuration of an adapter folder."""
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    tensors, _ = read_tensors(folder)
    _update(digest, tensors)
    return digest.hexdigest()


def _update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())


def _as_file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


class _Session:
    """A session as a target."""

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    @property
    def _title(self) -> str:
        return str(self._session.path)

    def _check_probe(self, probe: _Probe, here: _Local) -> None:
        pass  # a session runs any inputs

    def _stage(self, model: nn.Module, adapter_name: str, name: str) -> _Staged:
        digest = hashlib.sha256()
        _update(digest, adapter_state_dict(model, adapter_name))
        return _Staged(digest.hexdigest(), None, model, adapter_name)

    def _has(self, name: str, staged: _Staged) -> bool | None:
        return False if name in self._session.adapters else None

    def _load(self, name: str, staged: _Staged, *, replace: bool) -> None:
        assert staged.model is not None
        self._session.load_adapter(name, staged.model, adapter_name=staged.adapter_name)

    def _answer(self, name: str | None, probe: _Probe, width: int) -> Tensor:
        outputs = [run_session(self._session, call, name) for call in probe.calls]
        return probe.read(outputs, logits_alone=True)[0]

    def _answer_of_base(self, name: str, probe: _Probe, width: int) -> Tensor | None:
        return self._answer(None, probe, width)

    def _clean(self, name: str) -> None:
        pass

    def _discard(self, name: str, staged: _Staged) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Staged:
    """An adapter that is ready for a target: a hash of its content, and its folder or its model."""

    digest: str
    folder: Path | None
    model: nn.Module | None = None
    adapter_name: str = ""


@functools.cache
def _server_at(url: str) -> VllmServer:
    """Return the target of an address, the same object each time, so that it knows earlier versions."""
    return VllmServer(url)


def _target_of(target: Any) -> tuple[VllmServer | _Session, Any]:
    """Return the target, and the object that its history belongs to."""
    if isinstance(target, str):
        target = _server_at(target)
    if isinstance(target, VllmServer):
        return target, target
    from lora_fx.export.session import OnnxSession

    if isinstance(target, OnnxSession):
        return _Session(target), target
    raise ConfigError(
        f"an adapter cannot be delivered to a {type(target).__name__}: give the address of a server "
        "(http://127.0.0.1:8000), a VllmServer, or an OnnxSession"
    )


@contextmanager
def _delivery_errors(start: str) -> Iterator[None]:
    try:
        yield
    except UpdatesOffError as error:
        raise DeliveryError(f"{start} was not delivered: {error}", "updates off") from error
    except ServerError as error:
        reason: Any = "no answer" if error.status is None else "refused"
        raise DeliveryError(f"{start} was not delivered: {error}", reason) from error


# --- sync -----------------------------------------------------------------------------------------


def sync(
    model: nn.Module,
    target: _Target,
    *,
    probe: Probe,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    version: str | None = None,
    tolerance: float | None = None,
    on_inconclusive: _Reaction = "raise",
) -> Delivery:
    """Deliver an adapter to a running server or session, and check that it answers with this version.

    Only the adapter is sent. A server gets a folder as :func:`lora_fx.save_adapter` writes it for vLLM, a
    session the values of the model. Then the target answers the probe. Its log-probabilities of the next
    token after each text are compared with those of the model here, of the base, of the versions that were
    delivered before, and of the adapter that the target had. The model is not changed.

    Args:
        model: A rewritten model, or a module that has one as a child, as trainers wrap it.
        target: The address of a vLLM server, a :class:`VllmServer`, or an :class:`OnnxSession` of a file that
            takes adapters, also one with a bank.
        probe: A text or several, token ids, or a tensor of them [rows, length]. For a session also other
            inputs of the model: a tensor, or tensors by argument. Inputs like those that the adapter is
            trained on tell versions apart best.
        adapter_name: The adapter; by default the only one, or the only active one.
        tokenizer: A tokenizer of transformers, for texts.
        name: The target's name for the adapter, by default ``adapter_name``.
        version: The name of this version in receipts and errors, such as "step 50".
        tolerance: The largest root mean square of the difference of log-probabilities for answers that are
            the same (for other outputs, as a share of their size). By default three times the distance
            between the target's base and the base here, and at least 3e-4 for fp32, 3e-3 for fp16 and 1e-2
            for bf16. If the target shows no base, it is three times these. It grows with an effect of the
            adapter above 1.
        on_inconclusive: "warn" to log a warning if the probe does not tell this version from another one,
            and return. The receipt is not ``applied`` then.

    Returns:
        A receipt.

    Raises:
        DeliveryError: If the target does not answer, refuses the adapter, or answers otherwise than the
            adapter here. Its message says what the target has. Also if the probe does not tell. The model is
            unchanged, so training may continue.
        ConfigError: If the model, the target or the probe is none, or the model is sharded.
        CheckpointError: If the target cannot serve such an adapter.
    """
    receiver, owner = _target_of(target)
    adapted = _one_model(model)
    adapter = the_adapter(adapted, adapter_name)
    inputs = _read_probe(probe, tokenizer)
    here = _answer_here(adapted, adapter, inputs)
    receiver._check_probe(inputs, here)
    known_name = adapter if name is None else name
    history = _HISTORIES.setdefault(owner, {}).setdefault(known_name, [])
    label = f"version {len(history) + 1}" if version is None else version
    start = f"{receiver._title}: adapter {known_name!r} ({label})"
    staged = receiver._stage(adapted, adapter, known_name)
    others = {
        entry.label: entry.values.double()
        for entry in reversed(history)
        if entry.digest != staged.digest and entry.probe == inputs.key
    }
    width = here.values.shape[1]
    try:
        with _delivery_errors(start):
            has = receiver._has(known_name, staged)
            if has is False and not (history and history[-1].digest == staged.digest):
                others[_BEFORE] = receiver._answer(known_name, inputs, width)
            receiver._load(known_name, staged, replace=has is not None)
    except BaseException:
        receiver._discard(known_name, staged)
        raise
    # Kept even if the check fails, because a server may apply it later.
    entry = _Version(label, staged.digest, inputs.key, here.values.float())
    history[:] = [*(old for old in history if old.digest != staged.digest), entry][-_VERSIONS:]
    with _delivery_errors(start):
        base = receiver._answer_of_base(known_name, inputs, width)
        answer = receiver._answer(known_name, inputs, width)
    what = (receiver._title, known_name, label, staged.folder)
    receipt = _judge(what, here, answer, base, others, tolerance)
    if receipt.verdict == "not applied":
        raise DeliveryError(_message(receipt), "not applied", receipt)
    receiver._clean(known_name)
    if receipt.verdict == "inconclusive":
        if on_inconclusive == "raise":
            raise DeliveryError(_message(receipt), "inconclusive", receipt)
        _log.warning("%s", _message(receipt))
    return receipt


def _one_model(module: nn.Module) -> nn.Module:
    models = rewritten_models(module)
    if len(models) > 1:
        raise ConfigError(
            f"this {type(module).__name__} has several rewritten models ({some(list(models))}): give one"
        )
    ((model, _),) = models.values()
    if any(is_sharded(parameter) or is_partitioned(parameter) for parameter in model.parameters()):
        raise ConfigError(
            "the model is sharded over several processes, which sync does not gather: call "
            "lora_fx.save_adapter on every rank, and deliver lora_fx.load_adapter(base, folder) from one"
        )
    return model


# --- the callback ---------------------------------------------------------------------------------


def sync_callback(
    target: _Target,
    *,
    every: int = 50,
    probe: Probe,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    tolerance: float | None = None,
    on_failure: _Reaction = "raise",
    on_inconclusive: _Reaction = "raise",
) -> Any:
    """Return a callback that delivers an adapter with :func:`sync` while a trainer runs.

    It is for transformers' ``Trainer`` and the trainers of TRL, such as GRPO and online DPO. It delivers
    after each ``every`` optimizer steps, and at the end of training.

    Args:
        target: As for :func:`sync`.
        every: The number of optimizer steps between two deliveries.
        probe: As for :func:`sync`.
        adapter_name: As for :func:`sync`.
        tokenizer: As for :func:`sync`; by default that of the trainer.
        name: As for :func:`sync`.
        tolerance: As for :func:`sync`.
        on_failure: "warn" to log a :class:`DeliveryError` and go on with training. The next delivery tries
            again.
        on_inconclusive: As for :func:`sync`. With few steps and a small learning rate, versions may be nearer
            to each other than the rounding of the server. Then "warn" is the choice.

    Returns:
        A ``transformers.TrainerCallback``: ``Trainer(..., callbacks=[callback])``. Its attribute
        ``deliveries`` has the receipts, and ``failures`` the errors that were logged.

    Raises:
        ConfigError: If an argument is not valid, or transformers is not installed.
    """
    if type(every) is not int or every < 1:
        raise ConfigError(f"every={every!r}: give a number of optimizer steps, 1 or more")
    for argument, value in (("on_failure", on_failure), ("on_inconclusive", on_inconclusive)):
        if value not in ("raise", "warn"):
            raise ConfigError(f"{argument}={value!r}: it is 'raise' or 'warn'")
    _target_of(target)
    options = {
        "probe": probe,
        "adapter_name": adapter_name,
        "tokenizer": tokenizer,
        "name": name,
        "tolerance": tolerance,
        "on_inconclusive": on_inconclusive,
    }
    made = callback_class(_Delivers, "transformers", "TrainerCallback")
    return made(target, every, on_failure, options)


class _Delivers:
    def __init__(
        self, target: Any, every: int, on_failure: _Reaction, options: Mapping[str, Any]
    ) -> None:
        self.target, self.every, self.on_failure = target, every, on_failure
        self.options = dict(options)
        self.deliveries: list[Delivery] = []
        self.failures: list[DeliveryError] = []
        self.last_step = 0

    def __reduce__(self) -> tuple[Any, ...]:
        factory = functools.partial(
            sync_callback, every=self.every, on_failure=self.on_failure, **self.options
        )
        return factory, (self.target,), vars(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        if state.global_step % self.every == 0:
            self._deliver(state, arguments)

    def on_train_end(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        if state.global_step != self.last_step:
            self._deliver(state, arguments)

    def _deliver(self, state: Any, arguments: Mapping[str, Any]) -> None:
        model = _one_model(arguments["model"])  # refused on every rank, so that none waits
        if not state.is_world_process_zero:
            return
        self.last_step = state.global_step
        options = dict(self.options)
        if options["tokenizer"] is None:
            options["tokenizer"] = arguments.get("processing_class")
        try:
            receipt = sync(model, self.target, version=f"step {state.global_step}", **options)
        except DeliveryError as error:
            if self.on_failure == "raise":
                raise
            # Only the text, since a traceback would keep the model alive.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self.failures.append(error)
            _log.warning("training goes on without a delivery: %s", error)
            return
        self.deliveries.append(receipt)
