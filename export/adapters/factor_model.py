"""A model that is handed its factors: the adapter inputs of a file, as torch.export sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from lora_fx.export.adapters.manifest import AdapterInput, Manifest, Role, SiteInputs
from lora_fx.export.adapters.origin import base_name
from lora_fx.export.adapters.swappable import ADAPTER, Swappable
from lora_fx.export.copy.twin import DTYPES, dtype_name
from lora_fx.export.trace.arguments import Arguments, Extra, FlatModel, named_outputs
from lora_fx.ir.record import Record
from lora_fx.ir.values import PlannedSite, join
from lora_fx.passes.graph.copies import share_copy
from lora_fx.passes.merge.merging import merge
from lora_fx.passes.parameters.factors import factor_names
from lora_fx.passes.patterns.registry import pattern_of
from lora_fx.runtime import dora

__all__ = ["FactorModel", "flip", "random_factors", "site_inputs"]


class FactorModel(FlatModel):
    """A flat model that takes all adapter inputs of its manifest after the tensors of the call.

    Args:
        made: What :func:`lora_fx.export.adapters.swappable.swappable` has made.
        model: It again, or a copy that was cast.
        arguments: The call.
        call: How the model is called.

    Attributes:
        manifest: The adapter inputs.
        adapter_inputs: The same in order.
    """

    def __init__(
        self,
        made: Swappable,
        model: nn.Module,
        arguments: Arguments,
        call: Callable[..., object] = nn.Module.__call__,
    ) -> None:
        super().__init__(model, arguments, call)
        self._made = made
        self.manifest = Manifest(
            base_name(model), tuple(site_inputs(model, row) for row in made.rows)
        )
        self.adapter_inputs = tuple(self.manifest.inputs.values())
        self.device = next(model.parameters()).device
        self._places = tuple(name for row in made.rows for name in _parameters(row))

    def named(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The outputs with their names.

        Args:
            tensors: Those of the call, and then the adapter inputs.
        """
        own = len(self.arguments.tensors)
        args, kwargs = self.arguments.fill(tensors[:own])
        return named_outputs(self.handed(tensors[own:], self.call, *args, **kwargs))

    def handed(
        self, factors: Sequence[Tensor], call: Callable[..., object], *args: Any, **kwargs: Any
    ) -> Any:
        """``call(model, *args, **kwargs)`` with values for the adapter inputs."""
        given = zip(self._places, self.adapter_inputs, factors, strict=True)
        values = {f"model.{name}": flip(one, tensor) for name, one, tensor in given}
        return torch.func.functional_call(_Called(self.model, call), values, args, kwargs)

    @torch.no_grad()
    def merged(self, factors: Sequence[Tensor], keep: Callable[[Tensor], Tensor]) -> FlatModel:
        """The same call of the model with values for the adapter inputs folded into its weights.

        Nothing of what runs in the file is in it: no branch, no graph, no product of low rank. The values of
        :meth:`loose_biases` are left out.

        Args:
            factors: The values, in the order of the inputs.
            keep: Takes each folded weight, see ``Scratch.keep``.

        Raises:
            MergeError: Something cannot be folded.
        """
        twin = share_copy(self.model)
        values = dict(zip((one.name for one in self.adapter_inputs), factors, strict=True))
        for row, site in zip(self._made.rows, self.manifest.sites, strict=True):
            given = {one.role: flip(one, values[one.name]) for one in site.inputs()}
            if row.dora:
                given |= _as_dora(twin, row, given)
            for name, one in zip(_parameters(row), site.inputs(), strict=True):
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(given[one.role], requires_grad=False)
                twin.get_submodule(owner)._parameters[leaf] = value
        twin.__dict__["_lora_fx"] = self._foldable()
        dense, _ = merge(twin, adapter_names=ADAPTER, keep=keep)
        return FlatModel(dense, self.arguments, self.call).eval()

    def loose_biases(self) -> set[str]:
        """Inputs that are a bias on B of an operation without a bias: no weight can take them."""
        return {
            one.name
            for row, site in zip(self._made.rows, self.manifest.sites, strict=True)
            for one in site.inputs()
            if one.role == "bias" and row.site.bias is None
        }

    def _foldable(self) -> Record:
        """The record, without biases that no weight can take."""
        record = self._made.record
        adapter = record.adapters[ADAPTER]
        rows = tuple(
            row if row.site.bias else dataclasses.replace(row, lora_bias=False)
            for row in adapter.sites
        )
        return dataclasses.replace(
            record, adapters={ADAPTER: dataclasses.replace(adapter, sites=rows)}
        )

    def over(self, model: nn.Module) -> FactorModel:
        """The same call of another copy of its model."""
        return FactorModel(self._made, model, self.arguments, self.call).eval()

    def extras(self) -> tuple[Extra, ...]:
        """The adapter inputs as torch.export sees them.

        Both factors of a site share the rank, and no two sites do: each may have its own.
        """
        found = []
        for index, site in enumerate(self.manifest.sites):
            rank = f"lora_rank_{index}"
            dim = Dim(rank, min=1)
            for one in site.inputs():
                # A of a grouped convolution has the rank of all groups, B that of one.
                times = site.groups // one.multiple
                dims: dict[int, object] = dict.fromkeys(range(len(one.shape)), Dim.STATIC)
                if one.rank_axis is not None:
                    dims[one.rank_axis] = dim * times if times > 1 else dim
                label = f"{times}*{rank}" if times > 1 else rank
                labels = tuple(label if size is None else size for size in one.shape)
                plain = one.rank_axis if times == 1 else None
                shape, dtype = one.sized(2 * site.groups), getattr(torch, one.dtype)
                example = torch.zeros(shape, dtype=dtype, device=self.device)
                found.append(Extra(one.name, example, dims, labels, plain))
        return tuple(found)


class _Called(nn.Module):
    """A model under a way to call it, since ``functional_call`` takes a module."""

    def __init__(self, model: nn.Module, call: Callable[..., object]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> object:
        return self.call(self.model, *args, **kwargs)


def flip(one: AdapterInput, tensor: Tensor) -> Tensor:
    """From an adapter input to the parameter that it stands for, or back: a view.

    Matrices of a file are multiplied as they are, A being [in, r] and B [r, out]; parameters are the other
    way round. What a convolution takes is the same in both.
    """
    matrix = one.role in ("A", "B") and not one.conv
    return tensor.mT if matrix else tensor


def random_factors(manifest: Manifest, rank: int) -> dict[str, Tensor]:
    """An adapter that nobody has trained: it shows whether a file computes what the model does.

    Args:
        manifest: What the file takes.
        rank: Its lowest rank; sites differ by up to 2, and grouped convolutions need a multiple of their
            groups.

    Returns:
        Values by the names of the inputs. A keeps the size of what it is applied to, B is a tenth of that.
    """
    draw = torch.Generator().manual_seed(0)
    found = {}
    for index, site in enumerate(manifest.sites):
        # Not the same everywhere: that shows a rank which was taken for another one.
        ranked = site.groups * max(1, (rank + index % 3) // site.groups)
        for one in site.inputs():
            shape = one.sized(ranked)
            value = torch.randn(shape, generator=draw)
            if one.role == "A" and site.family != "embedding":
                value /= max(1, value[..., 0].numel() if not one.conv else value[0].numel()) ** 0.5
            elif one.role in ("B", "gain"):
                value *= 0.1 / ranked**0.5 if one.role == "B" else 0.1
            found[one.name] = (one.neutral + value).to(getattr(torch, one.dtype))
    return found


def site_inputs(model: nn.Module, row: PlannedSite) -> SiteInputs:
    """What a file takes for a site of a rewritten model."""
    site, conv = row.site, row.site.family == "conv"
    shapes = pattern_of(site).factors(site, site.groups)
    a: tuple[int | None, ...] = (None, *shapes.a[1:]) if conv else (*shapes.a[:0:-1], None)
    b: tuple[int | None, ...] = (shapes.b[0], None, *shapes.b[2:]) if conv else (None, shapes.b[0])
    if shapes.stacked:
        a, b = (shapes.a[0], shapes.a[2], None), (shapes.b[0], None, shapes.b[1])
    if site.quantized is None:
        dtype = model.get_parameter(site.weight).dtype
    else:  # its values are in the dtype of what it is multiplied by
        dtype = DTYPES.get(dtype_name(model), torch.float32)
    return SiteInputs(
        row.name,
        site.family,
        str(dtype).removeprefix("torch."),
        a,
        b,
        site.out_features,
        site.groups,
        bias=row.lora_bias,
        gain=row.dora,
    )


def _as_dora(
    model: nn.Module, row: PlannedSite, given: Mapping[Role, Tensor]
) -> dict[Role, Tensor]:
    """B and the magnitude that a site has whose gain, and whose B with the gain in it, are these."""
    site, gain = row.site, given["gain"]
    b = given["B"] / gain.view(-1, *(1 for _ in given["B"].shape[1:])).to(given["B"])
    weight = model.get_parameter(site.weight)
    ones = torch.ones_like(gain)
    inverse = dora.gain(
        ones, weight, given["A"], b, 1.0, site.layout, site.groups, site.view, site.rows
    )
    return {"B": b, "gain": gain / inverse.to(gain)}


def _parameters(row: PlannedSite) -> list[str]:
    """FQNs of the parameters of a site, in the order of its inputs."""
    names = factor_names(row)
    present = [name for name in (names.a, names.b, names.bias, names.magnitude) if name]
    return [join(row.site.holder, name, ADAPTER) for name in present]
