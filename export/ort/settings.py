"""How a session is opened: what its arguments say together, and the options of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fx.errors import ConfigError
from lora_fx.export.ort.node_placement import RECORD_KEY

__all__ = ["check_arguments", "session_settings"]


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
    settings.add_session_config_entry(RECORD_KEY, "1")
    if low_memory:
        # Fusions beyond the basic ones join weights, and widen those in half precision.
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.enable_cpu_mem_arena = False  # it keeps what was needed once
        # By default all half weights are widened first, then each is used.
        settings.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings
