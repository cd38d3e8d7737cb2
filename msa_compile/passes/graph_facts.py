"""Facts about one ATen graph that every pass reads: order, aliases, in-place writes, and what a value is made from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from msa_compile._compat import OpOverload

# Metadata of a placeholder, written by both captures: whether the model keeps it as a parameter or buffer.
OWNED = "msa_owned"
TRAINED = "msa_trained"
# Metadata of the loss of an index branch, which becomes an output at the end: the name of its site.
LOSS = "msa_index_loss"


@dataclass(frozen=True)
class _Entry:
    """What of its memory a node may share: one entry of it, found by selections, or a part of that."""

    path: tuple[tuple[int, object], ...] = ()
    is_all: bool = True

    def after(self, node: Node, *, is_write: bool) -> _Entry:
        """What ``node`` shares of this."""
        if is_write or is_op(node, torch.ops.aten.detach, torch.ops.aten.alias):
            return self
        if not self.is_all or not is_op(node, torch.ops.aten.select):
            return _Entry(self.path, is_all=False)
        dim, place = node.args[1:3]
        value = tensor_value(node.args[0])
        assert isinstance(dim, int) and value is not None, "a selection is of a dimension of a tensor"
        return _Entry((*self.path, (dim % value.dim(), place)))


def are_disjoint(one: tuple[tuple[int, object], ...], other: tuple[tuple[int, object], ...]) -> bool:
    """Whether two paths of selections, of dimension and place, lead to no common entry, as far as places are known."""
    for (dim, place), (other_dim, other_place) in zip(one, other, strict=False):
        if dim != other_dim or not (isinstance(place, int) and isinstance(other_place, int)):
            return False
        if place != other_place:
            return (place < 0) == (other_place < 0)
    return False


class GraphFacts:
    """Alias and mutation facts of a graph, computed once.

    A static cache is written in place and read through its own placeholder, so data dependence alone would say that the
    keys come from nowhere. Here a value is made from its arguments *and* from the in-place writes to its memory that
    precede the read.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position: dict[Node, int] = {}
        self._root: dict[Node, Node] = {}
        self._writes: dict[Node, list[Node]] = {}
        self._entry: dict[Node, _Entry] = {}
        for index, node in enumerate(graph.nodes):
            self.position[node] = index
            self._root[node] = self._alias_root(node)

    def _alias_root(self, node: Node) -> Node:
        root = node
        self._entry[node] = _Entry()
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            self._entry[node] = _Entry(self._entry[node.args[0]].path, is_all=False)
            return self._root[node.args[0]]
        if not isinstance(node.target, OpOverload):
            return root
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None:
                continue
            for source in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(source, Node):
                    continue
                root = self._root[source]
                self._entry[node] = self._entry[source].after(node, is_write=argument.alias_info.is_write)
                if argument.alias_info.is_write:
                    self._writes.setdefault(root, []).append(node)
        return root

    def root(self, node: Node) -> Node:
        """The node whose memory ``node`` may share; ``node`` itself when it owns its memory."""
        return self._root[node]

    def writes(self, node: Node, before: Node) -> list[Node]:
        """In-place writes to the memory of ``node`` that precede ``before``, in order.

        Those to other entries of a tensor of several, ``cache[1]`` where ``node`` is of ``cache[0]``, are none.
        """
        limit, entry = self.position[before], self._entry[node]
        found = [write for write in self._writes.get(self._root[node], ()) if self.position[write] < limit]
        return [write for write in found if not are_disjoint(self._entry[write].path, entry.path)]

    def written_between(self, node: Node, start: Node, end: Node) -> bool:
        """Whether the memory of ``node`` is written after ``start`` and before ``end``."""
        first = self.position[start]
        return any(self.position[write] > first for write in self.writes(node, end))

    def makers(
        self, node: Node, reader: Node, stop: Callable[[Node], bool] = lambda node: False
    ) -> tuple[set[Node], set[Node]]:
        """All nodes that ``node``, as read by ``reader``, is made from.

        Returns:
            ``(inner, boundary)``: nodes walked through, and nodes where ``stop`` held, that have no inputs, or that are
            sizes of tensors. The walk follows arguments and earlier in-place writes.
        """
        inner: set[Node] = set()
        boundary: set[Node] = set()
        reached: dict[tuple[Node, bool], int] = {}
        # Whether writes to its memory count: what a view is read from counts only where that view shows it.
        pending: list[tuple[Node, Node, bool]] = [(node, reader, True)]
        while pending:
            current, before, is_read = pending.pop()
            limit = self.position[before]
            if reached.get((current, is_read), -1) >= limit:
                continue
            reached[current, is_read] = limit
            if stop(current):
                boundary.add(current)
                continue
            if is_read:
                pending.extend((write, before, False) for write in self.writes(current, before) if write is not current)
            if not current.all_input_nodes or is_op(current, torch.ops.aten.sym_size):
                boundary.add(current)  # a size says nothing of what its tensor holds
                continue
            inner.add(current)
            for source in current.all_input_nodes:
                # A view is read when its reader reads it; a computed value was read when it was computed.
                shares = self._root[source] is self._root[current]
                pending.append((source, before if shares else current, not shares))
        return inner, boundary

    def ordered(self, nodes: Iterable[Node]) -> list[Node]:
        """``nodes`` in graph order."""
        return sorted(nodes, key=self.position.__getitem__)


def tensor_value(node: object) -> torch.Tensor | None:
    """The fake tensor that a node stands for, or ``None``."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_owned(node: Node) -> bool:
    """Whether an input is a parameter or buffer of the model."""
    return bool(node.meta.get(OWNED, False))


def is_trained(node: Node) -> bool:
    """Whether gradients are asked for an input."""
    value = tensor_value(node)
    return bool(node.meta.get(TRAINED, False)) or (value is not None and value.requires_grad)


def is_op(node: object, *ops: object) -> bool:
    """Whether ``node`` calls one of ``ops`` (packets or overloads)."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    target = node.target
    return target in ops or (isinstance(target, OpOverload) and target.overloadpacket in ops)


def argument(node: Node, name: str) -> object:
    """The argument of an ATen call by its schema name, with the schema's default."""
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, OpOverload), f"{node} is not an ATen call"
    for index, entry in enumerate(node.target._schema.arguments):
        if entry.name == name:
            return node.args[index] if index < len(node.args) else entry.default_value
    raise KeyError(name)


def is_noop(node: Node) -> bool:
    """Whether a slice or reshape leaves the shape as it is at every size, and so, for these ops, the contents."""
    aten = torch.ops.aten
    if not is_op(node, aten.slice, aten.view, aten.reshape, aten._unsafe_view):
        return False
    before, after = tensor_value(node.args[0]), tensor_value(node)
    if before is None or after is None or before.dim() != after.dim():
        return False
    return all(str(old) == str(new) for old, new in zip(before.shape, after.shape, strict=True))
