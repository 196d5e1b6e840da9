"""LoRA as an ahead-of-time graph-rewriting compiler pass on ``torch.fx``.

Three lines from a model to an adapted model::

    import lora_fx

    config = lora_fx.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)
    model = lora_fx.rewrite(model, config)

What needs more than PyTorch (ONNX, pictures) is loaded when it is first used.
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from lora_fx.adapters import (
    active_adapters,
    adapter_ids,
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    correct_gradients,
    delete_adapter,
    disable_adapter,
    initialize,
    parameter_groups,
    plan_quantization,
    prepare_for_kbit_training,
    quantize,
    reference,
    replace_lora_weights_loftq,
    set_adapter,
    status,
)
from lora_fx.api import (
    capture,
    compare,
    graphs,
    merge,
    plan,
    print_trainable_parameters,
    rewrite,
    trainable_parameters,
)
from lora_fx.checkpoint import (
    adapter_state_dict,
    hotswap_adapter,
    lightning_callback,
    load_adapter,
    load_adapter_state_dict,
    prepare_hotswap,
    save_adapter,
    trainer_callback,
)
from lora_fx.config import LoraConfig
from lora_fx.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    ExportError,
    LogitsError,
    LoraFxError,
    MergeError,
    NoMatchError,
    OutputPathError,
    ParityError,
    PartialMatchError,
    ProcessError,
    ProviderError,
    QuantizationError,
)
from lora_fx.formats import register_format
from lora_fx.kinds import register_adapter_kind
from lora_fx.passes.oracle import CheckReport, check
from lora_fx.passes.patterns import register_pattern

if _TYPE_CHECKING:
    from lora_fx.export.adapter_file import save_onnx_adapter
    from lora_fx.export.onnx import export_onnx
    from lora_fx.export.session import OnnxSession
    from lora_fx.tools.adapter_folder import inspect_adapter, verify
    from lora_fx.tools.draw import visualize

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "LogitsError",
    "LoraConfig",
    "LoraFxError",
    "MergeError",
    "NoMatchError",
    "OnnxSession",
    "OutputPathError",
    "ParityError",
    "PartialMatchError",
    "ProcessError",
    "ProviderError",
    "QuantizationError",
    "__version__",
    "active_adapters",
    "adapter_ids",
    "adapter_names",
    "adapter_state_dict",
    "add_adapter",
    "add_weighted_adapter",
    "capture",
    "check",
    "compare",
    "correct_gradients",
    "delete_adapter",
    "disable_adapter",
    "export_onnx",
    "graphs",
    "hotswap_adapter",
    "initialize",
    "inspect_adapter",
    "lightning_callback",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "parameter_groups",
    "plan",
    "plan_quantization",
    "prepare_for_kbit_training",
    "prepare_hotswap",
    "print_trainable_parameters",
    "quantize",
    "reference",
    "register_adapter_kind",
    "register_format",
    "register_pattern",
    "replace_lora_weights_loftq",
    "rewrite",
    "save_adapter",
    "save_onnx_adapter",
    "set_adapter",
    "status",
    "trainable_parameters",
    "trainer_callback",
    "verify",
    "visualize",
]

_LAZY = {
    "OnnxSession": "lora_fx.export.session",
    "export_onnx": "lora_fx.export.onnx",
    "inspect_adapter": "lora_fx.tools.adapter_folder",
    "save_onnx_adapter": "lora_fx.export.adapter_file",
    "verify": "lora_fx.tools.adapter_folder",
    "visualize": "lora_fx.tools.draw.drawing",
}

# What users of PEFT look for, and what does it here.
_OF_PEFT = {
    "AutoPeftModel": "load_adapter(model, folder)",
    "AutoPeftModelForCausalLM": "load_adapter(model, folder)",
    "PeftConfig": "LoraConfig",
    "PeftModel": "rewrite(model, config), or load_adapter(model, folder)",
    "TaskType": "LoraConfig(task_type='CAUSAL_LM')",
    "get_peft_model": "rewrite(model, config)",
    "get_peft_model_state_dict": "adapter_state_dict(model)",
    "inject_adapter_in_model": "rewrite(model, config)",
    "prepare_model_for_kbit_training": "prepare_for_kbit_training(model)",
    "set_peft_model_state_dict": "load_adapter_state_dict(model, tensors)",
}


def __getattr__(name: str) -> object:
    """Loads what has dependencies of its own when it is first asked for."""
    if name in _LAZY:
        return getattr(_importlib.import_module(_LAZY[name]), name)
    ours = f": it is lora_fx.{_OF_PEFT[name]} here" if name in _OF_PEFT else ""
    raise AttributeError(f"module 'lora_fx' has no attribute {name!r}{ours}")


def __dir__() -> list[str]:
    return sorted(__all__)
