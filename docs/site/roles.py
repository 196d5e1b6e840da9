"""Extension of griffe for roles in docstrings: ``:func:`lora_fx.merge``` is shown as ``lora_fx.merge``."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|meth|class|mod|data|attr):`~?(?P<name>[^`]+)`")


class Roles(griffe.Extension):
    """Extension that rewrites each docstring when griffe reads its object."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Replace the roles in the docstring of an object. griffe calls this method."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\g<name>`", obj.docstring.value)
