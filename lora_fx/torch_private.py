"""Every private name of PyTorch that lora-fx uses, with its purpose.

Private names change without notice. They are all here, so that a new release of PyTorch can break only this
module, and ``tests/lora_fx/test_torch_private.py`` reports the missing name. ``nn.Module._parameters``,
``_buffers`` and ``_modules`` are the exception: they are as old as ``nn.Module`` and used everywhere.

Before you add a name, look for a public one. Modules that load slowly are imported inside a function.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree
from torch.utils._contextlib import _DecoratorContextManager as DecoratorContextManager
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as disable_dispatch_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as dispatch_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

__all__ = [
    "CHATTY_LOGGERS",
    "CHECKPOINTED_MODULE",
    "COMPILED_CALL",
    "FLASH_ATTENTION",
    "FLASH_ATTENTION_CPU",
    "FLATTENED_MODULE",
    "FORWARD_HOOKS",
    "GROUPED_MM",
    "GROUPED_MM_FUNCTIONS",
    "HOOK_WRAPPER",
    "IS_ALL_TRUE",
    "IS_ANY_TRUE",
    "LAZY_CLONE",
    "MODULE_HOOKS",
    "NO_MODULE",
    "ORIGINAL_MODULE",
    "OUTPUT_PADDING",
    "REPLACEMENT_METHOD",
    "SET_GRAD_ENABLED",
    "SPARSE_PARTS",
    "TENSOR_HOOKS",
    "TO_COPY",
    "UNSAFE_VIEW",
    "BatchNorm",
    "DecoratorContextManager",
    "DisableTorchFunctionSubclass",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "after_backward",
    "all_reduce",
    "as_parameter",
    "assert_true",
    "attention_choice",
    "built_in_functions",
    "by_public_names",
    "codegen_of",
    "compiled_module_class",
    "data_address",
    "disable_dispatch_modes",
    "dispatch_mode",
    "dispatch_modes",
    "export_tracer",
    "fake_store",
    "fake_tensors",
    "forget_sharding",
    "forward_pre_hooks",
    "fsdp_chose_resharding",
    "fsdp_groups",
    "fsdp_owner",
    "fsdp_precision",
    "fsdp_size",
    "fsdp_spec",
    "fsdp_state",
    "group_size",
    "group_store",
    "has_global_hooks",
    "has_kernel",
    "has_triton",
    "in_autocast",
    "in_backward",
    "in_dynamo",
    "in_export",
    "in_forward_ad",
    "in_functorch",
    "in_functorch_level",
    "in_fx_trace",
    "in_jit_trace",
    "in_selective_checkpoint",
    "is_assertion",
    "is_composite",
    "is_distributed",
    "is_fake",
    "is_flat",
    "is_left_aligned",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "lazy_clone",
    "load_hooks",
    "local_tensor",
    "make_constant",
    "make_subclass",
    "make_uncompilable",
    "make_wrapper_subclass",
    "next_node_number",
    "original_module",
    "output_padding_of",
    "outside_of_transforms",
    "overload_name",
    "parameter_hooks",
    "projects_at_once",
    "pytree",
    "reduce_parameter",
    "remove_forward_hooks",
    "running_node_number",
    "saved_tensor_hooks",
    "schema_of",
    "state_hooks",
    "storage_key",
    "storage_users",
    "sympy_functions",
    "tracer_class",
    "transient_buffers",
    "unit_attributes",
    "unwrap_functorch",
    "version_counter",
    "view_base",
    "wrapped_functions",
]

_T = TypeVar("_T")

# --- dispatch, and functions that override torch ------------------------------------------------

DisableTorchFunctionSubclass: Final[Callable[[], AbstractContextManager[None]]] = (
    torch._C.DisableTorchFunctionSubclass
)
"""Context in which subclasses of Tensor are plain tensors to PyTorch's functions."""


def schema_of(operator: Any) -> Any:
    """Return the schema of an operator: its name, its arguments, and the arguments that it writes into."""
    return operator._schema


def overload_name(operator: Any) -> str:
    """Return the name of an operator's overload, ``"Tensor"`` in ``aten.add.Tensor``."""
    return str(operator._overloadname)


def is_composite(operator: Any) -> bool:
    """Return True for an operator without a kernel, because it calls other operators."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    )


def has_kernel(operator: Any) -> bool:
    """Return True if the dispatcher has an overload; some exist only in TorchScript."""
    return bool(torch._C._dispatch_has_kernel(operator.name()))


# --- tracing, compiling, torch.func -------------------------------------------------------------


def in_jit_trace() -> bool:
    """Return True while ``torch.jit.trace`` records. ``torch.jit.is_tracing`` is deprecated."""
    return bool(torch._C._is_tracing())


def in_autocast() -> bool:
    """Return True while autocast is on for any kind of device."""
    return bool(torch._C._is_any_autocast_enabled())


def in_fx_trace() -> bool:
    """Return True while a tracer of ``torch.fx`` runs code."""
    return bool(torch.fx._symbolic_trace.is_fx_symbolic_tracing())


def in_functorch() -> bool:
    """Return True inside a transform of ``torch.func``, also while Dynamo traces one."""
    return bool(torch._C._are_functorch_transforms_active())


def in_functorch_level() -> bool:
    """Return True inside a transform of ``torch.func`` that runs, but not while Dynamo traces one."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Compute as if no transform of ``torch.func`` were running."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def is_transformed(tensor: Tensor) -> bool:
    """Return True for a tensor that a transform of ``torch.func`` has wrapped."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def in_forward_ad() -> bool:
    """Return True inside ``torch.autograd.forward_ad.dual_level``."""
    return bool(forward_ad._current_level >= 0)


def unwrap_functorch(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of ``torch.func``'s transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def in_dynamo() -> bool:
    """Return True while Dynamo intercepts Python frames."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


_DYNAMO_SAYS_EXPORT: Final = torch.__version__ < "2.12"


def in_export() -> bool:
    """Return True while ``torch.export`` traces."""
    # Dynamo of PyTorch 2.11 reports is_exporting() as True in any compilation.
    return torch.compiler.is_exporting() and not (
        _DYNAMO_SAYS_EXPORT and torch.compiler.is_dynamo_compiling()
    )


def compiled_module_class() -> type[nn.Module]:
    """Return the class of ``torch.compile(module)``. Loads Dynamo."""
    return torch._dynamo.OptimizedModule


ORIGINAL_MODULE: Final = "_orig_mod"
"""Attribute of a compiled module: the original module. It is part of the names in the state dict."""


CHECKPOINTED_MODULE: Final = "_checkpoint_wrapped_module"
"""Attribute of a wrapper of ``apply_activation_checkpointing``: the wrapped module."""


FLATTENED_MODULE: Final = "_fsdp_wrapped_module"
"""Attribute of a wrapper of FSDP1 (``FullyShardedDataParallel``): the wrapped module."""


def original_module(compiled: Any) -> nn.Module:
    """Return the original module of a compiled module."""
    module: nn.Module = compiled._orig_mod
    return module


COMPILED_CALL: Final = "_compiled_call_impl"
"""Attribute of a module on which ``module.compile()`` was called: the compiled call."""


def make_constant(function: _T) -> _T:
    """Mark a function so that Dynamo does not trace it, but runs it once and uses its result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but loads Dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def make_uncompilable(function: _T, reason: str) -> _T:
    """Mark a function so that Dynamo breaks its graph at it, with a reason for the user.

    ``torch.compiler.disable`` does the same, but loads Dynamo, which takes seconds.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return function


def is_fake(tensor: Tensor) -> bool:
    """Return True for a fake tensor, which has no values, as in ``torch.export``."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def fake_tensors() -> ModuleType:
    """Return the module with ``FakeTensorMode`` and ``unset_fake_temporarily``."""
    from torch._subclasses import fake_tensor

    return fake_tensor


# --- autograd -----------------------------------------------------------------------------------


def in_selective_checkpoint() -> bool:
    """Return True inside a function that runs under selective activation checkpointing.

    Checkpointing may then keep the results of some operations.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    checkpoint = torch.utils.checkpoint
    kinds = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return any(isinstance(mode, kinds) for mode in dispatch_modes())


def in_backward() -> bool:
    """Return True while a backward pass runs in this thread, such as when a checkpoint is recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


def next_node_number() -> int:
    """Return the sequence number of the autograd node that this thread makes next. Numbers increase."""
    return int(torch._C._autograd._get_sequence_nr())


def running_node_number() -> int | None:
    """Return the sequence number of the autograd node that runs in this thread, or None if no node runs."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


SET_GRAD_ENABLED: Final = torch._C._set_grad_enabled
"""Function that ``torch.no_grad``, ``enable_grad`` and ``set_grad_enabled`` call."""


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` at the end of the current backward pass."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(callback)


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the pair of hooks of the innermost ``saved_tensors_hooks``, or None."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks  # type: ignore[no-any-return]


def version_counter(tensor: Tensor) -> int:
    """Return the version counter of a tensor: the number of writes into it."""
    return tensor._version


def view_base(tensor: Tensor) -> Tensor:
    """Return the base of a view in autograd, or the tensor itself if it is no view."""
    base = tensor._base if tensor._is_view() else tensor
    assert base is not None
    return base


# --- memory of tensors --------------------------------------------------------------------------


def data_address(tensor: Tensor) -> int:
    """Return the address of a tensor's first byte.

    ``data_ptr`` would copy memory that a lazy clone shares, because its caller could write there.
    """
    library: Any = torch._C
    return int(library._data_address(tensor))


TENSOR_HOOKS: Final = "_backward_hooks"
"""Attribute of a tensor with the hooks on its gradient."""

LAZY_CLONE: Final = "_lazy_clone"
"""Name of the operator that :func:`lazy_clone` calls."""


def lazy_clone(tensor: Tensor) -> Tensor:
    """Return a copy that shares its memory until one of the two is written.

    Raises:
        RuntimeError: If the storage cannot be shared in this way.
    """
    return torch._lazy_clone(tensor)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return an identifier of a storage while it is alive. The Python objects of a storage are temporary."""
    return int(storage._cdata)


def storage_users(tensor: Tensor) -> int:
    """Return the number of objects that hold the storage of a tensor, including the tensor."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def make_subclass(cls: type[Tensor], data: Tensor, requires_grad: bool = False) -> Any:
    """Return ``data`` as an object of a subclass whose ``__new__`` does not run."""
    return torch.Tensor._make_subclass(cls, data, requires_grad)


def make_wrapper_subclass(cls: type[Tensor], shape: Any, **options: Any) -> Any:
    """Return an object of a subclass without memory; ``dtype``, ``device``, ``strides`` are options."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, **options)


def as_parameter(tensor: Tensor) -> Tensor:
    """Mark a tensor of a subclass as an ``nn.Parameter``, and return it."""
    tensor._is_param = True
    return tensor


def is_assertion(target: Any) -> bool:
    """Return True for an operator in an exported graph that asserts a value or the metadata of a tensor."""
    return "_assert" in str(target)


def reduce_parameter(parameter: Any) -> tuple[Any, ...]:
    """Return the ``__reduce__`` value of a parameter of a subclass whose attributes are its state."""
    plain = parameter.detach().as_subclass(torch.Tensor)
    arguments: tuple[Any, ...] = (plain, parameter.requires_grad, OrderedDict())
    state = torch._utils._get_obj_state(parameter)  # type: ignore[no-untyped-call]
    return (
        torch._tensor._rebuild_from_type_v2,
        (torch._utils._rebuild_parameter, type(parameter), arguments, state),
    )


# --- operators ----------------------------------------------------------------------------------

UNSAFE_VIEW: Final = torch.ops.aten._unsafe_view.default
"""``view`` whose result autograd and ``torch.compile`` do not treat as an alias of its input."""

TO_COPY: Final = torch.ops.aten._to_copy.default
"""The operator for ``Tensor.to`` under ``torch.export``."""


IS_ALL_TRUE: Final = torch.ops.aten._is_all_true.default
IS_ANY_TRUE: Final = torch.ops.aten._is_any_true.default
"""Reductions of a condition that ``torch._check`` adds to a graph."""

FLASH_ATTENTION: Final = torch.ops.aten._scaled_dot_product_flash_attention.default
FLASH_ATTENTION_CPU: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""The kernels that ``F.scaled_dot_product_attention`` prefers."""

GROUPED_MM: Final = torch.ops.aten._grouped_mm.default
"""Products of groups of rows, each with its own matrix."""

GROUPED_MM_FUNCTIONS: Final[tuple[Any, ...]] = (F.grouped_mm, torch._grouped_mm, GROUPED_MM)
"""The functions with which models call :data:`GROUPED_MM`."""


def attention_choice(*args: Any, **kwargs: Any) -> int:
    """Return the value of the ``SDPBackend`` that attention would choose for these arguments."""
    return int(torch._fused_sdp_choice(*args, **kwargs))


def is_left_aligned(source: Tensor, keep: Tensor) -> bool:
    """Return True if a mask keeps the first tokens of each row and no others.

    The fast path of ``nn.TransformerEncoder`` requires this.
    """
    return bool(torch._nested_tensor_from_mask_left_aligned(source, keep))


def assert_true(condition: Any) -> None:
    """Make ``torch.export`` assume a condition on sizes."""
    torch._check(condition)  # type: ignore[no-untyped-call]


SPARSE_PARTS: Final = ("_values", "_indices")
"""Methods of a sparse COO tensor that also work if it is not coalesced."""


# --- modules ------------------------------------------------------------------------------------

FORWARD_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
MODULE_HOOKS: Final = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module with the hooks on its calls."""

HOOK_WRAPPER: Final = "_WrappedHook"
"""Class of PyTorch that wraps a hook with the module as an argument."""


def has_global_hooks() -> bool:
    """Return True if a hook is registered for the calls of all modules."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """Return the hooks that run before a module's forward."""
    return module._forward_pre_hooks


def remove_forward_hooks(module: nn.Module, *kinds: type) -> None:
    """Remove the forward hooks and forward pre-hooks of some classes; without classes, remove all."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if not kinds or isinstance(hook, kinds)]:
            for table in (
                hooks,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                table.pop(key, None)


def load_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """Return the hooks that run before a module loads its part of a state dict."""
    return module._load_state_dict_pre_hooks


def state_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """Return the hooks that run after a module has written its part of a state dict."""
    return module._state_dict_hooks


def parameter_hooks(parameter: Tensor) -> MutableMapping[int, Any]:
    """Return the hooks on the gradient of a tensor."""
    return getattr(parameter, "_backward_hooks", None) or {}


def transient_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def projects_at_once(attention: nn.MultiheadAttention) -> bool:
    """Return True for an attention layer with a single ``in_proj_weight`` for query, key and value."""
    return bool(attention._qkv_same_embed_dim)


OUTPUT_PADDING: Final = nn.ConvTranspose2d._output_padding
"""Method of transposed convolutions that returns the padding for an output size."""


def output_padding_of(cls: Any) -> Any:
    """Return :data:`OUTPUT_PADDING` of a class of transposed convolutions, which may override it."""
    return cls._output_padding


# --- torch.fx and torch.export ------------------------------------------------------------------


_BUILT_IN = re.compile(r"\btorch\._C\._nn\.(\w+)(?=\()")


def by_public_names(source: str) -> str:
    """Replace the names of built-in functions in generated code by those in ``torch.nn.functional``.

    If a library has replaced a function there, the replacement is then called, as in the traced code. The
    names do not depend on whether a function is replaced at this moment, because a context may replace it and
    end before the code runs.
    """

    def public(match: re.Match[str]) -> str:
        return f"torch.nn.functional.{match[1]}" if _is_public(match[1]) else match[0]

    return _BUILT_IN.sub(public, source)


def _is_public(name: str) -> bool:
    """Return True if ``torch.nn.functional`` exports a built-in function, now or before its replacement.

    A name that ``torch.nn.functional`` defines in Python does not count, because that function calls the
    built-in one itself.
    """
    function = vars(F).get(name)
    return function is not None and getattr(function, "__module__", None) != F.__name__


@contextlib.contextmanager
def built_in_functions() -> Iterator[None]:
    """Undo, within the context, the replacements that libraries made in ``torch.nn.functional``."""
    known, public = vars(torch._C._nn), vars(F)
    replaced = {
        name: public[name]
        for name, function in known.items()
        if callable(function) and _is_public(name) and public[name] is not function
    }
    public.update({name: known[name] for name in replaced})
    try:
        yield
    finally:
        public.update(replaced)


def codegen_of(graph: fx.Graph) -> Any:
    """Return the code generator of a graph; ``Graph.set_codegen`` sets it."""
    return graph._codegen


def tracer_class(graph: fx.Graph) -> type[fx.Tracer] | None:
    """Return the class of the tracer that made a graph, if it is known."""
    return getattr(graph, "_tracer_cls", None)


def wrapped_functions() -> MutableMapping[tuple[int, str], dict[str, Any]]:
    """Return the registry of ``fx.wrap``: globals of modules, by their id and the name of the function.

    fx keeps all entries permanently, and goes through them in every trace.
    """
    return fx._symbolic_trace._wrapped_fns_to_patch


def export_tracer() -> ModuleType:
    """Return the module that traces for ``torch.export``. It prints graphs on some errors."""
    from torch.export import _trace

    return _trace


REPLACEMENT_METHOD: Final = "_set_replacement"
"""Method of ``ShapeEnv`` (symbol, value, message) that fixes the size of an axis while it traces."""

NO_MODULE: Final = "_empty_nn_module_stack_from_metadata_hook"
"""Text that ``torch.onnx`` writes for a node that comes from no module."""

CHATTY_LOGGERS: Final = (
    "torch.fx.experimental.symbolic_shapes",  # advice on branches that depend on values
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed", at each export
)
"""Loggers with messages during an export that a user cannot act on."""


def sympy_functions() -> ModuleType:
    """Return the module of PyTorch's functions for sizes: ``FloorDiv``, ``Mod`` and so on. Loads sympy."""
    from torch.utils._sympy import functions

    return functions


def has_triton() -> bool:
    """Return True if Triton can compile for a device of this machine."""
    from torch.utils import _triton

    return _triton.has_triton()


# --- distributed --------------------------------------------------------------------------------


def is_distributed(tensor: Tensor) -> bool:
    """Return True for a DTensor, without loading ``torch.distributed.tensor``."""
    return type(tensor) is not Tensor and hasattr(tensor, "_local_tensor")


def local_tensor(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, or any other tensor itself.

    Unlike ``DTensor.to_local``, this function is no operation of autograd.
    """
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def all_reduce(tensor: Tensor, operation: str, group: Any) -> Tensor:
    """Return a reduction, such as the sum, over a dimension of a device mesh. Can be traced and compiled."""
    from torch.distributed._functional_collectives import all_reduce as reduce

    reduced: Tensor = reduce(tensor, operation, group)
    return reduced


def group_store() -> Any:
    """Return the key-value store of the default process group."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def group_size(name: str) -> int:
    """Return the number of processes in a group, by its name in a graph."""
    groups: Any = torch.distributed.distributed_c10d
    return int(groups._resolve_process_group(name).size())


def fake_store() -> Any:
    """Return a store for a process group whose other processes do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def forget_sharding() -> None:
    """Clear DTensor's caches before a new process group, because its mesh equals an old one."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    _redistribute.clear_redistribute_planner_cache()


def is_flat(parameter: Any) -> bool:
    """Return True for a parameter that FSDP1 has made a part of a flat parameter."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def fsdp_state(unit: Any) -> Any:
    """Return FSDP2's state of a module with ``fully_shard``. Several modules can share a state."""
    return unit._get_fsdp_state()


def fsdp_groups(unit: Any) -> list[Any]:
    """Return the parameter groups of a module with FSDP2; empty if inner modules have all parameters."""
    state = fsdp_state(unit)
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before PyTorch 2.12 a unit has one group
        group = state._fsdp_param_group
        groups = [] if group is None else [group]
    return list(groups)


def fsdp_precision(unit: Any) -> Any:
    """Return the mixed-precision policy of a module with ``fully_shard``."""
    return fsdp_state(unit)._mp_policy


def fsdp_chose_resharding(unit: Any) -> bool:
    """Return True if the user left ``reshard_after_forward`` to ``fully_shard``."""
    return bool(getattr(fsdp_state(unit), "_auto_reshard_after_forward", False))


def fsdp_size(parameter: Any) -> torch.Size:
    """Return the size of a parameter of FSDP2 before sharding."""
    size: torch.Size = parameter._orig_size
    return size


def fsdp_owner(parameter: Any) -> Any:
    """Return the modules that have a parameter of FSDP2, and its names in them."""
    return parameter._module_info


def fsdp_spec(parameter: Any) -> Any:
    """Return the tensor-parallel sharding of a parameter of FSDP2, or None."""
    spec = getattr(parameter, "_unsharded_dtensor_spec", None)
    return getattr(parameter, "_tp_spec", None) if spec is None else spec


def unit_attributes() -> tuple[str, ...]:
    """Return the names of the attributes that FSDP2 and compilers add to a module."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return (STATE_KEY, REGISTRY_KEY, COMPILED_CALL)
