"""Models over quantized weights, as their libraries make them: what the tests of QLoRA begin with."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

from lora_fx.passes.graph import share_copy

__all__ = ["IDS", "SCHEMES", "fp8_layer", "gptq_layer", "hqq_layer", "llama", "quantized"]

IDS = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random weights, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    return LlamaForCausalLM(config)


def quantized(model: nn.Module, scheme: str) -> nn.Module:
    """A copy with every linear layer but the head in one of :data:`SCHEMES`."""
    result = copy.deepcopy(model)
    names = [
        n for n, m in result.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    ]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = SCHEMES[scheme](result.get_submodule(name))
        setattr(result.get_submodule(owner), leaf, layer)
    return result


def _four_bits(quant_type: str, double: bool) -> Callable[[nn.Linear], nn.Module]:
    def make(old: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            quant_type=quant_type,
            compress_statistics=double,
        )
        return _loaded(new, old)

    return make


def _eight_bits(old: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(
        old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False
    )
    return _loaded(new, old)


def _loaded(new: Any, old: nn.Linear) -> nn.Module:
    new.load_state_dict(old.state_dict())
    result: nn.Module = new.to("cpu").train(old.training)
    return result


def _torchao(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(old: nn.Linear) -> nn.Module:
        from torchao.quantization import (
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )

        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        holder = nn.ModuleList([old])
        quantize_(holder, Int8WeightOnlyConfig() if bits == 8 else four)
        return holder[0]

    return make


def _torchao_nf4(old: nn.Linear) -> nn.Module:
    from torchao.quantization import to_nf4

    old.weight = nn.Parameter(to_nf4(old.weight.detach(), 64, 8), requires_grad=False)
    return old


def _fp8(old: nn.Linear) -> nn.Module:
    return share_copy(fp8_layer(old, (32, 32)))


def fp8_layer(old: nn.Linear, block: tuple[int, int] | None, scale_fmt: str = "float") -> nn.Module:
    """The layer of transformers for a linear layer, whose codes and scales are the library's, too."""
    from transformers.integrations.finegrained_fp8 import FP8Linear, Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    sizes = (old.in_features, old.out_features)
    new = FP8Linear(*sizes, block, scale_fmt=scale_fmt, has_bias=old.bias is not None)
    weight, of = old.weight.detach(), block or old.weight.shape
    # The library quantizes whole blocks, and reads blocks that end with the matrix.
    missing = [-size % whole for size, whole in zip(weight.shape, of, strict=True)]
    padded = nn.functional.pad(weight, (0, missing[1], 0, missing[0]))
    encoder = Fp8Quantize(types.SimpleNamespace(quantization_config=config))
    parts = encoder.convert({"weight": padded})  # type: ignore[arg-type]
    codes = parts["weight"].view(torch.uint8)[: weight.shape[0], : weight.shape[1]].contiguous()
    new.weight.data = codes.view(torch.float8_e4m3fn)
    new.weight_scale_inv.data = parts["weight_scale_inv"].reshape(new.weight_scale_inv.shape)
    new.bias = old.bias
    result: nn.Module = new.train(old.training)
    return result


def _compressed(old: nn.Linear) -> nn.Module:
    """Values of four bits with zero points, in groups of 32, packed as compressed-tensors does."""
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        initialize_module_for_quantization,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    initialize_module_for_quantization(old, QuantizationScheme(targets=["Linear"], weights=args))
    layer: Any = old
    groups = layer.weight.detach().unflatten(1, (-1, 32))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    layer.weight_scale.data, layer.weight_zero_point.data = scales, zeros
    compress_module(layer)
    return share_copy(layer)


def _gptq(old: nn.Linear) -> nn.Module:
    """Values of four bits with zero points, in groups of 32, packed as gptqmodel does."""
    return share_copy(nn.ModuleList([gptq_layer(old), nn.Linear(1, 1)]))[0]  # type: ignore[index]


def gptq_layer(old: nn.Linear, bits: int = 4, group: int = 32, order: Any = None) -> nn.Module:
    """The layer of gptqmodel for a linear layer.

    Args:
        old: The layer.
        bits: Bits of a value.
        group: Inputs that share a scale.
        order: The inputs in the order in which they form groups.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    sizes = {"in_features": old.in_features, "out_features": old.out_features}
    new: Any = TorchLinear(
        bits, group, False, order is not None, **sizes, bias=old.bias is not None
    )
    groups = torch.arange(old.in_features, dtype=torch.int32) // group
    if order is not None:
        groups[order] = groups.clone()
    weight = old.weight.detach().float()
    index = groups.long().expand(weight.shape)
    none = weight.new_zeros(weight.shape[0], int(groups.max()) + 1)
    low, high = (none.scatter_reduce(1, index, weight, by) for by in ("amin", "amax"))
    scales = ((high - low) / (2**bits - 1)).half().float()
    new.pack_original(old, scales, (-low / scales).round(), groups)
    new.post_init()
    result: nn.Module = new.train(old.training)
    return result


def _hqq(old: nn.Linear) -> nn.Module:
    """Values of four bits in groups of 32, as hqq quantizes them."""
    return share_copy(hqq_layer(old, group_size=32))


def hqq_layer(old: nn.Linear, **how: Any) -> nn.Module:
    """The layer of hqq for a linear layer, which it leaves as it is.

    Args:
        old: The layer.
        how: Arguments of ``BaseQuantizeConfig``, and others of ``Quantizer.quantize``.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    names = inspect.signature(BaseQuantizeConfig).parameters
    config = BaseQuantizeConfig(**{key: value for key, value in how.items() if key in names})
    config["weight_quant_params"] |= {k: value for k, value in how.items() if k not in names}
    layer = copy.deepcopy(old)
    result: nn.Module = HQQLinear(layer, config, compute_dtype=old.weight.dtype, device="cpu")
    return result.train(old.training)


SCHEMES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _four_bits("nf4", False),
    "nf4 double": _four_bits("nf4", True),
    "fp4": _four_bits("fp4", False),
    "int8 bitsandbytes": _eight_bits,
    "int8 torchao": _torchao(8),
    "int4 torchao": _torchao(4),
    "nf4 torchao": _torchao_nf4,
    "fp8": _fp8,
}
if importlib.util.find_spec("compressed_tensors"):
    SCHEMES["int4 compressed-tensors"] = _compressed
if importlib.util.find_spec("gptqmodel"):
    SCHEMES["int4 gptqmodel"] = _gptq
if importlib.util.find_spec("hqq"):
    SCHEMES["hqq4"] = _hqq
