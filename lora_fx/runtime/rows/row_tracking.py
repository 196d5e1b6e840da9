"""Dispatch mode that tracks which samples of a batch each element of a tensor was computed from.

A dispatch mode sees every operator of a call, whatever code runs it. Each storage has a shadow, which holds
the samples of its elements. A tensor and its samples have the same geometry, so views and writes need no
rule. The rules of the other operators are in :mod:`lora_fx.runtime.rows.row_rules`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lora_fx import torch_private
from lora_fx.errors import ConfigError
from lora_fx.runtime.rows.row_rules import Operation, batch_normalized, operands_of, rule_of, union

__all__ = ["Follower", "caller"]

_READS = frozenset(("numpy", "tolist", "__array__", "__dlpack__", "data_ptr"))
# These modules read values of a batch only to choose masks, and to decide when to stop.
_ASK_OF_MASKS = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")


class _Shadow:
    """Samples of the elements of a storage, or of a part of it.

    Attributes:
        sets: Intervals of samples, [channels, elements]; None if no element has samples. The first two
            channels have the samples of each element. Two more have presumed samples, if there are any.
        start: Offset of the first element, in elements of ``size`` bytes.
        size: Bytes of an element.
    """

    def __init__(self) -> None:
        self.sets: Tensor | None = None
        self.start = 0
        self.size = 1


class Follower(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Dispatch mode that tracks the samples of one call.

    An element has the samples that it was computed from. It may also have a presumed sample: a site treated
    its row as one of that sample, although it was computed from none (learned queries, positions). Such an
    element may only meet elements of its presumed sample. Anything else ends the call with an error.

    Attributes:
        samples: Number of samples.
        repeats: How many times in a row the batch may repeat each sample.
        by_values: True if values of the batch have decided which sample a row has. Another batch of the same
            shapes may then have another layout.
        folded: True if a site has read several rows per sample.
        begin_with: Sizes of the first axes of the call's arguments.
        mixed_by: The first operator whose result belongs to several samples.
        paused: True to ignore operators, because the running site reports the samples of its rows itself.
    """

    def __init__(self, model: nn.Module, samples: int, repeats: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.model, self.samples, self.repeats = model, samples, repeats
        self.dtype = torch.int8 if samples < 100 else torch.int16
        if samples > 30000:
            raise ConfigError(f"adapter_ids: at most 30000 samples, found {samples}")
        self.empty = torch.iinfo(self.dtype).max
        self.by_values = self.folded = False
        self.begin_with: set[int] = set()
        self.mixed_by = ""
        self.paused = False
        self.error: BaseException | None = None
        self._presumed_at: list[str] = []
        # Keyed weakly by storage.
        self._shadows: Any = WeakIdKeyDictionary()
        self._reads = _Reads(self)

    # --- samples of tensors ---------------------------------------------------------------------------

    def read(self, tensor: Any) -> Tensor | None:
        """Return the samples of each element, [channels, *shape]; None if no element has samples."""
        if not isinstance(tensor, Tensor):
            return None
        shadow = self._shadow(tensor)
        if shadow is None or shadow.sets is None:
            return None
        view = self._view(shadow, tensor)
        if view.numel() and int(view[(0,) * view.dim()]) != self.empty:
            return view
        return view if bool((view != self.empty).any()) else None

    def write(self, tensor: Tensor, sets: Tensor | None) -> None:
        """Set the samples of each element. ``sets`` is broadcast; None clears them."""
        shadow = self._shadow(tensor)
        if sets is None and (shadow is None or shadow.sets is None):
            return
        shadow = shadow or self._new(tensor)
        if shadow.sets is None:
            self._open(shadow, tensor)
        view = self._view(shadow, tensor)
        if sets is None:
            view.fill_(self.empty)
            return
        if len(sets) < len(view):
            view[2:].fill_(self.empty)
            view = view[: len(sets)]
        sets = sets.to(view.device)
        view.copy_(sets.reshape(len(sets), *[1] * (view.dim() - sets.dim()), *sets.shape[1:]))

    def enter(self, tensor: Tensor) -> None:
        """Give each row of an argument its sample, if the argument's first axis has the size of the batch."""
        rows = tensor.shape[0] if tensor.dim() else 0
        self.begin_with.add(rows)
        if rows not in (self.samples, self.samples * self.repeats) or not tensor.stride(0):
            return
        numbers = torch.arange(self.samples, device=tensor.device, dtype=self.dtype)
        numbers = numbers.repeat_interleave(rows // self.samples)
        sets = torch.stack([numbers, -numbers])
        self.write(tensor, sets.reshape(2, rows, *[1] * (tensor.dim() - 1)))

    def note_position_by_values(self) -> None:
        """Record that values of the batch decide the position of an element, as in a sort."""
        self.by_values = True

    def _shadow(self, tensor: Tensor) -> _Shadow | None:
        storage = _storage(tensor)
        shadow: _Shadow | None = None if storage is None else self._shadows.get(storage)
        return shadow

    def _new(self, tensor: Tensor) -> _Shadow:
        """Create the shadow of a tensor's storage."""
        storage = _storage(tensor)
        if storage is None:
            self._refuse(
                f"a tensor of type {type(tensor).__name__} and layout {tensor.layout} cannot be followed"
            )
        shadow = self._shadows[storage] = _Shadow()
        return shadow

    def _open(self, shadow: _Shadow, tensor: Tensor) -> None:
        """Allocate the shadow of a storage. A shadow of a large storage covers only what the tensor spans."""
        shadow.size = tensor.element_size()
        total = tensor.untyped_storage().nbytes() // shadow.size
        start = int(tensor.storage_offset())
        spanned = 1 + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if not tensor.numel():
            spanned = 0
        if total > 4 * spanned + 1024:
            shadow.start, total = start, spanned
        channels = 4 if self._presumed_at else 2
        shape = (channels, total)
        shadow.sets = torch.full(shape, self.empty, dtype=self.dtype, device=tensor.device)

    def _view(self, shadow: _Shadow, tensor: Tensor) -> Tensor:
        """Return the samples of a tensor, as a view of the shadow where element sizes allow."""
        sets, size = shadow.sets, tensor.element_size()
        assert sets is not None
        if self._presumed_at and len(sets) == 2:
            sets = shadow.sets = torch.cat([sets, torch.full_like(sets, self.empty)])
        if size < shadow.size:
            parts = shadow.size // size
            sets = shadow.sets = sets.repeat_interleave(parts, 1)
            shadow.start, shadow.size = shadow.start * parts, size
        parts = size // shadow.size
        total = tensor.untyped_storage().nbytes() // shadow.size
        shape, stride = list(tensor.shape), [step * parts for step in tensor.stride()]
        if parts > 1:
            shape, stride = [*shape, parts], [*stride, 1]
        first = tensor.storage_offset() * parts
        last = first + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if tensor.numel() and last >= total:
            self._refuse(f"a tensor of type {type(tensor).__name__} cannot be followed")
        if first < shadow.start or (tensor.numel() and last >= shadow.start + sets.shape[1]):
            pad = (shadow.start, max(0, total - shadow.start - sets.shape[1]))
            sets = torch.nn.functional.pad(sets, pad, value=self.empty)
            shadow.sets, shadow.start = sets, 0
        offset = first - shadow.start
        view = sets.as_strided((len(sets), *shape), (sets.stride(0), *stride), offset)
        return view.amin(-1) if parts > 1 else view

    # --- operators ------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and compute the samples of its results."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        inputs = list(operands_of((*args, *kwargs.values())))
        result = func(*args, **kwargs)
        try:
            self._note(func, args, kwargs, inputs, result)
        except BaseException as error:
            self.error = self.error or error
            raise
        return result

    def _note(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        result: Any,
    ) -> None:
        outs = list(operands_of(result if isinstance(result, list | tuple) else [result]))
        name = func.overloadpacket.__name__
        if not any((known := self._shadow(tensor)) and known.sets is not None for tensor in inputs):
            return
        schema = torch_private.schema_of(func)
        named = {argument.name: argument.default_value for argument in schema.arguments}
        named |= {
            argument.name: value for argument, value in zip(schema.arguments, args, strict=False)
        }
        named |= kwargs
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            self._note_scalar_read(inputs)
            return
        written = [
            tensor
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in operands_of(named[argument.name])
        ]
        into = {_key(tensor) for tensor in written}
        of = {_key(tensor) for tensor in inputs}
        rule = rule_of(func)
        views = [(key := _key(out)) in of and key not in into for out in outs]
        if (all(views) and not written) or torch.Tag.inplace_view in func.tags:
            return
        with torch.no_grad():
            try:
                result_sets = Operation(self, func, named, outs).results(rule)
            except ConfigError:
                raise
            except Exception:  # noqa: BLE001  the rule does not support this form of the operator
                result_sets = [self._union(inputs)] * len(outs)
            if written and not outs:
                outs, views = written, [False] * len(written)
                result_sets = [self._union(inputs)] * len(written)
            for out, view, sets in zip(outs, views, result_sets, strict=True):
                if not view:
                    self.write(out, self._settled(sets, str(func)))
            if rule is not batch_normalized:
                done = {_key(out) for out in outs}
                for tensor in written:
                    if _key(tensor) not in done:
                        self.write(tensor, self._settled(self._union(inputs), str(func)))

    def __enter__(self) -> Any:
        """Start tracking."""
        self._reads.__enter__()  # type: ignore[no-untyped-call]  # of torch
        return super().__enter__()  # type: ignore[no-untyped-call]  # of torch

    def __exit__(self, *error: Any) -> None:
        """Stop tracking."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # of torch
        self._reads.__exit__(*error)  # type: ignore[no-untyped-call]  # of torch

    def note_read(self, tensors: Sequence[Tensor]) -> None:
        """Record that code reads values without an operator, as ``tolist()`` and ``bool()`` do."""
        with torch_private.disable_dispatch_modes():
            if any(self.read(tensor) is not None for tensor in tensors):
                self.by_values = True

    def _union(self, tensors: Iterable[Tensor]) -> Tensor | None:
        known = [self.read(tensor) for tensor in tensors]
        return union(*(sets.reshape(len(sets), -1).amin(1) for sets in known if sets is not None))

    def _note_scalar_read(self, tensors: Sequence[Tensor]) -> None:
        """Record that code reads values of the batch as numbers, and may branch on them."""
        if all(self.read(tensor) is None for tensor in tensors):
            return
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").startswith(
            ("torch.", "lora_fx")
        ):
            frame = frame.f_back
        if frame is None or frame.f_globals.get("__name__") not in _ASK_OF_MASKS:
            self.by_values = True

    def _settled(self, sets: Tensor | None, name: str) -> Tensor | None:
        """Refuse a result in which a presumed sample meets other samples. Return the updated samples.

        An element with computed samples loses its presumed sample.
        """
        if sets is None:
            return None
        if not self.mixed_by and bool(_mixed(sets, self.empty).any()):
            self.mixed_by = name
        if len(sets) == 2:
            return sets
        low, high, taken, last = sets[0], -sets[1], sets[2], -sets[3]
        presumed, owned = sets[2] != self.empty, sets[0] != self.empty
        wrong = presumed & ((taken != last) | (owned & ((low != taken) | (high != taken))))
        if bool(wrong.any()):
            self._refuse(
                f"{self._presuming()}: its input has no samples of its own on the first axis (positions or "
                f"queries that all samples share), and its output meets other samples in {name}"
            )
        confirmed = presumed & owned
        return torch.cat([sets[:2], sets[2:].masked_fill(confirmed, self.empty)])

    # --- sites and results -----------------------------------------------------------------------------

    def check_site(self, x: Tensor, weight: str) -> None:
        """Raise if the rows of an activation are not those of the samples in their order.

        Args:
            x: Input of the branch of an adapter.
            weight: Name of the adapted weight in the module that is running.

        Raises:
            ConfigError: If the first axis of ``x`` does not have the samples in their order.
        """
        try:
            self._check_site(x, weight)
        except BaseException as error:
            self.error = self.error or error
            raise

    def _check_site(self, x: Tensor, weight: str) -> None:
        with torch_private.disable_dispatch_modes():
            sets = self.read(x)
            if not self._has_rows(x, sets):
                self._refuse(
                    f"{self._fqn(weight)}: an input of shape {tuple(x.shape)} {self._not_rows(sets)}"
                )
        self.folded = self.folded or not self._exact(x)

    def copy_rows(self, result: Tensor, x: Tensor) -> None:
        """Give each row of ``result`` the samples of the same row of ``x``. Both are [T, ...]."""
        with torch_private.disable_dispatch_modes(), torch.no_grad():
            sets = self.read(x)
            if sets is not None:
                by_row = sets.reshape(*sets.shape[:2], -1).amin(2)
                self.write(result, by_row.reshape(*by_row.shape, *[1] * (result.dim() - 1)))

    def has_rows(self, result: Tensor) -> bool:
        """Return True if each row of a result has one sample, and the samples are in order."""
        with torch_private.disable_dispatch_modes():
            return self._has_rows(result, self.read(result))

    def _exact(self, x: Tensor) -> bool:
        return x.shape[0] in (self.samples, self.samples * self.repeats)

    def _has_rows(self, x: Tensor, sets: Tensor | None) -> bool:
        """Return True if the rows of an activation have the samples in order. Rows may also have none."""
        if not x.dim() or not x.shape[0] or x.shape[0] % self.samples:
            return False
        if sets is None:
            return self._exact(x)
        by_row = self._by_sample(sets[:2])
        if len(sets) == 4:
            # Include samples that an earlier site has presumed.
            by_row = torch.minimum(by_row, self._by_sample(sets[2:]))
        numbers = torch.arange(self.samples, device=by_row.device, dtype=self.dtype)
        fits = (by_row[0] == numbers) & (by_row[1] == -numbers)
        return bool((fits | (by_row == self.empty).all(0)).all())

    def presume(self, total: Tensor, weight: str) -> None:
        """Give the rows of a site's output the samples in order: presumed samples if the input had none."""
        with torch_private.disable_dispatch_modes(), torch.no_grad():
            sets = self.read(total)
            numbers = torch.arange(self.samples, device=total.device, dtype=self.dtype)
            numbers = numbers.repeat_interleave(total.shape[0] // self.samples)
            rows = torch.stack([numbers, -numbers]).reshape(2, -1, *[1] * (total.dim() - 1))
            if sets is not None and bool((self._by_sample(sets[:2]) != self.empty).all()):
                # Elements that all samples share, such as class tokens, are among those of each sample.
                self.write(total, torch.minimum(sets[:2], rows))
                return
            if self.by_values:
                self._refuse(
                    f"{self._fqn(weight)}: its input has no samples on the first axis, or they were read as "
                    "numbers before, which cannot be followed"
                )
            self._presumed_at.append(self._fqn(weight))
            rows = rows.expand(2, *total.shape)
            none = torch.full_like(rows, self.empty)
            own = none if sets is None else sets[:2]
            taken = rows if sets is None else torch.where(sets[0] != self.empty, none, rows)
            self.write(total, torch.cat([own, taken]))

    def _by_sample(self, sets: Tensor) -> Tensor:
        """Return the union over the rows of each sample, [channels, samples], of ``sets`` by row."""
        return sets.reshape(len(sets), self.samples, -1).amin(2)

    def check_results(self, results: Any) -> None:
        """Raise if a result mixes samples, or has only presumed samples.

        A single number (a loss) and a matrix of all pairs of samples (similarities) may mix samples.

        Raises:
            ConfigError: If there is such a result.
        """
        if self.error is not None:
            raise self.error
        for out in results:
            sets = self.read(out)
            if sets is None:
                continue
            if bool((sets[2:] != self.empty).any()):
                self._refuse(
                    f"{self._presuming()}: its input has no samples of its own on the first axis "
                    "(positions or queries that all samples share), and nothing shows that the rows of "
                    f"its output are samples: a result of shape {tuple(out.shape)} has met none"
                )
            if out.numel() > 1 and bool(_mixed(sets, self.empty).any()) and not self._pairs(sets):
                self._refuse(
                    f"a result of shape {tuple(out.shape)} belongs to several samples at once{self._mixer()}"
                )

    def _pairs(self, sets: Tensor) -> bool:
        if sets.shape[1:] != (self.samples, self.samples):
            return False
        numbers = torch.arange(self.samples, device=sets.device, dtype=self.dtype)
        least = torch.minimum(numbers[:, None], numbers)
        most = torch.maximum(numbers[:, None], numbers)
        return torch.equal(sets[0], least) and torch.equal(sets[1], -most)

    def _mixer(self) -> str:
        return f" (first mixed by {self.mixed_by})" if self.mixed_by else ""

    def _not_rows(self, sets: Tensor | None) -> str:
        if sets is None:
            if not self.begin_with & {self.samples, self.samples * self.repeats}:
                sizes = " and ".join(map(str, sorted(self.begin_with - {0}))) or "nothing"
                return (
                    f"does not begin with the {self.samples} samples that adapter_ids names: the arguments "
                    f"of the call begin with {sizes}"
                )
            return (
                "does not begin with the samples of adapter_ids: it is the same for all of them, or its "
                "samples come from something that was not followed"
            )
        if bool(_mixed(sets, self.empty).any()):
            return f"has elements of several samples at once{self._mixer()}"
        where = [
            axis
            for axis in range(sets.dim() - 1)
            if not torch.equal(sets, sets.narrow(axis + 1, 0, 1).expand_as(sets))
        ]
        if where == [0]:
            return "has the samples on its first axis, but not one after the other"
        axes = " and ".join(map(str, where))
        position = f"on axis {axes}" if where else "on none of its axes: it belongs to one of them"
        return f"does not begin with the {self.samples} samples of adapter_ids: they lie {position}"

    def _presuming(self) -> str:
        return ", ".join(dict.fromkeys(self._presumed_at))

    def _fqn(self, weight: str) -> str:
        return caller(self.model, weight)

    def _refuse(self, reason: str) -> NoReturn:
        error = ConfigError(
            f"{reason}. adapter_ids needs the samples on the first axis of what an adapted operation reads, "
            "one after the other: give one adapter for each sample of this batch, or repeats=, where "
            "generate() repeats each sample (num_beams, num_return_sequences), or choose one adapter for the "
            "whole batch"
        )
        self.error = self.error or error
        raise error


def caller(model: nn.Module, weight: str) -> str:
    """Return the FQN of a weight for a message.

    ``weight`` is its name in the innermost running module of the model.
    """
    names = {id(module): name for name, module in model.named_modules()}
    frame: FrameType | None = sys._getframe(1)
    fqn: str | None = None
    while frame is not None and fqn is None:
        fqn = names.get(id(frame.f_locals.get("self")))
        frame = frame.f_back
    if fqn and weight.startswith(f"{fqn}."):
        return weight  # it is known by its FQN
    return ".".join(part for part in (fqn or "", weight) if part)


class _Reads(TorchFunctionMode):
    """Function mode that catches conversions of tensors to other types, which no operator shows."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self._follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and report reads of its arguments."""
        if getattr(func, "__name__", "") in _READS:
            self._follower.note_read(list(operands_of(args)))
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor, or None. It is one Python object while anything references it."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _key(tensor: Tensor) -> int:
    return id(_storage(tensor))


def _mixed(sets: Tensor, empty: int) -> Tensor:
    return (sets[0] != empty) & (sets[0] != -sets[1])
