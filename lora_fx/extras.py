"""Optional packages: imported on first use, or refused with the command that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.versions import warn_untested

__all__ = ["check_installed", "install_command", "is_installed", "load_optional"]


def install_command(*requirements: str) -> str:
    """Return the command that installs a requirement, or the first of several alternatives.

    Args:
        requirements: Requirements for pip, such as ``lora-fx[quant]``.

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
        purpose: The feature that needs it, as the subject of a sentence: ``"the export"``.
        requirements: Alternative requirements that install it.
        attribute: A name in the module to return; some packages import it lazily.
        error: The type to raise.

    Returns:
        The module, or the attribute.

    Raises:
        LoraFxError: If the package is missing or does not load. The message has the command that installs it.
    """
    warn_untested([module.partition(".")[0]])
    try:
        loaded = importlib.import_module(module)
        return getattr(loaded, attribute) if attribute else loaded
    except Exception as reason:
        # A package whose libraries do not load or are incompatible may raise any exception.
        package = module.partition(".")[0]
        if isinstance(reason, ModuleNotFoundError):
            missing = str(reason.name).partition(".")[0]
            if missing != package and not is_installed(missing):  # one that the package needs
                package, requirements = missing, (missing,)
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
    """Raise if a package is not installed, without importing any.

    Args:
        packages: The names to look for.
        purpose: The feature that needs them, as for :func:`load_optional`.
        requirements: Alternative requirements that install all of them.
        error: The type to raise.

    Raises:
        LoraFxError: If packages are missing. The message has the command that installs them.
    """
    packages = tuple(packages)
    missing = sorted(name for name in packages if not is_installed(name))
    if missing:
        raise error(f"{purpose} needs {', '.join(missing)}: {install_command(*requirements)}")
    warn_untested(packages)


def is_installed(package: str) -> bool:
    """Return True if a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules has None for it, or a module without a spec
        return False
