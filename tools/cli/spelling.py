"""Arguments of Python, as messages of the library name them, spelt as options of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["as_options"]

# Not inside a call, which is Python as a whole.
_ARGUMENT = re.compile(
    r"(?<![\w.(])(?<!, )(?P<name>\w+)=(?P<value>'[^'\s]*'|True|False|\d+(?:\.\d+)?\b)"
)


def as_options(message: str, commands: Iterable[Any]) -> str:
    """``adapters='inputs'`` as ``--adapters inputs``, where a command has such an option.

    Args:
        message: Of an error.
        commands: Those of the application.
    """
    options = {
        str(one.name): one
        for command in commands
        for one in command.params
        if one.param_type_name == "option"
    }

    def spelt(match: re.Match[str]) -> str:
        option, value = options.get(match["name"]), match["value"]
        if option is None:
            return match[0]
        if not option.is_flag:
            return f"{option.opts[0]} {value.strip(chr(39))}"
        names = option.opts if value == "True" else option.secondary_opts
        return str(names[0]) if names and value in ("True", "False") else match[0]

    return _ARGUMENT.sub(spelt, message)
