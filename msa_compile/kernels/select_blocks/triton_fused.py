"""The Triton kernel that scores key blocks and chooses among them at once: no score of a block leaves the registers."""

import triton
import triton.language as tl

from msa_compile.kernels.select_blocks.triton_scores import NO_ANCHOR, pool_scores
from msa_compile.kernels.triton_rows import bounds_of_rows

# Below every key of a block.
_NOTHING = tl.constexpr(-(2**63))
# The rank of forced blocks, above that of every number.
_FORCED = tl.constexpr(2**31 - 1)
# What a block id is taken from, so that of equal scores the lower id has the larger key.
_LAST_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _merge(kept, fresh, ROWS: tl.constexpr, PLACES: tl.constexpr):
    """Return the `PLACES` largest of both, `[ROWS, PLACES]` each."""
    both = tl.reshape(tl.permute(tl.join(kept, fresh), (0, 2, 1)), (ROWS, 2 * PLACES))
    return tl.topk(both, PLACES, 1)


@triton.jit
def _choose_span(
    begin,
    end,
    IS_EDGE: tl.constexpr,
    kept,
    local,
    local_blocks,
    sink_blocks,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    PLACES: tl.constexpr,
    tile,
):
    """Return the best of `kept` and of the blocks `begin .. end - 1`.

    Blocks are collected, `PLACES` of them, and merged only where one of them is better than what some row has: rarely,
    once the first have been seen.
    """
    column = tl.arange(0, PLACES)
    fresh = tl.full((ROWS, PLACES), _NOTHING, tl.int64)
    for block in range(begin, end):
        pooled = pool_scores(
            block, IS_EDGE, 0, None, None, BLOCK_SIZE, WIDTH, WIDTH_TILE, ROWS, 1, SLOTS, PIECES, *tile
        )
        score = tl.max(pooled, 1)
        # A signed integer of the same order above, the id below.
        bits = score.to(tl.int32, bitcast=True)
        rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        is_forced = ((block <= local) & (block > local - local_blocks)) | (block < sink_blocks)
        rank = tl.where(is_forced, _FORCED, rank)
        key = (rank.to(tl.int64) << 32) + (-block + _LAST_ID)
        key = tl.where(score > float("-inf"), key, _NOTHING)
        turn = (block - begin) % PLACES
        fresh = tl.where((column == turn)[None, :], key[:, None], fresh)
        if turn == PLACES - 1:
            if tl.max((tl.max(fresh, 1) > tl.min(kept, 1)).to(tl.int32)) != 0:
                kept = _merge(kept, fresh, ROWS, PLACES)
            fresh = tl.full((ROWS, PLACES), _NOTHING, tl.int64)
    return _merge(kept, fresh, ROWS, PLACES)


@triton.jit(do_not_specialize=["query_length", "key_length"])
def score_and_choose(
    index_query,
    index_key,
    block_ids,
    query_start,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_t,
    query_length,
    key_length,
    groups,
    topk,
    local_blocks,
    sink_blocks,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    PACKED_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write the ids that `score_blocks` and `choose_blocks` write, where every row of the batch is whole.

    There is no mask, no document and no padding, and all groups share a key head.

    Args:
        index_query: as for `score_blocks`, and so are `index_key` and the rows of a program.
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
    """
    ROWS: tl.constexpr = PACKED_GROUPS * QUERIES
    batch = tl.program_id(1)
    row = tl.arange(0, ROWS)
    group = row // QUERIES
    query = tl.program_id(0) * QUERIES + row % QUERIES
    is_row = (query < query_length) & (group < groups)
    position, _, first, stop = bounds_of_rows(
        batch, query, is_row, query_start, None, None, None, query_length, key_length, None, IS_CAUSAL
    )
    sees = is_row & (stop > 0)
    wide_batch = batch.to(tl.int64)
    wide_group = group.to(tl.int64)
    channel = tl.arange(0, WIDTH_TILE)
    place = index_query + wide_batch * query_stride_b + wide_group * query_stride_h
    place += query.to(tl.int64) * query_stride_t
    is_number = is_row[:, None] & (channel < WIDTH)[None, :]
    tile_of_queries = tl.load(place[:, None] + channel[None, :], mask=is_number, other=0.0)
    key_rows = index_key + wide_batch * key_stride_b

    local = tl.where(position >= 0, position // BLOCK_SIZE, -1)
    end = tl.cdiv(tl.max(tl.where(sees, stop, 0)), BLOCK_SIZE)
    edge = tl.minimum(tl.min(tl.where(sees, stop, NO_ANCHOR)) // BLOCK_SIZE, end)
    tile = (first, stop, tile_of_queries, key_rows, key_length, key_stride_t, 0)
    kept = tl.full((ROWS, PLACES), _NOTHING, tl.int64)
    kept = _choose_span(
        0,
        edge,
        False,
        kept,
        local,
        local_blocks,
        sink_blocks,
        BLOCK_SIZE,
        WIDTH,
        WIDTH_TILE,
        ROWS,
        SLOTS,
        PIECES,
        PLACES,
        tile,
    )
    kept = _choose_span(
        edge,
        end,
        True,
        kept,
        local,
        local_blocks,
        sink_blocks,
        BLOCK_SIZE,
        WIDTH,
        WIDTH_TILE,
        ROWS,
        SLOTS,
        PIECES,
        PLACES,
        tile,
    )
    # The best come first, of which there may be more than are asked for; then by id, what is nothing last.
    kept = tl.sort(kept, 1, descending=True)
    column = tl.arange(0, PLACES)
    is_chosen = (kept > _NOTHING) & sees[:, None] & (column < topk)[None, :]
    ids = tl.where(is_chosen, -(kept & 0x7FFFFFFF).to(tl.int32) + _LAST_ID, _LAST_ID)
    ids = tl.sort(ids, 1)
    ids = tl.where(ids == _LAST_ID, -1, ids)
    ids_of_rows = block_ids + ((wide_batch * groups + wide_group) * query_length + query) * topk
    tl.store(ids_of_rows[:, None] + column[None, :], ids, mask=is_row[:, None] & (column < topk)[None, :])
