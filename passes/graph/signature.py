"""The signature of a region's ``forward``, and the guard that keeps a specialized graph honest.

A trace fixes what the caller passed: ``mask=None`` takes the branch without a mask. Instead of
forbidding other calls, the generated ``forward`` looks first::

    def forward(self, x, mask=None, **kwargs):
        if x is None or mask is not None or kwargs:
            return fallback(self, x, mask, **kwargs)
        ...the graph...

The fallback is the module's own ``forward``, which is always right as long as every adapter sits in a
module that it calls.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Iterator, KeysView, Mapping
from typing import Any

import torch
from torch import fx

from lora_fx.passes.graph.reads import Read, conditions_of, constants_of
from lora_fx.runtime import ops

__all__ = [
    "FALLBACK",
    "IS_PLAIN",
    "MATH",
    "NEEDS_MODULES",
    "WANTS_CACHE",
    "Condition",
    "Flag",
    "GuardedCodeGen",
    "Parameter",
    "TensorGiven",
    "forwarding_source",
    "parameters_of",
    "shown",
    "wrapped_forward",
]

FALLBACK = "_lora_fx_fallback"
"""Global name of the fallback in generated code."""

NEEDS_MODULES = "_lora_fx_needs_modules"
"""Global name of :func:`lora_fx.runtime.ops.needs_modules` in generated code."""

WANTS_CACHE = "_lora_fx_wants_cache"
"""Global name of :func:`lora_fx.runtime.ops.wants_cache` in generated code."""

IS_PLAIN = "_lora_fx_is_plain"
"""The name under which conditions find :func:`lora_fx.runtime.ops.is_plain`."""

MATH = "_lora_fx_math"
"""The name under which conditions find the functions of ``math``."""

_HELPERS: dict[str, Any] = {
    NEEDS_MODULES: ops.needs_modules,
    WANTS_CACHE: ops.wants_cache,
    MATH: math,
    IS_PLAIN: ops.is_plain,
}
_SIMPLE = (type(None), bool, int, float, str)
_STARS: dict[int, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_OMITTED, _GIVEN = "_lora_fx_omitted", "_lora_fx_given"
_OPPOSITE: Mapping[str, str] = {"is": "is not", "is not": "is", "==": "!=", ">=": "<", "<=": ">"}
_PLAIN = (int, float, str, type(None), set, torch.dtype)

_Value = Callable[[str], Any]
"""Gives the value of an expression over the arguments of a call."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What has to be so for a graph to apply.

    Attributes:
        subject: An expression over the arguments of a call.
        how: ``is``, ``is not``, ``==``, ``>=`` or ``<=``.
        wanted: An expression for what it is compared with.
        bound: What the subject, a name, is given by this comparison; empty if it is known before.
        note: What is said after the value that is wanted.
    """

    subject: str
    how: str = ""
    wanted: str = ""
    bound: str = ""
    note: str = ""

    @property
    def test(self) -> str:
        """Python code that is true where it is not so."""
        subject = f"({self.subject} := {self.bound})" if self.bound else self.subject
        return f"{subject} {_OPPOSITE[self.how]} {self.wanted}"

    def failure(self, value: _Value) -> str:
        """What to say where it is not so."""
        found, wanted = shown(value(self.subject)), shown(value(self.wanted))
        if self.how == "is not" and wanted == "None":
            return f"{self.subject} has to be given, found None"
        return f"expected {self.subject} {self.how} {wanted}{self.note}, found {found}"


class TensorGiven(Condition):
    """An argument has to be a tensor."""

    @property
    def test(self) -> str:
        """See :class:`Condition`."""
        return f"not isinstance({self.subject}, torch.Tensor)"

    def failure(self, value: _Value) -> str:
        """See :class:`Condition`."""
        return f"expected {self.subject} to be a tensor, found {shown(value(self.subject))}"


class Flag(Condition):
    """An expression has to be false; the note says what it means that it is true."""

    @property
    def test(self) -> str:
        """See :class:`Condition`."""
        return self.subject

    def failure(self, value: _Value) -> str:
        """See :class:`Condition`."""
        return self.note


class _NothingMore(Flag):
    """``*args`` or ``**kwargs`` have to be empty."""

    def failure(self, value: _Value) -> str:
        """See :class:`Condition`."""
        extra = value(self.subject)
        found = sorted(extra) if isinstance(extra, dict) else f"{len(extra)} of them"
        return f"it was captured without {self.note}{self.subject}, found {found}"


def shown(value: Any) -> str:
    """A value as an error shows it."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, KeysView):
        return str(sorted(value))
    if isinstance(value, type):
        return value.__name__
    return repr(value) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of ``forward``.

    Attributes:
        name: Its name.
        kind: ``inspect.Parameter.kind`` as an integer.
        traced: Whether it is an input of the graph; otherwise it was fixed to ``value``.
        value: What it was fixed to.
        default: The default, or ``inspect.Parameter.empty``.
        within: Name of the ``**kwargs`` that takes it, for one that the signature does not name.
        needs: What has to be so for the graph to apply; by default it follows from the rest.
        omitted: Whether the graph holds only where nothing is given for it, not the default either: a
            decorator looks whether there is something.
    """

    name: str
    kind: int
    traced: bool
    value: Any = None
    default: Any = inspect.Parameter.empty
    within: str = ""
    needs: Condition | None = None
    omitted: bool = False

    @property
    def variadic(self) -> bool:
        """Whether it is ``*args`` or ``**kwargs``."""
        return bool(self.stars)

    @property
    def stars(self) -> str:
        """What is before its name: ``*``, ``**`` or nothing."""
        return _STARS.get(self.kind, "")


def parameters_of(forward: Any, fixed: dict[str, Any] | None = None) -> tuple[Parameter, ...]:
    """Reads a ``forward`` method's signature, without ``self``.

    Args:
        forward: The unbound method.
        fixed: Values to fix parameters to. By default those that have a default are fixed to it.

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
        optional = p.default is not p.empty
        if fixed is None:
            value, traced = (p.default, False) if optional else (None, True)
        else:
            value, traced = (fixed[p.name], False) if p.name in fixed else (None, True)
        result.append(Parameter(p.name, int(p.kind), traced, value, p.default))
    return tuple(result)


def wrapped_forward(forward: Any) -> Any:
    """The function that says what a ``forward`` takes.

    A decorator that takes ``*args`` and ``**kwargs`` and nothing by name hands them on, as far as one sees
    from outside. Any other one has parameters and defaults of its own, which may not be those of the
    function that it wraps.

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
    """Code of a ``forward`` that hands its arguments on as they were given, and the globals of that code.

    What the caller leaves out is left out of the call, too: a decorator may look whether it is there.

    Args:
        forward: The unbound method whose signature it has.
        chosen: The global name of a function that gives the method to call, for a module.
    """
    parameters = parameters_of(forward, {})
    spread = any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters)
    # What comes before *args cannot be left out where those are given.
    by_place: list[int] = [inspect.Parameter.POSITIONAL_ONLY]
    by_place += [inspect.Parameter.POSITIONAL_OR_KEYWORD] if spread else []
    left_out = [
        p.name
        for p in parameters
        if not p.variadic and p.kind not in by_place and p.default is not inspect.Parameter.empty
    ]
    code = GuardedCodeGen(
        tuple(dataclasses.replace(p, omitted=p.name in left_out) for p in parameters)
    )
    head = f"def forward({', '.join(['self', *code._declared()])}):"
    call = f"{chosen}(self)({', '.join(['self', *code._passed()])})"
    return f"{head}\n    return {call}\n", code.constants()


class GuardedCodeGen(fx.graph.CodeGen):
    """Generates ``forward`` with the original signature and the guard of this module.

    Attributes:
        parameters: The original signature.
        check_none: Whether to send a ``None`` for a traced parameter to the fallback. A module of
            ``torch.nn`` that is one operation makes do without.
        extra: What else has to be so for the graph to apply; asked last.
        reads: What the trace read, and took for granted; asked last of all.
    """

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        check_none: bool = True,
        conditions: tuple[Condition, ...] = (),
        reads: tuple[Read, ...] = (),
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.check_none = check_none
        self.extra = conditions
        self.reads = reads

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The ``def`` line and the guard. The graph's placeholders carry the parameters' names."""
        head = f"def {self._func_name}({', '.join(['self', *self._declared()])}){maybe_return_annotation}:"
        conditions = [one.test for one in self.conditions()]
        conditions += [test for _, test in conditions_of(self.reads)]
        if not conditions:
            return head
        call = ", ".join(["self", *self._passed()])
        test = " or ".join(conditions)
        if len(conditions) > 3:
            test = "(\n        " + "\n        or ".join(conditions) + "\n    )"
        return f"{head}\n    if {test}:\n        return {FALLBACK}({call})"

    def constants(self) -> dict[str, Any]:
        """Globals of the generated code: defaults and fixed values that have no literal form.

        Not ``additional_globals`` of fx: that gives one object one name, and drops those of torch.
        """
        conditions = self.conditions()
        found: dict[str, Any] = {
            name: helper
            for name, helper in _HELPERS.items()
            if any(name in condition.test for condition in conditions)
        }
        found |= constants_of(self.reads)
        if any(p.omitted for p in self.parameters):
            found |= {_OMITTED: ops.OMITTED, _GIVEN: ops.given}
        for p in self.parameters:
            if p.omitted:
                continue
            if p.default is not inspect.Parameter.empty and not _literal(p.default):
                found[f"_default_{p.name}"] = p.default
            if not p.traced and not p.variadic and not _literal(p.value):
                found[f"_fixed_{p.name}"] = p.value
        return found

    def conditions(self) -> list[Condition]:
        """What has to be so for the graph to apply, in the order in which it is asked."""
        within = {p.name for p in self.parameters if p.within}
        asked = [p for p in self.parameters if self.check_none or not p.traced]
        return [*(one for p in asked for one in _conditions(p, within)), *self.extra]

    def _declared(self) -> list[str]:
        declared, keyword_only = [], False
        for p in self.parameters:
            if p.within:
                continue
            if p.kind == inspect.Parameter.KEYWORD_ONLY and not keyword_only:
                declared.append("*")
            keyword_only |= p.kind in (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.VAR_POSITIONAL,
            )
            declared.append(f"{p.stars}{p.name}" if p.variadic else p.name + _default(p))
        return declared

    def _passed(self) -> list[str]:
        """Arguments of the fallback: by name where that can be.

        Decorators of transformers give ``use_cache`` by name if it is not among the keywords.
        """
        by_place: list[int] = [inspect.Parameter.POSITIONAL_ONLY]
        if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in self.parameters):
            by_place.append(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        passed = []
        omitted = [f"{p.name}={p.name}" for p in self.parameters if p.omitted and not p.within]
        for p in self.parameters:
            if p.within:
                continue
            if p.omitted:
                if omitted and p.kind != inspect.Parameter.VAR_POSITIONAL:
                    passed.append(f"**{_GIVEN}({', '.join(omitted)})")
                    omitted = []
            elif p.variadic or p.kind in by_place:
                passed.append(f"{p.stars}{p.name}")
            else:
                passed.append(f"{p.name}={p.name}")
        return passed


def _literal(value: Any) -> bool:
    """Whether ``repr`` gives an expression for it: not for members of an enumeration, or infinity."""
    return type(value) in _SIMPLE and (not isinstance(value, float) or math.isfinite(value))


def _default(p: Parameter) -> str:
    if p.default is inspect.Parameter.empty:
        return ""
    if p.omitted:
        return f"={_OMITTED}"
    return f"={p.default!r}" if _literal(p.default) else f"=_default_{p.name}"


def _conditions(p: Parameter, within: set[str]) -> Iterator[Condition]:
    if p.needs is not None:
        yield p.needs
    elif within and p.kind == inspect.Parameter.VAR_KEYWORD:
        yield Condition(f"{p.name}.keys()", "==", f"{{{', '.join(map(repr, sorted(within)))}}}")
    elif p.variadic:
        yield _NothingMore(p.name, note=p.stars)
    else:
        # What **kwargs holds gets a name where it is looked at first.
        bound = f"{p.within}[{p.name!r}]" if p.within else ""
        if p.omitted:
            yield Condition(p.name, "is", _OMITTED, bound)
        elif p.traced:
            # A trace takes every "is not None" branch: a None has to go to the module's own forward.
            yield Condition(p.name, "is not", "None", bound)
        elif p.value is None or isinstance(p.value, bool):
            yield Condition(p.name, "is", repr(p.value), bound)
        elif _literal(p.value):
            named = f"({p.name} := {bound})" if bound else p.name
            yield Condition(f"type({named})", "is", type(p.value).__name__)
            yield Condition(p.name, "==", repr(p.value))
        else:
            yield Condition(p.name, "is", f"_fixed_{p.name}", bound)
