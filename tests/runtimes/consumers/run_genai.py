"""Generates with onnxruntime-genai: FOLDER LENGTH PROMPTS [ADAPTER], prompts as JSON; prints the tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime_genai as og


def main() -> None:
    folder, length, prompts, *adapter = sys.argv[1:]
    model = og.Model(folder)
    rows = json.loads(prompts)
    params = og.GeneratorParams(model)
    params.set_search_options(
        max_length=int(length), do_sample=False, batch_size=len(rows), min_length=0
    )
    generator = og.Generator(model, params)
    if adapter:
        adapters = og.Adapters(model)
        adapters.load(adapter[0], "one")
        generator.set_active_adapter(adapters, "one")
    longest = max(map(len, rows))
    config = json.loads(Path(folder, "genai_config.json").read_text(encoding="utf-8"))
    pad = config["model"]["pad_token_id"]
    tokens = [token for row in rows for token in row + [pad] * (longest - len(row))]
    if len(rows) == 1:
        generator.append_tokens(tokens)
    else:
        import numpy as np

        generator.append_tokens(np.array(tokens, dtype=np.int32).reshape(len(rows), longest))
    while not generator.is_done():
        generator.generate_next_token()
    found = [list(map(int, generator.get_sequence(i))) for i in range(len(rows))]
    sys.stdout.write(json.dumps(found) + "\n")


main()
