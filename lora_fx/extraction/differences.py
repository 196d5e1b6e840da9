"""The values of a model before and after a change, from models in memory or from files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_fx.converted_files import ConvertedFiles, is_converted
from lora_fx.errors import CheckpointError, ConfigError, QuantizationError, some
from lora_fx.files import WeightFiles
from lora_fx.formats import quantization_of
from lora_fx.ir import Site, record_of
from lora_fx.passes.parameters import as_matrices, part_of, persistent_buffers, wide

__all__ = ["Difference", "Weights", "names_of", "weights_in", "weights_of"]

Weights: TypeAlias = Callable[[str], Tensor | None]
"""Function that returns a parameter or buffer by its FQN; None if there is none."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """The values of a model before and after a change, one tensor at a time.

    Attributes:
        before: The values of the base. It may lack parameters, such as those of a new head.
        changes: The values after the change. A parameter that did not change may be the same object.
        ranks: Upper bounds of the ranks of changes, by parameter, if they are known.
    """

    before: Weights
    changes: Weights
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def after(self, name: str) -> Tensor:
        """Return the values of a tensor after the change."""
        value = self.changes(name)
        assert value is not None, name
        return value

    def compare(self, name: str) -> Literal["new", "changed", "same"]:
        """Return "new" for a tensor that the base lacks, else "changed" or "same", by its values.

        Raises:
            CheckpointError: If there are values that are not finite.
            QuantizationError: If values have 8 bits.
        """
        old, new = self.before(name), self.after(name)
        if old is new:
            return "same"
        if old is None:
            return "new"
        _check_values(name, old)
        _check_values(name, new)
        return "same" if _equal(old, new) else "changed"

    def changed(self, name: str) -> bool:
        """Return True if the change gives a tensor other values, or the base lacks the tensor."""
        return self.compare(name) != "same"

    def same(self, name: str, other: str) -> bool:
        """Return True if two tensors are equal to each other before the change, and also after it."""
        return all(
            first is second or (first is not None and second is not None and _equal(first, second))
            for first, second in (
                (self.before(name), self.before(other)),
                (self.changes(name), self.changes(other)),
            )
        )

    def matrices(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the weight of a site before the change, and the change, both as [n, out, in]."""
        stored = self.before(site.weight)
        assert stored is not None, site.weight
        old, new = (
            wide(part_of(site, weight.detach())) for weight in (stored, self.after(site.weight))
        )
        return as_matrices(site, old), as_matrices(site, new.to(old.device, old.dtype) - old)


def _equal(value: Tensor, other: Tensor) -> bool:
    if value.shape != other.shape:
        return False
    dtype = torch.promote_types(value.dtype, other.dtype)
    return torch.equal(value.to(dtype), other.to(value.device, dtype))


def _check_values(name: str, value: Tensor) -> None:
    """Raise if no difference can be computed with these values.

    Raises:
        QuantizationError: If they are of 8 bits.
        CheckpointError: If they are not finite.
    """
    if value.is_floating_point() and value.itemsize == 1:
        raise QuantizationError(
            f"{name} is {value.dtype}: extract from dense checkpoints. The adapter loads onto a quantized "
            "base afterwards"
        )
    if not value.is_meta and not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{name} has values that are not finite, so that nothing is close to it"
        )


def weights_of(source: nn.Module | str | os.PathLike[str], model: nn.Module) -> Weights:
    """Return the weights of a model, or of a folder, by the names that they have in another model.

    Args:
        source: A model, or a folder or file of safetensors.
        model: A model of the same architecture, perhaps on the meta device.

    Raises:
        CheckpointError: If the source has other tensors than the model.
        ConfigError: If the source is a rewritten model.
        QuantizationError: If one of its weights is quantized.
    """
    shapes = _tensors(model)
    if not isinstance(source, nn.Module):
        return _weights_of_files(Path(source).expanduser(), model)
    if record_of(source) is not None:
        raise ConfigError(
            f"this {type(source).__name__} has adapters already: give a plain model, for example what "
            "lora_fx.merge returns"
        )
    tensors = _unwrapped(_tensors(source))
    for name, tensor in tensors.items():
        if quantization_of(tensor) is not None:
            raise QuantizationError(
                f"{name} is quantized ({quantization_of(tensor)}): extract from dense models. The adapter "
                "loads onto the quantized base afterwards"
            )
    missing = sorted(shapes.keys() - tensors.keys())
    other = [
        f"{name} is {tuple(tensors[name].shape)}, and {tuple(tensor.shape)} in the base"
        for name, tensor in shapes.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if missing or other:
        lines = [*([f"it has no {some(missing, 3)}"] if missing else []), *other[:3]]
        raise CheckpointError(_misfit(source, model, lines))
    return tensors.get


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names that they have without a wrapper of torch.compile or DataParallel."""
    for prefix in ("_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _misfit(source: nn.Module, model: nn.Module, lines: Iterable[str]) -> str:
    return (
        f"this {type(source).__name__} is no tuned version of the {type(model).__name__}: "
        f"{'; '.join(lines)}. If tuning added tokens, resize the base first "
        "(model.resize_token_embeddings)"
    )


def _weights_of_files(path: Path, model: nn.Module) -> Weights:
    files = _files(path, model)
    files.reader(model)  # raises if the files hold another model
    return weights_in(files, model)


def _files(path: Path, model: nn.Module) -> WeightFiles:
    return ConvertedFiles(path, model) if is_converted(model) else WeightFiles(path)


def weights_in(files: WeightFiles, model: nn.Module) -> Weights:
    """Return the weights in files by the names that they have in a model, in the dtypes of the files.

    A tied weight may have any of its names in the files.
    """
    tensors = _tensors(model)
    aliases = names_of(tensors)

    def read(name: str) -> Tensor | None:
        values = files.tensor(name, *aliases[name])
        if values is not None and values.shape != tensors[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(values.shape)} in {files.path}, and {tuple(tensors[name].shape)} in the "
                "other model. If tuning added tokens, resize the base first, and save it"
            )
        return values

    return read


def names_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return all names of each tensor, by each of these names. A tied tensor has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model, each under every name, and the persistent buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
