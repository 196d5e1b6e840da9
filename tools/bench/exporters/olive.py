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

__all__ = ["main"]


def main(base: str, adapter: str, out: str, task: str, how: str) -> None:
    """Exports, and prints what came of it as JSON."""

    def passed(model: Any, kind: Any, folder: str, **options: Any) -> Any:
        made = create_pass_from_dict(kind, options, disable_search=True)
        return made.run(model, f"{out}/{folder}")

    began = time.perf_counter()
    model: Any = HfModelHandler(model_path=base, task=task, adapter_path=adapter)
    if how == "merge":
        model = passed(model, MergeAdapterWeights, "merged")
    model = passed(model, OnnxConversion, "onnx", target_opset=20, use_dynamo_exporter=True)
    beside = ""
    if how == "inputs":
        model = passed(model, ExtractAdapters, "extracted", make_inputs=True)
        files = [str(one) for one in (model.model_attributes or {}).get("additional_files", [])]
        beside = next((one for one in files if one.endswith(".onnx_adapter")), "")
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "file": model.model_path, "adapter": beside}))


if __name__ == "__main__":
    sys.excepthook = lambda kind, error, _: print(
        json.dumps({"error": f"{kind.__name__}: {error}"})
    )
    main(*sys.argv[1:])
