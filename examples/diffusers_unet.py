"""Train adapters in a UNet of diffusers to draw new pictures. The noise schedule does not change.

By default the UNet is tiny and untrained. With your own (an unconditional ``UNet2DModel``)::

    python examples/diffusers_unet.py --model FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import lora_fx


def build(folder: str | None) -> UNet2DModel:
    """Load the model from its folder, or make a tiny one."""
    if folder is not None:
        return UNet2DModel.from_pretrained(folder)
    return UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def draw(count: int, size: int) -> Tensor:
    """Draw pictures [count, 3, size, size] from -1 to 1: a bright disc at a random place, on dark ground."""
    row = torch.arange(size).view(1, size, 1)
    column = torch.arange(size).view(1, 1, size)
    middle = torch.randint(size // 4, size - size // 4, (count, 2, 1, 1))
    disc = (row - middle[:, 0]) ** 2 + (column - middle[:, 1]) ** 2 < (size // 5) ** 2
    return (2.0 * disc - 1.0).unsqueeze(1).expand(-1, 3, -1, -1)


def noise_loss(model: nn.Module, scheduler: DDPMScheduler, pictures: Tensor) -> Tensor:
    """Return the mean squared error of the predicted noise, at random steps of the schedule."""
    noise = torch.randn_like(pictures)
    steps = torch.randint(scheduler.config.num_train_timesteps, (len(pictures),))
    noisy = scheduler.add_noise(pictures, noise, steps)
    return nn.functional.mse_loss(model(noisy, steps).sample, noise)


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on a UNet of diffusers")
    parser.add_argument("--model", metavar="FOLDER", help="an unconditional UNet2DModel")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    base = build(options.model)
    size = base.config.sample_size
    scheduler = DDPMScheduler(num_train_timesteps=100)
    # Without target_modules all linear operations are adapted. Convolutions are linear operations, too.
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(r=8, lora_alpha=16))
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=5e-3)
    losses = []
    model.train()
    for _ in range(options.steps):
        loss = noise_loss(model, scheduler, draw(8, size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    print(f"noise prediction loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if losses[-1] >= losses[0]:
        raise SystemExit("the loss did not fall")

    with TemporaryDirectory() as folder, torch.no_grad():
        lora_fx.save_adapter(model, Path(folder, "disc"))
        loaded = lora_fx.load_adapter(base, Path(folder, "disc")).eval()
        merged = lora_fx.merge(loaded)
        noisy, step = torch.randn(2, 3, size, size), torch.tensor([50, 3])
        wanted = model(noisy, step).sample
        torch.testing.assert_close(loaded(noisy, step).sample, wanted)
        torch.testing.assert_close(merged(noisy, step).sample, wanted, rtol=1e-3, atol=1e-3)

        # The merged UNet is a plain one, for the pipelines of the library.
        picture = torch.randn(1, 3, size, size)
        scheduler.set_timesteps(10)
        for step in scheduler.timesteps:
            picture = scheduler.step(merged(picture, step).sample, step, picture).prev_sample
    if not picture.isfinite().all():
        raise SystemExit("the picture has values that are not finite")
    print(f"saved, loaded and merged; a picture is drawn in 10 steps, {tuple(picture.shape)}")


if __name__ == "__main__":
    main()
