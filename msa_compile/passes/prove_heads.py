"""Find the key/value heads before they were repeated, and prove the repeat by running it.

Source: grouped-query attention ties query head ``h`` to key/value head ``h // G`` (spec 2.6). The many spellings
(``expand`` + ``reshape``, ``repeat_interleave``, ``enable_gqa``) are one fact: the repeated tensor equals
``x.repeat_interleave(G, dim=1)``. A ``repeat`` in the other order is not that, and is refused.
"""

from __future__ import annotations

import itertools

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, Heads, Refused
from msa_compile.passes.choose_sizes import SizeSpace
from msa_compile.passes.graph_facts import GraphFacts, is_noop, is_op, tensor_value
from msa_compile.passes.replay import ReplayError, Sizes, concrete, expression, replay, symbols_of
from msa_compile.records import Reason

aten = torch.ops.aten
_LAYOUT = (
    aten.expand, aten.reshape, aten.view, aten._unsafe_view, aten.clone, aten.contiguous, aten.unsqueeze, aten.squeeze,
    aten.transpose, aten.permute, aten.repeat_interleave, aten.repeat, aten.to, aten._to_copy, aten.detach,
    aten.alias, aten.mT, aten.flatten, aten.unflatten, aten.swapaxes,
)  # fmt: skip
_PERMUTATIONS = tuple((0, *rest) for rest in itertools.permutations((1, 2, 3)))


def prove_heads(facts: GraphFacts, attention: Attention, operand: Node, *, transposed: bool = False) -> Heads:
    """The un-repeated keys or values behind ``operand``.

    Args:
        facts: Facts of the graph.
        attention: The attention that reads ``operand``.
        operand: ``[B, H, Tk, D]``, or ``[B, H, D, Tk]`` when ``transposed``.
        transposed: Whether the last two dimensions are swapped.

    Raises:
        Refused: If no tensor is proved to be the un-repeated one, or a cache is written under the repeat.
    """
    query_heads = int(attention.query.meta["val"].shape[1])
    chain = layout_chain(operand)
    _fix_head_sizes(attention, chain, length=operand.meta["val"].shape[-1 if transposed else -2])
    proved = [heads for node in chain if (heads := _prove(facts, operand, node, query_heads, attention, transposed))]
    if not proved:
        raise Refused(Reason.HEAD_LAYOUT, f"{query_heads} query heads against {operand} {_shape(operand)}")
    heads = min(proved, key=lambda item: item.count)
    for node in chain[chain.index(heads.node) :]:
        if _is_repeat(node):
            raise Refused(Reason.HEAD_LAYOUT, f"{node} repeats heads in an order that is not that of groups")
    between = chain[: chain.index(heads.node)]
    # Without a repeat the memory is first read by the product with the queries.
    reads = {attention.output, *attention.output.all_input_nodes}  # flex_attention returns several, and one is taken
    readers = [user for user in operand.users if is_op(user, aten.matmul) or user in reads]
    first = between[-1] if between else min(readers, key=facts.position.__getitem__)
    if facts.written_between(heads.node, first, attention.output):
        raise Refused(Reason.CACHE_WRITE, f"{heads.node} is written after it was repeated")
    return heads


def _fix_head_sizes(attention: Attention, chain: list[Node], length: object) -> None:
    """Guard on the head counts and dimensions that Dynamo left open (``dynamic=True``); batch and length stay open."""
    open_sizes = {expression(attention.query.meta["val"].shape[0]), expression(length)}
    for node in (attention.query, *chain):
        for dim, size in enumerate(node.meta["val"].shape):
            is_query_length = node is attention.query and dim == 2
            if isinstance(size, torch.SymInt) and expression(size) not in open_sizes and not is_query_length:
                int(size)


def _is_repeat(node: Node) -> bool:
    """Whether a layout call makes more of what it is given, but for more rows of the batch."""
    if not is_op(node, aten.expand, aten.repeat, aten.repeat_interleave):
        return False
    before, after = tensor_value(node.args[0]), tensor_value(node)
    if before is None or after is None:
        return True
    old, new = ([expression(size) for size in value.shape] for value in (before, after))
    return len(old) != len(new) or old[1:] != new[1:]


def layout_chain(operand: Node) -> list[Node]:
    """``operand`` and what it is a re-arrangement of, nearest first."""
    chain = [operand]
    # A slice that cuts at some length only would be proved at the small sizes of a run, and cut at others.
    while (is_op(chain[-1], *_LAYOUT) or is_noop(chain[-1])) and isinstance(chain[-1].args[0], Node):
        chain.append(chain[-1].args[0])
    return [node for node in chain if tensor_value(node) is not None]


def _prove(
    facts: GraphFacts, operand: Node, node: Node, query_heads: int, attention: Attention, transposed: bool
) -> Heads | None:
    value, target = tensor_value(node), tensor_value(operand)
    if value is None or target is None or value.dim() != 4:
        return None
    inner = _between(operand, node)
    sizes = small_sizes(inner | {operand, node})
    if sizes is None:
        return None
    shape = [concrete(size, sizes) for size in value.shape]
    sample = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    try:
        repeated = replay(facts, inner, {node: sample}, sizes, operand)
    except ReplayError:
        return None
    repeated = repeated.transpose(-1, -2) if transposed else repeated
    if repeated.dim() != 4:
        return None
    for permutation in _PERMUTATIONS:
        single = sample.permute(permutation)
        count = single.shape[1]
        if query_heads % count or single.shape[2:] != repeated.shape[2:]:
            continue
        if repeated.shape[1] == count and not (attention.grouped or count in (1, query_heads)):
            continue  # nothing repeats them: only one head broadcasts over all queries
        groups = repeated.shape[1] // count
        if repeated.shape[1] not in (count, query_heads) or repeated.shape[1] % count:
            continue
        if torch.equal(repeated, single.repeat_interleave(groups, dim=1).to(repeated.dtype)):
            return Heads(node, permutation, count, _spelling(attention, operand, node, count, query_heads))
    return None


def _between(operand: Node, node: Node) -> set[Node]:
    """The layout chain from ``operand`` down to, not including, ``node``."""
    chain: set[Node] = set()
    current: Node = operand
    while current is not node:
        chain.add(current)
        current = current.args[0]  # type: ignore[assignment]
    return chain


def small_sizes(nodes: set[Node]) -> Sizes | None:
    """Small distinct values for the symbols, or ``{}`` when the graph is specialised.

    Guards may leave no small ones (a scan that is unrolled for a range of lengths): then those of the capture.
    """
    values = [node.meta.get("val") for node in nodes]
    parts = [part for value in values if isinstance(value, torch.Tensor) for part in value.shape] + values
    space = SizeSpace(part for part in parts if isinstance(part, torch.SymInt))
    symbols = symbols_of(nodes)
    least = [bound + extra for bound in space.lower_bounds(symbols) for extra in (0, 1, 2)]
    small = space.samples(symbols, dict.fromkeys((3, 5, 7, 11, 2, 16, 64, 256, *least)), limit=1)
    names = sorted(symbols, key=str)
    captured = space.captured(names)
    return next(small, dict(zip(names, captured, strict=True)) if captured else None)


def _spelling(attention: Attention, operand: Node, node: Node, count: int, query_heads: int) -> str:
    if count == query_heads:
        return "heads"
    if attention.grouped and operand is node:
        return "enable_gqa"
    if any(is_op(entry, aten.repeat_interleave) for entry in _between(operand, node)):
        return "repeat_interleave"
    return "repeat_kv"


def _shape(node: Node) -> str:
    value = tensor_value(node)
    return "?" if value is None else str(tuple(value.shape))
