"""Signature of a region's ``forward``, and the guard that checks if the graph applies to a call.

A trace fixes arguments: with ``mask=None`` it takes the branch without a mask. Other calls are not forbidden.
The generated ``forward`` checks its arguments first::

    def forward(self, x, mask=None, **kwargs):
        if x is None or mask is not None or kwargs:
            return fallback(self, x, mask, **kwargs)
        ...the graph...

The fallback is the module's own ``forward``. It can run any call, because it reads each weight with its
adapters applied.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Iterator
from typing import Any

from torch import fx

from lora_fx.passes.graph.reads import Read, conditions_of, constants_of

__all__ = [
    "FALLBACK",
    "GuardedCodeGen",
    "Parameter",
    "forwarding_source",
    "parameters_of",
    "wrapped_forward",
]

FALLBACK = "_lora_fx_fallback"
"""Global name of the fallback, in generated code."""

_SIMPLE = (type(None), bool, int, float, str)
_STARS: dict[int, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Parameter of ``forward``.

    Attributes:
        name: Its name.
        kind: ``inspect.Parameter.kind`` as an integer.
        traced: True if it is an input of the graph; otherwise it was fixed to its default.
        default: The default, or ``inspect.Parameter.empty``.
    """

    name: str
    kind: int
    traced: bool
    default: Any = inspect.Parameter.empty

    @property
    def variadic(self) -> bool:
        """Return True if the parameter is ``*args`` or ``**kwargs``."""
        return bool(self.stars)

    @property
    def stars(self) -> str:
        """Return the prefix of the parameter's name: ``*``, ``**`` or an empty string."""
        return _STARS.get(self.kind, "")


def parameters_of(forward: Any, *, fixed: bool = True) -> tuple[Parameter, ...]:
    """Return the parameters of a ``forward`` method, without ``self``.

    Args:
        forward: The unbound method.
        fixed: True to fix parameters with a default value to it.

    Returns:
        The parameters in order. ``*args`` and ``**kwargs`` are fixed to empty.
    """
    result = []
    own = wrapped_forward(forward)
    signature = inspect.signature(own, follow_wrapped=False)
    for index, p in enumerate(signature.parameters.values()):
        if index == 0:
            continue
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            result.append(Parameter(p.name, int(p.kind), traced=False))
            continue
        traced = p.default is p.empty or not fixed
        result.append(Parameter(p.name, int(p.kind), traced, p.default))
    return tuple(result)


def wrapped_forward(forward: Any) -> Any:
    """Return the function inside decorators that only pass arguments on, whose signature ``forward`` has.

    A decorator that takes only ``*args`` and ``**kwargs`` is assumed to pass them on. Any other decorator has
    its own parameters and defaults, which may differ from those of the function that it wraps.

    Args:
        forward: The unbound method.
    """
    while isinstance(forward, types.FunctionType) and "__wrapped__" in vars(forward):
        if "__signature__" in vars(forward):
            break
        parameters = list(inspect.signature(forward, follow_wrapped=False).parameters.values())
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if (
            len(named) > 1
            or len(named) == len(parameters)
            or (named and named[0] is not parameters[0])
        ):
            break
        forward = vars(forward)["__wrapped__"]
    return forward


def forwarding_source(forward: Any, chosen: str) -> tuple[str, dict[str, Any]]:
    """Return code of a ``forward`` that passes its arguments on, and the globals of that code.

    Args:
        forward: The unbound method whose signature the code has.
        chosen: The global name of a function that takes the module and returns the method to call.
    """
    code = GuardedCodeGen(parameters_of(forward, fixed=False))
    head = f"def forward({', '.join(['self', *code._declared()])}):"
    call = f"{chosen}(self)({', '.join(['self', *code._passed()])})"
    return f"{head}\n    return {call}\n", code.constants()


class GuardedCodeGen(fx.graph.CodeGen):
    """Code generator of a ``forward`` with the original signature and a guard.

    Attributes:
        parameters: The original signature.
        check_none: True to run the fallback if a traced parameter is ``None``. Not needed for a module of
            ``torch.nn`` that is one operation.
        extra: Python expressions that are true if the graph does not apply for another reason.
        reads: Values that the trace read, which the guard checks last.
        positional: The number of arguments to pass to the fallback by position. A decorator may pass them to
            a function with other parameter names, which would not accept them by name.
    """

    positional = 0

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        check_none: bool = True,
        conditions: tuple[str, ...] = (),
        reads: tuple[Read, ...] = (),
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.check_none = check_none
        self.extra = conditions
        self.reads = reads

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """Write the ``def`` line and the guard. The graph's placeholders carry the parameters' names."""
        head = f"def {self._func_name}({', '.join(['self', *self._declared()])}){maybe_return_annotation}:"
        conditions = [*self._argument_conditions(), *self.extra, *conditions_of(self.reads)]
        if not conditions:
            return head
        call = ", ".join(["self", *self._passed()])
        test = " or ".join(conditions)
        if len(conditions) > 3:
            test = "(\n        " + "\n        or ".join(conditions) + "\n    )"
        return f"{head}\n    if {test}:\n        return {FALLBACK}({call})"

    def constants(self) -> dict[str, Any]:
        """Return the globals of the generated code: defaults without a literal form.

        They are not passed as ``additional_globals`` of fx, which gives each object only one name, and drops
        objects of torch.
        """
        known = constants_of(self.reads)
        for p in self.parameters:
            if p.default is not inspect.Parameter.empty and not _literal(p.default):
                known[f"_default_{p.name}"] = p.default
        return known

    def _argument_conditions(self) -> Iterator[str]:
        """Yield the conditions on arguments under which a call runs the fallback, in order."""
        for p in self.parameters:
            if p.variadic:
                yield p.name
            elif p.traced:
                # A trace takes every "is not None" branch, so a None must run the module's own forward.
                if self.check_none:
                    yield f"{p.name} is None"
            elif p.default is None or isinstance(p.default, bool):
                yield f"{p.name} is not {p.default!r}"
            elif _literal(p.default):
                yield f"type({p.name}) is not {type(p.default).__name__}"
                yield f"{p.name} != {p.default!r}"
            else:
                yield f"{p.name} is not _default_{p.name}"

    def _declared(self) -> list[str]:
        declared, keyword_only = [], False
        for p in self.parameters:
            if p.kind == inspect.Parameter.KEYWORD_ONLY and not keyword_only:
                declared.append("*")
            keyword_only |= p.kind in (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.VAR_POSITIONAL,
            )
            declared.append(f"{p.stars}{p.name}" if p.variadic else p.name + _default(p))
        return declared

    def _passed(self) -> list[str]:
        """Return code for the fallback's arguments: the first :attr:`positional` by position, others by name.

        Decorators of transformers add ``use_cache`` by name if it is not among the keywords.
        """
        positional: list[int] = [inspect.Parameter.POSITIONAL_ONLY]
        if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in self.parameters):
            positional.append(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        passed = []
        for index, p in enumerate(self.parameters):
            by_position = p.kind in positional or (
                index < self.positional and p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
            )
            if p.variadic or by_position:
                passed.append(f"{p.stars}{p.name}")
            else:
                passed.append(f"{p.name}={p.name}")
        return passed


def _literal(value: Any) -> bool:
    """Return True if ``repr`` of a value is a Python expression, unlike for enum members or infinity."""
    return type(value) in _SIMPLE and (not isinstance(value, float) or math.isfinite(value))


def _default(p: Parameter) -> str:
    if p.default is inspect.Parameter.empty:
        return ""
    return f"={p.default!r}" if _literal(p.default) else f"=_default_{p.name}"
