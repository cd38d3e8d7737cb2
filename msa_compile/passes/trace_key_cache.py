"""Find where the keys of an attention are kept: the keys of this call, and the cache that they join.

Index keys are kept beside the keys, slot by slot. So what the graph does to its key cache is read here as it is
spelled, a concatenation or one write into a buffer, and `insert_index_branch` does the same to the index keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from msa_compile.passes.attention import Heads
from msa_compile.passes.graph_facts import GraphFacts, argument, is_noop, is_op, is_owned, tensor_value

aten = torch.ops.aten
_ALIKE = (aten.contiguous, aten.clone, aten.detach, aten.alias)
_WRITES = (aten.copy_, aten.index_copy_, aten.index_put_)
_FACTORIES = (aten.zeros, aten.empty, aten.full, aten.new_zeros, aten.new_empty, aten.new_full)


class IndexRefused(Exception):
    """The learned indexer cannot serve this site in this graph: it is scored with ``"keys"``, for this reason."""


@dataclass(frozen=True)
class Placed:
    """A tensor of the graph and what its dimensions mean, ``"BHTD"`` in some order.

    In the buffer of a cache, ``"-"`` is a dimension of which one entry is this site's.
    """

    node: Node
    axes: str

    def permutation_of(self, axes: str) -> list[int]:
        """How to permute a tensor of dimensions ``axes`` into this one's order."""
        return [axes.index(axis) for axis in self.axes]


@dataclass(frozen=True)
class Store:
    """A buffer that keys are written into and read from.

    Attributes:
        root: The buffer.
        entry: What of it belongs to the site: ``root`` with the leading selections taken.
        kept: The dimension of ``root`` that each dimension of ``entry`` is.
        targets: Views from the entry to what is written, in order.
        write: The write.
        target_axes: Dimensions of what is written.
        reads: Views from the entry to the keys that are attended to, in order.
        read_axes: Dimensions of those.
    """

    root: Node
    entry: Placed
    kept: tuple[int, ...]
    targets: tuple[Node, ...]
    write: Node
    target_axes: str
    reads: tuple[Node, ...]
    read_axes: str


@dataclass(frozen=True)
class KeyCache:
    """Where keys come from.

    Attributes:
        fresh: The keys of this call, ``[B, H, T, D]`` in some order.
        past: What they are appended to, an input of the graph.
        store: What they are written into instead.
        outputs: Places among the graph's outputs of the tensor that holds all keys afterwards.
    """

    fresh: Placed
    past: Placed | None = None
    store: Store | None = None
    outputs: tuple[int, ...] = ()


def trace_key_cache(facts: GraphFacts, key: Heads, reader: Node, *, is_body: bool) -> KeyCache:
    """Where the keys that ``reader`` attends to come from.

    Args:
        facts: Facts of the graph.
        key: The un-repeated keys.
        reader: The attention's output.
        is_body: Whether the graph is the body of another, which cannot be handed a cache of ours.

    Raises:
        IndexRefused: They come from something else than this call, a concatenation, or one write into a buffer.
    """
    if len(key.permutation) != 4:
        raise IndexRefused("the keys are not [B, H, T, D] in some order")
    axes = ["?"] * 4
    for axis, dim in zip("BHTD", key.permutation, strict=True):
        axes[dim] = axis
    placed = Placed(key.node, "".join(axes))
    if facts.writes(key.node, reader):
        cache = _stored(facts, placed, key.count, reader)
    else:
        cache = _appended(facts, placed, reader)
    if not is_body:
        return cache
    if cache.past is not None or cache.store is not None:
        raise IndexRefused("the key cache is used inside a checkpointed region")
    return KeyCache(cache.fresh)


def _appended(facts: GraphFacts, placed: Placed, reader: Node) -> KeyCache:
    joined = unmoved(placed)
    outputs = tuple(index for index, node in enumerate(_outputs(facts)) if _unmoved_node(node) is joined.node)
    if not is_op(joined.node, aten.cat):
        return KeyCache(joined, outputs=outputs)
    dim = _dimension(argument(joined.node, "dim"), 4)
    parts = [part for part in joined.node.args[0] if not _is_empty(part)]  # type: ignore[union-attr]
    if joined.axes[dim] != "T" or not all(isinstance(part, Node) for part in parts):
        return KeyCache(joined, outputs=outputs)  # of channels: RoPE on a part of them
    fresh = unmoved(Placed(parts[-1], joined.axes))
    if len(parts) == 1:
        return KeyCache(fresh, outputs=outputs)
    past = unmoved(Placed(parts[0], joined.axes))
    if len(parts) > 2 or past.node.op != "placeholder" or is_owned(past.node) or facts.writes(past.node, reader):
        raise IndexRefused("the keys are appended to something else than a cache that was handed in")
    return KeyCache(fresh, past, outputs=outputs)


def _stored(facts: GraphFacts, placed: Placed, heads: int, reader: Node) -> KeyCache:
    root = facts.root(placed.node)
    if root.op != "placeholder" and not is_op(root, *_FACTORIES):
        raise IndexRefused("the keys are changed in place after they are computed")
    path, axes = _path(placed, root)
    chosen = _leading_selections(path)
    reads = path[len(chosen) :]
    entry = Placed(chosen[-1] if chosen else root, "".join(axis for axis in axes if axis != "-"))
    written: list[tuple[Node, tuple[Node, ...], str]] = []
    for write in facts.writes(root, reader):
        target, _ = _path(Placed(write.args[0], ""), root)  # type: ignore[arg-type]
        first = _leading_selections(target)
        if [_selection(node) for node in first] == [_selection(node) for node in chosen]:
            views = target[len(first) :]
            written.append((write, views, _axes_after(views, entry.axes)))
        elif not _are_disjoint(first, chosen):
            raise IndexRefused("the key cache is written in a way that is not recognised")
    if len(written) != 1:
        raise IndexRefused(f"the key cache is written {len(written)} times before it is read")
    write, targets, target_axes = written[0]
    _axes_after(reads, entry.axes)
    fresh = unmoved(Placed(_written_value(write, target_axes, heads), target_axes))
    outputs: tuple[int, ...] = ()
    if root.op != "placeholder":
        outputs = tuple(index for index, node in enumerate(_outputs(facts)) if _in_place(node) is root)
    kept = tuple(dim for dim, axis in enumerate(axes) if axis != "-")
    store = Store(root, entry, kept, targets, write, target_axes, reads, placed.axes)
    return KeyCache(fresh, store=store, outputs=outputs)


def _written_value(write: Node, axes: str, heads: int) -> Node:
    """What is written, with one head a group and one token a slot.

    Raises:
        IndexRefused: The write is of another kind.
    """
    value: object = None
    if is_op(write, aten.copy_):
        value = write.args[1]
    elif is_op(write, aten.index_copy_) and _dimension(write.args[1], 4) == axes.index("T"):
        value = write.args[3]
    elif is_op(write, aten.index_put_) and not argument(write, "accumulate"):
        indices = write.args[1]
        assert isinstance(indices, (list, tuple)), "the indices of index_put_ are a list"
        used = [dim for dim, index in enumerate(indices) if index is not None]
        index = tensor_value(indices[used[0]]) if used == [axes.index("T")] else None
        value = write.args[2] if index is not None and index.dim() == 1 and index.dtype == torch.int64 else None
    shape = () if (found := tensor_value(value)) is None else found.shape
    if not isinstance(value, Node) or len(shape) != 4 or str(shape[axes.index("H")]) != str(heads):
        raise IndexRefused(f"the key cache is written by {write.target} in a way that is not recognised")
    return value


def unmoved(placed: Placed) -> Placed:
    """What a tensor is before its dimensions were permuted or it was copied as it is."""
    node, axes = placed.node, placed.axes
    while True:
        if is_op(node, aten.transpose, aten.permute):
            axes = _before_permutation(node, axes)
        elif not (is_op(node, *_ALIKE) or is_noop(node) or _is_idle_cast(node)):
            return Placed(node, axes)
        node = node.args[0]  # type: ignore[assignment]


def _unmoved_node(node: Node) -> Node | None:
    value = tensor_value(node)
    return unmoved(Placed(node, "BHTD")).node if value is not None and value.dim() == 4 else None


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
            dim = _dimension(node.args[1], _rank(source))
            axes = axes[:dim] + "-" + axes[dim:] if axes else axes
        elif is_op(node, aten.transpose, aten.permute):
            views.append(node)
            axes = _before_permutation(node, axes) if axes else axes
        elif is_op(node, aten.slice) and not is_noop(node):
            views.append(node)
        elif not (is_op(node, *_WRITES, aten.detach, aten.alias) or is_noop(node)):
            raise IndexRefused(f"the key cache is read through {node.target}")
        node = source
    return tuple(reversed(views)), axes


def _before_permutation(node: Node, axes: str) -> str:
    rank = len(axes)
    if is_op(node, aten.permute):
        order = [_dimension(dim, rank) for dim in node.args[1]]  # type: ignore[arg-type, union-attr]
    else:
        one, other = (_dimension(dim, rank) for dim in node.args[1:3])
        order = list(range(rank))
        order[one], order[other] = other, one
    return "".join(axes[order.index(dim)] for dim in range(rank))


def _axes_after(views: tuple[Node, ...], axes: str) -> str:
    """Dimensions after slices of rows and slots, and permutations."""
    for node in views:
        if is_op(node, aten.select):
            raise IndexRefused("the key cache is written or read entry by entry")
        if is_op(node, aten.slice):
            if axes[_dimension(argument(node, "dim"), 4)] not in "BT":
                raise IndexRefused("the key cache is written or read by parts of heads")
            continue
        order = _before_permutation(node, "0123")
        axes = "".join(axes[order.index(str(dim))] for dim in range(4))
    return axes


def _leading_selections(path: tuple[Node, ...]) -> tuple[Node, ...]:
    count = next((index for index, node in enumerate(path) if not is_op(node, aten.select)), len(path))
    return path[:count]


def _selection(node: Node) -> tuple[object, object]:
    return node.args[1], node.args[2]


def _are_disjoint(one: tuple[Node, ...], other: tuple[Node, ...]) -> bool:
    """Whether two selections share no entry: the same dimension at two places that are known."""
    for left, right in zip(one, other, strict=False):
        (dim, place), (other_dim, other_place) = _selection(left), _selection(right)
        if dim != other_dim or not (isinstance(place, int) and isinstance(other_place, int)):
            return False
        if place != other_place:
            return (place < 0) == (other_place < 0)
    return False


def _outputs(facts: GraphFacts) -> list[Node]:
    found = facts.graph.output_node().args[0]
    return list(found) if isinstance(found, (list, tuple)) else []  # type: ignore[arg-type]


def _in_place(node: object) -> object:
    """A tensor that was written, for what the write returns."""
    while is_op(node, *_WRITES, aten.detach, aten.alias):
        assert isinstance(node, Node)
        node = node.args[0]
    return node


def _is_empty(node: object) -> bool:
    value = tensor_value(node)
    return value is not None and value.dim() == 1 and value.shape[0] == 0


def _is_idle_cast(node: Node) -> bool:
    value = tensor_value(node)
    before = tensor_value(node.args[0]) if is_op(node, aten.to, aten._to_copy) else None
    return value is not None and before is not None and (before.dtype, before.device) == (value.dtype, value.device)


def _rank(node: Node) -> int:
    value = tensor_value(node)
    return 0 if value is None else value.dim()


def _dimension(dim: object, rank: int) -> int:
    assert isinstance(dim, int), "a dimension is a number"
    return dim % rank
