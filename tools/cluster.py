"""Memory and traffic of a training step on each GPU of a cluster, computed without the GPUs.

One step of the sharded model runs on fake tensors without memory, in a fake process group that sends nothing.
PyTorch's own FSDP2, optimizer and autograd run as on rank 0 of a group of any size. The kept, gathered and
sent bytes are counted as they occur.
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
from torch.distributed.tensor import DTensor

from lora_fx import torch_private
from lora_fx.api import rewrite
from lora_fx.config import LoraConfig
from lora_fx.errors import ConfigError, LoraFxError
from lora_fx.formats import PackedTensor
from lora_fx.ir import Loss, Memory
from lora_fx.passes.capture import Listener, named_inputs
from lora_fx.passes.graph import share_copy
from lora_fx.runtime.memory import blocks, offload
from lora_fx.torch_private import pytree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "OPTIMIZERS",
    "Ledger",
    "Mesh",
    "Need",
    "Settings",
    "Traffic",
    "devices_of",
    "parallelize",
    "plan_step",
    "run_step",
    "shard",
    "step_inputs",
    "takes_text",
    "tensors_inside",
    "without_memory",
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
        replicate: Number of groups that each hold a whole copy of the model (HSDP, or DDP with ``fsdp=1``).
        fsdp: Number of GPUs, or groups of ``tp``, over which the weights of one copy are sharded.
        tp: Number of GPUs that compute parts of each layer, on the same samples (tensor parallelism).
    """

    replicate: int = 1
    fsdp: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read ``fsdp=8``, ``replicate=2,fsdp=8`` or ``fsdp=8,tp=2``.

        Raises:
            ConfigError: If an entry is not a dimension of a mesh, occurs twice, or has a size below 1.
        """
        sizes: dict[str, int] = {}
        for entry in text.split(","):
            match = _ENTRY.fullmatch(entry)
            if match is None or match["name"] not in _DIMENSIONS or not int(match["size"]):
                raise ConfigError(
                    f"--mesh {text!r}: {entry.strip()!r} is no dimension of a mesh: write fsdp=8, "
                    "replicate=2,fsdp=8 or fsdp=8,tp=2"
                )
            if match["name"] in sizes:
                raise ConfigError(f"--mesh {text!r}: {match['name']} is there twice")
            sizes[match["name"]] = int(match["size"])
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Return the number of GPUs."""
        return self.replicate * self.fsdp * self.tp

    def __str__(self) -> str:
        parts = [(name, getattr(self, name)) for name in _DIMENSIONS]
        return " x ".join(f"{name} {size}" for name, size in parts if size > 1) or "one GPU"


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that FSDP2 shards separately: the children of the outermost module lists."""
    pending: list[nn.Module] = [model]
    while pending:
        for child in pending.pop().children():
            if isinstance(child, nn.ModuleList):
                yield from (block for block in child if any(True for _ in block.parameters()))
            else:
                pending.append(child)


def devices_of(mesh: Mesh) -> DeviceMesh:
    """Return PyTorch's mesh for a :class:`Mesh`, over all members of the default process group."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if mesh.size != dist.get_world_size():
        raise ConfigError(f"the mesh has {mesh.size} members, the group {dist.get_world_size()}")
    names = [name for name in _DIMENSIONS if name == "fsdp" or getattr(mesh, name) > 1]
    sizes = tuple(getattr(mesh, name) for name in names)
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(names))


def parallelize(model: nn.Module, devices: DeviceMesh) -> None:
    """Split the layers of a transformers model over the ``tp`` dimension of a mesh, in place.

    The model's own tensor-parallel plan says which layers are split.

    Raises:
        ConfigError: If the mesh has no such dimension, the model has no plan, or the number of its heads is
            not a multiple of ``tp``.
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
    """Return a transformers model's tensor-parallel plan: the style of each split module or parameter."""
    patterns = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not isinstance(patterns, dict) or not patterns:
        raise ConfigError(
            f"tp: {type(model).__name__} has no tp_plan, by which transformers cuts its layers: leave tp out "
            "of the mesh, or give the model one (model.tp_plan = {'layers.*.mlp.up_proj': 'colwise', ...})"
        )
    styles: dict[str, str] = {}
    for name, module in model.named_modules():
        style = patterns.get(_without_numbers(name))
        for leaf, _ in module.named_parameters(recurse=False):
            own = patterns.get(_without_numbers(f"{name}.{leaf}"), style)
            if own is not None:
                styles[f"{name}.{leaf}"] = own
        if style is not None:
            styles[name] = style
    return styles


def _without_numbers(name: str) -> str:
    """Return a module's name with "*" for numbers, as in plans: ``layers.3.mlp`` becomes ``layers.*.mlp``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def shard(model: nn.Module, devices: DeviceMesh) -> None:
    """Shard a model over all dimensions of a mesh but ``tp``, in place, with FSDP2.

    Each block is sharded separately, then the remaining parameters.
    """
    from torch.distributed.fsdp import fully_shard

    names = devices.mesh_dim_names or ()
    if "tp" in names:
        sharded = tuple(name for name in names if name != "tp")
        devices = devices[sharded]
    for block in blocks_of(model):
        fully_shard(block, mesh=devices)
    fully_shard(model, mesh=devices)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in one step, with ring collectives.

    Attributes:
        gather: Bytes to gather weights, in the forward and in the backward.
        scatter: Bytes to reduce and scatter gradients.
        reduce: Bytes to reduce gradients over copies of the model, and activations over parts of layers.
        calls: Number of collectives.
    """

    gather: int = 0
    scatter: int = 0
    reduce: int = 0
    calls: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all bytes."""
        return self.gather + self.scatter + self.reduce


@dataclass(frozen=True)
class Need:
    """Memory of one GPU during a training step, in bytes.

    Attributes:
        weights: The GPU's shards of the frozen parameters, and the buffers.
        adapters: The GPU's shards of the trained parameters.
        gradients: Gradients of the trained parameters.
        optimizer: The optimizer's state for the trained parameters.
        activations: Tensors that the forward keeps for the backward, and its outputs.
        gathered: Largest number of bytes of sharded blocks that are gathered at once.
        peak: Largest number of bytes that are live at once, with temporaries of operations. It is below the
            sum of the other values, if these are not live together.
        host: Bytes in the memory of the host: the inputs of blocks that ``memory="least"`` moves there. Each
            is sent twice in a step.
        traffic: Bytes that the GPU sends in a step.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    host: int
    traffic: Traffic


def takes_text(model: nn.Module) -> bool:
    """Return True for a model of transformers that takes token ids."""
    return hasattr(model, "config") and "input_ids" in inspect.signature(model.forward).parameters


def step_inputs(
    model: nn.Module, example_inputs: Any, *, batch: int, sequence: int
) -> dict[str, Any]:
    """Make the arguments of a training step: tensors of the right shapes, on the meta device.

    Args:
        model: A model. A model of transformers that takes ``input_ids`` gets ids without padding and without
            a cache. If it generates text, it also gets labels.
        example_inputs: For any other model, arguments of a call whose first axis is the batch.
        batch: Number of samples.
        sequence: Tokens of a sample.

    Raises:
        ConfigError: If there are no example inputs and the model takes no ``input_ids``.
    """
    takes = inspect.signature(model.forward).parameters
    if takes_text(model):
        ids = torch.empty(batch, sequence, dtype=torch.long, device="meta")
        arguments: dict[str, Any] = {"input_ids": ids}
        if "labels" in takes and type(model).__name__.endswith(_GENERATING):
            arguments["labels"] = ids
        if "use_cache" in takes:
            arguments["use_cache"] = False
        return arguments
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


@dataclass(frozen=True)
class Settings:
    """Settings of a training step.

    Attributes:
        dtype: Dtype of floating-point parameters and inputs; None keeps the dtype of each.
        checkpointing: True to compute blocks again in the backward, for a model with
            ``gradient_checkpointing_enable``.
        memory, loss: See :func:`lora_fx.rewrite`.
        quantize: Format of the frozen weights; None for dense weights. See
            :func:`lora_fx.tools.planned_weights.quantized_without_values`.
        optimizer: One of :data:`OPTIMIZERS`.
    """

    dtype: torch.dtype | None = None
    checkpointing: bool = False
    memory: Memory = "fast"
    loss: Loss | None = None
    quantize: str | None = None
    optimizer: str = "adamw"


OPTIMIZERS = {
    "adamw": 2.0,
    "adamw_8bit": 0.5,
    "paged_adamw": 0.0,
    "paged_adamw_8bit": 0.0,
    "sgd": 0.0,
}
"""Size of each optimizer's state, relative to the size of the trained parameters in fp32.

AdamW of PyTorch has two tensors in the dtype of the parameters, and is counted while it runs. An 8-bit
optimizer has two bytes for each parameter. The state of a paged optimizer moves to the host if memory is
short, so it counts as 0.
"""


def plan_step(
    model: nn.Module,
    config: LoraConfig,
    mesh: Mesh,
    inputs: dict[str, Any],
    settings: Settings = Settings(),
    *,
    ledger: Ledger | None = None,
) -> Need:
    """Compute memory and traffic of a step on each GPU of a mesh.

    Args:
        model: Model on any device. Only names, shapes and dtypes are read, and it is not changed.
        config: Configuration of the adapter.
        mesh: The GPUs.
        inputs: Keyword arguments of the call that one GPU, or group of ``tp``, makes in a step. Tensors may
            be on any device.
        settings: Settings of the step.
        ledger: Ledger that counts; None makes one.

    Raises:
        ConfigError: If a process group already exists, the model cannot checkpoint, or it cannot be split
            over ``tp``.
        LoraFxError: As :func:`lora_fx.rewrite`.
    """
    ledger = ledger or Ledger()
    with contextlib.ExitStack() as around:
        device = "meta"
        if mesh.size > 1:
            # FSDP2 and tensor parallelism need fake tensors, which have a device.
            device = "cpu"
            around.enter_context(_fake_group(mesh.size))
        around.enter_context(_flash_in_transformers())
        rewritten = _rewritten(model, config, mesh, settings)
        if mesh.size > 1:
            fakes = torch_private.fake_tensors().FakeTensorMode(allow_non_fake_inputs=True)
            around.enter_context(fakes)
        around.enter_context(_FlashAttention())
        # Blocks that are recomputed in the backward run outside of this mode, so they enter it again.
        around.enter_context(blocks.recomputing_in(_FlashAttention))
        around.enter_context(offload.simulated(ledger.host_copy))
        _empty_all(rewritten, device, settings.dtype)
        if settings.checkpointing:
            again = {
                "use_reentrant": False,
                "context_fn": lambda: (contextlib.nullcontext(), _FlashAttention()),
            }
            rewritten.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        rewritten.train()
        if mesh.size > mesh.tp:
            # FSDP2 reads the ranks of a mesh, which must be real. Shards of fake tensors stay fake.
            with torch_private.fake_tensors().unset_fake_temporarily():
                shard(rewritten, devices_of(mesh))
        empty = {
            name: _empty(value, device, settings.dtype) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        try:
            return run_step(rewritten, empty, optimizer=settings.optimizer, ledger=ledger)
        except LoraFxError:
            raise
        except Exception as error:
            raise ConfigError(
                f"a step of this {type(model).__name__} cannot be planned, because its code does not run on "
                f"tensors without values: {type(error).__name__}: {error}"
            ) from error


def without_memory(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model on the meta device, optionally with another dtype of its parameters."""
    result = share_copy(model)
    _empty_all(result, "meta", dtype)
    return result


def _rewritten(model: nn.Module, config: LoraConfig, mesh: Mesh, settings: Settings) -> Any:
    """Return the adapted and, if the settings say so, quantized or split model, on the meta device."""
    if settings.quantize is not None and mesh.size > 1:
        raise ConfigError("--quantize is planned on one GPU: leave --mesh out, or --quantize")
    model = without_memory(model, settings.dtype)
    if mesh.tp > 1:
        parallelize(model, devices_of(mesh))
    if settings.quantize is not None:
        from lora_fx.tools.planned_weights import quantized_without_values

        model = quantized_without_values(model, settings.quantize)
    rewritten = rewrite(model, config, memory=settings.memory, loss=settings.loss)
    if settings.checkpointing and not hasattr(rewritten, "gradient_checkpointing_enable"):
        raise ConfigError(
            f"{type(model).__name__} has no gradient_checkpointing_enable: leave out --checkpointing"
        )
    return rewritten


def run_step(
    model: nn.Module,
    inputs: dict[str, Any],
    settle: Callable[[], None] | None = None,
    *,
    optimizer: str = "adamw",
    ledger: Ledger | None = None,
) -> Need:
    """Run two steps of a model and measure the second, because the first one allocates lasting state.

    Args:
        model: A rewritten model, sharded or not, with real or fake tensors.
        inputs: Keyword arguments of one call.
        settle: Called before kept bytes are counted. Real processes wait here until their backend's threads
            have released the tensors that they sent.
        optimizer: One of :data:`OPTIMIZERS`.
        ledger: Ledger that counts; None makes one.
    """
    ledger = ledger or Ledger()
    trained = [p for p in model.parameters() if p.requires_grad]
    stepping: torch.optim.Optimizer = torch.optim.SGD(trained, lr=1e-4)
    state = torch.empty(0)
    if optimizer == "adamw":
        stepping = torch.optim.AdamW(trained, lr=1e-4)
    else:
        count = sum(p.numel() for p in trained)
        state = torch.empty(
            int(4 * OPTIMIZERS[optimizer] * count), dtype=torch.uint8, device="meta"
        )
        ledger.hold([state])
    ledger.hold([*model.parameters(), *model.buffers()])
    settle = settle or (lambda: None)
    kept = gradients = 0
    with ledger:
        for _ in range(2):
            ledger.peak = ledger.gathered = ledger.host = 0
            ledger.sent.clear()
            ledger.calls.clear()
            settle()
            ledger.begin("forward", model, stepping)
            before = ledger.live
            loss = _loss(model(**inputs))
            settle()
            kept = ledger.live - before - ledger.live_gathered
            ledger.begin("backward", model, stepping)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            gradients = _nbytes([p.grad for p in trained if p.grad is not None])
            ledger.begin("optimizer", model, stepping)
            stepping.step()
            stepping.zero_grad()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    states = [
        v for entries in stepping.state.values() for v in entries.values() if isinstance(v, Tensor)
    ]
    sent = ledger.sent
    return Need(
        weights=_nbytes([*frozen, *model.buffers()]),
        adapters=_nbytes(trained),
        gradients=gradients,
        optimizer=_nbytes([*states, state]),
        activations=kept,
        gathered=ledger.gathered,
        peak=ledger.peak,
        host=ledger.host,
        traffic=Traffic(
            sent["gather"], sent["scatter"], sent["reduce"], sum(ledger.calls.values())
        ),
    )


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [
        tensor
        for tensor in pytree.tree_leaves(output)
        if isinstance(tensor, Tensor) and tensor.requires_grad
    ]
    if not tensors:
        raise ConfigError(
            "no output of the model depends on what is trained: there is no step to plan"
        )
    return torch.stack([tensor.float().mean() for tensor in tensors]).sum()


def _empty_all(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> None:
    """Replace each parameter and buffer by an empty tensor on a device. Shared tensors stay shared."""
    replacements: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is None or isinstance(value.data, PackedTensor):
                    continue
                if id(value) not in replacements:
                    new = _empty(value, device, dtype if isinstance(value, nn.Parameter) else None)
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=value.requires_grad)
                    replacements[id(value)] = new
                tensors[name] = replacements[id(value)]


def _empty(value: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(
        value, device=device, dtype=dtype if value.is_floating_point() else None
    )


class _FlashAttention(Listener):
    """Listener that makes attention save the same tensors as a flash kernel.

    With fake tensors, PyTorch would choose a kernel that saves all attention probabilities.
    """

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute calls of scaled dot-product attention as a flash kernel; leave others to PyTorch."""
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
    del enable_gqa  # the kernel accepts fewer heads of keys than of queries
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    width = value.shape[-1]
    if width < query.shape[-1]:  # flash kernels need equal widths
        value = nn.functional.pad(value, (0, query.shape[-1] - width))
    result: Tensor = torch_private.FLASH_ATTENTION_CPU(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result[..., :width]


@contextlib.contextmanager
def _flash_in_transformers() -> Iterator[None]:
    """Make transformers omit attention masks, as it does without padding, and use a flash kernel.

    transformers reads the mask's values to detect padding, and tensors without memory have no values. Some
    models (gpt-oss, with its sinks) compute all attention scores on a CPU, but have a flash kernel on a GPU.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from transformers import masking_utils, modeling_utils

    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS
    tracing = vars(masking_utils).get("is_tracing")
    for name in _ATTENTIONS:
        masks[name] = lambda *_, **__: None
    functions["eager"] = _eager_flash
    if tracing is not None:
        masking_utils.is_tracing = lambda *_: True
    try:
        yield
    finally:
        for name in _ATTENTIONS:
            del masks[name]
        del functions["eager"]
        if tracing is not None:
            masking_utils.is_tracing = tracing


_ATTENTIONS = ("sdpa", "eager")


def _eager_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers that saves the same tensors as a flash kernel."""
    result = _flash(query, key, value, None, dropout, True, scaling)
    return result.transpose(1, 2).contiguous(), None


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
        # PyTorch caches meshes. A cached mesh may equal a mesh of the next group, but it refers to destroyed
        # groups.
        torch_private.forget_sharding()


class Ledger(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that tracks the live storages of a piece of code, real or fake.

    Attributes:
        peak: Most bytes that were live at once.
        gathered: Most bytes of gathered weights that were live at once.
        sent: Bytes that this process sends, by collective, if each is a ring (NCCL's choice for large ones):
            (n - 1) / n of the whole for a gather or a scatter, twice that for a reduction.
        calls: Number of collectives, by kind.
        host: Bytes that were copied to the memory of the host, and do not count as live.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.gathered = self.host = 0
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._on_host: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, Any] = {}
        self._gathered: set[int] = set()
        self._live = 0
        # A storage may be freed in a thread of the backend, which only records its key here.
        self._dead: deque[int] = deque()

    @property
    def live(self) -> int:
        """Return the bytes of the live storages."""
        self._refresh_sizes()
        return self._live

    @property
    def live_gathered(self) -> int:
        """Return the live bytes of gathered weights."""
        self._refresh_sizes()
        return self._held()

    def host_copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in the host's memory. Its bytes do not count as live on the GPU."""
        with torch_private.disable_dispatch_modes():
            copy = tensor.clone()
        self._on_host.add(_key(copy))
        self.host += copy.untyped_storage().nbytes()
        self._record(copy)
        return copy

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that existed before the ledger, such as the parameters, as live."""
        for tensor in tensors:
            self._record(tensor)

    def begin(self, phase: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note that a phase begins: ``"forward"``, ``"backward"`` or ``"optimizer"``.

        This does nothing. Subclasses may override it.
        """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, _OUTER) for kind in types):
            return (
                NotImplemented  # the tensor subclass runs the operation again on its inner tensors
            )
        name, space = func.overloadpacket.__name__, func.namespace
        if space in ("c10d", "_c10d_functional"):
            self._refresh_sizes()
            self._count(name, args)
        result = func(*args, **kwargs)
        if name == "wait_tensor" and _key(result) != _key(args[0]):
            return args[
                0
            ]  # waiting for a fake tensor returns a second tensor, which would count twice
        if name == torch_private.LAZY_CLONE:
            return result  # it shares its memory until either tensor is written
        written = [leaf for leaf in pytree.tree_leaves((result, args, kwargs)) if _is_tensor(leaf)]
        self._drop_freed()
        for tensor in written:
            self._record(tensor)
        weights = name in _GATHERS and space == "c10d"
        if weights or (space == "fsdp" and name in _FILLS):
            outputs = [kwargs.get("out"), args[:1], result] if weights else [result, kwargs]
            self._gathered |= {_key(x) for x in pytree.tree_leaves(outputs) if _is_tensor(x)}
        self.peak = max(self.peak, self._live)
        if self._gathered:
            self.gathered = max(self.gathered, self._held())
        return result

    def _held(self) -> int:
        return sum(self._sizes.get(key, 0) for key in self._gathered)

    def _record(self, tensor: Tensor) -> None:
        if isinstance(tensor, _OUTER):
            for inside in tensors_inside(tensor):
                self._record(inside)
            return
        storage = tensor.untyped_storage()
        key = _key(tensor)
        reference = self._refs.get(key)
        if reference is None or reference() is None:
            self._drop_freed()
            self._refs[key] = weakref.ref(storage, lambda _: self._dead.append(key))
        self._set(key, self._live_bytes(key, storage))

    def _live_bytes(self, key: int, storage: torch.UntypedStorage) -> int:
        return 0 if key in self._on_host else storage.nbytes()

    def _set(self, key: int, size: int) -> None:
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _drop_freed(self) -> None:
        """Subtract the bytes of storages that were freed from the live bytes."""
        while self._dead:
            self._forget(self._dead.popleft())

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
        self._refs.pop(key, None)
        self._gathered.discard(key)
        self._on_host.discard(key)

    def _refresh_sizes(self) -> None:
        """Update the sizes of all live storages.

        FSDP frees a gathered weight without an operation, by resizing its storage.
        """
        self._drop_freed()
        for key, reference in list(self._refs.items()):
            storage = reference()
            if storage is not None:
                self._set(key, self._live_bytes(key, storage))

    def _count(self, name: str, args: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(args) if _is_tensor(leaf)]
        sizes = sorted(tensor.numel() * tensor.element_size() for tensor in tensors)
        if name in (*_GATHERS, *_SCATTERS) and sizes[0]:
            kind, members = "gather" if name in _GATHERS else "scatter", _members(args)
            self.calls[kind] += 1
            # A functional collective has no output tensor among its arguments.
            whole = (
                sizes[0] * (members if kind == "gather" else 1) if len(sizes) == 1 else sizes[-1]
            )
            self.sent[kind] += whole * (members - 1) // members
        elif name in _REDUCES:
            members = _members(args)
            self.calls["reduce"] += 1
            self.sent["reduce"] += 2 * sum(sizes) * (members - 1) // members


def _members(args: Any) -> int:
    for leaf in pytree.tree_leaves(args):
        if isinstance(leaf, str) and leaf not in ("sum", "avg", "max", "min", "product"):
            return torch_private.group_size(leaf)
        if isinstance(leaf, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):
                return int(torch.distributed.ProcessGroup.unbox(leaf).size())
    return torch.distributed.get_world_size()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _key(tensor: Tensor) -> int:
    return torch_private.storage_key(tensor.untyped_storage())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once. Only local parts of shards count."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for inside in tensors_inside(tensor):
            sizes[_key(inside)] = inside.untyped_storage().nbytes()
    return sum(sizes.values())


_OUTER = (DTensor, PackedTensor)


def tensors_inside(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that hold the memory of a tensor: itself, its local shard, or a format's parts."""
    value = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if isinstance(value, PackedTensor):
        yield from value.parts.values()
    else:
        yield value.to_local() if isinstance(value, DTensor) else tensor
