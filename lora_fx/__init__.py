"""LoRA as an ahead-of-time graph-rewriting compiler pass on ``torch.fx``.

Three lines from a model to an adapted model::

    import lora_fx

    config = lora_fx.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)
    model = lora_fx.rewrite(model, config)

Every name is imported on first use. ``import lora_fx`` alone does not import PyTorch.
"""

from __future__ import annotations

import importlib as _importlib
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

from lora_fx import garbage as _garbage
from lora_fx import versions as _versions

if _TYPE_CHECKING:
    from lora_fx.adapters import (
        active_adapters,
        adapter_ids,
        adapter_losses,
        adapter_names,
        adapter_penalty,
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
        quantized_parameters,
        reference,
        replace_lora_weights_loftq,
        set_adapter,
        status,
        train_together,
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
        as_peft_model,
        hotswap_adapter,
        lightning_callback,
        load_adapter,
        load_adapter_state_dict,
        plan_migration,
        prepare_hotswap,
        save_adapter,
        trainer_callback,
    )
    from lora_fx.config import LoraConfig
    from lora_fx.conversion import convert_adapter
    from lora_fx.delivery import Delivery, VllmServer, sync, sync_callback
    from lora_fx.errors import (
        CaptureError,
        CheckpointError,
        ConfigError,
        DeliveryError,
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
    from lora_fx.export.adapter_file import save_onnx_adapter
    from lora_fx.export.onnx import export_onnx
    from lora_fx.export.session import OnnxSession
    from lora_fx.extraction import extract_adapter
    from lora_fx.folders import resize_adapter
    from lora_fx.formats import keep_quantized, register_format
    from lora_fx.kinds import register_adapter_kind
    from lora_fx.passes.oracle import CheckReport, check
    from lora_fx.passes.patterns import register_pattern
    from lora_fx.tools.adapter_folder import inspect_adapter, verify
    from lora_fx.tools.draw import visualize
    from lora_fx.tools.extract_files import extract_files
    from lora_fx.tools.merge_files import merge_files

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "Delivery",
    "DeliveryError",
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
    "VllmServer",
    "__version__",
    "active_adapters",
    "adapter_ids",
    "adapter_losses",
    "adapter_names",
    "adapter_penalty",
    "adapter_state_dict",
    "add_adapter",
    "add_weighted_adapter",
    "as_peft_model",
    "capture",
    "check",
    "compare",
    "convert_adapter",
    "correct_gradients",
    "delete_adapter",
    "disable_adapter",
    "export_onnx",
    "extract_adapter",
    "extract_files",
    "graphs",
    "hotswap_adapter",
    "initialize",
    "inspect_adapter",
    "keep_quantized",
    "lightning_callback",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "merge_files",
    "parameter_groups",
    "plan",
    "plan_migration",
    "plan_quantization",
    "prepare_for_kbit_training",
    "prepare_hotswap",
    "print_trainable_parameters",
    "quantize",
    "quantized_parameters",
    "reference",
    "register_adapter_kind",
    "register_format",
    "register_pattern",
    "replace_lora_weights_loftq",
    "resize_adapter",
    "rewrite",
    "save_adapter",
    "save_onnx_adapter",
    "set_adapter",
    "status",
    "sync",
    "sync_callback",
    "train_together",
    "trainable_parameters",
    "trainer_callback",
    "verify",
    "visualize",
]

# The module of each name. The imports above are the same for type checkers.
_HOMES = {
    "lora_fx.adapters": """
        active_adapters adapter_ids adapter_losses adapter_names adapter_penalty add_adapter
        add_weighted_adapter correct_gradients delete_adapter disable_adapter initialize parameter_groups
        plan_quantization
        prepare_for_kbit_training quantize quantized_parameters reference replace_lora_weights_loftq
        set_adapter status train_together
    """,
    "lora_fx.api": """
        capture compare graphs merge plan print_trainable_parameters rewrite trainable_parameters
    """,
    "lora_fx.checkpoint": """
        adapter_state_dict as_peft_model hotswap_adapter lightning_callback load_adapter
        load_adapter_state_dict plan_migration prepare_hotswap save_adapter trainer_callback
    """,
    "lora_fx.config": """
        LoraConfig
    """,
    "lora_fx.conversion": """
        convert_adapter
    """,
    "lora_fx.delivery": """
        Delivery VllmServer sync sync_callback
    """,
    "lora_fx.errors": """
        CaptureError CheckpointError ConfigError DeliveryError ExportError LogitsError LoraFxError MergeError
        NoMatchError OutputPathError ParityError PartialMatchError ProcessError ProviderError
        QuantizationError
    """,
    "lora_fx.extraction": """
        extract_adapter
    """,
    "lora_fx.folders": """
        resize_adapter
    """,
    "lora_fx.formats": """
        keep_quantized register_format
    """,
    "lora_fx.kinds": """
        register_adapter_kind
    """,
    "lora_fx.passes.oracle": """
        CheckReport check
    """,
    "lora_fx.passes.patterns": """
        register_pattern
    """,
    "lora_fx.export.adapter_file": """
        save_onnx_adapter
    """,
    "lora_fx.export.onnx": """
        export_onnx
    """,
    "lora_fx.export.session": """
        OnnxSession
    """,
    "lora_fx.tools.adapter_folder": """
        inspect_adapter verify
    """,
    "lora_fx.tools.draw": """
        visualize
    """,
    "lora_fx.tools.extract_files": """
        extract_files
    """,
    "lora_fx.tools.merge_files": """
        merge_files
    """,
}

# Names of PEFT that users look for, and their replacements here.
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


_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_OPTIONAL = ("lora_fx.export.", "lora_fx.tools.")


def __getattr__(name: str) -> object:
    """Load a name, or a module of the package, on first use."""
    if name in _HOME_OF:
        _versions.warn_untested()
        with _garbage.collector_paused():
            value = getattr(_importlib.import_module(_HOME_OF[name]), name)
        return globals().setdefault(name, value)
    spec = None if name.startswith("_") else _find_spec(f"lora_fx.{name}")
    if spec is not None:
        # Load a folder with its modules, so that `lora_fx.passes.match` works after `import lora_fx` alone.
        for home in _HOMES if spec.submodule_search_locations else ():
            if not home.startswith(_OPTIONAL):
                _importlib.import_module(home)
        return _importlib.import_module(f"lora_fx.{name}")
    ours = f": it is lora_fx.{_OF_PEFT[name]} here" if name in _OF_PEFT else ""
    raise AttributeError(f"module 'lora_fx' has no attribute {name!r}{ours}")


def __dir__() -> list[str]:
    return sorted(__all__)
