"""Examine the installation or an ONNX file for ``lora-fx doctor``, and print the findings."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from lora_fx.errors import LoraFxError
from lora_fx.export import providers
from lora_fx.export.inspection import Finding, State, examine_file
from lora_fx.formats import formats
from lora_fx.tools.cli import console
from lora_fx.tools.threads import thread_advice
from lora_fx.versions import NEWEST, untested

__all__ = ["EXTRAS", "examine", "show"]

_DEPENDENCY = re.compile(r"""(?P<package>[\w.-]+).*\bextra == ["'](?P<extra>\w+)""")
_NOT_FOR_USERS = ("test", "lint")


def _packages_of_extras() -> dict[str, list[str]]:
    packages: dict[str, list[str]] = {}
    for line in (importlib.metadata.requires("lora-fx") or ()) if _version("lora-fx") else ():
        match = _DEPENDENCY.match(line)
        if (
            match is not None
            and match["extra"] not in _NOT_FOR_USERS
            and match["package"] != "lora-fx"
        ):
            packages.setdefault(match["extra"], []).append(match["package"])
    return packages


# The CUDA provider opens this library at its first convolution, so it is not among its linked libraries.
_CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
_BASE = ("torch", "networkx", "numpy", "safetensors")


def examine(file: Path | None = None) -> list[Finding]:
    """Check the installation, or an ONNX file, for problems. Change nothing and use no network."""
    if file is not None:
        return examine_file(file)
    return [*_python(), *_torch(), *_runtime(), *_formats(), *_extras()]


def _python() -> Iterator[Finding]:
    topic = "versions"
    yield Finding(topic, "lora-fx", State.OK, _version("lora-fx") or "not installed")
    yield Finding(
        topic, "python", State.OK, f"{platform.python_version()}, {platform.platform(terse=True)}"
    )
    for package in _BASE:
        version = _version(package)
        if version and package == "torch":
            # The metadata of a wheel may lack the build, such as +cu130.
            version = torch.__version__
        state = State.OK if version else State.PROBLEM
        remedy = "" if version else f"pip install {package}"
        yield Finding(topic, package, state, version or "missing", remedy)
    for name in NEWEST:
        if message := untested(name):
            yield Finding(topic, name, State.NOTE, "not tested", f"tested with {message}")


def _torch() -> Iterator[Finding]:
    topic = "PyTorch"
    built: Any = torch.version.cuda
    if built is None:
        yield Finding(topic, "CUDA", State.NOTE, "this build of PyTorch has none")
    elif not torch.cuda.is_available():
        yield Finding(topic, "CUDA", State.NOTE, f"built for {built}, but no device can be used")
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding(topic, "CUDA", State.OK, f"{built}: {', '.join(names)}")
    advice = thread_advice()
    state = State.NOTE if advice else State.OK
    yield Finding(topic, "threads", state, str(torch.get_num_threads()), advice)


def _runtime() -> Iterator[Finding]:
    topic = "ONNX Runtime"
    conflict = providers.wheel_conflict()
    if conflict:
        yield Finding(topic, "wheels", State.PROBLEM, "two in one folder", conflict)
    try:
        runtime = providers.import_onnxruntime()
    except LoraFxError as error:
        absent = not (_version("onnxruntime") or _version("onnxruntime-gpu"))
        state = State.NOTE if absent else State.PROBLEM
        yield Finding(topic, "onnxruntime", state, "cannot be used", str(error))
        return
    wheel = "onnxruntime-gpu" if _version("onnxruntime-gpu") else "onnxruntime"
    yield Finding(topic, wheel, State.OK, str(runtime.__version__))
    available = runtime.get_available_providers()
    yield Finding(topic, "compiled in", State.OK, ", ".join(available))
    for short, name in providers.PROVIDERS.items():
        if short == "webgpu" and name not in available:
            continue  # it is in a separate wheel that few users need
        yield _provider(topic, runtime, short)
    if providers.PROVIDERS["cuda"] in available:
        yield from _libraries(runtime)


def _provider(topic: str, runtime: Any, short: str) -> Finding:
    try:
        providers.check_provider(runtime, short)
    except LoraFxError as error:
        # Without a device there is nothing to repair.
        broken = short == "cpu" or _has_device()
        state = State.PROBLEM if broken else State.NOTE
        why = "cannot start" if broken else "cannot start; no NVIDIA device here"
        return Finding(topic, f"provider {short}", state, why, str(error) if broken else "")
    return Finding(topic, f"provider {short}", State.OK, "its libraries are there")


def _libraries(runtime: Any) -> Iterator[Finding]:
    missing = providers.missing_cuda_libraries(runtime)
    library = providers.cuda_library(runtime)
    needed = providers._needed(library) if library.is_file() else []
    names = {name for name in needed if name.startswith(("libcu", "libnv"))}
    if not providers._loads(_CUDNN):
        missing = [*missing, _CUDNN]
    for name in sorted({*names, *missing, _CUDNN}):
        lost = State.PROBLEM if _has_device() else State.NOTE
        state = lost if name in missing else State.OK
        detail = "not found by the loader" if name in missing else "loads"
        yield Finding("CUDA libraries", name, state, detail)


def _formats() -> Iterator[Finding]:
    """Yield a finding for each format of quantized weights: whether its library is installed."""
    for known in formats():
        if known.title:
            version = _version(known.library)
            state = State.OK if version else State.NOTE
            yield Finding(
                "formats", known.library, state, known.title, "" if version else "missing"
            )


def _has_device() -> bool:
    return torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*"))


def _extras() -> Iterator[Finding]:
    runtime = any(_version(package) for package in ("onnxruntime", "onnxruntime-gpu"))
    for extra, packages in EXTRAS.items():
        if extra == "quant" and sys.platform == "darwin":
            packages = [package for package in packages if package != "bitsandbytes"]
        versions = {package: _version(package) for package in packages}
        detail = ", ".join(
            f"{package} {version or '(missing)'}" for package, version in versions.items()
        )
        complete = all(versions.values())
        # Users need one of the two wheels, never both.
        needless = extra in ("gpu", "cpu") and runtime
        remedy = "" if complete or needless else f"pip install 'lora-fx[{extra}]'"
        state = State.OK if complete else State.NOTE
        yield Finding("extras", extra, state, detail, remedy)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


EXTRAS: Mapping[str, Sequence[str]] = _packages_of_extras()
"""Packages of each extra of the project. If an extra includes others, their packages are left out."""


def show(findings: Sequence[Finding], problems: int) -> None:
    """Print findings as a table, and the number of problems."""
    styles = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "bold red"}
    table = console.table("", "", "", "")
    table.show_header, table.columns[0].style = False, "bold"
    for column in table.columns[:3]:
        column.no_wrap = True
    topic = ""
    for finding in findings:
        heading = "" if finding.topic == topic else finding.topic
        if heading and topic:
            table.add_section()
        topic = finding.topic
        detail = Text(finding.detail)
        if finding.remedy:
            detail.append(f"\n{finding.remedy}", "yellow")
        table.add_row(heading, finding.name, Text(finding.state, styles[finding.state]), detail)
    console.output().print(table)
    if problems:
        console.say(f"{problems} problem(s)", "bold red")
    else:
        console.say("no problems", "green")
