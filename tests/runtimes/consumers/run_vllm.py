"""Generates with vLLM on the CPU: BASE ADAPTERS PROMPT NEW, the adapters as JSON of names and folders.

Prints JSON, by the name of the adapter ("" for the base): its tokens, or why vLLM refuses its folder.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def refusal(folder: str) -> str:
    """What vLLM has against a folder; "" if nothing."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    try:
        helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
        helper.validate_legal(LoRAConfig(max_lora_rank=16))
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base, adapters, prompt, new = sys.argv[1:]
    model = LLM(
        base,
        dtype="float32",
        enable_lora=True,
        enforce_eager=True,
        max_lora_rank=16,
        max_loras=1,
        max_model_len=64,
        max_num_seqs=2,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0.0, max_tokens=int(new), detokenize=False, ignore_eos=True)
    found = {}
    folders = {"": None, **json.loads(adapters)}
    for number, (name, folder) in enumerate(folders.items()):
        if folder and (reason := refusal(folder)):
            found[name] = reason
            continue
        request = LoRARequest(name, number, folder) if folder else None
        given = {"prompt_token_ids": json.loads(prompt)}
        (out,) = model.generate([given], params, lora_request=request, use_tqdm=False)
        found[name] = list(out.outputs[0].token_ids)
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
