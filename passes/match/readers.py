"""Who reads a weight, apart from the operation that it is matched with.

An adapter changes one use of a weight, a merge all of them: what else reads it decides whether it can be
adapted at all.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from torch import fx, nn

from lora_fx.ir import Capture, Region, Rejection, join
from lora_fx.passes.graph import is_matrix, target_of
from lora_fx.passes.patterns import itemised, site_name, splits, weight_of

__all__ = ["Read", "nameless", "no_product", "readers"]


# Asked of a weight, these do not depend on its values.
_METADATA = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "layout"})
_METADATA_METHODS = frozenset(
    {"size", "dim", "numel", "element_size", "is_floating_point", "stride"}
)
# What gives a weight another form, and says nothing about what is done with it.
_FORMS = frozenset(
    {"view", "reshape", "expand", "expand.default", "repeat", "unsqueeze", "squeeze", "clone", "to"}
)
# What is done with tables, tokens and biases of two dimensions: nothing that a low-rank factor stands for.
_NO_PRODUCTS = frozenset(
    {"add", "iadd", "add_", "add.Tensor", "cat", "concat", "cat.default", "stack", "attend"}
)


@dataclasses.dataclass(frozen=True)
class Read:
    """A node that reads the values of a weight, and what it does."""

    region: str
    node: str
    what: str


def readers(capture: Capture) -> dict[str, list[Read]]:
    """By FQN of each matrix: the nodes that read its values, transposes passed over."""
    result: dict[str, list[Read]] = defaultdict(list)
    for region in capture.regions.values():
        for node in region.graph.nodes:
            parameter = region.parameter(node)
            if not is_matrix(parameter):
                continue
            name = join(region.fqn, str(node.target))
            for user in _consumers(node, region):
                result[name].append(
                    Read(region.fqn, user.name, itemised(target_of(user) or user.target))
                )
    return result


def no_product(weight: str, reads: list[Read]) -> Rejection | None:
    """Return the reason for a weight without a matching operation; None where none is expected."""
    # A bias for each expert is a table, too.
    if all(read.what in _NO_PRODUCTS for read in reads) or weight.endswith("bias"):
        return None
    name = site_name(weight)
    return Rejection(name, f"its only use is by {reads[0].what}, not a linear operation")


def nameless(capture: Capture) -> dict[str, Rejection]:
    """Tied weights that a graph reads without saying by which of their names.

    A trace calls every one of them by the first. Merging unties, so that it would matter.
    """
    result = {}
    everywhere = _places(capture.model)
    for region in capture.regions.values():
        read = [(n, p) for n in region.graph.nodes if (p := region.parameter(n)) is not None]
        if not any(
            "." in str(node.target) or len(region.module._parameters) > 1 for node, _ in read
        ):
            continue
        places = _places(region.module)
        for node, parameter in read:
            names = {join(region.fqn, name) for name in places[id(parameter)].values()}
            # A module under two names: its own graph has the first, one that reads it, the other.
            names.update(everywhere[id(parameter)][place] for place in places[id(parameter)])
            if len(names) == 1 or not is_matrix(parameter):
                continue
            reason = (
                f"its weight is one parameter under several names ({', '.join(sorted(names))}), "
                "and a forward reads it directly: call the module that holds it, or use one name"
            )
            for name in names:
                result[name] = Rejection(site_name(name), reason, region.fqn, node.name)
    return result


def _places(module: nn.Module) -> dict[int, dict[tuple[int, str], str]]:
    """By parameter: where it is registered, with a name for each place."""
    places: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for fqn, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places[id(parameter)][id(owner), key] = join(fqn, key)
    return places


def _consumers(node: fx.Node, region: Region) -> Iterator[fx.Node]:
    for user in node.users:
        looks = weight_of(user, region) is not None or splits(user)
        if looks or itemised(target_of(user) or user.target) in _FORMS:
            yield from _consumers(user, region)
        elif not _asks_metadata(user):
            yield user


def _asks_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.target is getattr and node.args[1] in _METADATA
