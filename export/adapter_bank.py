"""The adapters of a session whose file has a bank: each row of a batch runs with its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import CheckpointError, ConfigError, ExportError, some
from lora_fx.export.adapter_manifest import SLOTS_INPUT, check_values, ranks_of
from lora_fx.export.adapter_store import AdapterChoice, AdapterStore, HeldAdapter
from lora_fx.export.bank_model import check_ranks, put

__all__ = ["AdapterBank"]


@dataclass(eq=False)
class AdapterBank(AdapterStore):
    """Adapters by name, in one stack for each factor. Threads may use, load and unload them at once.

    A stack is never written after it was handed out: an adapter that is loaded or unloaded makes new ones,
    and runs that have begun end with what they have. Until then the stacks of the file are used.

    Args:
        path: The file, whose adapters are in the bank from the start.
    """

    path: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        bank = self.manifest.bank
        assert bank is not None
        self._size = bank
        self._names = {name: slot for slot, name in enumerate(bank.adapters, start=1)}
        self._banks: Mapping[str, Tensor] | None = None
        self._bound: Mapping[str, Any] = {}
        self._ranks: dict[str, Mapping[str, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._names)

    def load(self, name: str, values: Mapping[str, Tensor], what: str) -> None:
        """Put an adapter into the bank. It replaces one of the same name.

        Raises:
            CheckpointError: The values are no adapter of the file, or do not fit into its bank. What was
                there still is.
            ConfigError: The name is none, or the bank is full.
        """
        given: object = name
        if not isinstance(given, str) or not given:
            raise ConfigError(f"the name of an adapter is {name!r}: give a text")
        check_values(self.manifest, values, what)
        check_ranks(self.manifest, values, what, self.max_rank)
        with self._lock:
            others = {key: slot for key, slot in self._names.items() if key != name}
            if len(others) >= self._size.capacity:
                raise ConfigError(
                    f"the bank of {self.file} is full, it has {some(list(map(repr, others)))}: unload one "
                    f"(unload_adapter), or export the model again with max_adapters above "
                    f"{self._size.capacity}"
                )
            free = next(n for n in range(1, len(others) + 2) if n not in others.values())
            self._write(free, values, {**others, name: free})
            self._ranks[name] = ranks_of(self.manifest, values)

    def unload(self, name: str) -> None:
        """Take an adapter out of the bank. A run that uses it ends with it.

        Raises:
            ConfigError: There is no such adapter.
        """
        with self._lock:
            slot = self._slot(name)
            others = {key: one for key, one in self._names.items() if key != name}
            self._write(slot, {}, others)
            self._ranks.pop(name, None)

    def chosen(self, choice: AdapterChoice | HeldAdapter) -> HeldAdapter:
        """The adapters to run with. What is held is returned as it is, also after others were loaded.

        Args:
            choice: A name or None for all rows, or a list with one for each row.

        Raises:
            ConfigError: There is no such adapter, or it is a weighted sum.
        """
        if isinstance(choice, HeldAdapter):
            return choice
        if isinstance(choice, Mapping):
            raise ConfigError(
                f"{self.file} has a bank, whose adapters run by name: add {some(list(map(repr, choice)))} up "
                "in the model (add_weighted_adapter) and load the sum"
            )
        several = isinstance(choice, Sequence) and not isinstance(choice, str)
        rows = list(choice) if several and choice is not None else [choice]
        if not rows:
            raise ConfigError("adapter is an empty list: give a name, or None, for each row")
        with self._lock:
            ids = torch.tensor([self._slot(one) - 1 for one in rows])
            bound = self._bound
        fed = self._placed({SLOTS_INPUT: ids})
        return HeldAdapter({}, {**bound, **fed}, {}, len(rows) if several else None)

    def _slot(self, name: object) -> int:
        if name is None:
            return 0
        if not isinstance(name, str) or name not in self._names:
            has = ", ".join(map(repr, self._names)) or "none"
            raise ConfigError(
                f"there is no adapter {name!r}: the bank of {self.file} has {has}; load_adapter(name, file) "
                "adds one"
            )
        return self._names[name]

    def _write(self, slot: int, values: Mapping[str, Tensor], names: dict[str, int]) -> None:
        """Make new stacks with something else in a slot."""
        count = 1 + max(names.values(), default=0)
        before = self._file_banks() if self._banks is None else self._banks
        banks = {}
        for one in self.manifest.inputs.values():
            old = before[one.name]
            new = torch.full((count, *old.shape[1:]), one.neutral, dtype=old.dtype)
            kept = min(count, len(old))
            new[:kept] = old[:kept]
            if slot < count:
                put(new[slot], one, values.get(one.name))
            banks[one.name] = new
        self._bound = self._placed(banks)
        self._banks, self._names = banks, names

    def _file_banks(self) -> dict[str, Tensor]:
        """The stacks in the file, which ONNX Runtime does not give out.

        Raises:
            ExportError: onnx is not installed, or the file is gone.
        """
        assert self.path is not None
        try:
            import onnx
            from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
        except ImportError as error:
            raise ExportError(
                f"the adapters in {self.file} are read with onnx ({error}): pip install onnx"
            ) from error
        try:
            proto = onnx.load(str(self.path), load_external_data=False)
            wanted = self.manifest.inputs
            found = {}
            for tensor in proto.graph.initializer:
                if tensor.name in wanted:
                    if uses_external_data(tensor):
                        load_external_data_for_tensor(tensor, str(self.path.parent))
                    found[tensor.name] = _read(tensor)
        except Exception as error:
            raise ExportError(
                f"{self.path} cannot be read again: were its files moved or changed while the session was "
                f"open? {error}"
            ) from error
        lost = [name for name in wanted if name not in found]
        if lost:
            raise CheckpointError(
                f"{self.file} lacks {some(lost)}: a tool took them for constants. Export the model again"
            )
        return found


def _read(tensor: Any) -> Tensor:
    import onnx_ir as ir

    value = ir.from_proto(tensor)
    if value.dtype == ir.DataType.BFLOAT16:
        return torch.frombuffer(bytearray(value.tobytes()), dtype=torch.bfloat16).view(
            *value.shape.numpy()
        )
    return torch.from_numpy(value.numpy().copy())
