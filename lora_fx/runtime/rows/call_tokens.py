"""Tokens of a running call, for adapters that act only from a certain phrase in the prompt on.

A call is open from the entry of a model, or of a module that it calls directly, to its end. It runs in one
thread. Its tokens are in a thread-local object, which a compiler can read, too. During a backward the tokens
of the call are set again, because a checkpoint recomputes a part of the call there.

Generation with a cache sees a prompt once, and then single tokens. So a cache carries the tokens that it has
seen, and whether a phrase was among them. Its copies carry them, too.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.rows.sample_calls import entered, tensors_in
from lora_fx.runtime.rows.samples import in_backward

__all__ = [
    "IDS_OF_TOKENS",
    "OFFSETS",
    "active_positions",
    "gated",
    "unwatch_tokens",
    "watch_tokens",
]

OFFSETS = "alora_offsets"
"""Name of the call argument with the number of active positions of each sample, counted from its end."""

IDS_OF_TOKENS = "input_ids"
_LENGTH = "get_seq_length"
"""A method that caches of transformers have: the number of positions that they hold."""
_SEEN = "_lora_fx_tokens"


class _Seen(NamedTuple):
    """Tokens that a cache has seen.

    Attributes:
        active: For each phrase, True for the samples in which it has occurred, [samples].
        ids: The tokens, [samples, positions].
    """

    active: Mapping[tuple[int, ...], Tensor]
    ids: Tensor


class _Call:
    """The tokens of a running call, for adapters that act after a certain phrase.

    Attributes:
        ids: The tokens of the call, [samples, positions]; None if it has none.
        offsets: The number of active positions of each sample, counted from its end; None if the caller did
            not set it.
        seen: The tokens that the cache had before the call; None without such tokens.
        masks: For each phrase, True for the active positions, [samples, positions].
    """

    def __init__(
        self, ids: Tensor | None, offsets: Sequence[int | None] | None, seen: _Seen | None
    ) -> None:
        self.ids, self.offsets, self.seen = ids, offsets, seen
        self.masks: dict[tuple[int, ...], Tensor] = {}


class _State:
    """State of a thread: the running call, the module that has opened it, and the depth of nested calls."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.opened_by: int | None = None
        self.depth = 0


class _Threads(threading.local):
    """Holder of the state of a thread. Dynamo drops writes to a thread-local object itself."""

    def __init__(self) -> None:
        self.running = _State()


_threads = _Threads()


def active_positions(x: Tensor, phrase: Sequence[int], weight: str) -> Tensor:
    """Return a mask of the positions from the last occurrence of a phrase on, [samples, positions].

    Args:
        x: The input of the operation, [samples, positions, in] or [samples * positions, in].
        phrase: The tokens of the phrase.
        weight: Name of the adapted weight in its module.

    Raises:
        ConfigError: If no call with tokens is running.
    """
    call = _threads.running.call
    if call is None or (call.ids is None and call.offsets is None):
        reason = "no call of the model is running" if call is None else "the call has no tokens"
        raise ConfigError(
            f"{weight}: the adapter acts from a phrase in the prompt on, and {reason}: call the model with "
            f"{IDS_OF_TOKENS}, or with {OFFSETS}=[...] (active positions of each sample from its end)"
        )
    if call.offsets is not None:
        samples = len(call.offsets)
        positions = x.shape[1] if x.dim() > 2 else x.shape[0] // max(samples, 1)
        active = [0 if offset is None else min(int(offset), positions) for offset in call.offsets]
        first = positions - torch.tensor(active, device=x.device)
        return torch.arange(positions, device=x.device) >= first.unsqueeze(1)
    phrase = tuple(phrase)
    if phrase not in call.masks:
        assert call.ids is not None
        call.masks[phrase] = _mask_after(call.ids, phrase, call.seen)
    return call.masks[phrase].to(x.device)


def gated(up: Tensor, positions: Tensor, weight: str) -> Tensor:
    """Return the output of a branch, with zeros at the positions where the branch does not act.

    Args:
        up: [samples, positions, out], or [samples * positions, out].
        positions: True where the branch acts, [samples, positions].
        weight: Name of the adapted weight in its module.

    Raises:
        ConfigError: If the positions of ``up`` are not those of the tokens.
    """
    if up.shape[:-1] == positions.shape:
        return torch.where(positions.unsqueeze(-1), up, 0)
    if up.dim() == 2 and up.shape[0] == positions.numel():
        return torch.where(positions.reshape(-1, 1), up, 0)
    raise ConfigError(
        f"{weight}: its output {list(up.shape)} does not have the positions of the call's tokens "
        f"{list(positions.shape)}, so that nothing says where the phrase of the adapter is: leave the layer "
        "out with exclude_modules, or rewrite without memory='least'"
    )


def _mask_after(ids: Tensor, phrase: tuple[int, ...], seen: _Seen | None) -> Tensor:
    """Return True for each position from the last occurrence of a phrase on, [samples, positions].

    A single token after a cached prompt is a generated token. It is active if the prompt contains the phrase.
    Several tokens are a further part of the prompt, which may complete or repeat the phrase. That does not
    change which cached positions are active.

    Args:
        ids: Tokens of the call, [samples, positions].
        phrase: Tokens of the phrase.
        seen: The tokens in the cache; None without a cache.
    """
    samples, positions = ids.shape
    active = torch.zeros(samples, dtype=torch.bool, device=ids.device)
    text, before = ids, 0
    if seen is not None:
        known = seen.active.get(phrase)
        active = (_occurrence(seen.ids, phrase)[0] if known is None else known).to(ids.device)
        if positions == 1:
            return active.unsqueeze(1)
        tail = seen.ids[:, max(0, seen.ids.shape[1] - len(phrase) + 1) :].to(ids.device)
        text, before = torch.cat([tail, ids], 1), tail.shape[1]
    occurs, start = _occurrence(text, phrase)
    first = torch.where(occurs, start - before, torch.where(active, 0, positions))
    return torch.arange(positions, device=ids.device) >= first.unsqueeze(1)


def _occurrence(ids: Tensor, phrase: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return whether each sample has a phrase, and the start of its last occurrence, both [samples]."""
    size = len(phrase)
    if ids.shape[1] < size:
        none = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
        return none.bool(), none
    windows = ids.unfold(1, size, 1)
    matches = (windows == torch.tensor(phrase, device=ids.device)).all(-1)
    count = matches.shape[1]
    starts = torch.arange(count, device=ids.device).expand_as(matches)
    return matches.any(1), torch.where(matches, starts, -1).amax(1)


# --- calls ----------------------------------------------------------------------------------------


def watch_tokens(model: nn.Module) -> None:
    """Add the hooks that open and close a call, to a model and the modules that it calls directly."""
    unwatch_tokens(model)
    for _, module in entered(model):
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(_Opening(), prepend=True, with_kwargs=True)
            module.register_forward_hook(_Closing(), with_kwargs=True, always_call=True)


def unwatch_tokens(model: nn.Module) -> None:
    """Remove the hooks of :func:`watch_tokens`."""
    for module in model.modules():
        torch_private.remove_forward_hooks(module, _Opening, _Closing)


class _Opening:
    """Forward pre-hook that opens a call, if none is open, and removes ``alora_offsets`` from the call."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open a call."""
        state = _threads.running
        if state.opened_by == id(module):
            state.depth += 1
            return None
        if state.opened_by is not None or in_backward():
            return None
        offsets = kwargs.get(OFFSETS)
        ids = _ids(args, kwargs)
        seen = _seen(_cache_in((*args, *kwargs.values())), ids)
        state.call, state.opened_by, state.depth = _Call(ids, offsets, seen), id(module), 1
        if OFFSETS not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != OFFSETS}


class _Closing:
    """Forward hook that closes a call, also after an error."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any
    ) -> None:
        """Close the call, record the tokens in the cache of the call, and add hooks for the backward."""
        state = _threads.running
        if state.opened_by != id(module):
            return
        state.depth -= 1
        if state.depth:
            return
        call, state.call, state.opened_by = state.call, None, None
        if call is None or results is None:  # the call has failed
            return
        # A call without a cache may return a new one.
        returned: Any = () if isinstance(results, Tensor) else results
        returned = returned.values() if isinstance(returned, Mapping) else returned
        more = returned if isinstance(returned, Iterable) else ()
        _record_in_cache(_cache_in((*args, *kwargs.values(), *more)), call)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hook = functools.partial(_replay, call)
            tensor: Any
            for tensor in tensors_in(results):
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(hook)


def _ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a call: ``input_ids``, or its first argument if that is [samples, positions]."""
    ids = kwargs.get(IDS_OF_TOKENS, args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
        return None
    return ids if ids.dim() == 2 else ids.unsqueeze(0)


def _replay(call: _Call, _: Tensor) -> None:
    """Make a call the running call again until the running backward ends.

    A tensor hook calls this, because a checkpoint may run parts of the call again in the backward.
    """
    state = _threads.running
    if state.call is not call and in_backward():
        before = state.call
        state.call = call
        torch_private.after_backward(functools.partial(_restore, state, before))


def _restore(state: _State, before: _Call | None) -> None:
    state.call = before


# --- caches ---------------------------------------------------------------------------------------


def _cache_in(values: Iterable[Any]) -> Any:
    """Return the cache of keys and values among arguments or results; None if there is none."""
    return next((value for value in values if hasattr(value, _LENGTH)), None)


def _seen(cache: Any, ids: Tensor | None) -> _Seen | None:
    """Return the tokens that a cache has seen, for the samples of a call."""
    seen: _Seen | None = getattr(cache, _SEEN, None)
    if seen is None or ids is None:
        return None
    active, before = seen
    if ids.shape[1] > 1:
        length = int(getattr(cache, _LENGTH)())
        if length < before.shape[1]:  # the cache was cut
            active, before = {}, before[:, :length]
        elif length > before.shape[1]:  # other code has written into the cache
            before = before[:, :0]
    # Generation may have repeated the samples.
    repeats, left = divmod(ids.shape[0], max(seen.ids.shape[0], 1))
    if left or not repeats:
        raise ConfigError(
            f"the cache of the call has seen {len(seen.ids)} sample(s), and the call has {len(ids)}: nothing "
            "says in which of them the phrase of the adapter was. Call the model with the whole prompt, or "
            f"give {OFFSETS}=[...]"
        )
    if repeats > 1:
        before = before.repeat_interleave(repeats, 0)
        active = {key: value.repeat_interleave(repeats) for key, value in active.items()}
    return _Seen(active, before)


def _record_in_cache(cache: Any, call: _Call) -> None:
    """Record in the cache of a call its tokens, and the samples in which each phrase has occurred."""
    if cache is None or call.ids is None:
        return
    ids, active = call.ids, dict(call.seen.active) if call.seen is not None else {}
    if call.seen is not None:
        ids = torch.cat([call.seen.ids.to(ids.device), ids], 1)
    active |= {phrase: mask[:, -1] for phrase, mask in call.masks.items()}
    with contextlib.suppress(AttributeError):
        setattr(cache, _SEEN, _Seen(active, ids.detach()))
