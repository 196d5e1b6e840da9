"""Pictures, the common source of every drawn format: nested boxes, and edges between children of one box.

A :class:`Picture` has no coordinates and is independent of file formats. ``visualize`` writes its
:meth:`Picture.to_dict` as ``.json``, and the HTML page contains it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from lora_fx.config import LoraConfig

__all__ = [
    "Box",
    "Branch",
    "Kind",
    "Made",
    "Picture",
    "Sign",
    "SiteRow",
    "State",
    "Target",
    "added",
    "clean",
    "elide",
    "end_of",
    "follows",
    "human",
    "human_bytes",
    "is_internal",
    "label_of",
    "name_of",
    "nested",
    "runs",
    "share_of",
    "times",
]

SCHEMA = "lora_fx.picture/4"

# Characters that XML 1.0 forbids, escaped or not.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


_NUMBERED = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


class Kind(StrEnum):
    """Kind of a box; also its class in the style sheet."""

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
    """Outcome of a linear operation or a module; also a class in the style sheet."""

    NONE = ""
    ADAPTED = "adapted"
    BASE = "unselected"
    REFUSED = "refused"
    FULL = "full"
    ROWS = "rows"


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """An adapter's part of a linear operation, drawn next to W.

    Attributes:
        adapter: Name of the adapter.
        rank, scale: None if neither the plan nor the graph has them.
        dropout: Probability of its dropout.
        kind: Name of the adapter kind.
        weight: Name of the weight if an operation has several.
        active: True if it is in the graph that runs.
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
        """Return rank, scale, dropout and names in one line: ``r 8 · × 2 · p 0.05 · default``."""
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
        pattern: Name of the pattern that matched it; empty for a refusal.
        shape: Shape of the weight.
        adapter: Name of the adapter; empty without one.
        rank, scale, dropout, parameters, flops, saved: Settings and costs of the adapter; zeros without one.
        quantized: Storage format of a quantized weight, or "".
        reason: The reason why it is not selected, or refused.
        share: ‖ΔW‖ / ‖W‖ with ΔW = s·BA; None without values.
        effective: Effective rank of BA: the exponential of the entropy of its singular values.
        gradient: Norm of the gradient of A and B, if there is one.
        error: Rounding error of a merge in units in the last place.
        lost: ‖W - Q‖ / ‖W‖, the quantization error, if W is known.
        kept: The share of ΔW that a merge has kept after rounding.
        output_error: Error of its output after a merge relative to the effect of the adapter.
        base: FLOPs of the operation without adapters, in the unit of ``flops``; 0 if unknown or none.
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
    kept: float | None = None
    output_error: float | None = None
    base: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A linear operation that a configuration can name, or one that cannot be adapted.

    Attributes:
        name: FQN of the operation.
        weight: FQN of the weight if it is not ``name.weight``.
        default: True if ``target_modules=None`` selects it.
        linear: Rank that ``target_modules="all-linear"`` gives it, as a multiple of ``r``; 0 for no adapter.
        each_rank: Trainable elements per rank.
        fixed: Trainable elements of its kind that do not depend on the rank, such as a bias on B.
        attention: FQN of the ``nn.MultiheadAttention`` that it is a projection of, or "".
        width: Number of output features if a part of them can have an adapter, else 0.
        parts: Names of such parts, each with its output features (start, stop).
        reason: The reason why it cannot be adapted, or "".
    """

    name: str
    weight: str = ""
    default: bool = False
    linear: int = 0
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
        kind: Kind of the module or node.
        name: Text on the box.
        caption: The small second line: a class, or a weight and its shape.
        fqn: FQN of the module, or of the module whose graph contains the node.
        facts: Labels and values that hovering shows.
        children: Boxes inside.
        edges: Data flow between children, as pairs of ids.
        flow: True if the edges show the data flow, else the children are in registration order.
        repeats: FQNs of the equal modules that this box stands for, its own first; empty for a single module.
        sites: Number of adapted operations inside, in all repeats.
        linear: Number of linear operations inside, in all repeats; 0 if unknown.
        trainable, frozen: Elements of parameters inside, in all repeats.
        adapter: Name of the adapter that a node belongs to.
        branches: The adapters on the operation that this box stands for.
        marks: Short words for facts without a color: a weight's storage, sharing, other training.
        state: Outcome for the module or operation.
        parameters: Names of the parameters that the box stands for, without the FQN in front of them.
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
    linear: int = 0
    trainable: int = 0
    frozen: int = 0
    adapter: str = ""
    branches: tuple[Branch, ...] = ()
    marks: tuple[str, ...] = ()
    state: State = State.NONE
    parameters: tuple[str, ...] = ()

    @property
    def is_bare(self) -> bool:
        """Return True if there are linear operations inside, and nothing adapts or trains them."""
        trained = self.sites or self.trainable or self.state in (State.FULL, State.ROWS)
        return bool(self.children and self.linear and not trained)

    @property
    def is_partial(self) -> bool:
        """Return True if some of the linear operations inside are adapted, and others are not."""
        return bool(self.children) and 0 < self.sites < self.linear

    def walk(self) -> Iterator[Box]:
        """Yield the box and everything in it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def hover(self) -> str:
        """Return the facts as lines of text, without those that differ between versions of a library."""
        return "\n".join(f"{label}: {value}" for label, value in self.facts if label != "source")


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A model or a plan, ready to be drawn.

    Attributes:
        title: Class of the model, or name of the plan, report, file or folder.
        facts: Labels and values of the summary.
        root: The outermost box.
        notes: Remarks on the drawing.
        adapters: Names of the adapters that occur, in the order of their colors.
        sites: Every linear operation of the model.
        targets: Operations that another configuration could name; empty if unknown.
        config: The configuration of the picture's adapters, if there is one.
        counted: True if the boxes count all parameters, not only those of listed names.
        unit: Unit of the costs of a single site. It is a position if some of the sites are convolutions.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    root: Box
    notes: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    sites: tuple[SiteRow, ...] = ()
    targets: tuple[Target, ...] = ()
    config: LoraConfig | None = None
    counted: bool = True
    unit: str = "token"

    @property
    def legend(self) -> tuple[Sign, ...]:
        """Return the signs that occur in the picture."""
        boxes = tuple(self.root.walk())
        return tuple(sign for sign in _SIGNS if any(map(sign.occurs, boxes)))

    def to_dict(self) -> dict[str, Any]:
        """Return the picture as dicts and lists for JSON.

        ``boxes`` has the boxes with children, and ``nodes`` those without. Each entry has the id of its
        ``parent``, which is None for the root. ``edges`` has the data flow between two children of a box. The
        ``parent`` of an edge is this box.
        """
        boxes: list[dict[str, Any]] = []
        nodes: list[dict[str, Any]] = []
        edges: list[dict[str, str]] = []

        def add(box: Box, parent: str | None) -> None:
            entry: dict[str, Any] = {"id": box.id, "parent": parent, "kind": str(box.kind)}
            entry |= {name: getattr(box, name) for name in ("name", "caption", "fqn")}
            entry |= {"facts": [*map(list, box.facts)], "repeats": [*box.repeats]}
            entry |= {
                name: getattr(box, name) for name in ("sites", "linear", "trainable", "frozen")
            }
            entry |= {"parameters": [*box.parameters]}
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
            "legend": [[sign.look, sign.text] for sign in self.legend],
            "notes": list(self.notes),
            "adapters": list(self.adapters),
            "sites": [dataclasses.asdict(row) | {"state": str(row.state)} for row in self.sites],
            "targets": [dataclasses.asdict(target) for target in self.targets],
            "config": None if self.config is None else self.config.to_dict(),
            "root": self.root.id,
            "boxes": boxes,
            "nodes": nodes,
            "edges": edges,
        }


def clean(text: str) -> str:
    """Return ``text`` without the control characters and lone surrogates that XML and UTF-8 forbid."""
    return _ILLEGAL.sub("\ufffd", text)


def elide(text: str, limit: int) -> str:
    """Return ``text`` in at most ``limit`` characters, shortened in the middle, because both ends matter."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def end_of(box: Box, *, last: bool) -> Box:
    """Return the innermost box that an edge of ``box`` connects: its output if ``last``, else its input."""
    while box.children:
        wanted = Kind.OUTPUT if last else Kind.INPUT
        other = box.children[-1 if last else 0]
        box = next((child for child in box.children if child.kind is wanted), other)
    return box


def human(count: int) -> str:
    """Return a count in three or four digits: ``6.74 B``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            digits = ".3g" if count < 1000 * size else ".0f"
            return f"{count / size:{digits}} {unit}"
    return str(count)


def human_bytes(count: int) -> str:
    """Return a number of bytes in three or four digits: ``9.7 MB``."""
    text = human(count).replace("B", "G")
    return f"{text}B" if " " in text else f"{text} B"


def added(share: float) -> str:
    """Return a share of extra FLOPs as ``+0.8 %``. The page writes the same."""
    percent = 100 * share
    digits = 1 - math.floor(math.log10(percent)) if 0 < percent < 10 else 0
    # Halves are rounded up, as JavaScript does.
    rounded = math.floor(percent * 10**digits + 0.5) / 10**digits
    return f"+{rounded:.2g} %" if rounded < 10 else f"+{rounded:.0f} %"


def share_of(trainable: int, total: int) -> str:
    """Return the number of trained elements and their share."""
    return human(trainable) + (f" ({100 * trainable / total:.3g} %)" if total else "")


class Sign(NamedTuple):
    """An entry of the legend.

    Attributes:
        look: Style classes of the sample, or the name of a sample without classes (``repeats``, ``count``,
            ``line``).
        text: Explanation.
        occurs: Returns True if a box has the sign.
    """

    look: str
    text: str
    occurs: Callable[[Box], bool]


def _of_state(state: State) -> Callable[[Box], bool]:
    return lambda box: box.state is state


def _of_kind(kind: Kind) -> Callable[[Box], bool]:
    return lambda box: box.kind is kind


def _counts(box: Box) -> bool:
    return bool(box.children and box.sites)


_SIGNS = (
    Sign("site is-adapted", "adapted", _of_state(State.ADAPTED)),
    Sign("line", "rank r, scale ×, dropout p of an adapter", lambda box: bool(box.branches)),
    Sign("leaf is-unselected", "linear, not adapted", _of_state(State.BASE)),
    Sign("leaf is-refused", "cannot be adapted", _of_state(State.REFUSED)),
    Sign("leaf is-full", "trained in full", _of_state(State.FULL)),
    Sign("leaf is-rows", "rows trained", _of_state(State.ROWS)),
    Sign("base", "base operation", _of_kind(Kind.BASE)),
    Sign("dropout", "dropout", _of_kind(Kind.DROPOUT)),
    Sign("A", "A: down to the rank", _of_kind(Kind.DOWN)),
    Sign("B", "B: up again", _of_kind(Kind.UP)),
    Sign("scale", "scale", _of_kind(Kind.SCALE)),
    Sign("add", "add", _of_kind(Kind.ADD)),
    Sign("adapter", "other adapter node", _of_kind(Kind.ADAPTER)),
    Sign("count", "adapters inside", lambda box: _counts(box) and not box.linear),
    Sign(
        "count is-all",
        "all inside are adapted",
        lambda box: _counts(box) and bool(box.linear) and not box.is_partial,
    ),
    Sign("count is-some", "some inside are adapted", lambda box: box.is_partial),
    Sign("count is-none", "none inside is adapted", lambda box: box.is_bare),
    Sign("repeats", "equal modules, drawn once", lambda box: bool(box.repeats)),
    Sign("opaque", "module without a graph", lambda box: box.kind is Kind.OPAQUE and box.flow),
)


_INTERNAL = re.compile(r"node|op|target|call|graph|cast|role|adapter .+")


def is_internal(label: str) -> bool:
    """Return True for the label of a fact about the graph itself, which few readers need."""
    return _INTERNAL.fullmatch(label) is not None


def times(shape: tuple[int, ...]) -> str:
    """Return a shape as ``4096×11008``."""
    return "×".join(str(size) for size in shape) or "scalar"


def name_of(fqns: Sequence[str]) -> str:
    """Return the text on a box for one name or several: ``layers.0 … layers.31 (×32)``."""
    labels = [label_of(fqn) if fqn else "model" for fqn in fqns]
    return labels[0] if len(fqns) == 1 else f"{labels[0]} … {labels[-1]} (×{len(fqns)})"


def follows(first: str, second: str) -> bool:
    """Return True if two names differ only in their last number, and the second is one higher."""
    a, b = _NUMBERED.match(first), _NUMBERED.match(second)
    if a is None or b is None:
        return False
    return (a[1], a[3]) == (b[1], b[3]) and int(b[2]) == int(a[2]) + 1


def runs(names: Sequence[str], digests: Sequence[str]) -> Iterator[range]:
    """Split siblings into runs that are drawn as one box: equal, and numbered in sequence."""
    start = 0
    for i in range(1, len(names) + 1):
        same = i < len(names) and digests[i] == digests[start] and follows(names[i - 1], names[i])
        if not same:
            yield range(start, i)
            start = i


def label_of(fqn: str) -> str:
    """Return the last part of a name, with the part before it if the last is only a number."""
    parts = fqn.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


# --- nesting --------------------------------------------------------------------------------------


_Path = tuple[str, ...]
"""FQNs of modules, the outermost first."""

Made = Callable[[str, tuple[Box, ...], tuple[tuple[str, str], ...]], Box]
"""Function that makes the box of a module from its FQN, its children, and the edges between them."""


@dataclasses.dataclass
class _Scope:
    """A module and its contents by key, in the order of the first node."""

    path: _Path
    inside: dict[str, Box | _Scope] = dataclasses.field(default_factory=dict)


def nested(
    placed: Sequence[tuple[_Path, Box]], edges: Iterable[tuple[str, str]], make_box: Made
) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...]]:
    """Nest boxes in the boxes of their modules.

    An edge is in the innermost module that contains both of its ends. If nodes of two modules alternate,
    there are edges in both directions. Only those in the order of the nodes are drawn.

    Args:
        placed: Each box with the modules that it comes from, in the order in which they run.
        edges: Pairs of their ids.
        make_box: Makes the box of a module.

    Returns:
        The outermost boxes, and the edges between them.
    """
    root = _Scope(())
    paths: dict[str, _Path] = {}
    for path, box in placed:
        scope = root
        for depth, fqn in enumerate(path):
            inner = scope.inside.setdefault(f"module {fqn}", _Scope(path[: depth + 1]))
            if isinstance(inner, _Scope):
                scope = inner
        scope.inside[box.id] = box
        paths[box.id] = (*(f"module {fqn}" for fqn in path), box.id)
    inside: dict[_Path, dict[tuple[str, str], None]] = defaultdict(dict)
    for first, second in edges:
        source, target = paths[first], paths[second]
        shared = 0
        while source[shared] == target[shared]:
            shared += 1
        inside[source[:shared]][source[shared], target[shared]] = None
    return _boxes(root, (), inside, make_box)


def _boxes(
    scope: _Scope, keys: _Path, edges: dict[_Path, dict[tuple[str, str], None]], make: Made
) -> tuple[tuple[Box, ...], tuple[tuple[str, str], ...]]:
    boxes: dict[str, Box] = {}
    for key, item in scope.inside.items():
        if isinstance(item, Box):
            boxes[key] = item
            continue
        children, inner = _boxes(item, (*keys, key), edges, make)
        boxes[key] = _alone(make(item.path[-1], children, inner))
    order = {key: index for index, key in enumerate(boxes)}
    connections = edges.get(keys, {})
    kept = tuple((boxes[a].id, boxes[b].id) for a, b in connections if order[a] < order[b])
    return tuple(boxes.values()), kept


def _alone(box: Box) -> Box:
    """Return the box of a module. If it has a single node, return the node under the module's name."""
    if len(box.children) != 1 or box.children[0].children:
        return box
    (node,) = box.children
    caption = f"{node.name} {node.caption}".strip()
    kind = Kind.SITE if node.state is State.ADAPTED else Kind.LEAF
    labels = {label for label, _ in node.facts}
    facts = (*node.facts, *(fact for fact in box.facts if fact[0] not in labels))
    return dataclasses.replace(
        node,
        name=box.name,
        caption=caption,
        kind=kind,
        fqn=box.fqn,
        facts=facts,
        parameters=box.parameters,
    )
