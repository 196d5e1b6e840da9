"""Training steps as rows of a table."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.tools.bench.contenders import (
    BUILDERS,
    FROZEN,
    NO_DROPOUT,
    Settings,
    model_floor,
    targets_of,
)
from lora_fx.tools.bench.counted import Memory, count_operations, measure_memory, saved_bytes
from lora_fx.tools.bench.measure import (
    Place,
    Progress,
    Ratio,
    Sample,
    Size,
    allocator_peak,
    interleaved,
    kernel_launches,
    ratio,
    synchronizer,
)

__all__ = [
    "COLUMNS",
    "Measured",
    "Step",
    "Workload",
    "bert",
    "cells",
    "compare",
    "gpt2",
    "llama",
    "llama_block",
    "llama_shape",
    "loss_of",
    "measure",
    "mebibytes",
    "name_of",
    "resnet",
    "vit",
]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
        title: What the tables call it.
        make: Gives the model, in training mode, on the CPU, the same each time.
        inputs: Keyword arguments of a call that gives a loss.
    """

    title: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]

    def on(self, place: Place) -> dict[str, Tensor]:
        """The batch at a place: numbers that are not whole have its dtype. They are leaves."""
        found = {}
        for name, value in self.inputs.items():
            dtype = place.dtype if value.is_floating_point() else value.dtype
            moved = value.detach().to(place.device, dtype)
            found[name] = moved.requires_grad_(value.requires_grad)
        return found


def llama_shape(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 512, **more: Any
) -> dict[str, Any]:
    """Arguments of a ``LlamaConfig``."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        **more,
    }


def llama(title: str, shape: Mapping[str, Any], tokens: int) -> Workload:
    """A Llama on one sequence; the loss is that of the next token."""
    ids = _ids(shape["vocab_size"], tokens)
    make = functools.partial(_make, "LlamaConfig", "LlamaForCausalLM", dict(shape))
    return Workload(title, make, {"input_ids": ids, "labels": ids})


def llama_block(size: Size) -> Workload:
    """One block of a Llama of 1.3B parameters, as in the middle of it: its input wants a gradient."""
    tokens, hidden = (8, 16) if size is Size.TINY else (256, 2048)
    if size is Size.TINY:
        shape = llama_shape(hidden, 32, 1, 2, 32)
    else:
        shape = llama_shape(hidden, 5504, 1, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(1, tokens, hidden).requires_grad_()
    make = functools.partial(_make, "LlamaConfig", "LlamaForCausalLM", shape)
    inputs = {"inputs_embeds": x, "labels": _ids(shape["vocab_size"], tokens)}
    return Workload(f"Llama block, 1 × {hidden}, {tokens} tokens", make, inputs)


def gpt2(size: Size) -> Workload:
    """GPT-2 small; its layers are ``Conv1D``."""
    shape: dict[str, Any] = {}
    if size is Size.TINY:
        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    tokens = 8 if size is Size.TINY else 128
    ids = _ids(shape.get("vocab_size", 50257), tokens)
    make = functools.partial(_make, "GPT2Config", "GPT2LMHeadModel", shape)
    return Workload(f"GPT-2 small, {tokens} tokens", make, {"input_ids": ids, "labels": ids})


def bert(size: Size) -> Workload:
    """BERT-base with its head for masked words."""
    shape: dict[str, Any] = {}
    if size is Size.TINY:
        shape = _tiny_encoder() | {"vocab_size": 64, "max_position_embeddings": 32}
    tokens = 8 if size is Size.TINY else 128
    ids = _ids(shape.get("vocab_size", 30522), tokens)
    make = functools.partial(_make, "BertConfig", "BertForMaskedLM", shape)
    return Workload(f"BERT-base, {tokens} tokens", make, {"input_ids": ids, "labels": ids})


def vit(size: Size) -> Workload:
    """ViT-B/16 with ten classes on one picture."""
    shape: dict[str, Any] = {"num_labels": 10}
    if size is Size.TINY:
        shape |= _tiny_encoder() | {"image_size": 32}
    edge = shape.get("image_size", 224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pixels = torch.randn(1, 3, edge, edge)
    make = functools.partial(_make, "ViTConfig", "ViTForImageClassification", shape)
    tokens = (edge // 16) ** 2 + 1
    inputs = {"pixel_values": pixels, "labels": torch.tensor([3])}
    return Workload(f"ViT-B/16, {tokens} tokens", make, inputs)


def resnet(size: Size) -> Workload:
    """ResNet-50 with ten classes on two pictures."""
    # A loss that finds its kind by itself writes it into the settings, which a graph has seen without.
    shape: dict[str, Any] = {"num_labels": 10, "problem_type": "single_label_classification"}
    if size is Size.TINY:
        shape |= {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    edge = 32 if size is Size.TINY else 224
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # In training a batch norm wants two values of each channel.
        pixels = torch.randn(2, 3, edge, edge)
    make = functools.partial(_make, "ResNetConfig", "ResNetForImageClassification", shape)
    inputs = {"pixel_values": pixels, "labels": torch.tensor([3, 4])}
    return Workload(f"ResNet-50, 2 × {edge} × {edge}", make, inputs)


def _tiny_encoder() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }


def _make(config: str, model: str, shape: dict[str, Any]) -> nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**shape))
    return made.train()


def _ids(vocabulary: int, tokens: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randint(0, vocabulary, (1, tokens))


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of one contender takes.

    Attributes:
        sample: Times.
        saved: Bytes kept between forward and backward, or None where hooks do not see them.
        memory: Bytes that its operations allocate, likewise.
        operations: ATen operations, likewise.
        launches: Kernels, on CUDA.
        allocated: Peak of the allocator, on CUDA.
    """

    sample: Sample
    saved: int | None = None
    memory: Memory | None = None
    operations: int | None = None
    launches: int | None = None
    allocated: int | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """Contenders on one workload.

    Attributes:
        floor: F, or None where no simple count of products gives it.
        steps: By name, the frozen one among them.
    """

    floor: float | None
    steps: Mapping[str, Step]

    def overhead(self, name: str) -> Ratio:
        """O."""
        return ratio(self.steps[name].sample, self.steps[FROZEN].sample)

    def saved_beyond(self, name: str) -> int | None:
        """Bytes saved for backward beyond what the frozen step saves."""
        saved, frozen = self.steps[name].saved, self.steps[FROZEN].saved
        return None if saved is None or frozen is None else saved - frozen


def name_of(contender: str, dropout: float) -> str:
    """How a table names a contender with dropout."""
    return f"{contender}, p = {dropout:g}"


def measure(
    workload: Workload,
    names: Iterable[str],
    *,
    dropouts: Iterable[float],
    place: Place,
    repeats: int,
    seconds: float = math.inf,
    progress: Progress | None = None,
    settings: Settings | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> Measured:
    """Builds contenders over one base and measures them against each other.

    Args:
        workload: The model and the batch.
        names: Keys of :data:`lora_fx.tools.bench.contenders.BUILDERS`; the frozen model is added.
        dropouts: Each contender with adapters is measured with each.
        place: Where.
        repeats: Counted turns.
        seconds: As for :func:`lora_fx.tools.bench.measure.interleaved`.
        progress: Likewise.
        settings: Of the adapters, but for the dropout.
        wrap: What becomes of the contenders that have adapters (``torch.compile``); then only time is
            measured of them, since hooks and modes change what is compiled.
    """
    base = workload.make().to(place.device, place.dtype)
    inputs = workload.on(place)
    settings = dataclasses.replace(settings or Settings(), example_inputs=inputs)
    models = _models(base, names, dropouts, settings)
    wrapped = {
        name: wrap(model) if wrap is not None and name != FROZEN else model
        for name, model in models.items()
    }
    losses = {name: loss_of(model, inputs) for name, model in wrapped.items()}
    floor = model_floor(base, targets_of(base, settings), settings.r, lambda model: model(**inputs))
    counted = {name for name, model in models.items() if wrapped[name] is model}
    return compare(
        models,
        losses,
        floor=floor,
        device=place.device,
        repeats=repeats,
        seconds=seconds,
        progress=progress,
        counted=counted,
    )


def compare(
    models: Mapping[str, nn.Module],
    losses: Mapping[str, Callable[[], Tensor]],
    *,
    floor: float | None,
    device: torch.device,
    repeats: int,
    seconds: float = math.inf,
    progress: Progress | None = None,
    counted: Collection[str] | None = None,
) -> Measured:
    """Measures contenders that are there.

    Args:
        models: By name, the frozen one among them.
        losses: What each one's step goes back from.
        floor: F.
        device: Where they are.
        repeats: Counted turns.
        seconds: As for :func:`lora_fx.tools.bench.measure.interleaved`.
        progress: Likewise.
        counted: Of which more than time is measured; of all by default.
    """
    timed = interleaved(
        {name: (models[name].zero_grad, _backward(loss)) for name, loss in losses.items()},
        repeats=repeats,
        seconds=seconds,
        synchronize=synchronizer(device),
        progress=progress,
    )
    return Measured(
        floor,
        {
            name: _counted(timed[name], model, losses[name], device)
            if counted is None or name in counted
            else Step(timed[name])
            for name, model in models.items()
        },
    )


def _models(
    base: nn.Module, names: Iterable[str], dropouts: Iterable[float], settings: Settings
) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys((FROZEN, *names)):
        if name.startswith(FROZEN):
            models[name] = BUILDERS[name](base, settings)
            continue
        for dropout in dropouts:
            if dropout and name in NO_DROPOUT:
                continue
            now = dataclasses.replace(settings, lora_dropout=dropout)
            models[name_of(name, dropout)] = BUILDERS[name](base, now)
    return {name: model.train() for name, model in models.items()}


def _counted(
    sample: Sample, model: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> Step:
    def step() -> None:
        model.zero_grad()
        _backward(loss)(None)

    held: list[Memory] = []
    operations = count_operations(lambda: held.append(measure_memory(step)))
    return Step(
        sample,
        saved_bytes(model, loss),
        held[0],
        operations,
        kernel_launches(step, device),
        allocator_peak(step, device, model.zero_grad),
    )


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A forward that gives the loss."""

    def loss() -> Tensor:
        found: Tensor = model(**inputs).loss
        return found

    return loss


def _backward(loss: Callable[[], Tensor]) -> Callable[[Any], None]:
    def step(_: Any) -> None:
        torch.autograd.backward(loss())

    return step


COLUMNS = (
    "contender",
    "median (quartiles)",
    "O (quartiles)",
    "η",
    "saved beyond frozen, MiB",
    "peak MiB",
    "ATen ops",
    "kernel launches",
    "allocator peak MiB",
)
"""Of the tables of steps; the last two are CUDA's."""


def cells(measured: Measured, name: str) -> tuple[str, ...]:
    """A row of :data:`COLUMNS`."""
    step, overhead = measured.steps[name], measured.overhead(name)
    plain = name.startswith(FROZEN)
    return (
        name,
        str(step.sample),
        "1" if name == FROZEN else str(overhead),
        "" if plain else _efficiency(measured.floor, overhead.median),
        mebibytes(measured.saved_beyond(name)),
        mebibytes(step.memory.peak if step.memory else None),
        _number(step.operations),
        _number(step.launches),
        mebibytes(step.allocated),
    )


def mebibytes(value: int | None) -> str:
    """A size as a table shows it, in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def _efficiency(floor: float | None, overhead: float) -> str:
    """η, F / O, as a table shows it."""
    return "–" if floor is None else f"{100 * floor / overhead:.0f} %"


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)
