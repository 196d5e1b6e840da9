"""The verdict on every site, and twenty steps: each adapter learns, and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.api import rewrite, trainable_parameters
from lora_fx.config import LoraConfig
from lora_fx.tools.zoo.entries import Entry, Inputs, call
from lora_fx.tools.zoo.numbers import floats, in_double
from lora_fx.tools.zoo.oracle import Narrowest, Verdict, judge

__all__ = ["STEPS", "Reached", "in_fp64", "judge_sites", "train"]


STEPS = 20
_RATES = (5e-3, 5e-4, 5e-5)


@dataclass(frozen=True)
class Reached:
    """One call of a model.

    Attributes:
        inputs: Its arguments.
        reference: What the original returns.
    """

    inputs: Inputs
    reference: Any


def judge_sites(
    entry: Entry, model: nn.Module, reached: Reached, config: LoraConfig, *, examples: bool = True
) -> tuple[Verdict, torch.dtype]:
    """Compares every site with the dense oracle, in fp64 where the model runs in it.

    In eval mode, so that no layer is left out by chance. The model is rewritten anew, since a graph of
    the whole model is one for the dtype that it was made with.

    Args:
        entry: The model's entry.
        model: The original; it is copied.
        reached: The call and the original's result.
        config: What it is rewritten with.
        examples: Whether ``rewrite`` gets the inputs of the call, too.

    Returns:
        What differs, and the dtype in which it was looked at.
    """
    exact = in_fp64(model, reached.inputs)
    dtype = torch.float32 if exact is None else torch.float64
    original, inputs, narrowest = exact or (model, reached.inputs, dtype)
    adapted = rewrite(original, config, inputs if examples else None).eval()
    here = dataclasses.replace(reached, inputs=inputs)
    verdict = judge(original, adapted, lambda m: _output_and_loss(entry, m, here), narrowest)
    return verdict, dtype


def in_fp64(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, torch.dtype] | None:
    """A copy of a model and of its inputs in fp64, and the narrowest dtype that it computes in.

    None for a model that has fp32 written into it in such a way that it does not run, or that gives what
    is not finite: a mask that is the least number of fp32 is another one in fp64.
    """
    exact, doubled = copy.deepcopy(model).double(), in_double(inputs)
    try:
        torch.manual_seed(0)
        with torch.no_grad(), Narrowest() as seen:
            output = call(exact, doubled)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not all(bool(found.isfinite().all()) for found in floats(output)):
        return None
    return exact, doubled, seen.dtype


def train(entry: Entry, adapted: nn.Module, built: Reached) -> tuple[float, float]:
    """Twenty steps of AdamW on one batch, in eval mode.

    A model of random weights may be as steep as it likes: where the loss rises, the steps are taken
    again from the start, smaller.

    Args:
        entry: The model's entry.
        adapted: The rewritten model; it is trained.
        built: The call and the original's result.

    Returns:
        The loss before the first step and after the last.
    """
    adapted.eval()
    parameters = list(trainable_parameters(adapted))
    start = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []
    for rate in _RATES:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        losses = []
        for step in range(STEPS + 1):
            optimizer.zero_grad()
            loss = _loss(entry, adapted, built)
            losses.append(float(loss))
            if step < STEPS:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if losses[-1] < losses[0]:
            break
    return losses[0], losses[-1]


def _loss(entry: Entry, model: nn.Module, built: Reached) -> torch.Tensor:
    return _output_and_loss(entry, model, built)[1]


def _output_and_loss(entry: Entry, model: nn.Module, built: Reached) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    output = call(model, built.inputs)
    if entry.loss is not None:
        return output, entry.loss(output)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for found, start in zip(floats(output), floats(built.reference), strict=True):
        noise = torch.randn(start.shape, generator=generator)
        if not found.requires_grad or not bool(start.isfinite().all()):
            continue
        # Away from where the model starts, by as much as its outputs vary.
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        start = start.to(found)
        spread = (start.std() if start.numel() > 1 else start.abs()).clamp_min(1e-3)
        total = total + ((found - start) / spread - noise).square().mean()
    return output, total
