"""Adapters for vLLM, which reads PEFT's folders in part: one rank and one alpha for all, matrices only.

It takes ``r`` and ``lora_alpha`` for every layer and looks at no pattern: with r the highest rank, A and B of
less are filled up with zeros, and B has the ratio of a layer's scale to that of all. It refuses whatever a
kind trains beside A and B, ``modules_to_save`` and biases, and knows no keys but those of linear layers and
embeddings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import nn

from lora_fx.checkpoint.state import Stored
from lora_fx.config import LoraConfig, scale_of
from lora_fx.errors import CheckpointError
from lora_fx.ir import AdapterRecord
from lora_fx.kinds import kind_of

__all__ = ["for_vllm"]

_KEY = re.compile(r"(?P<name>.+)\.lora_(?:(?P<plain>[AB])\.weight|embedding_(?P<embedding>[AB]))")


def for_vllm(
    found: Stored, record: AdapterRecord, config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """What to write for vLLM.

    Args:
        found: The adapter as PEFT stores it.
        record: Its record.
        config: Its configuration for PEFT.

    Returns:
        Tensors by key, without the prefix, and the configuration.

    Raises:
        CheckpointError: If vLLM would refuse it or leave part of it out: all of that is named.
    """
    problems = list(dict.fromkeys(_problems(found, record)))
    if problems:
        raise CheckpointError(
            "vLLM cannot serve this adapter; merge it into the model, or save it without vllm=True:\n  "
            + "\n  ".join(problems)
        )
    rank = max(target.rank for target in found.targets)
    scales = {one.name: scale_of(one.rank, one.alpha, config) for one in found.targets}
    scale = max(scales.values(), key=abs)
    tensors = {
        key: _filled(key, value, rank, scales, scale) for key, value in found.tensors.items()
    }
    alpha = scale * rank
    one_for_all = dataclasses.replace(
        config,
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        bias="none",
    )
    return tensors, one_for_all


def _filled(
    key: str, value: torch.Tensor, rank: int, scales: dict[str, float], scale: float
) -> torch.Tensor:
    match = _KEY.fullmatch(key)
    assert match is not None, key
    if "A" in (match["plain"], match["embedding"]):
        return nn.functional.pad(value, (0, 0, 0, rank - value.shape[0]))
    # All scales are zero if the largest is.
    factor = scales[match["name"]] / scale if scale else 1.0
    return nn.functional.pad(value, (0, rank - value.shape[1])) * factor


def _problems(found: Stored, record: AdapterRecord) -> Iterator[str]:
    for row in record.sites:
        kind = kind_of(row)
        for slot in kind.slots(row.site):
            yield f"{kind.field or 'kind'}: {row.name} has {slot.what}"
    yield from (f"modules_to_save: {name} is trained in full" for name in record.saved_modules)
    yield from (f"bias: {name} is trained" for name in record.biases)
    if record.config.init_lora_weights == "loftq":
        yield "init_lora_weights='loftq': the adapter belongs to a base that was quantized for it"
    yield from (f"{name}: PEFT has no name for this weight" for name in found.own)
    yield from _unknown_targets(found)
    if not found.targets:
        yield "there is no low-rank adapter"
    known = {target.name for target in found.targets}
    for key, value in found.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in known:
            if not any(key.startswith(f"{name}.") for name in record.saved_modules):
                yield f"{key} {list(value.shape)}: it is no factor of a layer"
        elif value.dim() != 2:
            yield f"{match['name']}: it is a convolution"


def _unknown_targets(found: Stored) -> Iterator[str]:
    attention = {one.name for one in found.joined if len(one.pairs) > 1}
    for target in found.targets:
        if target.parameter:
            yield f"{target.name}: it is a parameter, not a layer"
        elif target.name in attention:
            yield f"{target.name}: it is an nn.MultiheadAttention"
