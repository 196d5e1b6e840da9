"""Cheap operations whose outputs are recomputed in the backward pass instead of being saved.

A :class:`Chain` is a few operations that are cheap compared with a matrix product: a norm, an activation, or
``silu(g) * u``. The graph calls the chain in their place (:mod:`lora_fx.passes.optimize.recompute`). It gives
the same bits, and saves only its inputs for the backward.

A product needs its input for the gradient of A, and asks :func:`source_of` whether a chain computed it. If
so, the product saves the inputs of the chain, which the chain saves anyway, and recomputes its own input. All
products that read one output, and the chain itself, share one recomputation in a backward. If a chain spells
out a function that PyTorch has a kernel for, the kernel recomputes it.

Chains and the products that read their outputs are in graphs of different modules, so a table of weak
references connects them. Its entry holds the version counter and the address of the output. An output that
was written into or replaced by a hook has no valid entry. The inputs are kept by ``save_for_backward``, so
PyTorch itself raises if they are modified.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lora_fx import torch_private
from lora_fx.ir import freeze, thaw
from lora_fx.runtime.kernels.masks import transformed
from lora_fx.runtime.modules import BASE, inner_class

__all__ = [
    "ACTIVATION",
    "MODULE",
    "PARAMETER",
    "Called",
    "Chain",
    "Source",
    "Subgraph",
    "autocast_of",
    "called",
    "chain_of",
    "lazy_copy",
    "source_of",
]

ACTIVATION, PARAMETER, MODULE = "activation", "parameter", "module"
"""Kinds of inputs of a chain. A parameter is small compared with the output. A module is called."""

_SMALL = 8  # an activation has at least this many times the elements of a small parameter

_SHARING = ("cpu", "cuda")  # devices with copy-on-write memory
# Devices whose tensors can be recomputed. Meta tensors have no memory that a write could change.
_RECIPES = (*_SHARING, "meta")


def lazy_copy(tensor: Tensor) -> Tensor:
    """Return a copy-on-write copy, which does not change when ``tensor`` or a view of it is written to.

    Both share memory until the first access that may write into either tensor. That tensor then gets its own
    memory. Some kernels ask for write access to operands that they only read (oneDNN's batched product of
    bf16). These cause a needless copy, and nothing else.

    Args:
        tensor: Any tensor. It is copied at once if it is on a device other than CPU or CUDA, is a subclass,
            or has memory from another allocator than PyTorch's.

    Returns:
        A detached tensor of the same shape.
    """
    detached = tensor.detach()
    if type(detached) is Tensor and detached.is_meta:
        return detached  # a meta tensor has no values
    if type(detached) is not Tensor or detached.device.type not in _SHARING:
        return detached.clone()
    try:
        return torch_private.lazy_clone(detached)
    except RuntimeError:  # its storage does not support copy-on-write
        return detached.clone()


class Subgraph:
    """Function that is compiled from a small graph, as a call target in other graphs. Copying returns itself.

    Attributes:
        graph: The graph with its operations.
        run: The compiled code: a function of None and the placeholders.
    """

    def __init__(self, name: str, graph: fx.Graph, filename: str) -> None:
        self.graph = graph
        # fx writes a call with the name and the module of the target.
        self.__name__ = self.__qualname__ = name
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, filename, "exec"), namespace)
        self.run: Callable[..., Tensor] = namespace["forward"]

    @staticmethod
    def key(graph: fx.Graph) -> Any:
        """Return a key that is equal for graphs with the same code and globals."""
        code = graph.python_code("self")
        return code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items()))

    @property
    def frozen(self) -> Any:
        """The graph in a form that can be pickled."""
        return freeze(self.graph)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class Called(NamedTuple):
    """Module that a chain calls in the forward, and replaces by its operations in the backward.

    Attributes:
        cls: The module's original class.
        unchanged: Predicate that is True if the module still computes these operations. It can be pickled,
            and equal predicates compare equal.
    """

    cls: type[nn.Module]
    unchanged: Callable[[nn.Module], bool]


class Chain(Subgraph):
    """Function of cheap operations. Create one with :func:`chain_of`.

    Attributes:
        kinds: The kind of each placeholder. A module is called by :func:`called`.
        modules: The modules among the placeholders.
        saves: True if autograd would save more than the inputs. If not, the operations run as they are, and
            only the products that read the output recompute it.
        again: The graph of the backward, if it differs from the forward. It has the operations of the
            modules, which may have changed by then, and kernels that agree up to rounding.
    """

    def __init__(
        self,
        name: str,
        graph: fx.Graph,
        kinds: tuple[str, ...],
        modules: tuple[Called, ...],
        saves: bool,
        again: fx.Graph | None = None,
    ) -> None:
        super().__init__(name, graph, f"<lora_fx {name}>")
        self.kinds, self.modules, self.saves = kinds, modules, saves
        self.again = again
        self.run_again = self.run
        if again is not None:
            self.run_again = Subgraph(name, again, f"<lora_fx {name}, again>").run

    def __reduce__(self) -> tuple[Any, ...]:
        again = None if self.again is None else freeze(self.again)
        return _thawed, (self.__name__, self.frozen, self.kinds, self.modules, self.saves, again)

    def __call__(self, *leaves: Any) -> Tensor:
        """Compute the output, and register its recipe if the inputs allow one.

        Args:
            leaves: Activations, parameters (or None) and modules, in the order of ``kinds``. The output gets
                a recipe if the tensors are plain and need gradients. Otherwise the operations just run.
        """
        if torch.compiler.is_compiling() or not self._applies(leaves):
            return self.run(None, *leaves)
        recipe = _Recipe(self, leaves)
        saved = recipe.saved_inputs(leaves)
        if self.saves:
            out: Tensor = _ChainFunction.apply(recipe, leaves, *saved)  # type: ignore[no-untyped-call]
        else:
            out = self.run(None, *leaves)
        if type(out) is Tensor and out.device.type in _RECIPES:
            entry = _Entry(recipe, _references(saved), out)
            # A copy at another address is not copy-on-write, and its address would not show later writes.
            if entry.address == torch_private.data_address(entry.copy):
                _known[out] = entry
        return out

    def _applies(self, leaves: Sequence[Any]) -> bool:
        """Return True if a recipe for the output is correct and saves memory."""
        if not torch.is_grad_enabled() or transformed():
            return False
        most, modules = 0, iter(self.modules)
        for leaf, kind in zip(leaves, self.kinds, strict=True):
            if kind == MODULE:
                cls, unchanged = next(modules)
                if not (_is_bare(leaf, cls) and unchanged(leaf)):
                    return False
            elif kind == ACTIVATION:
                # Autograd does not save an activation without a gradient.
                if not _is_plain(leaf, (Tensor,)) or not leaf.requires_grad:
                    return False
                most = max(most, leaf.numel())
        return all(
            leaf is None or _is_small(leaf, most)
            for leaf, kind in zip(leaves, self.kinds, strict=True)
            if kind == PARAMETER
        )


def called(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module and return its output. Graphs of chains call modules through this function."""
    out: Tensor = module(x)
    return out


_chains: weakref.WeakValueDictionary[Any, Chain] = weakref.WeakValueDictionary()


def chain_of(
    name: str,
    graph: fx.Graph,
    kinds: tuple[str, ...],
    modules: tuple[Called, ...],
    saves: bool,
    again: fx.Graph | None = None,
) -> Chain:
    """Return the chain of a graph. Equal graphs get one object, so that equal layers share their code.

    Args:
        name: Name of the function in generated code.
        graph: Operations of the forward. The graph must not be edited afterwards.
        kinds: :data:`ACTIVATION`, :data:`PARAMETER` or :data:`MODULE` for each placeholder.
        modules: The modules among the placeholders.
        saves: True if autograd would save more than the inputs.
        again: Operations of the backward, or None for those of the forward.
    """
    again_key = None if again is None else Subgraph.key(again)
    key = (name, Subgraph.key(graph), kinds, modules, saves, again_key)
    chain = _chains.get(key)
    if chain is None:
        chain = _chains.setdefault(key, Chain(name, graph, kinds, modules, saves, again))
    return chain


def _thawed(
    name: str, frozen: Any, kinds: Any, modules: Any, saves: bool, again: Any = None
) -> Chain:
    again_graph = None if again is None else thaw(again)
    return chain_of(name, thaw(frozen), kinds, modules, saves, again_graph)


def _is_plain(value: Any, classes: tuple[type, ...]) -> bool:
    return (
        type(value) in classes
        and value.layout is torch.strided
        and not value.is_nested
        and value.is_floating_point()
        and not value.is_inference()
    )


def _is_small(parameter: Any, elements: int) -> bool:
    """Return True if a :class:`_Recipe` may keep this parameter from the forward until the backward.

    Args:
        parameter: An input of a chain.
        elements: The number of elements of the activation that the chain computes with.
    """
    if not _is_plain(parameter, (Tensor, nn.Parameter)) or parameter.numel() * _SMALL > elements:
        return False
    # A recipe keeps a trained parameter itself. FSDP frees its values once the forward of its module is over.
    return not (parameter.requires_grad and _is_distributed())


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_bare(module: Any, cls: type[nn.Module]) -> bool:
    """Return True if a call of a module runs only the forward of its class, without hooks or patches."""
    inner: Any = inner_class(module)
    attributes = vars(module)
    return (
        inner.__dict__.get(BASE, inner) is cls
        and "forward" not in attributes
        and not any(attributes.get(name) for name in torch_private.MODULE_HOOKS)
        and not torch_private.has_global_hooks()
    )


class _Recipe:
    """Recomputation of one output of a chain, without the tensors that autograd saves.

    It holds activations only during a backward, from the first reader of the output to the last.
    """

    __slots__ = (
        "_autocast",
        "_leaves",
        "_made",
        "_places",
        "_readers",
        "_waiting",
        "chain",
    )

    def __init__(self, chain: Chain, leaves: Sequence[Any]) -> None:
        self.chain = chain
        kept = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        self._places = [index for index, is_kept in enumerate(kept) if is_kept]
        # Copied because FSDP frees parameters once the forward of their module is over.
        self._leaves = [
            leaf.detach().clone() if isinstance(leaf, Tensor) and not is_kept else None
            for leaf, is_kept in zip(leaves, kept, strict=True)
        ]
        self._autocast = autocast_of(leaves[self._places[0]].device.type)
        self._readers = self._waiting = 0
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def saved_inputs(self, leaves: Sequence[Any]) -> list[Tensor]:
        """Return the inputs that autograd saves: those that require a gradient."""
        return [leaves[index] for index in self._places]

    def run(self, saved: Sequence[Tensor]) -> Tensor:
        """Compute the output again from the tensors that :meth:`saved_inputs` returned."""
        leaves = list(self._leaves)
        for index, tensor in zip(self._places, saved, strict=True):
            leaves[index] = tensor
        with self._autocast():
            return self.chain.run_again(None, *leaves)

    def made(self, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the recomputed output and the inputs of its autograd graph. Readers share the result."""
        result = self._made
        if result is None:
            with torch.set_grad_enabled(self.chain.saves):
                inputs = [tensor.detach().requires_grad_(self.chain.saves) for tensor in saved]
                result = self._made = (self.run(inputs), inputs)
        return result

    def forget(self) -> None:
        """Drop the recomputed output. No reader of this backward needs it any more."""
        self._made, self._waiting = None, self._readers

    def read(self) -> None:
        """Count one more reader of the output."""
        self._readers += 1
        self._waiting += 1

    def done(self) -> None:
        """Note that a reader is done. If the chain has its own backward, the chain is the last reader."""
        self._waiting -= 1
        if self._waiting <= 0 and not self.chain.saves:
            self.forget()


class _ChainFunction(torch.autograd.Function):
    """Autograd function of a chain. It saves the inputs, and rebuilds its graph in the backward."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, leaves: Sequence[Any], *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.recipe = recipe
        return recipe.chain.run(None, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe, saved = ctx.recipe, ctx.saved_tensors
        again = torch.is_grad_enabled()
        out, inputs = (recipe.run(saved), saved) if again else recipe.made(saved)
        input_grads = torch.autograd.grad(out, inputs, grads[0], create_graph=again)
        if not again:
            recipe.forget()
        return None, None, *input_grads


def autocast_of(kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a function whose context manager restores the current autocast state of a device type."""
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return lambda: torch.autocast(kind, dtype, cache_enabled=False)
    return functools.partial(_without_autocast, kind)


def _without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


_Held = tuple[Callable[[], Tensor | None], ...]


def _references(saved: Sequence[Tensor]) -> _Held:
    """Return references to the inputs, which live as long as autograd saves them.

    Saved-tensor hooks (checkpointing, offloading) replace the saved tensors. The references are strong then,
    and last as long as the output, because a product has to save the same tensors.
    """
    if torch_private.saved_tensor_hooks() is None:
        return tuple(map(TensorWeakRef, saved))
    return tuple((lambda tensor=tensor: tensor) for tensor in saved)


class _Entry:
    """State of an output at the time that the chain computed it. The entry lives as long as the output.

    The lazy copy detects writes that do not bump the version counter (``.data``, a NumPy array). Such a write
    ends the sharing of memory, and the output gets another address.
    """

    __slots__ = ("address", "copy", "held", "recipe", "version", "versions")

    def __init__(self, recipe: _Recipe, references: _Held, out: Tensor) -> None:
        self.recipe, self.held = recipe, references
        self.copy = lazy_copy(out)
        self.version, self.address = (
            torch_private.version_counter(out),
            torch_private.data_address(out),
        )
        self.versions = [torch_private.version_counter(tensor) for tensor in self._inputs() or ()]

    def _inputs(self) -> list[Tensor] | None:
        tensors = [reference() for reference in self.held]
        return None if any(tensor is None for tensor in tensors) else tensors  # type: ignore[return-value]

    def inputs(self, out: Tensor) -> list[Tensor] | None:
        """Return the inputs, or None if they or the output were modified or freed."""
        if (torch_private.version_counter(out), torch_private.data_address(out)) != (
            self.version,
            self.address,
        ):
            return None
        tensors = self._inputs()
        if (
            tensors is None
            or [torch_private.version_counter(tensor) for tensor in tensors] != self.versions
        ):
            return None
        return tensors


_known: MutableMapping[Tensor, _Entry] = WeakTensorKeyDictionary()


class Source(NamedTuple):
    """Recipe for the input of a product.

    Attributes:
        recipe: Recomputes the output of a chain.
        saved: The tensors that the product has to save for it, by ``save_for_backward``.
        shape: Shape of the product's input, which has the elements of the chain's output in the same order.
        whole: Weak reference to the input itself.
    """

    recipe: _Recipe
    saved: tuple[Tensor, ...]
    shape: torch.Size
    whole: TensorWeakRef

    def kept(self) -> Source:
        """Count a reader, and return the source without ``saved``, which the product saves itself."""
        self.recipe.read()
        return self._replace(saved=())

    def value(self, saved: Sequence[Tensor], again: bool) -> Tensor:
        """Return the input: the same bits, or equal up to rounding if the chain has a shorter backward graph.

        Args:
            saved: The tensors that autograd has saved.
            again: True if the result is differentiated again (double backward). It then has the history of
                ``saved``. If the input itself is alive and unmodified, it is returned: a caller may ask for
                its gradient.
        """
        if again:
            whole = self.whole()
            same = whole is not None and torch_private.version_counter(whole) == 0
            return whole if same else self.recipe.run(saved).reshape(self.shape)
        out, _ = self.recipe.made(saved)
        return out.detach().reshape(self.shape)

    def done(self) -> None:
        """Note that the backward of the product no longer needs the input."""
        self.recipe.done()


_VIEWS = ("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0")


def source_of(x: Tensor) -> Source | None:
    """Return the recipe that recomputes a tensor from tensors that autograd saves anyway.

    Args:
        x: The output of a chain, or a view with the same elements in the same order.

    Returns:
        The source, or None if the recomputation might be wrong.
    """
    if torch.compiler.is_compiling() or not _known or not torch.is_grad_enabled():
        return None  # a compiler chooses itself what it saves
    if type(x) is not Tensor or not x.requires_grad:
        return None
    whole = torch_private.view_base(x)
    entry = _known.get(whole) if type(whole) is Tensor else None
    if entry is None or not (whole is x or _is_reshaped(x, whole)):
        return None
    inputs = entry.inputs(whole)
    if inputs is None:
        return None
    return Source(entry.recipe, tuple(inputs), x.shape, TensorWeakRef(x))


def _is_reshaped(x: Tensor, whole: Tensor) -> bool:
    """Return True if ``x`` is a plain reshape of ``whole``: the same elements in order, one view apart."""
    step: Any = x.grad_fn
    return (
        step.name() in _VIEWS
        and step.next_functions[0][0] is whole.grad_fn
        and x.dtype == whole.dtype
        and x.numel() == whole.numel()
        and x.is_contiguous()
        and whole.is_contiguous()
    )
