"""Dead-code elimination that knows mutation: an in-place cache write has no users and must stay."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from msa_compile._compat import OpOverload, flex_attention
from msa_compile.passes.graph_facts import LOSS, is_op


def eliminate_dead_code(graph: Graph) -> int:
    """Remove pure calls without users; returns how many.

    ``Graph.eliminate_dead_code`` deletes a user-less ``index_copy_`` and with it the KV cache, so purity is read from
    the op's schema here.
    """
    removed = 0
    for node in reversed(list(graph.nodes)):
        pure = _is_pure(node) or _is_write_that_nobody_reads(node)
        if not node.users and pure and LOSS not in node.meta:
            graph.erase_node(node)
            removed += 1
    return removed


def is_used(node: Node) -> bool:
    """Whether anything that stays in the graph reads what ``node`` returns."""
    pending, seen = list(node.users), set()
    while pending:
        user = pending.pop()
        if not _is_pure(user):
            return True
        if user not in seen:
            seen.add(user)
            pending.extend(user.users)
    return False


def _is_write_that_nobody_reads(node: Node) -> bool:
    """Whether an in-place call changes nothing but a tensor that this graph made, and that has no other reader."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten" or not node.args:
        return False
    written = [entry for entry in node.target._schema.arguments if entry.alias_info and entry.alias_info.is_write]
    source = node.args[0]
    return (
        written == node.target._schema.arguments[:1]
        and isinstance(source, Node)
        and list(source.users) == [node]
        and _is_pure(source)
        and source.op == "call_function"
        and isinstance(source.target, OpOverload)
        and not any(entry.alias_info for entry in source.target._schema.returns)
    )


def _is_pure(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if is_op(node, torch.ops.aten.scaled_dot_product_attention):
        return True  # it is called random for its dropout, and one that was replaced has none
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable and not node.is_impure()
    return node.target in (operator.getitem, flex_attention) or getattr(node.target, "__module__", "") == "_operator"
