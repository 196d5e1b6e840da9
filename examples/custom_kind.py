"""Add an adapter kind: IA³, a trained scale on the output features of linear operations.

IA³ (Liu et al. 2022, arXiv:2205.05638) trains one vector l for an operation and computes
``y' = l ∘ (W x + b)``. It has no factors A and B. The adapted weight is ``l ∘ W``, and the adapted bias is
``l ∘ b``. The class below is all that lora_fx needs. Run this file to rewrite, train, merge, save, load and
export a model with it::

    python examples/custom_kind.py
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

import lora_fx
from lora_fx.ir import OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind, Costs, Slot, along

SCALE = "ia3_l"


class Ia3(AdapterKind):
    """The adapter kind IA³: ``y' = l ∘ (W x + b)``, with a trained vector l."""

    name = "ia3"
    low_rank = False
    transforms = True
    scales_bias = True
    keys = (SCALE,)
    trains = "a scale of the output (IA³)"

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the trained tensors of a site: one number for each output feature, which starts as 1."""
        shape = (site.out_features,)
        return (Slot(SCALE, SCALE, shape, "a scale", neutral=1.0, multiplies=True),)

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs of the kind at a site: one product for each output feature.

        The gradient needs the operation's output.
        """
        return Costs(parameters=site.out_features, flops=site.out_features, saved=site.out_features)

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write the adapted output: ``l ∘ base``, or ``total + (l - 1) ∘ base`` with other adapters."""
        scale = build.spread_slot(SCALE, outside=1.0)
        if build.total is build.base:
            return build.call(Role.ADD, operator.mul, build.total, scale)
        less = build.call(Role.SCALE, operator.sub, scale, 1.0)
        change = build.call(Role.SCALE, operator.mul, less, build.base)
        return build.call(Role.ADD, operator.add, build.total, change)

    def transformed(self, weight: Tensor, site: Site, values: Mapping[str, Tensor]) -> Tensor:
        """Return the merged weight, ``l ∘ W``."""
        return weight * along(values[SCALE], weight, site)

    def bias_terms(
        self, bias: Tensor | None, values: Mapping[str, Tensor], scale: float
    ) -> Sequence[tuple[Tensor, float]]:
        """Return the change of the bias, ``l ∘ b - b``, as two terms."""
        return () if bias is None else ((values[SCALE] * bias, 1.0), (bias, -1.0))


lora_fx.register_adapter_kind(Ia3())


class Net(nn.Module):
    """Example model: a convolution, two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, 4] for ``x`` [batch, 3, length]."""
        x = self.conv(x).mT
        return self.head(self.down(self.up(x).relu()).mean(1))


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 20) -> tuple[float, float]:
    """Train all parameters that require a gradient. Return the first loss and the last."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def main() -> None:
    """Rewrite, train, merge, save, load and export a model."""
    torch.manual_seed(0)
    base, x, target = Net(), torch.randn(16, 3, 10), torch.randint(4, (16,))
    config = lora_fx.LoraConfig(kind="ia3", target_modules=["conv", "up", "down"])
    print(lora_fx.plan(base, config))

    model = lora_fx.rewrite(base, config, (x,))
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)  # no effect before training
    first, last = train(model, x, target)
    print(f"loss {first:.3f} -> {last:.3f}")
    if not last < first:
        raise SystemExit("training did nothing")

    merged = lora_fx.merge(model)
    torch.testing.assert_close(merged(x), model(x))
    print("merged output equals adapted output")

    with tempfile.TemporaryDirectory() as folder:
        lora_fx.save_adapter(model, Path(folder, "adapter"))
        again = lora_fx.load_adapter(base, Path(folder, "adapter"))
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        print("loaded output equals adapted output")

        # The file is compared with PyTorch before it is put in place.
        lora_fx.export_onnx(model.eval(), Path(folder, "model.onnx"), (x,))
        session = lora_fx.OnnxSession(Path(folder, "model.onnx"), provider="cpu")
        (output,) = session.run(x).values()
        torch.testing.assert_close(torch.as_tensor(output), model(x), rtol=1e-4, atol=1e-5)
        print("exported output equals adapted output")


if __name__ == "__main__":
    main()
