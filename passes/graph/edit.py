"""The loop of every pass that edits graphs one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from lora_fx.ir import Capture, PassResult, Region

__all__ = ["edit_graphs"]


def edit_graphs(capture: Capture, edit: Callable[[Region], fx.Graph | None]) -> PassResult:
    """Edits each graph of a capture once: equal layers share theirs before and after.

    Args:
        capture: What to edit. It stays as it is.
        edit: Gives an edited copy of a region's graph, or None where there is nothing to do.
    """
    known: dict[int, fx.Graph | None] = {}
    regions = dict(capture.regions)
    for fqn, region in regions.items():
        key = id(region.graph)
        if key not in known:
            known[key] = edit(region)
        if (graph := known[key]) is not None:
            regions[fqn] = dataclasses.replace(region, graph=graph)
    if all(graph is None for graph in known.values()):
        return PassResult(capture, False)
    return PassResult(dataclasses.replace(capture, regions=regions), True)
