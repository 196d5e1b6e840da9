"""Small decoders with heads of 16 channels, and graphs of a few nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lora_fx

VOCABULARY = 64
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def decoder(kind: str, **changes: Any) -> Any:
    """A decoder of that family whose tokens differ, in eval mode."""
    t = pytest.importorskip("transformers")
    sizes = _SIZES | changes
    name, config = {
        "llama": lambda: ("LlamaForCausalLM", t.LlamaConfig(**sizes)),
        "qwen3": lambda: ("Qwen3ForCausalLM", t.Qwen3Config(**sizes, head_dim=16)),
        "mistral": lambda: ("MistralForCausalLM", t.MistralConfig(**sizes, sliding_window=4)),
        "phi": lambda: ("PhiForCausalLM", t.PhiConfig(**sizes, partial_rotary_factor=0.5)),
        "gpt2": lambda: (
            "GPT2LMHeadModel",
            t.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=48),
        ),
    }[kind]()
    torch.manual_seed(0)
    model = getattr(t, name)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.tie_weights()
    return model


def adapted(model: nn.Module, **config: Any) -> Any:
    """The model with an adapter that changes what it says."""
    made = lora_fx.rewrite(model, lora_fx.LoraConfig(r=4, lora_alpha=8, **config))
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return made


def prompts() -> tuple[Tensor, Tensor]:
    """Texts of several lengths, padded on the left."""
    torch.manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :5] = 0
    return ids.masked_fill(mask == 0, 0), mask


Inputs = Mapping[str, tuple[int, Sequence[int | str]]]


def graph(
    nodes: Sequence[Any],
    inputs: Inputs,
    outputs: Inputs,
    constants: Mapping[str, Any] | None = None,
) -> ir.Model:
    """A model of a few nodes, with the shapes that inference finds."""
    made = oh.make_graph(
        list(nodes),
        "small",
        [oh.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [oh.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    model = oh.make_model(made, opset_imports=[oh.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def operators(model: ir.Model | Path) -> Counter[str]:
    """How many nodes of each operator there are."""
    found = ir.load(model) if isinstance(model, Path) else model
    return Counter(node.op_type for node in found.graph.all_nodes())


def run(model: ir.Model, **feeds: Any) -> list[Any]:
    """What ONNX Runtime computes, none of its own optimizations applied."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    text = ir.to_proto(model).SerializeToString()
    session = runtime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def fused_equally(
    build: Callable[[], ir.Model], fuse: Callable[[ir.Model], Any], **feeds: Any
) -> tuple[int, ir.Model]:
    """Fuse a graph and compare it with the one before.

    Returns:
        How often the fusion was applied, and the graph after it.
    """
    from lora_fx.export.fuse.graph import remove_unused

    plain, changed = build(), build()
    count, _ = fuse(changed)
    remove_unused(changed)
    for want, got in zip(run(plain, **feeds), run(changed, **feeds), strict=True):
        assert want.shape == got.shape
        np.testing.assert_allclose(
            got, want, rtol=2e-3 if want.dtype == np.float16 else 2e-5, atol=1e-5
        )
    return count, changed
