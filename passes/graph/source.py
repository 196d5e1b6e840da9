"""The source of a function as a syntax tree, as far as it is known to be that of its code.

A file may have been edited since it was imported, or another tool may have rewritten the code (pytest does it
to ``assert``). So the source is compiled, and compared with the bytecode, before it is believed.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import linecache
import operator
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = [
    "LIBRARIES",
    "SCOPES",
    "bound_by",
    "classes_told",
    "compiled",
    "named_by",
    "nested",
    "tree_of",
]

LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "lora_fx"}
"""Packages of Python whose code is no part of a model."""

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nested(code: CodeType) -> Iterator[CodeType]:
    """Code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def named_by(function: FunctionType) -> Iterator[tuple[str, str, str, Any]]:
    """What the code of a function names: globals, and what it may ask of modules of Python among them.

    The modules of :data:`LIBRARIES` are not looked into.

    Yields:
        The words, as ``helpers.TABLE``; the module of Python in which it lies, and its name there; the value.
    """
    for code in nested(function.__code__):
        pending = [("", function.__globals__.get("__name__", ""), function.__globals__)]
        done: set[int] = set()
        for words, module, held in pending:
            for name in code.co_names:
                if name not in held or (words and name.startswith("__")):
                    continue
                value, here = held[name], f"{words}.{name}" if words else name
                yield here, module, name, value
                if isinstance(value, ModuleType) and id(value) not in done:
                    done.add(id(value))
                    if value.__name__.partition(".")[0] not in LIBRARIES:
                        pending.append((here, value.__name__, vars(value)))


def tree_of(code: CodeType, qualname: str) -> tuple[Any, str] | str:
    """The syntax tree of a function, and the class that spells its private names; or why there is none.

    Args:
        code: The code of the function.
        qualname: Its qualified name.

    Returns:
        The tree, which is not to be changed, and the name of the class, empty for none; or words that
        complete "its forward ...".
    """
    if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return "is asynchronous"
    lines = linecache.getlines(code.co_filename)
    if not lines:
        return f"has no source that can be read ({code.co_name}, {code.co_filename})"
    for tree in _candidates(lines, code):
        owner = qualname.split(".")[-2:-1]
        scope = owner[0] if owner and owner[0] != "<locals>" and _mangles(tree) else ""
        for imported in _importable(tree, lines):
            made = compiled(tree, code, scope, imported)
            if made is not None and _same(made, code):
                return tree, scope
    return f"is not what its source says ({code.co_name}, {code.co_filename})"


_TELLS = frozenset({"type", "__class__"})


def classes_told(function: FunctionType) -> Iterator[type | None]:
    """The classes that a function compares the class of an object with: ``type(x) is Block``.

    ``isinstance`` compares none in this sense, and a class that is only called, passed on or asked for its
    name is not told apart.

    Args:
        function: A function of Python.

    Yields:
        A class, or None where it may be any.
    """
    code = function.__code__
    if not any(_TELLS & {*one.co_names} for one in nested(code)):
        return
    found = tree_of(code, function.__qualname__)
    if isinstance(found, str):
        yield None
        return
    tree = found[0]
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    asked = [(node, subject) for node in ast.walk(tree) if (subject := _asked_class_of(node))]
    for node, subject in tuple(asked):
        # A variable that holds the class stands for it.
        if isinstance(at := parents.get(node), ast.Assign):
            names = {one.id for one in at.targets if isinstance(one, ast.Name)}
            loads = (one for one in ast.walk(tree) if isinstance(one, ast.Name) and one.id in names)
            asked += [(one, subject) for one in loads if isinstance(one.ctx, ast.Load)]
    given = {name for one in nested(code) for name in one.co_varnames[: one.co_argcount]}
    given -= {*code.co_varnames[:1]}
    # What is passed to a forward is a tensor or a number; what it takes from the model may be a module.
    passed = {node for node, one in asked if isinstance(one, ast.Name) and one.id in given}
    for node, _ in asked:
        others = _compared_with(node, parents)
        if others is None:
            continue
        values = [value for one in others for value in _classes_in(one, function)]
        yield from values
        if not values and passed.isdisjoint((node, *others)):
            yield None


def _asked_class_of(node: ast.AST) -> ast.AST | None:
    """The object whose class an expression asks for; None for any other expression."""
    if isinstance(node, ast.Attribute) and node.attr == "__class__":
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type":
        return node.args[0] if len(node.args) == 1 else None
    return None


def _compared_with(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> list[ast.AST] | None:
    """What a class is compared with, or looked up in; None where it is not."""
    below, at = node, parents.get(node)
    while isinstance(at, ast.Tuple | ast.List | ast.Set):
        below, at = at, parents.get(at)
    if isinstance(at, ast.Compare):
        return [one for one in (at.left, *at.comparators) if one is not below]
    if isinstance(at, ast.Subscript) and at.slice is below:
        return [at.value]
    if isinstance(at, ast.Call) and below in at.args:
        name = getattr(at.func, "id", getattr(at.func, "attr", ""))
        if name == "get" and isinstance(at.func, ast.Attribute):
            return [at.func.value]
        return [] if name == "isinstance" and below is not at.args[0] else None
    return [] if isinstance(at, ast.Match) else None


def _classes_in(node: ast.AST, function: FunctionType) -> Iterator[type]:
    """The classes that an expression of names stands for; none where that is not known."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        for one in node.elts:
            yield from _classes_in(one, function)
        return
    steps: list[str] = []
    while isinstance(node, ast.Attribute):
        steps.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return
    names = inspect.getclosurevars(function)
    known = {**names.builtins, **function.__globals__, **names.nonlocals}
    value = known.get(node.id)
    for step in reversed(steps):
        value = getattr(value, step, None)
    held = value if isinstance(value, tuple | list | set | frozenset | dict) else (value,)
    yield from (one for one in held if isinstance(one, type))


def _candidates(lines: list[str], code: CodeType) -> Iterator[Any]:
    """Yield the functions of a source that begin on the line of the code.

    Their names do not matter: PyTorch 2.15 calls the code of a decorated function as the decorator.
    """
    first = code.co_firstlineno
    if code.co_name != "<lambda>":
        try:
            block = "".join(inspect.getblock(lines[first - 1 :]))
            # Not dedented: that would change what is in strings of several lines.
            indented = block[:1].isspace()
            tree = ast.parse(f"if True:\n{block}" if indented else block)
        except (SyntaxError, IndexError):
            tree = None
        if tree is not None:
            ast.increment_lineno(tree, first - 1 - indented)
            body: Any = tree.body[0].body if indented else tree.body  # type: ignore[attr-defined]
            found = body[0] if body else None
            if isinstance(found, ast.FunctionDef):
                yield found
                return
    try:
        whole = _parsed("".join(lines))
    except SyntaxError:
        return
    kind = ast.Lambda if code.co_name == "<lambda>" else ast.FunctionDef
    for node in ast.walk(whole):
        if isinstance(node, kind) and first in (node.lineno, *_decorated(node)):
            yield node


@functools.lru_cache(maxsize=8)
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _decorated(node: Any) -> list[int]:
    return [one.lineno for one in getattr(node, "decorator_list", ())]


def _importable(tree: ast.AST, lines: list[str]) -> Iterator[Iterable[str]]:
    """What the module may import of the names on which the function calls methods.

    Python compiles ``name.method()`` in another way where the module imports ``name``.
    """
    called = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
    }
    yield called
    if called:
        yield ()
    if len(called) > 1:
        try:
            whole = _parsed("".join(lines))
        except SyntaxError:
            return
        yield called & set(bound_by(whole, only_imports=True))


def compiled(
    tree: Any, code: CodeType, scope: str, imported: Iterable[str] = (), more: Iterable[str] = ()
) -> Any:
    """The code of a function in the scopes in which it was written, or None.

    Args:
        tree: The function.
        code: The code whose free names it has.
        scope: The class in which private names are spelled out; empty for none.
        imported: Names that the module imports.
        more: Further names that are those of variables around the function.
    """
    is_lambda = isinstance(tree, ast.Lambda)
    if is_lambda:
        body: list[ast.stmt] = [ast.Expr(tree)]
    else:
        bare = ast.FunctionDef(**{**dict(ast.iter_fields(tree)), "decorator_list": []})
        bare.returns = None
        body = [ast.copy_location(bare, tree)]
    free = [name for name in code.co_freevars if name.isidentifier()]
    if scope:
        body = [_scope(f"class {scope}", body)]
        free = [name for name in free if name != "__class__"]
    free.extend(more)
    head = f"def _lora_fx_factory({', '.join(free)})"
    made = _scope(head, [*body, ast.Return(ast.Constant(None))])
    imports: list[ast.stmt] = [ast.Import([ast.alias(name)]) for name in sorted(imported)]
    module = ast.fix_missing_locations(ast.Module([*imports, made], []))
    flags = code.co_flags & _FUTURES
    try:
        outer = compile(module, code.co_filename, "exec", flags=flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    name = "<lambda>" if is_lambda else tree.name
    return next((one for one in nested(outer) if one.co_name == name), None)


_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


def _mangles(tree: ast.AST) -> bool:
    """Whether names in it mean something else within a class: ``self.__name``."""
    for node in ast.walk(tree):
        for name in (getattr(node, "attr", ""), getattr(node, "id", ""), getattr(node, "arg", "")):
            if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
                return True
    return False


def _scope(head: str, body: list[ast.stmt]) -> ast.stmt:
    """A class or a function, by its first line."""
    made: Any = ast.parse(f"{head}: pass").body[0]
    made.body = body
    return made  # type: ignore[no-any-return]


_COMPARED = tuple(
    f"co_{name}" for name in ["code", "names", "varnames", "freevars", "cellvars", "exceptiontable"]
)


def _same(made: CodeType, code: CodeType) -> bool:
    """Whether two code objects do the same: all but names of files, lines and annotations."""
    if any(getattr(made, name) != getattr(code, name) for name in _COMPARED):
        return False
    if len(made.co_consts) != len(code.co_consts):
        return False
    for mine, its in zip(made.co_consts, code.co_consts, strict=True):
        if isinstance(mine, CodeType) and isinstance(its, CodeType):
            if not _same(mine, its):
                return False
        elif type(mine) is not type(its) or repr(mine) != repr(its):
            return False
    return True


def bound_by(scope: Any, *, only_imports: bool = False) -> Iterator[str]:
    """The names that a function, or a module, binds itself."""
    pending = [scope.body] if isinstance(scope, ast.Lambda) else list(scope.body)
    while pending:
        node = pending.pop()
        if only_imports and not isinstance(node, ast.Import | ast.ImportFrom):
            if isinstance(node, ast.stmt) and not isinstance(node, (*SCOPES, ast.ClassDef)):
                pending.extend(ast.iter_child_nodes(node))
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        elif isinstance(node, ast.Lambda):
            continue
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((one.asname or one.name).partition(".")[0] for one in node.names)
        elif (isinstance(node, ast.ExceptHandler) and node.name) or (
            isinstance(node, ast.MatchAs | ast.MatchStar) and node.name
        ):
            yield node.name
        if isinstance(node, _COMPREHENSIONS):
            # Targets are its own; a walrus in it binds here.
            pending.extend(one for one in ast.walk(node) if isinstance(one, ast.NamedExpr))
            continue
        pending.extend(ast.iter_child_nodes(node))
