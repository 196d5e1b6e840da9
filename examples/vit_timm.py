"""Train a vision transformer of timm on a new task: adapters in the blocks, and a new head.

By default the model is tiny and untrained, and the images are random. With your own weights::

    python examples/vit_timm.py --model FOLDER   # a folder with config.json and weights, as timm saves it
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import lora_fx

CLASSES = 3


def build(folder: str | None) -> nn.Module:
    """Load the model from its folder, or make a tiny one."""
    if folder is not None:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=CLASSES)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)


def draw(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Make images of noise in which one color is stronger. The label is the index of the color."""
    images, labels = torch.randn(count, 3, size, size), torch.randint(CLASSES, (count,))
    images[torch.arange(count), labels] += 0.5
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on a vision transformer")
    parser.add_argument("--model", metavar="FOLDER", help="a model that timm has saved")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()

    torch.manual_seed(0)
    base = build(options.model)
    size = base.patch_embed.img_size[0]
    # The fused qkv is one weight: "qkv.q" and "qkv.v" are its parts.
    config = lora_fx.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["qkv.q", "qkv.v", "proj", "fc1", "fc2"],
        modules_to_save=["head"],
    )
    images, labels = draw(options.batch, size)
    model = lora_fx.rewrite(base, config, (images[:2],))
    optimizer = torch.optim.AdamW(lora_fx.parameter_groups(model, lr=3e-3, weight_decay=0.01))
    average = ModelEmaV3(model, decay=0.9)  # a copy of the model, with averaged weights

    losses = []
    model.train()
    for _ in range(options.steps):
        images, labels = draw(options.batch, size)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(loss.item())

    merged = lora_fx.merge(average.module.eval())
    images, labels = draw(256, size)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), average.module(images), rtol=1e-4, atol=1e-4)
        accuracy = (merged(images).argmax(-1) == labels).float().mean().item()
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy of the merged average {accuracy:.0%}"
    )
    if losses[-1] >= losses[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
