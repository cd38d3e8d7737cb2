"""Facts about one ATen graph that every pass reads: order, aliases, in-place writes, and what a value is made from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch.fx import Graph, Node

from msa_compile._compat import OpOverload

# Metadata of a placeholder, written by both captures: whether the model keeps it as a parameter or buffer.
OWNED = "msa_owned"
TRAINED = "msa_trained"
# Metadata of the loss of an index branch, which becomes an output at the end: the name of its site.
LOSS = "msa_index_loss"


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
        for index, node in enumerate(graph.nodes):
            self.position[node] = index
            self._root[node] = self._alias_root(node)

    def _alias_root(self, node: Node) -> Node:
        root = node
        if node.target is operator.getitem and isinstance(node.args[0], Node):
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
                if argument.alias_info.is_write:
                    self._writes.setdefault(root, []).append(node)
        return root

    def root(self, node: Node) -> Node:
        """The node whose memory ``node`` may share; ``node`` itself when it owns its memory."""
        return self._root[node]

    def writes(self, node: Node, before: Node) -> list[Node]:
        """In-place writes to the memory of ``node`` that precede ``before``, in order."""
        limit = self.position[before]
        return [write for write in self._writes.get(self._root[node], ()) if self.position[write] < limit]

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
        reached: dict[Node, int] = {}
        pending: list[tuple[Node, Node]] = [(node, reader)]
        while pending:
            current, before = pending.pop()
            limit = self.position[before]
            if reached.get(current, -1) >= limit:
                continue
            reached[current] = limit
            if stop(current):
                boundary.add(current)
                continue
            pending.extend((write, before) for write in self.writes(current, before) if write is not current)
            if not current.all_input_nodes or is_op(current, torch.ops.aten.sym_size):
                boundary.add(current)  # a size says nothing of what its tensor holds
                continue
            inner.add(current)
            for source in current.all_input_nodes:
                # A view is read when its reader reads it; a computed value was read when it was computed.
                shares = self._root[source] is self._root[current]
                pending.append((source, before if shares else current))
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
