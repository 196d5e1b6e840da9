"""Functions for the adapters of a rewritten model."""

from __future__ import annotations

from lora_fx.adapters.budget import allot_ranks, budget_of
from lora_fx.adapters.calibration import input_moments
from lora_fx.adapters.initialization import Forward, initialize, restart
from lora_fx.adapters.manage import (
    active_adapters,
    adapter_ids,
    adapter_names,
    adapter_record,
    add_adapter,
    delete_adapter,
    disable_adapter,
    note_start,
    put_adapter,
    reference,
    set_adapter,
    status,
    the_adapter,
)
from lora_fx.adapters.quantized_base import (
    Originals,
    plan_quantization,
    prepare_for_kbit_training,
    quantize,
    quantized_parameters,
    replace_lora_weights_loftq,
)
from lora_fx.adapters.settings import (
    WRAPPER,
    Layout,
    Target,
    is_attention,
    layout_of,
    origin_of,
    targets_of,
    with_patterns,
    with_targets,
    written_config,
)
from lora_fx.adapters.switching import base_capture, on_base, run_with
from lora_fx.adapters.training import (
    adapter_losses,
    adapter_penalty,
    correct_gradients,
    parameter_groups,
    train_together,
)
from lora_fx.adapters.weighted import add_weighted_adapter

__all__ = [
    "WRAPPER",
    "Forward",
    "Layout",
    "Originals",
    "Target",
    "active_adapters",
    "adapter_ids",
    "adapter_losses",
    "adapter_names",
    "adapter_penalty",
    "adapter_record",
    "add_adapter",
    "add_weighted_adapter",
    "allot_ranks",
    "base_capture",
    "budget_of",
    "correct_gradients",
    "delete_adapter",
    "disable_adapter",
    "initialize",
    "input_moments",
    "is_attention",
    "layout_of",
    "note_start",
    "on_base",
    "origin_of",
    "parameter_groups",
    "plan_quantization",
    "prepare_for_kbit_training",
    "put_adapter",
    "quantize",
    "quantized_parameters",
    "reference",
    "replace_lora_weights_loftq",
    "restart",
    "run_with",
    "set_adapter",
    "status",
    "targets_of",
    "the_adapter",
    "train_together",
    "with_patterns",
    "with_targets",
    "written_config",
]
