"""Norms and rows of embeddings that PEFT trains in full: LN tuning and trainable tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lora_fx.ir import join
from lora_fx.methods.base import Layer, Method, ParameterChange

__all__ = ["METHODS", "LnTuning", "TrainableTokens"]


class LnTuning(Method):
    """Parameters of norms, stored in full (Zhao et al. 2023, arXiv:2312.11420)."""

    name = "LN tuning"
    does = "norms that are trained in full"
    peft_type = "LN_TUNING"
    roles = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")

    def whole(self, layer: Layer) -> Mapping[str, Tensor]:
        """Return the parameters of the norm."""
        values = {}
        for role in layer.tensors:
            leaf = role.rpartition(".")[2]
            parameter = layer.module._parameters.get(leaf)
            if parameter is None:
                raise layer.error(f"{layer.keys[role]}: this model's layer has no {leaf}")
            values[join(layer.name, leaf)] = layer.take(role, *parameter.shape)
        return values


class TrainableTokens(Method):
    """Rows of an embedding, stored in full. Their change has as many ranks as rows."""

    name = "trainable tokens"
    does = "rows of an embedding that are trained in full"
    peft_type = "TRAINABLE_TOKENS"
    roles = ("trainable_tokens_delta",)
    ties = True

    def changes(self, layer: Layer) -> Iterator[ParameterChange]:
        """Yield the change of the embedding."""
        layer.check_dims(2)
        tokens, width = layer.shape
        indices = layer.setting("token_indices", list)
        rows = layer.take("trainable_tokens_delta", len(indices), width)
        wrong = [
            index for index in indices if not isinstance(index, int) or not 0 <= index < tokens
        ]
        if wrong:
            raise layer.error(
                f"token_indices has {wrong[0]!r}, and there are {tokens} tokens: the adapter is for another "
                "model"
            )

        def adapted(weight: Tensor) -> Tensor:
            value = weight.clone()
            value[indices] = rows.to(weight)
            return value

        yield layer.change(adapted, len(indices))


METHODS = (LnTuning(), TrainableTokens())
