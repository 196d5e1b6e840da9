"""Pass that finds the blocks to recompute and the modules to run in tiles, for ``memory="least"``.

A module may run in tiles of tokens if it computes each token from that token alone, in the same way at every
position. Both conditions are tested on a few random tokens. The rules of
:mod:`lora_fx.runtime.rows.row_rules`, applied to the axis of the tokens, show which tokens each element of
the result was computed from. The results for two halves of the tokens are compared with the result for all.
The test does not depend on the class of the module.

Experts sort the tokens by their values, and no rule can follow that. For them only the comparison counts.

In other modules, parts that may run in tiles are searched in the graphs (:mod:`lora_fx.passes.plan.spans`).

The test needs no values of weights. In a copy of the module, each weight is a strided view of a few random
numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_fx.formats import PackedTensor
from lora_fx.ir import Capture, Pass, PassResult, Savings, Site, Span, join
from lora_fx.kinds import kind_of
from lora_fx.passes.plan.spans import find_spans
from lora_fx.runtime.modules import AdapterModule
from lora_fx.runtime.rows import Follower
from lora_fx.torch_private import data_address, pytree, version_counter

__all__ = ["FindSavings", "find_blocks", "find_savings"]

_TOKENS, _TOKENS_OF_EXPERTS = 12, 60
_STEP = 16
_SPARE = 4
"""Factor of the limit of :class:`_Bounded`: intermediate results may be larger than a layer's result."""

_log = logging.getLogger("lora_fx")


@dataclasses.dataclass(frozen=True)
class FindSavings(Pass):
    """Pass that adds the blocks and tiles of a model to its plan."""

    name: ClassVar[str] = "find-savings"
    needs: ClassVar[str] = "plan"

    def __call__(self, capture: Capture) -> PassResult:
        """Find the blocks and tiles. No graph is edited."""
        assert capture.plan is not None
        assert capture.matches is not None
        savings = find_savings(capture)
        plan = dataclasses.replace(capture.plan, savings=savings)
        return PassResult(dataclasses.replace(capture, plan=plan), True)


def find_savings(capture: Capture) -> Savings:
    """Return the blocks of a model, and the largest modules and parts of modules that may run in tiles.

    Args:
        capture: The model, on any device, with its graphs and its linear operations.
    """
    model = capture.model
    blocks = find_blocks(model)
    above = {""}
    for name in blocks:
        while name := name.rpartition(".")[0]:
            above.add(name)
    finder = _Finder(capture, above)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        finder.look(model, "")
    if not blocks:
        reason = "no list of layers of the same class was found: nothing is recomputed"
        finder.left.append(("", reason))
    tiles = finder.tiles
    spans = [span for span in finder.spans.values() if not _is_in_any(span.first, tiles)]
    inside = [*tiles, *(span.first for span in spans)]
    left = [(name, why) for name, why in dict(finder.left).items() if not _is_in_any(name, inside)]
    return Savings(tuple(blocks), tuple(tiles), tuple(spans), tuple(left))


def find_blocks(model: nn.Module) -> list[str]:
    """Return the FQNs of a model's blocks: layers of transformers, or else the repeated children of lists.

    A list is an ``nn.ModuleList`` or ``nn.Sequential``. Lists inside of blocks, such as experts, are not
    searched.
    """
    marked = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "gradient_checkpointing")
        and any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    ]
    if marked:
        return [
            name for name in marked if not any(name.startswith(f"{other}.") for other in marked)
        ]
    return [*_repeated(model, "")]


def _repeated(module: nn.Module, fqn: str) -> Iterator[str]:
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    counts = Counter(type(child) for child in module.children())
    for name, child in module.named_children():
        inner = join(fqn, name)
        if isinstance(child, AdapterModule):
            continue
        has_layers = any(True for _ in child.children())
        if listed and has_layers and counts[type(child)] > 1:
            yield inner
        else:
            yield from _repeated(child, inner)


class _Finder:
    """Search for the largest modules that may run in tiles, and for spans in other modules.

    Attributes:
        tiles: FQNs of the modules that may run in tiles.
        spans: Parts of other modules, by the FQNs of their first and last modules.
        left: FQNs of modules that cannot run in tiles, each with the reason.
    """

    def __init__(self, capture: Capture, above: set[str]) -> None:
        assert capture.matches is not None
        self.tiles: list[str] = []
        self.spans: dict[tuple[str, str], Span] = {}
        self.left: list[tuple[str, str]] = []
        self._capture, self._above = capture, above
        self._sites: Sequence[Site] = capture.matches.sites
        # Adapters with state, or those that depend on the tokens, need all tokens of a call.
        self._counting = {
            row.site.owner: row.kind
            for row in (capture.plan.sites if capture.plan is not None else ())
            if kind_of(row).reads_tokens
            or not all(slot.trained for slot in kind_of(row).slots(row.site))
        }
        self._known: dict[Any, str] = {}

    def look(self, module: nn.Module, fqn: str) -> None:
        """Decide if a module may run in tiles. If not, search it for spans, and search its children."""
        if isinstance(module, AdapterModule) or not any(True for _ in module.parameters()):
            return
        if fqn not in self._above and type(module).forward is not nn.Module.forward:
            reason = self._objection(module, fqn)
            if not reason and not self._cuts_span(fqn):
                self.tiles.append(fqn)
                return
            if any(True for _ in module.children()):
                self.left += [(fqn, reason)] if reason else []
                spans, left = find_spans(self._capture, module, fqn, self._is_alone)
                self.left += left
                for span in spans:
                    self.spans.setdefault((span.first, span.last), span)
        for name, child in module.named_children():
            self.look(child, join(fqn, name))

    def _cuts_span(self, fqn: str) -> bool:
        """Return True if a span begins in a module and ends outside, or the other way around.

        Such a module cannot run in tiles itself.
        """
        return any(_is_in(first, fqn) != _is_in(last, fqn) for first, last in self.spans)

    def _is_alone(self, fqn: str) -> bool:
        """Return True if a module computes each token from that token alone."""
        return not self._reason(self._capture.model.get_submodule(fqn), fqn)

    def _objection(self, module: nn.Module, fqn: str) -> str:
        """Return the reason why a module cannot run in tiles; empty if it can."""
        matrices = sum(p.dim() > 1 for p in module.parameters())
        leaf = not any(True for _ in module.children())
        if leaf and (matrices == 1 or type(module).__module__.startswith("torch.")):
            return "it is a single operation"
        return self._reason(module, fqn)

    def _reason(self, module: nn.Module, fqn: str) -> str:
        """Return the reason why a module computes tokens from other tokens, too; empty if it does not.

        Equal modules are tried only once.
        """
        for owner, kind in self._counting.items():
            if _is_in(owner, fqn):
                return (
                    f"its adapters are of the kind {kind!r}, which depends on all tokens of a call"
                )
        experts = any(site.experts for site in self._sites if _is_in(site.owner, fqn))
        sizes = {site.in_features for site in self._sites if _is_in(site.owner, fqn)}
        sizes |= {len(p) for p in module.parameters() if p.dim() == 1}
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        settings = tuple(_settings(part) for part in module.modules())
        key = (type(module), shapes, str(module), settings)
        if key not in self._known:
            self._known[key] = _tried(module, sorted(sizes), experts)
        return self._known[key]


def _is_in(owner: str, fqn: str) -> bool:
    return owner == fqn or owner.startswith(f"{fqn}.")


def _is_in_any(owner: str, fqns: Sequence[str]) -> bool:
    return any(_is_in(owner, fqn) for fqn in fqns)


def _tried(module: nn.Module, sizes: Sequence[int], experts: bool) -> str:
    """Try a module on random tokens. Return the reason why it cannot run in tiles; empty if it can.

    Args:
        module: The module.
        sizes: Numbers of features to try for its input.
        experts: True if the module has experts.
    """
    arguments = [*inspect.signature(type(module).forward).parameters.values()][1:]
    needed = [
        argument
        for argument in arguments
        if argument.default is argument.empty
        and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    ]
    if not arguments or len(needed) > 1:
        return f"it needs {len(needed)} arguments"
    try:
        module = _with_small_weights(module).train()
    except Exception as error:  # noqa: BLE001  of the user's code
        return f"it cannot be copied ({type(error).__name__})"
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) > 1 or torch.device("meta") in devices:
        return "its quantized weights have no values yet"
    device = next(iter(devices))
    for size in sizes:
        reason = _trial(module, torch.randn(1, _TOKENS, size, device=device), experts)
        if reason is not None:
            return reason
    return "it needs more than one tensor [..., tokens, features]"


def _trial(module: nn.Module, x: Tensor, experts: bool) -> str | None:
    """Try a module on the tokens `x`. Return the reason why it cannot run in tiles; empty if it can.

    Return None if the module fails for this input.
    """
    try:
        follows = _objection_by_rules(module, x)
        if follows and experts:
            x = torch.randn(1, _TOKENS_OF_EXPERTS, x.shape[-1], device=x.device)
            return _objection_by_values(module, x)
        return follows or _objection_by_values(module, x)
    except Exception as error:  # noqa: BLE001  another size or another kind of argument
        _log.debug("%s does not take %s: %s", type(module).__name__, tuple(x.shape), error)
        return None


def _with_small_weights(module: nn.Module) -> nn.Module:
    """Copy a module with random weights that need almost no memory, in fp32 on the CPU.

    Quantized weights of a library's own layers are shared with the original module. All others become dense.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor
        if not plain and not isinstance(tensor, PackedTensor):
            memo[id(tensor)] = tensor
            continue
        value = _strided_random(tensor) if tensor.is_floating_point() else _copied(tensor)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if parameter else value
    return copy.deepcopy(module, memo)


def _copied(values: Tensor) -> Tensor:
    return torch.zeros(values.shape, dtype=values.dtype) if values.is_meta else values.cpu().clone()


def _strided_random(like: Tensor) -> Tensor:
    """Return a random tensor whose elements differ along each axis, and that has little memory.

    Element [i, j] of a matrix is random number i + j. The matrices of a stack are contiguous, because some
    kernels need that, and each begins a few numbers after the one before it.
    """
    shape = like.shape
    strides = [1] * len(shape) if len(shape) < 3 else [_STEP] * (len(shape) - 2) + [shape[-1], 1]
    count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return (torch.randn(count) / 8).as_strided(shape, strides)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return the public attributes of a module, to see if two modules have equal settings."""
    simple = (bool, int, float, str, type(None))
    return tuple(
        (name, value if isinstance(value, simple) else id(value))
        for name, value in vars(module).items()
        if not name.startswith("_")
    )


def _state(module: nn.Module) -> list[Any]:
    """Return a snapshot of the attributes and buffers of a module, to detect if a call changes them."""
    attributes = [
        {name: id(value) for name, value in vars(part).items()} for part in module.modules()
    ]
    buffers = [
        (id(tensor), version_counter(tensor), data_address(tensor)) for tensor in module.buffers()
    ]
    return [attributes, buffers]


def _results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Call a module, and return its results, each reshaped to [tokens, out].

    Raises:
        ValueError: If a result is not a tensor with one vector for each token.
    """
    results, _ = pytree.tree_flatten(module(x))
    tokens = x.shape[:-1].numel()
    for result in results:
        shapes = (x.shape[:-1], torch.Size([tokens]))
        if not isinstance(result, Tensor) or result.shape[:-1] not in shapes:
            raise ValueError("a result is not a tensor [..., tokens, features]")
    return [result.reshape(tokens, -1) for result in results]


class _Bounded(TorchFunctionMode):
    """Mode in which a function raises if its result is far too large for a module that computes tokens.

    An image model may take the tokens as rows of pixels. Attention between all pixels would then need too
    much memory.
    """

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        widths = (
            p.numel() // min((size for size in p.shape if size > 1), default=1)
            for p in module.parameters()
        )
        self._most = _SPARE * x.shape[:-1].numel() * (x.shape[-1] + sum(widths))

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and check the size of its result.

        Raises:
            ValueError: If the result is too large.
        """
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() > self._most:
            raise ValueError(f"a result has {result.numel()} elements")
        return result


def _objection_by_rules(module: nn.Module, x: Tensor) -> str:
    """Return the reason why a module may mix tokens, according to the row rules; empty if it cannot mix them.

    Args:
        module: The module.
        x: Its argument, [1, tokens, features].
    """
    with torch.no_grad(), _Bounded(module, x):
        _results(module, x)  # a first call may set attributes for good
    before = _state(module)
    tokens = x.shape[1]
    follower = Follower(module, tokens, 1)
    numbers = torch.arange(tokens, dtype=follower.dtype, device=x.device)
    follower.write(x, torch.stack([numbers, -numbers]).reshape(2, 1, tokens, 1))
    state = torch.get_rng_state()
    with torch.no_grad(), follower:
        results = _results(module, x)
    if not torch.equal(state, torch.get_rng_state()):
        return "it draws random numbers"
    if _state(module) != before:
        return "it sets attributes or buffers"
    own = numbers.reshape(tokens, 1)
    for result in results:
        sets = follower.read(result)
        if sets is None or not bool(((sets[0] == own) & (sets[1] == -own)).all()):
            return "it mixes tokens"
    return ""


def _results_in_shape(module: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Return a list with the results of a module for tokens `x`; empty if the module rejects their shape."""
    try:
        return [_results(module, x)]
    except Exception:  # noqa: BLE001  of the user's code
        return []


def _objection_by_values(module: nn.Module, x: Tensor) -> str:
    """Return a reason if a module gives other results for parts of the tokens than for all of them.

    The reason is empty if the results agree.
    """
    half = x.shape[1] // 2
    with torch.no_grad():
        state = torch.get_rng_state()
        whole = _results(module, x)
        if not torch.equal(state, torch.get_rng_state()):
            return "it draws random numbers"
        halves = [
            *map(
                torch.cat,
                zip(_results(module, x[:, :half]), _results(module, x[:, half:]), strict=True),
            )
        ]
        pairs = _results(module, x.view(2, half, -1))
        shaped = [
            *_results_in_shape(module, x[0]),
            *_results_in_shape(module, x.view(2, half // 3, 3, -1)),
        ]
    for result, *parts in zip(whole, halves, pairs, *shaped, strict=True):
        scale = float(result.abs().max()) or 1.0
        if not all(torch.allclose(other, result, rtol=1e-3, atol=1e-4 * scale) for other in parts):
            return "its tokens depend on their position or on each other"
    return ""
