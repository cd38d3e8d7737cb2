"""Gradients of block-sparse attention on a CPU, a key block at a time; arguments and results as in `op.py`.

With `P` the probabilities of a piece by itself, `w` its shares of the whole, `dP = dO V^T`, `delta = rowsum(dO * O)`:

    dV = P^T (w dO),  X = P * (dP - delta) * (1 - tanh^2),  dK = X^T (w scale Q),  dQ = scale w (X K),
    dsink = -sum(w_sink delta)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from msa_compile._compat import multiply_rows
from msa_compile.kernels.block_sparse_attention.cpu_pairs import Pairs, find_pairs
from msa_compile.kernels.block_sparse_attention.cpu_pieces import (
    Blocks,
    Softmax,
    find_shares,
    merge,
    run_pieces,
)
from msa_compile.kernels.threads import Scratch


class GroupGradients(NamedTuple):
    """Where the gradients of one row and group go; all but `query` are added to.

    Args:
        query: `[G, Tq, D]`.
        key: `[D, L]` float32, for the keys of a segment.
        value: `[D, L]` float32.
        sinks: `[G]` float32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor


def differentiate(
    grad_output: Tensor,
    query: Tensor,
    blocks: Blocks,
    block_ids: Tensor,
    sinks: Tensor | None,
    grads: GroupGradients,
    *,
    position: int,
    step: int,
    softmax: Softmax,
    scratch: Scratch,
) -> None:
    """Differentiate for the queries of one row, group and segment, all of them finite.

    Args:
        grad_output: `[G, C, D]`.
        query: `[G, C, D]`, at the slots `position .. position + C - 1`.
        blocks: keys and values from the anchor to the last visible slot.
        block_ids: `[C, topk]` int32.
        sinks: `[G]`, or None.
        grads: where the gradients go.
        position: slot of the first query, counted from the anchor.
        step: queries at once.
        softmax: constants of the call.
        scratch: memory for the results of pieces.
    """
    group, queries = query.shape[:2]
    for start in range(0, queries, step):
        end = min(start + step, queries)
        pairs = find_pairs(
            block_ids[start:end],
            position=position + start,
            length=len(blocks.key),
            block_size=softmax.block_size,
            window=softmax.window,
            heads_a_group=group,
        )
        if not pairs.pieces:
            continue
        by_query = query[:, start:end].transpose(0, 1).to(torch.float32).contiguous() * softmax.scale
        grad = grad_output[:, start:end].transpose(0, 1).to(torch.float32).contiguous()
        results = run_pieces(by_query, blocks, pairs, position=position + start, softmax=softmax, scratch=scratch)
        shares = find_shares(results, pairs.place, sinks, group)
        delta = (grad * merge(results, shares)).sum(-1, keepdim=True)
        if shares.of_sink is not None:
            grads.sinks.sub_((shares.of_sink * delta).sum((0, 2)))
        # Rows that only round a piece up keep a share of 0, and so add nothing.
        share = torch.zeros_like(results.highest)
        share[shares.rows] = shares.of_pairs
        of_query = _add_pieces(
            grad,
            by_query,
            delta,
            share[:-group, None],
            blocks,
            pairs,
            grads,
            position=position + start,
            softmax=softmax,
        )
        grads.query[:, start:end] = of_query.transpose(0, 1)


def _add_pieces(
    grad: Tensor,
    query: Tensor,
    delta: Tensor,
    share: Tensor,
    blocks: Blocks,
    pairs: Pairs,
    grads: GroupGradients,
    *,
    position: int,
    softmax: Softmax,
) -> Tensor:
    """Add the gradients of keys and values, and return that of the queries, `[C, G, D]`.

    Args:
        grad: `[C, G, D]` float32, of the output.
        query: `[C, G, D]` float32, times the scale.
        delta: `[C, G, 1]` float32.
        share: `[P * G, 1]` float32, the share of each row in the softmax of its query.
        blocks: keys and values from the anchor to the last visible slot.
        pairs: pairs of the queries.
        grads: where the gradients go.
        position: slot of the first query, counted from the anchor.
        softmax: constants of the call.
    """
    queries, group, head_dim = query.shape
    length = len(blocks.key)
    slot = pairs.query + position
    grad, query, delta = grad.flatten(1), query.flatten(1), delta.flatten(1)
    of_query = torch.zeros_like(query)
    for piece in pairs.pieces:
        at = pairs.query[piece.place : piece.place_end]
        share_of = share[piece.place * group : piece.place_end * group]
        rows = query.index_select(0, at).view(-1, head_dim)
        grad_of = grad.index_select(0, at).view(-1, head_dim)
        hidden = blocks.hidden(piece, slot, softmax.window)
        key = blocks.of_key(piece.block)
        logits = softmax.logits(rows, key, hidden)
        probabilities = torch.softmax(logits, -1)
        slope = multiply_rows(grad_of, blocks.of_value(piece.block)).sub_(delta.index_select(0, at).view(-1, 1))
        slope.mul_(probabilities)
        if softmax.softcap is not None:
            # Hidden logits are -inf, and their probability is 0.
            slope.mul_(1 - logits.clamp_(min=-softmax.softcap).div_(softmax.softcap).square_())
        of_rows = multiply_rows(slope, key.t()).mul_(share_of)
        of_query.index_add_(0, at, of_rows.view(-1, group * head_dim))
        first = piece.block * softmax.block_size
        last = min(first + softmax.block_size, length)
        grads.key[:, first:last] += multiply_rows(rows.mul_(share_of).t(), slope.t())[:, : last - first]
        grads.value[:, first:last] += multiply_rows(grad_of.mul_(share_of).t(), probabilities.t())[:, : last - first]
    return of_query.mul_(softmax.scale).view(queries, group, head_dim)
