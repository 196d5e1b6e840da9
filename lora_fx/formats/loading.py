"""Load checkpoints of transformers with their weights as they are stored."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import ModuleType

from lora_fx.errors import QuantizationError
from lora_fx.extras import load_optional
from lora_fx.formats.base import formats

__all__ = ["keep_quantized"]

_lock = threading.Lock()
_original: list[dict[str, type]] = []
"""Copies of transformers' table before it was changed, one for each active context."""


@contextlib.contextmanager
def keep_quantized() -> Iterator[None]:
    """Keep ``from_pretrained`` of transformers from dequantizing FP8 and MXFP4, on any device.

    Inside this context, ``from_pretrained`` loads FP8 (DeepSeek-V3, Qwen3-FP8) also without a GPU, and MXFP4
    (gpt-oss) into the dense model's own experts. Otherwise it would dequantize them to bf16, or load a model
    that only kernels for inference can run. Other checkpoints are loaded as usual. The context changes a
    table of transformers while it is active, so do not load other models in other threads meanwhile.

    Example:
        >>> with lora_fx.keep_quantized():
        ...     base = AutoModelForCausalLM.from_pretrained("openai/gpt-oss-20b")
        >>> model = lora_fx.rewrite(base, LoraConfig(r=16))

    Raises:
        QuantizationError: If transformers is not installed.
    """
    known = _quantizers()
    with _lock:
        _original.append(dict(_original[0] if _original else known))
        for weight_format in formats():
            known.update(weight_format.layers.quantizers())
    try:
        yield
    finally:
        with _lock:
            original = _original.pop()
            if not _original:  # no other thread is loading
                known.clear()
                known.update(original)


def _quantizers() -> dict[str, type]:
    """Return the table in which transformers looks up a quantizer by its ``quant_method``."""
    module: ModuleType = load_optional(
        "transformers.quantizers.auto",
        "a quantized checkpoint",
        "lora-fx[hf]",
        error=QuantizationError,
    )
    table: dict[str, type] = module.AUTO_QUANTIZER_MAPPING
    return table
