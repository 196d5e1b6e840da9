"""GGUF files as llama.cpp's converter writes them: its names of tensors, its order of rows, its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["KINDS", "blocks", "write_gguf"]

Kind = gguf.GGMLQuantizationType
KINDS = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.Q4_K, Kind.Q6_K]
# The offsets of the scales of half precision in a block. gguf decodes these types and does not encode them.
_SCALES = {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,)}


def blocks(values: np.ndarray, kind: Any) -> np.ndarray:
    """The blocks of a matrix; for types that gguf does not encode, of any other matrix of its shape."""
    if kind not in _SCALES:
        encoded: np.ndarray = gguf.quantize(values, kind)
        return encoded
    of, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (*values.shape[:-1], values.shape[-1] // of, size), np.uint8)
    for offset in _SCALES[kind]:
        scales = random.uniform(1e-4, 1e-3, codes.shape[:-1]).astype(np.float16)
        codes[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return codes.reshape(*values.shape[:-1], -1)


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, whose rotary embedding turns neighbors."""
    rows = values.shape[0]
    pairs = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _of_llama(config: Any, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = next((heads[key] for key in heads if key in name), None)
    return {name: values if found is None else _interleaved(values, found)}


def _of_gpt2(config: Any, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values.T if ".c_" in name and values.ndim == 2 else values}


def _of_experts(config: Any, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    parent, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        gate, up = np.split(values, 2, axis=1)
        return {f"{parent}.gate_proj.weight": gate, f"{parent}.up_proj.weight": up}
    return {f"{name}.weight" if leaf == "down_proj" else name: values}


def _of_lfm2(config: Any, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[:, 0] if "conv.conv" in name else values}


_CHANGES: Mapping[str, Callable[[Any, str, np.ndarray], dict[str, np.ndarray]]] = {
    "llama": _of_llama,
    "gpt2": _of_gpt2,
    "qwen3moe": _of_experts,
    "lfm2": _of_lfm2,
}


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    kind: Any,
    *,
    also: Callable[[Any], None] | None = None,
) -> Path:
    """Write a model, its matrices as blocks of one type and its vectors in fp32.

    Args:
        path: The file.
        model: A model of transformers.
        architecture: llama.cpp's name of its architecture.
        kind: The type of the matrices.
        also: Called with the writer, to add more to the file.
    """
    config = model.config
    named = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(named, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture != "gpt2":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    change = _CHANGES.get(architecture, lambda config, name, values: {name: values})
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for part, values in change(config, name, tensor.float().numpy()).items():
            target = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert target is not None, part
            whole = values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]
            used = Kind.F32 if whole else kind
            writer.add_tensor(target, blocks(values, used), raw_dtype=used)
    if also is not None:
        also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
