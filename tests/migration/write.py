"""Writes what the installed transformers and PEFT compute with tiny models and adapters, for other versions.

It runs in an environment of transformers 4 (``requirements.txt`` beside it) as ``tests.migration.write``.
The models are those of the zoo. Each file has a configuration, the names and shapes of the weights and of the
adapter as this version writes them, the inputs, and some of the outputs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_fx.tools.zoo.models import library_models
from tests.migration import folders

HERE = Path(__file__).parent
# Models that transformers 5 renamed, fused or nested, with other settings of the adapter.
ROWS: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"rank_pattern": {"w2": 3}, "alpha_pattern": {"w1": 5}},
    "Qwen2-MoE": {"use_rslora": True},
    "Qwen3-MoE": {"target_modules": ["gate_proj", "q_proj"]},
    "OLMoE": {
        "target_modules": ["gate_proj", "up_proj", "down_proj", "gate"],
        "layers_to_transform": [1],
    },
    "DeepSeek-V2": {},
    "DeepSeek-V3": {},
    "GLM4-MoE": {},
    "Jamba": {"target_modules": ["router", "up_proj", "down_proj", "q_proj", "x_proj"]},
    "Qwen3-Next": {},
    "Phi-MoE": {},
    "Granite-MoE": {
        "target_modules": ["layer", "q_proj"],
        "target_parameters": ["input_linear.weight", "output_linear.weight"],
    },
    "GPT-OSS": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "ViT": {"modules_to_save": ["classifier"], "target_modules": ["query", "dense"]},
    "DeiT": {"use_dora": True},
    "BEiT": {},
    "DINOv2": {"lora_bias": True},
    "DINOv3": {},
    "ViT-MSN": {},
    "I-JEPA": {},
    "AST": {"bias": "all"},
    "Swin": {"target_modules": ["query", "value", "dense"]},
    "SegFormer": {},
    "LLaVA": {},
    "VipLLaVA": {},
    "Gemma3-VL": {},
}
OLD = ("LLaVA", "VipLLaVA", "Mixtral", "ViT", "Qwen2-VL", "Qwen2.5-VL", "Gemma3-VL", "Mistral3")
"""Rows for versions before 4.52, which nested the parts of multimodal models otherwise."""

_SIDES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {
    **_SIDES,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {
    **_TEXT,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
    "image_token_id": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
    "video_token_id": 8,
}
_BLOCKS = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 16,
}
_TOWER = {**_SIDES, "image_size": 16, "patch_size": 8}
# Models whose options transformers 5 has renamed, so that the zoo does not build them in 4.
BUILT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        {**_QWEN, "vision_config": {**_BLOCKS, "embed_dim": 16, "mlp_ratio": 2}},
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            **_QWEN,
            "vision_config": {
                **_BLOCKS,
                "intermediate_size": 24,
                "out_hidden_size": 16,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        },
    ),
    "Gemma3-VL": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "head_dim": 4,
                "query_pre_attn_scalar": 4,
                "sliding_window": 4,
            },
            "vision_config": _TOWER,
            "mm_tokens_per_image": 4,
        },
    ),
    "Mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 4},
            "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 4},
        },
    ),
}


def main() -> None:
    """Write a file for each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "transformers4")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    version = importlib.metadata.version("transformers")
    release = ".".join(version.split(".")[:2])
    rows = options.only or (list(ROWS) if release > "4.52" else list(OLD))
    entries = {entry.name.partition("/")[2]: entry for entry in library_models("transformers")}
    for name in rows:
        record = {"transformers": version, "peft": importlib.metadata.version("peft")}
        if name in BUILT:
            class_name, settings = BUILT[name]
            kind = getattr(transformers, class_name)
            model, inputs = kind(kind.config_class(**settings)).eval(), WORDS
        else:
            model, inputs = entries[name].build()
        record |= recorded(model, inputs, ROWS.get(name, {}))
        path = options.out / f"{name.lower()}-{release}.json"
        path.write_text(
            json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8"
        )


WORDS = {"input_ids": torch.tensor([[9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25]])}
"""Inputs without an image."""


def recorded(model: Any, drawn: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one model computes, with and without an adapter."""
    stored = {
        name: value
        if not torch.is_tensor(value)
        else {"shape": list(value.shape)}
        if value.is_floating_point()
        else {"values": value.tolist()}
        for name, value in dict(drawn).items()
    }
    inputs = folders.inputs_of(stored)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="1TB")
        path = Path(folder, "model.safetensors")
        weights = {
            key: list(value.shape)
            for key, value in load_file(path).items()
            if value.is_floating_point()
        }
        named = {key: folders.weight(key, shape) for key, shape in weights.items()}
        save_file({**load_file(path), **named}, path, metadata={"format": "pt"})
        model = type(model).from_pretrained(folder, attn_implementation="eager").eval()
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        base = folders.spread(model(**inputs))
    lora: Any = peft.LoraConfig
    adapted: Any = peft.get_peft_model(
        model, lora(**{"r": 2, "lora_alpha": 3, "target_modules": "all-linear", **settings})
    ).eval()
    adapter = peft.get_peft_model_state_dict(adapted)
    shapes = {key: list(value.shape) for key, value in adapter.items()}
    tensors = {key: adapter_value(key, shape) for key, shape in shapes.items()}
    peft.set_peft_model_state_dict(adapted, tensors)
    with torch.no_grad():
        output = folders.spread(adapted(**inputs))
    with tempfile.TemporaryDirectory() as folder:
        adapted.peft_config["default"].save_pretrained(folder)
        adapter_config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    return {
        "config": config,
        "weights": weights,
        "adapter_config": {
            # PEFT writes sets, in any order.
            key: sorted(value) if key == "target_modules" and isinstance(value, list) else value
            for key, value in adapter_config.items()
            if key != "base_model_name_or_path"
        },
        "adapter": shapes,
        "inputs": stored,
        "base": base.tolist(),
        "adapted": output.tolist(),
    }


def adapter_value(key: str, shape: list[int]) -> torch.Tensor:
    """Return the values of a tensor of an adapter: a factor, a magnitude, or a weight trained in full."""
    trained = re.search(r"lora_[AB]", key) is None
    return (
        folders.weight(key, shape) + ("magnitude" in key) if trained else folders.factor(key, shape)
    )


if __name__ == "__main__":
    main()
