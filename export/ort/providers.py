"""Finding out whether an execution provider of ONNX Runtime can work here, and if not, why.

``get_available_providers()`` lists what was compiled in, not what will start. So the libraries that
the CUDA provider needs are read from the provider itself and tried one by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib.metadata
import io
import logging
import mmap
import struct
from pathlib import Path
from typing import Any

from lora_fx.errors import ProviderError

__all__ = [
    "PROVIDERS",
    "check_provider",
    "import_onnxruntime",
    "missing_cuda_libraries",
    "wheel_conflict",
]

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

_log = logging.getLogger("lora_fx")


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ProviderError: It is not installed, with the extra to install.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime cannot be imported ({error}): pip install 'lora-fx[gpu]' for CUDA, or "
            f"'lora-fx[cpu]'"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left of the shared folder after one of two wheels was uninstalled.
        raise ProviderError(
            "the installation of ONNX Runtime is damaged (no InferenceSession in it): pip "
            "uninstall onnxruntime onnxruntime-gpu, then pip install 'lora-fx[gpu]' or "
            "'lora-fx[cpu]'"
        )
    return onnxruntime


def check_provider(runtime: Any, provider: str) -> None:
    """Refuse a provider that cannot work on this machine.

    Args:
        runtime: The onnxruntime module.
        provider: "cuda" or "cpu".

    Raises:
        ProviderError: With what is missing and what to do about it.
    """
    if provider not in PROVIDERS:
        near = difflib.get_close_matches(str(provider).lower(), PROVIDERS, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ProviderError(
            f"unknown provider {provider!r}: the providers are 'cuda' and 'cpu'.{hint}"
        )
    available = runtime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise ProviderError(
            f"this ONNX Runtime ({runtime.__version__}) has no {provider} provider, only "
            f"{', '.join(available)}. "
            + (wheel_conflict() or "pip uninstall onnxruntime, then pip install 'lora-fx[gpu]'")
        )
    if provider == "cuda":
        _check_cuda(runtime, available)


def wheel_conflict() -> str:
    """What to do about both ONNX Runtime wheels being installed; "" if they are not."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if len(found) < 2:
        return ""
    return (
        f"{' and '.join(found)} are both installed and overwrite each other: pip uninstall both, "
        f"then pip install 'lora-fx[gpu]'"
    )


def missing_cuda_libraries(runtime: Any) -> list[str]:
    """Shared libraries that the CUDA provider asks for and the loader does not find."""
    folder = Path(runtime.__file__).parent / "capi"
    library = folder / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        return [library.name]
    names = sorted(name for name in _needed(library) if name.startswith(("libcu", "libnv")))
    return [name for name in names if not _loads(name)]


def _needed(library: Path) -> list[str]:
    # The DT_NEEDED entries of a 64-bit little-endian ELF file, the only kind NVIDIA's wheels have.
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            return []
        (table,) = struct.unpack_from("<Q", data, 0x28)
        size, count = struct.unpack_from("<HH", data, 0x3A)
        sections = [
            struct.unpack_from("<IIQQQQI", data, table + size * index) for index in range(count)
        ]
        for _, kind, _, _, offset, length, link in sections:
            if kind != 6:  # SHT_DYNAMIC
                continue
            strings = sections[link][4]
            entries = struct.iter_unpack("<QQ", data[offset : offset + length])
            starts = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
            return [data[start : data.find(b"\0", start)].decode() for start in starts]
    return []


def _check_cuda(runtime: Any, available: list[str]) -> None:
    words = io.StringIO()
    # It prints what it cannot load instead of raising; the libraries are tried below.
    with contextlib.redirect_stdout(words):
        runtime.preload_dlls()
    for line in filter(None, map(str.strip, words.getvalue().splitlines())):
        _log.debug("onnxruntime.preload_dlls: %s", line)
    conflict = wheel_conflict()
    missing = missing_cuda_libraries(runtime)
    if not missing:
        if conflict:
            _log.warning(conflict)
        return
    remedy = []
    if "libcuda.so.1" in missing:
        remedy.append("libcuda.so.1 comes with the NVIDIA driver, so this machine has none")
    if missing != ["libcuda.so.1"]:
        version = getattr(runtime, "cuda_version", "") or "of the version in their names"
        remedy.append(
            f"the others come with CUDA {version} and cuDNN 9: pip install "
            f"'onnxruntime-gpu[cuda,cudnn]', or import a torch built on that CUDA first"
        )
    if conflict:
        remedy.append(conflict)
    raise ProviderError(
        f"the cuda provider cannot start: {', '.join(missing)} cannot be loaded. "
        f"{'; '.join(remedy)}. ONNX Runtime {runtime.__version__} here has {', '.join(available)}; "
        f"provider='cpu' runs without CUDA"
    )


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
