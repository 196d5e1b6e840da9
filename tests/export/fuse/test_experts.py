"""One operator for the experts of a mixture in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_fx
from lora_fx.export.convert import convert, torch_export_context
from lora_fx.export.fuse import Target, fuse
from lora_fx.export.prepare import prepare
from lora_fx.export.trace import trace
from lora_fx.versions import release
from tests.algebra import randomize
from tests.export.fuse.small import operators
from tests.mixtures import IDS, SIZES, drawn
from tests.numerics import assert_close

fast = pytest.mark.skipif(
    release(ort.__version__) < (1, 31), reason="the operator dequantizes every matrix in every call"
)

_SIZES = SIZES | {"hidden_size": 64, "head_dim": 32}
_CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, num_experts=4, intermediate_size=64, moe_intermediate_size=96
    ),
    # Interleaved gate and up with limits, stored [in, out], with biases.
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES, num_local_experts=4, intermediate_size=96, layer_types=["full_attention"] * 2
    ),
}


def quantized_mixture(kind: str) -> Any:
    torch.manual_seed(0)
    return lora_fx.quantize(drawn(_CONFIGS[kind]()), "int4")


def matrices(path: Path) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in ir.load(path).graph.initializers.items()
        if ".experts." in name and value.const_value is not None
    }


@fast
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_merged_mixture_is_one_operator_a_layer(kind: str, tmp_path: Path) -> None:
    config = lora_fx.LoraConfig(
        r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    adapted = randomize(lora_fx.rewrite(quantized_mixture(kind), config), 0.1).eval()
    model: Any = lora_fx.merge(adapted, requantize=True)
    files = {level: tmp_path / f"{level}.onnx" for level in ("standard", "runtime")}
    reports = {
        level: lora_fx.export_onnx(
            model, path, {"input_ids": IDS}, optimize=level, verify=level == "runtime"
        )
        for level, path in files.items()
    }

    report = reports["runtime"]
    assert report.optimize == "runtime"
    assert report.verified
    assert report.fused["experts"] == 2
    before, after = (operators(path) for path in files.values())
    assert (before["QMoE"], after["QMoE"]) == (0, 2)
    assert before["MatMulNBits"] - after["MatMulNBits"] == 2 * 2 * 4
    assert after["Split"] == before["Split"] - 2 * (2 + (kind == "qwen3_moe"))
    assert files["runtime"].stat().st_size <= files["standard"].stat().st_size
    assert {(form.operator, form.weights) for form in report.quantized} == {
        ("MatMulNBits", 8),
        ("QMoE", 16),
    }
    # The same integers: the rows before the gate alternate between gate and up in both models.
    codes = [matrices(path) for path in files.values()]
    name = "model.layers.1.mlp.experts.gate_up_proj.codes"
    rows = np.arange(192) if kind == "gpt_oss" else np.arange(192).reshape(2, 96).T.reshape(-1)
    for expert in range(4):
        want = codes[0][f"{name}.{expert}"].reshape(192, -1)[rows]
        np.testing.assert_array_equal(codes[1][name][expert], want)

    session = lora_fx.OnnxSession(files["runtime"], "cpu")
    # One token: most experts have no row.
    for ids in (IDS, IDS[:1, :1]):
        (got,) = session.run({"input_ids": ids}).values()
        with torch.no_grad():
            assert_close(got, model(input_ids=ids).logits, 1e-5)


@fast
def test_zero_points_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from tests.lora_fx.test_compressed_experts import IDS as ids
    from tests.lora_fx.test_compressed_experts import kept, write

    write(tmp_path, "W4A16, zero points")
    model = kept(tmp_path)
    path = tmp_path / "model.onnx"
    report = lora_fx.export_onnx(model, path, (ids,), optimize="runtime")
    assert report.fused["experts"] == 1
    (node,) = (node for node in ir.load(path).graph if node.op_type == "QMoE")
    zeros = [node.inputs[index].const_value.numpy() for index in (11, 12)]
    assert all(array.shape[:2] == (4, width) for array, width in zip(zeros, (128, 64), strict=True))
    assert all(len(np.unique(array)) > 1 for array in zeros)
    (got,) = lora_fx.OnnxSession(path, "cpu").run([ids]).values()
    with torch.no_grad():
        # The library holds the scales in bf16, and decodes in it.
        assert_close(got, lora_fx.rewrite(model, lora_fx.LoraConfig()).eval()(ids).logits, 1e-5)


class Mixture(nn.Module):
    """The experts of Qwen3-MoE behind a router: 5 experts, 2 for each token.

    Args:
        score: Makes the scores of the experts from logits.
        inner: Hidden channels of an expert.
        act: Name of the activation.
    """

    def __init__(self, score: Any = torch.sigmoid, inner: int = 96, act: str = "silu") -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            hidden_size=64, moe_intermediate_size=inner, num_experts=5, hidden_act=act
        )
        config._experts_implementation = "grouped_mm"
        self.score = score
        self.router = nn.Parameter(torch.randn(5, 64) / 8)
        self.bias = nn.Parameter(torch.randn(5))
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.2)

    def choose(self, scores: Tensor) -> Tensor:
        """Return the experts of each token, [T, 2]."""
        return (scores + self.bias).topk(2).indices

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, 64]."""
        scores = self.score(x @ self.router.T)
        chosen = self.choose(scores)
        y: Tensor = self.experts(x, chosen, 2.5 * scores.gather(1, chosen))
        return y


class SameTwice(Mixture):
    """Both experts of a token are the same one."""

    def choose(self, scores: Tensor) -> Tensor:
        return scores.argmax(1, keepdim=True).expand(-1, 2)


def quantized_experts(model: Mixture) -> Any:
    return lora_fx.quantize(model.eval(), "int4")


X = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))


@fast
@pytest.mark.parametrize("make", [Mixture, SameTwice])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_weights_of_any_router(make: type[Mixture], dtype: str, tmp_path: Path) -> None:
    model = quantized_experts(make())
    path = tmp_path / "m.onnx"
    report = lora_fx.export_onnx(model, path, (X,), optimize="runtime", dtype=dtype)
    assert report.fused["experts"] == 1
    assert report.optimize == "runtime"
    session = lora_fx.OnnxSession(path, "cpu")
    for x in (X, X[:1]):
        (got,) = session.run([x if dtype == "fp32" else x.half()]).values()
        with torch.no_grad():
            assert_close(got.float(), model(x), 1e-5 if dtype == "fp32" else 5e-3)
    (got,) = session.run([X[:0] if dtype == "fp32" else X[:0].half()]).values()
    assert got.shape == (0, 64)


def marked(model: nn.Module) -> ir.Model:
    """The graph of a model before the fusions."""
    (prepared,) = prepare(model, (X,), None, lambda tensor: tensor)
    traceable = prepared.to_trace(lambda tensor: tensor)
    with torch_export_context():
        traced = trace(traceable.model, traceable.arguments, None, [], 0)
    return convert(traced, traceable, 20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act": "gelu"}, "its gate is not"),
        ({"score": torch.tanh}, "its weights may be negative"),
        ({"inner": 32}, "a row is a single block"),
    ],
    ids=["gate", "weights", "blocks"],
)
def test_other_mixtures_keep_their_products(changes: dict[str, Any], words: str) -> None:
    graph = marked(quantized_experts(Mixture(**changes)))
    assert operators(graph)["Mixture"] == 1
    plain = graph.clone()
    assert not fuse(plain, Target("none")).refused
    fused = fuse(graph, Target("runtime"))
    assert "experts" not in fused.done
    assert words in fused.refused["experts"]
    for changed in (plain, graph):
        assert operators(changed)["MatMulNBits"] == 10
        assert not {"QMoE", "Mixture"} & operators(changed).keys()


def test_an_older_runtime_keeps_the_products() -> None:
    graph = marked(quantized_experts(Mixture()))
    older, newer = graph.clone(), graph
    fused = fuse(older, Target("runtime", version="1.30.0"))
    assert fused.refused["experts"] == "it is for ONNX Runtime from 1.31 on, and this is 1.30.0"
    assert operators(older)["MatMulNBits"] == 10
    assert fuse(newer, Target("runtime", version="1.31.0")).done["experts"] == 1
    assert operators(newer)["MatMulNBits"] == 0


@pytest.mark.parametrize("adapters", ["inline", "inputs"])
def test_adapted_experts_keep_their_products(adapters: Any, tmp_path: Path) -> None:
    config = lora_fx.LoraConfig(
        r=2, target_parameters=["experts.gate_up_proj"], init_lora_weights=False
    )
    model = lora_fx.rewrite(quantized_experts(Mixture()), config).eval()
    path = tmp_path / "m.onnx"
    report = lora_fx.export_onnx(model, path, (X,), optimize="runtime", adapters=adapters)
    assert report.verified
    assert "experts" not in report.fused
    assert operators(path)["MatMulNBits"] == 10


LATER: dict[str, tuple[str, str, int, dict[str, Any], str]] = {
    "attribute": ("FastGelu", "com.microsoft", 20, {"later": 1}, "attribute: later for .*FastGelu"),
    "operator": (
        "Later",
        "com.microsoft",
        20,
        {},
        r"com\.microsoft:Later\(-1\) is not a registered",
    ),
    "operator of ONNX": ("Later", "", 20, {}, "No Op registered for Later"),
    "opset": ("Relu", "", 99, {}, "Opset 99 is under development"),
}


@pytest.mark.parametrize("case", LATER)
def test_a_file_for_a_later_runtime_is_refused(tmp_path: Path, case: str) -> None:
    operator, domain, opset, attributes, message = LATER[case]
    path = tmp_path / "later.onnx"
    node = oh.make_node(operator, ["x"], ["y"], domain=domain, **attributes)
    ports = [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    opsets = [oh.make_opsetid("", opset), oh.make_opsetid("com.microsoft", 1)]
    graph = oh.make_graph([node], "later", ports[:1], ports[1:])
    model = oh.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.helper.set_model_props(model, {"lora_fx.onnxruntime": "9.8.7"})
    onnx.save(model, path)
    message = f"of a later ONNX Runtime, and this is .*{message}.*checked with 9\\.8\\.7.*Install 9"
    with pytest.raises(lora_fx.errors.ProviderError, match=message):
        lora_fx.OnnxSession(path, "cpu")
    onnx.helper.set_model_props(model, {})
    onnx.save(model, path)
    with pytest.raises(lora_fx.errors.ProviderError, match="Install a later version"):
        lora_fx.OnnxSession(path, "cpu")
