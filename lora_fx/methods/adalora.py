"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ``W + s · B diag(E) A``, in PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "AdaLora"]


class AdaLora(Method):
    """Low-rank product with singular values, whose number differs between layers."""

    name = "AdaLoRA"
    does = "low-rank products with singular values, some of them pruned"
    peft_type = "ADALORA"
    roles = ("lora_A", "lora_B", "lora_E")

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the weight.

        PEFT divides by the rank before pruning, which is the initial one, plus 1e-5.
        """
        out, inputs = layer.matrix
        a = layer.take("lora_A", None, inputs)
        rank = a.shape[0]
        b, e = layer.take("lora_B", out, rank), layer.take("lora_E", rank, 1)
        alpha = float(layer.setting("lora_alpha", (int, float)))
        initial: int = layer.setting("init_r", int)
        scale = (alpha if alpha > 0 else float(rank)) / (initial + 1e-5)

        def delta() -> Tensor:
            return b.double() @ (a.double() * e.double()) * scale

        yield layer.addition(delta, rank)


METHODS = (AdaLora(),)
