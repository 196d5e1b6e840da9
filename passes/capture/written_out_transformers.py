"""The experts of transformers, written out.

A layer of experts holds one weight of three dimensions for each projection, and applies it as its
configuration says: expert by expert (``eager``), with a gathered matrix for each row (``batched_mm``) or with
rows sorted by expert (``grouped_mm``). The first loops over data, the others ask for devices. What is here
does the same in the same order of operations; what depends on sizes is in :mod:`lora_fx.runtime.experts`.
transformers is never imported: a model that has such a layer has done so.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.passes.graph.region import original_class
from lora_fx.runtime.experts import (
    grouped_mm,
    repeated,
    sorted_by_expert,
    summed,
    tokens_of,
    unsorted,
)

__all__ = ["experts_implementation", "written_out_of_transformers"]

fx.wrap("grouped_mm")
fx.wrap("repeated")
fx.wrap("sorted_by_expert")
fx.wrap("summed")
fx.wrap("tokens_of")
fx.wrap("unsorted")

_FLAGS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


def experts_implementation(module: nn.Module) -> str | None:
    """How a layer of experts of transformers is set to apply them; None for any other module."""
    if "transformers.integrations.moe" not in sys.modules:
        return None
    config = module.__dict__.get("config")
    if not all(hasattr(module, flag) for flag in _FLAGS) or config is None:
        return None
    return getattr(config, "_experts_implementation", None) or "eager"


def written_out_of_transformers(module: nn.Module) -> Callable[..., Any] | None:
    """What to trace in the place of a module's ``forward``; None if that is its own."""
    found = _FORWARDS.get(experts_implementation(module) or "")
    if found is None or getattr(module, "_is_expert_parallel", False):
        return None
    return _with_signature(found, original_class(module).forward)


@functools.cache
def _with_signature(
    forward: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """The names of the arguments are those of the class."""

    @functools.wraps(forward)
    def wrapped(*args: Any) -> Any:
        return forward(*args)

    wrapped.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return wrapped


def _eager(self: Any, hidden: torch.Tensor, chosen: Any, weights: Any) -> Any:
    out = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        # An expert that nobody chose works on no rows.
        found = tokens_of(expert, chosen)
        choice, token = found[0], found[1]
        x = _projected(self, hidden[token], "up", expert)
        x = _projected(self, _activated(self, x), "down", expert)
        x = _normed(self, x) * weights[token, choice, None]
        out.index_add_(0, token, x.to(out.dtype))
    return out


def _projected(self: Any, x: Any, which: str, expert: int) -> Any:
    weight, bias = _weights(self, which)
    x = x @ weight[expert] if self.is_transposed else F.linear(x, weight[expert])
    return x if bias is None else x + bias[expert]


def _batched(self: Any, hidden: torch.Tensor, chosen: Any, weights: Any) -> Any:
    ids = chosen.reshape(-1)
    x = _gathered(self, repeated(hidden, chosen), "up", ids)
    x = _gathered(self, _activated(self, x), "down", ids)
    return summed(_normed(self, x) * weights.reshape(-1).unsqueeze(-1), hidden)


def _gathered(self: Any, x: Any, which: str, ids: Any) -> Any:
    weight, bias = _weights(self, which)
    if self.is_transposed:
        x = torch.bmm(x.unsqueeze(1), weight[ids]).squeeze(1)
    else:
        x = torch.bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1)
    return x if bias is None else x + bias[ids]


def _grouped(self: Any, hidden: torch.Tensor, chosen: Any, weights: Any) -> Any:
    found = sorted_by_expert(hidden, chosen, weights, self.num_experts)
    x, sorted_weights, ids, ends, order = found[0], found[1], found[2], found[3], found[4]
    x = _sorted(self, x, "up", ids, ends)
    x = _sorted(self, _activated(self, x), "down", ids, ends)
    x = unsorted(_normed(self, x) * sorted_weights.unsqueeze(-1), order)
    return summed(x, hidden)


def _sorted(self: Any, x: Any, which: str, ids: Any, ends: Any) -> Any:
    weight, bias = _weights(self, which)
    x = grouped_mm(x, weight if self.is_transposed else weight.transpose(-2, -1), ends)
    return x if bias is None else x + bias[ids]


def _weights(self: Any, which: str) -> tuple[Any, Any]:
    name = "down_proj" if which == "down" else "gate_up_proj" if self.has_gate else "up_proj"
    return getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None


def _activated(self: Any, x: Any) -> Any:
    return self._apply_gate(x) if self.has_gate else self.act_fn(x)


def _normed(self: Any, x: Any) -> Any:
    return self.post_expert_norm(x) if self.has_post_expert_norm else x


_FORWARDS: dict[str, Callable[..., Any]] = {
    "eager": _eager,
    "batched_mm": _batched,
    "grouped_mm": _grouped,
}
