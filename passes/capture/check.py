"""Comparison of a capture with the original model on the example inputs, and the weights that a call uses."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_fx import torch_private
from lora_fx.errors import CaptureError
from lora_fx.ir import Capture, Region
from lora_fx.passes.capture.state import State
from lora_fx.passes.capture.synthesis import normalize
from lora_fx.passes.graph import holder_of, install, share_copy, storage_of, uninstall
from lora_fx.torch_private import pytree

__all__ = [
    "Count",
    "check_unchanged",
    "count_weights",
    "largest_difference",
    "relative_difference",
    "run_once",
    "run_reference",
    "watch_reference",
]


# Indices of the arguments of an operator that can be weights, or lists of weights.
_OPERANDS: dict[str, tuple[int, ...]] = {
    name: indices
    for names, indices in (
        ("addbmm addmm addmv baddbmm mkldnn_rnn_layer", (1, 2)),
        ("bmm dot mm mv _grouped_mm _scaled_grouped_mm", (0, 1)),
        ("convolution linear", (1,)),
        ("embedding _embedding_bag _embedding_bag_forward_only", (0,)),
        ("gru lstm rnn_relu rnn_tanh", (2, 3)),
        ("_native_multi_head_attention", (5, 7)),
        ("_transformer_encoder_layer_fwd", (3, 5, 14, 16)),
    )
    for name in names.split()
}
# Operators whose weight may be a vector. In other operators a vector is a bias.
_VECTORS = {"addmv", "dot", "mv"}
# Operators that select values of their first argument. The origin of the indices does not matter.
_SELECT = {"gather", "index", "index_select", "take", "_unsafe_index"}
# Operators that copy values into other storage.
_COPY = {"_to_copy", "cat", "clone", "constant_pad_nd", "contiguous", "copy", "stack"}


@dataclass(frozen=True)
class Count:
    """Weights of the linear operations that a call ran.

    Attributes:
        direct: Parameters that are applied as they are, or reshaped, cast or in parts. Each entry has all
            names of one parameter.
        computed: Weights that are computed from parameters. Each entry has the names of these parameters.
    """

    direct: tuple[frozenset[str], ...]
    computed: tuple[frozenset[str], ...]


def count_weights(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Count:
    """Run a model once, and return the weights that its linear operations apply.

    Args:
        model: Any module. A call must not change it.
        args: Positional arguments of one call.
        kwargs: Its keyword arguments.
    """
    watch = _Watch(model, (args, kwargs))
    # Gradients turn off the fast paths of nn.MultiheadAttention, which are one operator each.
    with torch.enable_grad(), watch:
        model(*args, **kwargs)
    direct = tuple(frozenset(names) for names in sorted(map(sorted, watch.direct)))
    computed = tuple(frozenset(names) for names in sorted(map(sorted, watch.computed)))
    return Count(direct, computed)


@dataclass(frozen=True)
class _Origin:
    """Origin of a value that depends on parameters only.

    Attributes:
        names: All names of each parameter that the value depends on.
        direct: True if the values are those of a parameter, without arithmetic.
    """

    names: frozenset[frozenset[str]]
    direct: bool


class _Watch(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Dispatch mode that finds applied weights: it notes which storages are parameters and which are data."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.direct: set[frozenset[str]] = set()
        self.computed: set[frozenset[str]] = set()
        # Weak keys: an entry lives as long as the storage.
        self._origin: Any = WeakIdKeyDictionary()
        self._data: Any = WeakIdKeyDictionary(
            {holder_of(tensor): True for tensor in _tensors(inputs)}
        )
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(storage_of(parameter), set()).add(name)
        self._parameters = frozenset(names)
        for parameter in model.parameters():
            group = frozenset(names[storage_of(parameter)])
            self._origin[holder_of(parameter)] = _Origin(frozenset({group}), direct=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note the origin of its results."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _OPERANDS:
            self._note(name, args)
            self._becomes_data(result)
            return result
        operands = list(_tensors(args[:1])) if name in _SELECT else list(_tensors((args, kwargs)))
        if any(holder_of(tensor) in self._data for tensor in operands):
            self._becomes_data(result)
            return result
        origins = [o for t in operands if (o := self._origin.get(holder_of(t))) is not None]
        if origins:
            copied = name in _SELECT or name in _COPY
            self._becomes(result, origins, copied and all(o.direct for o in origins))
        return result

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        """Note the weights that a linear operator applies, found by the origins of its operands."""
        least = 1 if name in _VECTORS else 2
        operands = [
            [
                o
                for t in _tensors((args[i],))
                if t.dim() >= least and (o := self._origin.get(holder_of(t))) is not None
            ]
            for i in _OPERANDS[name]
            if i < len(args)
        ]
        if name in ("mm", "addmm", "bmm", "baddbmm") and all(operands):
            # Both are parameters, such as a learned query and a layer's weight. The weight comes second.
            operands = operands[1:] if any(o.direct for o in operands[1]) else operands[:1]
        for origin in (origin for group in operands for origin in group):
            if origin.direct:
                self.direct |= origin.names
            else:
                self.computed.add(frozenset(n for group in origin.names for n in group))

    def _becomes_data(self, result: Any) -> None:
        """Note that an operator's results depend on the inputs of the model."""
        for tensor in _tensors((result,)):
            if storage_of(tensor) not in self._parameters:
                self._origin.pop(holder_of(tensor), None)
                self._data[holder_of(tensor)] = True

    def _becomes(self, result: Any, origins: list[_Origin], direct: bool) -> None:
        """Note the parameters that an operator's results are computed from."""
        merged = _Origin(frozenset().union(*(o.names for o in origins)), direct)
        for tensor in _tensors((result,)):
            # A view shares the storage of its base, and so its origin.
            self._origin.setdefault(holder_of(tensor), merged)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))


_T = TypeVar("_T")
_log = logging.getLogger("lora_fx")
_TOLERANCE = 1e-6


def check_unchanged(model: nn.Module, capture: Capture, example_inputs: Any) -> float:
    """Run the model and its capture in eval mode, and compare the outputs.

    If a call changes the state of the model, both are called a second time, because a graph may have fixed
    the state before the first call.

    Returns:
        The largest difference, relative to the largest value of its output; 0.0 for equal bits.

    Raises:
        CaptureError: If the inputs do not fit the model, the outputs differ by more than 1e-6.
    """
    reference, left = _in_words(_run_until_state_settles, share_copy(model), example_inputs)
    runs = _runnable(capture.model, capture.regions.values())
    try:
        with torch.no_grad():
            outputs = [_called(runs, example_inputs) for _ in reference]
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the captured model ({capture.frontend}) fails where the original runs ({type(error).__name__}: "
            f"{error}). Try another frontend, and please report this"
        ) from error
    differences = [_difference(a, b) for a, b in zip(reference, outputs, strict=True)]
    difference = max(differences)
    if difference > _TOLERANCE:
        second = f" in a second call ({left})" if differences[0] <= _TOLERANCE else ""
        raise CaptureError(
            f"the captured model ({capture.frontend}) computes something else than the original"
            f"{second}: relative difference {difference:.3g} on the example inputs. Try another frontend, "
            "and please report this"
        )
    if difference:
        _log.info("the captured model rounds differently: relative difference %.3g", difference)
    return difference


def _runnable(model: nn.Module, regions: Iterable[Region]) -> nn.Module:
    """Return a copy of the model that runs the graphs. A forward then writes state into the copy only."""
    regions = [region for region in regions if not region.not_run]
    install(regions)
    try:
        return share_copy(model)
    finally:
        for region in regions:
            uninstall(region.module)


def run_reference(model: nn.Module, example_inputs: Any) -> Any:
    """Return the model's output in eval mode. A copy that shares the weights runs, not the model itself.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """
    with torch.no_grad():
        return _in_words(_called, share_copy(model), example_inputs)[0]


def run_once(model: nn.Module, example_inputs: Any) -> Any:
    """Return the output of the model itself in eval mode, with gradients if the caller has them enabled.

    Every run starts from the same random state, and leaves it unchanged.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """
    return _in_words(_called, model, example_inputs)[0]


def watch_reference(model: nn.Module, example_inputs: Any) -> Count:
    """Count the weights that the model applies to the example inputs. A copy that shares the weights runs.

    Raises:
        CaptureError: If the inputs do not fit the model.
    """

    def watch(runs: nn.Module, inputs: Any) -> Count:
        args, kwargs = pytree.tree_map(_copied_input, normalize(inputs))
        with torch.random.fork_rng(devices=_devices(runs)):
            return count_weights(runs.eval(), args, kwargs)

    return _in_words(watch, share_copy(model), example_inputs)


def _in_words(run: Callable[[nn.Module, Any], _T], model: nn.Module, example_inputs: Any) -> _T:
    """Call a function on a model and its example inputs, and raise other errors as CaptureError."""
    try:
        return run(model, example_inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model does not run on the example inputs ({type(error).__name__}: {error}). They "
            "must be what its forward takes: a tuple of arguments, a dict of keyword arguments or "
            "a tensor"
        ) from error


def _devices(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def _run_until_state_settles(model: nn.Module, example_inputs: Any) -> tuple[list[Any], str | None]:
    """Return the output, a second one if the first call changed state, and the change in words or None."""
    before = State(model)
    with torch.no_grad():
        outputs = [_called(model, example_inputs)]
        left = before.changed()
        if left is not None:
            outputs.append(_called(model, example_inputs))
    return outputs, left


def _called(model: nn.Module, example_inputs: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return the output in eval mode, and the input tensors after the call, which may write into them.

    Every call starts from the same random state, and keeps it.
    """
    # A forward may write into its inputs: into tensors, and often into caches.
    args, kwargs = inputs = pytree.tree_map(_copied_input, normalize(example_inputs))
    before = State(nn.Module())
    try:
        with torch.random.fork_rng(devices=_devices(model)), _without_fast_path():
            output = model.eval()(*args, **kwargs)
    finally:
        before.restore()  # the random state of Python and NumPy
    return output, list(_tensors(inputs))


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Disable the fast path of attention inside the context, because it writes zeros into padding.

    Graphs do not have a fast path.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copied_input(value: Any) -> Any:
    """Copy an example input, so that a call cannot change the user's object."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _difference(reference: Any, captured: Any) -> float:
    left, left_spec = pytree.tree_flatten(reference)
    right, right_spec = pytree.tree_flatten(captured)
    if left_spec != right_spec:
        raise CaptureError(f"the captured model returns {right_spec}, the original {left_spec}")
    pairs = []
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, torch.Tensor) or a.device.type == "meta":
            continue
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
            return math.inf
        pairs.append((b, a))
    return relative_difference(*zip(*pairs, strict=True)) if pairs else 0.0


def relative_difference(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value of the expected tensor.

    Returns:
        0.0 for equal values; infinity if shapes differ, or only one of two values is finite.
    """
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return math.inf
    pairs = [largest_difference(a, b) for a, b in zip(actual, expected, strict=True)]
    return max((error / max(scale, 1e-30) for error, scale in pairs), default=0.0)


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute difference of two tensors, and the largest finite expected value.

    The shapes must be equal. Equal infinities, and NaN in both, are no difference. A NaN in only one of the
    tensors is an infinite difference.
    """
    if not actual.numel():
        return 0.0, 0.0
    a, b = (
        (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor)
        .detach()
        .double()
        for tensor in (actual.to(expected.device), expected)
    )
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(apart.max()), float(torch.where(b.isfinite(), b.abs(), 0.0).max())
