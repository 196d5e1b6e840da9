"""Callbacks that write adapter folders while a trainer runs: transformers' Trainer, and Lightning.

Each class is made when it is first asked for, over the callback class of the library, so that nothing of a
library is imported before.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from lora_fx.checkpoint.folder import save_adapter
from lora_fx.checkpoint.pretrained import left_out_of_checkpoints
from lora_fx.errors import ConfigError
from lora_fx.ir import Record, join, record_of
from lora_fx.passes.parameters import is_partitioned, is_sharded

__all__ = ["lightning_callback", "trainer_callback"]

_Mode = Literal["min", "max"]

_LAST: Final = "last"
_BEST: Final = "best"


def trainer_callback(directory: str | os.PathLike[str]) -> Any:
    """A callback of transformers' ``Trainer`` that writes the adapters of a rewritten model.

    At each checkpoint it writes ``directory/last``, and after each evaluation with a better
    ``metric_for_best_model`` (of ``TrainingArguments``) ``directory/best``. Both are folders as
    :func:`lora_fx.save_adapter` writes them, and are replaced whole or not at all.

    Args:
        directory: Where the two folders are; made if it is not there.

    Returns:
        A ``transformers.TrainerCallback``: ``Trainer(..., callbacks=[callback])``. The model may be in a
        module that the trainer is given. Of several rewritten models each has a folder of its name.
    """
    return _class_over(_ForTrainer, "transformers", "TrainerCallback")(directory)


def lightning_callback(
    directory: str | os.PathLike[str],
    *,
    monitor: str | None = None,
    mode: _Mode = "min",
) -> Any:
    """A callback of Lightning that writes the adapters of a rewritten model, and keeps checkpoints small.

    At each checkpoint it writes ``directory/last``, and after each validation with a better ``monitor``
    ``directory/best``, as :func:`trainer_callback` does. Of a rewritten model a checkpoint then holds only
    what is trained. The rest is that of the module that the checkpoint is loaded into, by
    ``fit(ckpt_path=...)``, also with ``strict_loading``. In a single process the states of torch's generators
    are saved and put back as well, so that a run goes on with the same dropout.

    Lightning asks no callback about checkpoints with ``save_weights_only``: those are whole.

    Args:
        directory: Where the two folders are; made if it is not there.
        monitor: A metric that is logged, as ``"val_loss"``. Without it there is no ``best``.
        mode: Which value is better, ``"min"`` or ``"max"``.

    Returns:
        A ``Callback`` of ``lightning``, or of ``pytorch_lightning`` where that is in use:
        ``Trainer(callbacks=[callback])``.

    Raises:
        ConfigError: For another mode.
    """
    if mode not in ("min", "max"):
        raise ConfigError(f"mode: found {mode!r}; it is 'min' or 'max'")
    package = "lightning.pytorch"
    if "pytorch_lightning" in sys.modules and package not in sys.modules:
        package = "pytorch_lightning"
    return _class_over(_ForLightning, package, "Callback")(directory, monitor, mode)


class _ForTrainer:
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.training = False

    def __reduce__(self) -> tuple[Any, ...]:
        return trainer_callback, (self.directory,), vars(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.training = False

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        _write(given["model"], self.directory / _LAST, write=state.is_world_process_zero)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called before the Trainer notes the metric as the best one."""
        name = args.metric_for_best_model
        if not self.training or name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        value = (given.get("metrics") or {}).get(name)
        if value is not None and _better(value, state.best_metric, bool(args.greater_is_better)):
            _write(given["model"], self.directory / _BEST, write=state.is_world_process_zero)


class _ForLightning:
    def __init__(self, directory: str | os.PathLike[str], monitor: str | None, mode: _Mode) -> None:
        self.directory, self.monitor, self.mode = Path(directory), monitor, mode
        self.best: float | None = None
        self.alone = True
        self.generators: Mapping[str, Any] | None = None
        self.hook: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        made = functools.partial(lightning_callback, monitor=self.monitor, mode=self.mode)
        return made, (self.directory,), {**vars(self), "hook": None}

    @property
    def state_key(self) -> str:
        """What a checkpoint has the state by."""
        return f"lora_fx.lightning_callback(monitor={self.monitor!r}, mode={self.mode!r})"

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self.alone = trainer.world_size == 1
        if self.hook is None:
            register: Any = pl_module.register_load_state_dict_post_hook
            self.hook = register(_forgive_what_was_left_out)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of it: the best value, and the generators of a single process."""
        if not self.alone:
            return {"best": self.best}
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"best": self.best, "cpu": torch.get_rng_state(), "cuda": devices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it back. The generators wait for the first batch: to begin with data draws from them, too."""
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
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])

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
def _class_over(mixin: type, package: str, name: str) -> Any:
    base = getattr(importlib.import_module(package), name)
    return type("AdapterCallback", (mixin, base), {"__module__": __name__})


def _better(value: float, best: float | None, greater: bool) -> bool:
    if best is None:
        return value == value  # not NaN
    return value > best if greater else value < best


def _rewritten(module: nn.Module) -> dict[str, tuple[nn.Module, Record]]:
    """The rewritten models in a module, by their FQNs."""
    known = ((name, one, record_of(one)) for name, one in module.named_modules())
    found = {name: (one, record) for name, one, record in known if record is not None}
    if not found:
        raise ConfigError(
            f"there is no rewritten model in this {type(module).__name__}: give the trainer what "
            "lora_fx.rewrite returns, or a module that has it as a child"
        )
    return found


def _write(module: nn.Module, folder: Path, *, write: bool) -> None:
    """Writes the adapters of the rewritten models in a module.

    Args:
        module: What a trainer trains.
        folder: Where to.
        write: Whether this is the process that writes. The parts of a sharded model are gathered by all of
            them.
    """
    models = _rewritten(module)
    for name, (model, record) in models.items():
        parts = (is_sharded(one) or is_partitioned(one) for one in model.parameters())
        if not write and not any(parts):
            continue
        target = folder if len(models) == 1 else folder / name
        for adapter in record.adapters:
            save_adapter(model, target, adapter_name=adapter, force=True)


def _left_out(module: nn.Module) -> set[str]:
    """Names in the state dict of a module that has rewritten models, which a checkpoint does not need."""
    return {
        join(prefix, name)
        for prefix, (model, record) in _rewritten(module).items()
        for name in left_out_of_checkpoints(model, record)
    }


def _forgive_what_was_left_out(module: nn.Module, keys: Any) -> None:
    left_out = _left_out(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in left_out]
