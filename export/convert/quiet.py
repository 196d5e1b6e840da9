"""What torch says on stderr about an export that fails: its exception says it, and so do we."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from torch.export import _trace

__all__ = ["without_chatter"]

# The first warns of empty lists that torchlib itself writes, the last that it has no advice on a branch
# on values.
_LOGGERS = ("onnx_ir._convenience", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """No whole graphs and no warnings that nobody can do anything about, inside the block."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # It prints the graph so far, once for each of its wrappers. The name is that module's alone, and
    # exports run one at a time.
    vars(_trace)["print"] = _nothing
    try:
        yield
    finally:
        vars(_trace).pop("print", None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _nothing(*_: object, **__: object) -> None:
    """In the place of ``print``."""
