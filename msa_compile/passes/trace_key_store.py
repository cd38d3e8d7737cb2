"""Read how keys are written into a buffer and read from it: the static caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from msa_compile.passes.graph_facts import GraphFacts, are_disjoint, argument, is_noop, is_op, tensor_value
from msa_compile.passes.placed import IndexRefused, Placed, before_permutation, dimension_of

aten = torch.ops.aten
_WRITES = (aten.copy_, aten.index_copy_, aten.index_put_)
_FACTORIES = (aten.zeros, aten.empty, aten.full, aten.new_zeros, aten.new_empty, aten.new_full)


@dataclass(frozen=True)
class Store:
    """A buffer that keys are written into and read from.

    Attributes:
        root: The buffer.
        entry: What of it belongs to the site: ``root`` with the leading selections taken.
        kept: The dimension of ``root`` that each dimension of ``entry`` is.
        targets: Views from the entry to what is written, in order.
        write: The write.
        value: What is written.
        reads: Views from the entry to the keys that are attended to, in order.
        read_axes: Dimensions of those.
    """

    root: Node
    entry: Placed
    kept: tuple[int, ...]
    targets: tuple[Node, ...]
    write: Node
    value: Placed
    reads: tuple[Node, ...]
    read_axes: str


def trace_key_store(facts: GraphFacts, placed: Placed, heads: int, reader: Node) -> Store:
    """The buffer that the keys ``placed`` are read from, and how this call's keys are written into it.

    Raises:
        IndexRefused: Anything else is done to it, in the whole graph, than one write of this call's keys.
    """
    root = facts.root(placed.node)
    if root.op != "placeholder" and not is_op(root, *_FACTORIES):
        raise IndexRefused("the keys are changed in place after they are computed")
    path, axes = _path(placed, root)
    chosen = _leading_selections(path)
    reads = path[len(chosen) :]
    entry = Placed(chosen[-1] if chosen else root, "".join(axis for axis in axes if axis != "-"))
    _axes_after(reads, entry.axes)
    written: list[tuple[Node, tuple[Node, ...]]] = []
    for write in facts.writes(root, facts.graph.output_node()):
        target, _ = _path(Placed(write.args[0], ""), root)  # type: ignore[arg-type]
        first = _leading_selections(target)
        if _selections(first) == _selections(chosen):
            written.append((write, target[len(first) :]))
        elif not are_disjoint(_selections(first), _selections(chosen)):
            raise IndexRefused("the key cache is written in a way that is not recognised")
    if len(written) != 1 or facts.position[written[0][0]] > facts.position[reader]:
        raise IndexRefused("the key cache is not written once, before it is read")
    write, targets = written[0]
    target_axes = _axes_after(targets, entry.axes)
    value = Placed(_written_value(write, target_axes, heads), target_axes)
    kept = tuple(dim for dim, axis in enumerate(axes) if axis != "-")
    return Store(root, entry, kept, targets, write, value, reads, placed.axes)


def _written_value(write: Node, axes: str, heads: int) -> Node:
    """What is written, with one head a group and one token a slot.

    Raises:
        IndexRefused: The write is of another kind.
    """
    value: object = None
    if is_op(write, aten.copy_):
        value = write.args[1]
    elif is_op(write, aten.index_copy_) and dimension_of(write.args[1], 4) == axes.index("T"):
        value = write.args[3]
    elif is_op(write, aten.index_put_) and not argument(write, "accumulate"):
        indices = write.args[1]
        assert isinstance(indices, (list, tuple)), "the indices of index_put_ are a list"
        used = [dim for dim, index in enumerate(indices) if index is not None]
        index = tensor_value(indices[used[0]]) if used == [axes.index("T")] else None
        value = write.args[2] if index is not None and index.dim() == 1 and index.dtype == torch.int64 else None
    shape = () if (found := tensor_value(value)) is None else found.shape
    if not isinstance(value, Node) or len(shape) != 4 or int(shape[axes.index("H")]) != heads:
        raise IndexRefused(f"the key cache is written by {write.target} in a way that is not recognised")
    return value


def _path(placed: Placed, root: Node) -> tuple[tuple[Node, ...], str]:
    """Views from ``root`` down to a tensor, writes in between left out, and the dimensions of ``root``.

    Without axes given, only the views are of use.

    Raises:
        IndexRefused: Another view lies in between than a selection, a slice or a permutation.
    """
    node, axes = placed.node, placed.axes
    views: list[Node] = []
    while node is not root:
        source = node.args[0]
        if not isinstance(source, Node):
            raise IndexRefused(f"the key cache is read through {node.target}")
        if is_op(node, aten.select):
            views.append(node)
            dim = dimension_of(node.args[1], _rank(source))
            axes = axes[:dim] + "-" + axes[dim:] if axes else axes
        elif is_op(node, aten.transpose, aten.permute):
            views.append(node)
            axes = before_permutation(node, axes) if axes else axes
        elif is_op(node, aten.slice) and not is_noop(node):
            views.append(node)
        elif not (is_op(node, *_WRITES, aten.detach, aten.alias) or is_noop(node)):
            raise IndexRefused(f"the key cache is read through {node.target}")
        node = source
    return tuple(reversed(views)), axes


def _axes_after(views: tuple[Node, ...], axes: str) -> str:
    """Dimensions after slices of rows and slots, and permutations."""
    for node in views:
        if is_op(node, aten.select):
            raise IndexRefused("the key cache is written or read entry by entry")
        if is_op(node, aten.slice):
            if axes[dimension_of(argument(node, "dim"), 4)] not in "BT":
                raise IndexRefused("the key cache is written or read by parts of heads")
            continue
        order = before_permutation(node, "0123")
        axes = "".join(axes[order.index(str(dim))] for dim in range(4))
    return axes


def _leading_selections(path: tuple[Node, ...]) -> tuple[Node, ...]:
    count = next((index for index, node in enumerate(path) if not is_op(node, aten.select)), len(path))
    return path[:count]


def _selections(path: tuple[Node, ...]) -> tuple[tuple[int, object], ...]:
    return tuple((dimension_of(node.args[1], _rank(node.args[0])), node.args[2]) for node in path)


def without_writes(node: object) -> object:
    """The tensor that was written, for what the write returns."""
    while is_op(node, *_WRITES, aten.detach, aten.alias):
        assert isinstance(node, Node)
        node = node.args[0]
    return node


def _rank(node: object) -> int:
    value = tensor_value(node)
    return 0 if value is None else value.dim()
