"""A plan as a picture: what would be adapted, and what not and why, as a tree of names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from lora_fx.ir import Plan, PlannedSite, Rejection, Skipped, join
from lora_fx.tools.draw.picture import Box, Kind, Picture, fold_label, human, label_of, runs, times

__all__ = ["picture_of_plan"]

_LEGEND: tuple[tuple[Kind, str], ...] = (
    (Kind.SITE, "adapted"),
    (Kind.SKIPPED, "not selected"),
    (Kind.REJECTED, "cannot be adapted"),
)


@dataclasses.dataclass
class _Name:
    """A node of the tree of names: what is at it, and what is below it."""

    row: PlannedSite | Skipped | Rejection | None = None
    below: dict[str, _Name] = dataclasses.field(default_factory=dict)

    def signature(self) -> object:
        """Equal where two names look the same in the picture."""
        below = tuple((name, child.signature()) for name, child in self.below.items())
        return (_look(self.row), below)


def picture_of_plan(plan: Plan) -> Picture:
    """Draws a plan."""
    root = _Name()
    rows: list[tuple[str, PlannedSite | Skipped | Rejection]] = [
        *((row.name, row) for row in plan.sites),
        *((row.site.name, row) for row in plan.skipped),
        *((row.name, row) for row in plan.rejections),
    ]
    for name, row in rows:
        place = root
        for atom in name.split(".") if name else ():
            place = place.below.setdefault(atom, _Name())
        if place.row is None:
            place.row = row
    box = _Painter().paint([root], [""])
    kinds = {each.kind for each in box.walk()}
    total = plan.base_parameters + plan.added_parameters
    share = f" ({100 * plan.trainable_parameters / total:.3g} %)" if total else ""
    unmatched = [f"matched nothing: {target}" for target in plan.unmatched]
    return Picture(
        title="Plan",
        facts=(
            ("sites", str(len(plan.sites))),
            ("not selected", str(len(plan.skipped))),
            ("cannot be adapted", str(len(plan.rejections))),
            ("parameters", human(total)),
            ("trainable", human(plan.trainable_parameters) + share),
            ("captured by", plan.frontend),
        ),
        root=box,
        legend=tuple((kind, text) for kind, text in _LEGEND if kind in kinds),
        notes=tuple(unmatched),
    )


class _Painter:
    def __init__(self) -> None:
        self._ids = itertools.count()

    def paint(self, nodes: list[_Name], fqns: list[str]) -> Box:
        node, fqn = nodes[0], fqns[0]
        box_id = f"n{next(self._ids)}"
        names, below = list(node.below), list(node.below.values())
        looks = [repr(child.signature()) for child in below]
        children = tuple(
            self.paint([below[i] for i in run], [join(fqn, names[i]) for i in run])
            for run in runs(names, looks)
        )
        kind, caption, facts = _describe(node.row)
        name = label_of(fqn) if fqn else "model"
        if len(fqns) > 1:
            name = fold_label(tuple(label_of(each) for each in fqns))
            facts = (("stands for", f"{len(fqns)} equal, the last is {fqns[-1]}"), *facts)
        planned = [row for each in nodes for row in _rows(each) if isinstance(row, PlannedSite)]
        return Box(
            id=box_id,
            kind=kind if not children else Kind.OPAQUE,
            name=name,
            caption=caption,
            fqn=fqn,
            facts=(("name", fqn or "(root)"), *facts),
            children=children,
            repeats=tuple(fqns) if len(fqns) > 1 else (),
            sites=len(planned),
            trainable=sum(row.parameters for row in planned),
        )


def _rows(node: _Name) -> Iterator[PlannedSite | Skipped | Rejection]:
    if node.row is not None:
        yield node.row
    for child in node.below.values():
        yield from _rows(child)


def _short(reason: str) -> str:
    return reason if len(reason) <= 40 else reason[:39].rstrip() + "…"


def _look(row: PlannedSite | Skipped | Rejection | None) -> object:
    kind, caption, _ = _describe(row)
    if isinstance(row, PlannedSite):
        return (kind, caption, row.site.pattern, row.alpha, row.scale, row.dropout)
    return (kind, caption)


def _describe(
    row: PlannedSite | Skipped | Rejection | None,
) -> tuple[Kind, str, tuple[tuple[str, str], ...]]:
    if isinstance(row, PlannedSite):
        site = row.site
        shape = times(site.shape)
        return (
            Kind.SITE,
            f"r {row.rank} · {shape}" if row.rank else f"{row.kind} · {shape}",
            (
                ("pattern", site.pattern),
                ("weight", f"{site.place} {shape}"),
                ("rank", str(row.rank)),
                ("scale", f"{row.scale:g}"),
                ("dropout", f"{row.dropout:g}"),
                ("trainable", f"{row.parameters:,}"),
                ("extra FLOPs a token", f"{row.flops:,}"),
                ("calls", str(len(site.calls))),
            ),
        )
    if isinstance(row, Skipped):
        site = row.site
        shape = times(site.shape)
        facts = (("pattern", site.pattern), ("weight", f"{site.place} {shape}"))
        return Kind.SKIPPED, _short(row.reason), (*facts, ("not selected", row.reason))
    if isinstance(row, Rejection):
        return Kind.REJECTED, _short(row.reason), (("cannot be adapted", row.reason),)
    return Kind.OPAQUE, "", ()
