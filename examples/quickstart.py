"""Plan, rewrite, train and merge a small model, on random data."""

from __future__ import annotations

import torch
from torch import nn

import lora_fx


class Classifier(nn.Module):
    """Example model: two hidden layers and a head. The weight of the second layer is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 64)
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 4] for ``x`` [batch, 16]."""
        hidden = torch.relu(self.fc(x))
        return self.head(torch.relu(hidden @ self.mix))


def main() -> None:
    """Plan, rewrite, train and merge a model, and compare the outputs."""
    torch.manual_seed(0)
    model = Classifier()
    config = lora_fx.LoraConfig(r=4, lora_alpha=8)
    print(lora_fx.plan(model, config))

    adapted = lora_fx.rewrite(model, config)
    lora_fx.print_trainable_parameters(adapted)
    print(lora_fx.graphs(adapted)[""].python_code("self").src)

    x = torch.randn(256, 16)
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(adapted), lr=1e-2)
    for step in range(100):
        loss = nn.functional.cross_entropy(adapted(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    merged, report = lora_fx.merge(adapted, return_report=True)
    print(report)
    assert type(merged) is Classifier
    torch.testing.assert_close(merged(x), adapted(x))


if __name__ == "__main__":
    main()
