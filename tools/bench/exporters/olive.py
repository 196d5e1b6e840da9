"""Olive's passes. Arguments: base folder, adapter folder, output folder, task, "merge" or "inputs"."""

import json
import sys
import time
from typing import Any

from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.conversion import OnnxConversion
from olive.passes.onnx.extract_adapters import ExtractAdapters
from olive.passes.pytorch.merge_adapter_weights import MergeAdapterWeights

sys.excepthook = lambda kind, error, _: print(json.dumps({"error": f"{kind.__name__}: {error}"}))


def passed(model: Any, kind: Any, folder: str, **options: Any) -> Any:
    """What a pass makes of a model, written into a folder of this name."""
    made = create_pass_from_dict(kind, options, disable_search=True)
    return made.run(model, f"{out}/{folder}")


base, adapter, out, task, how = sys.argv[1:]
began = time.perf_counter()
model: Any = HfModelHandler(model_path=base, task=task, adapter_path=adapter)
if how == "merge":
    model = passed(model, MergeAdapterWeights, "merged")
model = passed(model, OnnxConversion, "onnx", target_opset=20, use_dynamo_exporter=True)
found = {}
if how == "inputs":
    model = passed(model, ExtractAdapters, "extracted", make_inputs=True)
    names = [str(one) for one in (model.model_attributes or {}).get("additional_files", [])]
    found["adapter"] = next((one for one in names if one.endswith(".onnx_adapter")), "")
print(json.dumps({"seconds": time.perf_counter() - began, "file": model.model_path, **found}))
