"""What every drawn format is made from: nested boxes, and edges between children of one box.

A :class:`Picture` knows nothing of coordinates and file formats. Its :meth:`Picture.to_dict` is
what ``visualize`` writes as ``.json`` (and what the HTML page carries).
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

from lora_fx.config import LoraConfig

__all__ = [
    "Box",
    "Branch",
    "Kind",
    "Made",
    "Picture",
    "SiteRow",
    "State",
    "Target",
    "clean",
    "elide",
    "end_of",
    "follows",
    "human",
    "label_of",
    "name_of",
    "nested",
    "occurring",
    "runs",
    "share_of",
    "times",
]

SCHEMA = "lora_fx.picture/3"

# What XML 1.0 cannot carry, escaped or not.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


_NUMBERED = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


class Kind(StrEnum):
    """What a box stands for; also its class in the style sheet."""

    MODULE = "module"
    OPAQUE = "opaque"
    LEAF = "leaf"
    CALL = "call"
    INPUT = "input"
    OUTPUT = "output"
    OP = "op"
    WEIGHT = "weight"
    BASE = "base"
    DROPOUT = "dropout"
    DOWN = "A"
    UP = "B"
    SCALE = "scale"
    ADD = "add"
    ADAPTER = "adapter"
    SITE = "site"
    SKIPPED = "skipped"
    REJECTED = "rejected"


class State(StrEnum):
    """What becomes of a linear operation, and of a module; also a class in the style sheet."""

    NONE = ""
    ADAPTED = "adapted"
    BASE = "unselected"
    REFUSED = "refused"
    FULL = "full"
    ROWS = "rows"


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """An adapter's part of a linear operation: what stands beside W in a drawing.

    Attributes:
        adapter: Name of the adapter.
        rank, scale: None where neither the plan nor the graph tells.
        dropout: Probability of its dropout.
        kind: Name of the adapter kind.
        weight: Name of the weight, where an operation has several.
        active: Whether it is in the graph that runs.
    """

    adapter: str
    rank: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    kind: str = "lora"
    weight: str = ""
    active: bool = True

    @property
    def words(self) -> str:
        """Rank, scale, dropout and names in one line: ``r 8 · × 2 · p 0.05 · default``."""
        parts = [self.weight] if self.weight else []
        parts += [] if self.kind == "lora" else [self.kind]
        parts += [f"r {self.rank}"] if self.rank else []
        parts += [] if self.scale is None else [f"× {self.scale:.4g}"]
        parts += [f"p {self.dropout:g}"] if self.dropout else []
        name = self.adapter if self.active else f"{self.adapter} (off)".strip()
        parts += [name] if name else []
        return " · ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class SiteRow:
    """A linear operation of the model, for the table and the colors.

    Attributes:
        name: FQN of the operation.
        state: Adapted, not selected or refused.
        pattern: Name of the pattern that found it; empty for a refusal.
        shape: Shape of the weight.
        adapter: Name of the adapter; empty for none.
        rank, scale, dropout, parameters, flops, saved: What the adapter is and costs; zeros for none.
        quantized: How the weight is stored; empty for as it is.
        reason: Why it is not selected, or refused.
        share: ‖ΔW‖ / ‖W‖ with ΔW = s·BA; None where there are no values.
        effective: Effective rank of BA: the exponential of the entropy of its singular values.
        gradient: Norm of the gradient of A and B, if there is one.
        error: Of a merge: units in the last place.
        lost: ‖W - Q‖ / ‖W‖, what quantizing has lost, where W is known.
    """

    name: str
    state: State
    pattern: str = ""
    shape: tuple[int, ...] = ()
    adapter: str = ""
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    parameters: int = 0
    flops: int = 0
    saved: int = 0
    quantized: str = ""
    reason: str = ""
    share: float | None = None
    effective: float | None = None
    gradient: float | None = None
    error: float | None = None
    lost: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What an entry of a configuration can name: a linear operation as it is without adapters, or a refusal.

    Attributes:
        name: FQN of the operation.
        weight: FQN of the weight, where that is not ``name.weight``.
        default: Whether ``target_modules=None`` selects it.
        linear: Whether ``target_modules="all-linear"`` does.
        each_rank: Trainable elements that one more rank costs.
        fixed: Trainable elements that its kind costs at any rank, as a bias on B does.
        attention: FQN of the ``nn.MultiheadAttention`` of which it is a projection.
        width: Output features, where some of them can have an adapter of their own; 0 where they cannot.
        parts: Names of such parts, each with its output features (start, stop).
        reason: Why it cannot be adapted; empty where it can.
    """

    name: str
    weight: str = ""
    default: bool = False
    linear: bool = False
    each_rank: float = 0.0
    fixed: int = 0
    attention: str = ""
    width: int = 0
    parts: tuple[tuple[str, tuple[int, int]], ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A module, or one node of its graph.

    Attributes:
        id: Unique in the picture.
        kind: What it stands for.
        name: What is written on it.
        caption: The small second line: a class, or a weight and its shape.
        fqn: FQN of the module, or of the module whose graph the node is in.
        facts: What hovering shows, as label and value.
        children: What is inside.
        edges: Data flow between children, as pairs of ids.
        flow: Whether the edges say how data flows, else the children are in registration order.
        repeats: FQNs of the equal modules that this one stands for, itself first; empty if it
            stands for itself alone.
        sites: Adapted operations inside, those of all repeats counted.
        trainable, frozen: Elements of parameters inside, those of all repeats counted.
        adapter: Name of the adapter that a node belongs to.
        branches: The adapters on the operation that this box stands for.
        marks: Short words on it that are no color: how the weight is stored, what is shared, what else
            is trained.
        state: What happens to it.
    """

    id: str
    kind: Kind
    name: str
    caption: str = ""
    fqn: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    children: tuple[Box, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    flow: bool = False
    repeats: tuple[str, ...] = ()
    sites: int = 0
    trainable: int = 0
    frozen: int = 0
    adapter: str = ""
    branches: tuple[Branch, ...] = ()
    marks: tuple[str, ...] = ()
    state: State = State.NONE

    def walk(self) -> Iterator[Box]:
        """The box and everything in it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def hover(self) -> str:
        """The facts as lines of text, without those that differ from one version of a library to the next."""
        return "\n".join(f"{label}: {value}" for label, value in self.facts if label != "source")


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A model or a plan, ready to be drawn.

    Attributes:
        title: Class of the model, or what the plan is of.
        facts: The summary, as label and value.
        root: The outermost box.
        legend: The kinds that occur and want explaining, with the explanation.
        notes: Remarks on how the picture came about.
        adapters: Names of the adapters that occur, in the order of their colors.
        sites: Every linear operation of the model.
        targets: What another configuration could name; empty where that is not known.
        config: The configuration that made the picture's adapters, where there is one.
        counted: Whether the boxes count all parameters, and not only those that are known by name.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    root: Box
    legend: tuple[tuple[Kind, str], ...] = ()
    notes: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    sites: tuple[SiteRow, ...] = ()
    targets: tuple[Target, ...] = ()
    config: LoraConfig | None = None
    counted: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for JSON.

        ``boxes`` have something inside, ``nodes`` have not; both name their ``parent`` (None for
        the root). ``edges`` are data flow and name the box whose children they connect.
        """
        boxes: list[dict[str, Any]] = []
        nodes: list[dict[str, Any]] = []
        edges: list[dict[str, str]] = []

        def add(box: Box, parent: str | None) -> None:
            entry: dict[str, Any] = {"id": box.id, "parent": parent, "kind": str(box.kind)}
            entry |= {name: getattr(box, name) for name in ("name", "caption", "fqn")}
            entry |= {"facts": [*map(list, box.facts)], "repeats": [*box.repeats]}
            entry |= {name: getattr(box, name) for name in ("sites", "trainable", "frozen")}
            entry |= {"state": str(box.state), "marks": [*box.marks]}
            entry |= {"branches": [dataclasses.asdict(branch) for branch in box.branches]}
            if box.children:
                boxes.append(entry | {"flow": box.flow, "children": [c.id for c in box.children]})
            else:
                nodes.append(entry | {"adapter": box.adapter})
            edges.extend({"source": a, "target": b, "parent": box.id} for a, b in box.edges)
            for child in box.children:
                add(child, box.id)

        add(self.root, None)
        return {
            "schema": SCHEMA,
            "title": self.title,
            "summary": [list(fact) for fact in self.facts],
            "legend": [[str(kind), text] for kind, text in self.legend],
            "notes": list(self.notes),
            "adapters": list(self.adapters),
            "sites": [dataclasses.asdict(row) | {"state": str(row.state)} for row in self.sites],
            "targets": [dataclasses.asdict(one) for one in self.targets],
            "config": None if self.config is None else self.config.to_dict(),
            "root": self.root.id,
            "boxes": boxes,
            "nodes": nodes,
            "edges": edges,
        }


def clean(text: str) -> str:
    """``text`` without the control characters and lone surrogates that XML and UTF-8 refuse."""
    return _ILLEGAL.sub("\ufffd", text)


def elide(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters, shortened in the middle: both ends tell."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def end_of(box: Box, *, last: bool) -> Box:
    """Where an edge of an open box ends: at its first input, or at its last output."""
    while box.children:
        wanted = Kind.OUTPUT if last else Kind.INPUT
        other = box.children[-1 if last else 0]
        box = next((child for child in box.children if child.kind is wanted), other)
    return box


def human(count: int) -> str:
    """A count in three or four digits: ``6.74 B``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            digits = ".3g" if count < 1000 * size else ".0f"
            return f"{count / size:{digits}} {unit}"
    return str(count)


def share_of(trainable: int, total: int) -> str:
    """How many elements are trained, and what share that is."""
    return human(trainable) + (f" ({100 * trainable / total:.3g} %)" if total else "")


def occurring(legend: tuple[tuple[Kind, str], ...], root: Box) -> tuple[tuple[Kind, str], ...]:
    """Those entries of a legend whose kinds are in a picture."""
    kinds = {box.kind for box in root.walk()}
    return tuple((kind, text) for kind, text in legend if kind in kinds)


def times(shape: tuple[int, ...]) -> str:
    """A shape as ``4096×11008``."""
    return "×".join(str(size) for size in shape) or "scalar"


def name_of(fqns: Sequence[str]) -> str:
    """What is written on a box, of one name or of several: ``layers.0 … layers.31 (×32)``."""
    labels = [label_of(fqn) if fqn else "model" for fqn in fqns]
    return labels[0] if len(fqns) == 1 else f"{labels[0]} … {labels[-1]} (×{len(fqns)})"


def follows(first: str, second: str) -> bool:
    """Whether two names differ only in their last number, and the second counts one on."""
    a, b = _NUMBERED.match(first), _NUMBERED.match(second)
    if a is None or b is None:
        return False
    return (a[1], a[3]) == (b[1], b[3]) and int(b[2]) == int(a[2]) + 1


def runs(names: Sequence[str], digests: Sequence[str]) -> Iterator[range]:
    """Splits siblings into runs that are drawn as one box: equal, and numbered in sequence."""
    start = 0
    for i in range(1, len(names) + 1):
        same = i < len(names) and digests[i] == digests[start] and follows(names[i - 1], names[i])
        if not same:
            yield range(start, i)
            start = i


def label_of(fqn: str) -> str:
    """The last part of a name, with the one before it where it is only a number."""
    parts = fqn.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


# --- nesting --------------------------------------------------------------------------------------


_Path = tuple[str, ...]
"""FQNs of modules, the outermost first."""

Made = Callable[[str, tuple[Box, ...], tuple[tuple[str, str], ...]], Box]
"""Makes the box of a module: of its FQN, what is in it, and the edges in between."""


@dataclasses.dataclass
class _Scope:
    """A module: what is in it, in the order of the first node, as keys."""

    path: _Path
    inside: dict[str, Box | _Scope] = dataclasses.field(default_factory=dict)


def nested(
    placed: Sequence[tuple[_Path, Box]], edges: Iterable[tuple[str, str]], made: Made
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
    places: dict[str, _Path] = {}
    for path, box in placed:
        scope = root
        for depth, fqn in enumerate(path):
            inner = scope.inside.setdefault(f"module {fqn}", _Scope(path[: depth + 1]))
            if isinstance(inner, _Scope):
                scope = inner
        scope.inside[box.id] = box
        places[box.id] = (*(f"module {fqn}" for fqn in path), box.id)
    inside: dict[_Path, dict[tuple[str, str], None]] = defaultdict(dict)
    for one, other in edges:
        source, target = places[one], places[other]
        shared = 0
        while source[shared] == target[shared]:
            shared += 1
        inside[source[:shared]][source[shared], target[shared]] = None
    return _boxes(root, (), inside, made)


def _boxes(
    scope: _Scope, keys: _Path, edges: dict[_Path, dict[tuple[str, str], None]], made: Made
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
