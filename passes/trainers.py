"""What trainers leave on a model: a ``forward`` that they set on the instance, around the module's own.

accelerate runs it under autocast and casts the outputs, or moves weights before and after it.
``torch.compile`` may be given the method in place of the module. TRL fuses the head with the loss. All of
that belongs to training, so that a merged or an exported model has to be without it. What other code has set
is a part of the model.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError, some
from lora_fx.passes.graph import original_class, share_copy
from lora_fx.runtime import held_in

__all__ = ["copy_without_trainers", "instance_forwards"]

_log = logging.getLogger("lora_fx")

_TRAINERS = frozenset(
    {
        *("accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning"),
        *("ray", "torch", "transformers", "trl"),
    }
)
_NEUTRAL = sys.stdlib_module_names | {"lora_fx"}
_OLD = ("_old_forward", "_original_forward")  # where accelerate keeps what was there
_BESIDE = (*_OLD, "_hf_hook")


def instance_forwards(model: nn.Module) -> frozenset[str]:
    """FQNs of the modules whose ``forward`` is set on the instance."""
    return frozenset(name for name, module in model.named_modules() if "forward" in vars(module))


def copy_without_trainers(
    model: nn.Module, before: Collection[str], error: type[LoraFxError]
) -> nn.Module:
    """Copy a rewritten model as :func:`share_copy` does, without what trainers have set since the rewrite.

    Args:
        model: The model; it is not touched.
        before: :func:`instance_forwards` at the rewrite: what was there is a part of the model.
        error: What is raised where that cannot be told from what other code has set.

    Raises:
        LoraFxError: If a trainer's function runs one that is not a trainer's, or the other way round.
        CaptureError: As :func:`share_copy`.
    """
    restored: dict[str, str] = {}
    dropped: dict[str, tuple[str, ...]] = {}
    left_out: list[Any] = []
    for name, module in model.named_modules():
        held = vars(module)
        if name in before or "forward" not in held:
            continue
        trainers = _trainers(name, module, held["forward"], error)
        if not trainers:
            continue
        dropped[name or "the model"] = trainers
        # accelerate's hooks hold on to a forward that other code has set before.
        old = next((key for key in _OLD if key in held), None)
        somebody = old is not None and _packages(module, held[old])
        if old is not None and somebody and not _trainers(name, module, held[old], error):
            restored[name] = old
        left_out += [
            held[key] for key in ("forward", *_BESIDE) if key in held and restored.get(name) != key
        ]
    if dropped:
        _log.warning(
            "the forward that %s has set for training is left out: %s",
            ", ".join(sorted({one for trainers in dropped.values() for one in trainers})),
            some(list(dropped)),
        )
    result = share_copy(model, left_out, sharded=True)
    for name, old in restored.items():
        held = vars(result.get_submodule(name))
        held["forward"] = held.pop(old)
    return result


def _trainers(
    name: str, module: nn.Module, forward: Any, error: type[LoraFxError]
) -> tuple[str, ...]:
    """The trainers that have set a forward; none if other code has."""
    packages = _packages(module, forward)
    trainers, others = sorted(packages & _TRAINERS), sorted(packages - _TRAINERS)
    if trainers and others:
        raise error(
            f"{name or 'the model'}: its forward was set on the instance by {', '.join(trainers)} and by "
            f"{', '.join(others)}, and what belongs to training alone cannot be told from the rest: take it "
            "off first (del module.forward), or set the forward before rewrite()"
        )
    return tuple(trainers)


def _packages(module: nn.Module, forward: Any) -> set[str]:
    """The packages whose functions run from an instance's forward down to the module's own."""
    own = {one.__code__ for one in _functions(original_class(module).forward)}
    return {_package(one) for one in _path(forward, own)} - _NEUTRAL


def _path(value: Any, own: Collection[types.CodeType]) -> list[types.FunctionType]:
    """The first function that runs, and those between it and the module's own forward, without that."""
    found = [one for one in _functions(value) if not _is_own(one, own)]
    return [
        one
        for place, one in enumerate(found)
        if not place or any(_is_own(inner, own) for inner in _functions(one))
    ]


def _is_own(function: types.FunctionType, own: Collection[types.CodeType]) -> bool:
    code = function.__code__
    return code in own or code.co_filename.startswith("<lora_fx ")


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions that a callable is made of, from the outside to the inside."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, types.FunctionType):
            yield one
            cells = [held for cell in one.__closure__ or () for held in held_in(cell)]
            pending += [*cells, vars(one).get("__wrapped__")]
        elif isinstance(one, types.MethodType):
            pending.append(one.__func__)
        elif isinstance(one, functools.partial):
            pending.append(one.func)
        elif type(one).__module__.partition(".")[0] in _TRAINERS and not isinstance(
            one, nn.Module | type
        ):
            # An object with __call__, as accelerate has around a forward.
            pending += [item for item in getattr(one, "__dict__", {}).values() if callable(item)]


def _package(function: types.FunctionType) -> str:
    # Not its __module__, which functools.wraps takes from what is inside.
    name: str = function.__globals__.get("__name__", "")
    return "lora_fx" if not name else name.partition(".")[0]
