"""DoRA (Liu et al. 2024, arXiv:2402.09353): a trained magnitude for each output feature of ``W + s·BA``.

``W' = g ∘ (W + s·BA)`` with ``g = m / ‖W + s·BA‖``. Its computation in training is in
:mod:`lora_fx.runtime.kernels.dora`. A bias of the operation is not scaled.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lora_fx.ir import OutputBuilder, PlannedSite, Role, Site
from lora_fx.kinds import AdapterKind, Costs, Slot, Starting, along
from lora_fx.kinds.lora import BIAS, bias_slot, bias_start
from lora_fx.runtime.kernels import dora, fused_dora

__all__ = ["KINDS", "MAGNITUDE", "Dora"]

MAGNITUDE: Final = "lora_magnitude_vector"
_LINEAR = (F.linear, torch.ops.aten.linear.default)


def _makes_base_again(site: Site) -> bool:
    """Return True if a backward that saves memory recomputes the base product, for the magnitude's gradient.

    If a layer has more outputs than inputs, the next operation (an activation) saves its output anyway. If it
    has fewer, the output is small compared with the cost of the product. So only square layers recompute it.
    docs/benchmarks.md has the costs of both.
    """
    square = site.in_features == site.out_features
    return site.pattern == "linear" and square and not site.part_of


class Dora(AdapterKind):
    """Two factors and a magnitude.

    With ``bias``, B has a trained bias as well. No configuration chooses this variant. It is for exported
    files that take adapters of both kinds as inputs.
    """

    transforms = True
    in_parts = True
    does = "DoRA scales"
    trains = "a trained magnitude (DoRA)"
    depends = "the norms of DoRA (use_dora) are those of the base weights"
    constants: tuple[Any, ...] = (dora.gain,)
    handed: tuple[Any, ...] = (dora.gain, dora.scaled_b)

    def __init__(self, bias: bool = False) -> None:
        self.bias = bias
        self.name = "dora-bias" if bias else "dora"
        self.fields = () if bias else ("use_dora",)

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the magnitude: [out], or [1, out, 1, ...] for a convolution, as PEFT stores it."""
        shape: tuple[int, ...] = (site.out_features,)
        if site.family == "conv":
            shape = (1, site.out_features, *(1 for _ in site.weight_shape[2:]))
        magnitude = Slot(
            MAGNITUDE,
            "lora_magnitude_vector",
            shape,
            "a magnitude",
            neutral=None,
            multiplies=True,
            role="gain",
            normed=True,
        )
        return (bias_slot(site), magnitude) if self.bias else (magnitude,)

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs of the gain: one product and one sum for each output feature.

        The norm does not depend on the number of tokens, and is left out.
        """
        out = site.out_features
        return Costs(out, 2 * out, out)

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return ``‖W + s·BA‖``: the gain is exactly 1 before training (equation 5)."""
        if slot.name == BIAS:
            return bias_start(starting)
        row, site, a, b = starting.row, starting.row.site, starting.a, starting.b
        assert a is not None
        assert b is not None
        if row.tied:
            a, b = a.T, b.T
        applied = dora.applied_weight(
            starting.weight, site.layout, site.view, site.rows, site.order
        )
        return dora.weight_norm(applied, a, b, row.scale, site.layout, site.groups)

    # --- graphs -----------------------------------------------------------------------------------

    def factor_b(self, build: OutputBuilder) -> fx.Node:
        """Write B, scaled and multiplied by the gain."""
        factor = build.factor("b")
        factor = build.call(Role.SCALE, dora.scaled_b, factor, self._constant(build), build.scale)
        return build.cast(factor)

    def branch_bias(self, build: OutputBuilder) -> fx.Node | None:
        """Write ``(1 - g) ∘ bias`` plus B's bias: the gain must not scale the bias of the operation."""
        bias = build.cast_slot(BIAS) if self.bias else None
        if not build.applied.bias or build.padding is not None:
            return bias
        shift = _shift(build, self._constant(build), build.operand_bias)
        return shift if bias is None else build.call(Role.MAGNITUDE, operator.add, bias, shift)

    def without_bias(self) -> AdapterKind:
        """Return plain DoRA, because B's bias is added together with the layer's bias."""
        return KINDS[0]

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write ``g ∘ (total - bias) + bias`` (:func:`lora_fx.runtime.kernels.dora.rescaled`)."""
        assert up is not None
        gains = self._gain(build)
        if self.bias and not build.bias_taken:
            up = build.call(Role.UP, operator.add, up, build.spread(build.cast_slot(BIAS)))
        if not self.bias:
            options = {"again": True} if _recomputes_base(build) else None
            build.fuse_by(fused_dora.dora_linear, gains, less=options)
        if build.padding is not None:
            up = build.padded(up)
            gains = build.call(Role.PAD, F.pad, gains, build.padding, "constant", 1.0)
        spread_gains = build.spread(gains)
        bias = _output_bias(build) if build.applied.bias else None
        if bias is not None and (not build.bias_taken or (self.bias and build.padding is not None)):
            constant = self._constant(build) if build.padding is None else gains
            shift = _shift(build, build.spread(constant), bias)
            up = build.call(Role.MAGNITUDE, operator.add, up, shift)
        if _recomputes_base(build):
            return build.call(
                Role.ADD, dora.recomputed, build.base, up, spread_gains, *build.operands
            )
        if _from_output(build):
            operands = (build.spread(self._constant(build)), bias)
            return build.call(
                Role.ADD, dora.rescaled, build.base, None, up, spread_gains, *operands
            )
        base = None if build.total is build.base else build.base
        return build.call(Role.ADD, dora.rescaled, build.total, base, up, spread_gains)

    def _gain(self, build: OutputBuilder) -> fx.Node:
        return build.once("gain", lambda: self.new_gain(build))

    def new_gain(self, build: OutputBuilder) -> fx.Node:
        """Write the gain, [out], and return its node."""
        site = build.site
        return build.call(
            Role.MAGNITUDE,
            dora.gain,
            build.read_slot(MAGNITUDE, Role.MAGNITUDE),
            build.read_weight(Role.MAGNITUDE),
            build.factor("a"),
            build.factor("b"),
            build.scale,
            site.layout,
            site.groups,
            site.view,
            site.rows,
            *(() if site.order is None else (site.order,)),
        )

    def _constant(self, build: OutputBuilder) -> fx.Node:
        """Write the gain for the branch.

        The gain is detached if the node that adds the branch computes the gradient of the gain.
        """
        if not _from_output(build):
            return self._gain(build)
        return build.once("held", lambda: build.call(Role.MAGNITUDE, dora.held, self._gain(build)))

    # --- merges -----------------------------------------------------------------------------------

    def transformed(self, weight: Tensor, site: Site, values: Mapping[str, Tensor]) -> Tensor:
        """Return ``m / ‖W + s·BA‖ ∘ (W + s·BA)``."""
        norm = _norm(weight.detach(), site)  # a constant to the gradient (section 4.3)
        # Weights that are all zero have no direction and stay zero, as in the forward.
        gain = torch.where(norm > 0, values[MAGNITUDE] / torch.where(norm > 0, norm, 1), 1)
        return weight * along(gain, weight, site)

    def bound(self, values: Mapping[str, Tensor]) -> float | None:
        """Return the largest magnitude: ``|W + s·BA|_ij ≤ ‖W + s·BA‖_i``."""
        return max((abs(float(end)) for end in torch.aminmax(values[MAGNITUDE])), default=0.0)

    def bias_terms(
        self, bias: Tensor | None, values: Mapping[str, Tensor], scale: float
    ) -> Sequence[tuple[Tensor, float]]:
        """Return ``s`` times B's bias, if B has one."""
        return ((values[BIAS], scale),) if self.bias else ()

    # --- files that take adapters as inputs -------------------------------------------------------

    def inputs(
        self, row: PlannedSite, weight: Tensor, a: Tensor, b: Tensor, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the gain instead of the magnitude, and B multiplied by the gain."""
        inputs = super().inputs(row, weight, a, b, values)
        site = row.site
        shape = (site.layout, site.groups, site.view, site.rows, site.order)
        gain = dora.gain(values[MAGNITUDE], weight, a, b, row.scale, *shape).double()
        up = inputs["B"]
        return {**inputs, "gain": gain, "B": up * gain.view(-1, *(1 for _ in up.shape[1:]))}

    def from_inputs(
        self, site: Site, weight: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return B and the magnitude of the site from its gain and the B that includes the gain."""
        gain = inputs["gain"]
        b = inputs["B"] / gain.view(-1, *(1 for _ in inputs["B"].shape[1:])).to(inputs["B"])
        ones = torch.ones_like(gain)
        shape = (site.layout, site.groups, site.view, site.rows)
        inverse = dora.gain(ones, weight, inputs["A"], b, 1.0, *shape)
        return {"B": b, "gain": gain / inverse.to(gain)}


def _from_output(build: OutputBuilder) -> bool:
    return _is_first(build) and not _recomputes_base(build)


def _is_first(build: OutputBuilder) -> bool:
    return build.total is build.base and build.padding is None


def _recomputes_base(build: OutputBuilder) -> bool:
    """Return True if the branch recomputes the base product for the gradient of the magnitude."""
    linear = any(build.base.target is function for function in _LINEAR)
    return _is_first(build) and _makes_base_again(build.site) and linear


def _output_bias(build: OutputBuilder) -> fx.Node:
    bias = build.operand_bias
    return build.spread(bias) if build.site.family == "conv" else bias


def _shift(build: OutputBuilder, gains: fx.Node, bias: fx.Node) -> fx.Node:
    return build.call(Role.MAGNITUDE, dora.shifted, bias, gains, build.base)


def _norm(weight: Tensor, site: Site) -> Tensor:
    """Return the norms of a weight by output feature, [out]."""
    norm: Tensor
    if site.layout == "out_in":
        norm = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        return norm
    kernels = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    grouped = torch.unflatten(kernels, 0, (site.groups, -1))
    norm = torch.linalg.vector_norm(grouped, dim=(1, 3)).flatten()
    return norm


KINDS = (Dora(), Dora(bias=True))
