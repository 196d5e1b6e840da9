"""Hooks around the calls of a model with one adapter per sample.

The first call of each form is followed while it runs (:mod:`lora_fx.runtime.rows.row_tracking`). It raises if
a site reads rows that are not those of the samples in their order. Later calls of that form run without the
follower. A form is a key of the arguments (:func:`_form`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.ir import is_base
from lora_fx.runtime.kernels import transformed
from lora_fx.runtime.rows.row_tracking import Follower
from lora_fx.runtime.rows.samples import (
    IDS,
    Assigned,
    CallState,
    SampleRows,
    follow,
    in_backward,
    places_of_samples,
    unfollow,
)

__all__ = ["entered", "ignore_ids", "refuse_ids", "tensors_in", "unwatch_calls", "watch_calls"]

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Methods of this package call parts of a model, such as the encoder, with the arguments of the user.
_GENERATION = "transformers.generation."


def watch_calls(model: nn.Module, table: SampleRows) -> None:
    """Register hooks that open and close a call, on a model and on the modules that it calls directly.

    Args:
        model: A model whose sites read ``table``.
        table: The samples of each adapter.
    """
    for name, module in entered(model):
        entry = _Entry(name, model, table)
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it has no adapter, and does not support these hooks
        module.register_forward_pre_hook(entry, prepend=True, with_kwargs=True)
        module.register_forward_hook(_Exit(entry), with_kwargs=True, always_call=True)


def ignore_ids(model: nn.Module) -> None:
    """Make calls of a model without active adapters ignore ``adapter_ids``, until :func:`unwatch_calls`."""
    if _takes_ids(model):
        model.register_forward_pre_hook(_Ignored(), prepend=True, with_kwargs=True)


def _takes_ids(model: nn.Module) -> bool:
    """Return True if lora-fx may take ``adapter_ids``: the model's own forward has no such parameter."""
    return IDS not in inspect.signature(model.forward).parameters


def refuse_ids(model: nn.Module) -> None:
    """Raise if a call passes ``adapter_ids`` that no hook has removed.

    The ``**kwargs`` of a model would ignore them.

    Raises:
        ConfigError: If the model's own forward has no such parameter.
    """
    if _takes_ids(model):
        raise ConfigError(
            f"{IDS}: no call of this model can name the adapters of its samples: prepare it with "
            "lora_fx.set_adapter(model, names, per_sample=True) before, and call the model itself, not its "
            "forward; or call it inside `with lora_fx.adapter_ids(model, [...]):`"
        )


class _Ignored:
    """Forward pre-hook that removes ``adapter_ids`` from a call of the base."""

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments without ``adapter_ids``."""
        return args, {name: value for name, value in kwargs.items() if name != IDS}


def unwatch_calls(model: nn.Module) -> None:
    """Remove the hooks of :func:`watch_calls` and :func:`ignore_ids`."""
    for module in model.modules():
        torch_private.remove_forward_hooks(module, _Entry, _Ignored, _Exit)


def entered(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model and the modules that it calls directly: children, and children of containers."""
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
    """Forward pre-hook that opens a call of a model with one adapter per sample."""

    def __init__(self, name: str, model: nn.Module, table: SampleRows) -> None:
        self.name, self.model, self.table = name, model, table
        # If the model's own forward has a parameter ``adapter_ids``, the argument is passed on to it.
        self.takes_ids = not name and _takes_ids(model)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open a call, if none is open, and remove ``adapter_ids`` from its arguments."""
        if IDS not in kwargs or not self.takes_ids:
            self._open(module, args, kwargs, None)
            return None
        ids = _named(kwargs[IDS], self.table)
        if self.table.state is not CallState.CLOSED:
            raise ConfigError(
                f"{IDS}: a call inside a call of the model has the adapters of that: leave it out"
            )
        kwargs = {name: value for name, value in kwargs.items() if name != IDS}
        self._open(module, args, kwargs, Assigned(len(ids), 1, places_of_samples(ids)))
        if in_backward():
            # A checkpoint around the whole model recomputes it here, and opens no call.
            torch_private.after_backward(self.table.settle)
        return args, kwargs

    def _open(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        assigned: Assigned | None,
    ) -> None:
        table, thread = self.table, self.table.thread
        if thread.opened_by == self.name:
            thread.depth += 1
            return
        if thread.state is not CallState.CLOSED:
            return
        if torch.compiler.is_compiling():
            # A compiler cannot read context variables. The thread already has the samples of the blocks.
            if not thread.samples:
                return
        else:
            if thread.call is not None:
                thread.call.abandon()
            if assigned is not None:
                table.reassign(assigned)
            elif not in_backward():
                table.reassign(table.of_blocks())
            if not thread.samples or in_backward():
                return
            thread.call = self
        thread.opened_by, thread.depth = self.name, 1
        try:
            self._begin(module, args, kwargs)
        except BaseException:
            if not torch.compiler.is_compiling():
                self.abandon()
            raise

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a call. A call of a known form runs without a follower, any other call is followed."""
        table, thread = self.table, self.table.thread
        if thread.alike:
            thread.state = CallState.FOLDED
            return
        sizes: list[int] = [thread.samples, thread.repeats]
        form = (self.name, module.training, _form((args, kwargs), table, sizes))
        if self.name and not torch.compiler.is_compiling():
            self._check_callers(module)
        if torch.compiler.is_compiling() or torch_private.in_jit_trace():
            # A compiler would recompile for each size that is compared. A trace is for one batch only.
            known = form in table.proofs.forms
        else:
            known = table.proofs.knows(form, tuple(sizes))
        if known:
            thread.state = CallState.TRUSTED
            return
        if (form, *sizes) in table.folded:
            thread.state = CallState.FOLDED
            return
        self._follow(args, kwargs, form, tuple(sizes))

    def _follow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], form: object, sizes: tuple[int, ...]
    ) -> None:
        tensors = list(tensors_in((args, kwargs)))
        why = _unseen(tensors)
        if why:
            raise ConfigError(
                f"adapter_ids: it is not known yet which axis of such a batch is that of the samples, "
                f"and {why}: call the model itself once before, with a batch of this form, inside adapter_ids"
            )
        thread = self.table.thread
        follower = Follower(self.model, thread.samples, thread.repeats)
        for tensor in tensors:
            follower.enter(tensor)
        thread.follower, thread.form, thread.sizes = follower, form, sizes
        thread.failing = sys.exc_info()[1]
        follow(follower)
        thread.state = CallState.FOLLOWED
        follower.__enter__()

    def abandon(self) -> None:
        """End a call that was never closed, although it raised no error."""
        thread = self.table.thread
        follower, thread.follower = thread.follower, None
        thread.opened_by, thread.depth, thread.state, thread.call = None, 0, CallState.CLOSED, None
        self.table.settle()
        if follower is not None:
            unfollow()
            if torch_private.dispatch_mode() is follower:
                follower.__exit__(None, None, None)

    def close(self, results: Any) -> None:
        """Close the call, and remember its form if it was followed.

        Raises:
            ConfigError: If the results do not belong to the samples.
        """
        thread = self.table.thread
        if thread.opened_by != self.name:
            return
        thread.depth -= 1
        if thread.depth:
            return
        _remember(self.table, results)
        self._close(results)

    def _close(self, results: Any) -> None:
        table, thread = self.table, self.table.thread
        thread.opened_by, thread.state = None, CallState.CLOSED
        if torch.compiler.is_compiling():
            return
        follower, thread.follower = thread.follower, None
        thread.call = None
        table.settle()
        if follower is None:
            return
        follower.__exit__(None, None, None)
        unfollow()
        if sys.exc_info()[1] is not thread.failing:
            return
        follower.check_results(tensors_in(results))
        if follower.by_values:
            return
        if follower.folded:
            table.folded.add((thread.form, *thread.sizes))
        else:
            table.proofs.add(thread.form, thread.sizes)

    def _check_callers(self, module: nn.Module) -> None:
        """Raise if another method of the model makes the call, because it may have changed the batch."""
        inside: set[int] = set()
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if owner is not module and isinstance(owner, nn.Module):
                inside = inside or {id(submodule) for submodule in self.model.modules()}
                if id(owner) in inside and not str(frame.f_globals.get("__name__")).startswith(
                    _GENERATION
                ):
                    raise ConfigError(
                        f"adapter_ids: {type(owner).__name__}.{frame.f_code.co_name} calls {self.name!r} "
                        "by itself, and what it has done to the samples before was not seen: call the model, "
                        "or that module, or choose one adapter for the whole batch"
                    )
            frame = frame.f_back


class _Exit:
    """Forward hook that closes the call that :class:`_Entry` has opened, also after an error."""

    def __init__(self, entry: _Entry) -> None:
        self.entry = entry

    def __call__(self, _: nn.Module, __: Any, ___: Any, results: Any) -> None:
        """Close the call, and check its results if the call was followed."""
        self.entry.close(results)


def _named(ids: Any, table: SampleRows) -> list[str | None]:
    """Convert ``adapter_ids`` to adapter names. An id is a name, or an index into the active adapters.

    Raises:
        ConfigError: If an id is neither, or the call is being compiled.
    """
    if torch.compiler.is_compiling():
        raise ConfigError(
            f"{IDS}: a compiler would compile each order of adapters: call the compiled model inside `with "
            "lora_fx.adapter_ids(model, [...]):`"
        )
    names = [*table._buffers]
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point():
            raise ConfigError(
                f"{IDS}: found a tensor of shape {tuple(ids.shape)} in {ids.dtype}; whole numbers "
                "[samples] are needed"
            )
        ids = ids.tolist()
    if isinstance(ids, str) or not isinstance(ids, list | tuple) or not ids:
        raise ConfigError(f"{IDS} needs one name or number for each sample, found {ids!r}")
    adapters: list[str | None] = []
    for value in ids:
        if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < len(names):
            adapters.append(names[value] if value >= 0 else None)
        elif is_base(value):
            adapters.append(None)
        elif value in names:
            adapters.append(value)
        else:
            raise ConfigError(
                f"{IDS}: there is no adapter {value!r} in this model's batches: it has "
                f"{', '.join(map(repr, names))}, numbered from 0, and -1 or None for the base"
            )
    return adapters


def _remember(table: SampleRows, results: Any) -> None:
    """Add hooks that restore the samples in the backward, where checkpoints recompute parts of the call."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return
    hook = functools.partial(_replay, table, table.assigned)
    tensor: Any
    for tensor in tensors_in(results):
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(hook)


def _replay(table: SampleRows, assigned: Assigned, _: Tensor) -> None:
    if table.assigned != assigned and in_backward():
        table.reassign(assigned)
        torch_private.after_backward(table.settle)


def _form(value: Any, table: SampleRows, sizes: list[int]) -> Any:
    """Return a key of the properties of arguments that may decide which axis has the samples.

    Args:
        value: The arguments, or a single argument.
        table: The samples. For a size, the key tells only if it is their number, 0, 1 or greater.
        sizes: List to which the sizes of all tensors are appended.
    """
    if isinstance(value, Tensor):
        sizes.extend(value.shape)
        whole = table.samples * table.repeats
        return tuple(
            "batch" if size == whole else "samples" if size == table.samples else min(size, 2)
            for size in value.shape
        )
    if isinstance(value, list | tuple):
        return (type(value), *[_form(item, table, sizes) for item in value])
    if isinstance(value, Mapping):
        return (type(value), *[(key, _form(item, table, sizes)) for key, item in value.items()])
    if isinstance(value, _SIMPLE):
        return (type(value), value)
    if hasattr(value, "__dataclass_fields__"):
        return (type(value), *[_form(item, table, sizes) for item in vars(value).values()])
    return type(value)


def _unseen(tensors: list[Tensor]) -> str:
    """Return the reason why a call cannot be followed, or an empty string."""
    if torch.compiler.is_compiling():
        return "a compiler sees no values"
    if torch_private.in_jit_trace():
        return "torch.jit.trace sees one batch only"
    if torch_private.in_functorch_level():
        return "a transform of torch.func hides axes"
    if any(torch_private.is_fake(tensor) or tensor.is_meta for tensor in tensors):
        return "tensors without values have no samples"
    return ""


_WITHOUT_TENSORS = (bool, int, float, complex, str, bytes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, also in containers and objects, but not in modules."""
    seen: set[int] = set()

    def visit(obj: Any, depth: int) -> Iterator[Tensor]:
        if isinstance(obj, Tensor):
            yield obj
        elif (
            depth
            and id(obj) not in seen
            and not isinstance(obj, (*_WITHOUT_TENSORS, nn.Module, type))
        ):
            seen.add(id(obj))
            if isinstance(obj, Mapping):
                obj = obj.values()
            elif not isinstance(obj, list | tuple | set):
                obj = getattr(obj, "__dict__", {}).values()
            for item in obj:
                yield from visit(item, depth - 1)

    return visit(value, 8)
