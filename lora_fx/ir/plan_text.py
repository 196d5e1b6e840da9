"""A plan as text: what ``print(plan)`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["plan_text"]


def plan_text(plan: Any) -> str:
    """The table of the sites, the totals, and the sections under them.

    Args:
        plan: A :class:`lora_fx.ir.values.Plan`, which is of the layer above.
    """
    lines = [f"captured by {plan.frontend}"]
    lines += [f"  {note}" for note in plan.notes]
    lines += _table(plan.columns, plan.rows())
    total = plan.base_parameters + plan.added_parameters
    share = 100 * plan.trainable_parameters / total if total else 0.0
    lines.append(
        f"{len(plan.sites)} site(s), {plan.trainable_parameters:,} trainable of {total:,} "
        f"parameters ({share:.4f} %)"
    )
    formats = Counter(row.site.quantized for row in plan.sites if row.site.quantized)
    for text, count in Counter(str(one) for one in formats.elements()).items():
        lines.append(f"the base's weight in {text}: {count} site(s)")
    for name, count in (
        ("a trained magnitude (DoRA)", sum(row.dora for row in plan.sites)),
        ("a bias on B (lora_bias)", sum(row.lora_bias for row in plan.sites)),
    ):
        if count:
            lines.append(f"with {name}: {count} site(s)")
    if plan.saved_modules:
        lines.append("trained in full: " + ", ".join(plan.saved_modules))
    for row in plan.tokens:
        whose = f", those of {row.tied}" if row.tied else ""
        lines.append(f"rows trained: {len(row.indices)} of {row.name}{whose}")
    if plan.biases:
        lines.append(f"biases trained: {len(plan.biases)}")
    lines += [f"matched nothing: {target}" for target in plan.unmatched]
    kept = {row.site.weight for row in plan.sites if row.tied}
    tied = [
        (row.name, f"shared with {', '.join(row.site.tied_to)}")
        for row in plan.sites
        if row.site.tied_to and not row.tied and not kept & set(row.site.tied_to)
    ]
    lines += _section("tied weights, untied by a merge", tied)
    lines += _section(
        "tied weights that stay so",
        ((row.name, f"the transposed adapter of {row.tied}") for row in plan.sites if row.tied),
    )
    lines += _section(
        "fused, and a part can be named alone", _fused(row.site for row in plan.sites)
    )
    lines += _section("not selected", ((s.site.name, s.reason) for s in plan.skipped))
    lines += _section("cannot be adapted", ((r.name, r.reason) for r in plan.rejections))
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: tuple[str, ...]) -> str:
        # Names and patterns read from the left, numbers from the right.
        return "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    return [line(columns), "  ".join("-" * w for w in widths), *(line(row) for row in rows)]


def _fused(sites: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """What the outputs of fused weights are cut into, once for each kind of layer."""
    counts = Counter(
        (site.name.rpartition(".")[2], ", ".join(name for name, _ in site.parts))
        for site in sites
        if site.parts
    )
    for (name, parts), count in counts.items():
        yield name, parts + (f" ({count} layers)" if count > 1 else "")


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    listed = [f"  {name}: {reason}" for name, reason in rows]
    return [f"{title} ({len(listed)}):", *listed] if listed else []
