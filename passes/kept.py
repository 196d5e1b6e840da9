"""Count of the bytes that a training step keeps for its backward, without running a real step.

The model is copied onto the meta device, where tensors have shapes but no memory. There it is rewritten,
and called with the shapes of the example inputs. The storages that autograd keeps are counted one by one,
as in a real step. So the count includes shared inputs of layers, tensors kept by attention, dropout masks,
and the recomputation of ``memory="balanced"``. Nothing is computed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from lora_fx import torch_private
from lora_fx.config import LoraConfig
from lora_fx.ir import Kept, Loss, Memory, Plan
from lora_fx.passes.capture import Frontend, Listener, State, normalize
from lora_fx.passes.pipeline import RewriteOptions, rewrite_model
from lora_fx.torch_private import pytree

__all__ = ["saved_storages", "take_gradient_to_embeddings", "tensors", "with_kept"]

_log = logging.getLogger("lora_fx")


def with_kept(
    plan: Plan,
    model: nn.Module,
    config: LoraConfig,
    example_inputs: Any,
    *,
    loss: Loss | None = None,
    frontend: Frontend = "auto",
    deploy: str | None = None,
) -> Plan:
    """Return a plan with the memory that a step with these inputs keeps for its backward.

    Args:
        plan: The plan.
        model: The user's model, which is not touched.
        config: The configuration of the adapter.
        example_inputs: Same as for :func:`lora_fx.plan`. If None, the plan is returned unchanged.
        loss: Same as for :func:`lora_fx.rewrite`.
        frontend: Same as for :func:`lora_fx.capture`. ``auto`` chooses as without example inputs.
        deploy: Same as for :func:`lora_fx.rewrite`.
    """
    if example_inputs is None:
        return plan
    before = State(model)
    try:
        kept = _counted(model, config, example_inputs, loss, frontend, deploy)
    except Exception as error:  # noqa: BLE001  whatever the user's code raises without values
        _log.debug("what a step keeps is not counted: %s: %s", type(error).__name__, error)
        return plan
    finally:
        before.restore()  # the state of the random number generators
    return dataclasses.replace(plan, kept=kept)


def _counted(
    model: nn.Module,
    config: LoraConfig,
    example_inputs: Any,
    loss: Loss | None,
    frontend: Frontend,
    deploy: str | None,
) -> Kept | None:
    base = _without_memory(model)
    if base is None:
        return None

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def meta(value: Any) -> Any:
        return value.detach().to("meta") if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(meta, normalize(example_inputs))
    totals: dict[str, int] = {}
    for memory in get_args(Memory):
        # With "export" the bytes of the exported model would be counted.
        own: Frontend = "auto" if frontend == "export" else frontend
        options = RewriteOptions(memory=memory, loss=loss, quiet=True, deploy=deploy)
        adapted = rewrite_model(base, config, options=options, frontend=own)
        totals[memory] = _kept(adapted.train(), device, args, kwargs)
    frozen = take_gradient_to_embeddings(base.requires_grad_(False).train())
    return Kept(_kept(frozen, device, args, kwargs), totals)


def _without_memory(model: nn.Module) -> nn.Module | None:
    """Copy a model onto the meta device. Return None if a tensor is a subclass (quantized, sharded)."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is not Tensor:
            return None
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)


def take_gradient_to_embeddings(model: nn.Module) -> nn.Module:
    """Make the outputs of a model's input embeddings require a gradient, and return the model.

    A model with adapters computes gradients from there on, too.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):
        embeddings.register_forward_hook(_wants_gradient)
    return model


def _wants_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def _kept(model: nn.Module, device: torch.device, args: Any, kwargs: Any) -> int:
    """Return the bytes that autograd keeps for a call, each storage once, without the model's tensors."""
    with _Attention(device):
        own = (*model.parameters(), *model.buffers())
        storages = saved_storages(own, lambda: model(*args, **kwargs))
    return sum(storage.nbytes() for _, storage in storages)


def saved_storages(
    own: Iterable[Tensor], forward: Callable[[], Any], kind: Callable[[Tensor], str] = lambda _: ""
) -> list[tuple[str, torch.UntypedStorage]]:
    """Run a forward, and return the storages that autograd keeps for the backward at its end.

    Args:
        own: Tensors whose storages do not count, because they exist anyway.
        forward: Returns the outputs from which the backward starts.
        kind: Names the kind of a tensor. A storage gets the kind of its first tensor that is kept.

    Returns:
        Each storage once, with its kind.
    """
    known = {torch_private.storage_key(tensor.untyped_storage()) for tensor in own}
    seen: dict[int, tuple[str, weakref.ref[torch.UntypedStorage]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = torch_private.storage_key(storage)
        if key not in known and key not in seen:
            # A storage that is freed before the forward ends is not kept for the backward. It is removed,
            # because another storage may get its address.
            seen[key] = kind(tensor), weakref.ref(storage)
            weakref.finalize(storage, seen.pop, key)
        # Without detach, a node that keeps its own result would keep itself alive forever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    for tensor in _attributes(outputs):
        pack(tensor)
    storages = [(name, reference()) for name, reference in tuple(seen.values())]
    del outputs
    return [(name, storage) for name, storage in storages if storage is not None]


_ATTENTION = F.scaled_dot_product_attention


class _Attention(Listener):
    """Listener that runs attention as the model's device would, because each kernel keeps other tensors.

    Flash attention is supported. Other kernels that a GPU may choose count as plain operations, which keep
    scores.
    """

    _FLASH: ClassVar[Mapping[str, Any]] = {
        "cpu": torch_private.FLASH_ATTENTION_CPU,
        "cuda": torch_private.FLASH_ATTENTION,
    }

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of attention, or NotImplemented for other functions."""
        return self._attend(*args, **kwargs) if func is _ATTENTION else NotImplemented

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        inputs = (query, key, value, attn_mask, dropout_p, is_causal)
        flash = self._FLASH.get(self._device.type)
        if flash is None or more.get("enable_gqa") or not self._chooses_flash(*inputs, **more):
            return _ATTENTION(*inputs, **more)
        options = {"scale": more.get("scale")}
        if self._device.type == "cpu":
            options["attn_mask"] = attn_mask
        out: Tensor = flash(query, key, value, dropout_p, is_causal, **options)[0]
        return out

    def _chooses_flash(self, *inputs: Any, **more: Any) -> bool:
        def there(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            empty = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=self._device
            )
            return empty.requires_grad_(value.requires_grad)

        # The choice depends on shapes and flags only; the memory is not touched.
        chosen = torch_private.attention_choice(*map(there, inputs), **more)
        return bool(chosen == SDPBackend.FLASH_ATTENTION.value)


def _attributes(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors that Python autograd functions keep as attributes of their nodes.

    Hooks for saved tensors do not see these.
    """
    waiting = [getattr(output, "grad_fn", None) for output in pytree.tree_leaves(outputs)]
    known = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        waiting += [above for above, _ in node.next_functions]
        yield from tensors(getattr(node, "__dict__", None))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value: in containers and in the fields of records, at any depth."""
    inner: Sequence[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        inner = [*value.values()]
    elif isinstance(value, list | tuple):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif type(value).__name__ == "QuantState":
        inner = [*vars(value).values()]
    for item in inner:
        yield from tensors(item)
