"""Counts what a training step keeps for its backward, before anything is trained.

The model is copied onto the meta device, where tensors have shapes and no memory, rewritten there, and called
with the shapes of the example inputs. What autograd keeps is then counted storage by storage, as it is when
the step is real: which layers share an input, what attention keeps anyway, what ``memory="balanced"`` makes
again, the masks of dropout. Nothing is computed.
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
from lora_fx.ir import DEFAULT_LOSS, Kept, Loss, Memory, Plan
from lora_fx.passes.capture import Frontend, Listener, State, normalize
from lora_fx.passes.pipeline import rewrite_model
from lora_fx.torch_private import pytree

__all__ = ["saved_storages", "take_gradient_to_embeddings", "tensors", "with_kept"]

_log = logging.getLogger("lora_fx")


def with_kept(
    plan: Plan,
    model: nn.Module,
    config: LoraConfig,
    example_inputs: Any,
    *,
    loss: Loss = DEFAULT_LOSS,
    frontend: Frontend = "auto",
) -> Plan:
    """Return a plan that says what a step with these inputs keeps for its backward.

    Args:
        plan: The plan.
        model: The user's model, which is not touched.
        config: What to adapt.
        example_inputs: As for :func:`lora_fx.plan`. With None nothing is counted.
        loss: As for :func:`lora_fx.rewrite`.
        frontend: As for :func:`lora_fx.capture`; what ``auto`` chooses without inputs is counted.
    """
    if example_inputs is None:
        return plan
    before = State(model)
    try:
        found = _counted(model, config, example_inputs, loss, frontend)
    except Exception as error:  # noqa: BLE001  whatever the user's code raises without values
        _log.debug("what a step keeps is not counted: %s: %s", type(error).__name__, error)
        return plan
    finally:
        before.restore()  # random numbers that were drawn on the way
    return dataclasses.replace(plan, kept=found)


def _counted(
    model: nn.Module, config: LoraConfig, example_inputs: Any, loss: Loss, frontend: Frontend
) -> Kept | None:
    base = _without_memory(model)
    if base is None:
        return None

    device = next((one.device for one in model.parameters()), torch.device("cpu"))

    def meta(value: Any) -> Any:
        return value.detach().to("meta") if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(meta, normalize(example_inputs))
    found: dict[str, int] = {}
    for memory in get_args(Memory):
        # As a graph of these inputs, what is counted would be that of the exported model.
        own: Frontend = "auto" if frontend == "export" else frontend
        adapted = rewrite_model(base, config, memory=memory, loss=loss, frontend=own, quiet=True)
        found[memory] = _kept(adapted.train(), device, args, kwargs)
    frozen = take_gradient_to_embeddings(base.requires_grad_(False).train())
    return Kept(_kept(frozen, device, args, kwargs), found)


def _without_memory(model: nn.Module) -> nn.Module | None:
    """A copy on the meta device; None if a weight is more than its numbers (quantized, sharded)."""
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
    """Have a model compute gradients from its embeddings on, as it does with adapters, and return it."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):
        embeddings.register_forward_hook(_wants_gradient)
    return model


def _wants_gradient(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def _kept(model: nn.Module, device: torch.device, args: Any, kwargs: Any) -> int:
    """Bytes that autograd keeps of a call, each storage once, without the model's own."""
    with _Attention(device):
        own = (*model.parameters(), *model.buffers())
        found = saved_storages(own, lambda: model(*args, **kwargs))
    return sum(storage.nbytes() for _, storage in found)


def saved_storages(
    own: Iterable[Tensor], forward: Callable[[], Any], kind: Callable[[Tensor], str] = lambda _: ""
) -> list[tuple[str, torch.UntypedStorage]]:
    """Run a forward, and find what autograd keeps for the backward when it is done.

    Args:
        own: Tensors whose storages do not count: they are there anyway.
        forward: Gives what the backward starts from.
        kind: Names what a tensor is; the first one that is kept of a storage says what the storage is.

    Returns:
        Each storage once, with its kind.
    """
    known = {torch_private.storage_key(tensor.untyped_storage()) for tensor in own}
    seen: dict[int, tuple[str, weakref.ref[torch.UntypedStorage]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = torch_private.storage_key(storage)
        if key not in known and key not in seen:
            # What is let go of before the forward ends (a result that is detached) is not kept, and
            # another storage can take its address.
            seen[key] = kind(tensor), weakref.ref(storage)
            weakref.finalize(storage, seen.pop, key)
        # A node that keeps its own result as it is would keep itself, too, for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    for tensor in _attributes(outputs):
        pack(tensor)
    found = [(name, held()) for name, held in tuple(seen.values())]
    del outputs
    return [(name, storage) for name, storage in found if storage is not None]


_ATTENTION = F.scaled_dot_product_attention


class _Attention(Listener):
    """Runs the kernel of attention that the device of the model would: another one keeps another amount.

    Flash attention is known. Others that a GPU may choose count as the plain operations, which keep scores.
    """

    _FLASH: ClassVar[Mapping[str, Any]] = {
        "cpu": torch_private.FLASH_ATTENTION_CPU,
        "cuda": torch_private.FLASH_ATTENTION,
    }

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answers for attention."""
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
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        flash = self._FLASH.get(self._device.type)
        if flash is None or more.get("enable_gqa") or not self._chooses_flash(*given, **more):
            return _ATTENTION(*given, **more)
        options = {"scale": more.get("scale")}
        if self._device.type == "cpu":
            options["attn_mask"] = attn_mask
        out: Tensor = flash(query, key, value, dropout_p, is_causal, **options)[0]
        return out

    def _chooses_flash(self, *given: Any, **more: Any) -> bool:
        def there(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            made = torch.empty_strided(
                one.shape, one.stride(), dtype=one.dtype, device=self._device
            )
            return made.requires_grad_(one.requires_grad)

        # It looks at shapes and flags; the memory is not touched.
        chosen = torch_private.attention_choice(*map(there, given), **more)
        return bool(chosen == SDPBackend.FLASH_ATTENTION.value)


def _attributes(outputs: Any) -> Iterator[Tensor]:
    """What the nodes of a graph hold that were written in Python."""
    waiting = [getattr(one, "grad_fn", None) for one in pytree.tree_leaves(outputs)]
    known = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        waiting += [above for above, _ in node.next_functions]
        yield from tensors(getattr(node, "__dict__", None))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in what it holds, and in the fields of records."""
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
    for one in inner:
        yield from tensors(one)
