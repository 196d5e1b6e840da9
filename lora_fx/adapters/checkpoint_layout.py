"""Which modules and parameters PEFT wraps for the sites of an adapter, and what that does to names.

PEFT puts a wrapper in the place of a module: everything in that module has ``base_layer`` in its name then.
A wrapper of a parameter goes around the module that holds it; several of them nest in the order in which
the parameters are registered, the first innermost. ``nn.MultiheadAttention`` has one wrapper for the rows of
``in_proj_weight`` and, inside it, one for ``out_proj``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from lora_fx.ir.record import AdapterRecord
from lora_fx.ir.values import PlannedSite, Site, join
from lora_fx.passes.graph.region import original_class
from lora_fx.passes.parameters.own import base_parameters

__all__ = ["WRAPPER", "Layout", "is_attention", "layout_of"]

WRAPPER = "base_layer"
"""What a wrapper calls the module inside it."""

_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class Layout:
    """PEFT's wrappers around the modules of one model.

    Attributes:
        modules: Modules with a wrapper of their own.
        parameters: Names of the wrapped parameters of a module, the innermost first.
        attention: Which of the modules are an ``nn.MultiheadAttention``.
        transposed: Which of the modules say that their experts are stored [E, in, out].
    """

    modules: frozenset[str]
    parameters: Mapping[str, tuple[str, ...]]
    attention: frozenset[str]
    transposed: frozenset[str] = frozenset()

    @functools.cached_property
    def weights(self) -> frozenset[str]:
        """FQNs of the wrapped parameters."""
        return frozenset(
            join(owner, name) for owner, names in self.parameters.items() for name in names
        )

    def inside(self, name: str) -> str:
        """What PEFT calls a module or a tensor: its outermost wrapper, if it is wrapped itself."""
        done, found = "", ""
        for atom in name.split("."):
            found = join(found, *[WRAPPER] * self._depth(done), atom)
            done = join(done, atom)
        return found

    def prefix(self, weight: str) -> str:
        """Where the factors of a wrapped parameter are."""
        owner, _, name = weight.rpartition(".")
        names = self.parameters[owner]
        return join(self.inside(owner), *[WRAPPER] * (len(names) - 1 - names.index(name)))

    def place(self, site: Site) -> str:
        """What is one adapter to PEFT: the weight or, for an attention layer, the layer; empty if nothing.

        Several sites that have the same place are joined into that adapter.
        """
        if site.weight in self.weights:
            return site.weight
        for owner in (site.owner, site.owner.rpartition(".")[0]):
            if owner in self.attention:
                return owner
        return site.owner if site.parameter == "weight" and site.owner in self.modules else ""

    def crossed(self, site: Site) -> bool:
        """Whether A and B of a wrapped parameter change places: PEFT takes a weight for [out, in].

        And for [in, out] only where there are experts and their module has ``is_transposed``.
        """
        theirs = "in_out" if site.experts and site.owner in self.transposed else "out_in"
        return site.layout != theirs

    def joins(self, site: Site) -> bool:
        """Whether it is only a part of what is one adapter to PEFT."""
        place = self.place(site)
        return bool(place) and (site.rows is not None or place in self.attention)

    def _depth(self, module: str) -> int:
        return (module in self.modules) + len(self.parameters.get(module, ()))


def layout_of(
    model: nn.Module, record: AdapterRecord, as_parameters: Collection[str] = ()
) -> Layout:
    """PEFT's wrappers for an adapter, so that it can load whatever it can compute.

    Args:
        model: The rewritten model.
        record: The adapter.
        as_parameters: FQNs of weights that are wrapped as parameters although PEFT could wrap their module.
    """
    rows = [row for row in record.sites if not row.tied]
    # PEFT's wrappers of parameters and of attention layers have neither a magnitude nor a bias.
    plain = not (record.config.use_dora or record.config.lora_bias)
    modules: set[str] = {row.site.holder for row in record.sites if row.tied}
    parameters: dict[str, Site] = {}
    attention: set[str] = set()
    for row in rows:
        site, owner = row.site, model.get_submodule(row.site.owner)
        layer = _attention(model, site) if plain and site.weight not in as_parameters else None
        if layer is not None:
            attention.add(layer)
        elif _as_module(site, owner, plain) and site.weight not in as_parameters:
            modules.add(site.owner)
        elif plain and site.owner and _is_matrix(site):
            parameters[site.weight] = site
        elif site.owner and site.parameter == "weight" and site.rows is None:
            # A module that PEFT does not know, under the names that it would have there.
            modules.add(site.owner)
    _move(model, rows, modules, parameters)
    kept = _reachable(model, parameters, record.saved_modules)
    for layer in attention:
        modules |= {layer, join(layer, "out_proj")}
    transposed = {
        site.owner
        for site in parameters.values()
        if getattr(model.get_submodule(site.owner), "is_transposed", False)
    }
    return Layout(
        frozenset(modules), _in_order(model, kept), frozenset(attention), frozenset(transposed)
    )


def is_attention(module: nn.Module) -> bool:
    """Whether it is an ``nn.MultiheadAttention`` of a form that PEFT adapts: with one ``in_proj_weight``."""
    return isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim


def _attention(model: nn.Module, site: Site) -> str | None:
    """The attention layer of which a site is a projection."""
    if site.parameter == "in_proj_weight" and is_attention(model.get_submodule(site.owner)):
        return site.owner
    outer, _, name = site.owner.rpartition(".")
    inner = name == "out_proj" and site.parameter == "weight" and site.rows is None
    return outer if inner and is_attention(model.get_submodule(outer)) else None


def _as_module(site: Site, owner: nn.Module, plain: bool) -> bool:
    if not site.owner or site.parameter != "weight":
        return False
    known = isinstance(owner, _KINDS) or _is_conv1d(owner)
    return known if site.rows is None else known and plain and site.view is None


def _is_conv1d(module: nn.Module) -> bool:
    cls = original_class(module)
    return any(
        (one.__module__, one.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for one in cls.__mro__
    )


def _is_matrix(site: Site) -> bool:
    """Whether PEFT reads a weight as the operation does: a matrix, or one for each expert."""
    dims = len(site.weight_shape)
    return site.view is None and site.family != "conv" and dims == (3 if site.experts else 2)


def _move(
    model: nn.Module, rows: Iterable[PlannedSite], modules: set[str], parameters: dict[str, Site]
) -> None:
    """Takes as parameters what PEFT cannot have as a module beside the parameters that are there.

    A module is wrapped either for itself or for its parameters; and a Conv1D of transformers sets
    ``fan_in_fan_out``, which parameters do not allow.
    """
    owners = {site.owner for site in parameters.values()}
    for row in rows:
        site = row.site
        if site.owner not in modules or not _is_matrix(site):
            continue
        if site.owner in owners or (owners and _is_conv1d(model.get_submodule(site.owner))):
            modules.discard(site.owner)
            parameters[site.weight] = site


def _reachable(model: nn.Module, parameters: Mapping[str, Site], saved: Iterable[str]) -> list[str]:
    """Those that PEFT finds: in no module inside a wrapped one, and by a name that means no others.

    Nor does it wrap a module that holds one of ``modules_to_save``.
    """
    owners = {site.owner for site in parameters.values()}
    ends = {f".{weight}" for weight in parameters}
    taken = [name for name in base_parameters(model) if name not in parameters]
    unclear = {end[1:] for end in ends if any(name.endswith(end) for name in taken)}
    around = {outer for name in saved for outer in _outer(name)}
    return [
        weight
        for weight, site in parameters.items()
        if weight not in unclear
        and site.owner not in around
        and not any(outer in owners for outer in _outer(site.owner))
    ]


def _outer(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _in_order(model: nn.Module, weights: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for weight in weights:
        owner, _, name = weight.rpartition(".")
        found.setdefault(owner, set()).add(name)
    return {
        owner: tuple(n for n in model.get_submodule(owner)._parameters if n in names)
        for owner, names in found.items()
    }
