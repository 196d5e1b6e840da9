"""FourierFT (Gao et al. 2024, arXiv:2405.03003): inverse Fourier transform of few frequencies, in PEFT."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "FourierFt"]


class FourierFt(Method):
    """Real part of a sum of n plane waves: rank 2n at most. A seed chooses the frequencies."""

    name = "FourierFT"
    does = "few frequencies of a Fourier transform"
    peft_type = "FOURIERFT"
    roles = ("fourierft_spectrum",)

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        out, inputs = layer.features
        spectrum = layer.take("fourierft_spectrum", None)
        if len(spectrum) > out * inputs:
            raise layer.misfit(
                f"{layer.keys['fourierft_spectrum']} has {len(spectrum)} frequencies, and there are "
                f"{out * inputs}"
            )
        seed = layer.setting("random_loc_seed", int)
        scale = float(layer.setting("scaling", (int, float)))

        def delta() -> Tensor:
            generator = torch.Generator("cpu").manual_seed(seed)
            order = torch.randperm(out * inputs, generator=generator, device="cpu")
            dense = torch.zeros(out * inputs, dtype=torch.float64)
            dense[order[: len(spectrum)]] = spectrum.double().cpu()
            waves: Tensor = torch.fft.ifft2(dense.reshape(out, inputs)).real
            return waves * scale

        yield layer.addition(delta, 2 * len(spectrum))


METHODS = (FourierFt(),)
