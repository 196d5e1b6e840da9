"""Rewrites the code of a function so that every operation it executes goes through a recorder.

``torch.fx`` runs a forward on stand-ins and records the operations that reach them. Whatever Python does
without asking the stand-in (``x is y``, ``type(x)``, ``try``, a read of a global) happens once, during the
trace, and never again. So the forward is not run as it is: its source is parsed, and every operation
becomes a call of a method of the recorder, which records it, computes it, or refuses it
(:mod:`.interpret` has the rules). Only what is executed is asked about: an f-string in a ``raise`` that is
not reached does not count. AutoGraph of TensorFlow rewrites functions in the same way.

The source has to be that of the code (:mod:`lora_fx.passes.graph.source`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from lora_fx.passes.graph import SCOPES, bound_by, compiled, nested, tree_of

__all__ = ["IN_PLACE", "RECORDER", "SourceError", "instrumented"]

RECORDER = "_lora_fx_recorder"
"""The name under which rewritten code finds the recorder."""

_BINARY = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.MatMult: "matmul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
    ast.LShift: "lshift",
    ast.RShift: "rshift",
}
IN_PLACE = {operator: f"i{name.rstrip('_')}" for operator, name in _BINARY.items()}
"""Names of the functions of Python that operate in place."""
_UNARY = {ast.USub: "neg", ast.UAdd: "pos", ast.Invert: "invert"}
_COMPARE = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


class SourceError(Exception):
    """Why there is no source to rewrite; the message completes "its forward ..."."""


def instrumented(function: FunctionType, recorder: Any, codes: set[CodeType]) -> FunctionType:
    """The function, with every operation as a call of the recorder.

    Args:
        function: A Python function. It is not touched.
        recorder: What the rewritten code calls.
        codes: Gets the code objects that were made for it, those of inner functions too.

    Returns:
        A function with the same globals, closure and defaults.

    Raises:
        SourceError: If there is no source, or it is not that of the code.
    """
    code = _rewritten(function.__code__, function.__qualname__)
    if isinstance(code, str):
        raise SourceError(code)
    codes.update(nested(code))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(
        _cell(recorder) if name == RECORDER else cells[name] for name in code.co_freevars
    )
    result = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _cell(value: Any) -> Any:
    return (lambda: value).__closure__[0]  # type: ignore[index]


@functools.lru_cache(maxsize=2048)
def _rewritten(code: CodeType, qualname: str) -> CodeType | str:
    """The rewritten code, or why there is none."""
    found = tree_of(code, qualname)
    if isinstance(found, str):
        return found
    tree, scope = found
    made = compiled(_Rewriter(code, scope).rewrite(tree), code, scope, more=(RECORDER,))
    assert isinstance(made, CodeType)
    return made


# --- rewriting --------------------------------------------------------------------------------------


class _Rewriter(ast.NodeTransformer):
    """Puts a call of the recorder in place of every operation."""

    def __init__(self, code: CodeType, owner: str) -> None:
        self._free = frozenset(code.co_freevars)
        self._owner = owner.lstrip("_")
        self._scopes: list[set[str]] = []
        self._outer: list[set[str]] = []  # names that a scope declares to be another one's
        self._first: list[str | None] = []  # the first parameter of each function
        self._count = 0

    def rewrite(self, tree: Any) -> Any:
        """A rewritten copy of a function or lambda."""
        return self._rewrite_scope(_copied(tree))

    # --- scopes

    def _rewrite_scope(self, node: Any) -> Any:
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args]
        every = [*named, *arguments.kwonlyargs]
        every += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
        outer = set(_declared_elsewhere(node))
        bound = ({one.arg for one in every} | set(bound_by(node))) - outer
        # Defaults and decorators belong to the scope around.
        if self._scopes:
            arguments.defaults = [self.visit(one) for one in arguments.defaults]
            arguments.kw_defaults = [
                None if one is None else self.visit(one) for one in arguments.kw_defaults
            ]
        for one in every:
            one.annotation = None
        self._scopes.append(bound)
        self._outer.append(outer)
        self._first.append(named[0].arg if named else None)
        try:
            if isinstance(node, ast.Lambda):
                node.body = self.visit(node.body)
                return node
            node.returns = None
            node.body = self._block(node.body)
            if len(self._scopes) == 1:
                node.body = [*self._entered(arguments), *node.body]
            return node
        finally:
            self._scopes.pop()
            self._outer.pop()
            self._first.pop()

    def _entered(self, arguments: ast.arguments) -> list[ast.stmt]:
        """Tells the recorder of ``*args`` and ``**kwargs``."""
        found = [one.arg for one in (arguments.vararg, arguments.kwarg) if one is not None]
        return [_assign(_stored(name), self._call("variadic", _loaded(name))) for name in found]

    def _block(self, statements: list[Any]) -> list[Any]:
        result: list[Any] = []
        for one in statements:
            new = self.visit(one)
            result.extend(new if isinstance(new, list) else [new])
        return result or [ast.Pass()]

    def _local(self, name: str) -> bool:
        return any(name in scope for scope in self._scopes)

    # --- expressions

    def visit_Name(self, node: ast.Name) -> Any:
        if not isinstance(node.ctx, ast.Load) or self._local(node.id) or node.id == RECORDER:
            return node
        kind = "free" if node.id in self._free else "global_"
        return self._call(kind, ast.Constant(node.id), node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if not isinstance(node.ctx, ast.Load):
            return node
        return self._call("attribute", self.visit(node.value), self._spelled(node.attr))

    def _spelled(self, name: str) -> ast.Constant:
        """The name of an attribute as Python spells it within a class."""
        private = name.startswith("__") and not name.endswith("__")
        return ast.Constant(f"_{self._owner}{name}" if private and self._owner else name)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        return self._call("item", self._holder(node.value), self._index(node.slice))

    def _holder(self, node: Any) -> Any:
        """What one thing is looked up in, and nothing else is done with: that entry alone counts."""
        made = self.visit(node)
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and isinstance(
            made, ast.Call
        ):
            made.args.append(ast.Constant(True))
        return made

    def _index(self, node: Any) -> Any:
        if isinstance(node, ast.Slice):
            ends = [
                ast.Constant(None) if one is None else self.visit(one)
                for one in (node.lower, node.upper, node.step)
            ]
            return self._call("slice", *ends)
        if isinstance(node, ast.Tuple):
            return ast.Tuple([self._index(one) for one in node.elts], ast.Load())
        return self.visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        if (
            isinstance(node.func, ast.Name)
            and node.func.id == "super"
            and not node.args
            and not node.keywords
            and not self._local("super")
        ):
            first = self._first[0]
            if len(self._first) != 1 or first is None:
                return self._refused("calls super() in an inner function")
            return self._call("super_", _loaded("__class__"), _loaded(first))
        args = [
            ast.Starred(self._call("spread", self.visit(one.value)), ast.Load())
            if isinstance(one, ast.Starred)
            else self.visit(one)
            for one in node.args
        ]
        keywords = [
            ast.keyword(one.arg, self.visit(one.value))
            if one.arg is not None
            else ast.keyword(None, self._call("spread", self.visit(one.value)))
            for one in node.keywords
        ]
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "get":
            asked = self._call("attribute", self._holder(function.value), ast.Constant("get"))
        else:
            asked = self.visit(function)
        called = self._call("call", asked, *args)
        called.keywords = keywords
        return called

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        name = ast.Constant(_BINARY[type(node.op)])
        return self._call("binary", name, self.visit(node.left), self.visit(node.right))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ast.UnaryOp(ast.Not(), self._call("truth", value))
        if isinstance(node.operand, ast.Constant):
            return ast.UnaryOp(node.op, value)
        return self._call("unary", ast.Constant(_UNARY[type(node.op)]), value)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        values = [self.visit(one) for one in node.values]
        asked = [self._call("truth", one) for one in values[:-1]]
        return ast.BoolOp(node.op, [*asked, values[-1]])

    def visit_Compare(self, node: ast.Compare) -> Any:
        left, parts = self.visit(node.left), []
        for place, (op, right) in enumerate(zip(node.ops, node.comparators, strict=True)):
            # A chain uses it again.
            inside = isinstance(op, ast.In | ast.NotIn) and place + 1 == len(node.ops)
            value = self._holder(right) if inside else self.visit(right)
            following = value
            if place + 1 < len(node.ops):
                name = self._temporary()
                value, following = ast.NamedExpr(_stored(name), value), _loaded(name)
            parts.append(self._call("compare", ast.Constant(_COMPARE[type(op)]), left, value))
            left = following
        if len(parts) == 1:
            return parts[0]
        asked = [self._call("truth", one) for one in parts[:-1]]
        return ast.BoolOp(ast.And(), [*asked, parts[-1]])

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        test = self._call("truth", self.visit(node.test))
        return ast.IfExp(test, self.visit(node.body), self.visit(node.orelse))

    def visit_FormattedValue(self, node: ast.FormattedValue) -> Any:
        spec = node.format_spec
        if isinstance(spec, ast.JoinedStr):
            spec = ast.JoinedStr([self.visit(one) for one in spec.values])
        return ast.FormattedValue(self._call("part", self.visit(node.value)), node.conversion, spec)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        parts = [self.visit(one) for one in node.values]
        return self._call("joined", ast.JoinedStr(parts))

    def visit_Starred(self, node: ast.Starred) -> Any:
        if not isinstance(node.ctx, ast.Load):
            return node
        return ast.Starred(self._call("iterate", self.visit(node.value)), ast.Load())

    def visit_Dict(self, node: ast.Dict) -> Any:
        keys: list[ast.expr | None] = [
            None if one is None else self._call("key", self.visit(one)) for one in node.keys
        ]
        values = [
            self._call("spread", self.visit(value)) if key is None else self.visit(value)
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        return ast.Dict(keys, values)

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        return self._rewrite_scope(node)

    def visit_Await(self, node: ast.Await) -> Any:
        return self._refused("waits for something")

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Any:
        return ast.NamedExpr(node.target, self.visit(node.value))

    def _comprehension(self, node: Any) -> Any:
        bound: set[str] = set()
        generators = []
        for place, one in enumerate(node.generators):
            if one.is_async:
                return self._refused("waits for something")
            # The first iterable belongs to the scope around.
            source = self.visit(one.iter) if place == 0 else None
            if place == 0:
                self._scopes.append(bound)
            bound.update(_names(one.target))
            source = self.visit(one.iter) if source is None else source
            tests: list[ast.expr] = [self._call("truth", self.visit(test)) for test in one.ifs]
            made = ast.comprehension(one.target, self._call("iterate", source), tests, 0)
            generators.append(made)
        fields = {
            name: self.visit(getattr(node, name))
            for name in ("elt", "key", "value")
            if hasattr(node, name)
        }
        if "key" in fields:
            fields["key"] = self._call("key", fields["key"])
        self._scopes.pop()
        return type(node)(**fields, generators=generators)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    # --- statements

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        if node.decorator_list:
            return _statement(self._refused("decorates an inner function"))
        return self._rewrite_scope(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        value = self.visit(node.value)
        if len(node.targets) == 1:
            return self._stored(node.targets[0], value)
        name = self._temporary()
        made: list[Any] = [_assign(_stored(name), value)]
        for target in node.targets:
            made.extend(self._stored(target, _loaded(name)))
        return made

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return [] if node.value is None else self._stored(node.target, self.visit(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        name = ast.Constant(IN_PLACE[type(node.op)])
        value = self.visit(node.value)
        if isinstance(node.target, ast.Name):
            left = self.visit_Name(ast.Name(node.target.id, ast.Load()))
            return self._stored(node.target, self._call("in_place", name, left, value))
        holder = self._temporary()
        made: list[Any] = [_assign(_stored(holder), self.visit(node.target.value))]
        if isinstance(node.target, ast.Attribute):
            key = self._spelled(node.target.attr)
            read, write = "attribute", "set_attribute"
        else:
            place = self._temporary()
            made.append(_assign(_stored(place), self._index(node.target.slice)))
            key, read, write = _loaded(place), "item", "set_item"  # type: ignore[assignment]
        old = self._call(read, _loaded(holder), key)
        new = self._call("in_place", name, old, value)
        return [*made, _statement(self._call(write, _loaded(holder), key, new))]

    def _stored(self, target: Any, value: Any) -> list[Any]:
        if isinstance(target, ast.Name):
            if any(target.id in scope for scope in self._outer[-1:]) and not any(
                target.id in scope for scope in self._scopes[:-1]
            ):
                written = self._call("write", ast.Constant(target.id), value)
                return [_statement(written)]
            return [_assign(_stored(target.id), value)]
        if isinstance(target, ast.Attribute):
            holder = self.visit(target.value)
            spelled = self._spelled(target.attr)
            return [_statement(self._call("set_attribute", holder, spelled, value))]
        if isinstance(target, ast.Subscript):
            holder, key = self.visit(target.value), self._index(target.slice)
            return [_statement(self._call("set_item", holder, key, value))]
        if isinstance(target, ast.Starred):
            return self._stored(target.value, value)
        names = [self._temporary() for _ in target.elts]
        stars = [place for place, one in enumerate(target.elts) if isinstance(one, ast.Starred)]
        unpacked = self._call(
            "unpack",
            value,
            ast.Constant(len(target.elts)),
            ast.Constant(stars[0] if stars else None),
        )
        made: list[Any] = [
            _assign(ast.Tuple([_stored(name) for name in names], ast.Store()), unpacked)
        ]
        for one, name in zip(target.elts, names, strict=True):
            made.extend(self._stored(one, _loaded(name)))
        return made

    def visit_Delete(self, node: ast.Delete) -> Any:
        made: list[Any] = []
        for target in node.targets:
            if isinstance(target, ast.Name):
                made.append(ast.Delete([target]))
            else:
                what = getattr(target, "attr", "an item")
                made.append(_statement(self._refused(f"deletes {what}")))
        return made

    def visit_For(self, node: ast.For) -> Any:
        source = self._call("iterate", self.visit(node.iter))
        body = self._block(node.body)
        target: Any = node.target
        if not isinstance(target, ast.Name):
            name = self._temporary()
            body = [*self._stored(target, _loaded(name)), *body]
            target = _stored(name)
        orelse = self._block(node.orelse) if node.orelse else []
        return ast.For(target, source, body, orelse)

    def visit_While(self, node: ast.While) -> Any:
        test = self._call("truth", self.visit(node.test))
        orelse = self._block(node.orelse) if node.orelse else []
        return ast.While(test, self._block(node.body), orelse)

    def visit_If(self, node: ast.If) -> Any:
        test = self._call("truth", self.visit(node.test))
        orelse = self._block(node.orelse) if node.orelse else []
        return ast.If(test, self._block(node.body), orelse)

    def visit_Assert(self, node: ast.Assert) -> Any:
        test = self._call("truth", self.visit(node.test))
        return ast.Assert(test, None if node.msg is None else self.visit(node.msg))

    def visit_With(self, node: ast.With) -> Any:
        made: list[Any] = []
        for one in node.items:
            entered = self._call("enter", self.visit(one.context_expr))
            if one.optional_vars is None:
                made.append(_statement(entered))
            else:
                made.extend(self._stored(one.optional_vars, entered))
        return [*made, *self._block(node.body)]

    def visit_Try(self, node: ast.Try) -> Any:
        return [
            _statement(self._call("caught")),
            *self._block([*node.body, *node.orelse, *node.finalbody]),
        ]

    visit_TryStar = visit_Try  # type: ignore[assignment]  # the same to a trace

    def visit_Match(self, node: Any) -> Any:
        subject = self._call("subject", self.visit(node.subject))
        cases = []
        for case in node.cases:
            if not all(map(_plain_pattern, ast.walk(case.pattern))):
                return _statement(self._refused("matches the structure of a value"))
            guard = None
            if case.guard is not None:
                guard = self._call("truth", self.visit(case.guard))
            cases.append(ast.match_case(case.pattern, guard, self._block(case.body)))
        return ast.Match(subject, cases)

    def _unknown(self, node: ast.AST) -> Any:
        return _statement(
            self._refused(f"has a statement that is not known ({type(node).__name__})")
        )

    visit_AsyncFor = visit_AsyncWith = visit_AsyncFunctionDef = visit_ClassDef = _unknown
    visit_TypeAlias = _unknown

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visits what is below; a node that is not known is refused when it runs."""
        if isinstance(node, ast.expr) and not isinstance(node, _PLAIN_EXPRESSIONS):
            return self._refused(f"has an expression that is not known ({type(node).__name__})")
        return super().generic_visit(node)

    # --- nodes

    def _call(self, method: str, *args: Any) -> ast.Call:
        return ast.Call(ast.Attribute(_loaded(RECORDER), method, ast.Load()), list(args), [])

    def _refused(self, what: str) -> ast.Call:
        return self._call("refuse_here", ast.Constant(what))

    def _temporary(self) -> str:
        self._count += 1
        name = f"_lora_fx_{self._count}"
        # A walrus in a comprehension binds in the function around it.
        self._scopes[0].add(name)
        return name


_PLAIN_EXPRESSIONS = (
    ast.Constant,
    ast.List,
    ast.Set,
    ast.Tuple,
    ast.Yield,
    ast.YieldFrom,
)


def _plain_pattern(node: ast.AST) -> bool:
    """Whether a pattern, or a part of one, compares with literals and looks at nothing else."""
    return isinstance(
        node,
        ast.MatchValue
        | ast.MatchSingleton
        | ast.MatchOr
        | ast.MatchAs
        | ast.Constant
        | ast.UnaryOp
        | ast.USub,
    )


def _copied(node: Any) -> Any:
    """A copy of a tree: the original may be looked at again."""
    if isinstance(node, list):
        return [_copied(one) for one in node]
    if not isinstance(node, ast.AST):
        return node
    made = type(node)(**{name: _copied(value) for name, value in ast.iter_fields(node)})
    return ast.copy_location(made, node)


def _names(target: Any) -> Iterator[str]:
    return (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _declared_elsewhere(scope: Any) -> Iterator[str]:
    """The names that a function declares ``global`` or ``nonlocal``."""
    pending = [] if isinstance(scope, ast.Lambda) else list(scope.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Global | ast.Nonlocal):
            yield from node.names
        if not isinstance(node, (*SCOPES, ast.ClassDef)):
            pending.extend(ast.iter_child_nodes(node))


def _loaded(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _stored(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def _assign(target: ast.expr, value: ast.expr) -> ast.Assign:
    return ast.Assign([target], value)


def _statement(value: ast.expr) -> ast.Expr:
    return ast.Expr(value)
