"""The build backend: setuptools, whose editable installs type checkers read, and whose wheels are clean.

``passes/``, ``export/`` and ``tools/`` are imported as ``lora_fx.passes`` and so on. setuptools maps them by
an import hook, which only a running Python sees. So an editable install also has a folder of links that looks
like an installed package (``.editable/``), and a ``.pth`` file that leads there; mypy and pyright read it.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_ROOT = Path(__file__).resolve().parent
_LINKS = _ROOT / ".editable"
_PTH = "lora_fx_for_type_checkers.pth"


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Builds setuptools' wheel, without modules that an earlier build has left and that are gone by now."""
    shutil.rmtree(_ROOT / "build" / "lib", ignore_errors=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Builds setuptools' editable wheel and puts the path of the links into it; see PEP 660."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    try:
        _link()
    except OSError:  # a file system without links: the package runs all the same
        return name
    _add(Path(wheel_directory, name), _PTH, f"{_LINKS}\n".encode())
    return name


def _link() -> None:
    """Makes the folder of links anew: those of lora_fx one by one, since the other folders go into it."""
    shutil.rmtree(_LINKS, ignore_errors=True)
    package = _LINKS / "lora_fx"
    package.mkdir(parents=True)
    inside = [one for one in (_ROOT / "lora_fx").iterdir() if one.name != "__pycache__"]
    for one in (*inside, *(_ROOT / folder for folder in ("passes", "export", "tools"))):
        (package / one.name).symlink_to(one, target_is_directory=one.is_dir())


def _add(wheel: Path, name: str, content: bytes) -> None:
    """Puts one more file into a wheel, and into its list of files."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as old:
        entries = {one: old.read(one) for one in old.namelist()}
    record = next(one for one in entries if one.endswith(".dist-info/RECORD"))
    entries[record] += f"{name},sha256={digest},{len(content)}\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for one, data in {**entries, name: content}.items():
            new.writestr(one, data)
