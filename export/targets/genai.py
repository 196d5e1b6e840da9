"""``target="genai"``: the folder that onnxruntime-genai loads (``og.Model(folder)``).

The file is that of ``task="text-generation"`` with the logits of all positions. genai pads batches on the
right, and reads the logits of each row's last token. Source of the fields: onnxruntime-genai's
``src/config.h`` and the output of its model builder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.errors import ExportError
from lora_fx.export.decoder_cache import GENERATION_KEY
from lora_fx.export.fuse import SHARED_CACHE_KEY
from lora_fx.export.targets.base import TaskName, Written, add_tokenizer, write_json
from lora_fx.ir import record_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GenaiTarget"]

_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_KNOWN = ("input_ids", "attention_mask")
_LONGEST = 4096  # positions, for a model without a limit


class GenaiTarget:
    """Target for onnxruntime-genai."""

    name = "genai"
    axes: Mapping[str, str] = {}

    def task(self, model: nn.Module) -> TaskName:
        """Return "text-generation". The runtime runs only decoders."""
        return "text-generation"

    def check(self, *, task: str | None, adapters: str | None, dtype: str | None) -> None:
        """Raise unless the file is a decoder without a bank of adapters."""
        if task != "text-generation":
            raise ExportError(
                f"target='genai' runs decoders with a cache, and task is {task!r}: give "
                "task='text-generation'"
            )
        if adapters == "bank":
            raise ExportError(
                "onnxruntime-genai feeds no ids of adapters to a file: give adapters='inputs', and load the "
                "folder's .onnx_adapter files"
            )

    def file(self, folder: Path, dtype: str | None) -> Path:
        """Return the path of ``model.onnx``."""
        return folder / "model.onnx"

    def data_name(self, file: Path) -> str | None:
        """Return None, because any name works."""
        return None

    def example(self, example: object) -> object:
        """Return the example call with the logits of all positions."""
        arguments = example if isinstance(example, Mapping) else {"input_ids": _ids(example)}
        keep = arguments.get("logits_to_keep", 0)
        if keep != 0:
            raise ExportError(
                f"logits_to_keep is {keep!r}: genai pads batches on the right and reads the logits of each "
                "row's last token, so target='genai' needs those of all positions: leave it out"
            )
        return {**arguments, "logits_to_keep": 0}

    def adapt(self, model: ir.Model) -> None:
        """Leave the graph as it is."""

    def finish(self, written: Written) -> Mapping[Path, str]:
        """Write ``genai_config.json``, the tokenizer, and an ``.onnx_adapter`` for each adapter."""
        files = {
            write_json(written.folder / "genai_config.json", _config(written)): "genai_config.json"
        }
        files |= add_tokenizer(written.tokenizer, written.folder / "tokenizer")
        if written.report.swappable:
            files |= _adapters(written)
        return files


def _ids(example: object) -> object:
    return example[0] if isinstance(example, (tuple, list)) and len(example) == 1 else example


def _adapters(written: Written) -> dict[Path, str]:
    from lora_fx.export.adapter_file import save_onnx_adapter
    from lora_fx.export.copy import unwrapped

    model = unwrapped(written.model)
    record = record_of(model)
    folder = written.folder / "adapters"
    paths = {}
    for name in () if record is None else record.adapters:
        folder.mkdir(exist_ok=True)
        path = save_onnx_adapter(
            model, folder / f"{name}.onnx_adapter", base=written.file, adapter_name=name
        )
        paths[path] = f"adapters/{path.name}"
    return paths


def _config(written: Written) -> dict[str, Any]:
    report, model = written.report, written.model
    layers, heads, width = _cache_sizes(report.inputs)
    remembered: dict[str, Any] = json.loads(report.metadata.get(GENERATION_KEY, "{}"))
    defaults: dict[str, Any] = remembered.get("defaults", {})
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    limit = remembered.get("limit") or _LONGEST
    end = defaults.get("eos_token_id", getattr(text, "eos_token_id", None))
    pad = defaults.get("pad_token_id", getattr(text, "pad_token_id", None))
    first = end[0] if isinstance(end, list) and end else end
    if first is None:
        raise ExportError(
            "genai stops at an end token, and this model has none: set model.generation_config.eos_token_id"
        )
    decoder = {
        "filename": written.file.name,
        "head_size": width,
        "hidden_size": int(text.hidden_size),
        "num_attention_heads": int(text.num_attention_heads),
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {
            **{name: name for name in _KNOWN},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    begin = defaults.get("bos_token_id", getattr(text, "bos_token_id", None))
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first if begin is None else begin,
            "context_length": limit,
            "decoder": decoder,
            "eos_token_id": end,
            "pad_token_id": first if pad is None else pad,
            "vocab_size": int(text.vocab_size),
        },
        "search": _search_settings(defaults, limit, shared=SHARED_CACHE_KEY in report.metadata),
    }


def _search_settings(defaults: Mapping[str, Any], limit: int, *, shared: bool) -> dict[str, Any]:
    """Return the entry ``search`` of ``genai_config.json``: settings of generation, from those of the model.

    Args:
        defaults: The model's ``generation_config``.
        limit: Largest number of tokens of a text.
        shared: True if the file appends to the buffers of the cache in place.
    """
    return {
        "do_sample": bool(defaults.get("do_sample", False)),
        "early_stopping": True,
        "length_penalty": float(defaults.get("length_penalty") or 1.0),
        "max_length": limit,
        "min_length": int(defaults.get("min_length") or 0),
        "no_repeat_ngram_size": int(defaults.get("no_repeat_ngram_size") or 0),
        "num_beams": 1,
        "num_return_sequences": 1,
        # Otherwise the cache of the file grows by concatenation.
        "past_present_share_buffer": shared,
        "repetition_penalty": float(defaults.get("repetition_penalty") or 1.0),
        "temperature": float(defaults.get("temperature") or 1.0),
        "top_k": int(defaults.get("top_k") or 50),
        "top_p": float(defaults.get("top_p") or 1.0),
    }


def _cache_sizes(inputs: Mapping[str, tuple[int | str, ...]]) -> tuple[int, int, int]:
    """Return layers, heads and width of the cache. genai requires equal sizes in all layers."""
    layers: dict[int, set[tuple[Any, Any]]] = {}
    unknown = []
    for name, axes in inputs.items():
        match = _CACHE.fullmatch(name)
        if match is not None:
            layers.setdefault(int(match[1]), set()).add((axes[1], axes[3]))
        elif name not in _KNOWN:
            unknown.append(name)
    if unknown:
        raise ExportError(
            f"genai gives a decoder no input called {', '.join(unknown)}: this model cannot be run there; "
            "export it without target= for OnnxSession"
        )
    sizes = {size for layer in layers.values() for size in layer}
    if sorted(layers) != list(range(len(layers))) or len(sizes) != 1:
        raise ExportError(
            "genai wants a cache of one size in every layer, and this model's layers differ: export it "
            "without target= for OnnxSession"
        )
    ((heads, width),) = sizes
    return len(layers), int(heads), int(width)
