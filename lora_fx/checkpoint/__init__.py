"""Reading and writing of adapter folders and state dicts in PEFT's format."""

from __future__ import annotations

from lora_fx.adapter_files import read_tensors
from lora_fx.checkpoint.files import check_free, has_receipt, write_folder
from lora_fx.checkpoint.folder import (
    load_adapter,
    load_onto_empty,
    plan_migration,
    save_adapter,
)
from lora_fx.checkpoint.hotswap import hotswap_adapter, prepare_hotswap
from lora_fx.checkpoint.joined import NOTE as PARTS_NOTE
from lora_fx.checkpoint.joined import attention_around
from lora_fx.checkpoint.keys import PREFIX, UNREAD, Dense, Slot, StackedDown, StackedUp
from lora_fx.checkpoint.migration import Migration, Move
from lora_fx.checkpoint.peft_model import (
    as_peft_model,
    cast_to_base,
    merge_and_unload,
    peft_configs,
    peft_model_class,
    read_config,
    train_adapters,
    unload,
)
from lora_fx.checkpoint.peft_status import layer_status, model_status
from lora_fx.checkpoint.receipt import (
    Receipt,
    Verdict,
    call_with,
    hash_tensors,
    log_probabilities,
    main_output,
    read_receipt,
)
from lora_fx.checkpoint.starts import check_start, converted
from lora_fx.checkpoint.state import (
    adapter_state_dict,
    by_hand_in,
    fill,
    labels_in,
    load_adapter_state_dict,
    note_of_by_hand,
    place_given,
    without_prefix,
)
from lora_fx.checkpoint.trainers import (
    callback_class,
    lightning_callback,
    rewritten_models,
    trainer_callback,
)

__all__ = [
    "PARTS_NOTE",
    "PREFIX",
    "UNREAD",
    "Dense",
    "Migration",
    "Move",
    "Receipt",
    "Slot",
    "StackedDown",
    "StackedUp",
    "Verdict",
    "adapter_state_dict",
    "as_peft_model",
    "attention_around",
    "by_hand_in",
    "call_with",
    "callback_class",
    "cast_to_base",
    "check_free",
    "check_start",
    "converted",
    "fill",
    "has_receipt",
    "hash_tensors",
    "hotswap_adapter",
    "labels_in",
    "layer_status",
    "lightning_callback",
    "load_adapter",
    "load_adapter_state_dict",
    "load_onto_empty",
    "log_probabilities",
    "main_output",
    "merge_and_unload",
    "model_status",
    "note_of_by_hand",
    "peft_configs",
    "peft_model_class",
    "place_given",
    "plan_migration",
    "prepare_hotswap",
    "read_config",
    "read_receipt",
    "read_tensors",
    "rewritten_models",
    "save_adapter",
    "train_adapters",
    "trainer_callback",
    "unload",
    "without_prefix",
    "write_folder",
]
