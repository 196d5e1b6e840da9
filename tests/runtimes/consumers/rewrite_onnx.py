"""Rewrites an ONNX file with a tool: TOOL FILE OUT. Prints the version of the tool.

TOOL is onnxslim, onnxsim, int4 (MatMulNBits), or int8 (quantize_dynamic). The quantizers leave out the nodes
that the metadata of the file names.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

import onnx


def main() -> None:
    tool, file, out = sys.argv[1:]
    model = onnx.load(file)
    listed = {entry.key: entry.value for entry in model.metadata_props}
    exclude = json.loads(listed.get("lora_fx.adapter_nodes", "[]"))
    package = tool
    if tool == "onnxslim":
        import onnxslim

        model = onnxslim.slim(model)
    elif tool == "onnxsim":
        import onnxsim

        model, checked = onnxsim.simplify(model)
        assert checked
    elif tool == "int4":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        package = "onnxruntime"
        quantizer = MatMulNBitsQuantizer(model, block_size=32, nodes_to_exclude=exclude)
        quantizer.process()
        model = quantizer.model.model
    else:
        from onnxruntime.quantization import quantize_dynamic

        package = "onnxruntime"
        quantize_dynamic(file, out, nodes_to_exclude=exclude)
        model = onnx.load(out)
    onnx.save(model, out)
    sys.stdout.write(json.dumps({"version": importlib.metadata.version(package)}) + "\n")


main()
