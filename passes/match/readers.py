"""Readers of a weight other than the operation that it is matched with.

An adapter changes one use of a weight, and a merge changes all uses. So a weight with other readers may have
to be refused.
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


# Attributes of a weight that do not depend on its values.
_METADATA = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "layout"})
_METADATA_METHODS = frozenset(
    {"size", "dim", "numel", "element_size", "is_floating_point", "stride"}
)
# Operations that only change the shape, memory or dtype of a weight.
_FORMS = frozenset(
    {"view", "reshape", "expand", "expand.default", "repeat", "unsqueeze", "squeeze", "clone", "to"}
)
# Operations on tables, tokens and biases of two dimensions, to which low-rank factors do not apply.
_NO_PRODUCTS = frozenset(
    {"add", "iadd", "add_", "add.Tensor", "cat", "concat", "cat.default", "stack", "attend"}
)


@dataclasses.dataclass(frozen=True)
class Read:
    """Node that reads the values of a weight, with the name of its operation."""

    region: str
    node: str
    operation: str


def readers(capture: Capture) -> dict[str, list[Read]]:
    """Return the nodes that read the values of each matrix, by its FQN. Transposes are skipped."""
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
    """Return the refusal of a weight that graphs read but no pattern matches; None for tables and biases."""
    # A bias for each expert is a table, too.
    if all(read.operation in _NO_PRODUCTS for read in reads) or weight.endswith("bias"):
        return None
    name = site_name(weight)
    return Rejection(name, f"its only use is by {reads[0].operation}, not a linear operation")


def nameless(capture: Capture) -> dict[str, Rejection]:
    """Return refusals of tied weights that a graph reads by an ambiguous name.

    A trace uses the first name of a tied weight for all of its uses. A merge unties the weights, so that the
    name would matter.
    """
    result = {}
    everywhere = _places(capture.model)
    for region in capture.regions.values():
        read = [(n, p) for n in region.graph.nodes if (p := region.parameter(n)) is not None]
        if not any(
            "." in str(node.target) or len(region.module._parameters) > 1 for node, _ in read
        ):
            continue
        names_in_region = _places(region.module)
        for node, parameter in read:
            names = {join(region.fqn, name) for name in names_in_region[id(parameter)].values()}
            # The graph of a module with two names, and that of a module that reads its weight, may use
            # different names.
            names.update(everywhere[id(parameter)][slot] for slot in names_in_region[id(parameter)])
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
    """Return the FQNs of each parameter, by the parameter's id, and then by the owner's id and the key."""
    names: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for fqn, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                names[id(parameter)][id(owner), key] = join(fqn, key)
    return names


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
