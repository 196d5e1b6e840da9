"""Adapter kinds: their protocol and their registry.

A kind defines the tensors that an adapter trains at a site, its computation in a graph, the change that a
merge makes, and its costs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx

from lora_fx.config import FrozenOptions, LoraConfig, changes_base
from lora_fx.errors import ConfigError, hint
from lora_fx.ir import Factors, OutputBuilder, Pattern, PlannedSite, Region, Site

__all__ = [
    "RANK",
    "AdapterKind",
    "Costs",
    "Slot",
    "Starting",
    "along",
    "base_change",
    "chosen_kind",
    "config_for",
    "is_plain",
    "kind_objection",
    "kind_of",
    "kind_with",
    "kinds",
    "refusal",
    "register_adapter_kind",
    "site_kind",
    "stores_product",
    "union_of",
]


RANK: Final = -1
"""A size in the shape of a slot that stands for the rank of the site."""


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a kind at a site, in addition to A and B.

    Attributes:
        parameters: Trainable elements.
        flops: Forward FLOPs for one token. Work that does not depend on the number of tokens is left out.
        saved: Elements saved for backward for one token, if the next operation does not keep them anyway.
    """

    parameters: int = 0
    flops: int = 0
    saved: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a kind at a site, in addition to A and B or without them.

    Most slots are trained vectors over the output features. A slot may have any other shape, also with the
    rank as a size. A slot that is not trained is the state of an adapter: training calls write into it.

    Attributes:
        name: The attribute of the site's holder that stores the tensors of all adapters.
        key: Its key in an adapter folder, below the name of the module; empty if no folder has it.
        shape: The stored shape; :data:`RANK` stands for the rank. For a vector over the output features:
            their number, and any axes of size 1.
        what: A noun phrase with an article for messages, such as "a magnitude".
        neutral: The value with which the slot changes nothing; None if that depends on the weight.
        scaled: True if the scale of the branch multiplies the slot.
        multiplies: True if the slot is a factor, False if it is a summand.
        role: The name of its input in a file that takes adapters as inputs: "bias" or "gain"; empty if it has
            no input.
        normed: True if the slot is divided by the norm of the weight.
        over_outputs: True for a vector over the output features. A merge slices it together with the weight.
        trained: True for a trained tensor, False for state.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    what: str
    neutral: float | None = 0.0
    scaled: bool = False
    multiplies: bool = False
    role: str = ""
    normed: bool = False
    over_outputs: bool = True
    trained: bool = True

    def sized(self, rank: int) -> tuple[int, ...]:
        """Return the stored shape at a rank."""
        return tuple(rank if size == RANK else size for size in self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Starting:
    """The values from which initial values of a slot may be computed.

    Attributes:
        row: The site.
        weight: Its weight as stored. Do not write to it.
        a, b: The factors as stored; None without factors.
        config: The configuration.
        generator: Returns a separate generator of random numbers for each name.
    """

    row: PlannedSite
    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    config: LoraConfig
    generator: Callable[[str], torch.Generator]


class AdapterKind:
    """The part of an adapter that is trained at a site. Subclass it, and register an instance.

    A kind is **additive**, as LoRA is: it adds ``s · B A``, the product of two factors. The pattern of the
    operation defines their shapes (:attr:`low_rank`). Or it is **multiplicative**: it computes a new weight
    from the existing one (:attr:`transforms`), with or without factors. All its other tensors are in slots,
    trained or not.

    The stored factors may have another shape than those that the pattern reads (:meth:`factors`). The latter
    are then computed from the stored factors and the slots, by :meth:`factor` in a graph and by
    :meth:`merged_factors` in a merge. A kind may differ between sites (:meth:`at`). Its effect may depend on
    the call, so that no merged weight can have it (:attr:`dynamic`).

    A kind needs at least a name, :meth:`slots`, :meth:`costs` and its computation. The computation is
    :meth:`joined` in a graph, and :meth:`transformed` and :meth:`bias_terms` in a merge.
    ``examples/custom_kind.py`` has an example.

    Attributes:
        name: Unique, kebab-case.
        low_rank: True if it has the factors A and B. Without them it has no rank, no scale and no dropout.
        transforms: True if it computes a new weight from the existing one: :meth:`transformed`.
        scales_bias: True if it also changes the bias that the operation adds, which must be a parameter then.
        trains: The parts that it trains in addition to A and B, in words for the dry run; empty for none.
        keys: The keys of its slots in an adapter folder. They show which sites a kind without factors adapts.
        fields: The fields of PEFT's configuration that choose it if exactly these are set; empty for a kind
            that ``LoraConfig(kind=name)`` chooses.
        chosen_start: The value of ``init_lora_weights`` that chooses it; empty for a kind that is not chosen
            by this field.
        frozen: The factors that are not trained: "a", "b" or both.
        dynamic: The reason why no merged weight can have the effect of the adapter, and a remedy, in words
            that continue "because"; empty if a weight can. The error of a merge, or of code that reads the
            weight, has these words.
        reads_tokens: True if its graphs read the tokens of the running call
            (:mod:`lora_fx.runtime.rows.call_tokens`).
        does: The effect, in words that are followed by "each output feature": "a bias on B adds to".
        depends: The reason why the inputs of a file that takes adapters as inputs depend on the base weights,
            in words; empty if they do not.
        constants: Functions in its graphs that have only parameters as arguments. An exported file stores
            their results instead.
        handed: Functions in its graphs that are left out of a file that takes adapters as inputs. In such a
            file, the first argument of the function is an input, which already is the result.
        in_parts: True if its branch is right over a weight split across processes (tensor parallelism).
        widens: True if zeros at the end of the rank (of each group of a convolution) change nothing.
        deploys: True if it changes nothing but the weight, by ``s·BA``, so that ``deploy=`` of
            :func:`lora_fx.rewrite` can round the adapted weight.
        trains_only: True if its slots act in training alone, so that a merge needs nothing but A and B.
        options: The settings of the kind at a site (:meth:`at`); None for a kind without settings.
    """

    name: str = ""
    low_rank: bool = True
    transforms: bool = False
    scales_bias: bool = False
    trains: str = ""
    keys: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    chosen_start: str = ""
    frozen: tuple[str, ...] = ()
    dynamic: str = ""
    reads_tokens: bool = False
    does: str = ""
    depends: str = ""
    constants: tuple[Any, ...] = ()
    handed: tuple[Any, ...] = ()
    in_parts: bool = False
    widens: bool = True
    deploys: bool = False
    trains_only: bool = False
    options: Mapping[str, Any] | None = None

    # --- choice -----------------------------------------------------------------------------------

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return the kind of a site: this kind with :meth:`options <with_options>`, or another kind.

        By default, the options are the value of the field that chooses the kind, if that is a mapping.
        """
        value = getattr(config, self.fields[0]) if self.fields else None
        return self.with_options(value) if isinstance(value, Mapping) else self

    def with_options(self, options: Mapping[str, Any] | None) -> AdapterKind:
        """Return a copy of the kind with the options of a site.

        A planned site stores the options, as plain and hashable values.
        """
        if options is None:
            return self
        kind = copy.copy(self)
        kind.options = FrozenOptions(options)
        return kind

    @property
    def field(self) -> str:
        """The configuration field to name in messages: the first that chooses the kind."""
        return (
            self.fields[0] if self.fields else "init_lora_weights" if self.chosen_start else "kind"
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the other adapters whose factors are read (:meth:`lora_fx.ir.OutputBuilder.other`)."""
        return ()

    @property
    def stores(self) -> bool:
        """True if an adapter folder has parameters of this kind."""
        return self.low_rank or bool(self.keys)

    @property
    def direct(self) -> bool:
        """True if the change of the weight is ``s·BA`` of the factors as stored.

        Then :meth:`merged_factors` returns the stored factors.
        """
        return type(self).merged_factors is AdapterKind.merged_factors

    @property
    def new_base(self) -> bool:
        """True if an adapter of this kind changes the base weight at the start: :meth:`start_base`."""
        return type(self).start_base is not AdapterKind.start_base

    def config_for(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
        """Complete the configuration of an adapter folder by settings that only its tensors show.

        Args:
            config: The configuration in the folder.
            tensors: Its tensors by PEFT's keys, without the prefix.
        """
        return config

    # --- factors ----------------------------------------------------------------------------------

    def factors(self, site: Site, shapes: Factors) -> Factors:
        """Return the shapes in which A and B are stored.

        Args:
            site: The site.
            shapes: The shapes that the pattern reads.
        """
        return shapes

    def start_pair(self, starting: Starting) -> tuple[Tensor, Tensor]:
        """Return the initial values of A and B, in the stored shapes.

        Args:
            starting: The values to compute A and B from. Its A and B have the initial values of LoRA.
        """
        assert starting.a is not None
        assert starting.b is not None
        return starting.a, starting.b

    @property
    def starts_from_weight(self) -> bool:
        """True if initial values may depend on the weight of the site."""
        return self.new_base or type(self).start_pair is not AdapterKind.start_pair

    # --- slots, costs, limits ---------------------------------------------------------------------

    def slots(self, site: Site) -> tuple[Slot, ...]:
        """Return the slots of the kind at a site: all its tensors in addition to A and B."""
        return ()

    def costs(self, site: Site, rank: int) -> Costs:
        """Return the costs at a site, in addition to those of the pattern's A and B."""
        return Costs()

    def check(self, config: LoraConfig) -> None:
        """Raise if a configuration sets fields that do not apply to this kind.

        Raises:
            ConfigError: With the field and a remedy.
        """
        if self.low_rank:
            return
        for name, off in _OF_FACTORS.items():
            if (value := getattr(config, name)) != off:
                raise ConfigError(
                    f"LoraConfig.{name}: found {value!r}; the kind {self.name!r} has no factors A and B, of "
                    f"which this says something: leave it out"
                )

    @property
    def setting(self) -> str:
        """The setting of a configuration that chooses the kind, in words for messages."""
        if self.chosen_start:
            return f"init_lora_weights={self.chosen_start!r}"
        if not self.fields:
            return f"the kind {self.name!r}"
        return f"{self.field}=True" if self.options is None else self.field

    @property
    def remedy(self) -> str:
        """The change of a configuration that chooses another kind, in words for messages."""
        if self.chosen_start:
            return "set init_lora_weights=True"
        if not self.fields:
            return "choose another kind"
        return f"set {self.field}=False" if self.options is None else f"leave out {self.field}"

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have this kind, with a remedy; None if it can.

        Args:
            site: The site.
            rank: Its rank; 0 for a kind without factors.
        """
        remedy = self.remedy
        for slot in self.slots(site):
            noun = slot.what.removeprefix("a ")
            if site.experts:
                return (
                    f"a weight with a matrix for each expert has no {noun} (as in PEFT): leave it out, or "
                    f"{remedy}"
                )
            if not all(call.axes for call in site.calls):
                return (
                    f"{self.does or f'the kind {self.name!r} changes'} each output feature, and nothing "
                    "says where they are (an ellipsis in the equation comes after them): write the "
                    f"dimensions out, or {remedy}"
                )
        if self.scales_bias and site.bias is None and any(call.bias for call in site.calls):
            return (
                f"the kind {self.name!r} changes what the operation adds, and that is no parameter, so that "
                f"no merge could: make it one, or {remedy}"
            )
        return None

    def start(self, slot: Slot, starting: Starting) -> Tensor:
        """Return the initial values of a slot, in any shape and dtype.

        Args:
            slot: One of :meth:`slots`.
            starting: The values that they may depend on.
        """
        if slot.neutral is None:
            raise NotImplementedError(f"the kind {self.name!r} does not say how {slot.name} starts")
        return torch.full(slot.sized(starting.row.rank), slot.neutral)

    def start_base(self, row: PlannedSite, weight: Tensor) -> Tensor:
        """Return a new tensor that replaces the weight of the base. The default keeps the weight.

        Args:
            row: The site.
            weight: The weight of the site as stored. Do not write to it.
        """
        return weight

    def penalty(
        self, row: PlannedSite, factors: Mapping[str, Tensor], *, sites: int, training: bool
    ) -> Tensor | None:
        """Return the term of a site in the loss (:func:`lora_fx.adapter_penalty`); None for no term.

        Args:
            row: The site.
            factors: A and B as "a" and "b", and the slots by name, as stored.
            sites: The number of sites with this kind. The terms are summed: divide by it for a mean.
            training: True if the site is in training mode.
        """
        return None

    # --- graphs -----------------------------------------------------------------------------------

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write the nodes that compute A or B from the stored tensor, without a cast. Return the last node.

        Args:
            build: Writes nodes.
            letter: "a" or "b".
            stored: The node that reads the stored factor, transposed if the site shares factors of another.
        """
        return stored

    def branch(
        self, pattern: Pattern, node: fx.Node, region: Region, build: OutputBuilder
    ) -> fx.Node:
        """Write ``B A drop(x)`` for the pattern's operation, and return its node.

        Args:
            pattern: The pattern of the operation.
            node: The operation.
            region: Its region.
            build: Writes nodes.
        """
        return pattern.branch(build.site, node, region, build)

    def factor_b(self, build: OutputBuilder) -> fx.Node:
        """Write B as the product takes it, in the dtype of the branch. The default casts :meth:`factor`."""
        return build.cast_factor("b")

    def branch_bias(self, build: OutputBuilder) -> fx.Node | None:
        """Write the bias [out] of the operation that applies B, and return its node; None for no bias."""
        return None

    def without_bias(self) -> AdapterKind:
        """Return the kind to use for a product with a layer's weight that leaves out the layer's bias."""
        return self

    def joined(self, build: OutputBuilder, up: fx.Node | None) -> fx.Node:
        """Write the output of the operation with the adapter, and return its node.

        The node has the role ``ADD``, and its first argument is ``build.total``. If ``build.total`` is not
        ``build.base``, it already includes other adapters, and the change of this adapter is added to it. A
        kind sets its fused function here (:meth:`lora_fx.ir.OutputBuilder.fuse_by`).

        Args:
            build: Writes nodes.
            up: The node of ``B A x``, which the pattern has written; None without factors.
        """
        raise NotImplementedError(f"the kind {self.name!r} does not say what it computes (joined)")

    # --- merges -----------------------------------------------------------------------------------

    def values(self, site: Site, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return stored slots in the shapes that merges take: vectors over the output features are flat.

        Args:
            site: The site.
            slots: The slots by name, as stored.
        """
        flat = {slot.name for slot in self.slots(site) if slot.over_outputs}
        return {name: slot.flatten() if name in flat else slot for name, slot in slots.items()}

    def merged_factors(
        self, site: Site, a: Tensor, b: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of the change ``s·BA``, in the pattern's shapes, differentiably.

        Args:
            site: The site.
            a: A as stored, or for a site that shares factors, the transpose of the shared factor.
            b: B as stored, or for a site that shares factors, the transpose of the shared factor.
            values: The slots by name, in the dtype of the factors (:meth:`values`).

        Raises:
            MergeError: If no such factors have the effect of the adapter.
        """
        return a, b

    def transformed(self, weight: Tensor, site: Site, values: Mapping[str, Tensor]) -> Tensor:
        """Return the adapted weight, a new tensor of the same shape.

        A merge calls it for slices along the output features (:attr:`lora_fx.ir.Site.axis`).

        Args:
            weight: A slice of ``W + s·BA``, or of W without factors, in the dtype of the computation.
            site: The site.
            values: The slots by name (:meth:`values`), for the output features of the slice.
        """
        raise NotImplementedError(f"the kind {self.name!r} does not say what weight it makes")

    def bound(self, values: Mapping[str, Tensor]) -> float | None:
        """Return an upper bound for the elements of :meth:`transformed`, for any weight; None if unknown.

        Args:
            values: The slots by name.
        """
        return None

    def bias_terms(
        self, bias: Tensor | None, values: Mapping[str, Tensor], scale: float
    ) -> Sequence[tuple[Tensor, float]]:
        """Return the vectors that a merge adds to the bias of the operation, each with a factor.

        Args:
            bias: The bias of these output features; None if there is none.
            values: The slots by name, in the dtype of the bias.
            scale: The factor of the branch.

        Returns:
            Nothing for a kind that has no use for a bias. A merge is refused if there are terms and no bias
            to add them to.
        """
        return ()

    # --- files that take adapters as inputs -------------------------------------------------------

    def inputs(
        self,
        row: PlannedSite,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the inputs of an exported file that takes adapters: B and the slots, by role.

        Args:
            row: The site.
            weight: The base's weight.
            a: A.
            b: B.
            values: The slots by name (:meth:`values`).
        """
        inputs = {"B": b.double() * row.scale}
        for slot in self.slots(row.site):
            value = values[slot.name].double()
            inputs[slot.role] = value * row.scale if slot.scaled else value
        return inputs

    def from_inputs(
        self, site: Site, weight: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return B and the slots by role from the inputs of an exported file.

        This is the inverse of :meth:`inputs` at scale 1.

        Args:
            site: The site.
            weight: The base's weight.
            inputs: The inputs of the file by role, including A.
        """
        return {}


_OF_FACTORS: Mapping[str, Any] = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "ensure_weight_tying": False,
    "init_lora_weights": True,
}


def along(vector: Tensor, weight: Tensor, site: Site) -> Tensor:
    """Return a vector over the output features in a shape that multiplies a weight of the site.

    Args:
        vector: [out].
        weight: The weight, or some of its output features.
        site: The site.
    """
    ones = [1] * (weight.dim() - 2)
    if site.layout == "out_in":
        return vector.reshape(-1, 1, *ones)
    grouped = vector.reshape(site.groups, 1, -1, *ones)
    return grouped.expand(-1, weight.shape[0] // site.groups, *grouped.shape[2:]).flatten(0, 1)


def _built_in() -> tuple[AdapterKind, ...]:
    """Return the kinds in the ``KINDS`` of every file of this package, additive kinds first."""
    files = pkgutil.iter_modules([str(Path(__file__).parent)])
    modules = (importlib.import_module(f"{__name__}.{file.name}") for file in files)
    built_in = (kind for module in modules for kind in getattr(module, "KINDS", ()))
    return tuple(sorted(built_in, key=lambda kind: bool(kind.transforms)))


_BUILT_IN = _built_in()
_PLAIN = next(kind for kind in _BUILT_IN if kind.name == "lora")
_registry: tuple[AdapterKind, ...] = _BUILT_IN


def kinds() -> tuple[AdapterKind, ...]:
    """Return all kinds, in the order in which they were registered."""
    return _registry


def register_adapter_kind(kind: AdapterKind) -> None:
    """Register a new adapter kind, with or without the factors A and B.

    A configuration chooses it by its name, ``LoraConfig(kind="ia3", target_modules=[...])``. All of PEFT's
    fields keep their meaning: they select the operations to adapt and the other parameters to train. A kind
    without factors refuses fields about A and B. PEFT's own variants have no ``kind``: their fields choose
    them (``lora_bias`` and the like), so that PEFT reads the saved folders.

    An adapter folder stores the name in ``adapter_config.json``, with a ``peft_type`` that PEFT does not
    accept as LoRA. The folder loads wherever the kind is registered.

    Args:
        kind: An instance of a subclass of :class:`lora_fx.kinds.AdapterKind`. Its options are its
            attributes.

    Raises:
        ConfigError: If its name is empty or belongs to another kind, or it has neither factors nor a weight
            transform.
    """
    global _registry  # noqa: PLW0603  # one list for the process
    candidate: object = kind
    if not isinstance(candidate, AdapterKind) or not candidate.name:
        raise ConfigError(
            f"{candidate!r} is no adapter kind with a name: subclass lora_fx.kinds.AdapterKind"
        )
    # A cell of a notebook that is run again defines its class again.
    if any(
        registered.name == kind.name and _place(registered) != _place(kind)
        for registered in _registry
    ):
        raise ConfigError(f"the kind {kind.name!r} is registered already: give it another name")
    if not kind.low_rank and not kind.transforms:
        raise ConfigError(
            f"the kind {kind.name!r} has no factors (low_rank) and makes no other weight (transforms): it "
            "would train nothing that a merge knows"
        )
    if not kind.low_rank and not kind.keys:
        raise ConfigError(
            f"the kind {kind.name!r} has no factors and says no keys, by which a folder could be read"
        )
    _registry = (*(registered for registered in _registry if registered.name != kind.name), kind)


def _place(kind: AdapterKind) -> tuple[str, str]:
    return type(kind).__module__, type(kind).__qualname__


class _Kinded(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any] | None: ...


def kind_of(row: _Kinded) -> AdapterKind:
    """Return the kind of a planned site, with its options.

    Raises:
        ConfigError: If the kind was registered in another process and not in this one.
    """
    return _named(row.kind).with_options(row.options)


def _named(name: str) -> AdapterKind:
    for kind in _registry:
        if kind.name == name:
            return kind
    names = [kind.name for kind in _registry if kind not in _BUILT_IN]
    near = hint(name, names, "did you mean '{}'? ", count=1)
    raise ConfigError(
        f"the adapter kind {name!r} is not registered here: {near}call lora_fx.register_adapter_kind with it "
        "first"
    )


def chosen_kind(config: LoraConfig) -> AdapterKind:
    """Return the kind that a configuration chooses, without a site's options.

    Raises:
        ConfigError: If the kind is not registered, other fields choose it, or fields do not apply to it.
    """
    start = next(
        (k.chosen_start for k in _BUILT_IN if k.chosen_start == config.init_lora_weights), ""
    )
    if config.kind is None:
        fields = {field for kind in _BUILT_IN for field in kind.fields if getattr(config, field)}
        for kind in _BUILT_IN:
            if set(kind.fields) == fields and kind.chosen_start == start:
                return kind
        settings = [*sorted(fields), *([f"init_lora_weights={start!r}"] if start else ())]
        raise ConfigError(
            f"LoraConfig: {' and '.join(settings)} do not go together, as in PEFT: leave out all but one"
        )
    kind = _named(config.kind)
    if kind in _BUILT_IN:
        reason = f"{kind.setting} chooses it" if kind.fields else "it is not chosen by name"
        raise ConfigError(f"LoraConfig.kind: found {kind.name!r}; {reason}: leave out kind")
    if start:
        remedy = f"kind={config.kind!r} is another adapter: leave out one of both"
        raise ConfigError(f"LoraConfig.init_lora_weights: found {start!r}; {remedy}")
    kind.check(config)
    return kind


def site_kind(site: Site, config: LoraConfig) -> AdapterKind:
    """Return the kind that a configuration chooses for a site."""
    return chosen_kind(config).at(site, config)


def config_for(config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """Complete the configuration of an adapter folder by settings that only its tensors show.

    Args:
        config: The configuration in the folder.
        tensors: Its tensors by PEFT's keys, without the prefix.
    """
    return functools.reduce(lambda known, kind: kind.config_for(known, tensors), _registry, config)


def is_plain(config: LoraConfig) -> bool:
    """Return True if a configuration chooses A and B and nothing else: ``W' = W + s · B A``."""
    return chosen_kind(config) is _PLAIN


def base_change(config: LoraConfig) -> str:
    """Return the setting that makes an adapter start from another base weight; empty if there is none."""
    if changes_base(config.init_lora_weights):
        return f"init_lora_weights={config.init_lora_weights!r}"
    kind = chosen_kind(config)
    return kind.setting if kind.new_base else ""


def kind_objection(site: Site, rank: int, config: LoraConfig) -> str | None:
    """Return the reason why a selected site cannot have the configuration's kind; None if it can.

    Raises:
        ConfigError: If the site cannot have the kind, and the configuration lists the site by its name.
    """
    kind = site_kind(site, config)
    _check_merges(kind, site)
    reason = kind.objection(site, rank)
    if reason is not None and _is_named(site.name, config):
        raise ConfigError(f"{site.name}: {reason}")
    return reason


def _check_merges(kind: AdapterKind, site: Site) -> None:
    """Raise if nothing says how a kind's trained slots change a merged model.

    Raises:
        ConfigError: With the names of the slots, and of the methods to override.
    """
    said = kind.transforms or kind.dynamic or kind.trains_only or not kind.direct
    if said or not kind.low_rank:
        return
    trained = [slot.name for slot in kind.slots(site) if slot.trained]
    if trained and not kind.bias_terms(None, {name: torch.zeros(()) for name in trained}, 1.0):
        raise ConfigError(
            f"the kind {kind.name!r} trains {', '.join(trained)} at {site.name}, and does not say what that "
            "changes in a merged model: override merged_factors, transformed (with transforms=True) or "
            "bias_terms; set trains_only=True if it acts in training alone; or say in dynamic why no weight "
            "has its effect"
        )


def _is_named(name: str, config: LoraConfig) -> bool:
    targets = config.target_modules
    if not isinstance(targets, tuple):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)


def refusal(kind: AdapterKind) -> str:
    """Return the reason why no merged weight can have the effect of a kind, with a remedy."""
    return f"no weight has the effect of this adapter, because {kind.dynamic}"


def stores_product(kind: AdapterKind) -> bool:
    """Return True if the change of the weight is ``s·BA`` of A and B as stored, in every call."""
    return kind.low_rank and kind.direct and not kind.dynamic


def union_of(names: Iterable[str], site: Site) -> str:
    """Return the name of a kind that trains everything that the kinds of these names train at a site.

    Raises:
        ConfigError: If no registered kind does.
    """
    members = [_named(name) for name in dict.fromkeys(names)]
    if dynamic := next((kind for kind in members if kind.dynamic), None):
        raise ConfigError(f"{site.name}: {refusal(dynamic)}")
    return kind_with({slot.name for kind in members for slot in kind.slots(site)}, site)


def kind_with(slots: Collection[str], site: Site) -> str:
    """Return the name of the kind that trains A, B and exactly these slots at a site.

    Raises:
        ConfigError: If no registered kind does.
    """
    for kind in _registry:
        if stores_product(kind) and {slot.name for slot in kind.slots(site)} == set(slots):
            return kind.name
    raise ConfigError(
        f"{site.name}: no registered kind has A, B and {', '.join(slots) or 'nothing else'}"
    )
