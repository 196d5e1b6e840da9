"""Puts the nodes of a flat graph into boxes for the modules that they come from."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from lora_fx.tools.draw.picture import Box, Kind, State

__all__ = ["Made", "nested"]

Path = tuple[str, ...]
"""FQNs of modules, the outermost first."""

Made = Callable[[str, tuple[Box, ...], tuple[tuple[str, str], ...]], Box]
"""Makes the box of a module: of its FQN, what is in it, and the edges in between."""


@dataclasses.dataclass
class _Scope:
    """A module: what is in it, in the order of the first node, as keys."""

    path: Path
    inside: dict[str, Box | _Scope] = dataclasses.field(default_factory=dict)


def nested(
    placed: Sequence[tuple[Path, Box]], edges: Iterable[tuple[str, str]], made: Made
) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...]]:
    """Nests boxes.

    An edge is in the innermost module that holds both of its ends. A module whose nodes run in between those
    of another one is left and entered again: of edges in both directions, those are drawn that go on in the
    order of the nodes.

    Args:
        placed: Each box with the modules that it comes from, in the order in which they run.
        edges: Pairs of their ids.
        made: Makes the box of a module.

    Returns:
        What is outermost, and the edges in between.
    """
    root = _Scope(())
    places: dict[str, Path] = {}
    for path, box in placed:
        scope = root
        for depth, fqn in enumerate(path):
            inner = scope.inside.setdefault(f"module {fqn}", _Scope(path[: depth + 1]))
            if isinstance(inner, _Scope):
                scope = inner
        scope.inside[box.id] = box
        places[box.id] = (*(f"module {fqn}" for fqn in path), box.id)
    inside: dict[Path, dict[tuple[str, str], None]] = defaultdict(dict)
    for one, other in edges:
        source, target = places[one], places[other]
        shared = 0
        while source[shared] == target[shared]:
            shared += 1
        inside[source[:shared]][source[shared], target[shared]] = None
    return _boxes(root, (), inside, made)


def _boxes(
    scope: _Scope, keys: Path, edges: dict[Path, dict[tuple[str, str], None]], made: Made
) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...]]:
    boxes: dict[str, Box] = {}
    for key, one in scope.inside.items():
        if isinstance(one, Box):
            boxes[key] = one
            continue
        children, inner = _boxes(one, (*keys, key), edges, made)
        boxes[key] = _alone(made(one.path[-1], children, inner))
    order = {key: place for place, key in enumerate(boxes)}
    found = edges.get(keys, {})
    kept = tuple((boxes[a].id, boxes[b].id) for a, b in found if order[a] < order[b])
    return tuple(boxes.values()), kept


def _alone(box: Box) -> Box:
    """A module that is one node is that node, under its own name."""
    if len(box.children) != 1 or box.children[0].children:
        return box
    (node,) = box.children
    caption = f"{node.name} {node.caption}".strip()
    kind = Kind.SITE if node.state is State.ADAPTED else Kind.LEAF
    told = {label for label, _ in node.facts}
    facts = (*node.facts, *(fact for fact in box.facts if fact[0] not in told))
    return dataclasses.replace(
        node, name=box.name, caption=caption, kind=kind, fqn=box.fqn, facts=facts
    )
