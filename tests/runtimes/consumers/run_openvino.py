"""Runs an ONNX file with OpenVINO on the CPU: FILE CALLS RESULTS, an .npz file of feeds by number and name.

Writes the outputs in the same form to the .npz file RESULTS. Prints the version, and the error of each call
that fails by its number.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import openvino


def main() -> None:
    file, calls, results = sys.argv[1:]
    # In bf16, which is its choice on some CPUs, it would be off by 1e-2.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(file, "CPU", options)
    by_number: dict[str, dict[str, object]] = {}
    for key, value in np.load(calls).items():
        number, _, name = key.partition("/")
        by_number.setdefault(number, {})[name] = value
    found, errors = {}, {}
    for number, feeds in by_number.items():
        try:
            outputs = model.create_infer_request().infer(feeds)
        except RuntimeError as error:
            errors[number] = str(error)
            # After some errors, further runs of a compiled model fail, too.
            model = openvino.Core().compile_model(file, "CPU", options)
            continue
        for port in model.outputs:
            found[f"{number}/{port.get_any_name()}"] = outputs[port]
    np.savez(results, **found)
    sys.stdout.write(json.dumps({"version": openvino.__version__, "errors": errors}) + "\n")


main()
