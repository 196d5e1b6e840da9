"""Mixtures whose experts are quantized: stacks of matrices in each format."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import CheckpointError, ExportError, QuantizationError
from lora_fx.formats import StackedTensor, dense, quantization_of
from tests.algebra import randomize
from tests.mixtures import SIZES, drawn
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import seeded

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

WIDE = {**SIZES, "hidden_size": 32, "num_hidden_layers": 1}
IDS = torch.arange(1, 25).reshape(2, 12)
FORMATS = ["nf4", "int8", "int4"]
CONFIG = lora_fx.LoraConfig(r=3, target_modules=["gate_up_proj", "down_proj"])


@seeded
def qwen3_moe() -> nn.Module:
    return drawn(
        transformers.Qwen3MoeConfig(
            **WIDE, num_experts=6, intermediate_size=64, moe_intermediate_size=64, head_dim=16
        )
    )


@seeded
def gpt_oss() -> nn.Module:
    return drawn(
        transformers.GptOssConfig(
            **WIDE,
            num_local_experts=4,
            intermediate_size=64,
            head_dim=16,
            layer_types=["full_attention"],
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def built(name: str, implementation: str = "grouped_mm") -> nn.Module:
    model = MODELS[name]()
    model.set_experts_implementation(implementation)
    return model


def with_values_of(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """A copy of a dense model with the values of a quantized one."""
    twin = copy.deepcopy(model)
    weights = dict(quantized.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(dense(weights[name]))
    return twin


def stacks(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if isinstance(p.detach(), StackedTensor)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_the_library_for_each_expert(name: str, form: str) -> None:
    model = built(name)
    quantized = lora_fx.quantize(model, form)
    assert len(stacks(quantized)) == 2
    for fqn, stack in stacks(quantized).items():
        old = model.get_parameter(fqn).detach()
        assert stack.shape == old.shape
        assert stack.dtype == old.dtype
        for expert, matrix in enumerate(old):
            matrix = matrix.T if name == "gpt_oss" else matrix
            alone = lora_fx.quantize(layer(matrix), form)
            exact = dense(alone[0].weight)
            exact = exact.T if name == "gpt_oss" else exact
            assert_same_bits(dense(stack)[expert], exact)
            assert_same_bits(dense(stack[expert]), exact)


def layer(matrix: Tensor) -> nn.Sequential:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = nn.Parameter(matrix.contiguous())
    return nn.Sequential(linear, nn.ReLU(), nn.Linear(matrix.shape[0], 2))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_merges_are_those_of_the_dense_values(
    name: str, form: str, implementation: str
) -> None:
    model = built(name, implementation)
    quantized = lora_fx.quantize(model, form)
    twin = with_values_of(model, quantized)
    assert_close(quantized(IDS).logits, twin(IDS).logits, 1e-6)
    adapted, exact = (
        randomize(lora_fx.rewrite(either, CONFIG), 0.1) for either in (quantized, twin)
    )
    assert not lora_fx.plan(quantized, CONFIG).rejections
    for either in (adapted, exact):
        either(IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    assert len(expected) == 4
    for fqn, gradient in expected.items():
        assert_close(adapted.get_parameter(fqn).grad, gradient, 1e-5)
    with torch.no_grad():
        merged = lora_fx.merge(adapted)
        assert not stacks(merged)
        assert_close(merged(IDS).logits, adapted(IDS).logits, 1e-5)
        again = lora_fx.merge(adapted, requantize=True)
        assert len(stacks(again)) == 2
        weights = {fqn: dense(stack) for fqn, stack in stacks(again).items()}
    for fqn, values in weights.items():
        old, new = dense(quantized.get_parameter(fqn)), merged.get_parameter(fqn)
        # Half the largest step of the grid; that of NF4 is 0.30 of the largest value of a block.
        step = {"nf4": 0.16, "int4": 0.08, "int8": 0.005}[form]
        assert (values - new).abs().max() <= step * new.abs().max()
        assert not torch.equal(values, old)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_no_values_are_kept_for_the_backward_pass(name: str, form: str) -> None:
    quantized = lora_fx.quantize(built(name), form)
    experts = lora_fx.rewrite(quantized, CONFIG).model.layers[0].mlp.experts
    shapes = [tuple(stack.shape[1:]) for stack in stacks(quantized).values()]
    kept: list[Tensor] = []
    x = torch.randn(7, 32)
    chosen = torch.tensor([[0, 1]] * 7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = experts(x.requires_grad_(), chosen, torch.full((7, 2), 0.5))
    assert kept
    plain = [t for t in kept if type(t) is Tensor and t.is_floating_point() and t.dim() > 1]
    found = {tuple(t.shape[-2:]) for t in plain}
    assert not found & {*shapes, *(shape[::-1] for shape in shapes)}
    out.sum().backward()


@pytest.mark.parametrize("form", FORMATS)
def test_only_the_experts_of_a_batch_are_decoded(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_fx.formats import stacks as module

    quantized = lora_fx.quantize(built("qwen3_moe"), form)
    experts = quantized.model.layers[0].mlp.experts
    decoded: list[tuple[int, ...]] = []
    real = module.dense

    def counted(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        values = real(weight, dtype)
        if isinstance(weight, StackedTensor):
            decoded.append(tuple(values.shape))
        return values

    monkeypatch.setattr(module, "dense", counted)
    x = torch.randn(5, 32)
    experts(x, torch.tensor([[3, 1]] * 5), torch.full((5, 2), 0.5))
    assert collections.Counter(decoded) == {(32, 128): 2, (64, 32): 2}


@pytest.mark.parametrize("form", FORMATS)
def test_a_plan_says_what_is_stored_and_how_large_it_is(form: str) -> None:
    model = built("qwen3_moe")
    plan = lora_fx.plan_quantization(model, form)
    rows = {row.name: row for row in plan if row.site.experts}
    assert [row.shape for row in rows.values()] == [(6, 128, 32), (6, 32, 64)]
    assert "6x128x32" in str(plan)
    assert plan.largest_bytes == 6 * 128 * 32 * 4
    assert plan.decoded_bytes == 128 * 32 * 4
    assert "dense at a time: 0.09 MiB now, 0.02 MiB in a step" in plan.summary()
    quantized = lora_fx.quantize(model, form)
    for fqn, stack in stacks(quantized).items():
        size = sum(part.untyped_storage().nbytes() for part in stack.parts.values())
        planned = next(row.bytes for row in rows.values() if row.site.weight == fqn)
        assert abs(planned - size) <= 2048  # tables of bitsandbytes
    row = next(row for row in lora_fx.plan(quantized, CONFIG) if row.site.experts)
    assert row.site.quantized is not None
    assert row.site.quantized.stacked == 6


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_state_dicts_have_the_same_values(name: str, form: str) -> None:
    quantized = lora_fx.quantize(built(name), form)
    with torch.no_grad():
        expected = quantized(IDS).logits
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=form == "nf4")
    keys = [key for key in state if "experts" in key]
    assert all(type(state[key]) is Tensor for key in keys)
    other = MODELS[name]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other = lora_fx.quantize(other, form)
    assert not torch.equal(other(IDS).logits, expected)
    other.load_state_dict(state)
    twins = [other, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))]
    for twin in twins:
        with torch.no_grad():
            assert_same_bits(twin(IDS).logits, expected)
    key = next(key for key in keys if "gate_up_proj_" in key and "bias" not in key)
    with pytest.raises(RuntimeError, match="is stored with"):
        other.load_state_dict({**state, key: state[key][:2]})
    dense_state = built(name).state_dict()
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        other.load_state_dict(dense_state)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_half_precision_computes_in_it(name: str) -> None:
    quantized = lora_fx.quantize(built(name).to(torch.bfloat16), "nf4")
    adapted = lora_fx.rewrite(quantized, CONFIG)
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    stack = next(iter(stacks(quantized).values()))
    assert stack.dtype == torch.bfloat16
    wide = quantized.float()
    assert next(iter(stacks(wide).values())).dtype == torch.float32
    wide(IDS)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_has_the_same_gradients(name: str, form: str) -> None:
    adapted = randomize(lora_fx.rewrite(lora_fx.quantize(built(name), form), CONFIG), 0.1)
    experts = adapted.model.layers[0].mlp.experts
    x, chosen = torch.randn(8, 32), torch.randint(0, 4, (8, 2))
    weights = torch.full((8, 2), 0.5)
    grads = []
    for call in (experts, torch.compile(experts, backend="aot_eager")):
        adapted.zero_grad()
        call(x, chosen, weights).square().sum().backward()
        grads.append([p.grad.clone() for p in experts.parameters() if p.requires_grad])
    assert_close(grads[1], grads[0], 1e-5)


OPERATORS = {"nf4": "MatMulBnb4", "int8": "DequantizeLinear", "int4": "MatMulNBits"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_a_file_has_a_quantized_product_for_each_expert(
    name: str, form: str, adapted: bool, tmp_path: Path
) -> None:
    model = lora_fx.quantize(built(name), form)
    if adapted:
        model = randomize(lora_fx.rewrite(model, CONFIG), 0.1)
    model.eval()
    path = tmp_path / "model.onnx"
    report = lora_fx.export_onnx(model, path, (IDS,))
    session = ort.InferenceSession(path)
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :5]):
            out = session.run(None, {"input_ids": ids.numpy()})[0]
            np.testing.assert_allclose(out, model(ids).logits, atol=2e-5)
    experts = 6 if name == "qwen3_moe" else 4
    nodes = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert nodes[OPERATORS[form]] >= 2 * experts
    assert sum(entry.weights for entry in report.quantized) == nodes[OPERATORS[form]]


def test_other_implementations_are_refused_by_the_export(tmp_path: Path) -> None:
    adapted = lora_fx.rewrite(lora_fx.quantize(built("qwen3_moe", "eager"), "int8"), CONFIG)
    with pytest.raises(ExportError, match=r"set_experts_implementation\('grouped_mm'\)"):
        lora_fx.export_onnx(adapted.eval(), tmp_path / "model.onnx", (IDS,))


def test_a_size_that_blocks_do_not_divide_is_refused_with_the_site() -> None:
    model = drawn(
        transformers.Qwen3MoeConfig(
            **WIDE, num_experts=4, intermediate_size=64, moe_intermediate_size=12, head_dim=16
        )
    )
    with pytest.raises(QuantizationError, match=r"experts\.down_proj: blocks of 64 do not divide"):
        lora_fx.quantize(model, "nf4")
    left = lora_fx.quantize(model, "nf4", exclude=["down_proj"])
    assert len(stacks(left)) == 1


class Alone(nn.Module):
    """Experts of a user's own, read in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 32))
        self.down = nn.Parameter(torch.randn(3, 64, 32))
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([F.linear(x, self.up[expert]) for expert in range(3)])
        out = torch.bmm(h.relu(), self.down).sum(0)
        return self.head(out + self.up[0].sum(0) + self.down.mean())


def test_code_that_reads_a_stack_in_its_own_way_gets_the_values() -> None:
    torch.manual_seed(0)
    model = Alone()
    quantized = lora_fx.quantize(model, "int8")
    assert {*stacks(quantized)} == {"up", "down"}
    twin = with_values_of(model, quantized)
    x = torch.randn(5, 32)
    assert_close(quantized(x), twin(x), 1e-6)
    config = lora_fx.LoraConfig(r=2, target_modules=["up", "down"])
    adapted, exact = (randomize(lora_fx.rewrite(m, config), 0.1) for m in (quantized, twin))
    assert_close(adapted(x), exact(x), 1e-5)
    for read in (lambda w: w.sum(0), lambda w: w[1], lambda w: w[:, 3], lambda w: w.mT @ w):
        assert_close(read(adapted.up.detach()), read(exact.up.detach()), 1e-5)
        assert_close(read(quantized.up), read(twin.up), 1e-6)
    row = next(iter(lora_fx.plan(quantized, config)))
    assert str(row.site.quantized) == str(quantization_of(quantized.up))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_weights_of_files_are_joined_one_parameter_at_a_time(name: str, tmp_path: Path) -> None:
    """Of more than ten experts, whose numbers are not in the order of their names."""
    many = transformers.MixtralConfig(**WIDE, num_local_experts=12, intermediate_size=32)
    model = seeded(lambda: drawn(many))() if name == "mixtral" else MODELS[name]()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    quantized = lora_fx.quantize(empty, "int8", weights=tmp_path)
    expected = lora_fx.quantize(model, "int8")
    assert len(stacks(quantized)) == 2
    for fqn, parameter in expected.named_parameters():
        assert_same_bits(dense(quantized.get_parameter(fqn)), dense(parameter))
    adapted = lora_fx.rewrite(expected, CONFIG)
    rows = lora_fx.replace_lora_weights_loftq(adapted, tmp_path)
    assert len(rows) == 2
    assert all(row.after < row.before for row in rows)


def test_files_of_another_mixture_are_refused(tmp_path: Path) -> None:
    qwen3_moe().save_pretrained(tmp_path)
    config = transformers.Qwen3MoeConfig(
        **WIDE, num_experts=4, intermediate_size=64, moe_intermediate_size=64, head_dim=16
    )
    with torch.device("meta"):
        empty = transformers.Qwen3MoeForCausalLM(config)
    with pytest.raises(CheckpointError, match=r"gate_up_proj has 24576 values there and 16384"):
        lora_fx.quantize(empty, "int8", weights=tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_inference_mode_has_the_same_outputs(name: str, implementation: str) -> None:
    quantized = lora_fx.quantize(built(name, implementation), "nf4")
    adapted = randomize(lora_fx.rewrite(quantized, CONFIG), 0.1).eval()
    for model in (quantized, adapted):
        with torch.no_grad():
            expected = model(IDS).logits
        with torch.inference_mode():
            assert_same_bits(model(IDS).logits, expected)


def test_the_first_call_may_be_compiled() -> None:
    """Of a form that no eager call has seen: with sizes that no other test has."""
    config = transformers.Qwen3MoeConfig(
        **WIDE, num_experts=3, intermediate_size=64, moe_intermediate_size=96, head_dim=16
    )
    quantized = lora_fx.quantize(drawn(config), "int8")
    adapted = randomize(lora_fx.rewrite(quantized, CONFIG), 0.1)
    grads = []
    for call in (torch.compile(adapted, backend="aot_eager"), adapted):
        adapted.zero_grad()
        call(IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in adapted.parameters() if p.requires_grad])
    assert_close(grads[0], grads[1], 1e-5)


def test_data_parallel_processes_keep_the_stacks(tmp_path: Path) -> None:
    adapted = lora_fx.rewrite(lora_fx.quantize(built("qwen3_moe"), "nf4"), CONFIG)
    before = {name: dense(stack) for name, stack in stacks(adapted).items()}
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(adapted, find_unused_parameters=True)
        parallel(IDS, labels=IDS).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, stack in stacks(adapted).items():
        assert_same_bits(dense(stack), before[name])
    with pytest.raises(NotImplementedError, match="would write into values"), torch.no_grad():
        stack.copy_(torch.zeros_like(before[name]))


def test_states_of_other_tables_and_routers_are_left_out() -> None:
    model = built("gpt_oss")
    kept = ["q_proj", "k_proj", "v_proj", "o_proj"]
    ours, other = (lora_fx.quantize(model, form, exclude=kept) for form in ("nf4", "fp4"))
    with pytest.raises(RuntimeError, match="gate_up_proj_fp4"):
        other.load_state_dict(ours.state_dict())
    mixture = drawn(transformers.MixtralConfig(**WIDE, num_local_experts=4, intermediate_size=32))
    left = dict(lora_fx.plan_quantization(mixture, "int8").left)
    assert "router" in left["model.layers.0.mlp.gate"]
