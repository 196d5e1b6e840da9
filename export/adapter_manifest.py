"""Manifest of a file: its adapter inputs, and the check of an adapter's values against the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
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
    "ParameterInput",
    "Role",
    "SiteInputs",
    "TokenInputs",
    "cast_to",
    "check_values",
    "fill_tokens",
    "ranks_of",
]


MANIFEST_KEY = "lora_fx.adapters"

_FORMAT = 1
_BANK_FORMAT = 2  # older versions of lora_fx, which know no banks, refuse it
_PARAMETER_FORMAT = 3  # older versions, which would ignore an adapter's own parameters, refuse it
_FORMATS = (_FORMAT, _BANK_FORMAT, _PARAMETER_FORMAT)

SLOTS_INPUT = "adapter_ids"
"""Input of a file with a bank: the id of the adapter of each row of the batch, negative for none. It has no
default, so that a runtime that does not feed it fails."""
ROWS_AXIS, SLOTS_AXIS = "adapter_rows", "adapter_slots"
"""Names of the axis of ``adapter_ids`` (the batch, or 1 for all rows) and of the first axis of a bank."""

Role = Literal["A", "B", "bias", "gain", "parameter", "tokens", "rows"]
_INDICES, _ROWS = "lora_tokens.indices", "lora_tokens.weight"
"""Suffixes of the names of the two inputs for trained rows of an embedding: the tokens and the rows."""
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
        name: Name of the input in the file.
        site: Name of its site, or the FQN of a parameter.
        role: "A", "B", "bias" (of B) or "gain" (of the output) at a site. "parameter" for a parameter of the
            model that each adapter has its own values of. "tokens" and "rows" for trained rows of an
            embedding.
        shape: Sizes of its axes; None for the axis of the rank.
        dtype: torch's name of its dtype.
        multiple: The rank divided by the size of the rank axis.
        conv: True for a factor of a convolution, which has A as [r, ...] and not as [..., r].
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
        """Index of the axis whose size is the rank, or a part of the rank; None if the input has no rank."""
        return self.shape.index(None) if None in self.shape else None

    @property
    def neutral(self) -> float | None:
        """The number that fills the input if there is no adapter.

        It is 1 for a gain, -1 for tokens, and otherwise 0. None for a parameter, which then has the values of
        the base.
        """
        if self.role == "parameter":
            return None
        return {"gain": 1.0, "tokens": -1.0}.get(self.role, 0.0)

    def sized(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the input for an adapter of this rank."""
        return tuple(rank // self.multiple if size is None else size for size in self.shape)

    def fill(self, rank: int) -> Tensor:
        """Return the tensor that stands for no adapter, at a rank. A parameter has no such tensor."""
        assert self.neutral is not None
        return torch.full(self.sized(rank), self.neutral, dtype=self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the input."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """Return the rank of a value of this shape, or 0 for an input without a rank."""
        return 0 if self.rank_axis is None else shape[self.rank_axis] * self.multiple

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return True if the input takes values of this shape, at any rank."""
        return len(shape) == len(self.shape) and all(
            want is None or want == size for want, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        axes = ", ".join("r" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype}[{axes}]"


@dataclass(frozen=True)
class SiteInputs:
    """Adapter inputs of one site of a file.

    Attributes:
        name: FQN of the site.
        family: ``linear``, ``conv`` or ``embedding``.
        dtype: torch's name of the dtype of the inputs. A gain is in fp32 at least, because half precision
            cannot hold small differences from 1.
        a: Shape of A in the file, None for the rank: [in, r], [E, in, r], or [r, in/g, *k] for a
            convolution.
        b: Shape of B, which includes the scale: [r, out], [E, r, out] or [out, r/g, 1, ...].
        out_features: Length of a bias and a gain.
        groups: Number of groups of a convolution.
        bias: True if B has a bias.
        gain: True if the output is multiplied by a gain.
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
        """Yield A, B, and the bias and the gain if the site has them."""
        yield self._input("A", self.a)
        yield self._input("B", self.b, self.groups)
        if self.bias:
            yield self._input("bias", (self.out_features,))
        if self.gain:
            yield self._input("gain", (self.out_features,))

    @property
    def least_rank(self) -> int:
        """Lowest rank of an adapter at this site, and the rank of the zeros that stand for no adapter.

        It is never 0. ONNX Runtime does not support products over an empty axis: its Einsum aborts the
        process, its MatMul with the weight on the left returns uninitialized memory.
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
class ParameterInput:
    """Input for a parameter of which each adapter has its own values, such as of a head, a norm or a bias.

    Attributes:
        name: FQN of the parameter, and name of its input.
        dtype: torch's name of its dtype.
        shape: Shape of the parameter.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    groups: ClassVar = 1
    least_rank: ClassVar = 1

    def inputs(self) -> Iterator[AdapterInput]:
        """Yield the input of the parameter."""
        yield AdapterInput(self.name, self.name, "parameter", self.shape, self.dtype)


@dataclass(frozen=True)
class TokenInputs:
    """Inputs for the rows of an embedding that an adapter has trained for its own tokens.

    The tokens of an adapter with fewer rows end with -1.

    Attributes:
        name: FQN of the embedding.
        dtype: torch's name of the dtype of the rows.
        shape: Highest number of rows of an adapter, and the length of a row.
        vocabulary: Number of tokens of the embedding.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    vocabulary: int

    groups: ClassVar = 1
    least_rank: ClassVar = 1

    def inputs(self) -> Iterator[AdapterInput]:
        """Yield the tokens, [n] int64, and the rows, [n, width]."""
        tokens, rows = self.names
        yield AdapterInput(tokens, self.name, "tokens", self.shape[:1], "int64")
        yield AdapterInput(rows, self.name, "rows", self.shape, self.dtype)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the inputs: of the tokens, and of the rows."""
        prefix = f"{self.name}." if self.name else ""
        return f"{prefix}{_INDICES}", f"{prefix}{_ROWS}"

    def fill(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of an adapter with its trained rows padded to the number that the file takes."""
        tokens, rows = (values.get(name) for name in self.names)
        if tokens is None or rows is None or (tokens.dim(), rows.dim()) != (1, 2):
            return dict(values)
        missing = self.shape[0] - len(tokens)
        if len(tokens) != len(rows) or not 0 < missing < self.shape[0]:
            return dict(values)
        filled = F.pad(tokens, (0, missing), value=-1), F.pad(rows, (0, 0, 0, missing))
        return {**values, **dict(zip(self.names, filled, strict=True))}

    def problems(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        """Yield the errors in the tokens and rows of an adapter, whose shapes are already checked."""
        tokens, rows = (values.get(name) for name in self.names)
        if tokens is None or rows is None:
            if tokens is not rows:
                yield f"{self.name}: it has only one of {' and '.join(self.names)}"
            return
        count = len(tokens) - int(
            (tokens.flip(0) == -1).cumprod(0).sum()
        )  # without the padding at the end
        tokens, rows = tokens[:count], rows[:count]
        wrong = [int(token) for token in tokens if not 0 <= int(token) < self.vocabulary]
        if wrong:
            yield f"{self.names[0]}: {wrong[0]} is none of the {self.vocabulary} tokens"
        twice = [
            int(token)
            for token in set(tokens.tolist())
            if bool((rows[tokens == token] != rows[tokens == token][:1]).any())
        ]
        if twice:
            yield f"{self.names[1]}: it has different rows for the token {twice[0]}"


@dataclass(frozen=True)
class Manifest:
    """The adapter inputs of a file.

    In a file with a bank each input has one more axis in front, the slots of adapters. Slot 0 is neutral,
    and the adapter of id n has slot n + 1.

    Attributes:
        base: The class of the exported model, and its name if it has one.
        sites: The inputs of each site, in the order of the model.
        runs_alone: True if the defaults in the file are zeros of :attr:`SiteInputs.least_rank`. Earlier
            versions of lora_fx wrote defaults of rank 0, which should not be run.
        bank: The size of the bank, if each row of the batch has its own adapter. None for a file that takes
            one adapter at a time.
        required: True if no input of the file has a default. The factors of a bank are then constants.
        parameters: The parameters that each adapter has its own values of. Every adapter has all of them.
        tokens: The embeddings for which adapters have trained rows.
    """

    base: str
    sites: tuple[SiteInputs, ...]
    runs_alone: bool = True
    bank: BankSize | None = None
    required: bool = False
    parameters: tuple[ParameterInput, ...] = ()
    tokens: tuple[TokenInputs, ...] = ()

    @property
    def targets(self) -> tuple[SiteInputs | ParameterInput | TokenInputs, ...]:
        """All entries of the manifest: the sites, then the parameters, then the embeddings."""
        return (*self.sites, *self.parameters, *self.tokens)

    def require(self) -> Manifest:
        """Return the manifest of the same file with ``required=True``: no input has a default."""
        bank = self.bank
        if bank is not None:
            bank = dataclasses.replace(bank, capacity=len(bank.adapters))
        return dataclasses.replace(self, required=True, runs_alone=bank is not None, bank=bank)

    @property
    def choosing(self) -> tuple[str, ...]:
        """Names of inputs that choose the adapter of a run. A file that lacks them would run the base."""
        return tuple(self.inputs) if self.bank is None else (SLOTS_INPUT,)

    @property
    def replaceable(self) -> tuple[str, ...]:
        """Names of the inputs that a session needs to load further adapters."""
        return () if self.bank is not None and self.required else tuple(self.inputs)

    def missing(self, inputs: Collection[str]) -> tuple[list[str], list[str]]:
        """Return the inputs of :attr:`choosing`, and those of :attr:`replaceable`, that a file lacks."""
        return (
            [name for name in self.choosing if name not in inputs],
            [name for name in self.replaceable if name not in inputs],
        )

    @property
    def inputs(self) -> dict[str, AdapterInput]:
        """All adapter inputs by name."""
        return {
            adapter_input.name: adapter_input
            for target in self.targets
            for adapter_input in target.inputs()
        }

    def no_adapter(self) -> dict[str, Tensor]:
        """Return neutral values by input name: zeros of the least rank, gains of 1, and tokens of -1.

        Parameters are left out, because only the base has their values.
        """
        targets: tuple[SiteInputs | TokenInputs, ...] = (*self.sites, *self.tokens)
        return {
            adapter_input.name: adapter_input.fill(target.least_rank)
            for target in targets
            for adapter_input in target.inputs()
        }

    def to_json(self) -> str:
        """Return the manifest as text for the metadata of the file."""
        sites = [dataclasses.asdict(site) for site in self.sites]
        data = {"format": _FORMAT, "base": self.base, "runs_alone": self.runs_alone, "sites": sites}
        if self.required:
            data["required"] = True
        if self.bank is not None:
            data |= {"format": _BANK_FORMAT, "bank": dataclasses.asdict(self.bank)}
        if self.parameters or self.tokens:
            data["format"] = _PARAMETER_FORMAT
            data["parameters"] = [dataclasses.asdict(parameter) for parameter in self.parameters]
            data["tokens"] = [dataclasses.asdict(target) for target in self.tokens]
        return json.dumps(data)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Manifest | None:
        """Read the manifest of a file. Return None if the adapters of the file are merged.

        Raises:
            ExportError: The manifest was written by a newer lora_fx, or is damaged.
        """
        text = metadata.get(MANIFEST_KEY)
        if text is None:
            return None
        try:
            data = json.loads(text)
            if data["format"] not in _FORMATS:
                raise ExportError(
                    f"the file has adapter inputs of format {data['format']}, this lora_fx reads "
                    f"{some(list(map(str, _FORMATS)))}: update lora_fx, or export the model again"
                )
            sites = tuple(
                SiteInputs(**{**site, "a": tuple(site["a"]), "b": tuple(site["b"])})
                for site in data["sites"]
            )
            parameters = tuple(
                ParameterInput(**{**target, "shape": tuple(target["shape"])})
                for target in data.get("parameters", ())
            )
            tokens = tuple(
                TokenInputs(**{**target, "shape": tuple(target["shape"])})
                for target in data.get("tokens", ())
            )
            bank = None
            if data["format"] == _BANK_FORMAT or "bank" in data:
                size = data["bank"]
                bank = BankSize(tuple(size["adapters"]), int(size["capacity"]), int(size["rank"]))
            alone, required = (bool(data.get(key, False)) for key in ("runs_alone", "required"))
            return cls(data["base"], sites, alone, bank, required, parameters, tokens)
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(
                f"the metadata {MANIFEST_KEY} of the file are damaged ({error}): export it again"
            ) from error


def check_values(
    manifest: Manifest, values: Mapping[str, Tensor], description: str, max_rank: int | None = None
) -> None:
    """Raise unless values are a valid adapter of a file.

    Args:
        manifest: The manifest of the file.
        values: The values by input name.
        description: Description of the adapter for the message.
        max_rank: The highest allowed rank, if there is a limit.

    Raises:
        CheckpointError: There are no values, or a value is not an input of the file. A shape or dtype is
            wrong, or a number is not finite. A site lacks A or B, or its rank is above ``max_rank``.
    """
    problems = list(dict.fromkeys(_problems(manifest, values, max_rank)))
    if problems:
        raise CheckpointError(
            f"{description} is no adapter for this file, which was made from {manifest.base}:\n  "
            + some(problems, between="\n  ")
        )


def ranks_of(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, int]:
    """Map each site of an adapter to its rank."""
    return {
        adapter_input.site: adapter_input.rank_of(tuple(values[name].shape))
        for name, adapter_input in manifest.inputs.items()
        if adapter_input.role == "A" and name in values
    }


def cast_to(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast values to the dtypes of the inputs of a file. Other values stay unchanged."""
    inputs = manifest.inputs
    return {
        name: value.to(getattr(torch, inputs[name].dtype)) if name in inputs else value
        for name, value in values.items()
    }


def fill_tokens(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of an adapter with its trained rows of embeddings padded to the file's sizes."""
    filled = dict(values)
    for target in manifest.tokens:
        filled = target.fill(filled)
    return filled


def _problems(
    manifest: Manifest, values: Mapping[str, Tensor], max_rank: int | None
) -> Iterator[str]:
    if not values:
        yield "it holds no value"
    inputs = manifest.inputs
    for name in values:
        if name not in inputs:
            yield _unknown(name, manifest)
    if values:
        yield from _lacking(manifest, values)
    for site in manifest.targets:
        present = [entry for entry in site.inputs() if entry.name in values]
        for entry in present:
            yield from _value_problems(entry, values[entry.name])
        by_role = {entry.role: entry for entry in present}
        if isinstance(site, TokenInputs) and all(
            entry.fits(tuple(values[entry.name].shape)) for entry in present
        ):
            yield from site.problems(values)
        if by_role and isinstance(site, SiteInputs):
            yield from _site_problems(site, by_role, values, max_rank)


def _lacking(manifest: Manifest, values: Mapping[str, Tensor]) -> Iterator[str]:
    lost = [parameter.name for parameter in manifest.parameters if parameter.name not in values]
    if lost:
        yield (
            f"{some(lost)}: each adapter of the file has its own values, and this has none. Train them "
            "(modules_to_save), or load the adapter onto the model (lora_fx.load_adapter(model, folder)) and "
            "give the model, whose base has values"
        )


def _unknown(name: str, manifest: Manifest) -> str:
    """Return the error text, with a remedy, for a value whose name is not an input of the file."""
    near = hint(name, manifest.inputs, " (the nearest that there is: {})", count=1)
    suffix = next((ending for ending in SUFFIXES.values() if name.endswith(f".{ending}")), None)
    if suffix is None:
        return (
            f"{name}: the file has no such input{near}. If the adapter trains it, export the model again "
            "with such an adapter"
        )
    fqn = name.removesuffix(suffix).removesuffix(".")
    sites = {site.name: site for site in manifest.sites}
    advice = "Export the model again with an adapter that has it"
    if fqn in sites:
        names = ", ".join(adapter_input.name for adapter_input in sites[fqn].inputs())
        return f"{name}: the file takes {names} there. {advice}"
    parts = [site for site in sites if fqn and site.startswith(f"{fqn}.")]
    if parts:
        return (
            f"{fqn}: the file takes its parts one by one ({', '.join(parts)}). If this is from a folder, "
            "load that onto the model (lora_fx.load_adapter(model, folder)) and give the model"
        )
    whole = fqn.rpartition(".")[0]
    if whole in sites:
        return (
            f"{fqn}: the file takes {whole} as a whole. Save the adapter (lora_fx.save_adapter) and give "
            "its folder, which has it as a whole"
        )
    return f"{fqn}: the file takes no adapter there{near}. {advice}, if it is of this model"


_SHAPE_REMEDIES: Mapping[Role, str] = {
    "parameter": (
        ". All adapters of a file have heads of one shape: train this one with as many classes, or export "
        "its model to a file of its own"
    ),
    "tokens": (
        ". A file takes as many trained tokens as the adapters that it was exported with: export the model "
        "again with this adapter"
    ),
}


def _value_problems(expected: AdapterInput, value: Tensor) -> Iterator[str]:
    if not expected.fits(tuple(value.shape)):
        yield (
            f"{expected.name}: it has shape {list(value.shape)}, the file takes {expected}"
            f"{_SHAPE_REMEDIES.get(expected.role, '')}"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != expected.dtype:
        yield (
            f"{expected.name}: it is {dtype}, the file takes {expected.dtype}: convert the adapter with "
            "lora_fx.save_onnx_adapter(..., base=FILE)"
        )
    if not bool(value.isfinite().all()):
        yield f"{expected.name}: it holds values that are not finite"


def _site_problems(
    site: SiteInputs,
    by_role: Mapping[Role, AdapterInput],
    values: Mapping[str, Tensor],
    max_rank: int | None,
) -> Iterator[str]:
    if not {"A", "B"} <= by_role.keys():
        roles = ", ".join(by_role)
        yield f"{site.name}: it has {roles} only: an adapter has A and B wherever it is"
        return
    a, b = by_role["A"], by_role["B"]
    shapes = tuple(values[a.name].shape), tuple(values[b.name].shape)
    if not a.fits(shapes[0]) or not b.fits(shapes[1]):
        return  # reported by _value_problems
    rank, other = a.rank_of(shapes[0]), b.rank_of(shapes[1])
    if rank != other:
        yield f"{site.name}: A has rank {rank}, B has rank {other}"
    elif rank < site.groups:
        yield f"{site.name}: the rank is {rank}: an adapter has at least {site.groups}"
    elif max_rank is not None and rank > max_rank:
        yield f"{site.name}: the rank is {rank}, above the max_rank={max_rank} of the session"
