"""The command line."""

from __future__ import annotations

import io
import sys

from lora_fx.extras import install_command
from lora_fx.versions import warn_untested

__all__ = ["main"]


def main() -> None:
    """Run the command line, or name the missing package."""
    for stream in (sys.stdout, sys.stderr):
        # A pipe on Windows may have an encoding without "×" or "→". Print "?" instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        from lora_fx.tools.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"lora-fx: the command line needs {error.name}: {install_command('lora-fx[cli]')}")
    warn_untested()
    app()
