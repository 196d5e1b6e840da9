"""The stages of an export: how long each took, and who is told that it begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["Stages"]

_log = logging.getLogger("lora_fx")


class Stages:
    """One stage is open at a time.

    Attributes:
        seconds: Wall-clock seconds of each stage, in order; one that came twice has both.
    """

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._open: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        """End the open stage and begin another."""
        self.stop()
        self._open = (stage, time.perf_counter())
        _log.info("export: %s", stage)
        if self._progress is not None:
            self._progress(stage)

    def stop(self) -> None:
        """End the open stage."""
        if self._open is not None:
            stage, began = self._open
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            self._open = None
