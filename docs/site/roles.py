"""Makes code of the roles in docstrings: ``:func:`lora_fx.merge``` is ``lora_fx.merge`` on a page."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|meth|class|mod|data|attr):`~?(?P<name>[^`]+)`")


class Roles(griffe.Extension):
    """Rewrites each docstring when its object is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """See griffe."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\g<name>`", obj.docstring.value)
