"""Optional packages: imported when they are needed, or refused with the command that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.versions import warn_untested

__all__ = ["check_installed", "install_command", "is_installed", "load_optional"]


def install_command(*requirements: str) -> str:
    """Return the command that installs a requirement, or the first of several that each suffice.

    Args:
        requirements: What pip takes, as ``lora-fx[quant]``.

    Returns:
        ``pip install 'lora-fx[gpu]', or 'lora-fx[cpu]'``, for example.
    """
    quoted = [f"'{name}'" if set(name) & set("[]<>=~! ") else name for name in requirements]
    return f"pip install {', or '.join(quoted)}"


def load_optional(
    module: str,
    purpose: str,
    *requirements: str,
    attribute: str = "",
    error: type[LoraFxError] = ConfigError,
) -> Any:
    """Import a module of an optional package.

    Args:
        module: The name to import.
        purpose: What needs it, as the subject of a sentence: ``"the export"``.
        requirements: What installs it; each of them suffices.
        attribute: A name in the module that is wanted; some packages import when they are asked for it.
        error: The type to raise.

    Returns:
        The module, or the attribute.

    Raises:
        LoraFxError: The package is missing or does not load. The message has the command that installs it.
    """
    warn_untested([module.partition(".")[0]])
    try:
        loaded = importlib.import_module(module)
        return getattr(loaded, attribute) if attribute else loaded
    except Exception as reason:
        # A package whose libraries do not load, or do not fit each other, raises anything.
        package = module.partition(".")[0]
        raise error(
            f"{purpose} needs {package}, which cannot be imported ({reason}): "
            f"{install_command(*requirements)}"
        ) from reason


def check_installed(
    packages: Iterable[str],
    purpose: str,
    *requirements: str,
    error: type[LoraFxError] = ConfigError,
) -> None:
    """Raise if a package is not installed. Imports none of them.

    Args:
        packages: The names to look for.
        purpose: What needs them, as for :func:`load_optional`.
        requirements: What installs all of them; each suffices.
        error: The type to raise.

    Raises:
        LoraFxError: Packages are missing. The message has the command that installs them.
    """
    packages = tuple(packages)
    missing = sorted(name for name in packages if not is_installed(name))
    if missing:
        raise error(f"{purpose} needs {', '.join(missing)}: {install_command(*requirements)}")
    warn_untested(packages)


def is_installed(package: str) -> bool:
    """Return True if a package is there to be imported. Does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules has None for it, or a module without a spec
        return False
