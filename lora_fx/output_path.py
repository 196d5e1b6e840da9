"""The path of a file to write, refused where it names a folder or a file of another kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lora_fx.errors import LoraFxError, OutputPathError

__all__ = ["output_file"]


def output_file(
    path: object, suffixes: Sequence[str], error: type[LoraFxError] = OutputPathError
) -> Path:
    """The path of a file that is to be written, before anything is.

    Args:
        path: What the caller gave.
        suffixes: Those that the file may have, in lower case.
        error: What is raised.

    Raises:
        OutputPathError: It is no path; it is or names a folder; or it has another suffix. With what to
            give instead.
    """
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or not given:
        found = repr(given) if isinstance(given, str) else f"a {type(path).__name__}"
        raise error(f"path is {found}: give the name of the file to write")
    target = Path(given)
    # A Path does not keep the separator at the end, which says that a folder is meant.
    ends = tuple(one for one in (os.sep, os.altsep) if one)
    if given.endswith(ends) or target.name in ("", "..") or target.is_dir():
        example = target / f"model{suffixes[0]}"
        raise error(f"{given} is a folder: give the name of the file to write in it, as {example}")
    if target.suffix.lower() not in suffixes:
        known = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        has = f"the suffix {target.suffix}" if target.suffix else "no suffix"
        raise error(
            f"{given} has {has}, and the file that is written there has {known}: call it "
            f"{target.with_suffix(suffixes[0])}, say"
        )
    return target
