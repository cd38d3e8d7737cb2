"""Block-sparse attention a key block at a time: the softmax over one block for all queries that selected it.

`C` queries of a group have `P` places (`cpu_pairs.py`) of `G` rows each; one more place stands for pairs that are not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_compile._compat import multiply_rows
from msa_compile.kernels.block_sparse_attention.cpu_pairs import Pairs, Piece
from msa_compile.kernels.threads import Scratch


@dataclass(frozen=True, slots=True)
class Softmax:
    """What turns products into probabilities: the constants of a call."""

    block_size: int
    scale: float
    softcap: float | None
    window: int | None

    def logits(self, query: Tensor, key: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the logits of a piece, `[M * G, block_size]` float32, -inf where hidden.

        Args:
            query: `[M * G, D]` float32, times the scale.
            key: `[block_size, D]` float32.
            hidden: `[M, block_size]` bool, or None.
        """
        logits = multiply_rows(query, key)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if hidden is not None:
            by_query = logits.unflatten(0, (len(hidden), -1))
            if key.isfinite().all():
                # The lower of a logit and a bound: a sixth of the time of masked_fill, but it would keep NaN.
                bound = torch.where(hidden, -torch.inf, torch.inf)
                torch.minimum(by_query, bound[:, None], out=by_query)
            else:
                by_query.masked_fill_(hidden[:, None], -torch.inf)
        return logits


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one head of keys `[L, D]` and values `[L, D]`, block 0 first."""

    key: Tensor
    value: Tensor
    block_size: int

    def of_key(self, block: int) -> Tensor:
        """Return `[block_size, D]` float32, zeros after the end."""
        return self._cut(self.key, block)

    def of_value(self, block: int) -> Tensor:
        """Return `[block_size, D]` float32, zeros after the end."""
        return self._cut(self.value, block)

    def _cut(self, rows: Tensor, block: int) -> Tensor:
        rows = rows[block * self.block_size : (block + 1) * self.block_size].to(torch.float32).contiguous()
        missing = self.block_size - len(rows)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def hidden(self, piece: Piece, slot: Tensor, window: int | None) -> Tensor | None:
        """Return `[M, block_size]` bool, what the queries of a piece do not see of its block, or None for nothing.

        Args:
            piece: the piece.
            slot: `[P]` int64, the slot of the query of each place.
            window: newest slots that a query may see, or None for all.
        """
        if not piece.is_partial:
            return None
        slot = slot[piece.place : piece.place_end]
        of_keys = torch.arange(piece.block * self.block_size, (piece.block + 1) * self.block_size)
        newest = slot.clamp(max=len(self.key) - 1)[:, None]
        hidden = of_keys > newest
        return hidden if window is None else hidden | (of_keys <= slot[:, None] - window)


class PieceResults(NamedTuple):
    """What the softmax over each piece by itself gives.

    Args:
        outputs: `[(P + 1) * G, D]` float32.
        highest: `[(P + 1) * G]` float32, the highest logit.
        largest: `[(P + 1) * G]` float32, the largest probability, which is one over the sum of exponentials.
    """

    outputs: Tensor
    highest: Tensor
    largest: Tensor


class Shares(NamedTuple):
    """How much of its query's softmax each pair is.

    Args:
        rows: `[C, G, topk]` int64, the row of each pair among those of `PieceResults`.
        of_pairs: `[C, G, topk]` float32.
        of_sink: `[C, G, 1]` float32, or None.
    """

    rows: Tensor
    of_pairs: Tensor
    of_sink: Tensor | None


def run_pieces(
    query: Tensor, blocks: Blocks, pairs: Pairs, *, position: int, softmax: Softmax, scratch: Scratch
) -> PieceResults:
    """Attend piece by piece.

    Args:
        query: `[C, G, D]` float32, times the scale, at the slots `position .. position + C - 1`.
        blocks: keys and values from the anchor to the last visible slot.
        pairs: pairs of the queries.
        position: slot of the first query, counted from the anchor.
        softmax: constants of the call.
        scratch: memory for the outputs.
    """
    group, head_dim = query.shape[1:]
    places = len(pairs.query)
    outputs = scratch.take((places + 1) * group * head_dim).view(-1, head_dim)
    highest = outputs.new_empty((places + 1) * group)
    largest = torch.empty_like(highest)
    # The place of pairs that are not: zeros without a share.
    outputs[places * group :] = 0
    highest[places * group :] = -torch.inf
    largest[places * group :] = 1
    by_query = query.flatten(1)
    slot = pairs.query + position
    for piece in pairs.pieces:
        places_of = slice(piece.place, piece.place_end)
        rows_of = slice(piece.place * group, piece.place_end * group)
        rows = by_query.index_select(0, pairs.query[places_of]).view(-1, head_dim)
        hidden = blocks.hidden(piece, slot, softmax.window)
        logits = softmax.logits(rows, blocks.of_key(piece.block), hidden)
        torch.amax(logits, -1, out=highest[rows_of])
        probabilities = torch.softmax(logits, -1)
        torch.amax(probabilities, -1, out=largest[rows_of])
        outputs[rows_of] = _weigh(probabilities, blocks.of_value(piece.block), hidden)
    return PieceResults(outputs, highest, largest)


def _weigh(probabilities: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """Return `probabilities @ value`, `[M * G, D]`, where a hidden value has no influence, NaN included."""
    if hidden is None:
        return multiply_rows(probabilities, value.t())
    is_finite = value.isfinite()
    if is_finite.all():
        return multiply_rows(probabilities, value.t())
    # Weight 0 times NaN is NaN. So what is not finite is added apart, to the rows that see it.
    result = multiply_rows(probabilities, value.where(is_finite, 0.0).t())
    by_query = result.unflatten(0, (len(hidden), -1))
    weights = probabilities.unflatten(0, (len(hidden), -1))
    for slot in (~is_finite).any(-1).nonzero().flatten().tolist():
        rest = value[slot].masked_fill(is_finite[slot], 0.0)
        sees = ~hidden[:, slot]
        by_query[sees] += weights[sees][..., slot, None] * rest
    return result


def find_shares(results: PieceResults, place: Tensor, sinks: Tensor | None, group: int) -> Shares:
    """Weigh the pieces of each query against each other; a piece of nothing but -inf is made zeros in place.

    Args:
        results: results of the pieces.
        place: `[C, topk]` int64, `0 .. P`.
        sinks: `[G]`, or None.
        group: `G`.
    """
    # Alone such a piece is NaN, and in the whole it is nothing.
    is_empty = results.highest == -torch.inf
    if is_empty[:-group].any():
        results.outputs.masked_fill_(is_empty[:, None], 0.0)
        results.largest.masked_fill_(is_empty, 1.0)
    rows = place[:, None] * group + torch.arange(group)[:, None]
    highest = results.highest[rows]
    most = highest.amax(-1, keepdim=True)
    of_sink = None
    if sinks is not None:
        of_sink = sinks.to(torch.float32)[:, None]
        most = torch.maximum(most, of_sink)
    # A query without a token has -inf here, and -inf minus -inf is NaN.
    most = most.masked_fill(most == -torch.inf, 0.0)
    weights = torch.exp(highest - most) / results.largest[rows]
    total = weights.sum(-1, keepdim=True)
    if of_sink is not None:
        of_sink = torch.exp(of_sink - most)
        total = total + of_sink
    total = total.masked_fill(total == 0, 1.0)
    return Shares(rows, weights / total, None if of_sink is None else of_sink / total)


def merge(results: PieceResults, shares: Shares) -> Tensor:
    """Return the outputs of the queries, `[C, G, D]` float32."""
    queries, group, topk = shares.rows.shape
    merged = F.embedding_bag(
        shares.rows.view(-1, topk), results.outputs, mode="sum", per_sample_weights=shares.of_pairs.view(-1, topk)
    )
    return merged.view(queries, group, -1)
