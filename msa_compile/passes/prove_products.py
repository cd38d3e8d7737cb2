"""Prove attention whose products have any rank or spelling (``bmm``, ``einsum``, broadcast ``matmul``) by running it.

The shapes suggest what is query, key and value; then the whole piece from them to the result runs on random numbers,
and must equal attention with the scale, cap, sinks and masks that were read from the chain. Nothing is believed of the
spelling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from msa_compile.passes.attention import Attention, Heads, OutputLayout, Refused
from msa_compile.passes.graph_facts import GraphFacts, tensor_value
from msa_compile.passes.prove_heads import layout_chain, small_sizes
from msa_compile.passes.replay import ReplayError, Sizes, concrete, is_runnable, replay
from msa_compile.records import Reason

aten = torch.ops.aten
_LARGEST_RUN = 2**24  # scores of one run
_MOST_RUNS = 64
_TOLERANCE = 1e-4


def prove_products(facts: GraphFacts, attention: Attention) -> tuple[Heads, Heads, Heads, OutputLayout]:
    """Queries, un-repeated keys and values, and the layout of the result.

    Raises:
        Refused: If no reading of the operands reproduces the graph's own result.
    """
    sizes, scores = _concrete_scores(facts, attention)
    tokens, keys = scores[-2], scores[-1]
    heads_and_batch = torch.Size(scores).numel() // (tokens * keys)
    width = _elements(attention.query, sizes) // (heads_and_batch * tokens)
    queries = list(_readings(attention.query, sizes, tokens, width))
    keys_read = sorted(_readings(attention.key, sizes, keys, width), key=lambda heads: _elements(heads.node, sizes))
    values_read = sorted(_readings(attention.value, sizes, keys, width), key=lambda heads: _elements(heads.node, sizes))
    tried = 0
    for key, value, query in itertools.product(keys_read, values_read, queries):
        batch = concrete(query.batch, sizes)
        if key.count != value.count or query.count * batch != heads_and_batch or query.count % key.count:
            continue
        if concrete(key.batch, sizes) != batch or concrete(value.batch, sizes) != batch:
            continue
        layout = _run(facts, attention, query, key, value, sizes)
        if layout is not None:
            return query, key, value, layout
        tried += 1
        if tried == _MOST_RUNS:
            break
    raise Refused(Reason.UNKNOWN_FORM, f"no reading of the operands of {attention.output.target} equals attention")


def _concrete_scores(facts: GraphFacts, attention: Attention) -> tuple[Sizes, list[int]]:
    """Sizes to run at, and the shape of the scores there."""
    parts = {attention.query, attention.key, attention.value, attention.output}
    assert attention.scores is not None
    sizes = small_sizes(parts | {attention.scores} | {term.node for term in attention.mask})
    if sizes is None:
        raise Refused(Reason.UNKNOWN_FORM, "no sizes to prove it at")
    shape = [concrete(size, sizes) for size in attention.scores.meta["val"].shape]
    if attention.sinks is not None:
        shape[-1] -= 1  # the sink column
    if torch.Size(shape).numel() > _LARGEST_RUN:
        raise Refused(Reason.UNKNOWN_FORM, f"too large to prove at the fixed size {shape}; let the lengths be dynamic")
    return sizes, shape


def _elements(node: Node, sizes: Sizes) -> int:
    value = tensor_value(node)
    assert value is not None
    return torch.Size([concrete(size, sizes) for size in value.shape]).numel()


def _readings(operand: Node, sizes: Sizes, length: int, width: int) -> Iterator[Heads]:
    """Every way to read a tensor behind ``operand`` as ``[B, H, length, width]``."""
    for node in layout_chain(operand):
        value = tensor_value(node)
        if value is None or value.dim() not in (3, 4, 5):
            continue
        shape = [concrete(size, sizes) for size in value.shape]
        for rest in itertools.permutations(range(1, value.dim())):
            order = (0, *rest)
            arranged = [shape[dim] for dim in order]
            if arranged[-2:] != [length, width]:
                continue
            count = torch.Size(arranged[1:-2]).numel()
            yield Heads(node, order, count, "heads" if value.dim() == 4 else f"{value.dim()}-D")


def _run(
    facts: GraphFacts, attention: Attention, query: Heads, key: Heads, value: Heads, sizes: Sizes
) -> OutputLayout | None:
    """The layout in which the graph's result equals attention of this reading; ``None`` if it does not."""
    generator = torch.Generator().manual_seed(0)
    given: dict[Node, Tensor] = {}
    for node in (query.node, key.node, value.node, *((attention.sinks,) if attention.sinks is not None else ())):
        shape = [concrete(size, sizes) for size in node.meta["val"].shape]
        given[node] = torch.randn(shape, generator=generator, dtype=torch.float32).to(node.meta["val"].dtype)
    for term in attention.mask:
        given[term.node] = _random_mask(term.node, term.kind, sizes, generator)
    # What was written to a cache before it was read is in the value that is given.
    settled = {write for node in given for write in facts.writes(node, node)}
    known = settled.union(given)
    inner, boundary = facts.makers(attention.output, attention.output, stop=lambda node: node in known)
    runnable = {node for node in boundary - settled if is_runnable(node)}
    try:
        result = replay(facts, inner | runnable, given, sizes, attention.output)
    except ReplayError:
        return None
    expected = _attend(attention, query, key, value, given)
    if expected is None:
        return None
    for layout in _layouts(query.count, key.count):
        if (
            layout.unflatten is not None
            and expected.permute(layout.permutation).shape[layout.unflatten[0]] != query.count
        ):
            continue
        arranged = layout.arrange(expected)
        if arranged.shape == result.shape and torch.allclose(
            arranged, result.float(), atol=_TOLERANCE, rtol=_TOLERANCE
        ):
            return layout
    return None


def _random_mask(node: Node, kind: str, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """A random mask under which every query sees the first key."""
    value = tensor_value(node)
    assert value is not None
    shape = [concrete(size, sizes) for size in value.shape]
    seen = torch.rand(shape, generator=generator) < 0.7
    seen[..., 0] = True
    if kind == "additive":
        return torch.where(seen, 0.0, -1e30).to(value.dtype)
    return (seen if kind == "visible" else ~seen).to(value.dtype)


def _attend(attention: Attention, query: Heads, key: Heads, value: Heads, given: dict[Node, Tensor]) -> Tensor | None:
    """Dense attention ``[B, Hq, Tq, D]`` of a reading, as the chain's scale, cap, sinks and masks say."""
    q, k, v = (heads.arrange(given[heads.node]).float() for heads in (query, key, value))
    groups = query.count // key.count
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    for term in attention.mask:
        mask = given[term.node]
        mask = mask.squeeze(1) if mask.dim() == 5 else mask
        seen = mask == 0 if term.kind == "additive" else mask.bool() ^ (term.kind == "hidden")
        try:
            scores = scores.masked_fill(~seen, float("-inf"))
        except RuntimeError:  # the mask does not broadcast to this reading
            return None
    if attention.sinks is None:
        return scores.softmax(-1) @ v
    sinks = given[attention.sinks].float().expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def _layouts(query_heads: int, key_heads: int) -> Iterator[OutputLayout]:
    for rest in itertools.permutations((1, 2, 3)):
        order = (0, *rest)
        yield OutputLayout(order)
        for first in range(3):
            yield OutputLayout(order, flatten=first)
        head = order.index(1)
        yield OutputLayout(order, unflatten=(head, (key_heads, query_heads // key_heads)))
