"""Loader of a file on exactly the requested provider.

If CUDA does not work, ONNX Runtime opens a session on the CPU and prints a line to stderr. Such a session is
never returned here: an error names the missing part.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from lora_fx.errors import ConfigError, ExportError, ProviderError, hint
from lora_fx.extras import load_optional

__all__ = [
    "PROVIDERS",
    "RUNTIME_KEY",
    "SLOW_OR_BROKEN",
    "NodePlacement",
    "Optimizer",
    "PlacementReport",
    "Provider",
    "ProviderName",
    "check_arguments",
    "check_provider",
    "chosen_provider",
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

Provider: TypeAlias = Literal["cpu", "cuda", "webgpu"]
_RuntimeName: TypeAlias = Literal[
    "CUDAExecutionProvider", "CPUExecutionProvider", "WebGpuExecutionProvider"
]
ProviderName: TypeAlias = Provider | _RuntimeName | Sequence[Provider | _RuntimeName]
"""A provider by its short name or ONNX Runtime's name, or in a list, as ONNX Runtime takes it."""

_log = logging.getLogger("lora_fx")


class Optimizer(NamedTuple):
    """Optimization of ONNX Runtime that is switched off in sessions.

    Attributes:
        name: Its name in ONNX Runtime.
        providers: Providers on which it is switched off.
        since: The first affected version of ONNX Runtime, (major, minor).
        before: The first later version that is fine; None if there is none.
        mark: Bytes that an affected file has; b"" for every file.
        reason: The measurement.
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
"""Optimizations that sessions switch off, measured on the versions in ``reason``."""


def optimizers_off(version: str, provider: str, path: Path) -> list[str]:
    """Return the names of the optimizations to switch off for a file.

    Args:
        version: Version of ONNX Runtime.
        provider: "cuda", "cpu" or "webgpu".
        path: The file.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    number = (int(match[1]), int(match[2])) if match else (0, 0)
    chosen = [
        optimizer
        for optimizer in SLOW_OR_BROKEN
        if provider in optimizer.providers
        and number >= optimizer.since
        and (optimizer.before is None or number < optimizer.before)
    ]
    return [optimizer.name for optimizer in chosen if _contains(path, optimizer.mark)]


def _contains(path: Path, mark: bytes) -> bool:
    if not mark or not path.stat().st_size:
        return not mark
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(mark) >= 0


def import_onnxruntime() -> Any:
    """Import and return the onnxruntime module.

    Raises:
        ProviderError: onnxruntime is not installed. The message names the extra to install.
    """
    onnxruntime = load_optional(
        "onnxruntime", "running an ONNX file", "lora-fx[gpu]", "lora-fx[cpu]", error=ProviderError
    )
    if not hasattr(onnxruntime, "InferenceSession"):
        # The shared folder is incomplete after one of two wheels was uninstalled.
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


def chosen_provider(provider: object) -> Provider:
    """Return "cuda", "cpu" or "webgpu" for the short name, ONNX Runtime's name, or a list of one name.

    Raises:
        ProviderError: The name is unknown, or the list has several: there is no fallback to a second one.
    """
    names = (
        provider if isinstance(provider, Sequence) and not isinstance(provider, str) else [provider]
    )
    known = {**{short: short for short in PROVIDERS}, **{PROVIDERS[s]: s for s in PROVIDERS}}
    if len(names) != 1:
        raise ProviderError(
            f"provider is {provider!r}: give one, because lora-fx does not fall back to another one"
        )
    if not isinstance(names[0], str) or names[0] not in known:
        near = hint(str(names[0]).lower(), PROVIDERS, " Did you mean '{}'?", count=1, cutoff=0.7)
        raise ProviderError(
            f"unknown provider {names[0]!r}: the providers are 'cuda' (GPUs of NVIDIA), 'cpu' and "
            f"'webgpu'.{near}"
        )
    return cast("Provider", known[names[0]])


def check_provider(runtime: Any, provider: str) -> None:
    """Raise if a provider cannot work on this machine.

    Args:
        runtime: The onnxruntime module.
        provider: "cuda", "cpu" or "webgpu".

    Raises:
        ProviderError: The message names the missing part and a remedy.
    """
    available = runtime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise ProviderError(
            f"this ONNX Runtime ({runtime.__version__}) has no {provider} provider, only "
            f"{', '.join(available)}. " + (wheel_conflict() or _REMEDIES[provider])
        )
    if provider == "cuda":
        _check_cuda(runtime, available)


def wheel_conflict() -> str:
    """Return advice if several wheels of ONNX Runtime are installed, else ""."""
    wheels = []
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wheels.append(f"{name} {importlib.metadata.version(name)}")
    if len(wheels) < 2:
        return ""
    return (
        f"{' and '.join(wheels)} are both installed and overwrite each other: pip uninstall both, "
        f"then pip install 'lora-fx[gpu]', or the one that has the provider"
    )


def cuda_library(runtime: Any) -> Path:
    """Return the path of the CUDA provider's library in this ONNX Runtime. The file may not exist."""
    name = (
        "onnxruntime_providers_cuda.dll"
        if sys.platform == "win32"
        else "libonnxruntime_providers_cuda.so"
    )
    return Path(runtime.__file__).parent / "capi" / name


def missing_cuda_libraries(runtime: Any) -> list[str]:
    """Return the shared libraries that the CUDA provider needs and the loader does not find.

    On Windows the dependencies are not read, because ONNX Runtime reports them when a session starts.
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
    # preload_dlls prints the libraries that it cannot load instead of raising. They are tried below.
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
    """Open a session of ONNX Runtime.

    Args:
        runtime: The onnxruntime module.
        path: The ``.onnx`` file.
        provider: "cuda", "cpu" or "webgpu".
        options: Options of the provider.
        settings: ``SessionOptions``, see ``session_settings``.

    Raises:
        ProviderError: The provider is unknown, not installed, lacks libraries or a device, or has
            no kernel for an operation of the file.
        ExportError: The file is missing, damaged or no ONNX model.
    """
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.onnx"))) or "no .onnx file"
        raise ExportError(f"{path} is a folder, which holds {inside}: give the file")
    if not path.is_file():
        raise ExportError(f"there is no file {path}: export a model to it first")
    check_provider(runtime, provider)
    name = PROVIDERS[provider]
    # Shape arithmetic of a CUDA graph runs on the CPU by design, hence the second provider.
    wanted = [(name, options)] if provider == "cpu" else [(name, options), PROVIDERS["cpu"]]
    try:
        # With fallback, ONNX Runtime would silently retry on the CPU.
        session = runtime.InferenceSession(
            str(path),
            settings,
            providers=wanted,
            enable_fallback=0,
            disabled_optimizers=optimizers_off(runtime.__version__, provider, path),
        )
    except Exception as error:
        raise _refusal(runtime, path, provider, options, error) from error
    actual = session.get_providers()[0]
    if actual != name:
        raise ProviderError(
            f"asked for {provider}, ONNX Runtime gave {actual}: that provider did not "
            f"start on this machine. {wheel_conflict() or 'Run `lora-fx doctor`'}"
        )
    session.disable_fallback()
    return session


def _refusal(
    runtime: Any, path: Path, provider: str, options: Mapping[str, str], error: Exception
) -> ExportError:
    """Return an error that says why ONNX Runtime cannot load a file, and what to do.

    Args:
        runtime: The onnxruntime module.
        path: The file.
        provider: The provider that was asked for.
        options: Its options.
        error: The error of ONNX Runtime.
    """
    reason = reason_of(error)
    kind = type(error).__name__
    if options.get("enable_cuda_graph") == "1" and kind in ("Fail", "NotImplemented", "EPFail"):
        return ProviderError(
            f"{path} cannot be captured as a CUDA graph: {reason}. That takes a model without control "
            f"flow, all of it on the GPU: load it without cuda_graph"
        )
    if kind in ("NotImplemented", "EPFail"):
        bf16 = (
            "bf16 needs provider='cuda'; for the CPU, export with dtype='fp32' or 'fp16'"
            if provider == "cpu" and _has_bf16(path)
            else ""
        )
        return ProviderError(f"the {provider} provider cannot run {path}: {bf16 or reason}")
    if provider == "webgpu" and "WebGPU adapter" in str(error):
        return ProviderError(
            f"the webgpu provider finds no GPU ({reason.rpartition(': ')[2]}): it needs a driver of "
            "Vulkan, Metal or Direct3D 12; Mesa's lavapipe (mesa-vulkan-drivers) is one in software"
        )
    if lacking := _LATER.search(str(error)):
        version = _checked_with(path)
        checked = f"The file was checked with {version}. " if version else ""
        return ProviderError(
            f"{path} has an operator of a later ONNX Runtime, and this is {runtime.__version__}: "
            f"{lacking[0]}. {checked}Install {version or 'a later version'}, or export the "
            "model with optimize='standard' and a lower opset"
        )
    return ExportError(
        f"{path} cannot be loaded: {reason}. Is it a whole ONNX file, with its "
        f"external data beside it? Export it again if not"
    )


RUNTIME_KEY = "lora_fx.onnxruntime"
"""Metadata entry: the version of ONNX Runtime that was installed when the file was written."""

_LATER = re.compile(
    r"Unrecognized attribute: .+|No Op registered for .+|\S+ is not a registered function/op"
    r"|Opset \d+ is under development"
)
"""Pattern of errors of ONNX Runtime about operators and opsets that only a later version knows."""


def _checked_with(path: Path) -> str:
    """Return the version of ONNX Runtime that was installed when a file was written, or ""."""
    try:
        import onnx

        entries = onnx.load(str(path), load_external_data=False).metadata_props
    except Exception:  # noqa: BLE001  # the error of ONNX Runtime is raised in any case
        return ""
    return next((entry.value for entry in entries if entry.key == RUNTIME_KEY), "")


def _has_bf16(path: Path) -> bool:
    """Return True if a file has weights in bf16. False may also mean that onnx cannot read it."""
    try:
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # noqa: BLE001  # the error of ONNX Runtime is raised in any case
        return False
    return any(
        initializer.data_type == onnx.TensorProto.BFLOAT16 for initializer in graph.initializer
    )


def reason_of(error: Exception) -> str:
    """Return the message of an error of ONNX Runtime, without its codes."""
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing …"
    text = str(error).strip().splitlines()
    return text[0].split(" : ", 3)[-1] if text else type(error).__name__


_RECORD_KEY = "session.record_ep_graph_assignment_info"
"""Config entry of a session that makes ONNX Runtime record the providers of nodes."""

_ASK = "get_provider_graph_assignment_info"
_CPU = "CPUExecutionProvider"

# Operators that ONNX Runtime moves from a GPU to the CPU for arithmetic on a few sizes. CUDA has a kernel for
# each of them, so they have no other reason to be on the CPU.
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
    """Provider of one node.

    Attributes:
        name: Name of the node after ONNX Runtime's first optimizations.
        operator: Operator of the node.
        provider: Execution provider of the node.
    """

    name: str
    operator: str
    provider: str


@dataclass(frozen=True)
class PlacementReport:
    """Providers of the nodes of a session.

    Attributes:
        nodes: All nodes.
        provider: The requested provider.
    """

    nodes: tuple[NodePlacement, ...]
    provider: str

    @property
    def counts(self) -> dict[str, int]:
        """Number of nodes by provider."""
        return dict(Counter(node.provider for node in self.nodes))

    @property
    def elsewhere(self) -> tuple[NodePlacement, ...]:
        """Nodes that do real work on another provider than the requested one.

        Each copies its data to another device and back. Arithmetic on sizes does not count.
        """
        return tuple(
            node
            for node in self.nodes
            if node.provider != self.provider
            and not (node.provider == _CPU and node.operator in _SHAPE_OPERATORS)
        )

    def __str__(self) -> str:
        lines = [f"{count} nodes on {provider}" for provider, count in self.counts.items()]
        elsewhere = self.elsewhere
        if elsewhere:
            lines.append(
                f"{len(elsewhere)} of them do work on another device than {self.provider}:"
            )
            lines += [f"  {node.operator} {node.name} on {node.provider}" for node in elsewhere]
        return "\n".join(lines)


def read_placement(session: Any, provider: str) -> PlacementReport:
    """Read the providers of nodes from a session of ONNX Runtime.

    Args:
        session: Session that was opened with :data:`_RECORD_KEY` set to "1".
        provider: Full name of the requested provider.

    Raises:
        ExportError: This ONNX Runtime does not report them.
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
    """Log a warning if nodes run on another provider than the requested one.

    Args:
        session: As for :func:`read_placement`. There is no warning if it does not report placements.
        provider: Full name of the requested provider.
        file: Name of the file, for the message.
    """
    report = read_placement(session, provider) if hasattr(session, _ASK) else None
    elsewhere = report.elsewhere if report else ()
    if elsewhere:
        kinds = Counter(node.operator for node in elsewhere)
        shown = ", ".join(f"{count} {operator}" for operator, count in kinds.most_common(5))
        _log.warning(
            "%s: %d nodes have no kernel on %s and run on the CPU, with copies there and back (%s): "
            "OnnxSession.placement() lists them",
            file,
            len(elsewhere),
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
    """Raise for arguments of ``OnnxSession`` that would be ignored or have no meaning.

    Raises:
        ConfigError: The message names the argument.
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


def session_settings(runtime: Any, options: Any, *, low_memory: bool) -> Any:
    """Return the ``SessionOptions`` of a session.

    Args:
        runtime: The onnxruntime module.
        options: The caller's options, which are changed in place because ONNX Runtime cannot copy them. None
            for the defaults, with only errors logged.
        low_memory: True to leave weights in their files.

    Raises:
        ConfigError: ``options`` has another type.
    """
    if options is None:
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
    elif isinstance(options, runtime.SessionOptions):
        settings = options
    else:
        raise ConfigError(
            f"session_options is a {type(options).__name__}: give an onnxruntime.SessionOptions"
        )
    settings.add_session_config_entry(_RECORD_KEY, "1")
    if low_memory:
        # Fusions beyond the basic ones create joined weights, and widen weights in half precision.
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.enable_cpu_mem_arena = False  # the arena keeps memory after its use
        # By default all half-precision weights are widened before the first is used.
        settings.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings
