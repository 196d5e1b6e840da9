"""What CorDA and LoRA-GA want to know of a model: second moments of inputs, gradients of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.switching import base_capture
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.ir import PlannedSite, Record
from lora_fx.passes.graph import install
from lora_fx.passes.insert import See, observed
from lora_fx.passes.parameters import base_parameters, put_back
from lora_fx.passes.pipeline import regions_to_install

__all__ = [
    "Data",
    "Forward",
    "Report",
    "gradients",
    "loss_of",
    "moments",
    "show_inputs",
    "tokens_seen",
]


Forward = Callable[[nn.Module, Any], Any]
"""How to call a model with a batch."""

Report = Callable[[int | None, str], None]
"""Is told how many batches are done (None: as many as before), and what is being done."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a start is computed from.

    Attributes:
        batches: A tensor is the model's one argument, a tuple or list has all of them, and a mapping has
            them by name.
        device: Where the model is.
        forward: How to call the model with a batch, where it is not so.
        report: Is told of every batch.
    """

    batches: Iterable[Any]
    device: torch.device
    forward: Forward | None
    report: Report

    def counted(self) -> Iterator[tuple[int, Any]]:
        """The batches of one pass, with their numbers, where the model is.

        Raises:
            ConfigError: If there are none.
        """
        number = -1
        for number, batch in enumerate(self.batches):
            yield number, _on_device(batch, self.device)
        if number < 0:
            raise ConfigError("the dataloader is empty: give at least one batch")

    def output(self, model: nn.Module, batch: Any, number: int) -> Any:
        """The model's output for a batch.

        Raises:
            ConfigError: If the model does not take it.
        """
        try:
            if self.forward is not None:
                return self.forward(model, batch)
            if isinstance(batch, Mapping) or hasattr(batch, "keys"):
                return model(**batch)
            return model(*batch) if isinstance(batch, tuple | list) else model(batch)
        except LoraFxError:
            raise
        except Exception as error:
            raise ConfigError(
                f"batch {number}, a {type(batch).__name__}: the model does not take it "
                f"({type(error).__name__}: {error}); give forward=, a function of the model and a batch"
            ) from error


def loss_of(output: Any, batch: Any, loss_fn: Callable[[Any, Any], Any] | None) -> torch.Tensor:
    """The loss of an output.

    Raises:
        ConfigError: If there is none, or it has no gradient.
    """
    loss = output if loss_fn is None else loss_fn(output, batch)
    if loss_fn is None and not isinstance(output, torch.Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ConfigError(
            f"the model's output, a {type(output).__name__}, has no loss: give labels in the batches, or "
            "loss_fn=, a function of the output and the batch that returns a scalar"
        )
    if not torch.isfinite(loss).all():
        raise ConfigError(f"the loss of a batch is {float(loss)}")
    return loss


def _on_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if hasattr(value, "to") and not isinstance(value, type):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _on_device(one, device) for key, one in value.items()}
    if isinstance(value, tuple | list):
        parts = [_on_device(one, device) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tokens_seen(batch: Any, ignored_label: int | None) -> torch.Tensor | None:
    """Which tokens of a batch count: those that the attention mask has, and that are labeled.

    Args:
        batch: A batch; only a mapping of a language model's inputs says something of tokens.
        ignored_label: The label of those that are not; None if labels do not matter.

    Returns:
        A mask of all tokens, flat; None if every vector counts.
    """
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        return None
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    if mask.shape != ids.shape:
        return None
    mask = mask.bool()
    if ignored_label is not None and "labels" in batch and batch["labels"].shape == ids.shape:
        mask = mask & (batch["labels"] != ignored_label)
    return torch.flatten(mask)


def show_inputs(model: nn.Module, record: Record, rows: tuple[PlannedSite, ...], see: See) -> None:
    """From now on a model with no active adapter shows what sites read.

    Layers that are written out, and would apply weights where nothing sees it, run their graphs.
    """
    capture = base_capture(model, record)
    seen = {region.key: region for region in observed(capture, rows, see)}
    capture = dataclasses.replace(capture, regions={**capture.regions, **seen})
    install(regions_to_install(capture, rows))


def moments(
    model: nn.Module,
    record: Record,
    rows: tuple[PlannedSite, ...],
    data: Data,
    *,
    half: bool,
) -> dict[str, torch.Tensor]:
    """The mean of ``XᵀX`` over all calls, each X [n, in] divided by its largest value, by site.

    Args:
        model: A rewritten model with no active adapter. Its graphs are other ones afterwards.
        record: Its record.
        rows: The sites.
        data: The data.
        half: Whether to compute in the inputs' own dtype, not in fp32 (``use_float16_for_covariance``).

    Raises:
        ConfigError: If an input is not finite, or a site is not run.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys((row.name for row in rows), 0)

    def see(row: PlannedSite, x: torch.Tensor) -> None:
        x = x if half else x.float()
        # PEFT's measure; the largest magnitude where no value is above zero.
        largest = x.max().abs()
        x = x / torch.where(largest > 0, largest, x.abs().max().clamp_min(1e-30))
        product = x.T @ x
        if not torch.isfinite(product).all():
            raise ConfigError(f"{row.name}: the model gives it inputs that are not finite")
        sums[row.name] = sums[row.name] + product if row.name in sums else product
        counts[row.name] += 1

    show_inputs(model, record, rows, see)
    with torch.no_grad():
        for number, batch in data.counted():
            data.report(number, "collecting second moments")
            data.output(model.eval(), batch, number)
    _check_run(counts)
    return {name: value / counts[name] for name, value in sums.items()}


def gradients(
    model: nn.Module,
    rows: tuple[PlannedSite, ...],
    data: Data,
    loss_fn: Callable[[Any, Any], Any] | None,
) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss, by weight: fp32, on the CPU.

    Every gradient goes to the CPU as soon as it is there: the device never holds more than one.

    Args:
        model: A rewritten model with no active adapter.
        rows: The sites.
        data: The data.
        loss_fn: The loss of an output and a batch.

    Raises:
        ConfigError: If a gradient is not finite, there is no loss, or a weight has no gradient.
    """
    before = base_parameters(model)
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys((row.site.weight for row in rows), 0)
    try:
        model.requires_grad_(False)
        for name in counts:
            _replace(model, name, _adding(name, sums, counts))
        seen = 0
        for number, batch in data.counted():
            data.report(number, "collecting gradients")
            with torch.enable_grad():
                output = data.output(model.train(), batch, number)
                torch.autograd.backward(loss_of(output, batch, loss_fn))
            seen = number + 1
    finally:
        put_back(model, before)
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    _check_run(counts)
    return {name: value / seen for name, value in sums.items()}


def _replace(model: nn.Module, name: str, hook: Callable[[torch.Tensor], None]) -> None:
    """A leaf over the same values in the place of a weight: what is tied to that has no part in it."""
    owner, _, leaf = name.rpartition(".")
    weight: Any = nn.Parameter(model.get_parameter(name).detach(), requires_grad=True)
    weight.register_post_accumulate_grad_hook(hook)
    model.get_submodule(owner)._parameters[leaf] = weight


def _adding(
    name: str, sums: dict[str, torch.Tensor], counts: dict[str, int]
) -> Callable[[torch.Tensor], None]:
    def add(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        value = weight.grad.to("cpu", torch.float32)
        weight.grad = None
        if not torch.isfinite(value).all():
            raise ConfigError(f"{name}: its gradient is not finite")
        sums[name] = sums[name].add_(value) if name in sums else value.clone()
        counts[name] += 1

    return add


def _check_run(counts: Mapping[str, int]) -> None:
    idle = [name for name, count in counts.items() if count == 0]
    if idle:
        raise ConfigError(
            f"the data does not reach {', '.join(idle[:5])}: give batches that do, or leave it out with "
            "exclude_modules"
        )
