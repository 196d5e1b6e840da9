"""Whether values are an adapter of a file: every way in which they are not, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_fx.errors import CheckpointError
from lora_fx.export.adapters.manifest import SUFFIXES, AdapterInput, Manifest, Role, SiteInputs

__all__ = ["cast_to", "check_values", "ranks_of"]

_SHOWN = 5


def check_values(
    manifest: Manifest, values: Mapping[str, Tensor], what: str, max_rank: int | None = None
) -> None:
    """Refuse what a file cannot run with, or would run with and give nonsense.

    Args:
        manifest: What the file takes.
        values: By the names of the inputs.
        what: What they are of, for the message.
        max_rank: The highest rank that there is room for, if there is a limit.

    Raises:
        CheckpointError: A value is no input of the file, has another shape or dtype, is not finite, or
            stands without its partner; a rank is above ``max_rank``; or there is no value at all.
    """
    problems = list(dict.fromkeys(_problems(manifest, values, max_rank)))
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{what} is no adapter for this file, which was made from {manifest.base}:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )


def ranks_of(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, int]:
    """Site to rank, for the sites that an adapter is at."""
    return {
        one.site: one.rank_of(tuple(values[name].shape))
        for name, one in manifest.inputs.items()
        if one.role == "A" and name in values
    }


def cast_to(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values in the dtypes of a file: a model's or a folder's may be others."""
    inputs = manifest.inputs
    return {
        name: value.to(getattr(torch, inputs[name].dtype)) if name in inputs else value
        for name, value in values.items()
    }


def _problems(
    manifest: Manifest, values: Mapping[str, Tensor], max_rank: int | None
) -> Iterator[str]:
    if not values:
        yield "it holds no value"
    inputs = manifest.inputs
    for name in values:
        if name not in inputs:
            yield _unknown(name, manifest)
    for site in manifest.sites:
        given = {one.role: one for one in site.inputs() if one.name in values}
        for one in given.values():
            yield from _value_problems(one, values[one.name])
        if given:
            yield from _site_problems(site, given, values, max_rank)


def _unknown(name: str, manifest: Manifest) -> str:
    """Of a value that the file has no input for: where it belongs, and how to get it there."""
    near = difflib.get_close_matches(name, manifest.inputs, 1)
    hint = f" (the nearest that there is: {near[0]})" if near else ""
    suffix = next((one for one in SUFFIXES.values() if name.endswith(f".{one}")), None)
    if suffix is None:
        return f"{name}: the file has no such input{hint}"
    own = name.removesuffix(suffix).removesuffix(".")
    sites = {one.name: one for one in manifest.sites}
    again = "Export the model again with an adapter that has it"
    if own in sites:
        has = ", ".join(one.name for one in sites[own].inputs())
        return f"{name}: the file takes {has} there. {again}"
    parts = [site for site in sites if own and site.startswith(f"{own}.")]
    if parts:
        return (
            f"{own}: the file takes its parts one by one ({', '.join(parts)}). If this is from a folder, "
            "load that onto the model (lora_fx.load_adapter(model, folder)) and give the model"
        )
    whole = own.rpartition(".")[0]
    if whole in sites:
        return (
            f"{own}: the file takes {whole} as a whole. Save the adapter (lora_fx.save_adapter) and give "
            "its folder, which has it as a whole"
        )
    return f"{own}: the file takes no adapter there{hint}. {again}, if it is of this model"


def _value_problems(one: AdapterInput, value: Tensor) -> Iterator[str]:
    if not one.fits(tuple(value.shape)):
        yield f"{one.name}: it has shape {list(value.shape)}, the file takes {one}"
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != one.dtype:
        yield (
            f"{one.name}: it is {dtype}, the file takes {one.dtype}: convert the adapter with "
            "lora_fx.save_onnx_adapter(..., base=FILE)"
        )
    if not bool(value.isfinite().all()):
        yield f"{one.name}: it holds values that are not finite"


def _site_problems(
    site: SiteInputs,
    given: Mapping[Role, AdapterInput],
    values: Mapping[str, Tensor],
    max_rank: int | None,
) -> Iterator[str]:
    if not {"A", "B"} <= given.keys():
        there = ", ".join(given)
        yield f"{site.name}: it has {there} only: an adapter has A and B wherever it is"
        return
    a, b = given["A"], given["B"]
    shapes = tuple(values[a.name].shape), tuple(values[b.name].shape)
    if not a.fits(shapes[0]) or not b.fits(shapes[1]):
        return  # said already
    rank, other = a.rank_of(shapes[0]), b.rank_of(shapes[1])
    if rank != other:
        yield f"{site.name}: A has rank {rank}, B has rank {other}"
    elif rank < site.groups:
        yield f"{site.name}: the rank is {rank}: an adapter has at least {site.groups}"
    elif max_rank is not None and rank > max_rank:
        yield f"{site.name}: the rank is {rank}, above the max_rank={max_rank} of the session"
