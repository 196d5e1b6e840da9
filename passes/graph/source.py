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

__all__ = ["LIBRARIES", "SCOPES", "bound_by", "compiled", "named_by", "nested", "tree_of"]

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


def _candidates(lines: list[str], code: CodeType) -> Iterator[Any]:
    """Functions in a source that may be that of the code: of the same name, on the same line."""
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
            if isinstance(found, ast.FunctionDef) and found.name == code.co_name:
                yield found
                return
    try:
        whole = _parsed("".join(lines))
    except SyntaxError:
        return
    for node in ast.walk(whole):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        lambdas = code.co_name == "<lambda>" and isinstance(node, ast.Lambda)
        named = isinstance(node, ast.FunctionDef) and node.name == code.co_name
        if (lambdas or named) and first in (node.lineno, *_decorated(node)):
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
    return next((one for one in nested(outer) if one.co_name == code.co_name), None)


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
