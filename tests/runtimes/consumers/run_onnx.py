"""Runs a file with ONNX Runtime: REQUEST RESULTS, a JSON file and the .npz file to write.

The request has ``file``, ``provider``, ``cache`` (the device of a decoder's cache) and ``calls``: each with
``feeds`` (an .npz file), ``adapter`` (an .onnx_adapter file or null) and ``next`` (for a decoder: a list of
the tokens to feed after the prompt, one by one; else null). All calls run in one session. Prints its
version, and each provider with the operators that ran there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = f"{sys.argv[2]}.profile"
    providers = list(dict.fromkeys([request["provider"], "CPUExecutionProvider"]))
    session = ort.InferenceSession(request["file"], options, providers=providers)
    results = {}
    for number, call in enumerate(request["calls"]):
        feeds = dict(np.load(call["feeds"]))
        if call["next"] is None:
            found = run(session, feeds, call["adapter"])
        else:
            found = decode(session, feeds, call["adapter"], call["next"], request["cache"])
        results.update({f"{number}/{name}": value for name, value in found.items()})
    np.savez(sys.argv[2], **results)
    said = {"version": ort.__version__, "operators": placement(session)}
    sys.stdout.write(json.dumps(said) + "\n")


def run(session: Any, feeds: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """The outputs by name, the adapter handed over in ONNX Runtime's own way."""
    how = ort.RunOptions()
    if adapter:
        held = ort.LoraAdapter()  # the options do not keep it alive
        held.Load(adapter)
        how.add_active_adapter(held)
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds, how), strict=True))


def decode(
    session: Any, feeds: dict[str, Any], adapter: str | None, following: list[int], cache: str
) -> dict[str, Any]:
    """The logits of the last position after the prompt and after each token that follows."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    # Bindings pass adapters over: their values are inputs like others. The file object owns them.
    held = ort.AdapterFormat.read_adapter(adapter) if adapter else None
    kept = held.get_parameters() if held else {}
    others = set(feeds) - {"input_ids", "attention_mask"}
    kept |= {name: ort.OrtValue.ortvalue_from_numpy(feeds[name]) for name in others}
    names = [one.name for one in session.get_outputs()]
    past = {}
    for one in session.get_inputs():
        if one.name.startswith("past_key_values"):
            dtype = np.float16 if "float16" in one.type else np.float32
            shape = [len(ids), one.shape[1], 0, one.shape[3]]
            past[one.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    logits = []
    for token in [None, *following]:
        if token is not None:
            ids = np.full((len(ids), 1), token, ids.dtype)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        binding = session.io_binding()
        for name, value in {**past, **kept}.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        for name in names:
            binding.bind_output(name, "cpu" if name == "logits" else cache)
        session.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        logits.append(outputs["logits"].numpy()[:, -1])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    devices = np.array(sorted({value.device_name() for value in past.values()}))
    return {"logits": np.stack(logits, axis=1), "devices": devices}


def placement(session: Any) -> dict[str, list[str]]:
    """Each provider with the operators that ran there."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {}
    for event in events:
        if provider := event.get("args", {}).get("provider"):
            found.setdefault(provider, set()).add(event["args"]["op_name"])
    return {name: sorted(operators) for name, operators in found.items()}


main()
