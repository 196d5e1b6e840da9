"""Decides, for each call with an adapter for each sample, whether it is known which rows are whose.

A call of a form that nobody has seen is followed (:mod:`lora_fx.runtime.row_tracking`) while it runs, and refused where a
site reads rows that are not those of the samples. Calls of the same form run as they are then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lora_fx.errors import ConfigError
from lora_fx.runtime.row_tracking import Follower
from lora_fx.runtime.samples import (
    CLOSED,
    FOLDED,
    FOLLOWED,
    TRUSTED,
    SampleRows,
    follow,
    in_backward,
    unfollow,
)

__all__ = ["unwatch_calls", "watch_calls"]

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Its methods call parts of a model, the encoder for instance, with what the caller gave.
_GENERATION = "transformers.generation."


def watch_calls(model: nn.Module, table: SampleRows) -> None:
    """Looks at every call of a model, and of the modules that it consists of, from outside.

    Args:
        model: A model whose sites read ``table``.
        table: What says which sample has which adapter.
    """
    for name, module in _entered(model):
        entry = _Entry(name, model, table)
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it has no adapter, and takes no such hook
        module.register_forward_pre_hook(entry, prepend=True, with_kwargs=True)
        module.register_forward_hook(_Exit(entry), with_kwargs=True, always_call=True)


def unwatch_calls(model: nn.Module) -> None:
    """Ends what :func:`watch_calls` began."""
    for module in model.modules():
        for hooks, kind in ((module._forward_pre_hooks, _Entry), (module._forward_hooks, _Exit)):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]
                for more in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    more.pop(key, None)


def _entered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and the modules that it calls itself: its children, and what containers hold."""
    seen = {id(model)}
    yield "", model
    waiting = [(name, child) for name, child in model.named_children()]
    while waiting:
        name, module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if isinstance(module, _CONTAINERS):
            waiting += [(f"{name}.{key}", child) for key, child in module.named_children()]


class _Entry:
    """What runs before a call."""

    def __init__(self, name: str, model: nn.Module, table: SampleRows) -> None:
        self.name, self.model, self.table = name, model, table
        self.depth = 0
        self.follower: Follower | None = None
        self.form: object = None
        self.sizes: tuple[int, ...] = ()
        self.failing: BaseException | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Opens a call, if none is open."""
        table = self.table
        if self.depth:
            self.depth += 1
            return
        if table.state != CLOSED or not table.samples or in_backward():
            return
        self.depth = 1
        if not torch.compiler.is_compiling():
            table.call = self
        if table.alike:
            table.state = FOLDED
            return
        sizes: list[int] = [table.samples, table.repeats]
        form = (self.name, module.training, _form((args, kwargs), table, sizes))
        if self.name and not torch.compiler.is_compiling():
            self._check_callers(module)
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            # A question about sizes would be one compilation for each; and a trace is for one batch.
            known = form in table.proofs.forms
        else:
            known = table.proofs.knows(form, tuple(sizes))
        if known:
            table.state = TRUSTED
            return
        if (form, *sizes) in table.folded:
            table.state = FOLDED
            return
        self._follow(args, kwargs, form, tuple(sizes))

    def _follow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], form: object, sizes: tuple[int, ...]
    ) -> None:
        tensors = list(_tensors((args, kwargs)))
        why = _unseen(tensors)
        if why:
            self.depth = 0
            raise ConfigError(
                f"adapter_ids: nobody has seen yet which axis of such a batch is that of the samples, "
                f"and {why}: call the model itself once before, with a batch of this form, inside adapter_ids"
            )
        table = self.table
        try:
            follower = Follower(self.model, table.samples, table.repeats)
            for one in tensors:
                follower.enter(one)
        except BaseException:
            self.depth = 0
            raise
        self.follower, self.form, self.sizes = follower, form, sizes
        self.failing = sys.exc_info()[1]
        follow(follower)
        table.state = FOLLOWED
        follower.__enter__()

    def abandon(self) -> None:
        """Ends a call that was never closed: what ended it was no error."""
        follower, self.follower = self.follower, None
        self.depth, self.table.state = 0, CLOSED
        if follower is not None:
            unfollow()
            if _get_current_dispatch_mode() is follower:
                follower.__exit__(None, None, None)

    def close(self, results: Any) -> None:
        """Closes the call, and notes what was seen of it.

        Raises:
            ConfigError: If its results do not belong to the samples.
        """
        if not self.depth:
            return
        self.depth -= 1
        if self.depth:
            return
        follower, self.follower = self.follower, None
        self.table.state = CLOSED
        if not torch.compiler.is_compiling():
            self.table.call = None
        if follower is None:
            return
        follower.__exit__(None, None, None)
        unfollow()
        if sys.exc_info()[1] is not self.failing:
            return
        follower.check_results(_tensors(results))
        if follower.by_values:
            return
        if follower.folded:
            self.table.folded.add((self.form, *self.sizes))
        else:
            self.table.proofs.add(self.form, self.sizes)

    def _check_callers(self, module: nn.Module) -> None:
        """Refuses a call by another method of the model: what that did to the batch before was not seen."""
        inside: set[int] = set()
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if owner is not module and isinstance(owner, nn.Module):
                inside = inside or {id(one) for one in self.model.modules()}
                if id(owner) in inside and not str(frame.f_globals.get("__name__")).startswith(
                    _GENERATION
                ):
                    self.depth = 0
                    raise ConfigError(
                        f"adapter_ids: {type(owner).__name__}.{frame.f_code.co_name} calls {self.name!r} "
                        "by itself, and what it has done to the samples before was not seen: call the model, "
                        "or that module, or choose one adapter for the whole batch"
                    )
            frame = frame.f_back


class _Exit:
    """What runs behind a call, also behind one that has failed."""

    def __init__(self, entry: _Entry) -> None:
        self.entry = entry

    def __call__(self, _: nn.Module, __: Any, ___: Any, results: Any) -> None:
        """Closes it."""
        self.entry.close(results)


def _form(value: Any, table: SampleRows, sizes: list[int]) -> Any:
    """What of a call's arguments may decide which axis is that of the samples, but for how large they are.

    Args:
        value: The arguments, or one.
        table: Says how many samples there are: a size counts by whether it is theirs.
        sizes: Takes all sizes.
    """
    if isinstance(value, Tensor):
        sizes.extend(value.shape)
        whole = table.samples * table.repeats
        return tuple(
            "batch" if one == whole else "samples" if one == table.samples else min(one, 2)
            for one in value.shape
        )
    if isinstance(value, list | tuple):
        return (type(value), *[_form(one, table, sizes) for one in value])
    if isinstance(value, Mapping):
        return (type(value), *[(key, _form(one, table, sizes)) for key, one in value.items()])
    if isinstance(value, _SIMPLE):
        return (type(value), value)
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), *[_form(one, table, sizes) for one in vars(value).values()])
    return type(value)


def _tensors(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """The tensors in arguments or results, in containers and objects, too."""
    if isinstance(value, Tensor):
        yield value
    elif not depth or isinstance(value, (*_SIMPLE, nn.Module, type)):
        return
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _tensors(one, depth - 1)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one, depth - 1)
    else:
        for one in getattr(value, "__dict__", {}).values():
            yield from _tensors(one, depth - 1)


def _unseen(tensors: list[Tensor]) -> str:
    """Why a call cannot be followed, or nothing."""
    if torch.compiler.is_compiling():
        return "a compiler sees no values"
    if torch._C._is_tracing():
        return "torch.jit.trace sees one batch only"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func hides axes"
    if any(isinstance(one, torch._subclasses.FakeTensor) or one.is_meta for one in tensors):
        return "tensors without values have no samples"
    return ""
