"""Delivery of adapters to running servers and sessions while training goes on, with a check of the result.

Only the adapter travels: vLLM loads a folder in PEFT's format, and a session takes the values of the model.
Then the target answers a *probe*, a few inputs. Its answer is compared with the answers of the adapter as it
is here, of the base, and of earlier versions. This shows whether the target has an old adapter, another one,
or none.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

from torch import Tensor, nn

from lora_fx.adapters import the_adapter
from lora_fx.checkpoint import callback_class, rewritten_models
from lora_fx.delivery.probe import Probe, read_probe
from lora_fx.delivery.receipt import BEFORE, Delivery, answer_here, judge_answer, message_of
from lora_fx.delivery.targets import VllmServer, delivery_errors, target_of
from lora_fx.errors import ConfigError, DeliveryError, some
from lora_fx.export.session import OnnxSession
from lora_fx.passes.parameters import is_partitioned, is_sharded

__all__ = ["sync", "sync_callback"]

_log = logging.getLogger("lora_fx")

_Reaction: TypeAlias = Literal["raise", "warn"]
_TargetLike: TypeAlias = str | VllmServer | OnnxSession

_VERSIONS: Final = 8  # number of versions whose answers are kept, each [rows, vocabulary]


@dataclasses.dataclass(frozen=True)
class _Version:
    """A version of an adapter, with its answer in the model here.

    Attributes:
        label: The name of the version, such as "step 50".
        digest: A hash of the adapter's values.
        probe: The key of the probe.
        values: The answer of this version to the probe.
    """

    label: str
    digest: str
    probe: str
    values: Tensor


# The delivered versions of each target by the name of the adapter, the oldest first.
_HISTORIES: weakref.WeakKeyDictionary[Any, dict[str, list[_Version]]] = weakref.WeakKeyDictionary()


def sync(
    model: nn.Module,
    target: _TargetLike,
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
    session the values of the model. Then the target answers the probe with log-probabilities of the next
    token after each text. They are compared with those of the model here, of the base, of earlier versions,
    and of the target's previous adapter. The model is not changed.

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
        on_inconclusive: "warn" to log a warning if the probe cannot tell this version from another one, and
            return. The receipt is not ``applied`` then.

    Returns:
        A receipt.

    Raises:
        DeliveryError: If the target does not answer, refuses the adapter, or answers otherwise than the
            adapter here. Its message says what the target has. Also if the probe cannot tell this version
            from another one. The model is unchanged, so training may continue.
        ConfigError: If the model, the target or the probe is not valid, or the model is sharded.
        CheckpointError: If the target cannot serve such an adapter.
    """
    receiver, owner = target_of(target)
    adapted = _one_model(model)
    adapter = the_adapter(adapted, adapter_name)
    inputs = read_probe(probe, tokenizer)
    local = answer_here(adapted, adapter, inputs)
    receiver.check_probe(inputs, local)
    known_name = adapter if name is None else name
    history = _HISTORIES.setdefault(owner, {}).setdefault(known_name, [])
    label = f"version {len(history) + 1}" if version is None else version
    start = f"{receiver.title}: adapter {known_name!r} ({label})"
    staged = receiver.stage(adapted, adapter, known_name)
    versions = {
        entry.label: entry.values.double()
        for entry in reversed(history)
        if entry.digest != staged.digest and entry.probe == inputs.key
    }
    width = local.values.shape[1]
    try:
        with delivery_errors(start):
            has = receiver.has(known_name, staged)
            if has is False and not (history and history[-1].digest == staged.digest):
                versions[BEFORE] = receiver.answer(known_name, inputs, width)
            receiver.load(known_name, staged, replace=has is not None)
    except BaseException:
        receiver.discard(staged)
        raise
    # Kept even if the check fails, because a server may apply it later.
    entry = _Version(label, staged.digest, inputs.key, local.values.float())
    history[:] = [*(old for old in history if old.digest != staged.digest), entry][-_VERSIONS:]
    with delivery_errors(start):
        base = receiver.answer_of_base(known_name, inputs, width)
    with delivery_errors(start, accepted=True):
        answer = receiver.answer(known_name, inputs, width)
    identity = (receiver.title, known_name, label, staged.folder)
    receipt = judge_answer(identity, local, answer, base, versions, tolerance)
    if receipt.verdict == "not applied":
        raise DeliveryError(message_of(receipt), "not applied", receipt)
    receiver.clean(known_name)
    if receipt.verdict == "inconclusive":
        if on_inconclusive == "raise":
            raise DeliveryError(message_of(receipt), "inconclusive", receipt)
        _log.warning("%s", message_of(receipt))
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


def sync_callback(
    target: _TargetLike,
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

    The callback is for transformers' ``Trainer`` and the trainers of TRL, such as GRPO and online DPO. It
    delivers after each ``every`` optimizer steps, and at the end of training.

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
            to each other than the rounding of the server. Choose "warn" then.

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
    target_of(target)
    options = {
        "probe": probe,
        "adapter_name": adapter_name,
        "tokenizer": tokenizer,
        "name": name,
        "tolerance": tolerance,
        "on_inconclusive": on_inconclusive,
    }
    callback = callback_class(_Delivers, "transformers", "TrainerCallback")
    return callback(target, every, on_failure, options)


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        """Raise before training for a model or a probe that cannot be used."""
        model = _one_model(arguments["model"])
        the_adapter(model, self.options["adapter_name"])
        read_probe(self.options["probe"], self._tokenizer(arguments))

    def on_step_end(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        if state.global_step % self.every == 0:
            self._deliver(state, arguments)

    def on_train_end(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        if state.global_step != self.last_step:
            self._deliver(state, arguments)

    def _tokenizer(self, arguments: Mapping[str, Any]) -> Any:
        tokenizer = self.options["tokenizer"]
        return arguments.get("processing_class") if tokenizer is None else tokenizer

    def _deliver(self, state: Any, arguments: Mapping[str, Any]) -> None:
        # Raise on every rank, so that no rank waits for another.
        model = _one_model(arguments["model"])
        if not state.is_world_process_zero:
            return
        self.last_step = state.global_step
        options = {**self.options, "tokenizer": self._tokenizer(arguments)}
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
