"""What a quantised model says about itself to PEFT and transformers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_fx.formats.made import Storage
from lora_fx.formats.weights import quantization_of
from lora_fx.passes.quantize.quantization_plan import PlannedWeight

__all__ = ["say_quantised"]

_log = logging.getLogger("lora_fx")


def say_quantised(model: nn.Module, rows: Sequence[PlannedWeight], how: Storage) -> None:
    """Sets what others ask before they take a model for one of bitsandbytes'; nothing for other libraries.

    A model of transformers whose weights are all in layers gets a configuration with which
    ``from_pretrained`` loads what ``save_pretrained`` writes of it. Of any other a line in the log says that
    it does not.

    Args:
        model: A quantised model that nobody else has, its configuration neither.
        rows: What is stored in few bits.
        how: The format.
    """
    if how.library != "bitsandbytes":
        return
    model.__dict__["is_loaded_in_4bit"] = True
    library: Any = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return
    layers = sys.modules["bitsandbytes"].nn.Linear4bit
    others = [
        row.name for row in rows if not isinstance(model.get_submodule(row.site.owner), layers)
    ]
    if others:
        _log.warning(
            "from_pretrained cannot load what save_pretrained writes of this %s: %s%s no layers of "
            "bitsandbytes. Keep the dense model, or torch.save(model.state_dict()) for one that is quantised "
            "likewise",
            type(model).__name__,
            ", ".join(others[:3]),
            f" and {len(others) - 3} more are" if len(others) > 3 else " are",
        )
        return
    model.config.quantization_config = library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.format,
        bnb_4bit_use_double_quant=how.double,
        bnb_4bit_compute_dtype=how.compute_dtype or rows[0].dtype,
        llm_int8_skip_modules=[
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and quantization_of(module.weight) is None
        ],
    )
