"""Insert calls into a canonical graph, with the metadata that later passes and the inner compiler read."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from msa_compile.passes.attention import Heads, MaskTerm, OutputLayout
from msa_compile.passes.graph_facts import tensor_value

aten = torch.ops.aten


@dataclass(frozen=True)
class Bias:
    """What additive masks that were handed in add, ``[B or 1, 1, Tq, Tk]``, and whether that is more than hiding."""

    added: Node
    found: Node


class Emitter:
    """Inserts calls before one node, with the metadata that later passes and Inductor read."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self.graph = graph
        self.before = before
        self.fake_mode = before.meta["val"].fake_mode

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of ``target``, with its value."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for field in ("nn_module_stack", "stack_trace", "from_node", "source_fn_stack"):
            if field in self.before.meta:
                node.meta[field] = self.before.meta[field]
        values = map_arg((args, kwargs), lambda entry: entry.meta["val"])
        with self.fake_mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def at_end(self) -> Emitter:
        """The same, for calls behind all others."""
        late = copy.copy(self)
        late.before = self.graph.output_node()
        return late

    def item(self, node: Node, index: int) -> Node:
        """One output of a call that returns several."""
        return self(operator.getitem, node, index)

    def heads(self, heads: Heads) -> Node:
        """Queries, keys or values as ``[B, H, T, D]``."""
        node = heads.node
        if heads.permutation != tuple(range(len(heads.permutation))):
            node = self(aten.permute.default, node, list(heads.permutation))
        if len(heads.permutation) == 3:
            return self(aten.unsqueeze.default, node, 1)
        return self(aten.flatten.using_ints, node, 1, 2) if len(heads.permutation) == 5 else node

    def arranged(self, node: Node, layout: OutputLayout) -> Node:
        """``[B, Hq, Tq, D]`` in the layout of the node that it replaces."""
        if layout.permutation != (0, 1, 2, 3):
            node = self(aten.permute.default, node, list(layout.permutation))
        if layout.flatten is not None:
            node = self(aten.flatten.using_ints, node, layout.flatten, layout.flatten + 1)
        if layout.unflatten is not None:
            node = self(aten.unflatten.int, node, layout.unflatten[0], list(layout.unflatten[1]))
        return node

    def in_memory_order(self, node: Node, like: torch.Tensor) -> Node:
        """``node`` with its dimensions in memory in the order of ``like``.

        What reads the replaced node was traced under its strides: SDPA returns ``[B, H, T, D]`` that lies as
        ``[B, T, H, D]``, and a view that is legal there is not legal on a contiguous tensor.
        """
        strides = [stride.node.hint if isinstance(stride, torch.SymInt) else stride for stride in like.stride()]
        order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        if order == list(range(len(order))):
            return node
        moved = self(aten.permute.default, node, order)
        copied = self(aten.clone.default, moved, memory_format=torch.contiguous_format)
        return self(aten.permute.default, copied, [order.index(dim) for dim in range(len(order))])

    def visible(self, term: MaskTerm) -> tuple[Node, Bias | None]:
        """A mask term as bool ``[B or 1, 1, Tq, Tk]``, true where a key is seen, and what it may add besides."""
        if term.kind == "additive":
            checked = self(torch.ops.msa.visible.default, term.node)
            bias = Bias(self.as_mask(term.node), self.item(checked, 1))
            return self.as_mask(self.item(checked, 0)), bias
        node = self(aten.logical_not.default, term.node) if term.kind == "hidden" else term.node
        value = tensor_value(node)
        assert value is not None
        return self.as_mask(node if value.dtype == torch.bool else self(aten.to.dtype, node, torch.bool)), None

    def together(self, one: Bias | None, other: Bias | None) -> Bias | None:
        """What two terms add."""
        if one is None or other is None:
            return one or other
        found = self(aten.bitwise_or.Tensor, one.found, other.found)
        return Bias(self(aten.add.Tensor, one.added, other.added), found)

    def as_mask(self, node: Node) -> Node:
        """A mask as ``[B or 1, 1, Tq, Tk]``."""
        value = tensor_value(node)
        assert value is not None
        if value.dim() == 5:
            return self(aten.squeeze.dim, node, 1)
        for _ in range(4 - value.dim()):
            node = self(aten.unsqueeze.default, node, 0)
        # The heads of a mask were proved equal.
        return self(aten.slice.Tensor, node, 1, 0, 1) if value.dim() == 4 and value.shape[1] != 1 else node

    def positions(self, mask: Node, query: Node) -> tuple[Node, Node, Node]:
        """``query_start``, ``key_start`` and ``document_start`` that a mask implies."""
        starts = self(torch.ops.msa.mask_positions.default, mask, query)
        return self.item(starts, 0), self.item(starts, 1), self.item(starts, 2)

    def sinks(self, node: Node) -> Node:
        """Sinks ``[1, Hq, 1, 1]`` as ``[Hq]``."""
        return self(aten.reshape.default, node, [-1])
