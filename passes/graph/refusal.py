"""What a region says to a call that its graph was not made for and nobody else can answer."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.errors import CaptureError
from lora_fx.passes.graph.reads import Read, conditions_of
from lora_fx.passes.graph.signature import NEEDS_MODULES, WANTS_CACHE

__all__ = ["refusal"]

_OPPOSITE: Mapping[type[ast.cmpop], str] = {
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Lt: ">=",
    ast.Gt: "<=",
}
_PLAIN = (int, float, str, type(None), set, torch.dtype)
_IN_WORDS = {
    NEEDS_MODULES: "a module inside has a hook or checkpoints its activations, and the graph calls "
    "no modules: remove the hook, or switch checkpointing off",
    WANTS_CACHE: "the call, or the model's config, asks for a cache, which a graph does not return: "
    "pass use_cache=False",
    "torch.is_autocast_enabled": "the call is made under autocast, and the graph has the dtypes of "
    "one without",
}


def refusal(
    base: type[nn.Module],
    guards: Sequence[tuple[list[str], tuple[Read, ...], dict[str, Any]]],
    *,
    quantised: bool = False,
) -> Callable[..., Any]:
    """A stand-in for ``base.forward`` that says which condition a call fails.

    Args:
        base: The module's own class.
        guards: Of each graph: expressions over the arguments and ``self`` that are true where it does not
            apply, what it takes for granted, and the globals of its code.
        quantised: Whether the graph is there for a quantised weight, not for an adapter.
    """
    left, remedy = (
        ("does not know its quantised weight", "name it in exclude of lora_fx.quantize")
        if quantised
        else (
            "would leave its adapter out",
            "pass example_inputs that look like this call to rewrite(), with frontend='export'",
        )
    )

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(base.forward).bind(self, *args, **kwargs)
        bound.apply_defaults()
        names = {**bound.arguments, "self": self}
        reasons = [_reasons(self, names, *guard) for guard in guards]
        # What the graph that comes closest asks for.
        closest = min((found for found in reasons if found), key=len, default=[])
        reason, changed = closest[0] if closest else ("it is another call", False)
        if changed:
            raise CaptureError(
                f"the graph of this {base.__name__} holds for what its code has read when it was captured, "
                f"and its own forward {left}: {reason}. Put it back, or make that change before rewrite()"
            )
        raise CaptureError(
            f"{base.__name__}.forward was captured for other calls than this one, and its own "
            f"forward {left}: {reason}. If the model is to be called so, {remedy}"
        )

    return refuse


def _reasons(
    module: nn.Module,
    names: dict[str, Any],
    conditions: list[str],
    reads: tuple[Read, ...],
    known: dict[str, Any],
) -> list[tuple[str, bool]]:
    """Why a graph does not apply, each with whether something has changed since the capture."""
    found: list[tuple[str, bool]] = []
    try:
        found.extend((reason, False) for reason in _failed(conditions, dict(known), dict(names)))
    except (AttributeError, LookupError, TypeError):
        # A condition that only makes sense where those before it hold: the guard does not come to it.
        return found
    return [*found, *((reason, True) for reason in _changed(reads, dict(known), module))]


def _changed(reads: tuple[Read, ...], known: dict[str, Any], module: nn.Module) -> Iterator[str]:
    for read, condition in conditions_of(reads):
        try:
            changed = eval(condition, known, {"self": module})
        except (AttributeError, LookupError, TypeError):
            yield read.words("nothing")
            continue
        for one in read.changes(module) if changed else ():
            try:
                found = _shown(one.found(module))
            except (AttributeError, LookupError):
                found = "nothing"
            yield one.words(found)


def _failed(conditions: list[str], known: dict[str, Any], names: dict[str, Any]) -> Iterator[str]:
    for condition in conditions:
        for atom in _atoms(ast.parse(condition, mode="eval").body):
            # In the order of the guard: what a condition names, those before it have set.
            if _value(atom, known, names):
                yield _in_words(atom, known, names)


def _atoms(tree: ast.expr) -> list[ast.expr]:
    return tree.values if isinstance(tree, ast.BoolOp) else [tree]


def _in_words(atom: ast.expr, known: dict[str, Any], names: dict[str, Any]) -> str:
    called = ast.unparse(atom.func) if isinstance(atom, ast.Call) else ""
    if called in _IN_WORDS:
        return _IN_WORDS[called]
    if isinstance(atom, ast.Name):
        extra = names[atom.id]
        if isinstance(extra, dict):
            return f"it was captured without **{atom.id}, found {sorted(extra)}"
        return f"it was captured without *{atom.id}, found {len(extra)} of them"
    if isinstance(atom, ast.UnaryOp) and isinstance(atom.operand, ast.Call):
        subject = atom.operand.args[0]
        found = _shown(_value(subject, known, names))
        return f"expected {ast.unparse(subject)} to be a tensor, found {found}"
    if not isinstance(atom, ast.Compare):
        return f"{ast.unparse(atom)} is true"
    left = atom.left.target if isinstance(atom.left, ast.NamedExpr) else atom.left
    found = _shown(_value(left, known, names))
    right = atom.comparators[0]
    wanted = _shown(_value(right, known, names))
    name = ast.unparse(left)
    if isinstance(atom.ops[0], ast.Is) and wanted == "None":
        return f"{name} has to be given, found None"
    # A size that has to be that of another argument.
    wanted += f", as {ast.unparse(right)}" if isinstance(right, ast.Subscript) else ""
    return f"expected {name} {_OPPOSITE[type(atom.ops[0])]} {wanted}, found {found}"


def _value(node: ast.expr, known: dict[str, Any], names: dict[str, Any]) -> Any:
    return eval(ast.unparse(node), known, names)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, KeysView):
        return str(sorted(value))
    if isinstance(value, type):
        return value.__name__
    plain = isinstance(value, _PLAIN)
    return repr(value) if plain else f"a {type(value).__name__}"
