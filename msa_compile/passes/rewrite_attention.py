"""Put MSA in the place of each attention that was planned sparse: index branch, block selection, sparse attention."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import msa_compile.kernels.given_mask  # noqa: F401  (registers the msa ops)
from msa_compile.config import MSAConfig
from msa_compile.passes.attention import Heads, MaskTerm, OutputLayout
from msa_compile.passes.detect_attention import Proved
from msa_compile.passes.graph_facts import tensor_value

aten = torch.ops.aten

SITE = "msa_site"  # metadata of a `select_blocks` node: the name of its site


def rewrite_attention(graph: Graph, proved: Proved, name: str, config: MSAConfig, dense_below: int, owner: int) -> None:
    """Replace one proved attention in ``graph`` by the MSA ops; the old nodes stay, without users.

    Args:
        graph: The canonical graph, changed in place.
        proved: What detection proved.
        name: Site name, for errors at run time, and for who looks for a site's ops in the graph.
        config: Block size and budget, which become arguments of the ops and so part of every compile-cache key.
        dense_below: Calls with at most this many keys run dense; an argument of the ops too.
        owner: Number of the compiled model.
    """
    attention = proved.attention
    emit = _Emitter(graph, attention.output)
    query, key, value = emit.heads(proved.query), emit.heads(proved.key), emit.heads(proved.value)
    position, bias = _positions(emit, proved, query)
    index_query = _group_mean(emit, query, proved.key.count)
    shared: dict[str, Any] = {"block_size": config.block_size, "dense_below": dense_below, **position}
    block_ids = emit(
        torch.ops.msa.select_blocks.default,
        index_query,
        key,
        topk=config.topk_blocks,
        local_blocks=config.local_blocks,
        sink_blocks=config.sink_blocks,
        **shared,
    )
    block_ids.meta[SITE] = name
    sinks = None if attention.sinks is None else emit.sinks(attention.sinks)
    out = emit(
        torch.ops.msa.block_sparse_attention.default,
        query,
        key,
        value,
        block_ids,
        scale=attention.scale,
        softcap=attention.softcap,
        sinks=sinks,
        **shared,
    )
    if bias is not None:
        settings = {"scale": attention.scale, "softcap": attention.softcap, "sinks": sinks}
        out = emit(
            torch.ops.msa.exact_where_biased.default,
            *(out, query, key, value, bias.added, shared["mask"], bias.found, name, owner),
            **settings,
        )
    out = emit.arranged(out, proved.output)
    dtype = attention.output.meta["val"].dtype
    if out.meta["val"].dtype != dtype:
        out = emit(aten.to.dtype, out, dtype)
    attention.output.replace_all_uses_with(emit.in_memory_order(out, attention.output.meta["val"]))


def _group_mean(emit: _Emitter, query: Node, groups: int) -> Node:
    """Index query of the ``"keys"`` indexer, ``[B, Hkv, Tq, D]``: its score is the group's mean attention logit."""
    query = emit(aten.detach.default, query)  # selection has no gradient
    heads = int(query.meta["val"].shape[1])
    if heads == groups:
        return query
    return emit(aten.mean.dim, emit(aten.unflatten.int, query, 1, [groups, heads // groups]), [2])


@dataclass(frozen=True)
class _Bias:
    """What additive masks that were handed in add, ``[B or 1, 1, Tq, Tk]``, and whether that is more than hiding."""

    added: Node
    found: Node


def _positions(emit: _Emitter, proved: Proved, query: Node) -> tuple[dict[str, Any], _Bias | None]:
    """The arguments that say where queries and keys stand and what they see, and what may be added to the scores."""
    form = proved.mask.form
    if form == "causal":
        return {}, None
    if form == "top_left":
        batch = emit(aten.sym_size.int, query, 0)
        device = query.meta["val"].device
        return {"query_start": emit(aten.zeros.default, [batch], dtype=torch.int64, device=device)}, None
    mask, bias = None, None
    for term in proved.attention.mask:
        seen, more = emit.visible(term)
        mask = seen if mask is None else emit(aten.bitwise_and.Tensor, mask, seen)
        bias = emit.together(bias, more)
    assert mask is not None, "only a causal attention has no mask"
    if form == "causal+padding":
        # The last query sees every key that is not padded, so its row is the padding mask: linear, not Tq x Tk.
        mask = emit(aten.slice.Tensor, mask, 2, -1)
        _, key_start, _ = emit.positions(mask, query)
        return {"mask": mask, "key_start": key_start}, None
    query_start, _, document_start = emit.positions(mask, query)
    where = {"mask": mask, "query_start": query_start, "document_start": document_start, "is_causal": False}
    return where, bias if proved.mask.is_handed_in else None


class _Emitter:
    """Inserts calls before one node, with the metadata that later passes and Inductor read."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self.graph = graph
        self.before = before
        self.fake_mode = before.meta["val"].fake_mode

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for field in ("nn_module_stack", "stack_trace", "from_node", "source_fn_stack"):
            if field in self.before.meta:
                node.meta[field] = self.before.meta[field]
        values = map_arg((args, kwargs), lambda entry: entry.meta["val"])
        with self.fake_mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

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

    def visible(self, term: MaskTerm) -> tuple[Node, _Bias | None]:
        """A mask term as bool ``[B or 1, 1, Tq, Tk]``, true where a key is seen, and what it may add besides."""
        if term.kind == "additive":
            checked = self(torch.ops.msa.visible.default, term.node)
            bias = _Bias(self.as_mask(term.node), self.item(checked, 1))
            return self.as_mask(self.item(checked, 0)), bias
        node = self(aten.logical_not.default, term.node) if term.kind == "hidden" else term.node
        value = tensor_value(node)
        assert value is not None
        return self.as_mask(node if value.dtype == torch.bool else self(aten.to.dtype, node, torch.bool)), None

    def together(self, one: _Bias | None, other: _Bias | None) -> _Bias | None:
        """What two terms add."""
        if one is None or other is None:
            return one or other
        found = self(aten.bitwise_or.Tensor, one.found, other.found)
        return _Bias(self(aten.add.Tensor, one.added, other.added), found)

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
