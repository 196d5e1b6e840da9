"""ONNX Runtime: providers, options, inputs and outputs, what a call gives."""

from __future__ import annotations

from lora_fx.export.ort import providers
from lora_fx.export.ort.calls import (
    AXIS_LIMITS_KEY,
    INNER_SIZES_KEY,
    EmptyAxisError,
    check_axes,
    empty_outputs,
    inner_sizes,
    inputs_by_name,
)
from lora_fx.export.ort.ports import (
    BF16,
    CPU,
    Device,
    Port,
    bound_run,
    empty_value,
    feed,
    placed,
    port_of,
    settle,
    to_runtime,
    to_tensor,
    unwrap,
)
from lora_fx.export.ort.providers import (
    PROVIDERS,
    check_provider,
    import_onnxruntime,
    load,
    reason_of,
)
from lora_fx.export.ort.settings import (
    PlacementReport,
    check_arguments,
    read_placement,
    session_settings,
    warn_of_work,
)

__all__ = [
    "AXIS_LIMITS_KEY",
    "BF16",
    "CPU",
    "INNER_SIZES_KEY",
    "PROVIDERS",
    "Device",
    "EmptyAxisError",
    "PlacementReport",
    "Port",
    "bound_run",
    "check_arguments",
    "check_axes",
    "check_provider",
    "empty_outputs",
    "empty_value",
    "feed",
    "import_onnxruntime",
    "inner_sizes",
    "inputs_by_name",
    "load",
    "placed",
    "port_of",
    "providers",
    "read_placement",
    "reason_of",
    "session_settings",
    "settle",
    "to_runtime",
    "to_tensor",
    "unwrap",
    "warn_of_work",
]
