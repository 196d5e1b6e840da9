"""optimum-onnx. Arguments: base folder, adapter folder, output folder, task, "merge" or "folder".

It knows no adapters, but transformers loads their folders: PEFT's layers are exported as they run then.
"""

import json
import sys
import time

import peft
import transformers
from optimum.exporters.onnx import onnx_export_from_model

sys.excepthook = lambda kind, error, _: print(json.dumps({"error": f"{kind.__name__}: {error}"}))

base, adapter, out, task, how = sys.argv[1:]
began = time.perf_counter()
kind = transformers.AutoModel if task == "feature-extraction" else transformers.AutoModelForCausalLM
if how == "merge":
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter).merge_and_unload()
else:
    model = kind.from_pretrained(adapter)
onnx_export_from_model(
    model.eval(), output=out, task=task, library_name="transformers", do_validation=False
)
print(json.dumps({"seconds": time.perf_counter() - began, "file": f"{out}/model.onnx"}))
