"""Lift the rotary embedding (RoPE) of a site's keys out of the graph, so that index queries and keys get the same.

Between the key projection and the new keys lie layout, perhaps a norm, and RoPE in one of many spellings. Where RoPE
begins is found by dominance: of the tensors that every path from the projection to the keys goes through, the last one
behind which all inputs other than weights (cosines and sines) come in. What follows is believed only after it was run
on random values: it has to be linear, the same for every head, and must mix neither heads nor tokens nor rows. Then it
is applied, as it is spelled, to index queries, which have as many heads as the keys, and to the index key repeated.

That the embedding keeps lengths is not asked for, because nothing exact rests on it. A factor that all tokens share (as
YaRN has it) ranks the blocks of a query as they are ranked without it. One that depends on the position (as in xPos,
where queries have its inverse) favours some blocks over others: index scores then fade with the distance to the first
token, which is worse selection, and never another mask. The branch is calibrated and gated through the very same map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx
import torch
from torch import Tensor
from torch.fx import Node

from msa_compile._compat import OpOverload
from msa_compile.passes.check_projections import projected
from msa_compile.passes.graph_facts import GraphFacts, is_op, is_owned, tensor_value
from msa_compile.passes.placed import IndexRefused, Placed
from msa_compile.passes.prove_heads import small_sizes
from msa_compile.passes.replay import ReplayError, Sizes, concrete, replay

aten = torch.ops.aten
_LAYOUTS = ("BHTD", "BTHD")
# What may be done to a weight before it is multiplied with keys: nothing that could look up a position.
_OF_WEIGHTS = (aten.to, aten._to_copy, aten.add, aten.mul, aten.detach, aten.alias, aten.view, aten.reshape,
               aten.unsqueeze)  # fmt: skip


@dataclass(frozen=True)
class LiftedRope:
    """The rotary embedding of a site's keys.

    Attributes:
        source: The keys before it, ``[B, H, T, D]`` in some order.
        inner: Its calls, in order; none where keys have no RoPE.
        result: The keys after it.
    """

    source: Placed
    inner: tuple[Node, ...]
    result: Placed


def lift_rope(facts: GraphFacts, fresh: Placed) -> LiftedRope:
    """The RoPE that makes the keys ``fresh`` of this call.

    Raises:
        IndexRefused: No part of the way from the key projection is proved to be one.
    """
    chain = _dominators(facts, fresh.node)
    whole = _region(facts, chain[-1], fresh.node)
    positional = {side for side in _sides(whole, chain[-1]) if not _is_weight(facts, side)}
    if not positional:
        return LiftedRope(fresh, (), fresh)
    for source in chain:
        value = tensor_value(source)
        inner = _region(facts, source, fresh.node)
        if value is None or value.dim() != 4 or value.is_complex() or not positional <= _sides(inner, source):
            continue
        for axes in _LAYOUTS:
            placed = Placed(source, axes)
            if _is_rope(facts, placed, inner, fresh):
                return LiftedRope(placed, tuple(facts.ordered(inner)), fresh)
    raise IndexRefused(f"no part of the way to {fresh.node} is proved to be a rotary embedding")


def _dominators(facts: GraphFacts, node: Node) -> list[Node]:
    """What every path from the key projection to ``node`` goes through, ``node`` first and the projection last."""
    inner, boundary = facts.makers(node, node, stop=lambda candidate: projected(candidate) is not None)
    projections = {candidate for candidate in boundary if projected(candidate) is not None}
    if not projections or node in projections:
        raise IndexRefused("the keys are no heads of a projection")
    ways = networkx.DiGraph((source, user) for user in inner for source in user.all_input_nodes)
    ways.add_edges_from(("start", projection) for projection in projections)
    nearest = networkx.immediate_dominators(ways, "start")
    chain = [node]
    while chain[-1] in nearest and nearest[chain[-1]] not in ("start", chain[-1]):
        chain.append(nearest[chain[-1]])
    return chain


def _region(facts: GraphFacts, source: Node, result: Node) -> set[Node]:
    """Calls on the ways from ``source`` to ``result``, ``source`` left out."""
    first = facts.position[source]
    behind: set[Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if facts.position[node] > first and node not in behind:
            behind.add(node)
            pending.extend(node.all_input_nodes)
    inner: set[Node] = set()
    for node in facts.ordered(behind):
        if any(entry is source or entry in inner for entry in node.all_input_nodes):
            inner.add(node)
    return inner


def _sides(inner: set[Node], source: Node) -> set[Node]:
    """Tensors that enter a region beside ``source``."""
    entering = {node for call in inner for node in call.all_input_nodes} - inner - {source}
    return {node for node in entering if tensor_value(node) is not None and not _is_size_only(node, inner)}


def _is_size_only(node: Node, inner: set[Node]) -> bool:
    return all(is_op(user, aten.sym_size) for user in node.users if user in inner)


def _is_weight(facts: GraphFacts, side: Node) -> bool:
    """Whether a tensor is one weight for all tokens, such as the gain of a norm."""
    inner, boundary = facts.makers(side, side)
    value = tensor_value(side)
    assert value is not None, "sides are tensors"
    return (
        len(boundary) == 1
        and all(is_owned(node) for node in boundary)
        and all(is_op(node, *_OF_WEIGHTS) for node in inner)
        and all(isinstance(size, int) and size == 1 for size in value.shape[:-1])
    )


def _is_rope(facts: GraphFacts, source: Placed, inner: set[Node], result: Placed) -> bool:
    """Whether a region is linear, the same for all heads, and keeps heads, tokens and rows apart."""
    if any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in inner):
        return False
    sides = _sides(inner, source.node)
    sizes = small_sizes(inner | sides | {source.node, result.node})
    if sizes is None:
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        given = {side: _sample(side, sizes, generator) for side in sides}
        before, after = (_sizes_of(placed, sizes) for placed in (source, result))
        if before != after:
            return False

        def turn(heads: Tensor) -> Tensor:
            placed = heads.transpose(1, 2).contiguous().transpose(1, 2).permute(source.permutation_of("BHTD"))
            made = replay(facts, inner, {**given, source.node: placed}, sizes, result.node)
            assert isinstance(made, Tensor), "a region ends in a tensor"
            return made.permute([result.axes.index(axis) for axis in "BHTD"])

        return _keeps_heads_and_tokens(turn, before, source.node, generator)
    except (ReplayError, IndexError, RuntimeError):
        return False


def _keeps_heads_and_tokens(
    turn: Callable[[Tensor], Tensor], shape: tuple[int, ...], source: Node, generator: torch.Generator
) -> bool:
    dtype = source.meta["val"].dtype
    one, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    turned = turn(one).double()
    tolerance = 64 * torch.finfo(dtype).eps * float(turned.abs().max() + 1)

    def agree(left: Tensor, right: Tensor) -> bool:
        return bool((left.double() - right.double()).abs().max() <= 4 * tolerance)

    if not (turned.isfinite().all() and agree(turn(one + 2 * other), turned + 2 * turn(other).double())):
        return False
    if not agree(turn(one.roll(1, 1)), turned.roll(1, 1)):
        return False
    for dim in range(3):
        for place in {0, shape[dim] // 2, shape[dim] - 1}:
            alone = torch.zeros_like(one)
            alone.select(dim, place).copy_(one.select(dim, place))
            expected = torch.zeros_like(turned)
            expected.select(dim, place).copy_(turned.select(dim, place))
            if not agree(turn(alone), expected):
                return False
    return True


def _sizes_of(placed: Placed, sizes: Sizes) -> tuple[int, ...]:
    shape = placed.node.meta["val"].shape
    return tuple(concrete(shape[placed.axes.index(axis)], sizes) for axis in "BHTD")


def _sample(node: Node, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Random values for a tensor that enters a region."""
    value = node.meta["val"]
    shape = [concrete(size, sizes) for size in value.shape]
    if not (value.is_floating_point() or value.is_complex()):
        raise ReplayError(f"{node} holds integers")
    return torch.randn(shape, generator=generator, dtype=torch.complex64 if value.is_complex() else None).to(
        value.dtype
    )
