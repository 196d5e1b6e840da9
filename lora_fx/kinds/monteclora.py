"""MonteCLoRA (Sengupta et al. 2024, arXiv:2411.04358): LoRA whose A has noise with trained variances.

A training call computes with ``A + Σᵢ wᵢ noiseᵢ``. The noise is normal, with variances that have a Wishart
distribution. The weights ``wᵢ`` have a Dirichlet distribution, approximated by the softmax of normal numbers.
The parameters of both distributions are trained, and :func:`lora_fx.adapter_penalty` keeps them near their
priors. In evaluation mode, and in merges, it is LoRA.

PEFT draws the noise of many calls ahead of time. Here each call draws new noise, with the same distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from lora_fx.config import complete_options
from lora_fx.ir import OutputBuilder, PlannedSite, Role, Site
from lora_fx.kinds import RANK, Costs, Slot, Starting
from lora_fx.kinds.lora import BIAS, Lora, layer_objection

__all__ = ["KINDS", "Monteclora", "sampled"]

_KEY: Final = "lora_monteclora_sampler"
_SPREAD: Final = "lora_monteclora_std"
_PRIOR: Final = "lora_monteclora_prior"
_VARIANCE: Final = "lora_monteclora_variance"
_WEIGHTS: Final = "lora_monteclora_weights"
_SQUARES: Final = "lora_monteclora_squares"
_NORMALS: Final = "lora_monteclora_normals"

_LEAST_VARIANCE: Final = 1e-3
_LEAST: Final = 1e-6


class Monteclora(Lora):
    """Two factors, and the parameters and the state of the noise on A."""

    trains_only = True
    in_parts = False

    def __init__(self, bias: bool = False) -> None:
        super().__init__(bias)
        self.name = "monteclora-bias" if bias else "monteclora"
        self.deploys = False
        self.fields = ("monteclora_config", "lora_bias") if bias else ("monteclora_config",)
        self.trains = "trained noise on A (MonteCLoRA)"
        self.trains += " and a bias on B (lora_bias)" if bias else ""
        self.options = complete_options(self.fields[0], {})

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the trained parameters of the noise, and the state that the last training call has left.

        The state is the variances and weights, which are saved, and the random numbers that they were
        computed from, which the gradient of the penalty needs.
        """
        assert self.options is not None
        count = (self.options["num_samples"],)
        trained: dict[str, Any] = {"what": "trained noise", "over_outputs": False}
        state: dict[str, Any] = {**trained, "trained": False}
        return (
            *super().slots(site),
            Slot(_SPREAD, f"{_KEY}.std_prior", (RANK,), **trained),
            Slot(_PRIOR, f"{_KEY}.expert_weights_prior", count, **trained),
            Slot(_VARIANCE, f"{_KEY}.gaussian_var_prior", (RANK, RANK), **state),
            Slot(_WEIGHTS, f"{_KEY}.expert_weights", count, **state),
            Slot(_SQUARES, "", (RANK,), **state),
            Slot(_NORMALS, "", count, **state),
        )

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs of the noise: a parameter for each sample and each variance.

        The noise is not a cost per token.
        """
        assert self.options is not None
        bias = super().costs(site, rank)
        own = self.options["num_samples"] + rank
        return dataclasses.replace(bias, parameters=bias.parameters + own)

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have MonteCLoRA; None if it can. Only linear layers can."""
        return layer_objection("MonteCLoRA", self, site)

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return uniform numbers for parameters. The state starts with unit variances and equal weights."""
        if slot.name == BIAS:
            return super().start(slot, starting)
        values = torch.zeros(slot.sized(starting.row.rank))
        if slot.trained:
            return values.uniform_(generator=starting.generator(f"{starting.row.name}.{slot.name}"))
        if slot.name == _VARIANCE:
            return torch.eye(len(values))
        return values + 1 / len(values) if slot.name == _WEIGHTS else values

    def penalty(
        self, row: PlannedSite, factors: Mapping[str, Tensor], *, sites: int, training: bool
    ) -> Tensor:
        """Return the mean of the weighted divergences from the priors, plus ``Σ wᵢ²`` with ``use_entropy``.

        Variances and weights are those of the last training call. The penalty is zero in evaluation mode.
        """
        assert self.options is not None
        spread, prior = factors[_SPREAD], factors[_PRIOR]
        if not training:
            return spread.new_zeros(())
        drawn = factors[_SQUARES].any()
        variance = torch.where(
            drawn, _variance(spread, factors[_SQUARES]), factors[_VARIANCE].diagonal()
        )
        divergence = _dirichlet(prior.exp(), self.options["dirichlet_prior"])
        divergence = divergence + _wishart(spread) + len(prior) * _normal(variance)
        loss: Tensor = self.options["kl_loss_weight"] * divergence
        if self.options["use_entropy"]:
            weights = torch.where(drawn, _weights(prior, factors[_NORMALS]), factors[_WEIGHTS])
            loss = loss + weights.square().sum()
        return loss / sites

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write A with noise, if the letter is "a". B is unchanged."""
        if letter == "b":
            return stored
        assert self.options is not None
        names = (_SPREAD, _PRIOR, _VARIANCE, _WEIGHTS, _SQUARES, _NORMALS)
        slots = map(build.read_slot, names)
        scale = self.options["sample_scaler"]
        return build.call(Role.FACTOR, sampled, stored, *slots, scale, build.training)


def sampled(
    a: Tensor,
    spread: Tensor,
    prior: Tensor,
    variance: Tensor,
    weights: Tensor,
    squares: Tensor,
    normals: Tensor,
    scale: float,
    training: bool,
) -> Tensor:
    """Return A with noise, or A itself in evaluation mode.

    Args:
        a: A, [r, in].
        spread: Logarithms of the standard deviations, [r].
        prior: Logarithms of the concentrations of the weights, [n].
        variance: State: the last variances, as a matrix [r, r].
        weights: State: the last weights, [n].
        squares: State: the random numbers that the variances were computed from, [r].
        normals: State: the random numbers that the weights were computed from, [n].
        scale: The number by which the noise is multiplied.
        training: True in training mode.
    """
    if not training:
        return a
    rank, inner = a.shape
    options: Any = {"device": spread.device, "dtype": spread.dtype}
    drawn = torch.randn(len(prior), inner, rank, **options)
    # A diagonal element of a Wishart matrix with r degrees of freedom is a sum of r squares.
    new_squares = torch.randn(rank, rank, **options).square().sum(0)
    new_normals = torch.randn(len(prior), **options)
    new_variance, new_weights = _variance(spread, new_squares), _weights(prior, new_normals)
    with torch.no_grad():
        squares.copy_(new_squares)
        normals.copy_(new_normals)
        variance.copy_(new_variance.diag())
        weights.copy_(new_weights)
    noise = torch.einsum("n,nio->oi", new_weights, drawn) * new_variance.sqrt()[:, None]
    return a + (scale * noise).to(a.dtype)


def _variance(spread: Tensor, squares: Tensor) -> Tensor:
    return (spread.exp().square() * squares).clamp_min(_LEAST_VARIANCE)


def _weights(prior: Tensor, normals: Tensor) -> Tensor:
    """Return the weights ``wᵢ`` of the noise, [n], with a Dirichlet distribution.

    A logistic normal distribution approximates it.
    """
    count, concentrations = len(prior), prior.exp().clamp_min(_LEAST)
    logarithms, inverse = concentrations.log(), 1 / concentrations
    variance = inverse * (1 - 2 / count) + inverse.sum() / count**2
    deviation = (variance.clamp_min(_LEAST) + _LEAST).sqrt()
    return (deviation * normals + logarithms - logarithms.mean()).softmax(-1)


def _dirichlet(concentrations: Tensor, prior: float) -> Tensor:
    """Return the divergence from a Dirichlet prior whose concentrations are all ``prior``, as in PEFT."""
    priors, total = torch.full_like(concentrations, prior), concentrations.sum()
    result = total.lgamma() - priors.sum().lgamma()
    result = result + (concentrations.lgamma() - priors.lgamma()).sum()
    return result + ((concentrations - priors) * (concentrations.digamma() - total.digamma())).sum()


def _wishart(spread: Tensor) -> Tensor:
    rank = len(spread)
    result: Tensor = 0.5 * rank * ((2 * spread).exp() - 2 * spread - 1).sum()
    return result


def _normal(variance: Tensor) -> Tensor:
    result: Tensor = 0.5 * (variance - variance.log() - 1).sum()
    return result


KINDS = (Monteclora(), Monteclora(bias=True))
