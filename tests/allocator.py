"""What PyTorch's own profiler says about memory: it knows nothing of our ledgers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["allocator_growth"]


def allocator_growth(run: Callable[[], object], trace: Path) -> int:
    """By how many bytes PyTorch's allocator on the CPU grows at most while a function runs."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    return int(max(totals) - (totals[0] - memory[0]["args"]["Bytes"]))
