"""Checkpoints of GPTQ and AWQ, which gptqmodel writes and transformers loads."""

from __future__ import annotations

import copy
import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lora_fx
from lora_fx.formats import dense, format_of, quantization_of
from lora_fx.formats.gptqmodel import GPTQModelTensor, Packing, pack_codes, unpack_codes
from lora_fx.formats.packed import Parts
from lora_fx.passes.graph import share_copy
from tests.numerics import assert_same_bits
from tests.quantized import gptq_layer

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))

# --- the numbers, by a formula and without the library --------------------------------------------

ORDER = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)  # of AWQ: the columns of eight codes, from the lowest bits to the highest


def words_of(codes: list[int], bits: int) -> list[int]:
    """A row of codes as whole numbers of 32 bits: one long number, cut into pieces."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [number >> (32 * place) & 0xFFFFFFFF for place in range(count)]
    return [word - (word >> 31 << 32) for word in words]


def in_order(codes: list[int]) -> list[int]:
    return [codes[start + place] for start in range(0, len(codes), 8) for place in ORDER]


def numbers(count: int, bits: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2**bits), k=count)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [64, 40])
def test_words_hold_a_stream_of_bits(bits: int, count: int) -> None:
    rows = [numbers(count, bits, seed) for seed in range(3)]
    words = torch.tensor([words_of(row, bits) for row in rows], dtype=torch.int32).T
    codes = unpack_codes(words, bits, count)
    assert codes.T.tolist() == rows
    assert_same_bits(pack_codes(codes, bits), words)


def test_words_of_awq_are_interleaved() -> None:
    rows = [numbers(32, 4, seed) for seed in range(3)]
    words = torch.tensor([words_of(in_order(row), 4) for row in rows], dtype=torch.int32).T
    codes = unpack_codes(words, 4, 32, interleaved=True)
    assert codes.T.tolist() == rows
    assert_same_bits(pack_codes(codes, 4, interleaved=True), words)


def by_hand(bits: int, awq: bool, groups: list[int] | None = None) -> tuple[Any, Tensor]:
    """A weight [24, 64] in groups of 16, and its values, rounded once from fp64."""
    rows, columns, group = 24, 64, 16
    groups = groups or [column // group for column in range(columns)]
    codes = [numbers(columns, bits, row) for row in range(rows)]
    zeros = [numbers(rows, bits, 100 + index) for index in range(columns // group)]
    scales = torch.rand(columns // group, rows, generator=torch.Generator().manual_seed(0)).half()
    values = [
        [
            float(scales[groups[column], row]) * (codes[row][column] - zeros[groups[column]][row])
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    order = in_order if awq and bits == 4 else list
    tensors = {
        "qweight": [words_of(order([*column]), bits) for column in zip(*codes, strict=True)]
        if awq
        else list(zip(*(words_of(row, bits) for row in codes), strict=True)),
        "qzeros": [words_of(order(row), bits) for row in zeros],
        **({} if awq else {"g_idx": groups}),
    }
    parts = {name: torch.tensor(lines, dtype=torch.int32) for name, lines in tensors.items()}
    parts["scales"] = scales
    weight = GPTQModelTensor(
        Parts(parts, (rows, columns), Packing(bits, group, awq)), torch.float32
    )
    return nn.Parameter(weight, requires_grad=False), torch.tensor(values, dtype=torch.float64)


def shuffled() -> list[int]:
    groups = [column // 16 for column in range(64)]
    random.Random(0).shuffle(groups)
    return groups


FORMS = {
    **{f"GPTQ in {bits} bits": (bits, False) for bits in (2, 3, 4, 8)},
    **{f"AWQ in {bits} bits": (bits, True) for bits in (2, 3, 4, 5, 8)},
    "act-order in 4 bits": (4, False, shuffled()),
    "act-order in 8 bits": (8, False, shuffled()),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
def test_values_are_scale_times_code_minus_zero(form: tuple[Any, ...]) -> None:
    weight, values = by_hand(*form)
    assert_same_bits(dense(weight), values.half().float())
    known = format_of(weight)
    assert known is not None
    assert_same_bits(dense(known.widened(weight)), values.float())


@forms
def test_values_are_packed_on_the_old_grid_or_on_a_new_one(form: tuple[Any, ...]) -> None:
    weight, values = by_hand(*form)
    known = format_of(weight)
    assert known is not None
    again: Any = known.requantize(values, weight.data)
    for name, tensor in weight.parts.items():
        assert_same_bits(again.parts[name], tensor)
    # One group gets values outside of its range, and the others keep their numbers.
    groups = torch.tensor(form[2] if len(form) > 2 else [column // 16 for column in range(64)])
    values = torch.where(groups == 1, 3 * values, values)
    again = known.requantize(values, weight.data)
    of_others = groups != 1
    assert_same_bits(dense(again)[:, of_others], dense(weight)[:, of_others])
    parts = again.parts
    assert {n: (t.dtype, t.shape) for n, t in parts.items()} == {
        n: (t.dtype, t.shape) for n, t in weight.parts.items()
    }
    error = (dense(again).double() - values).abs().T
    largest = parts["scales"].double()[groups] * 0.502  # half a step, and a rounding of the scale
    assert bool((error <= largest + 1e-3 * values.abs().T).all())


def test_a_symmetric_group_stays_symmetric() -> None:
    weight, values = by_hand(4, False)
    middle = torch.full_like(weight.parts["qzeros"], 0x88888888 - 2**32)
    parts = {**weight.parts, "qzeros": middle}
    even = GPTQModelTensor(Parts(parts, weight.shape, weight.options), torch.float32)
    known = format_of(even)
    assert known is not None
    again: Any = known.requantize(5 * values, even)
    assert_same_bits(again.parts["qzeros"], middle)
    assert bool((again.parts["scales"] >= parts["scales"]).all())


def test_values_of_zero_stay_zero() -> None:
    weight, values = by_hand(4, True)
    parts = {**weight.parts, "scales": torch.zeros_like(weight.parts["scales"])}
    empty = GPTQModelTensor(Parts(parts, weight.shape, weight.options), torch.float32)
    known = format_of(empty)
    assert known is not None
    assert not dense(known.requantize(0 * values, empty)).any()


@forms
def test_a_file_has_the_values(form: tuple[Any, ...], tmp_path: Path) -> None:
    weight, values = by_hand(*form)
    model = nn.Sequential(nn.Linear(64, 24, bias=False))
    model[0].weight = weight
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    report = lora_fx.export_onnx(model, tmp_path / "model.onnx", x)
    (found,) = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu").run([x]).values()
    torch.testing.assert_close(found, x @ values.float().T, rtol=1e-5, atol=1e-4)
    (stored,) = report.quantized
    assert stored.operator == ("DequantizeLinear" if form[0] > 4 else "MatMulNBits")
    assert stored.scheme == f"int{form[0]}"


@forms
def test_an_adapter_is_trained_merged_and_swapped(form: tuple[Any, ...], tmp_path: Path) -> None:
    weight, values = by_hand(*form)
    base = nn.Sequential(nn.Linear(64, 24, bias=False))
    base[0].weight = nn.Parameter(values.half().float())
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, seed=0, target_modules=["0"])
    wanted = lora_fx.rewrite(base, config)
    base[0].weight = weight
    mine = lora_fx.rewrite(base, config)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    for one in (mine, wanted):
        one(x).square().sum().backward()
    for mine_is, wanted_is in zip(
        lora_fx.trainable_parameters(mine), lora_fx.trainable_parameters(wanted), strict=True
    ):
        error = (mine_is.grad - wanted_is.grad).norm() / wanted_is.grad.norm()  # type: ignore[operator, union-attr]
        assert float(error) < 1e-6
    merged: Any = lora_fx.merge(mine)
    assert_same_bits(merged[0].weight, lora_fx.merge(wanted)[0].weight)  # type: ignore[index]

    lora_fx.export_onnx(mine, tmp_path / "model.onnx", x, adapters="inputs")
    session = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu")
    lora_fx.save_adapter(mine, tmp_path / "adapter")
    session.load_adapter("a", tmp_path / "adapter")
    (found,) = session.run([x], adapter="a").values()
    unrounded = x @ (values - values.half().double()).float().T
    torch.testing.assert_close(found, mine(x).detach() + unrounded, rtol=1e-5, atol=1e-3)


def test_groups_of_several_sizes_are_not_exported(tmp_path: Path) -> None:
    groups = [0] * 15 + [1] * 17 + [2] * 16 + [3] * 16
    weight, values = by_hand(4, False, groups)
    model = nn.Sequential(nn.Linear(64, 24, bias=False))
    model[0].weight = weight
    assert_same_bits(dense(weight), values.half().float())
    with pytest.raises(lora_fx.ExportError, match=r"'0.weight' is stored as .* of several sizes"):
        lora_fx.export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 64))


def test_the_library_is_not_imported() -> None:
    code = "import sys, lora_fx.formats; assert not [m for m in sys.modules if m.startswith('gptqmodel')]"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- checkpoints of the library -------------------------------------------------------------------

missing = pytest.mark.skipif(
    not importlib.util.find_spec("gptqmodel") or not importlib.util.find_spec("optimum"),
    reason="needs gptqmodel and optimum",
)


def needs_library(test: Any) -> Any:
    """Mark a test that `make test-stacks STACKS=gptqmodel` runs."""
    return pytest.mark.stack(missing(test))


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "GPTQ": {"bits": 4},
    "GPTQ, act-order": {"bits": 4, "sym": False, "desc_act": True, "act_group_aware": False},
    "GPTQ, version 2": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "GPTQ, rows": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "GPTQ, 2 bits": {"bits": 2},
    "GPTQ, 3 bits": {"bits": 3, "sym": False},
    "GPTQ, 8 bits": {"bits": 8},
    "AWQ": {"bits": 4, "quant_method": "awq", "format": "gemm", "sym": False},
    "AWQ, 8 bits": {"bits": 8, "quant_method": "awq", "format": "gemm", "sym": False},
}
every = pytest.mark.parametrize("name", CHECKPOINTS)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"t{index}": index for index in range(97)}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    special = {"unk_token": "t0", "pad_token": "t1", "eos_token": "t2", "bos_token": "t3"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a Llama that the library has quantized with a few rows of text."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    return lambda name: written(folder, name)


def written(folder: Path, name: str, model: Any = None) -> Path:
    """Write a checkpoint into a folder, if it is not there, and return its path.

    Args:
        folder: The folder.
        name: A key of ``CHECKPOINTS``.
        model: The dense model; a Llama by default.
    """
    path = folder / name.replace(", ", "-").replace(" ", "-")
    if path.exists():
        return path
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 97}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
    )
    model = model or LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        # 7.7 fails on two cores, and compiles its packing for half a minute.
        patch.setenv("GPTQMODEL_CPU_WORKERS", "2")
        patch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")
        patch.chdir(folder)  # it writes logs
        _quantize(folder / "dense", path, CHECKPOINTS[name])
    return path


def _quantize(source: Path, target: Path, how: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 97, (8, 24), generator=generator).tolist()
    texts = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    config = QuantizeConfig(**{"group_size": 32, "offload_to_disk": False, **how})
    model = GPTQModel.load(str(source), config)
    model.quantize(texts, batch_size=1)
    model.save(str(target))


def loaded(path: Path, backend: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it, by default with a kernel that runs everywhere."""
    awq = '"awq"' in (path / "config.json").read_text(encoding="utf-8")
    kind: Any = AwqConfig if awq else GPTQConfig
    how = kind(bits=4, backend=backend or ("torch_awq" if awq else "torch"))
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=how, dtype=dtype)


def values_of_library(layer: Any) -> Tensor:
    """The values of a layer, [out, in]: by the library, but not compiled by it."""
    if hasattr(type(layer), "dequantize_weight"):
        return type(layer).dequantize_weight(layer).T
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    parts = layer.qweight, layer.qzeros, layer.scales
    return dequantize_gemm(*parts, layer.bits, layer.group_size).T


def theirs(model: Any) -> Any:
    """A dense model with the values of the library."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    result = LlamaForCausalLM(config)
    state = {k: t for k, t in model.state_dict().items() if k in result.state_dict()}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            state[f"{name}.weight"] = values_of_library(layer)
    result.load_state_dict(state)
    return result


def adapted(model: Any, **fields: Any) -> Any:
    config = lora_fx.LoraConfig(r=4, init_lora_weights=False, seed=0, **fields)
    return lora_fx.rewrite(model, config)


def packed(model: nn.Module) -> dict[str, Any]:
    return {k: p for k, p in model.named_parameters() if isinstance(p, GPTQModelTensor)}


@needs_library
@every
def test_values_are_those_of_the_library(name: str, checkpoint: Any) -> None:
    model = loaded(checkpoint(name))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    mine = adapted(model)
    assert len(packed(mine)) == 7
    for key, weight in packed(mine).items():
        layer = model.get_submodule(key.rpartition(".")[0])
        assert_same_bits(weight.data.decoded(), values_of_library(layer))
        assert weight.qweight.data_ptr() == layer.qweight.data_ptr()
    state = {key: tensor for key, tensor in mine.state_dict().items() if "lora_" not in key}
    assert state.keys() == before.keys()
    for key, tensor in before.items():
        assert_same_bits(model.state_dict()[key], tensor)
        assert_same_bits(state[key].float(), tensor.float())
    mine.load_state_dict(mine.state_dict())


@needs_library
@every
def test_gradients_are_those_of_the_dense_model(name: str, checkpoint: Any) -> None:
    model = loaded(checkpoint(name))
    mine, wanted = adapted(model), adapted(theirs(model))
    grads = []
    for one in (mine, wanted):
        one(IDS).logits.square().sum().backward()
        grads.append({k: p.grad for k, p in one.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 14
    for key, grad in grads[0].items():
        assert float((grad - grads[1][key]).norm() / grad.norm()) < 1e-6, key


@needs_library
@every
def test_a_merge_that_changes_nothing_keeps_the_numbers(name: str, checkpoint: Any) -> None:
    model = loaded(checkpoint(name))
    mine = lora_fx.rewrite(model, lora_fx.LoraConfig(r=4))
    again = packed(lora_fx.merge(mine, requantize=True))
    assert len(again) == 7
    for key, weight in packed(mine).items():
        for part, tensor in weight.parts.items():
            assert_same_bits(again[key].parts[part], tensor)


@needs_library
@every
def test_a_merged_model_is_saved_and_loads_again(
    name: str, checkpoint: Any, tmp_path: Path
) -> None:
    path = checkpoint(name)
    model = loaded(path)
    format_before = model.config.quantization_config.format
    mine = adapted(model)
    assert model.config.quantization_config.format == format_before
    again: Any = lora_fx.merge(mine, requantize=True)
    again.save_pretrained(tmp_path / "merged")
    tensors, written = (
        load_file(folder / "model.safetensors") for folder in (path, tmp_path / "merged")
    )
    assert {k: t.shape for k, t in written.items()} == {k: t.shape for k, t in tensors.items()}
    result = loaded(tmp_path / "merged")
    for key, weight in packed(again).items():
        layer = result.get_submodule(key.rpartition(".")[0])
        assert_same_bits(values_of_library(layer), weight.data.decoded())
    torch.testing.assert_close(theirs(result)(IDS).logits, again(IDS).logits)

    merged: Any = lora_fx.merge(mine)
    assert not packed(merged)
    merged.save_pretrained(tmp_path / "dense")
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(result.model.layers[0].self_attn.q_proj) is nn.Linear
    assert_same_bits(result(IDS).logits.detach(), merged(IDS).logits.detach())
    torch.testing.assert_close(merged(IDS).logits, mine(IDS).logits, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("name", ["GPTQ, version 2", "GPTQ, act-order", "AWQ"])
def test_no_values_are_kept_for_the_backward_pass(name: str, checkpoint: Any) -> None:
    mine = adapted(loaded(checkpoint(name)), target_modules=["gate_proj", "up_proj"])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = mine(IDS).logits
    out.sum().backward()
    assert kept
    assert not [t for t in kept if t.numel() == 64 * 128 and not t.requires_grad]


KERNELS = [
    ("GPTQ", "gptq_torch", False),
    ("GPTQ", "gptq_torch_aten", True),
    ("GPTQ", "gptq_torch_fused", True),
    ("GPTQ", "auto", None),
    ("AWQ", "torch_awq", False),
    ("AWQ", "torch_fused_awq", True),
    ("AWQ", "auto", None),
]


@needs_library
@pytest.mark.parametrize(("name", "backend", "repacks"), KERNELS)
def test_layers_of_every_kernel_are_known_before_it_repacks_them(
    name: str, backend: str, repacks: bool | None, checkpoint: Any
) -> None:
    path = checkpoint(name)
    wanted, model = packed(adapted(loaded(path))), loaded(path, backend, torch.bfloat16)
    found = packed(adapted(model))
    assert len(found) == 7
    for key, weight in found.items():
        assert_same_bits(weight.data.decoded(), wanted[key].data.decoded())
    if repacks is None:
        return
    with torch.no_grad():
        model(IDS)
    if not repacks:
        assert len(packed(adapted(model))) == 7
        return
    with pytest.raises(
        lora_fx.NoMatchError, match=r"has repacked it for its kernel.* load the model again"
    ):
        lora_fx.rewrite(model, lora_fx.LoraConfig(r=4))
    before = model.config.quantization_config.format
    assert share_copy(model).config.quantization_config.format == before  # type: ignore[union-attr]


@needs_library
def test_a_layer_that_cannot_be_read_is_named_with_the_reason() -> None:
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    how = {"group_size": 32, "sym": True, "desc_act": False, "in_features": 64, "out_features": 32}
    planes, rotated, other = (
        TorchLinear(5, **how),
        gptq_layer(nn.Linear(64, 32)),
        AwqGEMVLinear(4, **{**how, "group_size": 64, "out_features": 64}, register_buffers=True),
    )
    rotated.online_full_had = True
    net = nn.ModuleDict(
        {"planes": planes, "rotated": rotated, "other": other, "last": nn.Linear(64, 8)}
    )
    net.forward = net["last"].forward  # type: ignore[method-assign]
    text = str(lora_fx.plan(net, lora_fx.LoraConfig(r=4, target_modules=["last"])))
    assert "planes: gptqmodel stores its 5 bits in planes (gptq_p)" in text
    assert "rotated: gptqmodel's TorchLinear also rotates its inputs" in text
    assert (
        "other: gptqmodel's AwqGEMVLinear stores weights in a form that lora_fx does not read"
        in text
    )


@needs_library
@pytest.mark.parametrize("name", ["GPTQ", "GPTQ, act-order", "AWQ", "GPTQ, 8 bits"])
def test_an_onnx_file_has_the_integers(name: str, checkpoint: Any, tmp_path: Path) -> None:
    import onnx

    path = checkpoint(name)
    base = loaded(path)
    mine = adapted(base)
    report = lora_fx.export_onnx(mine, tmp_path / "model.onnx", {"input_ids": IDS})
    assert report.verified
    assert report.quantized[0].weights == 7
    (logits,) = lora_fx.OnnxSession(tmp_path / "model.onnx", "cpu").run({"input_ids": IDS}).values()
    torch.testing.assert_close(logits, mine(IDS).logits.detach(), rtol=2e-3, atol=2e-3)
    arrays = {
        tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor))
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    (codes,) = [array for key, array in arrays.items() if "down_proj" in key and "codes" in key]
    weight = mine.model.layers[0].mlp.down_proj.weight
    if name == "AWQ":
        integers = unpack_codes(weight.qweight.T, 4, 64, interleaved=True)
    else:
        integers = unpack_codes(weight.qweight, weight.options.bits, 128).T
    if name == "GPTQ, act-order":
        integers = integers[:, weight.g_idx.argsort(stable=True)]
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1)
    else:
        codes = codes.int() + 128
    assert codes.flatten().tolist() == integers.flatten().tolist()
    tensors = load_file(path / "model.safetensors")
    in_checkpoint = sum(tensor.nbytes for key, tensor in tensors.items() if "proj" in key)
    stored = [
        key for key in arrays if key.rpartition(".")[2] in ("codes", "scales", "zeros", "order")
    ]
    assert sum(arrays[key].nbytes for key in stored) < 1.25 * in_checkpoint


@needs_library
@pytest.mark.parametrize("name", ["GPTQ, act-order", "GPTQ, 3 bits", "AWQ"])
def test_it_is_planned_copied_and_compiled(name: str, checkpoint: Any) -> None:
    model = loaded(checkpoint(name))
    plan = str(lora_fx.plan(model, lora_fx.LoraConfig(r=4)))
    bits = CHECKPOINTS[name]["bits"]
    assert f"the base's weight in int{bits} (gptqmodel, blocks of 32): 7 site(s)" in plan
    mine = adapted(model)
    expected = mine(IDS).logits
    assert_same_bits(copy.deepcopy(mine)(IDS).logits, expected)
    torch._dynamo.reset()
    layer, x = mine.model.layers[0].mlp, torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@needs_library
def test_peft_reads_the_adapter_over_the_same_layers(checkpoint: Any, tmp_path: Path) -> None:
    import peft

    model = loaded(checkpoint("GPTQ, act-order"))
    mine = adapted(model)
    lora_fx.save_adapter(mine, tmp_path)
    with torch.no_grad():
        wanted, base = mine(IDS).logits, model(IDS).logits
        found = peft.PeftModel.from_pretrained(model, str(tmp_path))(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((wanted - base).abs().max()) > 0.1


@needs_library
def test_it_is_prepared_and_trained(checkpoint: Any) -> None:
    model = loaded(checkpoint("GPTQ"), "auto", torch.bfloat16)
    prepared: Any = lora_fx.prepare_for_kbit_training(model)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    mine = lora_fx.rewrite(prepared, lora_fx.LoraConfig(r=4)).train()
    optimizer = torch.optim.Adam(lora_fx.trainable_parameters(mine), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = mine(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1


@needs_library
def test_a_layer_alone_is_adopted(tmp_path: Path) -> None:
    old = nn.Linear(64, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    layer = gptq_layer(old, bits=8, group=64, order=order)
    (mine,) = share_copy(nn.ModuleList([layer, nn.Linear(1, 1)]))[:1]  # type: ignore[index]
    assert type(mine) is nn.Linear
    assert quantization_of(mine.weight).block_size is None  # type: ignore[union-attr]
    torch.testing.assert_close(dense(mine.weight), old.weight.detach(), rtol=0, atol=2e-3)
    torch.testing.assert_close(mine.bias, old.bias.detach().half().float())
