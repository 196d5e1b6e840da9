"""When the graph of a whole model does not apply: expressions over the arguments and the model.

``torch.export`` makes a graph for one call. What it found to be the same for every call is no condition;
what it fixed is one, and so is what decides the form of a transformers model's output.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lora_fx.errors import CaptureError
from lora_fx.passes.capture.inputs import CACHE
from lora_fx.passes.graph.signature import WANTS_CACHE, Parameter, parameters_of

__all__ = ["cache_condition", "call_parameters", "output_conditions", "shape_conditions"]

# Settings of a transformers model that change what it returns; its forward reads them anew each time.
_OUTPUT_SETTINGS = (
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
)


def call_parameters(model: nn.Module, inputs: dict[str, Any]) -> tuple[Parameter, ...]:
    """The parameters of ``forward``: tensors are inputs of the graph, the rest is fixed.

    Args:
        model: The model.
        inputs: The call, from :func:`named_inputs`.

    Returns:
        The signature's parameters, and after them those that ``**kwargs`` takes.
    """
    fixed = {}
    signature = inspect.signature(model.forward).parameters
    for name, p in signature.items():
        if not isinstance(inputs.get(name), torch.Tensor):
            fixed[name] = inputs.get(name, None if p.default is p.empty else p.default)
    parameters = parameters_of(type(model).forward, fixed)
    if CACHE in signature and inputs.get(CACHE) is False and hasattr(model, "config"):
        # A caller that says nothing wants what the model's configuration says.
        test = f"{WANTS_CACHE}(self, {CACHE})"
        parameters = tuple(
            dataclasses.replace(p, test=test) if p.name == CACHE else p for p in parameters
        )
    return parameters + tuple(_extras(parameters, inputs))


def _extras(parameters: tuple[Parameter, ...], inputs: dict[str, Any]) -> Iterator[Parameter]:
    named = {p.name for p in parameters if not p.variadic}
    keywords = next((p.name for p in parameters if p.variadic), "")
    for name, value in inputs.items():
        if name not in named:
            traced = isinstance(value, torch.Tensor)
            kind = int(inspect.Parameter.KEYWORD_ONLY)
            yield Parameter(name, kind, traced, None if traced else value, within=keywords)


def output_conditions(model: nn.Module) -> list[str]:
    """Conditions that are true when the configuration asks for other outputs than at the capture."""
    config = getattr(model, "config", None)
    return [
        f"self.config.{name} is not {value!r}"
        for name in _OUTPUT_SETTINGS
        if isinstance(value := getattr(config, name, None), bool)
    ]


def cache_condition(value: Any) -> Iterator[str]:
    """A condition that is true when the configuration says something else about a cache, in evaluation.

    In training it may say anything, as in :func:`lora_fx.runtime.ops.wants_cache`: trainers switch it off.

    Args:
        value: What ``config.use_cache`` was where the capture has read it.
    """
    if isinstance(value, bool):
        here = f"self.config.{CACHE}"
        yield f"{here} is not ({here} if self.training else {value})"


def shape_conditions(program: ExportedProgram, graph: fx.Graph, names: list[str]) -> list[str]:
    """Conditions that are true for tensors that the exported graph was not made for.

    Args:
        program: The exported program.
        graph: Its graph, with a placeholder for each tensor.
        names: The tensors' names, in order.

    Raises:
        CaptureError: If a size is tied to another one by a formula.
    """
    conditions: list[str] = []
    seen: dict[Any, str] = {}
    tensors = [
        n.meta["val"]
        for n in graph.nodes
        if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    for name, value in zip(names, tensors, strict=True):
        conditions.append(f"not isinstance({name}, torch.Tensor)")
        conditions.append(f"{name}.dtype != {value.dtype} or {name}.dim() != {value.dim()}")
        for axis, size in enumerate(value.shape):
            here = f"{name}.shape[{axis}]"
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(expression, int) or expression.is_Integer:
                conditions.append(f"{here} != {int(expression)}")
            elif not expression.is_Symbol:
                raise CaptureError(f"torch.export ties {here} to {expression}: pass dynamic_shapes")
            elif expression in seen:
                conditions.append(f"{here} != {seen[expression]}")
            else:
                seen[expression] = here
                conditions.extend(
                    _range_conditions(here, program.range_constraints.get(expression))
                )
    return conditions


def _range_conditions(here: str, allowed: Any) -> list[str]:
    # Every dynamic size starts at 2 in a trace; that says nothing about 1.
    lower = (
        [f"{here} < {int(allowed.lower)}"]
        if allowed and allowed.lower.is_Integer and allowed.lower > 2
        else []
    )
    upper = [f"{here} > {int(allowed.upper)}"] if allowed and allowed.upper.is_Integer else []
    return lower + upper
