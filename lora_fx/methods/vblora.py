"""VB-LoRA (Li et al. 2024, arXiv:2405.15179): A and B are mixed from a bank of vectors, in PEFT."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "VbLora"]

_BANK = "vblora_vector_bank"


class VbLora(Method):
    """Low-rank product whose pieces are weighted means of k vectors of a bank."""

    name = "VB-LoRA"
    does = "low-rank products of vectors from a bank"
    peft_type = "VBLORA"
    roles = tuple(
        f"vblora_logits_{factor}{end}"
        for factor in "AB"
        for end in ("", "_topk_indices", "_topk_weights")
    )
    shared = (_BANK,)

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight."""
        out, inputs = layer.features
        bank = layer.take(_BANK, 1, 1, shared=True)
        length = bank.shape[1]
        if out % length or inputs % length:
            raise layer.misfit(
                f"{_BANK} has vectors of {length}, which do not divide a weight {[out, inputs]}"
            )
        indices_a, weights_a = _mixture(layer, "A", None, inputs // length, len(bank))
        rank = weights_a.shape[0]
        indices_b, weights_b = _mixture(layer, "B", out // length, rank, len(bank))

        def mixed(indices: Tensor, weights: Tensor) -> Tensor:
            return (weights[..., None] * bank.double()[indices]).sum(-2)

        def delta() -> Tensor:
            a = mixed(indices_a, weights_a).reshape(rank, inputs)
            b = mixed(indices_b, weights_b).transpose(1, 2).reshape(out, rank)
            return b @ a

        yield layer.addition(delta, rank)


def _mixture(
    layer: Layer, factor: str, first: int | None, second: int, vectors: int
) -> tuple[Tensor, Tensor]:
    """Return the k chosen vectors of each piece of a factor, as indices, and their weights, [.., .., k] each.

    A folder has logits for all vectors, or, with ``save_only_topk_weights``, k indices and all weights but
    the last. The weights of a piece sum to 1.
    """
    role = f"vblora_logits_{factor}"
    k = layer.setting("topk", int)
    if role in layer.tensors:
        logits = layer.take(role, first, second, vectors)
        top, chosen = logits.double().topk(k, dim=-1)
        return chosen, torch.softmax(top, dim=-1)
    weights = layer.take(f"{role}_topk_weights", first, second, k - 1).double()
    indices = layer.tensors.get(f"{role}_topk_indices")
    if indices is None:
        raise layer.error(
            f"the file has no {role}_topk_indices for it. It was cut short, or edited"
        )
    if indices.is_floating_point() or indices.shape != (*weights.shape[:2], k):
        raise layer.error(
            f"{layer.keys[f'{role}_topk_indices']} is {indices.dtype} {list(indices.shape)}, and there are "
            f"{k} whole numbers for each of {list(weights.shape[:2])}: the file is damaged"
        )
    chosen = indices.long()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= vectors):
        raise layer.error(
            f"{layer.keys[f'{role}_topk_indices']} names a vector that the bank of {vectors} does not "
            "have: the file is damaged"
        )
    return chosen, torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)


METHODS = (VbLora(),)
