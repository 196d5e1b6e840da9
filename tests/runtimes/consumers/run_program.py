"""Exports and runs programs: TARGET MODEL FOLDER PATHS; prints sizes and errors.

PATHS is the ``sys.path`` of the tests as JSON, because the exporter and its model come from there. The folder
is then read as an application does, from its files alone.
"""

from __future__ import annotations

import json
import site
import sys
from pathlib import Path
from typing import Any

target, kind, place, paths = sys.argv[1:]
for path in json.loads(paths):
    site.addsitedir(
        path
    )  # after the runtime's own packages; finds an editable installation as well

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lora_fx  # noqa: E402


def base() -> tuple[nn.Module, dict[str, Tensor] | Tensor, dict[str, Any]]:
    """Return a model, a call of it, and what to adapt: options of ``LoraConfig``."""
    torch.manual_seed(0)
    bert = {"target_modules": ["query", "value"]}
    if kind == "minilm":
        from lora_fx.tools.demo import SentenceClassifier

        model = SentenceClassifier.pretrained(5)
        nn.init.normal_(model.head.weight, std=0.1)
        ids = torch.randint(1000, 2000, (2, 16))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, bert
    if kind == "resnet":
        from torchvision.models import resnet18

        network = resnet18().eval()
        names = [name for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
        return network, torch.randn(2, 3, 64, 64), {"target_modules": [*names, "fc"]}
    if kind == "heads":
        from transformers import BertConfig, BertForSequenceClassification

        small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        config = BertConfig(**small, num_hidden_layers=2, vocab_size=64, num_labels=3)
        ids = torch.tensor([[5, 9, 3, 7, 2], [8, 2, 1, 0, 0]])
        options = {
            **bert,
            "modules_to_save": ["classifier", "LayerNorm"],
            "trainable_token_indices": {"word_embeddings": [9, 2]},
        }
        call = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        return BertForSequenceClassification(config).eval(), call, options
    from transformers import LlamaConfig, LlamaForCausalLM

    # A weight of 1 MiB is large enough that an ONNX file would get it without memory.
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return (
        LlamaForCausalLM(config).eval(),
        {"input_ids": torch.randint(64, (2, 8))},
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    )


class OpenVino:
    """An application of OpenVINO: it compiles the base once."""

    def __init__(self, folder: Path) -> None:
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        self.model = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", exact)

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read an adapter."""
        from safetensors.torch import load_file

        return load_file(path)

    def run(self, inputs: dict[str, Tensor], order: list[str]) -> Tensor:
        """Return the first output."""
        return torch.from_numpy(
            self.model({name: inputs[name].numpy() for name in order})[0].copy()
        )


class Executorch:
    """An application of ExecuTorch: it loads the base once."""

    def __init__(self, folder: Path) -> None:
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(folder / "model.pte")
        self.method = self.program.load_method("forward")

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read an adapter."""
        from executorch.exir._serialize._cord import Cord
        from executorch.exir.scalar_type import ScalarType
        from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

        data = FlatTensorSerializer().deserialize(Cord(path.read_bytes()))
        dtypes = {ScalarType.FLOAT: torch.float32, ScalarType.LONG: torch.int64}
        return {
            name: torch.frombuffer(
                bytearray(data.buffers[entry.buffer_index]),
                dtype=dtypes[entry.tensor_layout.scalar_type],
            ).reshape(entry.tensor_layout.sizes)
            for name, entry in data.named_data.items()
        }

    def run(self, inputs: dict[str, Tensor], order: list[str]) -> Tensor:
        """Return the first output."""
        return self.method.execute([inputs[name] for name in order])[0].clone()


def main() -> None:
    model, example, options = base()
    adapted = lora_fx.rewrite(model, lora_fx.LoraConfig(r=4, **options), adapter_name="first")
    if "trainable_token_indices" in options:  # fewer tokens than the folder takes
        options["trainable_token_indices"] = {"word_embeddings": [2]}
    lora_fx.add_adapter(adapted, lora_fx.LoraConfig(r=2, **options), "second")
    for name in ("first", "second"):
        lora_fx.set_adapter(adapted, name)
        with torch.no_grad():
            for parameter in lora_fx.trainable_parameters(adapted):
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.eval()
    call = {"x": example} if isinstance(example, Tensor) else example
    application: Any = {"openvino": OpenVino, "executorch": Executorch}[target]
    said: dict[str, Any] = {"lora_fx": lora_fx.__file__}

    @torch.no_grad()
    def wanted(name: str | None) -> Tensor:
        """Return what PyTorch computes with an adapter, or without."""
        if name is None:
            with lora_fx.disable_adapter(adapted):
                return first(adapted(**call))
        lora_fx.set_adapter(adapted, name)
        return first(adapted(**call))

    def first(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]

    def error(got: Tensor, want: Tensor) -> float:
        return float((got - want).abs().max() / want.abs().max())

    lora_fx.set_adapter(adapted, "first")
    folder = Path(place, "merged")
    report = lora_fx.export_onnx(adapted, folder, example, target=target, adapters="merge")
    order = json.loads((folder / "program.json").read_text())["order"]
    said["merged"] = error(application(folder).run(call, order), wanted("first"))
    said["bytes"] = report.size_bytes

    folder = Path(place, "swapped")
    report = lora_fx.export_onnx(adapted, folder, example, target=target, adapters="inputs")
    described = json.loads((folder / "program.json").read_text())
    loaded = application(folder)
    files = {path.stem: path for path in (folder / "adapters").iterdir()}
    bases = list(folder.glob("base.*"))
    none = {name: torch.zeros(size) for name, size in described["adapter_inputs"].items()}
    if bases:
        none = loaded.read(bases[0])
    values = {None: none, **{name: loaded.read(path) for name, path in files.items()}}
    said["swapped"] = [
        error(loaded.run({**call, **values[name]}, described["order"]), wanted(name))
        for name in ("first", "second", None, "first")
    ]
    said["base"] = len(bases)
    said["apart"] = min(error(wanted("first"), wanted(name)) for name in ("second", None))
    said["adapters"] = {name: path.stat().st_size for name, path in files.items()}
    said["swapped_bytes"] = report.size_bytes
    sys.stdout.write(json.dumps(said) + "\n")


main()
