"""Detection and removal of ``forward`` functions that trainers set on modules, around the modules' own.

accelerate runs the forward under autocast and casts the outputs, or moves weights before and after it.
``torch.compile`` may be called on the method instead of the module. TRL fuses the head with the loss. All
of this belongs to training, and a merged or exported model must not have it. A ``forward`` that other code
has set on a module is a part of the model.
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
from lora_fx.runtime.modules import held_in

__all__ = ["copy_without_trainers", "instance_forwards"]

_log = logging.getLogger("lora_fx")

_TRAINERS = frozenset(
    {
        *("accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning"),
        *("ray", "torch", "transformers", "trl"),
    }
)
_NEUTRAL = sys.stdlib_module_names | {"lora_fx"}
_OLD = ("_old_forward", "_original_forward")  # attributes of accelerate with the former forward
_BESIDE = (*_OLD, "_hf_hook")


def instance_forwards(model: nn.Module) -> frozenset[str]:
    """Return the FQNs of the modules whose ``forward`` is set on the instance."""
    return frozenset(name for name, module in model.named_modules() if "forward" in vars(module))


def copy_without_trainers(
    model: nn.Module, before: Collection[str], error: type[LoraFxError]
) -> nn.Module:
    """Copy a rewritten model with :func:`share_copy`, without the forwards that trainers have set on it.

    Args:
        model: The model; it is not touched.
        before: The result of :func:`instance_forwards` at the rewrite. These forwards belong to the model.
        error: Class of the error for a forward that trainers and other code have both set.

    Raises:
        LoraFxError: If both a trainer and other code have wrapped the same forward.
        CaptureError: Same as for :func:`share_copy`.
    """
    restored: dict[str, str] = {}
    dropped: dict[str, tuple[str, ...]] = {}
    left_out: list[Any] = []
    for name, module in model.named_modules():
        attributes = vars(module)
        if name in before or "forward" not in attributes:
            continue
        trainers = _trainers(name, module, attributes["forward"], error)
        if not trainers:
            continue
        dropped[name or "the model"] = trainers
        # accelerate's hooks keep a forward that other code has set before.
        old = next((key for key in _OLD if key in attributes), None)
        somebody = old is not None and _packages(module, attributes[old])
        if old is not None and somebody and not _trainers(name, module, attributes[old], error):
            restored[name] = old
        left_out += [
            attributes[key]
            for key in ("forward", *_BESIDE)
            if key in attributes and restored.get(name) != key
        ]
    if dropped:
        _log.warning(
            "the forward that %s has set for training is left out: %s",
            ", ".join(sorted({trainer for trainers in dropped.values() for trainer in trainers})),
            some(list(dropped)),
        )
    result = share_copy(model, left_out, sharded=True)
    for name, old in restored.items():
        attributes = vars(result.get_submodule(name))
        attributes["forward"] = attributes.pop(old)
    return result


def _trainers(
    name: str, module: nn.Module, forward: Any, error: type[LoraFxError]
) -> tuple[str, ...]:
    """Return the names of the trainers that have set a module's forward, or () if other code has set it."""
    packages = _packages(module, forward)
    trainers, foreign = sorted(packages & _TRAINERS), sorted(packages - _TRAINERS)
    if trainers and foreign:
        raise error(
            f"{name or 'the model'}: its forward was set on the instance by {', '.join(trainers)} and by "
            f"{', '.join(foreign)}, and what belongs to training alone cannot be told from the rest: take it "
            "off first (del module.forward), or set the forward before rewrite()"
        )
    return tuple(trainers)


def _packages(module: nn.Module, forward: Any) -> set[str]:
    """Return the packages whose functions run between an instance's forward and the module's own."""
    own = {function.__code__ for function in _functions(original_class(module).forward)}
    return {_package(function) for function in _path(forward, own)} - _NEUTRAL


def _path(value: Any, own: Collection[types.CodeType]) -> list[types.FunctionType]:
    """Return the functions inside ``value`` that wrap the module's own forward, outermost first."""
    functions = [function for function in _functions(value) if not _is_own(function, own)]
    return [
        function
        for index, function in enumerate(functions)
        if not index or any(_is_own(inner, own) for inner in _functions(function))
    ]


def _is_own(function: types.FunctionType, own: Collection[types.CodeType]) -> bool:
    code = function.__code__
    return code in own or code.co_filename.startswith("<lora_fx ")


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield the functions inside a callable (in closures, partials and bound methods), outermost first."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, types.FunctionType):
            yield current
            cells = [content for cell in current.__closure__ or () for content in held_in(cell)]
            pending += [*cells, vars(current).get("__wrapped__")]
        elif isinstance(current, types.MethodType):
            pending.append(current.__func__)
        elif isinstance(current, functools.partial):
            pending.append(current.func)
        elif type(current).__module__.partition(".")[0] in _TRAINERS and not isinstance(
            current, nn.Module | type
        ):
            # accelerate wraps a forward in an object with __call__.
            pending += [
                item for item in getattr(current, "__dict__", {}).values() if callable(item)
            ]


def _package(function: types.FunctionType) -> str:
    # Not its __module__, which functools.wraps copies from the wrapped function.
    name: str = function.__globals__.get("__name__", "")
    return "lora_fx" if not name else name.partition(".")[0]
