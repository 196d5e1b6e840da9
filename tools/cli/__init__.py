"""The command line."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line, or says what it needs."""
    try:
        from lora_fx.tools.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"lora-fx: the command line needs {error.name}: pip install 'lora-fx[cli]'")
    app()
