"""Writes tiny models, adapters and outputs with the installed transformers and PEFT, for another version to load.

Run it with an environment of transformers 4 (``requirements.txt`` beside this file). The models are those of
the zoo, and each adapter covers every linear layer that PEFT finds.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn

from lora_fx.tools.zoo.models import call, library_models

_RANK = 2
_SCALE = 0.3


def main() -> None:
    """Write one folder for each model: ``base``, ``adapter`` and ``calls.safetensors``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    for entry in library_models("transformers"):
        name = entry.name.partition("/")[2]
        if arguments.only and name not in arguments.only:
            continue
        try:
            model, inputs = entry.build()
            write(model, inputs, arguments.out / name)
            print(name, "written", flush=True)
        except Exception as error:
            print(
                name,
                "FAILED",
                type(error).__name__,
                str(error)[:200].replace("\n", " "),
                flush=True,
            )
            traceback.print_exc(limit=-2, file=sys.stderr)


def write(model: nn.Module, inputs: Any, folder: Path) -> None:
    """Write a model, an adapter with random values, and the outputs of both."""
    folder.mkdir(parents=True)
    saveable: Any = model
    saveable.save_pretrained(folder / "base")
    with torch.no_grad():
        base = call(model, inputs)
        adapted = adapt(model)
        output = call(adapted, inputs)
    adapted.save_pretrained(folder / "adapter")
    tensors = {
        f"input.{name}": value for name, value in dict(inputs).items() if torch.is_tensor(value)
    }
    tensors |= {"base": first(base), "adapted": first(output)}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "calls.safetensors"
    )


def adapt(model: nn.Module) -> Any:
    """Return a PeftModel with random values in both factors of every linear layer but the head."""
    kind: Any = peft
    wrapped: Any = peft.get_peft_model(
        model, kind.LoraConfig(r=_RANK, lora_alpha=3, target_modules="all-linear")
    )
    generator = torch.Generator().manual_seed(0)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.copy_(torch.randn(value.shape, generator=generator) * _SCALE)
    return wrapped.eval()


def first(output: Any) -> torch.Tensor:
    """Return the logits of an output, or its first floating-point tensor."""
    logits = output.get("logits") if hasattr(output, "get") else None
    if logits is not None:
        return logits.detach()
    values = output if isinstance(output, (tuple, list)) else output.to_tuple()
    return next(
        value for value in values if torch.is_tensor(value) and value.is_floating_point()
    ).detach()


if __name__ == "__main__":
    main()
