"""MiSS (Kang and Yin 2025, arXiv:2409.15371) and its former name Bone, in PEFT.

Each column of W gets a vector added that depends on the column's index modulo r: ``W[:, j] + B[j mod r]``. In
the mode "bat" it is ``W + W ⊙ B + B``, with a product of blocks [r, r].
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "Bone", "Miss"]


class Miss(Method):
    """A block of r vectors that repeats along the inputs: rank r."""

    name = "MiSS"
    does = "a block of vectors that repeats along the inputs"
    peft_type = "MISS"
    roles = ("miss_block",)

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        layer.check_dims(2)
        out, inputs = layer.shape
        (role,) = self.roles
        block = layer.take(role)
        if block.dim() == 3:
            yield _by_blocks(layer, layer.take(role, out // block.shape[-1], None, block.shape[-1]))
            return
        rank, width = layer.take(role, layer.setting("r", int), None).shape
        if width == 0 or out % width:
            raise layer.misfit(
                f"{layer.keys[role]} is {list(block.shape)}, and {width} does not divide its {out} outputs"
            )

        def delta() -> Tensor:
            rows = block.double().repeat(1, out // width).T
            return rows.repeat(1, -(-inputs // rank))[:, :inputs]

        yield layer.addition(delta, min(rank, width))


def _by_blocks(layer: Layer, block: Tensor) -> ParameterChange:
    """Return the change of a layer in the mode "bat", which multiplies blocks [r, r] of its weight."""
    out, inputs = layer.shape
    size = block.shape[-1]
    if block.shape[1] != size or out % size or inputs % size:
        raise layer.misfit(
            f"its blocks are {list(block.shape)}, and do not divide a weight {[out, inputs]}"
        )

    def adapted(weight: Tensor) -> Tensor:
        added = block.to(weight)
        # [blocks of columns, blocks of rows, r, r]: each block of W is multiplied by the B of its block of
        # rows.
        blocks = weight.reshape(out // size, size, inputs // size, size).permute(2, 0, 1, 3)
        change = blocks @ added + added
        return weight + change.permute(1, 2, 0, 3).reshape(weight.shape)

    return layer.change(adapted)


class Bone(Miss):
    """MiSS under the name that it had before PEFT 0.18."""

    name = "Bone"
    peft_type = "BONE"
    roles = ("bone_block",)


METHODS = (Miss(), Bone())
