"""From a model and one call to an exported program whose axes are dynamic wherever they can be.

Every axis of every input is offered to ``torch.export`` as dynamic; it keeps those that the model
treats as such and fixes the rest (channels that meet a weight, a grid of patches). Each axis that
stays fixed carries its reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lora_fx import torch_private
from lora_fx.errors import ExportError
from lora_fx.export.arguments import Arguments, Axis, Extra, FlatModel, axis_name, given_names
from lora_fx.export.failures import Witness, here, reason_of_failure, together, watched
from lora_fx.passes.capture import Listener
from lora_fx.torch_private import pytree

__all__ = ["Trace", "normal_size", "trace", "widen_batch"]

_sizes = torch_private.sympy_functions()
_QUOTIENTS = (_sizes.FloorDiv, _sizes.CleanDiv)
_REMAINDERS = (_sizes.Mod, _sizes.PythonMod)


_TESTS: Mapping[Any, bool] = {
    torch.isfinite: True,
    Tensor.isfinite: True,
    torch.isinf: False,
    Tensor.isinf: False,
    torch.isnan: False,
    Tensor.isnan: False,
}
"""What each of them says of a finite number."""

_REDUCTIONS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}
"""Those of a test whose answer is that for one finite number."""


class _FiniteValues(Listener):
    """Answers conditions of the kind ``torch.isfinite(x).all()`` in a trace: all values are finite.

    Args:
        model: What is traced.

    Attributes:
        places: Where that was answered, in order and each once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, None] = {}
        self._modules = {id(module): name for name, module in model.named_modules()}
        # By identity, and alive: another tensor must not get the id of one that is gone.
        self._tests: dict[int, tuple[Tensor, bool]] = {}
        self._answers: dict[int, tuple[Tensor, bool]] = {}

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answers where a reduced test is a condition."""
        if func is not Tensor.__bool__ or id(args[0]) not in self._answers:
            return NotImplemented
        self.places.setdefault(str(here(self._modules)))
        return self._answers[id(args[0])][1]

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remembers tests and what they are reduced to."""
        if func in _TESTS:
            self._tests[id(result)] = result, _TESTS[func]
        elif func in _REDUCTIONS and len(args) == 1 and not kwargs and id(args[0]) in self._tests:
            found = self._tests[id(args[0])][1]
            if _REDUCTIONS[func] == found:
                self._answers[id(result)] = result, found


_LONGEST = 32
"""Operations of the longest formula for a size that an offered axis may lead to, in normal form.

Those of convolutions, of windows that fit and of patches have fewer than 10. Padding stage after stage can
double the formula each time, and with it the time of every question that torch.export asks: one with 40
operations takes seconds, one with 180 minutes.
"""


class _ShortFormulas(Listener):
    """Has sizes in normal form in a trace, and ends one in which a size is too long even so.

    Args:
        longest: Operations that a formula has at most; None for any number.
    """

    def __init__(self, longest: int | None = _LONGEST) -> None:
        super().__init__()
        self._longest = longest
        self._known: set[Any] = set()

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Looks at the sizes of what comes out."""
        for tensor in pytree.tree_leaves(result):
            sizes: Any = tensor.shape if isinstance(tensor, Tensor) else ()
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    self._check(size.node)

    def _check(self, node: Any) -> None:
        if type(node.shape_env) is ShapeEnv:
            node.shape_env.__class__ = _NormalSizes
        formula = node.expr
        if self._longest is None or formula in self._known:
            return
        self._known.add(formula)
        if (length := int(formula.count_ops())) > self._longest:
            raise ExportError(
                f"a size becomes a formula of {length} operations, which takes torch.export minutes to "
                "reason about (name the axis in dynamic_shapes to wait for it)"
            )


_PATIENCE = 100
"""Functions of PyTorch after which a question of sizes that no file can ask again ends a trace.

What is asked early may be settled soon after, where the sizes turn out to be fixed. Reasoning about windows
of an unknown number costs half the time of an export, to be thrown away for that question in the end.
"""


class _AnswerableQuestions(Listener):
    """Ends a trace that will be thrown away: for a question of sizes that stays open."""

    def __init__(self) -> None:
        super().__init__()
        self._read = 0  # guards that were looked at
        self._open: list[Any] = []
        self._since = 0  # functions since the first of those

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Counts functions, and looks at what was asked before them."""
        environment = _environment(pytree.tree_leaves(result))
        if environment is not None:
            new = environment.guards[self._read :]
            self._read += len(new)
            self._open += [guard.expr for guard in new if _is_of_code(guard)]
        self._since += bool(self._open)
        if environment is None or self._since < _PATIENCE:
            return
        self._since = 0
        self._open = _open(dict.fromkeys(map(environment.simplify, self._open)))
        if self._open:
            raise _UnansweredError(self._open[0])


class _UnansweredError(ExportError):
    """A question of sizes that no file can ask."""

    def __init__(self, question: Any) -> None:
        super().__init__(f"the forward asks of its sizes whether {question}, which a file cannot")


class _NormalSizes(ShapeEnv):
    """What torch.export knows of the sizes in a program, with every formula in normal form."""

    def replace(self, expr: Any) -> Any:  # type: ignore[override]  # torch caches its own
        """What torch reads of each size, and asks questions about."""
        return normal_size(super().replace(expr))


@lru_cache(maxsize=4096)
def normal_size(formula: Any) -> Any:
    """A formula of sizes as a sum of products of axes and of quotients that are rounded down.

    ``ceil(x / 2)`` becomes ``(x + 1) // 2``, a remainder what it is short of the quotient, a quotient of a
    quotient one; of ``max`` and ``min`` what is always the larger or the smaller. So that of padding to whole
    windows or strides, and back, there stays what it comes to.

    Args:
        formula: Of sympy; its symbols are not negative.
    """
    if formula.is_Atom:
        return formula
    args = [normal_size(one) for one in formula.args]
    first = args[0]
    kind = formula.func
    if kind in (_sizes.CeilToInt, _sizes.FloorToInt) and isinstance(first, _sizes.IntTrueDiv):
        # Exact: the sizes of tensors are far below 2**53.
        above, below = first.args
        if below.is_Integer and below > 0:
            return _quotient(above + below - 1 if kind is _sizes.CeilToInt else above, below)
    if kind in (*_QUOTIENTS, *_REMAINDERS) and args[1].is_Integer and args[1] > 0:
        quotient = _quotient(first, args[1])
        return quotient if kind in _QUOTIENTS else (first - args[1] * quotient).expand()
    if kind in (_sizes.Max, _sizes.Min):
        sign = 1 if kind is _sizes.Max else -1
        kept: list[Any] = []
        for one in args:
            if any(_never_negative(sign * (other - one)) for other in kept):
                continue
            kept = [other for other in kept if not _never_negative(sign * (one - other))]
            kept.append(one)
        return kept[0] if len(kept) == 1 else kind(*kept)
    found = formula if tuple(args) == formula.args else kind(*args)
    return found.expand() if found.is_integer and (found.is_Add or found.is_Mul) else found


def _quotient(above: Any, below: Any) -> Any:
    """``above // below``, for a positive number below."""
    terms = above.expand().as_coefficients_dict()
    # What is divisible needs no rounding.
    whole = sum(term * (factor // below) for term, factor in terms.items() if not factor % below)
    rest = {term: factor for term, factor in terms.items() if factor % below}
    constant = rest.pop(sympy.S.One, 0)
    if rest and all(factor < 0 for factor in rest.values()):  # rounded up, the other way round
        total = sum(term * -factor for term, factor in rest.items())
        return (whole - _quotient(total - constant + below - 1, below)).expand()
    whole, constant = whole + constant // below, constant % below
    if len(rest) == 1:
        [(term, factor)] = rest.items()
        if isinstance(term, _sizes.FloorDiv) and factor == 1 and term.args[1].is_Integer:
            inner, times = term.args
            return (whole + _quotient(inner + constant * times, below * times)).expand()
    total = sum(term * factor for term, factor in rest.items()) + constant
    return (whole + _sizes.FloorDiv(total, below)).expand()


def _never_negative(formula: Any) -> bool:
    """Whether a formula in normal form is at least 0 whatever the sizes are; False if that is not seen."""
    terms = formula.expand().as_coefficients_dict()
    for term, factor in terms.items():
        if isinstance(term, _sizes.FloorDiv) and term.args[1].is_Integer:
            above, below = term.args
            # It is above / below, less something under 1.
            least = above / below if factor < 0 else (above - below + 1) / below
            return _never_negative(formula - factor * term + factor * least)
    return all(
        factor >= 0 and all(one.is_Integer or one.is_Symbol for one in term.args or (term,))
        for term, factor in terms.items()
        if term != sympy.S.One or factor < 0
    )


_log = logging.getLogger("lora_fx")


@dataclass(frozen=True)
class Trace:
    """An exported program and what is known about its inputs.

    Attributes:
        program: The program of a ``FlatModel``.
        arguments: The call that was traced.
        axes: The axes of each input.
        symbols: Symbol of torch.export to the name of the axis.
        description: Which axes were offered as dynamic.
        attempt: Its number among the ways that there are, from most to fewest dynamic axes.
        extras: What the program takes after the tensors of the call.
        extra_symbols: The same as ``symbols`` for the axes of those.
        finite: Places with a branch that was traced as for finite values.
    """

    program: ExportedProgram
    arguments: Arguments
    axes: tuple[tuple[Axis, ...], ...]
    symbols: Mapping[str, str]
    description: str = ""
    attempt: int = 0
    extras: tuple[Extra, ...] = ()
    extra_symbols: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finite: tuple[str, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of all inputs of the program."""
        return (*self.arguments.names, *(extra.name for extra in self.extras))

    def labels(self) -> list[list[int | str]]:
        """For each input of the program its sizes and axis names."""
        own = [[axis.label for axis in axes] for axes in self.axes]
        return own + [list(extra.labels) for extra in self.extras]

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name to its dynamic axes, by position."""
        return {
            name: {index: axis.name for index, axis in enumerate(axes) if axis.name is not None}
            for name, axes in zip(self.arguments.names, self.axes, strict=True)
        }

    def axis_limits(self) -> dict[str, int]:
        """Name of a dynamic axis to its largest size, where the model has one."""
        return {
            axis.name: axis.high
            for axis in itertools.chain(*self.axes)
            if axis.name is not None and axis.high is not None
        }


def widen_batch(arguments: Arguments) -> Arguments:
    """Repeat a batch of one, where all tensors share it: a size of 1 cannot become dynamic."""
    batched = [tensor for tensor in arguments.tensors if tensor.ndim]
    if not batched or any(tensor.shape[0] != 1 for tensor in batched):
        return arguments
    return arguments.replace([torch.cat([t, t]) if t.ndim else t for t in arguments.tensors])


def trace(
    model: FlatModel,
    arguments: Arguments,
    dynamic_shapes: object = None,
    failed: Sequence[str] = (),
    first: int = 0,
    *,
    task: bool = False,
) -> Trace | None:
    """Export ``model`` with as many dynamic axes as it allows.

    Args:
        model: In eval mode.
        arguments: The call to trace.
        dynamic_shapes: None for every axis; else input name to a mapping of axis to a name (or to
            a ``torch.export.Dim``), or a sequence of such mappings in the order of the inputs.
            Axes that it leaves out are fixed; those that it names have to be dynamic.
        failed: What came of the ways that were tried already: reasons of the axes that stay fixed.
        first: Which way to try first.
        task: Whether a task has made ``dynamic_shapes``, not the user.

    Returns:
        The first that works; None if ``first`` is beyond the last.

    Raises:
        ExportError: torch.export cannot capture the model, with its reason.
    """
    labels = given_names(dynamic_shapes, arguments)
    extras = model.extras()
    failures = list(failed)
    attempts = list(enumerate(_attempts(arguments, dynamic_shapes, labels, task=task)))[first:]
    if not attempts:
        return None
    for attempt, (description, specs) in attempts:
        try:
            with (
                torch.no_grad(),
                watched(model.model) as witness,
                _FiniteValues(model.model) as values,
                # Who names an axis wants it, whatever it takes.
                _ShortFormulas(_LONGEST if dynamic_shapes is None else None),
                nullcontext() if task else _AnswerableQuestions(),
            ):
                program = torch.export.export(
                    model,
                    (*arguments.tensors, *(extra.example for extra in extras)),
                    dynamic_shapes=((*specs, *(extra.dims for extra in extras)),),
                    strict=False,
                )
            # Sizes of a task depend on each other: a mask is as long as what was and what is given.
            if not task and (questions := _unanswered(program)):
                raise _UnansweredError(questions[0])
        except _UnansweredError as error:
            failures.append(f"{description}: {error}")
            last: Exception = error
            continue
        except Exception as error:  # noqa: BLE001  # torch.export raises all kinds; kept as a reason
            reason = reason_of_failure(error, witness, arguments.names, arguments.tensors)
            failures.append(f"{description}: {reason}")
            last = error
            continue
        if len(failures) > len(failed):  # who has those before has told of them
            _log.warning("export with fewer dynamic axes: %s", together(failures[len(failed) :]))
        reason_of = partial(_reason, failures, witness, task)
        found = _read(program, arguments, specs, labels, extras, reason_of)
        return dataclasses.replace(
            found, description=description, attempt=attempt, finite=tuple(values.places)
        )
    raise ExportError(
        f"torch.export cannot capture {type(model.model).__name__} ({together(failures)})"
    ) from last


def _asked_of_sizes(
    program: ExportedProgram, counts: Callable[[Any], bool] = lambda guard: True
) -> list[Any]:
    """Return what code, or an operation, asked of sizes in an export: the graph has the way of a yes.

    Args:
        program: The exported program.
        counts: Which guards of its ``ShapeEnv`` are wanted.

    Returns:
        Formulas of sympy over the symbols of the sizes, each once and in order, without what always holds.
    """
    sizes = (
        size
        for node in program.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape
    )
    environment = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
    if environment is None:
        return []
    asked = (environment.simplify(guard.expr) for guard in environment.guards if counts(guard))
    return [one for one in dict.fromkeys(asked) if one != sympy.true]


def _unanswered(program: ExportedProgram) -> list[str]:
    """What a trace asked of its dynamic sizes, and no file asks again: it has the branch of the example.

    Limits of one size are left out, which the file's metadata has. So is what operations ask, which compute
    the same either way.
    """
    return [str(one) for one in _open(_asked_of_sizes(program, _is_of_code))]


def _open(asked: Iterable[Any]) -> list[Any]:
    """Those of the questions to which what is known of the sizes is no answer."""
    return [one for one in asked if not _is_limit(one) and not _always_holds(one)]


def _environment(values: Iterable[Any]) -> ShapeEnv | None:
    """What torch.export knows of the sizes of tensors; None if all of them are fixed."""
    sizes: Iterator[Any] = itertools.chain.from_iterable(
        one.shape for one in values if isinstance(one, Tensor)
    )
    found: ShapeEnv | None = next(
        (size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None
    )
    return found


def _is_of_code(guard: Any) -> bool:
    """Whether the code of a module has asked, of the model or of ``torch.nn``, and no operation."""
    where = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    path = Path(getattr(where, "filename", None) or "unknown")
    return not path.is_relative_to(_TORCH) or path.is_relative_to(_TORCH / "nn")


_TORCH = Path(torch.__file__).parent


def _is_limit(question: Any) -> bool:
    """Whether a question is for a limit of one size."""
    if not isinstance(question, sympy.core.relational.Relational):
        return False
    left, right = question.args
    difference = left - right
    sizes = difference.free_symbols
    linear = len(sizes) == 1 and difference.diff(*sizes).is_number
    return linear and not isinstance(question, sympy.Eq | sympy.Ne)


def _always_holds(question: Any) -> bool:
    """Whether a question has the same answer for all sizes from 2 on, as far as a grid of them shows.

    The grid has small sizes and those next to every number in the question.
    """
    near = [int(one) for one in question.atoms(sympy.Integer)]
    sizes = sorted({*range(2, 18), *(n + d for n in near for d in (-1, 0, 1) if n + d > 1)})
    symbols = sorted(question.free_symbols, key=str)
    picks = random.Random(0)
    grid = [[size] * len(symbols) for size in sizes]
    grid += [
        [size if one is symbol else picks.choice(sizes) for one in symbols]
        for symbol in symbols
        for size in sizes
    ]
    return all(question.subs(list(zip(symbols, one, strict=True))) == sympy.true for one in grid)


def _attempts(
    arguments: Arguments, dynamic_shapes: object, labels: Sequence[Mapping[int, Any]], *, task: bool
) -> list[tuple[str, tuple[dict[int, Any], ...]]]:
    tensors = arguments.tensors
    if dynamic_shapes is not None:
        # Named axes are a demand: Dim.DYNAMIC fails where Dim.AUTO would quietly fix the axis.
        wanted = tuple(
            {axis: Dim.DYNAMIC if axis in named else Dim.STATIC for axis in range(tensor.ndim)}
            for tensor, named in zip(tensors, labels, strict=True)
        )
        named = "the axes of the task" if task else "the given dynamic_shapes"
        return [(f"with {named}", wanted)]
    every = tuple(dict.fromkeys(range(tensor.ndim), Dim.AUTO) for tensor in tensors)
    batch = tuple(
        {axis: Dim.STATIC if axis else Dim.AUTO for axis in range(tensor.ndim)}
        for tensor in tensors
    )
    fixed = tuple(dict.fromkeys(range(tensor.ndim), Dim.STATIC) for tensor in tensors)
    return [
        ("with every axis dynamic", every),
        ("with the first axis dynamic", batch),
        ("with fixed axes", fixed),
    ]


def _reason(
    failures: Sequence[str], witness: Witness, task: bool, size: int, dim: Any, spec: object
) -> str:
    """Why an axis is fixed.

    Args:
        failures: What came of the ways to trace with more dynamic axes.
        witness: What became of those that were offered.
        task: Whether a task has said which are dynamic.
        size: Its size in the example.
        dim: Its size in the program.
        spec: What it was offered as.
    """
    if spec is not Dim.STATIC:
        if size == 1:
            return "the example has size 1 here, which torch.export takes for a constant"
        place = witness.place(dim)
        because = "" if place is None else f": {place}"
        return f"the model works with size {size} only{because}"
    if failures:
        return f"the export failed {together(failures)}"
    return "not one that the task varies" if task else "not in dynamic_shapes"


def _read(
    program: ExportedProgram,
    arguments: Arguments,
    specs: Sequence[Mapping[int, Any]],
    labels: Sequence[Mapping[int, str]],
    extras: tuple[Extra, ...],
    reason_of: Callable[[int, Any, object], str],
) -> Trace:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    shapes = [values[name].shape for name in program.graph_signature.user_inputs]
    highs = {
        str(symbol): int(limits.upper)
        for symbol, limits in program.range_constraints.items()
        if limits.upper.is_Integer
    }
    symbols: dict[str, str] = {}
    rows: list[tuple[Axis, ...]] = []
    batch = next((tensor.shape[0] for tensor in arguments.tensors if tensor.ndim), 0)
    own = shapes[: len(arguments.names)]
    inputs = zip(arguments.names, arguments.tensors, own, specs, labels, strict=True)
    for name, tensor, shape, spec, label in inputs:
        row = []
        for axis, (size, dim) in enumerate(zip(tensor.shape, shape, strict=True)):
            symbol = str(dim)
            if symbol.isdigit():  # an int, or a SymInt that the model made constant
                row.append(Axis(size, reason=reason_of(size, dim, spec[axis])))
                continue
            if symbol not in symbols:
                wanted = label.get(axis) or axis_name(name, axis, tensor)
                shared = axis in label or (axis == 0 and size == batch)
                taken = wanted in symbols.values() and not shared
                symbols[symbol] = f"{name}_{wanted}" if taken else wanted
            row.append(Axis(size, symbols[symbol], symbol, highs.get(symbol)))
        rows.append(tuple(row))
    others = {
        str(shape[extra.named_axis]): str(extra.labels[extra.named_axis])
        for extra, shape in zip(extras, shapes[len(own) :], strict=True)
        if extra.named_axis is not None
    }
    return Trace(program, arguments, tuple(rows), symbols, extras=extras, extra_symbols=others)
