"""A weight format of your own: 8 bits a value, one scale for each row, in one file.

Two things are needed. A tensor that stands for the dense one in any code is the format's; PyTorch knows it as
a subclass of ``Tensor``. What lora_fx asks of it is a :class:`lora_fx.formats.WeightFormat`: how a weight is
stored, its values, how values are packed, how many bytes that takes, and what an ONNX file holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import lora_fx
from lora_fx.formats import DEQUANTIZE_LINEAR, Storage, WeightFormat
from lora_fx.ir import NoOperator, OnnxWeight, Quantization

aten = torch.ops.aten


class RowTensor(Tensor):
    """A matrix whose rows are ``scale * code``, with codes from -127 to 127."""

    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> RowTensor:
        """A tensor with the shape and the dtype of the values, and memory for none of them."""
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> RowTensor:
        return RowTensor(inner["codes"], inner["scales"], dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The dense matrix."""
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Copies are of the codes, and everything else is computed with the values."""
        first, kwargs = args[0], dict(kwargs or {})
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            dtype = kwargs.pop("dtype", None) or first.dtype
            kwargs.pop("memory_format", None)
            return RowTensor(func(first.codes, **kwargs), func(first.scales, **kwargs), dtype)
        if func is aten.copy_.default and all(isinstance(one, RowTensor) for one in args[:2]):
            first.codes.copy_(args[1].codes)
            first.scales.copy_(args[1].scales)
            return first
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would write into the values, which are not stored")
        return func(*tree_map_only(RowTensor, lambda one: one.values(one.dtype), args), **kwargs)


class RowFormat(WeightFormat):
    """``my_int8``: what lora_fx asks of :class:`RowTensor`."""

    library = "example"
    names = ("my_int8",)
    classes = frozenset({"RowTensor"})

    def describe(self, weight: Any) -> Quantization:
        """8 bits, and no block: a scale is a row's."""
        return Quantization("my_int8", 8, self.library, tuple(weight.shape), weight.dtype)

    def values(self, weight: Any, dtype: torch.dtype) -> Tensor:
        """In fp32, or wider where that is wanted: they are rounded once."""
        found: Tensor = weight.values(torch.promote_types(dtype, torch.float32))
        return found

    def bytes(self, how: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """A byte a value, and a scale in fp32 for each row."""
        return shape[0] * shape[1] + 4 * shape[0]

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """The largest of a row is 127."""
        wide = values.float()
        scales = wide.abs().amax(1).clamp_min(1e-12) / 127
        codes = (wide / scales[:, None]).round().to(torch.int8)
        return nn.Parameter(RowTensor(codes, scales, values.dtype), requires_grad=False)

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """ONNX has this form: codes, scales, no zero points, and blocks of a whole row."""
        return OnnxWeight(DEQUANTIZE_LINEAR, weight.codes, weight.scales, None, stored.shape[1])


class Net(nn.Module):
    """Two layers, a residual product with a bare parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is [batch, 32]."""
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + x @ self.mix)


def main() -> None:
    """Quantizes, trains adapters, merges in both ways, saves, loads, and exports."""
    torch.manual_seed(0)
    lora_fx.register_format(RowFormat())
    dense = Net()
    print(lora_fx.plan_quantization(dense, "my_int8"))
    base = lora_fx.quantize(dense, "my_int8")

    x, wanted = torch.randn(64, 32), torch.randint(4, (64,))
    adapted = lora_fx.rewrite(base, lora_fx.LoraConfig(r=4, lora_alpha=8))
    torch.testing.assert_close(adapted(x), base(x))
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(adapted), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(adapted(x), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")

    merged = lora_fx.merge(adapted)
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-4)
    print(f"merged: {type(merged.up.weight.data).__name__}")
    again = lora_fx.merge(adapted, requantize=True)
    error = (again(x) - adapted(x)).norm() / adapted(x).norm()
    print(f"merged and quantized again: {type(again.up.weight).__name__}, {error:.1%} off")

    torch.save(again.state_dict(), "again.pt")
    other = lora_fx.quantize(Net(), "my_int8")
    with torch.serialization.safe_globals([RowTensor]):
        other.load_state_dict(torch.load("again.pt"))
    torch.testing.assert_close(other(x), again(x))
    print("saved and loaded")

    print(lora_fx.export_onnx(again, "again.onnx", (x,)))


if __name__ == "__main__":
    main()
