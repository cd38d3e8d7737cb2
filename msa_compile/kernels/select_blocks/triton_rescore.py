"""The Triton kernels that score candidates again: the blocks that a tile of queries wants, and their exact scores."""

import triton
import triton.language as tl

from msa_compile.kernels.select_blocks.triton_scores import NO_ANCHOR, pool_scores
from msa_compile.kernels.triton_rows import bounds_of_rows


@triton.jit(do_not_specialize=["blocks"])
def list_candidates(wanted, lists, counts, blocks, COLUMNS: tl.constexpr):
    """Write the blocks that a tile of queries wants, ascending, and how many; a program has one tile.

    Args:
        wanted: `[tiles, blocks]` uint8, not 0 where a query of the tile has the block as a candidate. Set to 0 again,
            for the next chunk of queries.
        lists: `[tiles, blocks]` int32.
        counts: `[tiles]` int32.
    """
    tile = tl.program_id(0).to(tl.int64)
    count = 0
    for begin in range(0, blocks, COLUMNS):
        block = begin + tl.arange(0, COLUMNS)
        place = wanted + tile * blocks + block
        is_wanted = (tl.load(place, mask=block < blocks, other=0) != 0).to(tl.int32)
        tl.store(place, tl.zeros((COLUMNS,), tl.uint8), mask=block < blocks)
        turn = count + tl.cumsum(is_wanted, 0) - 1
        tl.store(lists + tile * blocks + turn, block, mask=is_wanted != 0)
        count += tl.sum(is_wanted, 0)
    tl.store(counts + tile, count)


@triton.jit
def _rescore_run(
    is_mine,
    anchor,
    mask_rows,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    listed,
    count,
    scores_of_rows,
    score_stride,
    tile,
):
    """Score the listed blocks, which start at `anchor`, where they are candidates of rows that are anchored there."""
    for turn in range(tl.program_id(2), count, tl.num_programs(2)):
        block = tl.load(listed + turn)
        pooled = pool_scores(
            block, True, anchor, mask_rows, None, BLOCK_SIZE, WIDTH, WIDTH_TILE, ROWS, 1, SLOTS, PIECES, *tile
        )
        place = scores_of_rows + block.to(tl.int64) * score_stride
        found = tl.max(pooled, 1)
        # What a row does not see at all was never scored, and found to be -inf here too.
        is_candidate = is_mine & (found > float("-inf"))
        is_candidate = is_candidate & (tl.load(place, mask=is_candidate, other=float("-inf")) > float("-inf"))
        tl.store(place, found, mask=is_candidate)


@triton.jit(do_not_specialize=["chunk_start", "chunk_end", "query_length", "key_length", "blocks"])
def rescore_blocks(
    index_query,
    index_key,
    scores,
    lists,
    counts,
    query_start,
    key_start,
    key_end,
    document_start,
    mask,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    score_stride_h,
    score_stride_n,
    chunk_start,
    chunk_end,
    query_length,
    key_length,
    blocks,
    groups,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    PACKED_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the scores of candidates, from queries and keys as they are, over those of their rounded ones.

    A tile meets every block that one of its queries has as a candidate. Programs of the third dimension of the grid
    share the list of a tile.

    Args:
        index_query: as for `score_blocks`, and so are `index_key`, `mask`, the bounds and the groups of a tile.
        scores: as `keep_candidates` left them: -inf where a block is no candidate.
        lists: with `counts` as `list_candidates` wrote them, tiles of all groups one after the other.
    """
    ROWS: tl.constexpr = PACKED_GROUPS * QUERIES
    if PACKED_GROUPS > 1:
        batch = tl.program_id(1)
        key_head = 0
    else:
        batch = tl.program_id(1) // groups
        key_head = tl.program_id(1) % groups
    row = tl.arange(0, ROWS)
    group = key_head + row // QUERIES
    query = chunk_start + tl.program_id(0) * QUERIES + row % QUERIES
    is_row = (query < chunk_end) & (group < groups)
    _, anchor, first, stop = bounds_of_rows(
        batch, query, is_row, query_start, key_start, key_end, document_start, query_length, key_length, None, IS_CAUSAL
    )
    wide_batch = batch.to(tl.int64)
    wide_group = group.to(tl.int64)
    wide_query = query.to(tl.int64)
    channel = tl.arange(0, WIDTH_TILE)
    place = index_query + wide_batch * query_stride_b + wide_group * query_stride_h + wide_query * query_stride_t
    is_channel = (channel < WIDTH)[None, :]
    tile_of_queries = tl.load(place[:, None] + channel[None, :], mask=is_row[:, None] & is_channel, other=0.0)
    key_rows = index_key + wide_batch * key_stride_b
    if PACKED_GROUPS == 1:
        key_rows += key_head.to(tl.int64) * key_stride_h
    scores_of_rows = scores + (wide_batch * groups + wide_group) * score_stride_h + (query - chunk_start)
    mask_rows = None
    if mask is not None:
        mask_rows = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_query * mask_stride_q
    place_of_tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    listed = lists + place_of_tile * blocks
    count = tl.load(counts + place_of_tile)

    sees = is_row & (stop > anchor)
    tile = (first, stop, tile_of_queries, key_rows, key_length, key_stride_t, mask_stride_k)
    if document_start is None:
        _rescore_run(
            sees,
            tl.max(anchor),
            mask_rows,
            BLOCK_SIZE,
            WIDTH,
            WIDTH_TILE,
            ROWS,
            SLOTS,
            PIECES,
            listed,
            count,
            scores_of_rows,
            score_stride_n,
            tile,
        )
    else:
        # Blocks start at the document, as when they were scored first.
        here = tl.min(tl.where(sees, anchor, NO_ANCHOR))
        while here < NO_ANCHOR:
            _rescore_run(
                sees & (anchor == here),
                here,
                mask_rows,
                BLOCK_SIZE,
                WIDTH,
                WIDTH_TILE,
                ROWS,
                SLOTS,
                PIECES,
                listed,
                count,
                scores_of_rows,
                score_stride_n,
                tile,
            )
            here = tl.min(tl.where(sees & (anchor > here), anchor, NO_ANCHOR))
