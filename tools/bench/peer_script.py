"""Exports with another library in its own environment.

No module imports this file, and it imports no lora-fx.

Arguments: the exporter, base folder, adapter folder, output folder, task, and mode: "merge", "inputs" for
Olive or "folder" for optimum. "optimizer" takes the base, the output folder, and "fused" if residual sums are
fused with the norms, or "apart". "builder" takes the base, the packages of onnxruntime-genai and the output
folder. "genai" takes a folder, a length and a prompt, and generates once for each line that it reads.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["EXPORTERS"]


def _olive(base: str, adapter: str, out: str, task: str, how: str) -> dict[str, Any]:
    """Export with Olive's passes."""
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.conversion import OnnxConversion
    from olive.passes.onnx.extract_adapters import ExtractAdapters
    from olive.passes.pytorch.merge_adapter_weights import MergeAdapterWeights

    def passed(model: Any, kind: Any, folder: str, **options: Any) -> Any:
        pass_ = create_pass_from_dict(kind, options, disable_search=True)
        return pass_.run(model, f"{out}/{folder}")

    began = time.perf_counter()
    model: Any = HfModelHandler(model_path=base, task=task, adapter_path=adapter)
    if how == "merge":
        model = passed(model, MergeAdapterWeights, "merged")
    model = passed(model, OnnxConversion, "onnx", target_opset=20, use_dynamo_exporter=True)
    extra = ""
    if how == "inputs":
        model = passed(model, ExtractAdapters, "extracted", make_inputs=True)
        files = [str(file) for file in (model.model_attributes or {}).get("additional_files", [])]
        extra = next((file for file in files if file.endswith(".onnx_adapter")), "")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "file": model.model_path, "adapter": extra}


def _optimum(base: str, adapter: str, out: str, task: str, how: str) -> dict[str, Any]:
    """Export with optimum. It knows no adapters, so without a merge it exports PEFT's layers as they run."""
    import peft
    from optimum.exporters.onnx import onnx_export_from_model

    kind = _auto(task)
    began = time.perf_counter()
    if how == "merge":
        model = kind.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    else:
        model = kind.from_pretrained(adapter)
    onnx_export_from_model(
        model.eval(), output=out, task=task, library_name="transformers", do_validation=False
    )
    return {"seconds": time.perf_counter() - began, "file": f"{out}/model.onnx"}


def _torch_onnx(base: str, adapter: str, out: str, task: str, how: str) -> dict[str, Any]:
    """Merge with PEFT, then export with torch.onnx."""
    import peft
    import torch

    kind = _auto(task)
    began = time.perf_counter()
    extra = {"add_pooling_layer": False} if task == _ENCODER else {}
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
    return {"seconds": time.perf_counter() - began, "file": str(path)}


def _optimizer(base: str, out: str, sums: str) -> dict[str, Any]:
    """Export an encoder with optimum, then apply the fusions of ONNX Runtime's Python optimizer."""
    import runpy
    from contextlib import redirect_stdout

    from optimum.exporters.onnx import onnx_export_from_model

    began = time.perf_counter()
    model = _auto(_ENCODER).from_pretrained(base).eval()
    model_file, optimized = f"{out}/model.onnx", f"{out}/optimized.onnx"
    sizes = ["--num_heads", str(model.config.num_attention_heads)]
    sizes += ["--hidden_size", str(model.config.hidden_size)]
    apart = [] if sums == "fused" else ["--disable_skip_layer_norm"]
    sys.argv = ["optimizer", "--input", model_file, "--output", optimized, "--model_type", "bert"]
    sys.argv += [*sizes, *apart]
    with redirect_stdout(sys.stderr):
        onnx_export_from_model(
            model, output=out, task=_ENCODER, library_name="transformers", do_validation=False
        )
        runpy.run_module("onnxruntime.transformers.optimizer", run_name="__main__")
    return {"seconds": time.perf_counter() - began, "file": optimized}


def _builder(base: str, packages: str, out: str) -> dict[str, Any]:
    """Run onnxruntime-genai's model builder, with the torch and transformers of this environment."""
    import runpy
    from contextlib import redirect_stdout

    sys.path.append(packages)
    began = time.perf_counter()
    sys.argv = ["builder", "-i", base, "-o", out, "-p", "fp32", "-e", "cpu", "-c", f"{out}-cache"]
    with redirect_stdout(sys.stderr):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    path = Path(out, "genai_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    threads = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    config["model"]["decoder"]["session_options"].update(threads)
    path.write_text(json.dumps(config), encoding="utf-8")
    return {"seconds": time.perf_counter() - began, "file": f"{out}/model.onnx"}


def _genai(folder: str, length: str, prompt: str) -> dict[str, Any]:
    """Generate for each input line, and print the tokens and their CPU time."""
    import onnxruntime_genai as og

    model = og.Model(folder)
    for _ in sys.stdin:
        began = time.process_time()
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=int(length), do_sample=False, batch_size=1)
        generator = og.Generator(model, params)
        generator.append_tokens(json.loads(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        tokens = [int(token) for token in generator.get_sequence(0)]
        seconds = time.process_time() - began
        sys.stdout.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")
        sys.stdout.flush()
    return {}


_ENCODER = "feature-extraction"


def _auto(task: str) -> Any:
    import transformers

    return transformers.AutoModel if task == _ENCODER else transformers.AutoModelForCausalLM


EXPORTERS: dict[str, Callable[..., dict[str, Any]]] = {
    "olive": _olive,
    "optimum": _optimum,
    "torch_onnx": _torch_onnx,
    "optimizer": _optimizer,
    "builder": _builder,
    "genai": _genai,
}

if __name__ == "__main__":
    sys.excepthook = lambda kind, error, _: print(
        json.dumps({"error": f"{kind.__name__}: {error}"})
    )
    print(json.dumps(EXPORTERS[sys.argv[1]](*sys.argv[2:])))
