"""Whether values are an adapter of a file: every way in which they are not, in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_fx.errors import CheckpointError, ExportError, hint, some
from lora_fx.export.report import BankSize

__all__ = [
    "MANIFEST_KEY",
    "ROWS_AXIS",
    "SLOTS_AXIS",
    "SLOTS_INPUT",
    "SUFFIXES",
    "AdapterInput",
    "Manifest",
    "Role",
    "SiteInputs",
    "cast_to",
    "check_values",
    "ranks_of",
]


MANIFEST_KEY = "lora_fx.adapters"

_FORMAT = 1
_BANK_FORMAT = 2  # what versions before banks do not read

SLOTS_INPUT = "adapter_ids"
"""Input of a file with a bank: which adapter each row of the batch has, negative for none."""
ROWS_AXIS, SLOTS_AXIS = "adapter_rows", "adapter_slots"
"""Its axis: that of the batch, or 1, where all rows have the same adapter. And the first axis of a bank."""

Role = Literal["A", "B", "bias", "gain"]
SUFFIXES: dict[Role, str] = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "gain": "lora_gain",
}


@dataclass(frozen=True)
class AdapterInput:
    """One input that is part of an adapter.

    Attributes:
        name: Its name in the file.
        site: The site that it belongs to.
        role: "A", "B", "bias" (of B) or "gain" (of the output).
        shape: Its axes; None for that of the rank.
        dtype: torch's name of its dtype.
        multiple: What the rank is a multiple of: the rank itself is that times the size of the axis.
        conv: Whether it is a factor of a convolution, which has A as [r, ...] and not as [..., r].
    """

    name: str
    site: str
    role: Role
    shape: tuple[int | None, ...]
    dtype: str
    multiple: int = 1
    conv: bool = False

    @property
    def rank_axis(self) -> int | None:
        """The axis that is the rank, or a part of it; None for a bias and a gain."""
        return self.shape.index(None) if None in self.shape else None

    @property
    def neutral(self) -> float:
        """What it is filled with where there is no adapter."""
        return 1.0 if self.role == "gain" else 0.0

    def sized(self, rank: int) -> tuple[int, ...]:
        """The shape at a rank."""
        return tuple(rank // self.multiple if size is None else size for size in self.shape)

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank of a value of this shape; 0 for one that has none."""
        return 0 if self.rank_axis is None else shape[self.rank_axis] * self.multiple

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a value may have this shape."""
        return len(shape) == len(self.shape) and all(
            want is None or want == size for want, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        axes = ", ".join("r" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype}[{axes}]"


@dataclass(frozen=True)
class SiteInputs:
    """The inputs of one site.

    Attributes:
        name: FQN of the site.
        family: ``linear``, ``conv`` or ``embedding``.
        dtype: torch's name of the dtype of its inputs. A gain is of fp32 at least: half precision has
            no digits for what it has more or less than 1.
        a: Shape of A as the file takes it, None for the rank: [in, r], [E, in, r], or, for a
            convolution, [r, in/g, *k].
        b: Shape of B, into which the scale is folded: [r, out], [E, r, out] or [out, r/g, 1, ...].
        out_features: Length of a bias and a gain.
        groups: Of a convolution.
        bias: Whether B has a bias.
        gain: Whether the output is multiplied by a gain.
    """

    name: str
    family: str
    dtype: str
    a: tuple[int | None, ...]
    b: tuple[int | None, ...]
    out_features: int
    groups: int = 1
    bias: bool = False
    gain: bool = False

    def inputs(self) -> Iterator[AdapterInput]:
        """A, B, and what else there is."""
        yield self._input("A", self.a)
        yield self._input("B", self.b, self.groups)
        if self.bias:
            yield self._input("bias", (self.out_features,))
        if self.gain:
            yield self._input("gain", (self.out_features,))

    @property
    def least_rank(self) -> int:
        """The lowest rank that an adapter has here, and that of the zeros which stand for no adapter.

        It is never 0. ONNX Runtime does not promise a product over nothing: its Einsum ends the process, its
        MatMul with the weight on the left gives back whatever was in memory.
        """
        return self.groups

    def _input(self, role: Role, shape: tuple[int | None, ...], multiple: int = 1) -> AdapterInput:
        name = f"{self.name}.{SUFFIXES[role]}" if self.name else SUFFIXES[role]
        half = self.dtype in ("float16", "bfloat16")
        dtype = "float32" if half and role == "gain" else self.dtype
        return AdapterInput(
            name, self.name, role, shape, dtype, multiple, conv=self.family == "conv"
        )


@dataclass(frozen=True)
class Manifest:
    """The adapter inputs of a file.

    In a file with a bank each of them has one axis more, in front: that of the adapters. Slot 0 changes
    nothing, the adapter of id n has slot n + 1.

    Attributes:
        base: What the file was made from: the class of the model, and its name if it has one.
        sites: In the order of the model.
        runs_alone: Whether the defaults in the file are zeros of :attr:`SiteInputs.least_rank`. Earlier
            versions of lora_fx wrote defaults of rank 0, which should not be run.
        bank: For a file in which each row of the batch has its own adapter; None for one that takes one
            adapter at a time.
    """

    base: str
    sites: tuple[SiteInputs, ...]
    runs_alone: bool = True
    bank: BankSize | None = None

    @property
    def inputs(self) -> dict[str, AdapterInput]:
        """Every adapter input by name."""
        return {one.name: one for site in self.sites for one in site.inputs()}

    def no_adapter(self) -> dict[str, Tensor]:
        """Values that change nothing, by the names of the inputs: zeros of the least rank, gains of 1."""
        return {
            one.name: torch.full(
                one.sized(site.least_rank), one.neutral, dtype=getattr(torch, one.dtype)
            )
            for site in self.sites
            for one in site.inputs()
        }

    def to_json(self) -> str:
        """What the metadata of the file hold."""
        sites = [dataclasses.asdict(site) for site in self.sites]
        data = {"format": _FORMAT, "base": self.base, "runs_alone": self.runs_alone, "sites": sites}
        if self.bank is not None:
            data |= {"format": _BANK_FORMAT, "bank": dataclasses.asdict(self.bank)}
        return json.dumps(data)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Manifest | None:
        """The manifest of a file; None for one whose adapters are merged.

        Raises:
            ExportError: It was written by a newer lora_fx, or is damaged.
        """
        text = metadata.get(MANIFEST_KEY)
        if text is None:
            return None
        try:
            data = json.loads(text)
            if data["format"] not in (_FORMAT, _BANK_FORMAT):
                raise ExportError(
                    f"the file has adapter inputs of format {data['format']}, this lora_fx reads "
                    f"{_FORMAT} and {_BANK_FORMAT}: update lora_fx, or export the model again"
                )
            sites = tuple(
                SiteInputs(**{**site, "a": tuple(site["a"]), "b": tuple(site["b"])})
                for site in data["sites"]
            )
            bank = None
            if data["format"] == _BANK_FORMAT:
                size = data["bank"]
                bank = BankSize(tuple(size["adapters"]), int(size["capacity"]), int(size["rank"]))
            return cls(data["base"], sites, bool(data.get("runs_alone", False)), bank)
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(
                f"the metadata {MANIFEST_KEY} of the file are damaged ({error}): export it again"
            ) from error


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
        raise CheckpointError(
            f"{what} is no adapter for this file, which was made from {manifest.base}:\n  "
            + some(problems, between="\n  ")
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
    near = hint(name, manifest.inputs, " (the nearest that there is: {})", count=1)
    suffix = next((one for one in SUFFIXES.values() if name.endswith(f".{one}")), None)
    if suffix is None:
        return f"{name}: the file has no such input{near}"
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
    return f"{own}: the file takes no adapter there{near}. {again}, if it is of this model"


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
