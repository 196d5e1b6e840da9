"""What a training step needs on each GPU of a cluster, found without the GPUs.

One step of the sharded model runs on stand-ins without memory, in a process group that moves nothing:
PyTorch's own FSDP2, optimizer and autograd do what they do as rank 0 of a group of any size. What is kept,
gathered and sent is counted as it happens.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_fx import torch_private
from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError
from lora_fx.passes.capture import Listener, named_inputs
from lora_fx.passes.graph import share_copy
from lora_fx.torch_private import pytree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Ledger",
    "Mesh",
    "Need",
    "Traffic",
    "devices_of",
    "parallelize",
    "plan_step",
    "run_step",
    "shard",
    "step_inputs",
    "takes_text",
]

_GENERATING = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel")
_DIMENSIONS = ("replicate", "fsdp", "tp")
_ENTRY = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<size>\d+)\s*")
_GATHERS = ("_allgather_base_", "allgather_into_tensor_coalesced_", "all_gather_into_tensor")
_SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_tensor")
_REDUCES = ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_")
_FILLS = ("all_gather_copy_in", "split_with_sizes_copy")


@dataclass(frozen=True)
class Mesh:
    """A mesh of GPUs.

    Attributes:
        replicate: Groups that each hold a whole copy of the model between them (HSDP, or DDP with
            ``fsdp=1``).
        fsdp: GPUs, or groups of ``tp``, that the weights of one such copy are sharded over.
        tp: GPUs that compute parts of each layer, on the same samples (tensor parallelism).
    """

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read ``fsdp=8``, ``replicate=2,fsdp=8`` or ``fsdp=8,tp=2``.

        Raises:
            ConfigError: An entry is no dimension of a mesh, is there twice, or its size is below 1.
        """
        sizes: dict[str, int] = {}
        for entry in text.split(","):
            found = _ENTRY.fullmatch(entry)
            if found is None or found["name"] not in _DIMENSIONS or not int(found["size"]):
                raise ConfigError(
                    f"--mesh {text!r}: {entry.strip()!r} is no dimension of a mesh: write fsdp=8, "
                    "replicate=2,fsdp=8 or fsdp=8,tp=2"
                )
            if found["name"] in sizes:
                raise ConfigError(f"--mesh {text!r}: {found['name']} is there twice")
            sizes[found["name"]] = int(found["size"])
        return cls(**sizes)

    @property
    def size(self) -> int:
        """How many GPUs there are."""
        return self.replicate * self.fsdp * self.tp

    def __str__(self) -> str:
        parts = [(name, getattr(self, name)) for name in _DIMENSIONS]
        return " x ".join(f"{name} {size}" for name, size in parts if size > 1) or "one GPU"


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, which are sharded each on its own: children of its outermost module lists."""
    pending: list[nn.Module] = [model]
    while pending:
        for child in pending.pop().children():
            if isinstance(child, nn.ModuleList):
                yield from (one for one in child if any(True for _ in one.parameters()))
            else:
                pending.append(child)


def devices_of(mesh: Mesh) -> DeviceMesh:
    """Return the mesh over the members of the default process group, which are as many."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if mesh.size != dist.get_world_size():
        raise ConfigError(f"the mesh has {mesh.size} members, the group {dist.get_world_size()}")
    names = [name for name in _DIMENSIONS if name == "fsdp" or getattr(mesh, name) > 1]
    sizes = tuple(getattr(mesh, name) for name in names)
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(names))


def parallelize(model: nn.Module, devices: DeviceMesh) -> None:
    """Cut a model of transformers over the ``tp`` dimension of a mesh in place, by its own plan.

    Raises:
        ConfigError: The mesh has no such dimension, the model has no plan, or its sizes do not divide.
    """
    if "tp" not in (devices.mesh_dim_names or ()):
        raise ConfigError(f"the mesh {devices.mesh_dim_names} has no dimension 'tp'")
    plan, size = _plan_of(model), devices["tp"].size()
    config: Any = model.config
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None)
        if isinstance(heads, int) and heads % size:
            raise ConfigError(
                f"tp={size}: the model has {name}={heads}, which {size} does not divide"
            )
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    apply_tensor_parallelism(model, devices["tp"], plan)


def _plan_of(model: nn.Module) -> dict[str, str]:
    """How transformers cuts a model: a style for each module and parameter that it names."""
    given = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"tp: {type(model).__name__} has no tp_plan, by which transformers cuts its layers: leave tp out "
            "of the mesh, or give the model one (model.tp_plan = {'layers.*.mlp.up_proj': 'colwise', ...})"
        )
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        style = given.get(_without_numbers(name))
        for leaf, _ in module.named_parameters(recurse=False):
            own = given.get(_without_numbers(f"{name}.{leaf}"), style)
            if own is not None:
                found[f"{name}.{leaf}"] = own
        if style is not None:
            found[name] = style
    return found


def _without_numbers(name: str) -> str:
    """A name as a plan has it: ``layers.3.mlp`` is ``layers.*.mlp``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def shard(model: nn.Module, devices: DeviceMesh) -> None:
    """Spread a model over a mesh in place: FSDP2 for each block and for what is left, over all but ``tp``."""
    from torch.distributed.fsdp import fully_shard

    names = devices.mesh_dim_names or ()
    if "tp" in names:
        others = tuple(name for name in names if name != "tp")
        devices = devices[others]
    for block in blocks_of(model):
        fully_shard(block, mesh=devices)
    fully_shard(model, mesh=devices)


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in one step, in bytes, with rings.

    Attributes:
        gather: Weights that are gathered, in the forward and in the backward.
        scatter: Gradients that are reduced and scattered.
        reduce: Gradients that are reduced over copies of the model, and activations over parts of layers.
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
        peak: The most that is live at once: less than the sum where parts are not live together, and with
            the temporaries of operations.
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


def takes_text(model: nn.Module) -> bool:
    """Whether a model is one of transformers that takes ids of tokens."""
    return hasattr(model, "config") and "input_ids" in inspect.signature(model.forward).parameters


def step_inputs(
    model: nn.Module, example_inputs: Any, *, batch: int, sequence: int
) -> dict[str, Any]:
    """Make the arguments of a training step: stand-ins of the right shapes, on the meta device.

    Args:
        model: A model. One of transformers that takes ``input_ids`` gets ids, and labels where those make its
            loss; no padding, no cache.
        example_inputs: For any other model, arguments of a call whose first axis is the batch.
        batch: Samples.
        sequence: Tokens of a sample.

    Raises:
        ConfigError: There are no example inputs and the model takes no ``input_ids``.
    """
    takes = inspect.signature(model.forward).parameters
    if takes_text(model):
        ids = torch.empty(batch, sequence, dtype=torch.long, device="meta")
        given: dict[str, Any] = {"input_ids": ids}
        if "labels" in takes and type(model).__name__.endswith(_GENERATING):
            given["labels"] = ids
        if "use_cache" in takes:
            given["use_cache"] = False
        return given
    if example_inputs is None:
        raise ConfigError(
            f"{type(model).__name__} takes no input_ids, and does not say what it takes: --inputs "
            "MODULE:CALLABLE gives example inputs"
        )
    return {
        name: torch.empty((batch, *value.shape[1:]), dtype=value.dtype, device="meta")
        if isinstance(value, Tensor) and value.dim()
        else value
        for name, value in named_inputs(model, example_inputs).items()
    }


def plan_step(
    model: nn.Module,
    config: LoraConfig,
    mesh: Mesh,
    inputs: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
) -> Need:
    """Find what a step of AdamW needs on each GPU of a mesh.

    Args:
        model: On any device; nothing of it is read but names, shapes and dtypes. It is not changed.
        config: What to adapt.
        mesh: The GPUs.
        inputs: Keyword arguments of one call, what one GPU, or group of ``tp``, gets in a
            step. Tensors of any device.
        dtype: Of the floating parameters and inputs; None for their own.
        checkpointing: Whether blocks are computed again in the backward, for a model that can be told so
            (``gradient_checkpointing_enable``).

    Raises:
        ConfigError: A process group is there already, the model cannot checkpoint, or it cannot be cut over
            ``tp``.
        LoraFxError: As :func:`lora_fx.rewrite`.
    """
    fake = torch_private.fake_tensors()

    with contextlib.ExitStack() as around:
        around.enter_context(_fake_group(mesh.size))
        devices = devices_of(mesh)
        if mesh.tp > 1:
            model = share_copy(model)
            _empty_all(model, "meta")
            parallelize(model, devices)
        rewritten = rewrite(model, config)
        recompute: Any = getattr(rewritten, "gradient_checkpointing_enable", None)
        if checkpointing and recompute is None:
            raise ConfigError(
                f"{type(model).__name__} has no gradient_checkpointing_enable: leave out --checkpointing"
            )
        around.enter_context(fake.FakeTensorMode(allow_non_fake_inputs=True))
        around.enter_context(_FlashAttention())
        around.enter_context(_no_masks())
        _empty_all(rewritten, "cpu", dtype)
        if checkpointing:
            # The backward goes on without the mode that attention is computed in.
            again = {
                "use_reentrant": False,
                "context_fn": lambda: (contextlib.nullcontext(), _FlashAttention()),
            }
            recompute(gradient_checkpointing_kwargs=again)
        rewritten.train()
        if mesh.size > mesh.tp:
            # It makes a mesh of two, and the ranks in that are read. Parts of stand-ins are stand-ins.
            with fake.unset_fake_temporarily():
                shard(rewritten, devices)
        given = {
            name: _empty(value, "cpu", dtype) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        return run_step(rewritten, given)


def run_step(
    model: nn.Module, inputs: dict[str, Any], settle: Callable[[], None] | None = None
) -> Need:
    """Run two steps of a model, and count the second: the first one makes what is there from then on.

    Args:
        model: A rewritten model, sharded or not, on real tensors or stand-ins.
        inputs: Keyword arguments of one call.
        settle: Called before what is kept is counted. Real processes wait here until the threads of their
            backend have let go of what they sent.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ledger = Ledger()
    ledger.hold([*model.parameters(), *model.buffers()])
    settle = settle or (lambda: None)
    kept = gradients = 0
    with ledger:
        for _ in range(2):
            ledger.peak = ledger.gathered = 0
            ledger.sent.clear()
            ledger.calls.clear()
            settle()
            before = ledger.live
            loss = _loss(model(**inputs))
            settle()
            kept = ledger.live - before - ledger.live_gathered
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            gradients = _nbytes([p.grad for p in trained if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    state = [v for one in optimizer.state.values() for v in one.values() if isinstance(v, Tensor)]
    sent = ledger.sent
    return Need(
        weights=_nbytes([*frozen, *model.buffers()]),
        adapters=_nbytes(trained),
        gradients=gradients,
        optimizer=_nbytes(state),
        activations=kept,
        gathered=ledger.gathered,
        peak=ledger.peak,
        traffic=Traffic(
            sent["gather"], sent["scatter"], sent["reduce"], sum(ledger.calls.values())
        ),
    )


def _loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    tensors = [
        one for one in pytree.tree_leaves(output) if isinstance(one, Tensor) and one.requires_grad
    ]
    if not tensors:
        raise ConfigError(
            "no output of the model depends on what is trained: there is no step to plan"
        )
    return torch.stack([one.float().mean() for one in tensors]).sum()


def _empty_all(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> None:
    """Replace each parameter and buffer by an empty one; shared ones stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in made:
                    new = _empty(value, device, dtype if isinstance(value, nn.Parameter) else None)
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=value.requires_grad)
                    made[id(value)] = new
                held[name] = made[id(value)]


def _empty(value: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(
        value, device=device, dtype=dtype if value.is_floating_point() else None
    )


class _FlashAttention(Listener):
    """Has attention keep what a flash kernel keeps: stand-ins get the one that keeps every probability."""

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answers for attention."""
        if func is not nn.functional.scaled_dot_product_attention:
            return NotImplemented
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
    width = value.shape[-1]
    if width < query.shape[-1]:  # flash kernels take one width
        value = nn.functional.pad(value, (0, query.shape[-1] - width))
    result: Tensor = torch_private.FLASH_ATTENTION_CPU(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result[..., :width]


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

    if dist.is_initialized():
        raise ConfigError(
            "a process group is there already: plan before init_process_group, or in another process"
        )
    dist.init_process_group("fake", rank=0, world_size=size, store=torch_private.fake_store())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # They hold meshes, which equal those of the next group, and name groups that are no more.
        torch_private.forget_sharding()


class Ledger(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The live storages of a piece of code: it sees every operation below autograd, real or fake.

    Attributes:
        peak: The most bytes that were live at once.
        gathered: The most bytes of gathered weights that were live at once.
        sent: Bytes that this process sends, by collective, if each is a ring (NCCL's choice for large ones):
            (n - 1) / n of the whole for a gather or a scatter, twice that for a reduction.
        calls: How many collectives there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.gathered = 0
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, Any] = {}
        self._gathered: set[int] = set()
        self._live = 0
        # A storage may die in a thread of the backend: that thread only says so here.
        self._dead: deque[int] = deque()

    @property
    def live(self) -> int:
        """Bytes that are live now."""
        self._look_again()
        return self._live

    @property
    def live_gathered(self) -> int:
        """Those of them that are gathered weights."""
        self._look_again()
        return self._held()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(one, torch.distributed.tensor.DTensor) for one in types):
            return NotImplemented  # it comes back with the local tensors
        name, space = func.overloadpacket.__name__, func.namespace
        if space in ("c10d", "_c10d_functional"):
            self._look_again()
            self._count(name, args)
        result = func(*args, **kwargs)
        if name == "wait_tensor" and _key(result) != _key(args[0]):
            return args[0]  # the wait for a stand-in makes a second one
        written = [one for one in pytree.tree_leaves((result, args, kwargs)) if _is_tensor(one)]
        self._bury()
        for tensor in written:
            self._see(tensor)
        weights = name in _GATHERS and space == "c10d"
        if weights or (space == "fsdp" and name in _FILLS):
            made = [kwargs.get("out"), args[:1], result] if weights else [result, kwargs]
            self._gathered |= {_key(one) for one in pytree.tree_leaves(made) if _is_tensor(one)}
        self.peak = max(self.peak, self._live)
        if self._gathered:
            self.gathered = max(self.gathered, self._held())
        return result

    def _held(self) -> int:
        return sum(self._sizes.get(key, 0) for key in self._gathered)

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, torch.distributed.tensor.DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = _key(tensor)
        reference = self._refs.get(key)
        if reference is None or reference() is None:
            self._bury()
            self._refs[key] = weakref.ref(storage, lambda _: self._dead.append(key))
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _bury(self) -> None:
        """Take off the count what has died."""
        while self._dead:
            key = self._dead.popleft()
            self._live -= self._sizes.pop(key, 0)
            self._refs.pop(key, None)
            self._gathered.discard(key)

    def _look_again(self) -> None:
        """FSDP frees a gathered weight by resizing its storage, which is no operation."""
        self._bury()
        for key, reference in list(self._refs.items()):
            storage = reference()
            if storage is not None:
                self._set(key, storage.nbytes())

    def _count(self, name: str, args: Any) -> None:
        tensors = [one for one in pytree.tree_leaves(args) if _is_tensor(one)]
        sizes = sorted(one.numel() * one.element_size() for one in tensors)
        if name in (*_GATHERS, *_SCATTERS) and sizes[0]:
            kind, members = "gather" if name in _GATHERS else "scatter", _members(args)
            self.calls[kind] += 1
            # Functional ones are given no output.
            whole = (
                sizes[0] * (members if kind == "gather" else 1) if len(sizes) == 1 else sizes[-1]
            )
            self.sent[kind] += whole * (members - 1) // members
        elif name in _REDUCES:
            members = _members(args)
            self.calls["reduce"] += 1
            self.sent["reduce"] += 2 * sum(sizes) * (members - 1) // members


def _members(args: Any) -> int:
    for one in pytree.tree_leaves(args):
        if isinstance(one, str) and one not in ("sum", "avg", "max", "min", "product"):
            return torch_private.group_size(one)
        if isinstance(one, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return int(torch.distributed.ProcessGroup.unbox(one).size())
    return torch.distributed.get_world_size()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _key(tensor: Tensor) -> int:
    return torch_private.storage_key(tensor.untyped_storage())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once; of a sharded one, what lies here."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = (
            tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
        )
        found[_key(local)] = local.untyped_storage().nbytes()
    return sum(found.values())
