"""Find the block selection of a model that is sparse already, in what makes the mask of an attention.

Such a mask comes from activations: index queries times index keys, the best blocks of them, and every key of these. Two
cuts are made in it: at the product of index queries and keys, and at the tensor that says which keys are in a chosen
block. What lies between is proved by `prove_own_selection`, and so is what lies behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx
import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, MaskTerm, Refused
from msa_compile.passes.graph_facts import GraphFacts, argument, is_op, tensor_value
from msa_compile.passes.placed import dimension_of
from msa_compile.passes.replay import expression
from msa_compile.records import Reason

aten = torch.ops.aten
_AND = (aten.bitwise_and, aten.__and__, aten.logical_and)
_REPEATS = (
    aten.repeat_interleave, aten.expand, aten.reshape, aten.view, aten.unsqueeze, aten.contiguous, aten.flatten,
    aten.slice, aten.alias,
)  # fmt: skip


@dataclass(frozen=True)
class OwnSelection:
    """The block selection that a model has of its own; nothing about it is proved yet.

    Attributes:
        term: The mask of the attention.
        scores: Product of index queries and keys, ``[B, Hkv, Tq, Tk]``.
        index_query: ``[B, Hkv, Tq, D]``.
        index_key: ``[B, 1 or Hkv, Tk, D]``.
        kept: Which keys are in a chosen block, bool ``[B, Hkv, Tq, Tk]``; its ``Tk`` may be another symbol than that of
            the scores, where index keys are cached apart from keys.
        seen: What else hides keys, bool, broadcast to ``[B, 1, Tq, Tk]``.
        best: The call of ``topk`` that chooses.
        block_size: Keys in a block.
    """

    term: MaskTerm
    scores: Node
    index_query: Node
    index_key: Node
    kept: Node
    seen: Node
    best: Node
    block_size: int


def find_own_selection(facts: GraphFacts, attention: Attention, groups: int) -> OwnSelection | None:
    """The block selection in the mask of ``attention``; ``None`` where nothing is chosen by ``topk``.

    Args:
        facts: Facts of the graph.
        attention: The attention.
        groups: ``Hkv``.

    Raises:
        Refused: Something is chosen, and not in a form that is known.
    """
    if len(attention.mask) != 1:
        return None
    term = attention.mask[0]
    inner, boundary = facts.makers(term.node, attention.output, stop=_is_product)
    chosen = [node for node in facts.ordered(inner) if is_op(node, aten.topk)]
    products = [node for node in boundary if _is_product(node)]
    if not chosen or not products:
        return None
    if len(chosen) > 1 or len(products) > 1:
        raise _refused(f"{len(chosen)} choices among {len(products)} products")
    scores = products[0]
    heads, dtype = scores.meta["val"].shape[1], scores.meta["val"].dtype
    if expression(heads) != groups:
        raise _refused(f"{heads} index heads for {groups} key/value heads")
    if dtype not in (torch.float32, torch.float64):
        raise _refused(f"its scores are {dtype}, and those of the ops float32")
    kept = _kept(inner, scores, term.node)
    pooled = [node for node in inner if is_op(node, aten.amax) and facts.position[node] < facts.position[chosen[0]]]
    block_size = _captured(pooled[0].args[0].meta["val"].shape[-1]) if len(pooled) == 1 else None  # type: ignore[union-attr]
    if not isinstance(block_size, int):
        raise _refused("blocks are not scored by their best key")
    query, key = _operands(scores)
    return OwnSelection(term, scores, query, key, kept, _seen(inner, kept), chosen[0], block_size)


def _refused(why: str) -> Refused:
    return Refused(Reason.DATA_DEPENDENT_MASK, f"the model's own block selection: {why}")


def _is_product(node: Node) -> bool:
    value = tensor_value(node)
    return is_op(node, aten.matmul) and value is not None and value.dim() == 4


def _kept(inner: set[Node], scores: Node, term: Node) -> Node:
    """The first bool of the product's shape that every path from the product to the mask goes through."""
    ways = networkx.DiGraph((source, user) for user in inner for source in user.all_input_nodes)
    nearest = networkx.immediate_dominators(ways, scores)
    chain = [term]
    while chain[-1] is not scores and chain[-1] in nearest:
        chain.append(nearest[chain[-1]])
    # As long as the scores are in the call that was captured: at other sizes the proof tells.
    wanted = [_captured(size) for size in scores.meta["val"].shape]
    for node in reversed(chain):
        value = tensor_value(node)
        if value is not None and value.dtype == torch.bool and [_captured(size) for size in value.shape] == wanted:
            return node
    raise _refused("nothing says for each key whether its block is chosen")


def _captured(size: object) -> object:
    """A size in the call that was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _seen(inner: set[Node], kept: Node) -> Node:
    """What the chosen keys are combined with."""
    node = kept
    while True:
        users = [user for user in node.users if user in inner]
        if len(users) != 1:
            raise _refused(f"{kept} is read in several ways")
        if is_op(users[0], *_AND):
            seen = next((entry for entry in users[0].args if entry is not node), None)
            value = tensor_value(seen)
            if not isinstance(seen, Node) or value is None or value.dtype != torch.bool or value.dim() > 4:
                raise _refused("what else hides keys is no mask")
            if value.dim() > 2 and expression(value.shape[-3]) != 1:
                raise _refused("what else hides keys differs between heads")
            return seen
        if not is_op(users[0], *_REPEATS):
            raise _refused(f"{users[0].target} of the chosen keys")
        node = users[0]


def _operands(scores: Node) -> tuple[Node, Node]:
    """Index queries and keys, before they were widened: the ops widen for themselves, and only what they read."""
    query, turned = scores.args[:2]
    assert isinstance(query, Node) and isinstance(turned, Node), "a product has two tensors"
    swapped = [argument(turned, "dim0"), argument(turned, "dim1")] if is_op(turned, aten.transpose) else []
    if {dimension_of(dim, 4) for dim in swapped} != {2, 3}:
        raise _refused("index keys are not read as they are kept")
    key = turned.args[0]
    assert isinstance(key, Node), "what is transposed is a tensor"
    sources = _before_widening(query), _before_widening(key)
    return sources if len({source.meta["val"].dtype for source in sources}) == 1 else (query, key)


def _before_widening(operand: Node) -> Node:
    """Half precision before it was cast to float32."""
    if not is_op(operand, aten.to, aten._to_copy) or not isinstance(operand.args[0], Node):
        return operand
    before, after = operand.args[0].meta["val"].dtype, operand.meta["val"].dtype
    widened = after == torch.float32 and before in (torch.float16, torch.bfloat16, torch.float32)
    return operand.args[0] if widened else operand
