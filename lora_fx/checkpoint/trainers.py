"""Checkpoints of trainers: ``save_pretrained`` of a rewritten model, and callbacks that write folders.

The class of a callback subclasses the callback class of the library. It is created on first use, so that the
library is not imported earlier.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import nn

from lora_fx import torch_private
from lora_fx.adapters import origin_of
from lora_fx.checkpoint.files import check_format, write_folder
from lora_fx.checkpoint.folder import folder_of, save_adapter
from lora_fx.checkpoint.keys import PREFIX
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, some
from lora_fx.extras import load_optional
from lora_fx.files import replacing_files
from lora_fx.ir import Record, join, record_of, require_record
from lora_fx.passes.graph import memory_of
from lora_fx.passes.merge import stripped
from lora_fx.passes.parameters import (
    changed_buffers,
    factors_of,
    in_adapter,
    is_partitioned,
    is_sharded,
    trained_by_hand,
    whole_shape,
    without_wrappers,
)
from lora_fx.runtime import watch
from lora_fx.runtime.modules import AdapterModule

__all__ = [
    "ADAPTER_FOLDER",
    "BASE_FOLDER",
    "callback_class",
    "ignores_base",
    "left_out_of_checkpoints",
    "lightning_callback",
    "rewritten_models",
    "save_peft_folder",
    "saves_adapter",
    "trainer_callback",
    "warns_of_reference",
]

# --- save_pretrained ------------------------------------------------------------------------------
# ``save_pretrained`` of a rewritten model, and thereby the checkpoints of transformers' Trainer.
#
# It writes the adapter folder, as PEFT's ``save_pretrained`` does. ``from_pretrained`` of
# transformers finds the base by ``base_model_name_or_path``, and recognizes the folder as an
# adapter only if it has no ``config.json``. The Trainer resumes only from ``model.safetensors``, so
# this file is written as well, with just the trained tensors.


_log = logging.getLogger("lora_fx")

BASE_FOLDER = "base"
"""Subfolder of an adapter's folder with the base, if the base has no known source."""

ADAPTER_FOLDER = "adapter"
"""Subfolder of a model's folder with the adapter, if the model's library does not look for adapters."""

# Attribute of transformers' models: names that are left out of their files.
_IGNORED = "_keys_to_ignore_on_save"
_CONFIG = "config.json"
_CARD = "README.md"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_NAMING = (
    *("target_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern"),
    "trainable_token_indices",
)


@dataclasses.dataclass(frozen=True)
class _ModuleInRoot:
    """A module on which a trainer calls ``save_pretrained``: a rewritten model, or a module in one.

    Attributes:
        root: The rewritten model.
        record: The record of the root.
        module: The module to save.
        prefix: The prefix of the module's names in the root.
    """

    root: nn.Module
    record: Record
    module: nn.Module
    prefix: str

    def inside(self, name: str) -> str:
        """Convert a name in the rewritten model to the name in the saved module.

        Raises:
            ConfigError: If the name is not in the module.
        """
        if not name.startswith(self.prefix):
            raise ConfigError(
                f"{type(self.module).__name__} is saved by itself, and the adapter has {name} beside it: "
                "save the adapter with lora_fx.save_adapter, or merge it before the model is saved"
            )
        return name.removeprefix(self.prefix)


def _module_in_root(module: nn.Module) -> _ModuleInRoot | None:
    """Return the place of a module in its rewritten model; None if the module has no adapters."""
    record = record_of(module)
    if record is not None:
        return _ModuleInRoot(module, record, module, "")
    if not any(isinstance(child, AdapterModule) for child in module.modules()):
        return None
    root = watch.root_of(module)
    record = record_of(root)
    names = [] if root is None else [n for n, child in root.named_modules() if child is module]
    if root is None or record is None or not names:
        raise ConfigError(
            f"the rewritten model that this {type(module).__name__} is in is not known: call the model once "
            "before it is saved, or save the adapter with lora_fx.save_adapter"
        )
    return _ModuleInRoot(root, record, module, f"{names[0]}.")


def left_out_of_checkpoints(model: nn.Module, record: Record) -> frozenset[str]:
    """Return the names in a rewritten model's state dict that no checkpoint needs: frozen or duplicates.

    Args:
        model: A rewritten model.
        record: The record of the model.
    """
    by_hand = trained_by_hand(model, record)
    own = {name for adapter in record.adapters.values() for name in adapter.own}
    kept = {name for name, _ in changed_buffers(model, record)}
    kept |= {name for name, _ in model.named_buffers() if name in own or in_adapter(model, name)}
    seen: set[object] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trained = parameter.requires_grad or name in by_hand or name in own
        # The storage of a sharded parameter is that of its local shard.
        memory = id(parameter) if type(parameter) is not nn.Parameter else memory_of(parameter)
        if (trained or in_adapter(model, name)) and memory not in seen:
            seen.add(memory)
            kept.add(name)
    return frozenset(model.state_dict().keys() - kept)


def ignores_base(before: Any) -> property:
    """Return a property for the class attribute with the names that transformers leaves out when saving."""

    def get(self: nn.Module) -> Any:
        part = _module_in_root(self)
        if part is None:
            return vars(self).get(_IGNORED, before)
        with without_wrappers(part.root) as root:
            names = left_out_of_checkpoints(root, part.record)
        return {part.inside(name) for name in names if name.startswith(part.prefix)}

    def put(self: nn.Module, value: Any) -> None:
        vars(self)[_IGNORED] = value

    return property(get, put)


def saves_adapter(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``save_pretrained`` so that it writes the adapters of a rewritten model."""

    @functools.wraps(method)
    def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        part = _module_in_root(self)
        if part is None:
            return method(self, save_directory, *args, **kwargs)
        if kwargs.get("state_dict") == {} and any(map(is_partitioned, self.parameters())):
            # The Trainer passes an empty state_dict if it does not gather ZeRO-3's parts. It then resumes
            # from DeepSpeed's checkpoint.
            _log.warning(
                "%s gets no adapter: ZeRO-3 has its parts, and the state_dict is empty. Set "
                "stage3_gather_16bit_weights_on_model_save in DeepSpeed's configuration, or give the Trainer "
                "lora_fx.trainer_callback(folder), which gathers the adapters alone",
                save_directory,
            )
            return method(self, save_directory, *args, **kwargs)
        return _save(method, part, Path(save_directory), args, kwargs)

    return save_pretrained


def warns_of_reference(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``add_model_tags`` so that it warns of a reference model without the adapter.

    TRL's trainers call it once they have their reference. For a model that is no ``PeftModel`` they load the
    base again by its name, without the adapter that was already trained.
    """

    @functools.wraps(method)
    def add_model_tags(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        reference = getattr(sys._getframe(1).f_locals.get("self"), "ref_model", None)
        if isinstance(reference, nn.Module) and _is_base_alone(reference, self):
            _log.warning(
                "the reference of this trainer is a %s without the adapter that the model begins with: give "
                "the trainer lora_fx.as_peft_model(model), or ref_model=lora_fx.reference(model)",
                type(reference).__name__,
            )
        return method(self, *args, **kwargs)

    return add_model_tags


def _is_base_alone(reference: nn.Module, model: nn.Module) -> bool:
    """Return True if a reference has no adapters, but those of the model change its outputs."""
    record = record_of(model)
    if record is None or any(isinstance(module, AdapterModule) for module in reference.modules()):
        return False
    rows = [(row, name) for name in record.active for row in record.adapters[name].sites]
    with without_wrappers(model) as inner:
        factors = (factors_of(inner, row, name) for row, name in rows)
        return any(bool(site.b.any()) for site in factors if site.names.b)


def _save(
    method: Callable[..., Any],
    part: _ModuleInRoot,
    folder: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    model = part.module
    bound = inspect.signature(method).bind(model, str(folder), *args, **kwargs)
    arguments = bound.arguments
    folder_key = list(arguments)[1]
    origin = origin_of(model)
    _check_target(folder, origin, arguments)
    options = inspect.signature(method).parameters
    # A model of sentence-transformers has the attribute as well, but its child models save themselves.
    transformers = hasattr(type(model), _IGNORED) and "state_dict" in options
    if transformers and "save_original_format" in options:
        # Keep the names of the model, because a checkpoint is loaded by them.
        arguments["save_original_format"] = False
    # A copy, because transformers removes the entries that it writes.
    state = dict(arguments.get("state_dict") or {})
    _check_gathered(model, state)
    if not arguments.get("is_main_process", True):
        return method(*bound.args, **bound.kwargs)
    # Child models write their own folders.
    above = not transformers and any(hasattr(type(child), _IGNORED) for child in model.modules())
    if above:
        result = method(*bound.args, **bound.kwargs)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        check_format(folder)
        with replacing_files(folder) as staged:
            arguments[folder_key] = str(staged)
            with _without_quantizer(model):
                result = method(*bound.args, **bound.kwargs)
            if transformers:
                (staged / _CONFIG).unlink(missing_ok=True)
                origin = origin or _save_base(part, folder, staged)
            new = {path.name for path in staged.iterdir()}
            # In the same move, so that a killed process leaves no mix of two saves.
            with without_wrappers(part.root), _values(part, state):
                _save_adapters(part, staged / ("" if transformers else ADAPTER_FOLDER), origin)
            if transformers:
                _write_card(folder, staged, origin)
        if transformers:
            _remove_older(folder, new)
        else:
            _log.warning(
                "%s: from_pretrained of %s loads the base alone: lora_fx.load_adapter(model, %r) puts the "
                "adapters in",
                folder,
                type(model).__name__,
                str(folder / ADAPTER_FOLDER),
            )
    return result


@contextmanager
def _without_quantizer(model: nn.Module) -> Iterator[None]:
    """Hide the quantizer of transformers within the context.

    The quantizer may write the whole base under other names.
    """
    quantizer = model.__dict__.pop("hf_quantizer", None)
    try:
        yield
    finally:
        if quantizer is not None:
            model.__dict__["hf_quantizer"] = quantizer


def _write_card(folder: Path, staged: Path, origin: str | None) -> None:
    """Write a model card with the metadata of PEFT for hubs and viewers, if the folder has no card."""
    if (folder / _CARD).exists():
        return
    base = f"base_model: {json.dumps(origin)}\n" if origin else ""
    adapter = f"- base_model:adapter:{origin}\n" if origin else ""
    text = (
        f"---\n{base}library_name: peft\ntags:\n{adapter}- lora\n- lora-fx\n---\n\n"
        "# A LoRA adapter\n\nWritten by lora-fx in the format of PEFT.\n"
    )
    (staged / _CARD).write_text(text, encoding="utf-8")


def _check_target(folder: Path, origin: str | None, arguments: Mapping[str, Any]) -> None:
    """Raise if saving to this folder would lose the base or the adapters.

    Raises:
        ConfigError: If the folder is to be pushed, or the base was loaded from it.
    """
    if arguments.get("push_to_hub"):
        raise ConfigError(
            "push_to_hub=True: the adapter folder of a rewritten model is not pushed by save_pretrained: "
            "save it without, and upload the folder"
        )
    if origin and Path(origin).exists() and folder.resolve() == Path(origin).resolve():
        raise ConfigError(
            f"{folder} is where the base was loaded from, and its weights would be replaced by those that "
            "are trained: give another folder"
        )


def _remove_older(folder: Path, new: Collection[str]) -> None:
    """Remove weights of an earlier model in the folder. A loader would read them as parts of this model."""
    for path in folder.iterdir():
        if path.name == _CONFIG or (_WEIGHTS.fullmatch(path.name) and path.name not in new):
            path.unlink()


def save_peft_folder(
    model: nn.Module,
    folder: Path,
    names: Collection[str],
    origin: str | None,
    values: Mapping[str, Any],
    said: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write adapters as PEFT's ``save_pretrained`` does, all of them or none.

    Args:
        model: A rewritten model.
        folder: The folder of the adapter "default". Other adapters get subfolders of their names.
        names: The adapters to write.
        origin: The source of the base.
        values: The values of sharded parameters, by their names in the model.
        said: Fields of the written configuration, by the name of the adapter.

    Raises:
        ConfigError: If a named adapter does not exist.
        CheckpointError: If the folder holds an adapter of another format, or cannot be written.
    """
    with without_wrappers(model) as inner:
        part = _ModuleInRoot(inner, require_record(inner), inner, "")
        for name in names:
            if name not in part.record.adapters:
                raise ConfigError(
                    f"there is no adapter {name!r}: the model has {some(list(part.record.adapters))}"
                )
        folder.mkdir(parents=True, exist_ok=True)
        check_format(folder)
        with replacing_files(folder) as staged, _values(part, values):
            _save_adapters(part, staged, origin, names, said)
            _write_card(folder, staged, origin)


def _save_adapters(
    part: _ModuleInRoot,
    folder: Path,
    origin: str | None,
    names: Collection[str] | None = None,
    said: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    for name in part.record.adapters if names is None else names:
        entry = part.record.adapters[name]
        tensors, config, notes = folder_of(part.root, entry, name)
        if part.prefix:
            tensors = {part.inside(key): value for key, value in tensors.items()}
            config = _inside(part, config)
        if not config.base_model_name_or_path or part.prefix:
            config = dataclasses.replace(config, base_model_name_or_path=origin)
        config = dataclasses.replace(config, **said.get(name, {}))
        target = folder if name == "default" else folder / name
        values = {PREFIX + key: value for key, value in tensors.items()}
        write_folder(target, values, config, notes=notes, force=True)


def _inside(part: _ModuleInRoot, config: LoraConfig) -> LoraConfig:
    """Translate a written configuration, which has full names of sites, to the names in the saved module."""

    def names(value: Any) -> Any:
        if isinstance(value, str):  # an expression
            return value.replace(re.escape(part.prefix), "")
        if isinstance(value, Mapping):
            return {
                key.replace(re.escape(part.prefix), "")
                if key.startswith("^")
                else part.inside(key): entry
                for key, entry in value.items()
            }
        return None if value is None else tuple(map(part.inside, value))

    return dataclasses.replace(
        config, **{field: names(getattr(config, field)) for field in _NAMING}
    )


def _check_gathered(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if ZeRO-3 has partitioned a parameter and its values are missing: an empty tensor would be saved.

    Raises:
        ConfigError: If a trained parameter has no values. The message names the first.
    """
    for name, parameter in model.named_parameters():
        whole = getattr(state.get(name), "shape", None) == whole_shape(parameter)
        if is_partitioned(parameter) and parameter.requires_grad and not whole:
            raise ConfigError(
                f"{name} is partitioned by ZeRO-3, and save_pretrained would write it empty: call "
                "lora_fx.save_adapter on every rank, which gathers it, or give a state_dict with all values "
                "(stage3_gather_16bit_weights_on_model_save in DeepSpeed's configuration)"
            )


def _save_base(part: _ModuleInRoot, folder: Path, staged: Path) -> str | None:
    """Save the base in a subfolder, for a model whose base has no known source.

    Returns:
        The path of the saved base; None if the base is sharded and not saved.
    """
    if any(map(_is_in_parts, part.root.parameters())):
        _log.warning(
            "%s: the base has no name_or_path, and is sharded: it is not saved. Save it before training, "
            "and set model.name_or_path to where it is",
            folder,
        )
        return None
    base: Any = stripped(part.root, part.record).get_submodule(part.prefix.removesuffix("."))
    target = folder / BASE_FOLDER
    base.save_pretrained(staged / BASE_FOLDER)
    _log.warning(
        "%s: the base has no name_or_path, so that it is saved as well, in %s. Load the base with "
        "from_pretrained, or set model.name_or_path, to have checkpoints of the adapters alone",
        folder,
        target,
    )
    return str(target.resolve())


@contextmanager
def _values(part: _ModuleInRoot, state: Mapping[str, Any]) -> Iterator[None]:
    """Put the values of a state dict into a sharded model, and restore the shards at the end.

    A trainer gathers the values on every process, but saves on only one process, which cannot gather again.
    """
    swaps = [
        (module, leaf, parameter, state.get(join(fqn, leaf)))
        for fqn, module in part.module.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
        and _is_in_parts(parameter)
        and isinstance(state.get(join(fqn, leaf)), torch.Tensor)
    ]
    if any(not isinstance(value, torch.Tensor) or is_sharded(value) for *_, value in swaps):
        raise ConfigError(
            "state_dict: it has to have the whole of every parameter of this sharded model, which one "
            "process cannot gather by itself: get_model_state_dict with full_state_dict=True on every rank"
        )
    try:
        for module, leaf, parameter, value in swaps:
            assert value is not None
            vars(module).pop(leaf, None)  # FSDP1 keeps its shard there as well
            module._parameters[leaf] = nn.Parameter(value.detach(), parameter.requires_grad)
        yield
    finally:
        for module, leaf, parameter, _ in swaps:
            module._parameters[leaf] = parameter
            if torch_private.is_flat(parameter):
                vars(module)[leaf] = parameter


def _is_in_parts(parameter: nn.Parameter) -> bool:
    """Return True if FSDP or ZeRO-3 distributes a parameter over several processes."""
    return is_sharded(parameter) or is_partitioned(parameter) or torch_private.is_flat(parameter)


# --- callbacks ------------------------------------------------------------------------------------


_Mode = Literal["min", "max"]

_LAST: Final = "last"
_BEST: Final = "best"


def trainer_callback(directory: str | os.PathLike[str]) -> Any:
    """Return a callback for transformers' ``Trainer`` that writes the adapters of a rewritten model.

    It writes ``directory/last`` at each checkpoint, and ``directory/best`` after each evaluation with a
    better ``metric_for_best_model`` (of ``TrainingArguments``). Both are folders as
    :func:`lora_fx.save_adapter` writes them. Each is replaced entirely or not at all.

    Args:
        directory: The folder for the two folders; created if it is missing.

    Returns:
        A ``transformers.TrainerCallback``: ``Trainer(..., callbacks=[callback])``. The model may be a child
        of the module that the trainer gets. If there are several rewritten models, each has a folder of its
        name.
    """
    return callback_class(_ForTrainer, "transformers", "TrainerCallback")(directory)


def lightning_callback(
    directory: str | os.PathLike[str], *, monitor: str | None = None, mode: _Mode = "min"
) -> Any:
    """Return a Lightning callback that writes the adapters of a rewritten model and keeps checkpoints small.

    It writes ``directory/last`` at each checkpoint, and ``directory/best`` after each validation with a
    better ``monitor``, as :func:`trainer_callback` does. A checkpoint of a rewritten model then holds only
    trained tensors. All other tensors are taken from the module that ``fit(ckpt_path=...)`` loads it into,
    also with ``strict_loading``. A single process also saves and restores the states of torch's generators,
    so that a resumed run has the same dropout.

    Lightning calls no callback for checkpoints with ``save_weights_only``, so those are complete.

    Args:
        directory: The folder for the two folders; created if it is missing.
        monitor: A logged metric, such as ``"val_loss"``. Without it there is no ``best``.
        mode: ``"min"`` if smaller values are better, ``"max"`` if larger ones are.

    Returns:
        A ``Callback`` of ``lightning``, or of ``pytorch_lightning`` if only that is imported:
        ``Trainer(callbacks=[callback])``.

    Raises:
        ConfigError: If ``mode`` is neither of the two.
    """
    if mode not in ("min", "max"):
        raise ConfigError(f"mode: found {mode!r}; it is 'min' or 'max'")
    package = "lightning.pytorch"
    if "pytorch_lightning" in sys.modules and package not in sys.modules:
        package = "pytorch_lightning"
    return callback_class(_ForLightning, package, "Callback")(directory, monitor, mode)


class _ForTrainer:
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.training = False

    def __reduce__(self) -> tuple[Any, ...]:
        return trainer_callback, (self.directory,), vars(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        self.training = False

    def on_save(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        _write(arguments["model"], self.directory / _LAST, write=state.is_world_process_zero)

    def on_evaluate(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        """Write the best adapters. The Trainer calls this before it updates its best metric."""
        name = args.metric_for_best_model
        if not self.training or name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        value = (arguments.get("metrics") or {}).get(name)
        if value is not None and _better(value, state.best_metric, bool(args.greater_is_better)):
            _write(arguments["model"], self.directory / _BEST, write=state.is_world_process_zero)


class _ForLightning:
    def __init__(self, directory: str | os.PathLike[str], monitor: str | None, mode: _Mode) -> None:
        self.directory, self.monitor, self.mode = Path(directory), monitor, mode
        self.best: float | None = None
        self.alone = True
        self.generators: Mapping[str, Any] | None = None
        self.hook: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        factory = functools.partial(lightning_callback, monitor=self.monitor, mode=self.mode)
        return factory, (self.directory,), {**vars(self), "hook": None}

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return f"lora_fx.lightning_callback(monitor={self.monitor!r}, mode={self.mode!r})"

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self.alone = trainer.world_size == 1
        if self.hook is None:
            register: Any = pl_module.register_load_state_dict_post_hook
            self.hook = register(_drop_left_out_keys)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the best value, and the generators of a single process."""
        if not self.alone:
            return {"best": self.best}
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"best": self.best, "cpu": torch.get_rng_state(), "cuda": devices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state.

        The generators are set at the first batch, because setting up the data draws from them.
        """
        self.best = state["best"]
        self.generators = state if "cpu" in state else None

    def on_train_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int
    ) -> None:
        state, self.generators = self.generators, None
        if state is None or not self.alone:
            return
        torch.set_rng_state(state["cpu"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])

    def on_save_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        for name in _left_out(pl_module):
            checkpoint["state_dict"].pop(name, None)
        _write(pl_module, self.directory / _LAST, write=trainer.is_global_zero)

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ConfigError(
                f"monitor: {self.monitor!r} is not logged; there are {', '.join(metrics) or 'no metrics'}. "
                f"Log it in the validation_step: self.log({self.monitor!r}, ...)"
            )
        value = float(metrics[self.monitor])
        if _better(value, self.best, self.mode == "max"):
            self.best = value
            _write(pl_module, self.directory / _BEST, write=trainer.is_global_zero)


@functools.cache
def callback_class(mixin: type, package: str, name: str) -> Any:
    """Return a class with the methods of ``mixin`` that a library accepts as a callback.

    Args:
        mixin: A class.
        package: The library, which is imported.
        name: The library's base class of callbacks.

    Raises:
        ConfigError: If the library is not installed.
    """
    extra = "lora-fx[hf]" if package == "transformers" else package.partition(".")[0]
    base = load_optional(package, "the callback", extra, attribute=name)
    return type("AdapterCallback", (mixin, base), {"__module__": __name__})


def _better(value: float, best: float | None, greater: bool) -> bool:
    if best is None:
        return value == value  # not NaN
    return value > best if greater else value < best


def rewritten_models(module: nn.Module) -> dict[str, tuple[nn.Module, Record]]:
    """Return the rewritten models in a module, by their FQNs."""
    known = ((name, child, record_of(child)) for name, child in module.named_modules())
    models = {name: (child, record) for name, child, record in known if record is not None}
    if not models:
        raise ConfigError(
            f"there is no rewritten model in this {type(module).__name__}: give the trainer what "
            "lora_fx.rewrite returns, or a module that has it as a child"
        )
    return models


def _write(module: nn.Module, folder: Path, *, write: bool) -> None:
    """Write the adapters of the rewritten models in a module.

    Args:
        module: The module that a trainer trains.
        folder: The folder to write to.
        write: True in the process that writes. All processes take part in gathering a sharded model.
    """
    models = rewritten_models(module)
    for name, (model, record) in models.items():
        parts = (
            is_sharded(parameter) or is_partitioned(parameter) for parameter in model.parameters()
        )
        if not write and not any(parts):
            continue
        target = folder if len(models) == 1 else folder / name
        for adapter in record.adapters:
            save_adapter(model, target, adapter_name=adapter, force=True)


def _left_out(module: nn.Module) -> set[str]:
    """Return the names in a trained module's state dict that no checkpoint needs, for all models in it."""
    return {
        join(prefix, name)
        for prefix, (model, record) in rewritten_models(module).items()
        for name in left_out_of_checkpoints(model, record)
    }


def _drop_left_out_keys(module: nn.Module, keys: Any) -> None:
    left_out = _left_out(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in left_out]
