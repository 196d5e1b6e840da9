"""Pass that restricts each adapter's branch to the rows of its samples, for batches of several adapters.

It runs after the branches are inserted. A branch then reads only the rows of its adapter's samples, and its
result is added to the same rows of the output. The computation of the branch itself stays as the pattern
wrote it.

The rows of experts are tokens, in an order that a router decides. Each row belongs to the sample of its
token. The operation that gathers the rows of an expert is in the same graph. Its index says which token each
row is.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar, NamedTuple

from torch import fx

from lora_fx.errors import ConfigError
from lora_fx.ir import (
    META_KEY,
    Region,
    Role,
    Tag,
    join,
    role_of,
    tag_of,
)
from lora_fx.passes.graph import GraphPass, copy_graph
from lora_fx.passes.patterns import Product, constant_of, product_of, rows_of_einsum
from lora_fx.runtime import experts, output_padding
from lora_fx.runtime.rows import (
    COLUMNS,
    add_rows,
    ends_selected,
    put_rows,
    rows_added,
    rows_of_tokens,
    rows_selected,
    select_rows,
)

__all__ = ["ROWS", "SelectRows"]

ROWS = "lora_rows"
"""Name of the :class:`lora_fx.runtime.rows.samples.SampleRows` next to the factors of a site."""


@dataclasses.dataclass(frozen=True)
class SelectRows(GraphPass):
    """Pass that makes each branch compute only the rows of a batch that have its adapter.

    Attributes:
        experts: FQNs of the weights with a matrix for each expert.
    """

    name: ClassVar[str] = "select-rows"
    experts: frozenset[str] = frozenset()

    def edited(self, region: Region) -> fx.Graph | None:
        """Restrict every branch of a graph to its rows.

        Raises:
            ConfigError: For experts whose rows are not known to be tokens, and for einsums without an axis
                for the samples.
        """
        if not any(_adapter_of(node) for node in region.graph.nodes):
            return None
        graph = copy_graph(region.graph)
        work = _RowEditor(region.with_graph(graph), self.experts)
        tagged = [(node, node.meta[META_KEY]) for node in graph.nodes if _adapter_of(node)]
        # A separate loop, because the dropout nodes come before the nodes that read the factors.
        for node, tag in tagged:
            work.note(node, tag)
        for node, tag in tagged:
            if tag.role is Role.ADD:
                work.add(node, tag)
            else:
                work.select(node, tag)
        graph.lint()
        return graph


def _adapter_of(node: fx.Node) -> str:
    tag = tag_of(node)
    return "" if tag is None else tag.adapter


class _Axes(NamedTuple):
    """Axes of the rows in the input and the output of an operation.

    Attributes:
        source, result: The axis in the input, and the axis in the output.
            :data:`lora_fx.runtime.rows.samples.COLUMNS` if the weight is the left operand.
        least: Smallest number of dimensions of the input; 0 for no minimum.
        base: The node of the operation, if it is known.
    """

    source: int = 0
    result: int = 0
    least: int = 0
    base: fx.Node | None = None


_FIRST = _Axes()


def _axes(node: fx.Node, region: Region) -> _Axes:
    """Return the axes of an operation's rows.

    Raises:
        ConfigError: If the operation is an einsum without an axis for the rows.
    """
    product = product_of(node, region)
    if isinstance(product, Product):
        return _Axes(COLUMNS, COLUMNS, 2) if product.left else _FIRST
    axes = rows_of_einsum(node, region)
    if isinstance(axes, str):
        tag: Tag = node.meta[META_KEY]
        raise ConfigError(
            f"{join(region.fqn, tag.weight)}: no axis of the activation of einsum {axes!r} can be that of "
            "the samples, since it sums over all of them or the weight has them, too: choose one adapter for "
            "the whole batch"
        )
    return _FIRST if axes is None else _Axes(*axes)


class _Gather(NamedTuple):
    """The operation that gathers tokens into rows for experts.

    Attributes:
        hidden: The tokens.
        function, args: Function that computes the token of each row, and its arguments. If the function is
            None, the only argument is a node that has the token of each row.
    """

    hidden: fx.Node
    function: Any
    args: tuple[Any, ...]


def _gather(node: fx.Node) -> _Gather | None:
    """Return the gather that a node computes, or None if the node does not gather tokens for experts."""
    if node.target is experts.sorted_by_expert:
        hidden, chosen = node.args[:2]
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == _ORDER:
                return _Gather(hidden, experts.tokens_sorted, (user, chosen))  # type: ignore[arg-type]
    if node.target is experts.repeated:
        hidden, chosen = node.args
        return _Gather(hidden, experts.tokens_repeated, (chosen,))  # type: ignore[arg-type]
    if node.target is operator.getitem:
        hidden, token = node.args
        if isinstance(token, fx.Node) and token.target is operator.getitem:
            source, index = token.args
            if isinstance(source, fx.Node) and source.target is experts.tokens_of and index == 1:
                return _Gather(hidden, None, (token,))  # type: ignore[arg-type]
    return None


_ORDER = 4  # index of the order in the results of sorted_by_expert


def _gather_behind(node: fx.Node) -> _Gather | None:
    """Return the gather from which a value is computed, or None if there is no gather or several."""
    gathers: set[_Gather] = set()
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if role_of(current) is Role.FACTOR:
            continue  # its cast may read the output of another expert, for the dtype
        gather = _gather(current)
        if gather is not None:
            gathers.add(gather)
            continue
        new = [above for above in current.all_input_nodes if above not in seen]
        seen.update(new)
        waiting += new
    return gathers.pop() if len(gathers) == 1 else None


def _gather_of(node: fx.Node) -> _Gather | None:
    """Return the gather that says which token each row of a branch's node belongs to, or None.

    A factor is not computed from a gather, so it gets the gather of the product that reads it.
    """
    gather = _gather_behind(node)
    users = () if gather is not None else node.users
    return next(
        (gather_of_user for user in users if (gather_of_user := _gather_of(user)) is not None),
        gather,
    )


class _RowEditor:
    """Graph that is being edited, with the rows and selections inserted so far."""

    def __init__(self, region: Region, weights: frozenset[str]) -> None:
        self._region = region
        self._holders: dict[tuple[str, str], str] = {}
        self._made: dict[Any, fx.Node] = {}
        self._experts = weights
        self._axes = self._axes_of_branches()

    def _axes_of_branches(self) -> dict[fx.Node, _Axes]:
        """Return the axes of the rows for each node of a branch.

        The operation that the branch is added to decides them.
        """
        axes: dict[fx.Node, _Axes] = {}
        ahead: dict[tuple[str, str], _Axes] = {}
        for node in reversed(self._region.graph.nodes):
            if not _adapter_of(node) or self._of_experts(tag := node.meta[META_KEY]):
                continue
            key = (tag.weight, tag.adapter)
            if tag.role is Role.ADD:
                base = node
                while role_of(base) is Role.ADD:
                    base = base.args[0]
                ahead[key] = _axes(base, self._region)._replace(base=base)
            axes[node] = ahead.get(key, _FIRST)
        return axes

    def note(self, node: fx.Node, tag: Tag) -> None:
        """Record the module with the factors of a branch, if a node of the branch reads a factor.

        That module also has the table of rows.
        """
        if tag.role is Role.FACTOR and node.op == "get_attr":
            holder = str(node.target).rpartition(".")[0].rpartition(".")[0]
            self._holders.setdefault((tag.weight, tag.adapter), holder)

    def select(self, node: fx.Node, tag: Tag, *, results: bool = False) -> None:
        """Make a node of a branch read only the adapter's rows of tensors from outside the branch.

        Args:
            node: The node.
            tag: Its tag.
            results: True if the node reads the operation's output, and not its input.
        """
        if self._of_experts(tag):
            self._select_of_experts(node, tag)
            return
        own = self._axes[node]

        def cut(read: fx.Node) -> fx.Node:
            if self._is_read_whole(read):
                return read
            if read.target is output_padding:
                return read  # the same for all samples
            # A node that spreads a vector over the output features reads the output as well.
            axes = _Axes(own.result) if results or read is own.base else own
            key = ("select", read, axes.source, axes.least, tag)
            return self._call(key, node, tag, select_rows, read, axes=axes)

        node.args = fx.map_arg(node.args, cut)
        node.kwargs = fx.map_arg(node.kwargs, cut)

    def add(self, node: fx.Node, tag: Tag) -> None:
        """Add the result of a branch to the adapter's rows of the output.

        If the kind does not simply add its branch, write the rows that it computes into the output.
        """
        total = node.args[0]
        if self._of_experts(tag):
            rows = self._rows_of_experts(node.args[1], tag)  # type: ignore[arg-type]
            with node.graph.inserting_before(node):
                new = node.graph.call_function(rows_added, (total, rows, node.args[1]))
            new.meta[META_KEY] = tag
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)
        elif node.target is operator.add:
            axes = _Axes(self._axes[node].result)
            new = self._call(("add", node), node, tag, add_rows, total, node.args[1], axes=axes)
            node.replace_all_uses_with(new)
            node.graph.erase_node(node)
        else:
            self.select(node, tag, results=True)
            node.meta[META_KEY] = dataclasses.replace(tag, role=Role.SCALE)
            axes = _Axes(self._axes[node].result)
            new = self._call(("put", node), node.next, tag, put_rows, total, node, axes=axes)
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _is_read_whole(self, read: fx.Node) -> bool:
        """Return True if a branch reads a value whole, and not only the rows of its adapter.

        Such values are computed in the branch itself, or are the same for all samples.
        """
        if _adapter_of(read) and role_of(read) is not Role.ADD:
            return True
        return read.op == "get_attr" or constant_of(read, self._region) is not None

    def _of_experts(self, tag: Tag) -> bool:
        return join(self._region.fqn, tag.weight) in self._experts

    def _select_of_experts(self, node: fx.Node, tag: Tag) -> None:
        ends = node.args[2] if node.target is experts.grouped_linear else None

        def cut(read: fx.Node) -> fx.Node:
            if self._is_read_whole(read):
                return read
            rows = self._rows_of_experts(node, tag)
            function = ends_selected if read is ends else rows_selected
            key = (function, read, rows)
            if key not in self._made:
                with node.graph.inserting_before(node):
                    call = node.graph.call_function(function, (read, rows))
                call.meta[META_KEY] = Tag(tag.weight, Role.ROWS, tag.adapter)
                self._made[key] = call
            return self._made[key]

        node.args = fx.map_arg(node.args, cut)
        node.kwargs = fx.map_arg(node.kwargs, cut)

    def _rows_of_experts(self, node: fx.Node, tag: Tag) -> fx.Node:
        """Return the node with the adapter's rows among the rows of the experts.

        All branches of an adapter that read the same gather share this node.
        """
        gather = _gather_of(node)
        if gather is None:
            raise ConfigError(
                f"{join(self._region.fqn, tag.weight)}: nothing shows of which token each row is that these "
                "experts read, so that samples cannot choose: choose one adapter for the whole batch"
            )
        key = ("rows", gather, tag.adapter)
        if key not in self._made:
            tokens = gather.args[0]
            if gather.function is not None:
                with node.graph.inserting_before(node):
                    tokens = node.graph.call_function(gather.function, gather.args)
                tokens.meta[META_KEY] = Tag(tag.weight, Role.ROWS, tag.adapter)
            self._made[key] = self._call(
                ("of tokens", *key), node, tag, rows_of_tokens, tokens, gather.hidden
            )
        return self._made[key]

    def _call(
        self,
        key: Any,
        before: fx.Node,
        tag: Tag,
        function: Any,
        *args: Any,
        axes: _Axes = _FIRST,
    ) -> fx.Node:
        if isinstance(key[-1], Tag):
            # All nodes of a branch share one selection.
            key = (*key[:-1], tag.weight, tag.adapter)
        if key not in self._made:
            graph = self._region.graph
            holder = join(self._holders[tag.weight, tag.adapter], ROWS)
            with graph.inserting_before(before):
                table = graph.get_attr(holder)
                known: tuple[Any, ...] = (*args[1:], tag.weight)
                if (axes.source, axes.least) != (0, 0):
                    known = (*known, axes.source, *((axes.least,) if axes.least else ()))
                call = graph.call_function(function, (args[0], table, tag.adapter, *known))
            role = Role.ROWS if function in (select_rows, rows_of_tokens) else Role.ADD
            table.meta[META_KEY] = Tag(tag.weight, Role.ROWS, tag.adapter)
            call.meta[META_KEY] = Tag(tag.weight, role, tag.adapter)
            self._made[key] = call
        return self._made[key]
