"""BOFT (Liu et al. 2024, arXiv:2311.06243): products of the weight with several stages of orthogonal blocks.

Between the stages the features are permuted like a butterfly of the fast Fourier transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange
from lora_fx.methods.oft import cayley, check_rotation, limit_of, lycoris_rotations, rescaled

__all__ = ["METHODS", "Boft", "LycorisBoft", "butterfly"]


class Boft(Method):
    """PEFT's form: stages over the inputs, and a factor for each output that leaves the bias out."""

    name = "BOFT"
    does = "butterflies of orthogonal factors"
    peft_type = "BOFT"
    roles = ("boft_R", "boft_s")

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        check_rotation(layer)
        out, width = layer.matrix
        factors = layer.take("boft_s", *((out, 1) if len(layer.shape) == 2 else (1, out)))
        stored = layer.take("boft_R", None, None, None, None)
        stages, count, size, _ = stored.shape
        layer.take("boft_R", stages, count, size, size)
        # PEFT has a single stage if its CUDA extension does not run.
        if stages not in (1, layer.setting("boft_n_butterfly_factor", int, 1)):
            raise layer.misfit(f"{layer.keys['boft_R']} has {stages} stages")
        if count * size != width:
            raise layer.misfit(
                f"{layer.keys['boft_R']} is {list(stored.shape)}, and does not divide its {width} inputs"
            )
        orders = [butterfly(width, count // 2**stage, size, stages) for stage in range(stages)]

        def adapted(weight: Tensor) -> Tensor:
            blocks = stored.to(weight)
            rotations = cayley((blocks - blocks.mT) / 2)
            columns = weight.flatten(1).T
            for order, rotation in zip(orders, rotations, strict=True):
                # P D Pᵀ x: the rows of P select.
                moved = torch.empty_like(columns)
                moved[order] = columns
                turned = rotation @ moved.reshape(count, size, out)
                columns = turned.reshape(width, out)[order]
            return (columns * factors.flatten().to(weight)).T.reshape(weight.shape)

        yield layer.change(adapted)


def butterfly(width: int, sections: int, block: int, stages: int) -> Tensor:
    """Return the permutation of a stage of PEFT's BOFT: row i of P selects feature ``order[i]``.

    Each section of the features is cut into halves of blocks; even halves come first.

    Args:
        width: Number of features.
        sections: Number of sections that are permuted alike.
        block: b, the size of the blocks.
        stages: Number of stages. A single stage permutes nothing.
    """
    order = torch.arange(width)
    if stages == 1:
        return order
    halves = order.reshape(sections, -1, block // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], dim=1).flatten()


class LycorisBoft(Method):
    """LyCORIS's form: stages over the outputs, and perhaps a factor for each output."""

    name = "BOFT"
    does = "butterflies of orthogonal factors"
    in_files = True
    roles = ("oft_blocks", "rescale")

    def is_file_layer(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return True if the layer has orthogonal blocks for several stages, [stages, blocks, b, b]."""
        return "oft_blocks" in tensors and tensors["oft_blocks"].dim() == 4

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        stages, count, size, _ = layer.take("oft_blocks", None, None, None, None).shape
        blocks = layer.take("oft_blocks", stages, count, size, size)
        out = layer.shape[0]
        if count * size != out or size % 2 or out % (2 ** (stages - 1) * size):
            raise layer.misfit(
                f"{layer.keys['oft_blocks']} is {list(blocks.shape)}, and does not divide its {out} outputs"
            )
        rescale = rescaled(layer)
        limit = limit_of(layer)

        def adapted(weight: Tensor) -> Tensor:
            rows = weight.flatten(1)
            for stage, rotation in enumerate(lycoris_rotations(blocks.to(weight), limit)):
                span = 2**stage * size // 2
                pairs = rows.reshape(-1, 2, span, rows.shape[1]).transpose(1, 2)
                turned = rotation @ pairs.reshape(count, size, -1)
                back = turned.reshape(-1, span, 2, rows.shape[1]).transpose(1, 2)
                rows = back.reshape(rows.shape)
            return rescale(rows.reshape(weight.shape))

        yield layer.change(adapted)


METHODS = (Boft(), LycorisBoft())
