"""Loading a file on the provider that was asked for, or not at all.

ONNX Runtime answers a request for CUDA that it cannot meet with a session on the CPU and a line on
stderr. Here such a session is never handed out: what is missing is found out and raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import logging
import mmap
import re
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_fx.errors import ConfigError, ExportError, ProviderError, hint
from lora_fx.extras import load_optional

__all__ = [
    "PROVIDERS",
    "SLOW_OR_BROKEN",
    "NodePlacement",
    "Optimizer",
    "PlacementReport",
    "check_arguments",
    "check_provider",
    "cuda_library",
    "import_onnxruntime",
    "load",
    "missing_cuda_libraries",
    "optimizers_off",
    "read_placement",
    "reason_of",
    "session_settings",
    "warn_of_work",
    "wheel_conflict",
]


PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}

_log = logging.getLogger("lora_fx")


class Optimizer(NamedTuple):
    """An optimization of ONNX Runtime that a session goes without.

    Attributes:
        name: Its name there.
        providers: Where.
        since: The first version of ONNX Runtime, (major, minor).
        before: The first version after that where it is fine; None if there is none.
        mark: Bytes that such a file has; b"" for every file.
        reason: What was measured.
    """

    name: str
    providers: tuple[str, ...]
    since: tuple[int, int]
    before: tuple[int, int] | None
    mark: bytes
    reason: str


SLOW_OR_BROKEN = (
    Optimizer(
        "SkipLayerNormFusion",
        ("cpu",),
        (1, 30),
        None,
        b"",
        "the fused kernel is slower than a sum and a layer norm: BERT 6 x 384 takes 0.89 of the time without "
        "it on 1.31 and 1.32, and 1.12 to 1.14 on 1.27",
    ),
    Optimizer(
        "FuseFp16InitializerToFp32NodeTransformer",
        ("cpu", "webgpu"),
        (1, 23),
        (1, 29),
        b"lora_fx.adapters",
        "it ends the process on adapter inputs in fp16, from 1.23.2 to 1.28.0",
    ),
)
"""Measured on the versions that ``reason`` names."""


def optimizers_off(version: str, provider: str, path: Path) -> list[str]:
    """Names of the optimizations that a session of a file goes without.

    Args:
        version: Of ONNX Runtime.
        provider: "cuda", "cpu" or "webgpu".
        path: The file.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else (0, 0)
    chosen = [
        one
        for one in SLOW_OR_BROKEN
        if provider in one.providers
        and number >= one.since
        and (one.before is None or number < one.before)
    ]
    return [one.name for one in chosen if _contains(path, one.mark)]


def _contains(path: Path, mark: bytes) -> bool:
    if not mark or not path.stat().st_size:
        return not mark
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(mark) >= 0


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ProviderError: It is not installed, with the extra to install.
    """
    onnxruntime = load_optional(
        "onnxruntime", "running an ONNX file", "lora-fx[gpu]", "lora-fx[cpu]", error=ProviderError
    )
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left of the shared folder after one of two wheels was uninstalled.
        raise ProviderError(
            "the installation of ONNX Runtime is damaged (no InferenceSession in it): pip "
            "uninstall onnxruntime onnxruntime-gpu, then pip install 'lora-fx[gpu]' or "
            "'lora-fx[cpu]'"
        )
    return onnxruntime


_REMEDIES = {
    "cuda": "pip uninstall onnxruntime, then pip install 'lora-fx[gpu]'",
    "cpu": "pip install 'lora-fx[cpu]'",
    "webgpu": "pip uninstall onnxruntime onnxruntime-gpu, then pip install onnxruntime-webgpu: they share a "
    "folder",
}


def check_provider(runtime: Any, provider: str) -> None:
    """Refuse a provider that cannot work on this machine.

    Args:
        runtime: The onnxruntime module.
        provider: "cuda", "cpu" or "webgpu".

    Raises:
        ProviderError: With what is missing and what to do about it.
    """
    if provider not in PROVIDERS:
        near = hint(str(provider).lower(), PROVIDERS, " Did you mean '{}'?", count=1, cutoff=0.7)
        raise ProviderError(
            f"unknown provider {provider!r}: the providers are 'cuda' (GPUs of NVIDIA), 'cpu' and "
            f"'webgpu'.{near}"
        )
    available = runtime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise ProviderError(
            f"this ONNX Runtime ({runtime.__version__}) has no {provider} provider, only "
            f"{', '.join(available)}. " + (wheel_conflict() or _REMEDIES[provider])
        )
    if provider == "cuda":
        _check_cuda(runtime, available)


def wheel_conflict() -> str:
    """What to do about both ONNX Runtime wheels being installed; "" if they are not."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    if len(found) < 2:
        return ""
    return (
        f"{' and '.join(found)} are both installed and overwrite each other: pip uninstall both, "
        f"then pip install 'lora-fx[gpu]', or the one that has the provider"
    )


def cuda_library(runtime: Any) -> Path:
    """Return where the CUDA provider of this ONNX Runtime lies, if it has one."""
    name = (
        "onnxruntime_providers_cuda.dll"
        if sys.platform == "win32"
        else "libonnxruntime_providers_cuda.so"
    )
    return Path(runtime.__file__).parent / "capi" / name


def missing_cuda_libraries(runtime: Any) -> list[str]:
    """Return the shared libraries that the CUDA provider asks for and the loader does not find.

    What a library of Windows asks for is not read: there ONNX Runtime says it when a session begins.
    """
    library = cuda_library(runtime)
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


def load(runtime: Any, path: Path, provider: str, options: Mapping[str, str], settings: Any) -> Any:
    """A session of ONNX Runtime.

    Args:
        runtime: The onnxruntime module.
        path: The ``.onnx`` file.
        provider: "cuda", "cpu" or "webgpu".
        options: Of the provider.
        settings: ``SessionOptions``, see ``session_settings``.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model.
    """
    check_provider(runtime, provider)
    if path.is_dir():
        inside = ", ".join(sorted(one.name for one in path.glob("*.onnx"))) or "no .onnx file"
        raise ExportError(f"{path} is a folder, which holds {inside}: give the file")
    if not path.is_file():
        raise ExportError(f"there is no file {path}: export a model to it first")
    name = PROVIDERS[provider]
    # Shape arithmetic of a CUDA graph runs on the CPU by design, hence the second provider.
    wanted = [(name, options)] if provider == "cpu" else [(name, options), PROVIDERS["cpu"]]
    try:
        # enable_fallback=0: else ONNX Runtime retries on the CPU by itself.
        session = runtime.InferenceSession(
            str(path),
            settings,
            providers=wanted,
            enable_fallback=0,
            disabled_optimizers=optimizers_off(runtime.__version__, provider, path),
        )
    except Exception as error:
        reason = reason_of(error)
        kind = type(error).__name__
        if options.get("enable_cuda_graph") == "1" and kind in ("Fail", "NotImplemented", "EPFail"):
            raise ProviderError(
                f"{path} cannot be captured as a CUDA graph: {reason}. That takes a model without control "
                f"flow, all of it on the GPU: load it without cuda_graph"
            ) from error
        if kind in ("NotImplemented", "EPFail"):
            bf16 = (
                "bf16 needs provider='cuda'; for the CPU, export with dtype='fp32' or 'fp16'"
                if provider == "cpu" and _has_bf16(path)
                else ""
            )
            raise ProviderError(
                f"the {provider} provider cannot run {path}: {bf16 or reason}"
            ) from error
        if provider == "webgpu" and "WebGPU adapter" in str(error):
            raise ProviderError(
                f"the webgpu provider finds no GPU ({reason.rpartition(': ')[2]}): it needs a driver of "
                "Vulkan, Metal or Direct3D 12; Mesa's lavapipe (mesa-vulkan-drivers) is one in software"
            ) from error
        raise ExportError(
            f"{path} cannot be loaded: {reason}. Is it a whole ONNX file, with its "
            f"external data beside it? Export it again if not"
        ) from error
    actual = session.get_providers()[0]
    if actual != name:
        raise ProviderError(
            f"asked for {provider}, ONNX Runtime gave {actual}: that provider did not "
            f"start on this machine. {wheel_conflict() or 'Run `lora-fx doctor`'}"
        )
    session.disable_fallback()
    return session


def _has_bf16(path: Path) -> bool:
    """Whether a file has weights in bf16; False also where the onnx package is not there to look."""
    try:
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # noqa: BLE001  # the reason of ONNX Runtime is there without this
        return False
    return any(one.data_type == onnx.TensorProto.BFLOAT16 for one in graph.initializer)


def reason_of(error: Exception) -> str:
    """What an error of ONNX Runtime says, without its codes."""
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing …"
    text = str(error).strip().splitlines()
    return text[0].split(" : ", 3)[-1] if text else type(error).__name__


_RECORD_KEY = "session.record_ep_graph_assignment_info"
"""The entry of the session's options without which ONNX Runtime does not say."""

_ASK = "get_provider_graph_assignment_info"
_CPU = "CPUExecutionProvider"

# What ONNX Runtime itself moves from a GPU to the CPU, because it is arithmetic on a few sizes.
# CUDA has a kernel for each of these, so that nothing else brings them there.
_SHAPE_OPERATORS = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div"),
        *("Equal", "Expand", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity"),
        *("Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range"),
        *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice"),
        *("Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"),
    }
)


@dataclass(frozen=True)
class NodePlacement:
    """Where one node runs.

    Attributes:
        name: Its name, after ONNX Runtime's first optimizations.
        operator: What it computes.
        provider: The execution provider.
    """

    name: str
    operator: str
    provider: str


@dataclass(frozen=True)
class PlacementReport:
    """Where the nodes of a session run.

    Attributes:
        nodes: Each of them.
        provider: The provider that was asked for.
    """

    nodes: tuple[NodePlacement, ...]
    provider: str

    @property
    def counts(self) -> dict[str, int]:
        """Provider to number of nodes."""
        return dict(Counter(node.provider for node in self.nodes))

    @property
    def elsewhere(self) -> tuple[NodePlacement, ...]:
        """Nodes that do real work, and not on the provider that was asked for.

        Data goes to another device and back for each. Arithmetic on sizes does not count.
        """
        return tuple(
            node
            for node in self.nodes
            if node.provider != self.provider
            and not (node.provider == _CPU and node.operator in _SHAPE_OPERATORS)
        )

    def __str__(self) -> str:
        lines = [f"{count} nodes on {provider}" for provider, count in self.counts.items()]
        found = self.elsewhere
        if found:
            lines.append(f"{len(found)} of them do work on another device than {self.provider}:")
            lines += [f"  {node.operator} {node.name} on {node.provider}" for node in found]
        return "\n".join(lines)


def read_placement(session: Any, provider: str) -> PlacementReport:
    """What a session of ONNX Runtime says of its nodes.

    Args:
        session: Made with :data:`_RECORD_KEY` set to "1".
        provider: Full name of the provider that was asked for.

    Raises:
        ExportError: This ONNX Runtime does not say.
    """
    if not hasattr(session, _ASK):
        raise ExportError("this onnxruntime does not say where nodes run: update it (1.31 does)")
    nodes = tuple(
        NodePlacement(node.name, node.op_type, part.ep_name)
        for part in getattr(session, _ASK)()
        for node in part.get_nodes()
    )
    return PlacementReport(nodes, provider)


def warn_of_work(session: Any, provider: str, file: str) -> None:
    """Log a warning for nodes that run elsewhere than was asked for.

    Args:
        session: As for :func:`read_placement`; one that does not say is taken to have none.
        provider: Full name of the provider that was asked for.
        file: What runs, for the message.
    """
    report = read_placement(session, provider) if hasattr(session, _ASK) else None
    found = report.elsewhere if report else ()
    if found:
        kinds = Counter(node.operator for node in found)
        shown = ", ".join(f"{count} {operator}" for operator, count in kinds.most_common(5))
        _log.warning(
            "%s: %d nodes have no kernel on %s and run on the CPU, with copies there and back (%s): "
            "OnnxSession.placement() lists them",
            file,
            len(found),
            provider,
            shown,
        )


def check_arguments(
    provider: str,
    provider_options: Mapping[str, str] | None,
    max_rank: int | None,
    *,
    tf32: bool,
    cuda_graph: bool,
) -> None:
    """Refuse arguments of ``OnnxSession`` that would be ignored or mean nothing.

    Raises:
        ConfigError: It names them.
    """
    if cuda_graph and provider != "cuda":
        raise ConfigError(f"cuda_graph=True is for provider='cuda', found {provider!r}")
    if tf32 and provider != "cuda":
        raise ConfigError(f"tf32=True is for provider='cuda', found {provider!r}")
    if provider_options and provider == "cpu":
        raise ConfigError(
            f"provider_options has {', '.join(provider_options)}: ONNX Runtime's cpu provider has no "
            "options, and ignores what it is given"
        )
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"max_rank is {max_rank}: give a whole number of at least 1, or None")


def session_settings(runtime: Any, given: Any, *, low_memory: bool) -> Any:
    """The ``SessionOptions`` of a session.

    Args:
        runtime: The onnxruntime module.
        given: The caller's, which are added to, since ONNX Runtime cannot copy them; None for those of
            ONNX Runtime, which then says errors only.
        low_memory: Whether to leave weights where they are.

    Raises:
        ConfigError: ``given`` is something else.
    """
    if given is None:
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
    elif isinstance(given, runtime.SessionOptions):
        settings = given
    else:
        raise ConfigError(
            f"session_options is a {type(given).__name__}: give an onnxruntime.SessionOptions"
        )
    settings.add_session_config_entry(_RECORD_KEY, "1")
    if low_memory:
        # Fusions beyond the basic ones join weights, and widen those in half precision.
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.enable_cpu_mem_arena = False  # it keeps what was needed once
        # By default all half weights are widened first, then each is used.
        settings.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings
