"""How a session is opened: what its arguments say together, and the options of ONNX Runtime."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_fx.errors import ConfigError, ExportError

__all__ = [
    "RECORD_KEY",
    "NodePlacement",
    "PlacementReport",
    "check_arguments",
    "read_placement",
    "session_settings",
    "warn_of_work",
]


_log = logging.getLogger("lora_fx")

RECORD_KEY = "session.record_ep_graph_assignment_info"
"""The entry of the session's options without which ONNX Runtime does not say."""

_ASK = "get_provider_graph_assignment_info"
_CPU = "CPUExecutionProvider"

# What ONNX Runtime moves to the CPU beside a GPU by itself, because it is arithmetic on a few sizes.
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
        session: Made with :data:`RECORD_KEY` set to "1".
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
    settings.add_session_config_entry(RECORD_KEY, "1")
    if low_memory:
        # Fusions beyond the basic ones join weights, and widen those in half precision.
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.enable_cpu_mem_arena = False  # it keeps what was needed once
        # By default all half weights are widened first, then each is used.
        settings.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings
