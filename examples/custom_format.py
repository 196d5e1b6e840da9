"""Add a weight format: 8 bits for each value, and a scale for each row.

Two classes are needed. A :class:`lora_fx.formats.PackedTensor` is a quantized tensor that any code can use
like a dense matrix. A :class:`lora_fx.formats.PackedFormat` describes its storage, packs and unpacks values,
and exports it to ONNX. docs/guides/formats.md explains each member, and shows a library that has layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.formats import PackedFormat, PackedTensor, Parts, Storage, pack_integers
from lora_fx.ir import NoOperator, OnnxWeight, Quantization


class RowTensor(PackedTensor):
    """A quantized matrix whose rows are ``scale * code``, with integer codes from -127 to 127."""


class RowFormat(PackedFormat):
    """The format ``my_int8`` of :class:`RowTensor`."""

    library = "example"
    names = ("my_int8",)
    tensor = RowTensor

    def describe(self, weight: Any) -> Quantization:
        """Return a weight's description: 8 bits, without blocks, because a scale belongs to a whole row."""
        return self.describe_as(weight, "my_int8", 8)

    def decode(self, weight: Any) -> Tensor:
        """Return the values of a weight in fp32. The caller rounds them to its dtype."""
        values: Tensor = weight.codes * weight.scales
        return values

    def pack(self, values: Tensor, how: Storage) -> nn.Parameter:
        """Quantize a matrix. The largest absolute value of each row gets the code 127 or -127."""
        wide = values.float()
        scales = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (wide / scales).round().to(torch.int8)
        parts = Parts({"codes": codes, "scales": scales}, values.shape, None)
        return nn.Parameter(RowTensor(parts, values.dtype), requires_grad=False)

    def onnx_weight(self, weight: Any, stored: Quantization) -> OnnxWeight | NoOperator:
        """Return the codes and scales for an ONNX file. A block is a row, and there are no zero points."""
        return pack_integers(weight.codes, weight.scales, None, stored.shape[1], stored.bits)


class Net(nn.Module):
    """Example model: two layers, a residual product with a bare parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, 4] for ``x`` [batch, 32]."""
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + x @ self.mix)


def main() -> None:
    """Quantize a model, train adapters, merge in both ways, save, load and export."""
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
    other.load_state_dict(torch.load("again.pt"))
    torch.testing.assert_close(other(x), again(x))
    print("saved and loaded")

    print(lora_fx.export_onnx(again, "again.onnx", (x,)))


if __name__ == "__main__":
    main()
