"""PEFT's merge, then torch.onnx. Arguments: base folder, adapter folder, output folder, task, how."""

import json
import sys
import time
from pathlib import Path

import peft
import torch
import transformers

__all__ = ["main"]


def main(base: str, adapter: str, out: str, task: str, _: str) -> None:
    """Exports, and prints what came of it as JSON."""
    began = time.perf_counter()
    encoder = task == "feature-extraction"
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    extra = {"add_pooling_layer": False} if encoder else {}
    model = kind.from_pretrained(base, use_cache=False, **extra)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    ids = torch.ones(2, 16, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    path = Path(out) / "model.onnx"
    torch.onnx.export(
        merged,
        (),
        path,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        dynamo=True,
        verbose=False,
    )
    print(json.dumps({"seconds": time.perf_counter() - began, "file": str(path)}))


if __name__ == "__main__":
    sys.excepthook = lambda kind, error, _: print(
        json.dumps({"error": f"{kind.__name__}: {error}"})
    )
    main(*sys.argv[1:])
