"""Block-sparse attention on a CPU, a key block at a time.

Arguments and result as in `op.py`. The work is turned around: not every query gathers its blocks, but every block meets
all the queries that selected it in one product of up to a thousand rows (the heads of a group share the selection, so
a query has `G` rows). Each such piece is a softmax over one block; the pieces of a query are merged at the end,
weighted by their shares of the whole. The maximum and the sum of a piece stay apart until then: no logit overflows.

Products are in float32 whatever the inputs are, by oneDNN, and only the result is rounded. A call with a mask, or in
float64, goes to the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_compile._compat import multiply_rows
from msa_compile.kernels.block_sparse_attention import reference
from msa_compile.kernels.block_sparse_attention.pairs import Piece, find_pairs
from msa_compile.kernels.segments import find_segments
from msa_compile.kernels.threads import Scratch, run_all

# Elements of the results of pieces that a task holds until it merges them.
_WORKSPACE = 1 << 25
# Queries that a task should have, in rows a block: fewer make products too thin, more only take memory.
_ROWS_A_BLOCK = 2048


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend to the visible tokens of the selected blocks; as in `op.py`."""
    if mask is not None or query.dtype == torch.float64:
        return reference.block_sparse_attention(
            query,
            key,
            value,
            block_ids,
            block_size=block_size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            window=window,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
        )
    batch, heads, query_length, head_dim = query.shape
    groups, topk = key.shape[1], block_ids.shape[-1]
    heads_a_group = heads // groups
    output = query.new_zeros(query.shape)
    segments = find_segments(
        batch=batch,
        query_length=query_length,
        key_length=key.shape[2],
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
    )
    softmax = Softmax(block_size, head_dim**-0.5 if scale is None else scale, softcap, window)
    scratch = Scratch()
    tasks: list[Callable[[], None]] = []
    for segment in segments:
        blocks = -(-segment.length // block_size)
        step = min(
            max(1, _ROWS_A_BLOCK * blocks // (heads_a_group * topk)), _WORKSPACE // (heads_a_group * topk * head_dim)
        )
        slots = slice(segment.anchor, segment.anchor + segment.length)
        for start in range(segment.start, segment.end, max(1, step)):
            end = min(start + max(1, step), segment.end)
            for row in range(segment.row, segment.row_end):
                for group in range(groups):
                    of_group = slice(group * heads_a_group, (group + 1) * heads_a_group)
                    tasks.append(
                        partial(
                            _attend,
                            query[row, of_group, start:end],
                            Blocks(key[row, group, slots], value[row, group, slots], block_size),
                            block_ids[row, group, start:end],
                            None if sinks is None else sinks[of_group],
                            output[row, of_group, start:end],
                            position=segment.position + start - segment.start,
                            softmax=softmax,
                            scratch=scratch,
                        )
                    )
    run_all(tasks)
    return output


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
        rows = rows[block * self.block_size : (block + 1) * self.block_size].to(torch.float32)
        missing = self.block_size - len(rows)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def hidden(self, piece: Piece, slot: Tensor, window: int | None) -> Tensor | None:
        """Return `[M, block_size]` bool: what queries at the slots `slot [M]` do not see of the block of a piece."""
        if not piece.is_partial:
            return None
        of_keys = torch.arange(piece.block * self.block_size, (piece.block + 1) * self.block_size)
        newest = slot.clamp(max=len(self.key) - 1)[:, None]
        hidden = of_keys > newest
        return hidden if window is None else hidden | (of_keys <= slot[:, None] - window)


def _attend(
    query: Tensor,
    blocks: Blocks,
    block_ids: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    *,
    position: int,
    softmax: Softmax,
    scratch: Scratch,
) -> None:
    """Attend for the queries of one group.

    Args:
        query: `[G, C, D]`, at the slots `position .. position + C - 1`.
        blocks: keys and values from the anchor to the last visible slot.
        block_ids: `[C, topk]` int32.
        sinks: `[G]`, or None.
        output: `[G, C, D]`, zeros: where the result goes.
        position: slot of the first query, counted from the anchor.
        softmax: constants of the call.
        scratch: memory for the results of pieces.
    """
    group, queries, head_dim = query.shape
    pairs = find_pairs(
        block_ids,
        position=position,
        length=len(blocks.key),
        block_size=softmax.block_size,
        window=softmax.window,
        heads_a_group=group,
    )
    places = len(pairs.query)
    # One more place, for the pairs that are not to be: zeros with no share.
    results = scratch.take((places + 1) * group * head_dim).view(-1, head_dim)
    highest = results.new_empty((places + 1) * group)
    largest = torch.empty_like(highest)
    results[places * group :] = 0
    highest[places * group :] = -torch.inf
    largest[places * group :] = 1
    by_query = query.transpose(0, 1).to(torch.float32) * softmax.scale
    by_query = by_query.reshape(queries, group * head_dim)
    slot = pairs.query + position
    for piece in pairs.pieces:
        places_of = slice(piece.place, piece.place_end)
        rows_of = slice(piece.place * group, piece.place_end * group)
        rows = by_query.index_select(0, pairs.query[places_of]).view(-1, head_dim)
        hidden = blocks.hidden(piece, slot[places_of], softmax.window)
        logits = softmax.logits(rows, blocks.of_key(piece.block), hidden)
        torch.amax(logits, -1, out=highest[rows_of])
        probabilities = torch.softmax(logits, -1)
        # exp(highest - highest) / sum: the largest probability is one over the sum of exponentials.
        torch.amax(probabilities, -1, out=largest[rows_of])
        results[rows_of] = _weigh(probabilities, blocks.of_value(piece.block), hidden)
    _merge(results, highest, largest, pairs.place, sinks, output)


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


def _merge(
    results: Tensor, highest: Tensor, largest: Tensor, place: Tensor, sinks: Tensor | None, output: Tensor
) -> None:
    """Add the pieces of each query, weighted by their shares of its softmax, into the output.

    Args:
        results: `[(P + 1) * G, D]` float32, the results of the pieces by themselves.
        highest: `[(P + 1) * G]` float32, the highest logit of each.
        largest: `[(P + 1) * G]` float32, the largest probability of each, which is one over its sum.
        place: `[C, topk]` int64, `0 .. P`.
        sinks: `[G]`, or None.
        output: `[G, C, D]`.
    """
    group, queries, head_dim = output.shape
    # Where all logits are -inf, the piece is NaN by itself and nothing in the whole.
    is_empty = highest == -torch.inf
    if is_empty[:-group].any():
        results.masked_fill_(is_empty[:, None], 0.0)
        largest.masked_fill_(is_empty, 1.0)
    rows = place[:, None] * group + torch.arange(group)[:, None]  # [C, G, topk]
    top = highest[rows]
    most = top.amax(-1, keepdim=True)
    if sinks is not None:
        of_sink = sinks.to(torch.float32)[:, None]
        most = torch.maximum(most, of_sink)
    most = most.masked_fill(most == -torch.inf, 0.0)
    shares = torch.exp(top - most) / largest[rows]
    total = shares.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(of_sink - most)
    shares = shares / total.masked_fill(total == 0, 1.0)
    merged = F.embedding_bag(
        rows.view(queries * group, -1), results, mode="sum", per_sample_weights=shares.flatten(0, 1)
    )
    output.copy_(merged.view(queries, group, head_dim).transpose(0, 1))
