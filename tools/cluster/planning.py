"""Runs one training step of a sharded model on fake tensors, in a process group that moves nothing.

PyTorch's own FSDP2, optimizer and autograd do on stand-ins without memory what they do on GPUs, as rank 0 of a
group of any size does it. What is kept, gathered and sent is counted as it happens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.tools.cluster.ledger import Ledger, nbytes
from lora_fx.tools.cluster.mesh import Mesh, devices_of, shard

__all__ = ["Need", "Traffic", "plan_step", "run_step"]


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in one step, in bytes, with rings.

    Attributes:
        gather: Weights that are gathered, in the forward and in the backward.
        scatter: Gradients that are reduced and scattered.
        reduce: Gradients that are reduced over copies of the model.
        calls: How many collectives those are.
    """

    gather: int = 0
    scatter: int = 0
    reduce: int = 0
    calls: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.gather + self.scatter + self.reduce


@dataclass(frozen=True)
class Need:
    """What one GPU holds during a training step, in bytes.

    Attributes:
        weights: Its shards of the frozen parameters, and the buffers.
        adapters: Its shards of what is trained.
        gradients: Of those.
        optimizer: The optimizer's state for those.
        activations: What the forward keeps for the backward and returns.
        gathered: The most that is gathered at once of blocks that are sharded.
        peak: The most that is live at once. It is less than the sum where parts are not live together, and has
            the temporaries of operations in it.
        traffic: What it sends in a step.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    traffic: Traffic


def plan_step(
    model: nn.Module,
    config: LoraConfig,
    mesh: Mesh,
    inputs: dict[str, Any],
    *,
    checkpointing: bool = False,
) -> Need:
    """Find what a step of AdamW needs on each GPU of a mesh.

    Args:
        model: On any device; nothing of it is read but names, shapes and dtypes. It is not changed.
        config: What to adapt.
        mesh: The GPUs.
        inputs: Keyword arguments of one call, what one GPU gets in a step. Tensors of any device.
        checkpointing: Whether blocks are computed again in the backward, for a model that can be told so
            (``gradient_checkpointing_enable``).

    Raises:
        ConfigError: A process group is there already, or the model cannot checkpoint.
        LoraFxError: As :func:`lora_fx.rewrite`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    import lora_fx

    if checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise ConfigError(
            f"{type(model).__name__} has no gradient_checkpointing_enable: leave out --checkpointing"
        )
    rewritten = lora_fx.rewrite(model, config)
    with contextlib.ExitStack() as around:
        around.enter_context(_fake_group(mesh.size))
        devices = devices_of(mesh)
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        around.enter_context(_FlashAttention())
        around.enter_context(_no_masks())
        _stand_in(rewritten)
        if checkpointing:
            rewritten.gradient_checkpointing_enable()
        rewritten.train()
        if mesh.size > 1:
            shard(rewritten, devices)
        given = {
            name: torch.empty_like(value, device="cpu") if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        return run_step(rewritten, given)


def run_step(model: nn.Module, inputs: dict[str, Any]) -> Need:
    """Run two steps of a model, and count the second: the first one makes what is there from then on.

    Args:
        model: A rewritten model, sharded or not, on real tensors or stand-ins.
        inputs: Keyword arguments of one call.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ledger = Ledger()
    ledger.hold([*model.parameters(), *model.buffers()])
    kept = gradients = 0
    with ledger:
        for _ in range(2):
            ledger.peak = ledger.gathered = 0
            ledger.sent.clear()
            ledger.calls.clear()
            before = ledger.live
            loss = _loss(model(**inputs))
            kept = ledger.live - before - ledger.live_gathered
            loss.backward()
            del loss
            gradients = nbytes([p.grad for p in trained if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    state = [v for one in optimizer.state.values() for v in one.values() if isinstance(v, Tensor)]
    sent = ledger.sent
    return Need(
        weights=nbytes([*frozen, *model.buffers()]),
        adapters=nbytes(trained),
        gradients=gradients,
        optimizer=nbytes(state),
        activations=kept,
        gathered=ledger.gathered,
        peak=ledger.peak,
        traffic=Traffic(sent["gather"], sent["scatter"], sent["reduce"], sum(ledger.calls.values())),
    )


def _loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    tensors = [
        one
        for one in torch.utils._pytree.tree_leaves(output)
        if isinstance(one, Tensor) and one.requires_grad
    ]
    if not tensors:
        raise ConfigError("no output of the model depends on what is trained: there is no step to plan")
    return torch.stack([one.float().mean() for one in tensors]).sum()


def _stand_in(model: nn.Module) -> None:
    """Put a stand-in on the CPU for each parameter and buffer; shared ones stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in made:
                    new = torch.empty_like(value, device="cpu")
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=value.requires_grad)
                    made[id(value)] = new
                held[name] = made[id(value)]


class _FlashAttention(TorchFunctionMode):
    """Has attention keep what a flash kernel keeps: stand-ins get the one that keeps every probability."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _flash(*args, **kwargs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    del enable_gqa  # fewer heads of keys than of queries are what the kernel takes
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result


@contextlib.contextmanager
def _no_masks() -> Iterator[None]:
    """Has models of transformers make no mask for attention, as where nothing is padded.

    They look at values to find that out, and stand-ins have none.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    MASKS["sdpa"] = lambda *_, **__: None
    try:
        yield
    finally:
        del MASKS["sdpa"]


@contextlib.contextmanager
def _fake_group(size: int) -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("a process group is there already: plan before init_process_group, or in another process")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
