"""Cheap operations whose result is made again in the backward pass instead of being kept.

A :class:`Chain` is a few operations that cost little beside a product: a norm, an activation, or
``silu(g) * u``. The graph calls it in their place (:mod:`lora_fx.passes.optimize.recompute`). It computes the
same to the last bit, and for the backward it keeps its inputs alone.

A product that wants its input for the gradient of A asks :func:`source_of` whether that is the output of a
chain. If so, it keeps the inputs of the chain, which the chain keeps anyway, and makes its own input again.
All products over one output, and the chain itself, make it once in a backward. A function that is written out
as many operations, and that PyTorch has a kernel for, is made again by the kernel.

The way from a chain to the products that read its output is a table of weak references, since they are in
graphs of different modules. An entry says which version the output has, and where it is: what was written
into, or replaced by a hook, has none. The inputs are kept by ``save_for_backward``, so that writing into them
is PyTorch's own error.
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
from lora_fx.runtime.classes import BASE, inner_class
from lora_fx.runtime.masks import transformed

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
"""What an input of a chain is. A parameter is small beside the output; a module has none, and is called."""

_SMALL = 8  # how often a parameter has to go into an output to be small beside it

_SHARING = ("cpu", "cuda")  # devices on which memory is shared until it is written to
_RECIPES = (*_SHARING, "meta")  # which has nothing to write into


def lazy_copy(tensor: Tensor) -> Tensor:
    """The same values, which cannot be changed through ``tensor`` or a view of it.

    It is PyTorch's copy-on-write: both share memory, and the first access that may write into either gives
    that one a memory of its own, whatever it comes through. Kernels that ask for their operand as if they
    would write (oneDNN's batched product of bf16) cause a copy that was not needed, and nothing else.

    Args:
        tensor: Any. On other devices than a CPU or CUDA, as a subclass, or in memory that is not of PyTorch's
            own allocator, it is copied at once.

    Returns:
        Detached, in the same shape.
    """
    given = tensor.detach()
    if type(given) is Tensor and given.is_meta:
        return given  # it has no values
    if type(given) is not Tensor or given.device.type not in _SHARING:
        return given.clone()
    try:
        return torch_private.lazy_clone(given)
    except RuntimeError:  # its storage is not one that can be shared so
        return given.clone()


class Subgraph:
    """A function of a few operations, made of a graph, that a graph calls. Copies are itself.

    Attributes:
        graph: Its operations.
        run: Computes them: a function of None and the placeholders.
    """

    def __init__(self, name: str, graph: fx.Graph, filename: str) -> None:
        self.graph = graph
        # fx writes a call by the name and the module of what is called.
        self.__name__ = self.__qualname__ = name
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, filename, "exec"), namespace)
        self.run: Callable[..., Tensor] = namespace["forward"]

    @staticmethod
    def key(graph: fx.Graph) -> Any:
        """What equal graphs have in common."""
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
    """A module that a chain calls, and whose operations it has for the backward.

    Attributes:
        cls: Its own class.
        unchanged: Whether it computes what these operations do; it can be pickled, and equal ones are equal.
    """

    cls: type[nn.Module]
    unchanged: Callable[[nn.Module], bool]


class Chain(Subgraph):
    """A function of cheap operations; :func:`chain_of` makes it.

    Attributes:
        kinds: What each placeholder is. A module is called by :func:`called`.
        modules: The modules among them.
        saves: Whether autograd would keep more than the inputs. Otherwise the operations run as they are, and
            only the products that read the output make it again.
        again: The operations of the backward, where they are others: those of the modules in their place,
            which may be another thing by then, and kernels that compute the same but for rounding.
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
        """The output.

        Args:
            leaves: Activations, parameters (or None) and modules, as ``kinds`` says. With a gradient to
                compute and plain tensors their output has a recipe; with any other it is what the operations
                give.
        """
        if torch.compiler.is_compiling() or not self._applies(leaves):
            return self.run(None, *leaves)
        recipe = _Recipe(self, leaves)
        given = recipe.given(leaves)
        if self.saves:
            out: Tensor = _Made.apply(recipe, leaves, *given)  # type: ignore[no-untyped-call]
        else:
            out = self.run(None, *leaves)
        if type(out) is Tensor and out.device.type in _RECIPES:
            entry = _Entry(recipe, _held(given), out)
            # What cannot be shared lazily was copied, and is of no use.
            if entry.address == torch_private.data_address(entry.copy):
                _known[out] = entry
        return out

    def _applies(self, leaves: Sequence[Any]) -> bool:
        """Whether a recipe of the output is right, and worth it."""
        if not torch.is_grad_enabled() or transformed():
            return False
        most, modules = 0, iter(self.modules)
        for leaf, kind in zip(leaves, self.kinds, strict=True):
            if kind == MODULE:
                cls, unchanged = next(modules)
                if not (_is_bare(leaf, cls) and unchanged(leaf)):
                    return False
            elif kind == ACTIVATION:
                # What has no gradient is kept by nothing.
                if not _is_plain(leaf, (Tensor,)) or not leaf.requires_grad:
                    return False
                most = max(most, leaf.numel())
        return all(
            leaf is None or _is_small(leaf, most)
            for leaf, kind in zip(leaves, self.kinds, strict=True)
            if kind == PARAMETER
        )


def called(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives."""
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
    """The chain of a graph: one object for equal ones, so that equal layers share their code.

    Args:
        name: What code that calls it shows.
        graph: As for :class:`Chain`, as the others; it must not be edited afterwards.
        kinds: :data:`ACTIVATION`, :data:`PARAMETER` or :data:`MODULE` for each placeholder.
        modules: The modules among them.
        saves: Whether autograd would keep more than the inputs.
        again: The operations of the backward, or None for the same.
    """
    others = None if again is None else Subgraph.key(again)
    key = (name, Subgraph.key(graph), kinds, modules, saves, others)
    found = _chains.get(key)
    if found is None:
        found = _chains.setdefault(key, Chain(name, graph, kinds, modules, saves, again))
    return found


def _thawed(
    name: str, frozen: Any, kinds: Any, modules: Any, saves: bool, again: Any = None
) -> Chain:
    others = None if again is None else thaw(again)
    return chain_of(name, thaw(frozen), kinds, modules, saves, others)


def _is_plain(value: Any, classes: tuple[type, ...]) -> bool:
    return (
        type(value) in classes
        and value.layout is torch.strided
        and not value.is_nested
        and value.is_floating_point()
        and not value.is_inference()
    )


def _is_small(parameter: Any, elements: int) -> bool:
    """Whether a parameter may be copied into a recipe, or kept as it is."""
    if not _is_plain(parameter, (Tensor, nn.Parameter)) or parameter.numel() * _SMALL > elements:
        return False
    # One that trains is kept itself. A sharded one has values only while the module runs that has it.
    return not (parameter.requires_grad and _is_distributed())


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_bare(module: Any, cls: type[nn.Module]) -> bool:
    """Whether a call of a module is its class's forward and nothing else."""
    inner: Any = inner_class(module)
    attributes = vars(module)
    return (
        inner.__dict__.get(BASE, inner) is cls
        and "forward" not in attributes
        and not any(attributes.get(name) for name in torch_private.MODULE_HOOKS)
        and not torch_private.has_global_hooks()
    )


class _Recipe:
    """How an output of a chain is made again: everything but the tensors that autograd keeps.

    It holds no activation, but in a backward, from the first reader of the output to the last.
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
        self._places = [place for place, one in enumerate(kept) if one]
        # A copy: what shards parameters frees them when the module that has them is done.
        self._leaves = [
            leaf.detach().clone() if isinstance(leaf, Tensor) and not one else None
            for leaf, one in zip(leaves, kept, strict=True)
        ]
        self._autocast = autocast_of(leaves[self._places[0]].device.type)
        self._readers = self._waiting = 0
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def given(self, leaves: Sequence[Any]) -> list[Tensor]:
        """What is kept of the inputs: those with a gradient."""
        return [leaves[place] for place in self._places]

    def run(self, given: Sequence[Tensor]) -> Tensor:
        """The output of other tensors in the places of those."""
        leaves = list(self._leaves)
        for place, one in zip(self._places, given, strict=True):
            leaves[place] = one
        with self._autocast():
            return self.chain.run_again(None, *leaves)

    def made(self, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output once more, and the inputs that it has a graph to; once for all who ask."""
        found = self._made
        if found is None:
            with torch.set_grad_enabled(self.chain.saves):
                inputs = [one.detach().requires_grad_(self.chain.saves) for one in given]
                found = self._made = (self.run(inputs), inputs)
        return found

    def forget(self) -> None:
        """Lets go of what was made: it is not asked for again in this backward."""
        self._made, self._waiting = None, self._readers

    def read(self) -> None:
        """Counts a reader of the output."""
        self._readers += 1
        self._waiting += 1

    def done(self) -> None:
        """A reader has had it; the last one is the chain itself, where that has a backward of its own."""
        self._waiting -= 1
        if self._waiting <= 0 and not self.chain.saves:
            self.forget()


class _Made(torch.autograd.Function):
    """A chain that keeps its inputs, and makes its graph again in the backward."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, leaves: Sequence[Any], *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        ctx.recipe = recipe
        return recipe.chain.run(None, *leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe, given = ctx.recipe, ctx.saved_tensors
        again = torch.is_grad_enabled()
        out, inputs = (recipe.run(given), given) if again else recipe.made(given)
        found = torch.autograd.grad(out, inputs, grads[0], create_graph=again)
        if not again:
            recipe.forget()
        return None, None, *found


def autocast_of(kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Puts autocast of a kind of device to what it is now."""
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


def _held(given: Sequence[Tensor]) -> _Held:
    """The inputs, for as long as autograd keeps them.

    Where hooks put something else in their place (checkpointing, offloading), for as long as the output is
    there: which tensors a product keeps must not depend on who else holds them.
    """
    if torch_private.saved_tensor_hooks() is None:
        return tuple(map(TensorWeakRef, given))
    return tuple((lambda one=one: one) for one in given)


class _Entry:
    """What is known of an output while it is there.

    The lazy copy shares its memory until that is written to, also past the version counter (``.data``, a
    NumPy array): then the output is at another address.
    """

    __slots__ = ("address", "copy", "held", "recipe", "version", "versions")

    def __init__(self, recipe: _Recipe, held: _Held, out: Tensor) -> None:
        self.recipe, self.held = recipe, held
        self.copy = lazy_copy(out)
        self.version, self.address = (
            torch_private.version_counter(out),
            torch_private.data_address(out),
        )
        self.versions = [torch_private.version_counter(one) for one in self._inputs() or ()]

    def _inputs(self) -> list[Tensor] | None:
        found = [one() for one in self.held]
        return None if any(one is None for one in found) else found  # type: ignore[return-value]

    def inputs(self, out: Tensor) -> list[Tensor] | None:
        """The inputs, if they and the output are what they were."""
        if (torch_private.version_counter(out), torch_private.data_address(out)) != (
            self.version,
            self.address,
        ):
            return None
        found = self._inputs()
        if found is None or [torch_private.version_counter(one) for one in found] != self.versions:
            return None
        return found


_known: MutableMapping[Tensor, _Entry] = WeakTensorKeyDictionary()


class Source(NamedTuple):
    """How the input of a product is made again.

    Attributes:
        recipe: It makes the output of a chain.
        given: What the product has to keep for that, by ``save_for_backward``.
        shape: Of the product's input, which has the elements of that output in their order.
        whole: The input itself, while it is there.
    """

    recipe: _Recipe
    given: tuple[Tensor, ...]
    shape: torch.Size
    whole: TensorWeakRef

    def kept(self) -> Source:
        """What a product has as an attribute when it keeps ``given`` apart."""
        self.recipe.read()
        return self._replace(given=())

    def value(self, given: Sequence[Tensor], again: bool) -> Tensor:
        """The input: bit for bit, or but for rounding where the chain has a shorter form.

        Args:
            given: The tensors, as autograd has kept them.
            again: Whether it is differentiated again: then it has their history. Somebody who still has the
                input itself may ask for the gradient of that.
        """
        if again:
            whole = self.whole()
            same = whole is not None and torch_private.version_counter(whole) == 0
            return whole if same else self.recipe.run(given).reshape(self.shape)
        out, _ = self.recipe.made(given)
        return out.detach().reshape(self.shape)

    def done(self) -> None:
        """Says that the product's backward has had it."""
        self.recipe.done()


_VIEWS = ("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0")


def source_of(x: Tensor) -> Source | None:
    """How a tensor is made again of what autograd keeps anyway; None where that is not known to be right.

    Args:
        x: The output of a chain, or a view of it that has the same elements in the same order.
    """
    if torch.compiler.is_compiling() or not _known or not torch.is_grad_enabled():
        return None  # a compiler decides by itself what it keeps
    if type(x) is not Tensor or not x.requires_grad:
        return None
    whole = torch_private.view_base(x)
    entry = _known.get(whole) if type(whole) is Tensor else None
    if entry is None or not (whole is x or _is_reshaped(x, whole)):
        return None
    given = entry.inputs(whole)
    if given is None:
        return None
    return Source(entry.recipe, tuple(given), x.shape, TensorWeakRef(x))


def _is_reshaped(x: Tensor, whole: Tensor) -> bool:
    """Whether a view has the elements of what it is of, in their order, and nothing stands between."""
    step: Any = x.grad_fn
    return (
        step.name() in _VIEWS
        and step.next_functions[0][0] is whole.grad_fn
        and x.dtype == whole.dtype
        and x.numel() == whole.numel()
        and x.is_contiguous()
        and whole.is_contiguous()
    )
