"""Export of a model and one call to a program with as many dynamic axes as possible.

Every axis of every input is offered to ``torch.export`` as dynamic. It keeps the axes that the model
treats as dynamic. It fixes the rest, such as channels whose number a weight sets, or a grid of patches. Each
fixed axis has a reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from lora_fx.export.failures import SizeRecord, here, join_failures, reason_of_failure, record_sizes
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
"""Map from each test, such as ``torch.isnan``, to its result for a finite number."""

_REDUCTIONS = {torch.all: True, Tensor.all: True, torch.any: False, Tensor.any: False}
"""Map from a reduction to the value that it keeps: all of True is True, any of False is False."""


class _FiniteValues(Listener):
    """Listener that answers conditions such as ``torch.isfinite(x).all()`` as if all values were finite.

    Args:
        model: The model that is traced.

    Attributes:
        places: Source locations of the conditions, in order and each once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, None] = {}
        self._modules = {id(module): name for name, module in model.named_modules()}
        # By id. The tensors are kept alive, so that no other tensor gets the same id.
        self._tests: dict[int, tuple[Tensor, bool]] = {}
        self._answers: dict[int, tuple[Tensor, bool]] = {}

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return ``bool(condition)`` as if all values were finite; NotImplemented for other conditions."""
        if func is not Tensor.__bool__ or id(args[0]) not in self._answers:
            return NotImplemented
        self.places.setdefault(str(here(self._modules)))
        return self._answers[id(args[0])][1]

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record the results of tests for finite values, and the reductions of such results."""
        if func in _TESTS:
            self._tests[id(result)] = result, _TESTS[func]
        elif func in _REDUCTIONS and len(args) == 1 and not kwargs and id(args[0]) in self._tests:
            answer = self._tests[id(args[0])][1]
            if _REDUCTIONS[func] == answer:
                self._answers[id(result)] = result, answer


_LONGEST = 32
"""Largest number of operations in the formula of a size, in normal form.

Convolutions, patches and windows that fit have fewer than 10. Padding at each stage can double the formula,
and with it the time of every question that torch.export asks. A formula with 40 operations takes seconds, and
one with 180 takes minutes.
"""


class _ShortFormulas(Listener):
    """Listener that puts sizes into normal form, and ends a trace in which a formula is still too long.

    Args:
        longest: Largest number of operations in a formula; None for no limit.
    """

    def __init__(self, longest: int | None = _LONGEST) -> None:
        super().__init__()
        self._longest = longest
        self._known: set[Any] = set()

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Put the sizes of an operation's results into normal form, and raise if a formula is too long."""
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
"""Number of PyTorch functions after which an open question about sizes ends a trace.

An early question may be settled soon after, if the sizes turn out to be fixed. But reasoning about an
unknown number of windows takes half the time of an export, which is wasted if the question stays open.
"""


class _AnswerableQuestions(Listener):
    """Listener that ends a trace early if a question about sizes stays open.

    A question is a condition on sizes in the model's code. It is open if other known sizes do not answer it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read = 0  # number of guards that were checked
        self._open: list[Any] = []
        self._since = 0  # functions since the first open question

    def hear(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count the calls of functions, and raise if a question has stayed open for many calls."""
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
    """Error for a condition on sizes in the model's code that an ONNX graph cannot evaluate."""

    def __init__(self, question: Any) -> None:
        super().__init__(f"the forward asks of its sizes whether {question}, which a file cannot")


class _NormalSizes(ShapeEnv):
    """Shape environment of torch.export with every formula in normal form."""

    def replace(self, expr: Any) -> Any:  # type: ignore[override]  # torch caches its own
        """Return the formula of a size, which torch reads and asks questions about."""
        return normal_size(super().replace(expr))


@lru_cache(maxsize=4096)
def normal_size(formula: Any) -> Any:
    """Return a formula of sizes as a sum of products of axes and of quotients that are rounded down.

    ``ceil(x / 2)`` becomes ``(x + 1) // 2`` and ``x % 2`` becomes ``x - 2 * (x // 2)``. Nested quotients
    become one. ``max`` and ``min`` drop arguments that another argument always exceeds, or undercuts. So
    padding to whole windows or strides and the cut that undoes it cancel out.

    Args:
        formula: Formula of sympy; its symbols are not negative.
    """
    if formula.is_Atom:
        return formula
    args = [normal_size(arg) for arg in formula.args]
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
        for arg in args:
            if any(_never_negative(sign * (other - arg)) for other in kept):
                continue
            kept = [other for other in kept if not _never_negative(sign * (arg - other))]
            kept.append(arg)
        return kept[0] if len(kept) == 1 else kind(*kept)
    result = formula if tuple(args) == formula.args else kind(*args)
    return result.expand() if result.is_integer and (result.is_Add or result.is_Mul) else result


def _quotient(above: Any, below: Any) -> Any:
    """Return ``above // below`` in normal form, for a positive number ``below``."""
    terms = above.expand().as_coefficients_dict()
    # Divisible terms need no rounding.
    whole = sum(term * (factor // below) for term, factor in terms.items() if not factor % below)
    indivisible = {term: factor for term, factor in terms.items() if factor % below}
    constant = indivisible.pop(sympy.S.One, 0)
    if indivisible and all(factor < 0 for factor in indivisible.values()):
        # The floor of a negative number is a negated ceiling.
        total = sum(term * -factor for term, factor in indivisible.items())
        return (whole - _quotient(total - constant + below - 1, below)).expand()
    whole, constant = whole + constant // below, constant % below
    if len(indivisible) == 1:
        [(term, factor)] = indivisible.items()
        if isinstance(term, _sizes.FloorDiv) and factor == 1 and term.args[1].is_Integer:
            inner, times = term.args
            return (whole + _quotient(inner + constant * times, below * times)).expand()
    total = sum(term * factor for term, factor in indivisible.items()) + constant
    return (whole + _sizes.FloorDiv(total, below)).expand()


def _never_negative(formula: Any) -> bool:
    """Return True if a formula in normal form is at least 0 for all sizes. False means that it is unknown."""
    terms = formula.expand().as_coefficients_dict()
    for term, factor in terms.items():
        if isinstance(term, _sizes.FloorDiv) and term.args[1].is_Integer:
            above, below = term.args
            # The rounding subtracts less than 1 from above / below.
            least = above / below if factor < 0 else (above - below + 1) / below
            return _never_negative(formula - factor * term + factor * least)
    return all(
        factor >= 0 and all(part.is_Integer or part.is_Symbol for part in term.args or (term,))
        for term, factor in terms.items()
        if term != sympy.S.One or factor < 0
    )


_log = logging.getLogger("lora_fx")


@dataclass(frozen=True)
class Trace:
    """Exported program and facts about its inputs.

    Attributes:
        program: The program of a ``FlatModel``.
        arguments: The call that was traced.
        axes: The axes of each input.
        symbols: Names of axes by symbol of torch.export.
        description: The axes that were offered as dynamic, in words.
        attempt: Number of the attempt, counted from most to fewest dynamic axes.
        extras: Inputs of the program after the tensors of the call.
        extra_symbols: The same as ``symbols``, for the axes of ``extras``.
        finite: Source locations of branches that were traced as for finite values.
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
        """Return the sizes and axis names of each input of the program."""
        own = [[axis.label for axis in axes] for axes in self.axes]
        return own + [list(extra.labels) for extra in self.extras]

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of each input, by name of the input and position of the axis."""
        return {
            name: {index: axis.name for index, axis in enumerate(axes) if axis.name is not None}
            for name, axes in zip(self.arguments.names, self.axes, strict=True)
        }

    def axis_limits(self) -> dict[str, int]:
        """Return the largest sizes of dynamic axes by name, for axes with a limit."""
        return {
            axis.name: axis.high
            for axis in itertools.chain(*self.axes)
            if axis.name is not None and axis.high is not None
        }


def widen_batch(arguments: Arguments) -> Arguments:
    """Repeat a batch of one if all tensors share it, because a size of 1 cannot become dynamic."""
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
        model: The model in eval mode.
        arguments: The call to trace.
        dynamic_shapes: None for every axis; else input name to a mapping of axis to a name (or to
            a ``torch.export.Dim``), or a sequence of such mappings in the order of the inputs.
            Axes that it leaves out are fixed; those that it names have to be dynamic.
        failed: Failures of earlier attempts, which are the reasons of axes that stay fixed.
        first: Number of the attempt to begin with.
        task: True if ``dynamic_shapes`` comes from a task and not from the user.

    Returns:
        The trace of the first attempt that works; None if ``first`` is beyond the last attempt.

    Raises:
        ExportError: torch.export cannot capture the model. The message has its reason.
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
                record_sizes(model.model) as sizes,
                _FiniteValues(model.model) as values,
                # A user who names an axis accepts the time that it takes.
                _ShortFormulas(_LONGEST if dynamic_shapes is None else None),
                nullcontext() if task else _AnswerableQuestions(),
            ):
                program = torch.export.export(
                    model,
                    (*arguments.tensors, *(extra.example for extra in extras)),
                    dynamic_shapes=((*specs, *(extra.dims for extra in extras)),),
                    strict=False,
                )
            # Sizes of a task depend on each other: a mask covers the past and the new tokens.
            if not task and (questions := _unanswered(program)):
                raise _UnansweredError(questions[0])
        except _UnansweredError as error:
            failures.append(f"{description}: {error}")
            last: Exception = error
            continue
        except Exception as error:  # noqa: BLE001  # torch.export raises all kinds; kept as a reason
            reason = reason_of_failure(error, sizes, arguments.names, arguments.tensors)
            failures.append(f"{description}: {reason}")
            last = error
            continue
        if len(failures) > len(failed):  # the caller has already logged the earlier ones
            _log.warning(
                "export with fewer dynamic axes: %s", join_failures(failures[len(failed) :])
            )
        reason_of = partial(_reason, failures, sizes, task)
        result = _read(program, arguments, specs, labels, extras, reason_of)
        return dataclasses.replace(
            result, description=description, attempt=attempt, finite=tuple(values.places)
        )
    raise ExportError(
        f"torch.export cannot capture {type(model.model).__name__} ({join_failures(failures)})"
    ) from last


def _asked_of_sizes(
    program: ExportedProgram, counts: Callable[[Any], bool] = lambda guard: True
) -> list[Any]:
    """Return the conditions on sizes that an export assumed to be true, from code or from operations.

    Args:
        program: The exported program.
        counts: Filter of the guards of its ``ShapeEnv``.

    Returns:
        Formulas of sympy over the symbols of the sizes, each once and in order. Formulas that always hold are
        left out.
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
    questions = (environment.simplify(guard.expr) for guard in environment.guards if counts(guard))
    return [question for question in dict.fromkeys(questions) if question != sympy.true]


def _unanswered(program: ExportedProgram) -> list[str]:
    """Return the conditions on dynamic sizes that the file cannot check: it has only the example's branch.

    Limits of a single size are left out, because the file's metadata has them. Conditions inside of
    operations are left out, because the operations compute the same either way.
    """
    return [str(question) for question in _open(_asked_of_sizes(program, _is_of_code))]


def _open(questions: Iterable[Any]) -> list[Any]:
    """Return the conditions on sizes that fail for some sizes. Limits of a single size are left out."""
    return [
        question
        for question in questions
        if not _is_limit(question) and not _always_holds(question)
    ]


def _environment(values: Iterable[Any]) -> ShapeEnv | None:
    """Return the shape environment of the first dynamic size in tensors; None if all sizes are fixed."""
    sizes: Iterator[Any] = itertools.chain.from_iterable(
        value.shape for value in values if isinstance(value, Tensor)
    )
    environment: ShapeEnv | None = next(
        (size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None
    )
    return environment


def _is_of_code(guard: Any) -> bool:
    """Return True if a guard on sizes comes from code of the model or ``torch.nn``, not from an operator."""
    where = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    path = Path(getattr(where, "filename", None) or "unknown")
    return not path.is_relative_to(_TORCH) or path.is_relative_to(_TORCH / "nn")


_TORCH = Path(torch.__file__).parent


def _is_limit(question: Any) -> bool:
    """Return True if a condition limits a single size, such as ``s0 <= 512``."""
    if not isinstance(question, sympy.core.relational.Relational):
        return False
    left, right = question.args
    difference = left - right
    sizes = difference.free_symbols
    linear = len(sizes) == 1 and difference.diff(*sizes).is_number
    return linear and not isinstance(question, sympy.Eq | sympy.Ne)


def _always_holds(question: Any) -> bool:
    """Return True if a condition on sizes holds on a grid of sizes from 2 on, and so probably always.

    The grid has small sizes and the sizes next to every number in the condition.
    """
    near = [int(number) for number in question.atoms(sympy.Integer)]
    sizes = sorted({*range(2, 18), *(n + d for n in near for d in (-1, 0, 1) if n + d > 1)})
    symbols = sorted(question.free_symbols, key=str)
    picks = random.Random(0)
    grid = [[size] * len(symbols) for size in sizes]
    grid += [
        [size if other is symbol else picks.choice(sizes) for other in symbols]
        for symbol in symbols
        for size in sizes
    ]
    return all(
        question.subs(list(zip(symbols, point, strict=True))) == sympy.true for point in grid
    )


def _attempts(
    arguments: Arguments, dynamic_shapes: object, labels: Sequence[Mapping[int, Any]], *, task: bool
) -> list[tuple[str, tuple[dict[int, Any], ...]]]:
    tensors = arguments.tensors
    if dynamic_shapes is not None:
        # Named axes are required: Dim.DYNAMIC fails where Dim.AUTO would silently fix the axis.
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
    failures: Sequence[str], sizes: SizeRecord, task: bool, size: int, dim: Any, spec: object
) -> str:
    """Return the reason why an axis is fixed.

    Args:
        failures: Failures of attempts with more dynamic axes.
        sizes: Record of the symbols of the trace.
        task: True if a task chose the dynamic axes.
        size: Size of the axis in the example.
        dim: Size of the axis in the program.
        spec: The ``Dim`` that was offered for the axis.
    """
    if spec is not Dim.STATIC:
        if size == 1:
            return "the example has size 1 here, which torch.export takes for a constant"
        location = sizes.place(dim)
        because = "" if location is None else f": {location}"
        return f"the model works with size {size} only{because}"
    if failures:
        return f"the export failed {join_failures(failures)}"
    return "not one that the task varies" if task else "not in dynamic_shapes"


def _free_name(owner: str, name: str, taken: Collection[str]) -> str:
    """Return a unique name of an axis: the input's name is prepended until no other axis has the result."""
    while name in taken:
        name = f"{owner}_{name}"
    return name


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
                symbols[symbol] = wanted if shared else _free_name(name, wanted, symbols.values())
            row.append(Axis(size, symbols[symbol], symbol, highs.get(symbol)))
        rows.append(tuple(row))
    extra_symbols = {
        str(shape[extra.named_axis]): str(extra.labels[extra.named_axis])
        for extra, shape in zip(extras, shapes[len(own) :], strict=True)
        if extra.named_axis is not None
    }
    return Trace(
        program, arguments, tuple(rows), symbols, extras=extras, extra_symbols=extra_symbols
    )
