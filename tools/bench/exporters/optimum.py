"""optimum-onnx. Arguments: base folder, adapter folder, output folder, task, "merge" or "folder".

It knows no adapters, but transformers loads their folders: PEFT's layers are exported as they run then.
"""

import json
import sys
import time

import peft
import transformers
from optimum.exporters.onnx import onnx_export_from_model

__all__ = ["main"]


def main(base: str, adapter: str, out: str, task: str, how: str) -> None:
    """Exports, and prints what came of it as JSON."""
    began = time.perf_counter()
    encoder = task == "feature-extraction"
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    if how == "merge":
        model = kind.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    else:
        model = kind.from_pretrained(adapter)
    onnx_export_from_model(
        model.eval(), output=out, task=task, library_name="transformers", do_validation=False
    )
    print(json.dumps({"seconds": time.perf_counter() - began, "file": f"{out}/model.onnx"}))


if __name__ == "__main__":
    sys.excepthook = lambda kind, error, _: print(
        json.dumps({"error": f"{kind.__name__}: {error}"})
    )
    main(*sys.argv[1:])
