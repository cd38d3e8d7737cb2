"""Check that queries and keys are made from one hidden state: self-attention, and not through a latent projection."""

from __future__ import annotations

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, Refused
from msa_compile.passes.graph_facts import GraphFacts, is_op, tensor_value
from msa_compile.passes.keep_subclasses import is_kept_move, kept_projection
from msa_compile.records import Reason

aten = torch.ops.aten
_MOVES = (
    aten.to, aten._to_copy, aten.view, aten.reshape, aten._unsafe_view, aten.contiguous, aten.clone, aten.detach,
    aten.alias, aten.dropout, aten.transpose, aten.permute, aten.slice, aten.split, aten.squeeze, aten.unsqueeze,
)  # fmt: skip


def check_projections(facts: GraphFacts, attention: Attention, key: Node) -> None:
    """Refuse what is not self-attention over one hidden state.

    Raises:
        Refused: Cross-attention (the keys come from elsewhere), latent attention (MLA), or neither queries nor keys are
            made in this graph.
    """
    queries = hidden_states(facts, attention.query, attention.output)
    keys = hidden_states(facts, key, attention.output)
    if not keys and not queries:
        raise Refused(Reason.NOT_CAPTURED, "queries and keys are made in another graph, a graph break lies between")
    if not keys:
        raise Refused(Reason.CROSS_ATTENTION, f"no projection of this call's tokens feeds {key}")
    if not queries:
        raise Refused(Reason.CROSS_ATTENTION, f"no projection of this call's tokens feeds {attention.query}")
    if queries == keys:
        return
    # One latent projection further back both may meet: that is MLA. Otherwise the keys are somebody else's.
    behind_queries = queries.union(*(hidden_states(facts, node, attention.output) for node in queries))
    behind_keys = keys.union(*(hidden_states(facts, node, attention.output) for node in keys))
    if behind_queries & behind_keys:
        raise Refused(Reason.LATENT_ATTENTION, f"queries from {_names(queries)}, keys from {_names(keys)}")
    raise Refused(Reason.CROSS_ATTENTION, f"queries from {_names(queries)}, keys from {_names(keys)}")


def hidden_states(facts: GraphFacts, node: Node, reader: Node) -> set[Node]:
    """What the nearest linear projections behind ``node`` read, low-rank adapters (LoRA) looked through."""
    _, boundary = facts.makers(node, reader, stop=lambda candidate: projected(candidate) is not None)
    found: set[Node] = set()
    for projection in boundary:
        source = projected(projection)
        if source is None:
            continue
        source = _unmoved(source)
        found.add(source)
    # An adapter's second matrix reads the bare output of its first; the first reads the hidden state itself.
    bare = {state for state in found if (inner := projected(state)) is not None and _unmoved(inner) in found}
    return found - bare


def projected(node: Node) -> Node | None:
    """What a linear projection reads, or ``None`` for any other node."""
    source: object
    if is_op(node, aten.linear, aten.mm):
        source = node.args[0]
    elif is_op(node, aten.addmm):
        source = node.args[1]
    elif is_op(node, aten.matmul) and (weight := tensor_value(node.args[1])) is not None and weight.dim() == 2:
        source = node.args[0]
    else:
        source = kept_projection(node)
    return source if isinstance(source, Node) else None


def _unmoved(node: Node) -> Node:
    """``node`` before it was reshaped, cast or copied."""
    while (is_op(node, *_MOVES) or is_kept_move(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _names(nodes: set[Node]) -> str:
    return ", ".join(sorted(str(node) for node in nodes))
