"""Weights in safetensors that are renamed, split or joined on loading, as transformers does.

For example, a checkpoint of a mixture of experts has a tensor for each matrix of each expert, and the model
has one parameter for all of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.errors import CheckpointError, some
from lora_fx.files import WeightFiles

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ConvertedFiles", "ConvertedGroup", "FormerNames", "converted", "is_converted"]


def is_converted(model: nn.Module) -> bool:
    """Return True if a model is one of transformers, which may convert the weights of its checkpoints."""
    library: Any = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


class ConvertedFiles(WeightFiles):
    """The parameters of a transformers model in files. Each is read and converted on request."""

    def __init__(self, path: Path, model: Any) -> None:
        """Read the headers of the files.

        Args:
            path: A folder with ``model.safetensors``, or with shards and their index; or one such file.
            model: A model of transformers.

        Raises:
            CheckpointError: If there are no files, or a file is damaged.
        """
        super().__init__(path)
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        renamings, converters = _conversions(model)
        self._model = model
        self._converters = {
            pattern: entry for entry in converters for pattern in entry.source_patterns
        }
        self._patterns: dict[str, str | None] = {}
        self._sources: dict[str, list[str]] = defaultdict(list)
        state, prefix = model.state_dict(), model.base_model_prefix
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in sorted(self._files, key=dot_natural_key):  # the experts by their numbers
            target, self._patterns[name] = rename_source_key(
                name, renamings, converters, prefix, state
            )
            if target in state or not any(re.search(key, target) for key in ignored):
                self._sources[target].append(name)

    @property
    def names(self) -> Iterable[str]:
        """The parameters in the files, by their names in the model. Unmapped tensors keep their names."""
        return self._sources.keys()

    def stored_name(self, name: str) -> str | None:
        """Return the name of a parameter that the files store unconverted; None for any other parameter."""
        sources = self._sources.get(name, ())
        if len(sources) != 1 or self._patterns[sources[0]] is not None:
            return None
        return sources[0]

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a parameter is made of; empty if it is missing."""
        return tuple(self._sources.get(name, ()))

    def parted(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split a parameter into the tensors of :meth:`parts`, as transformers does on saving.

        Args:
            name: FQN of the parameter.
            values: The values of the parameter, or a tensor of this shape on the meta device.

        Returns:
            The tensors by their names in the files. They may be views.

        Raises:
            CheckpointError: If the names or shapes of these tensors differ from those in the files.
        """
        from transformers.core_model_loading import revert_weight_conversion

        try:
            tensors: dict[str, torch.Tensor] = revert_weight_conversion(self._model, {name: values})
        except (KeyError, ValueError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"{name} cannot be parted again ({error!r})") from error
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        stored = {key: self._shapes[key] for key in self.parts(name)}
        if shapes != stored:
            raise CheckpointError(
                f"{name} is {some(list(stored), 3)} in {self.path}, and would be saved as "
                f"{some(list(shapes), 3)}"
            )
        return tensors

    def _objection(self, key: str, wanted: torch.Tensor) -> str | None:
        sources = self._sources[key]
        if self._patterns[sources[0]] is None:
            return super()._objection(sources[0], wanted)
        # Conversions may change shapes, but not the number of values.
        count = sum(math.prod(self._shapes[name]) for name in sources)
        if count == wanted.numel():
            return None
        return f"has {count} values there and {wanted.numel()} in the model"

    def _read(self, key: str) -> torch.Tensor:
        sources = self._sources[key]
        pattern = self._patterns[sources[0]]
        if pattern is None:
            return self.stored(sources[0])
        loads = {
            name: (self._patterns[name], functools.partial(self.stored, name)) for name in sources
        }
        try:
            return converted(self._converters[pattern], key, loads, self._model)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{key} cannot be made of {len(sources)} tensors in {self.path} ({error!r})"
            ) from error


def converted(
    converter: Any,
    key: str,
    loads: Mapping[str, tuple[str | None, Callable[[], torch.Tensor]]],
    model: Any,
) -> torch.Tensor:
    """Return the parameter that a conversion of transformers computes from stored tensors.

    Args:
        converter: The conversion; it is not changed.
        key: The name of the parameter.
        loads: For each stored tensor, by name: its pattern in the conversion, and a function that reads the
            tensor.
        model: A model of transformers.
    """
    return _convert(converter, key, loads, model)[key]


def _convert(
    converter: Any, key: str, loads: Mapping[str, tuple[str | None, Any]], model: Any
) -> dict[str, torch.Tensor]:
    """Return all tensors that a conversion of transformers computes, by name.

    The arguments are those of :func:`converted`. ``loads`` may also hold tensors instead of functions.
    """
    own = copy.deepcopy(converter)
    for name, (pattern, load) in loads.items():
        own.add_tensor(key, name, pattern, load)
    values = own.convert(key, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def _conversions(model: Any) -> tuple[Any, list[Any]]:
    """Return the renamings, and the conversions of weights, that transformers has for a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return [entry for entry in mapping if not isinstance(entry, WeightConverter)], converters


class FormerNames:
    """The names that the parameters of a model have in checkpoints, before transformers converts them.

    Names and modules of earlier versions of transformers are among them. A parameter that is joined from
    several tensors has the names of all of them.

    Attributes:
        groups: The conversion that reads a stored tensor, by the name of the tensor. A conversion has several
            parameters and all tensors that they are made of.
    """

    def __init__(self, model: Any) -> None:
        """Read the conversions of a model of transformers."""
        from transformers.core_model_loading import apply_converters

        self._renamings, converters = _conversions(model)
        self._model = model
        self._state = {name: value.shape for name, value in model.state_dict().items()}
        self._reversed: list[Any] = []
        for entry in converters:
            with contextlib.suppress(NotImplementedError, ValueError):
                self._reversed.append(entry.reverse_transform())
        by_pattern = {
            pattern: entry for entry in self._reversed for pattern in entry.source_patterns
        }
        sources: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._state:
            target, pattern = apply_converters(name, self._reversed)
            if pattern is not None:
                sources[target][name] = pattern
        self.groups: dict[str, ConvertedGroup] = {}
        for target, patterns in sources.items():
            entry = by_pattern[next(iter(patterns.values()))]
            group = ConvertedGroup(model, target, entry, patterns)
            for part in group.shapes({name: self._state[name] for name in patterns}):
                self.groups[part] = group
        self._known: dict[str, object] = {**self._state, **self.groups}

    def renamed(self, name: str) -> str:
        """Return the model's name for a checkpoint's tensor; if it is converted, its key in ``groups``."""
        from transformers.core_model_loading import rename_source_key

        target, _ = rename_source_key(
            name, self._renamings, [], self._model.base_model_prefix, self._known
        )
        return str(target)


class ConvertedGroup:
    """The parameters that one conversion of transformers makes, and the stored tensors that it reads."""

    def __init__(
        self, model: Any, target: str, converter: Any, patterns: Mapping[str, str]
    ) -> None:
        """Store the conversion that turns the parameters back into stored tensors.

        Args:
            model: The model.
            target: The name of the first tensor, as the conversion names it.
            converter: The conversion from the parameters to the tensors; it is not changed.
            patterns: The pattern of each parameter in the conversion, by its FQN.
        """
        self._model, self._target, self._converter = model, target, converter
        self._patterns = patterns

    @property
    def names(self) -> tuple[str, ...]:
        """FQNs of the parameters."""
        return tuple(self._patterns)

    def key(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[object, ...]:
        """Return a key that is equal for groups that are converted in the same way, as in equal layers."""
        return id(self._converter), tuple(tuple(shapes[name]) for name in self._patterns)

    def parts(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert values of the parameters back to stored tensors, by the names of the tensors.

        Returns:
            The tensors; empty if the conversion cannot be undone.
        """
        loads = {name: (pattern, values[name]) for name, pattern in self._patterns.items()}
        try:
            return _convert(self._converter, self._target, loads, self._model)
        except (KeyError, ValueError, RuntimeError, NotImplementedError, TypeError):
            return {}

    def shapes(self, shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors, by name, if the parameters have these shapes."""
        import torch

        empty = {name: torch.empty(shapes[name], device="meta") for name in self._patterns}
        return {name: tuple(part.shape) for name, part in self.parts(empty).items()}
