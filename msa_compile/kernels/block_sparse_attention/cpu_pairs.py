"""Order the (query, block) pairs of a run of queries by block, so that a block meets all its queries in one product."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of one product: enough to keep a core busy, few enough for its logits to stay in the core's cache.
_ROWS = 1024
# Rows are rounded up to this: oneDNN prepares and keeps code for every size that it meets.
_ROWS_STEP = 128


class Piece(NamedTuple):
    """Pairs of one block, `place .. place_end - 1`; `is_partial` if some of them do not see the whole block."""

    block: int
    place: int
    place_end: int
    is_partial: bool


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of `C` queries with the blocks that they selected and see.

    Args:
        query: `[P]` int64, the query of each place, also of those that only round a piece up.
        place: `[C, topk]` int64, the place of each pair; `P` where the id is -1 or its block is not visible.
        pieces: every place, in order.
    """

    query: Tensor
    place: Tensor
    pieces: list[Piece]


def find_pairs(
    block_ids: Tensor, *, position: int, length: int, block_size: int, window: int | None, heads_a_group: int
) -> Pairs:
    """Order the pairs of queries at the slots `position ..`, counted from their anchor.

    Args:
        block_ids: `[C, topk]` int32.
        position: slot of the first query, at least 0.
        length: visible slots of the keys.
        block_size: slots a block.
        window: newest slots that a query may see, or None for all.
        heads_a_group: rows that each pair has in a product.
    """
    queries, topk = block_ids.shape
    blocks = -(-length // block_size)
    first = block_ids.to(torch.int64) * block_size
    last = first + (block_size - 1)
    slot = torch.arange(position, position + queries)[:, None]
    # The slots that a query sees: `oldest .. newest`.
    newest = slot.clamp(max=length - 1)
    is_visible = (first >= 0) & (first <= newest)
    is_whole = last <= newest
    if window is not None:
        oldest = slot - (window - 1)
        is_visible &= (last >= oldest) & (oldest <= newest)
        is_whole &= first >= oldest

    # Two bins a block, whole and partial, and one bin for the pairs that are not to be.
    outside = 2 * blocks
    bin_of = (2 * block_ids + (~is_whole)).masked_fill_(~is_visible, outside).flatten()
    ordered, order = bin_of.sort(stable=True)
    counts = bin_of.bincount(minlength=outside + 1)[:outside]
    step = max(1, _ROWS_STEP // heads_a_group)
    sizes = -(-counts // step) * step
    starts = sizes.cumsum(0) - sizes
    places = int(sizes.sum())

    pairs = int(counts.sum())
    if pairs == 0:
        return Pairs(order[:0], order.new_zeros(block_ids.shape), [])
    ordered, order = ordered[:pairs].long(), order[:pairs]
    # The shift of a bin: where it starts among places less where it starts among ordered pairs.
    shift = starts - (counts.cumsum(0) - counts)
    of_pair = torch.arange(pairs) + shift[ordered]
    place = torch.full((queries * topk,), places)
    place[order] = of_pair
    # What only rounds a piece up repeats its first query, which sees something.
    query = torch.repeat_interleave(order[(counts.cumsum(0) - counts).clamp_(max=pairs - 1)], sizes) // topk
    query[of_pair] = order // topk

    most = step * max(1, _ROWS // (step * heads_a_group))
    used = sizes.nonzero().flatten()
    pieces = [
        Piece(in_bin // 2, at, min(at + most, start + size), in_bin % 2 == 1)
        for in_bin, start, size in zip(used.tolist(), starts[used].tolist(), sizes[used].tolist(), strict=True)
        for at in range(start, start + size, most)
    ]
    return Pairs(query, place.view(queries, topk), pieces)
