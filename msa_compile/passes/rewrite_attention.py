"""Put MSA in the place of each attention that was planned sparse: index branch, block selection, sparse attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

import msa_compile.kernels.given_mask
import msa_compile.kernels.index_loss  # noqa: F401
from msa_compile.config import MSAConfig
from msa_compile.index_keys import IndexBinding
from msa_compile.passes.detect_attention import Proved
from msa_compile.passes.emitter import Bias, Emitter
from msa_compile.passes.graph_facts import LOSS
from msa_compile.passes.insert_index_branch import insert_index_branch
from msa_compile.passes.plan_index import IndexPlan
from msa_compile.passes.prove_own_selection import SelectionProof

aten = torch.ops.aten

SITE = "msa_site"  # metadata of a `select_blocks` node: the name of its site


def rewrite_attention(
    graph: Graph,
    proved: Proved,
    name: str,
    config: MSAConfig,
    dense_below: int,
    owner: int,
    index: IndexPlan | None = None,
    *,
    learns: bool = False,
    has_loss: bool = False,
) -> IndexBinding | None:
    """Replace one proved attention in ``graph`` by the MSA ops; the old nodes stay, without users.

    Args:
        graph: The canonical graph, changed in place.
        proved: What detection proved.
        name: Site name, for errors at run time, and for who looks for a site's ops in the graph.
        config: Block size and budget, which become arguments of the ops and so part of every compile-cache key.
        dense_below: Calls with at most this many keys run dense; an argument of the ops too.
        owner: Number of the compiled model.
        index: The index branch to select by; the keys themselves without one.
        learns: Whether gradients may reach the weights of the index branch.
        has_loss: Whether the graph computes the loss of the index branch, on the blocks that it selects.

    Returns:
        How index keys of earlier calls come in and go out, where there are such.
    """
    attention = proved.attention
    emit = Emitter(graph, attention.output)
    query, key, value = emit.heads(proved.query), emit.heads(proved.key), emit.heads(proved.value)
    position, bias = _positions(emit, proved, query)
    own = proved.selection
    block_size = config.block_size if own is None else own.block_size
    shared: dict[str, Any] = {"block_size": block_size, "dense_below": dense_below, **position}
    budget = {"topk": config.topk_blocks, "local_blocks": config.local_blocks, "sink_blocks": config.sink_blocks}
    budget["candidates"] = config.candidates
    branch = None
    if index is not None:
        rounds = config.index_cache == "fp8" and not learns
        branch = insert_index_branch(emit, index, name, proved.key.count, learns=learns, rounds=rounds)
    if own is not None:
        block_ids = _own_blocks(emit, own, key)
    elif branch is None:
        by_keys = _group_mean(emit, query, proved.key.count)
        block_ids = emit(torch.ops.msa.select_blocks.default, by_keys, key, **budget, **shared)
    elif not branch.is_handed_in:
        block_ids = emit(torch.ops.msa.select_blocks.default, branch.query, branch.key, **budget, **shared)
    else:
        operands = (branch.query, branch.key, _group_mean(emit, query, proved.key.count), key)
        block_ids = emit(torch.ops.msa.select_blocks_if_fresh.default, *operands, name, owner, **budget, **shared)
    if own is None:  # whose budget is nobody else's to change
        block_ids.meta[SITE] = name
    if has_loss and branch is not None:
        bounds = {name: value for name, value in shared.items() if name != "dense_below"}
        compared = (branch.query, branch.key, query, key, block_ids)
        factors = {"scale": attention.scale, "softcap": attention.softcap}
        loss = emit(torch.ops.msa.index_loss.default, *compared, **factors, **bounds)
        emit.item(loss, 0).meta[LOSS] = name
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
    if own is not None and own.averages:
        out = _with_averages(emit, out, value, block_ids, shared)
    out = emit.arranged(out, proved.output)
    dtype = attention.output.meta["val"].dtype
    if out.meta["val"].dtype != dtype:
        out = emit(aten.to.dtype, out, dtype)
    attention.output.replace_all_uses_with(emit.in_memory_order(out, attention.output.meta["val"]))
    return None if branch is None else branch.binding


def _own_blocks(emit: Emitter, own: SelectionProof, key: Node) -> Node:
    """Block ids by the model's own index queries, keys and budget."""
    index_query, index_key = (emit(aten.detach.default, node) for node in (own.index_query, own.index_key))
    positions = own.positions
    if positions is not None and positions.meta["val"].dim() == 1:
        positions = emit(aten.unsqueeze.default, positions, 0)
    budget = (own.block_size, own.topk, own.local_blocks)
    length = emit(aten.sym_size.int, key, 2)
    return emit(torch.ops.msa.select_blocks_at.default, index_query, index_key, positions, length, *budget)


def _with_averages(emit: Emitter, out: Node, value: Node, block_ids: Node, shared: dict[str, Any]) -> Node:
    """``out``, and the mean of all values where a query sees nothing."""
    length = emit(aten.sym_size.int, value, 2)
    bounds = (shared.get("mask"), length, shared["block_size"], shared.get("is_causal", True))
    blind = emit(torch.ops.msa.sees_nothing.default, block_ids, *bounds)
    mean = emit(torch.ops.msa.mean_if_any.default, value, blind)
    heads = out.meta["val"].shape[1] // value.meta["val"].shape[1]
    blind, mean = (emit(aten.repeat_interleave.self_int, node, heads, 1) for node in (blind, mean))
    return emit(aten.where.self, blind, mean, out)


def _group_mean(emit: Emitter, query: Node, groups: int) -> Node:
    """Index query of the ``"keys"`` indexer, ``[B, Hkv, Tq, D]``: its score is the group's mean attention logit."""
    query = emit(aten.detach.default, query)  # selection has no gradient
    heads = int(query.meta["val"].shape[1])
    if heads == groups:
        return query
    return emit(aten.mean.dim, emit(aten.unflatten.int, query, 1, [groups, heads // groups]), [2])


def _positions(emit: Emitter, proved: Proved, query: Node) -> tuple[dict[str, Any], Bias | None]:
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
        if proved.selection is not None:
            return {"mask": mask}, None
        _, key_start, _ = emit.positions(mask, query)
        return {"mask": mask, "key_start": key_start}, None
    if proved.selection is not None:
        # Its blocks start at the first slot, whatever is padded or packed.
        return {"mask": mask, "is_causal": False}, None
    query_start, _, document_start = emit.positions(mask, query)
    where = {"mask": mask, "query_start": query_start, "document_start": document_start, "is_causal": False}
    return where, bias if proved.mask.is_handed_in else None
