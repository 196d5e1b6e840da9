"""Merge an adapter into the files of a model, one tensor at a time, without loading the model.

The model is built on the meta device to get names and shapes, and the adapter is loaded onto it. Each stored
tensor is then copied, or merged as by :func:`lora_fx.merge`. Memory holds two tensors at most.

Files are written into a folder next to the result, ``.NAME.merging``. A receipt in it lists the complete
files, with digests of their sources. If a merge was killed, the next call reads the receipt and continues.
The result gets its name when all files are written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import safetensors
import torch

from lora_fx.checkpoint import load_onto_empty
from lora_fx.converted_files import ConvertedFiles
from lora_fx.errors import CheckpointError, ConfigError, MergeError, some
from lora_fx.export.report import size_text
from lora_fx.export.staging import in_use, owned
from lora_fx.files import StoredHead, WeightFiles, flush, replacing
from lora_fx.ir import require_record
from lora_fx.kinds import base_change
from lora_fx.passes.merge import (
    KEPT_IN_FP32,
    Changes,
    MergedSite,
    MergeReport,
    Rounding,
    RoundingName,
    cast,
    changes_of,
    check_dtype,
    rounded_site,
    rows_of_report,
    warn_of_loss,
)
from lora_fx.passes.parameters import own_value, persistent_buffers
from lora_fx.progress import Progress, Tell, show_progress
from lora_fx.tools.models import check_adapter_path, check_model_name, load_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["COMPANIONS", "WholeModelError", "merge_files"]

_log = logging.getLogger("lora_fx")

COMPANIONS: Final = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "image_processor.json",
    "modules.json",
    "sentence_bert_config.json",
    "modeling_*.py",
    "configuration_*.py",
    "LICENSE*",
    "chat_template*",
    "*.model",
)
"""Patterns of the other files in a folder of transformers, which the merged model also needs."""

_SETTINGS = ("config.json", "generation_config.json")
_INDEX = "*.safetensors.index.json"
_OF_ADAPTERS = ("*.json", "*.safetensors", "*.bin")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes that a merged weight can have, by their names in safetensors."""

_SLICE = 1 << 24
"""Numbers that are cast at a time."""

_FORMAT = 1
"""Version of the written files. Increase it if the same inputs would give other files."""

_RECEIPT = "receipt.json"
_RESULT = "model"


class WholeModelError(MergeError):
    """The files cannot be merged one by one, but :func:`lora_fx.merge` can merge the model in memory.

    Attributes:
        reason: The message without the remedy, for a caller that loads the model itself.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason = reason


def merge_files(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: RoundingName = "nearest",
    seed: int = 0,
    measure: bool = False,
    force: bool = False,
    progress: Progress = False,
) -> MergeReport:
    """Merge an adapter into a folder of transformers, without loading the model.

    All bits of the tensors are the same as with :func:`lora_fx.merge`. Memory holds one tensor and the merged
    one. If the process is killed, the same call continues after the last complete file.

    Args:
        folder: A folder of transformers: ``config.json``, and safetensors in one file, or several files with
            an index. It is not changed.
        adapter: A folder of PEFT or lora_fx.
        out: The folder to write. It has the same files and names of weights as ``folder``. Settings and the
            files of the tokenizer are copied.
        dtype: The dtype of all floating-point tensors of the result, each rounded once. By default, each
            tensor keeps its dtype.
        rounding: The way in which weights are rounded, as for :func:`lora_fx.merge`. There are no inputs
            here: errors of ``"compensated"`` rounding add up to about zero along each row.
        seed: The seed of ``"stochastic"`` rounding.
        measure: True to compare every merged element with fp64 for the report. By default, a sample of each
            weight tells what share of the change is kept.
        force: True to replace a model in ``out``. Its other files stay.
        progress: True to show a progress bar (if tqdm is installed), or a function that is called with
            (done, total, name) before each tensor.

    Returns:
        The report, with a row for each merged weight.

    Raises:
        CheckpointError: If a file of the model or the adapter is missing or damaged, or the adapter belongs
            to another model.
        ConfigError: If a folder does not exist, or transformers cannot make the model.
        MergeError: If the model is quantized, the start of the adapter changed its weights, or ``folder``
            lacks a tensor to merge. :func:`lora_fx.merge` can then merge in memory. Also if ``out`` exists,
            another process writes it, the disk has no room for it, or a merged weight overflows.
    """
    source, adapter = Path(folder).expanduser(), Path(adapter).expanduser()
    target = Path(out).expanduser().resolve()
    check_dtype(dtype)
    how = Rounding.named(rounding, seed=seed)
    if source.is_file():
        raise ConfigError(f"{source} is a file: give a folder of transformers, with safetensors")
    check_model_name(f"hf:{source}")
    check_adapter_path(adapter)
    options = [str(dtype), rounding, seed, measure]
    stage = _Stage(source, target, _digest_of_inputs(source, adapter, options))
    if stage.is_placed():
        return stage.finish()
    _check_out(source, target, force=force)
    merge = _Merge(source, adapter, dtype, how, measure=measure)
    with _write_errors(target, stage.folder), stage.taken():
        pending = [file for file in merge.files if not stage.has(file)]
        stage.check_space(sum(merge.size(file) for file in pending))
        total = sum(map(len, merge.files.values()))
        done = total - sum(len(merge.files[file]) for file in pending)
        with show_progress(progress, "tensor") as tell:
            for file in pending:
                begin = functools.partial(_tell_from, tell, done, total)
                stage.add(file, functools.partial(merge.write, file, begin))
                done += len(merge.files[file])
        stage.complete(merge.settings(), merge.rows, merge.untied)
    if merge.untied:
        _log.warning("tied weights were untied by the merge: %s", ", ".join(merge.untied))
    return stage.finish()


def _tell_from(tell: Tell, start: int, total: int, done: int, name: str) -> None:
    tell(start + done, total, name)


def _check_out(folder: Path, out: Path, *, force: bool) -> None:
    """Raise if the output folder cannot be written: it is a file, the model itself, or not empty."""
    if out.exists() and not out.is_dir():
        raise MergeError(f"{out} is a file, and a model is a folder: give another name")
    if out.exists() and out.resolve() == folder.resolve():
        raise MergeError(f"{out} is the model that is merged: give another folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise MergeError(
            f"{out} exists and is not empty: give another name, or force=True to replace the model in it"
        )


@contextlib.contextmanager
def _write_errors(out: Path, stage: Path) -> Iterator[None]:
    """Turn an ``OSError`` in the context into a MergeError that names the output folder."""
    try:
        yield
    except OSError as error:
        raise MergeError(
            f"{out} cannot be written ({error}): give a place that is writable and has room. Complete files "
            f"are in {stage}, and the same call continues after them; or delete that folder"
        ) from error


# --- the tensors ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Output:
    """One tensor in a file of the result.

    Attributes:
        name: The name of the tensor in the file.
        source: The name of the model's stored tensor that it is computed from.
        change: FQN of the parameter whose change is added to it; empty if it is copied.
        head: The shape and dtype of the tensor.
    """

    name: str
    source: str
    change: str
    head: StoredHead


class _Merge:
    """The changes of an adapter, and the tensors of the merged files.

    Attributes:
        files: The tensors of each file of the result, in the order in which they are written.
        untied: FQNs of folded weights that were tied to another one before the merge, but not after it.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path,
        dtype: torch.dtype | None,
        rounding: Rounding,
        *,
        measure: bool,
    ) -> None:
        self._folder, self._adapter = folder, adapter
        self._dtype, self._rounding, self._measure = dtype, rounding, measure
        _check_dense(folder, adapter)
        WeightFiles(folder)  # raises for damaged files
        self._base = load_model(f"hf:{folder}", weights=False, adapter=adapter).model
        self._stored = ConvertedFiles(folder, self._base)
        self._give_dtypes()
        self._changes = self._load()
        self._parameter_of_part: dict[str, str] = {}  # by the name of the stored tensor
        self._parts: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.untied: tuple[str, ...] = ()
        self.files = self._planned()
        self._headers = {file: self._header(file) for file in self.files}

    def _give_dtypes(self) -> None:
        """Give the empty model's parameters and buffers the dtypes of the files, and mark them as loaded.

        Without the mark, a plan would warn that the head starts with random values.
        """
        heads = {
            name: head for stored in self._stored.heads.values() for name, head in stored.items()
        }
        for name, tensor in self._tensors():
            head = heads.get(next(iter(self._stored.parts(name)), ""))
            if head is not None and head.dtype in _DTYPES:
                tensor.data = torch.empty_like(tensor, dtype=_DTYPES[head.dtype])
                vars(tensor)["_is_hf_initialized"] = True

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters of the model by each of their names, and its persistent buffers."""
        yield from self._base.named_parameters(remove_duplicate=False)
        yield from persistent_buffers(self._base).items()

    def _load(self) -> Changes:
        """Load the adapter onto the empty model, with the biases that it changes. Return all changes."""
        adapted = load_onto_empty(self._base, self._adapter, self._read)
        record = require_record(adapted, MergeError)
        for name in record.active:
            for fqn in record.adapters[name].own:
                if own_value(adapted, name, fqn).is_meta:
                    setting = base_change(record.adapters[name].config)
                    self._refuse(f"{fqn}: the start of the adapter ({setting}) has changed it")
            for row in record.adapters[name].sites:
                if row.deploy is not None:
                    self._refuse(f"the adapter was trained for {row.deploy.format}")
                if row.site.bias is not None:
                    self._give_values(adapted, row.site.bias)
        return changes_of(adapted, self._dtype)

    def _read(self, name: str) -> torch.Tensor | None:
        """Return the values of a parameter from the files; None if the files do not have it."""
        return self._stored.tensor(*next((group for group in self._names if name in group), [name]))

    def _give_values(self, model: nn.Module, name: str) -> None:
        """Load the values of a parameter from the files, if it is still on the meta device."""
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module._parameters.get(leaf)
        if old is None or not old.is_meta:
            return
        values = self._read(name)
        if values is None:
            self._refuse(f"{self._folder} has no {name}")
        module._parameters[leaf] = torch.nn.Parameter(values, old.requires_grad)

    def _refuse(self, reason: str) -> NoReturn:
        raise WholeModelError(
            f"{reason}, so that its files cannot be merged one by one",
            "Load the model and merge it in memory: "
            f"lora_fx.merge(lora_fx.load_adapter(model, {str(self._adapter)!r}))",
        )

    def _planned(self) -> dict[Path, list[_Output]]:
        """Return the tensors of each file of the result: the stored ones, and weights that become untied."""
        changed, added = self._changes_by_source()
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors()}
        result: dict[Path, list[_Output]] = {}
        for file, heads in self._stored.heads.items():
            outputs = result[file] = []
            for source, head in heads.items():
                for name, change in [(source, changed.get(source, "")), *added.get(source, ())]:
                    fits = source in self._parameter_of_part or head.shape == shapes.get(change)
                    fits &= head.dtype in _DTYPES or change in self._changes.buffers
                    if change and not fits:
                        raise CheckpointError(
                            f"{source} in {file} is {list(head.shape)} in {head.dtype}, and the model has "
                            f"{list(shapes[change])} in floating point: give the folder of the model that "
                            "was trained"
                        )
                    outputs.append(_Output(name, source, change, self._head(name, head)))
            # A reader maps the file into memory, so numbers have to be aligned to their size. The parts of a
            # parameter follow each other, because it is merged as a whole.
            outputs.sort(
                key=lambda output: (
                    -output.head.bits,
                    self._parameter_of_part.get(output.source, ""),
                )
            )
        return result

    def _changes_by_source(self) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]]]:
        """Return the names of changes by stored tensor, and the tensors that have to be added to the files.

        A tied weight is stored once. If its names have different changes, each name needs a tensor. The added
        tensors are listed by the stored tensor that they come from, as pairs of name and change.
        """
        changed, names = self._changed(), self._names
        absent = changed.keys() - {name for group in names for name in group}
        if absent:
            self._refuse(f"{self._folder} has no {some(sorted(absent), 3)}")
        result: dict[str, str] = {}
        added: dict[str, list[tuple[str, str]]] = {}
        for group in names:
            changes = {name: changed.get(name, "") for name in group}
            if not any(changes.values()):
                continue
            stored = {
                name: key for name in group if (key := self._stored.stored_name(name)) is not None
            }
            if not stored:
                result |= dict.fromkeys(self._parts_of(group), changes[group[0]])
                continue
            result |= {key: changes[name] for name, key in stored.items()}
            if len({*changes.values()}) == 1:
                continue
            self.untied += tuple(name for name in group if name in self._changes.folds)
            tied, source = next(iter(stored.items()))
            # Names that stay tied to each other get a tensor each, because a loader may tie them to another.
            for name in (name for name in group if name not in stored):
                if source != tied:
                    self._refuse(
                        f"{name} is not tied to {tied} any more, and has no name in the files"
                    )
                added.setdefault(source, []).append((name, changes[name]))
        return result, added

    def _parts_of(self, group: Sequence[str]) -> tuple[str, ...]:
        """Return the stored tensors that together are one parameter of the model, and record them.

        This is for a parameter that the files have only in parts, such as the weights of single experts.
        """
        name = next((name for name in group if self._stored.parts(name)), None)
        if name is None or len(group) > 1:
            self._refuse(f"{self._folder} has no {group[0]}")
        parameter = self._base.get_parameter(name)
        try:
            parts = self._stored.parted(name, parameter.detach())
        except CheckpointError as error:
            self._refuse(str(error))
        self._parameter_of_part |= dict.fromkeys(parts, name)
        return tuple(parts)

    @functools.cached_property
    def _names(self) -> list[list[str]]:
        """The names of each parameter and buffer. A tied parameter has several."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._tensors():
            names.setdefault(id(tensor), []).append(name)
        return list(names.values())

    def _changed(self) -> dict[str, str]:
        """Map the name of each changed parameter or buffer to the key of its change.

        Names that stay tied have the same key.
        """
        changes = self._changes
        owners: dict[int, str] = {}
        result = {
            name: owners.setdefault(id(value), name) for name, value in changes.trained.items()
        }
        result |= {name: name for name in (*changes.biases, *changes.buffers, *changes.folds)}
        return result | dict(changes.tied)

    def _head(self, name: str, head: StoredHead) -> StoredHead:
        """Return the shape and the dtype that a stored tensor gets in the result."""
        if self._dtype is None or not self._is_cast(name, head):
            return head
        names = {dtype: name for name, dtype in _DTYPES.items()}
        return StoredHead(head.shape, names[self._dtype])

    def _is_cast(self, name: str, head: StoredHead) -> bool:
        return head.dtype in _DTYPES and name.rpartition(".")[2] not in KEPT_IN_FP32

    def _header(self, file: Path) -> bytes:
        """Return the bytes before the tensors in a file of the result, in the format of safetensors.

        The header is written here, because the library needs all tensors of a file in memory. A file has the
        length of the JSON as a 64-bit number, the JSON, and the tensors. See
        https://huggingface.co/docs/safetensors.
        """
        with safetensors.safe_open(file, "pt") as opened:
            entries: dict[str, Any] = {"__metadata__": opened.metadata() or {"format": "pt"}}
        start = 0
        for output in self.files[file]:
            shape, end = list(output.head.shape), start + output.head.nbytes
            entries[output.name] = {
                "dtype": output.head.dtype,
                "shape": shape,
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def size(self, file: Path) -> int:
        """Return the size of a file of the result in bytes."""
        return len(self._headers[file]) + sum(output.head.nbytes for output in self.files[file])

    def write(
        self, file: Path, tell: Callable[[int, str], None], path: Path
    ) -> dict[str, MergedSite]:
        """Write a file of the result, and return the rows of its folded weights, by FQN.

        Args:
            file: The file of the model.
            tell: Called with the number of written tensors, and a name, before each tensor.
            path: The file to write.
        """
        rows: dict[str, MergedSite] = {}
        self._parts = ("", {})
        with path.open("wb") as opened:
            opened.write(self._headers[file])
            for done, output in enumerate(self.files[file]):
                tell(done, output.name)
                values = self._values(output, rows).contiguous().reshape(-1)
                dtype = _DTYPES.get(output.head.dtype, values.dtype)
                for part in torch.split(values, _SLICE):
                    part = part if part.dtype is dtype else cast(part, dtype, output.name)
                    content: Any = part.view(torch.uint8).numpy()
                    opened.write(memoryview(content))
        return rows

    def _values(self, output: _Output, rows: dict[str, MergedSite]) -> torch.Tensor:
        """Return the values of a tensor of the result. Store a merged weight's row of the report in ``rows``.

        A tensor that is not merged still has the dtype of the model's file.
        """
        whole = self._parameter_of_part.get(output.source)
        if whole is None:
            return self._merged(output, self._stored.stored(output.source), rows)
        if whole != self._parts[0]:
            self._parts = ("", {})  # frees the memory
            old = self._stored.tensor(whole)
            assert old is not None
            self._parts = whole, self._stored.parted(whole, self._merged(output, old, rows))
        return self._parts[1][output.source]

    def _merged(
        self, output: _Output, old: torch.Tensor, rows: dict[str, MergedSite]
    ) -> torch.Tensor:
        """Return the values of a stored tensor or of a whole parameter, with the adapter's change."""
        name, changes = output.change, self._changes
        if name in changes.biases:
            return changes.biases[name]
        full = changes.trained.get(name, changes.buffers.get(name))
        base = old if full is None else full.detach().to(old.dtype)
        if name not in changes.folds:
            return base
        fold, dtype = changes.folds[name], _DTYPES[output.head.dtype]
        merged, rows[name] = rounded_site(fold, base, dtype, self._rounding, measure=self._measure)
        return merged

    def rows(self, rows: Mapping[str, MergedSite]) -> tuple[MergedSite, ...]:
        """Return the rows of the merge report, in which weights that are still tied have the same numbers."""
        return rows_of_report(self._changes.folds, self._changes.tied, rows)

    def settings(self) -> dict[str, str]:
        """Return the texts of the configuration and of the index, by the names of their files."""
        config = _read_json(self._folder / "config.json")
        if self._dtype is not None:
            _set_dtype(config, str(self._dtype).removeprefix("torch."))
        if self._ends_differ():
            config["tie_word_embeddings"] = False
        result = {"config.json": _text(config)}
        if self._stored.index is not None:
            index = _read_json(self._stored.index)
            outputs = [(output, file) for file, stored in self.files.items() for output in stored]
            index["weight_map"] = {output.name: file.name for output, file in outputs}
            metadata = index.setdefault("metadata", {})
            metadata["total_size"] = sum(output.head.nbytes for output, _ in outputs)
            if "total_parameters" in metadata:
                added = (output.head for output, _ in outputs if output.name != output.source)
                metadata["total_parameters"] += sum(math.prod(head.shape) for head in added)
            result[self._stored.index.name] = _text(index)
        return result

    def _ends_differ(self) -> bool:
        """Return True if the input embedding and the head were tied, and become different weights.

        The configuration then has to say so.
        """
        if not getattr(getattr(self._base, "config", None), "tie_word_embeddings", False):
            return False
        ends: list[Any] = [
            getattr(self._base, f"get_{side}_embeddings", lambda: None)()
            for side in ("input", "output")
        ]
        first, last = (getattr(end, "weight", None) for end in ends)
        changed = self._changed()
        changes = {
            changed.get(f"{name}.weight", "")
            for name, module in self._base.named_modules()
            if any(module is end for end in ends)
        }
        return first is not None and first is last and len(changes) > 1


def _check_dense(folder: Path, adapter: Path) -> None:
    """Raise if the model in a folder is quantized, because its files cannot be merged one by one."""
    path = folder / "config.json"
    settings = _read_json(path).get("quantization_config") if path.is_file() else None
    if settings is None:
        return
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    raise WholeModelError(
        f"{folder} is quantized ({method}), and files of quantized weights are not merged one by one",
        "Give the folder that it was quantized from; or load the model and merge it in memory, which can "
        f"also quantize again: lora_fx.merge(lora_fx.load_adapter(model, {str(adapter)!r}), requantize=True)",
    )


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Set the dtype in a model's configuration, and in the configurations of its parts."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in keys or ["dtype"]:
        config[key] = name
    for value in config.values():
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys():
            _set_dtype(value, name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again")
    return value


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


# --- the files ------------------------------------------------------------------------------------


class _Stage:
    """The folder in which a result is written, ``.NAME.merging`` next to it.

    Attributes:
        folder: Its path.
    """

    def __init__(self, source: Path, target: Path, key: str) -> None:
        """Read the receipt of an earlier merge that was interrupted, if its inputs were the same.

        Args:
            source: The folder of the model.
            target: The folder of the result.
            key: The digest of the inputs and options. A receipt with another digest is ignored.
        """
        self._source, self._target = source, target
        self.folder = target.with_name(f".{target.name}.merging")
        self._result = self.folder / _RESULT
        new: dict[str, Any] = {"key": key, "files": {}}
        try:
            receipt = json.loads((self.folder / _RECEIPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            receipt = new
        self._receipt = receipt if receipt.get("key") == key else new

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Create the staging folder, or take over that of a merge that was killed, while the context is open.

        Raises:
            MergeError: If another process writes into the folder.
        """
        if in_use(self.folder):
            raise MergeError(
                f"another process is merging into {self._target}: wait for it, or give another name"
            )
        missing = [parent for parent in self.folder.parents if not parent.exists()]
        self._result.mkdir(parents=True, exist_ok=True)
        try:
            with owned(self.folder):
                for path in self._result.iterdir():
                    if path.name not in self._receipt["files"]:
                        path.unlink()
                yield
        except MergeError:
            # This error would occur again, unlike an interruption or a full disk. So delete the files.
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in missing:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            raise

    def has(self, file: Path) -> bool:
        """Return True if the merged version of a file of the model is complete already."""
        entry, written = self._receipt["files"].get(file.name), self._result / file.name
        return (
            entry is not None
            and written.is_file()
            and written.stat().st_size == entry["size"]
            and _digest(file) == entry["source"]
        )

    def check_space(self, size: int) -> None:
        """Raise if the disk has no room for a number of bytes.

        Raises:
            OSError: If there is no room. The message has both sizes.
        """
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise OSError(
                errno.ENOSPC, f"it takes {size_text(size)}, and the disk has {size_text(free)} left"
            )

    def add(self, file: Path, write: Callable[[Path], dict[str, MergedSite]]) -> None:
        """Write a merged file into the staging folder, and note it in the receipt.

        Args:
            file: The file of the model.
            write: Function that writes the file to a path, and returns the file's rows of the report.
        """
        source, written = _digest(file), self._result / file.name
        with replacing(written) as new:
            rows = write(new)
            flush(new)
        self._receipt["files"][file.name] = {
            "source": source,
            "size": written.stat().st_size,
            "rows": {name: dataclasses.asdict(row) for name, row in rows.items()},
        }
        self._save()

    def complete(
        self,
        settings: Mapping[str, str],
        rows: Callable[[Mapping[str, MergedSite]], Sequence[MergedSite]],
        untied: Sequence[str],
    ) -> None:
        """Write the files without weights, and note the report in the receipt.

        Args:
            settings: Texts of files, by name.
            rows: Function that returns the rows of the report, from the rows of all files.
            untied: Weights that are not tied any more.
        """
        for path in _companions(self._source):
            if path.name not in settings:
                shutil.copyfile(path, self._result / path.name)
                flush(self._result / path.name)
        for name, text in settings.items():
            (self._result / name).write_text(text, encoding="utf-8")
            flush(self._result / name)
        _flush_folder(self._result)
        of_files = (entry["rows"] for entry in self._receipt["files"].values())
        every = {name: _row(row) for entry in of_files for name, row in entry.items()}
        self._receipt["report"] = {
            "sites": [dataclasses.asdict(row) for row in rows(every)],
            "untied": list(untied),
        }
        self._save()

    def is_placed(self) -> bool:
        """Return True if an earlier call put the result into place, but was killed before it cleaned up."""
        return "report" in self._receipt and self._target.exists() and not self._result.exists()

    def finish(self) -> MergeReport:
        """Move the result to its place, delete the staging folder, and return the report."""
        with _write_errors(self._target, self.folder):
            replaced = self.folder / "replaced"
            if self._result.exists():
                if self._target.exists():
                    self._target.replace(replaced)
                self._result.replace(self._target)
                _flush_folder(self._target.parent)
            if replaced.exists():
                for path in replaced.iterdir():
                    new = self._target / path.name
                    if not new.exists() and not path.name.endswith(_WEIGHTS):
                        path.replace(new)
            shutil.rmtree(self.folder)
        values = self._receipt["report"]
        report = MergeReport(tuple(map(_row, values["sites"])), tuple(values["untied"]))
        warn_of_loss(report)
        return report

    def _save(self) -> None:
        with replacing(self.folder / _RECEIPT) as new:
            new.write_text(json.dumps(self._receipt), encoding="utf-8")
            flush(new)


_WEIGHTS = (".safetensors", ".safetensors.index.json")


def _row(values: Mapping[str, Any]) -> MergedSite:
    # Rows are compared as tuples, in which only the same NaN object equals itself.
    same: dict[str, Any] = {
        key: math.nan if value != value else value for key, value in values.items()
    }
    same["adapters"] = tuple(values["adapters"])
    return MergedSite(**same)


def _flush_folder(path: Path) -> None:
    # Windows cannot open folders, and some network file systems cannot flush them.
    with contextlib.suppress(OSError):
        flush(path)


def _companions(folder: Path) -> list[Path]:
    """Return the files of a model's folder that a merge copies: settings and the tokenizer."""
    return _matching(folder, (*_SETTINGS, *COMPANIONS))


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(paths)


def _digest_of_inputs(folder: Path, adapter: Path, options: Sequence[object]) -> str:
    """Return a digest of all inputs and options of a merge, except the weights of the model.

    A merge that was killed is continued only if the digest is the same.
    """
    files = [adapter] if adapter.is_file() else _matching(adapter, _OF_ADAPTERS)
    files += [*_companions(folder), *_matching(folder, (_INDEX,))]
    inputs = [_FORMAT, *options, [(path.name, _digest(path)) for path in files]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
