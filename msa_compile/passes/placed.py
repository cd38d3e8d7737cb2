"""Tensors of a graph with the meaning of their dimensions, followed through permutations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from msa_compile.passes.graph_facts import argument, is_noop, is_op, tensor_value

aten = torch.ops.aten
_ALIKE = (aten.contiguous, aten.clone, aten.detach, aten.alias)


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


def unmoved(placed: Placed) -> Placed:
    """What a tensor is before its dimensions were permuted or it was copied as it is."""
    node, axes = placed.node, placed.axes
    while True:
        if is_op(node, aten.transpose, aten.permute):
            axes = before_permutation(node, axes)
        elif not (is_op(node, *_ALIKE) or is_noop(node) or _is_idle_cast(node)):
            return Placed(node, axes)
        node = node.args[0]  # type: ignore[assignment]


@dataclass(frozen=True)
class Cut:
    """A slice of a tensor: the dimension that is cut, by its meaning, and the other arguments of the call."""

    axis: str
    bounds: tuple[Any, ...]


def uncut(placed: Placed) -> tuple[Placed, tuple[Cut, ...]]:
    """What a tensor is before it was permuted, copied as it is or cut, and the cuts in their order."""
    cuts: list[Cut] = []
    while is_op((placed := unmoved(placed)).node, aten.slice):
        node = placed.node
        axis = placed.axes[dimension_of(argument(node, "dim"), len(placed.axes))]
        cuts.insert(0, Cut(axis, tuple(argument(node, name) for name in ("start", "end", "step"))))
        placed = Placed(node.args[0], placed.axes)  # type: ignore[arg-type]
    return placed, tuple(cuts)


def before_permutation(node: Node, axes: str) -> str:
    """Dimensions of what a transposition or permutation reads, for those that it returns."""
    rank = len(axes)
    if is_op(node, aten.permute):
        order = [dimension_of(dim, rank) for dim in node.args[1]]  # type: ignore[arg-type, union-attr]
    else:
        one, other = (dimension_of(dim, rank) for dim in node.args[1:3])
        order = list(range(rank))
        order[one], order[other] = other, one
    return "".join(axes[order.index(dim)] for dim in range(rank))


def _is_idle_cast(node: Node) -> bool:
    value = tensor_value(node)
    before = tensor_value(node.args[0]) if is_op(node, aten.to, aten._to_copy) else None
    return value is not None and before is not None and (before.dtype, before.device) == (value.dtype, value.device)


def dimension_of(dim: object, rank: int) -> int:
    """A dimension counted from the front."""
    assert isinstance(dim, int), "a dimension is a number"
    return dim % rank
