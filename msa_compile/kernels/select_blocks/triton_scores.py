"""The Triton kernel that scores key blocks: a matrix product whose result is pooled before it leaves the registers."""

import triton
import triton.language as tl

from msa_compile.kernels.select_blocks.triton_round import round_rows
from msa_compile.kernels.triton_rows import bounds_of_rows, product

# The largest finite float32.
_LARGEST = tl.constexpr(3.4028234663852886e38)
_TWO_TO_120 = tl.constexpr(2.0**120)
NO_ANCHOR = tl.constexpr(2**31 - 1)


@triton.jit
def _numbers_of(keys):
    """Return the e4m3 numbers of bytes in float32, by integers: matrix units need not know the format."""
    wide = keys.to(tl.int32)
    size = wide & 0x7F
    # Bits of the exponent land 120 too low; numbers without a leading bit are such in float32 too.
    number = (((wide & 0x80) << 24) | (size << 20)).to(tl.float32, bitcast=True) * _TWO_TO_120
    return tl.where(size == 0x7F, float("nan"), number)


@triton.jit
def pool_scores(
    step,
    IS_EDGE: tl.constexpr,
    anchor,
    mask_rows,
    scale_row,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    first,
    stop,
    tile_of_queries,
    key_rows,
    key_length,
    key_stride_t,
    mask_stride_k,
):
    """Return the scores `[ROWS, BLOCKS]` of the blocks from `step` on that start at `anchor`; -inf where none is seen.

    Without `IS_EDGE` every row of them sees every slot of those blocks, and nothing is asked about visibility.
    """
    lane = tl.arange(0, BLOCKS * SLOTS)
    channel = tl.arange(0, WIDTH_TILE)
    pooled = tl.full((ROWS, BLOCKS), float("-inf"), tl.float32)
    for piece in tl.static_range(PIECES):
        inside = piece * SLOTS + lane % SLOTS
        slot = anchor + (step + lane // SLOTS) * BLOCK_SIZE + inside
        wide_slot = slot.to(tl.int64)
        place = key_rows + wide_slot[:, None] * key_stride_t + channel[None, :]
        if IS_EDGE or BLOCK_SIZE % SLOTS != 0 or WIDTH != WIDTH_TILE:
            is_key = (inside < BLOCK_SIZE) & (slot < key_length)
            keys = tl.load(place, mask=is_key[:, None] & (channel < WIDTH)[None, :], other=0.0)
        else:
            keys = tl.load(place)
        if keys.dtype == tl.uint8:
            keys = _numbers_of(keys).to(tile_of_queries.dtype)
        score = product(tile_of_queries, tl.trans(keys))
        if scale_row is not None:
            if IS_EDGE or BLOCK_SIZE % SLOTS != 0:
                scale = tl.load(scale_row + wide_slot, mask=(inside < BLOCK_SIZE) & (slot < key_length), other=0.0)
            else:
                scale = tl.load(scale_row + wide_slot)
            score = score * scale[None, :]
        # A visible NaN is the lowest score; a comparison, because a maximum may pass NaN on or drop it.
        score = tl.where(score == score, score, -_LARGEST)
        if IS_EDGE or BLOCK_SIZE % SLOTS != 0:
            visible = (slot[None, :] >= first[:, None]) & (slot[None, :] < stop[:, None])
            visible = visible & (inside < BLOCK_SIZE)[None, :]
            if mask_rows is not None:
                shown = mask_rows[:, None] + wide_slot[None, :] * mask_stride_k
                visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
            # Infinite scores count as the largest finite ones: -inf is left to blocks that nobody sees.
            score = tl.where(visible, tl.maximum(score, -_LARGEST), float("-inf"))
        if BLOCKS == 1:
            best = tl.max(score, 1)[:, None]
        else:
            best = tl.max(tl.reshape(score, (ROWS, BLOCKS, SLOTS)), 2)
        pooled = tl.maximum(pooled, best)
    if not IS_EDGE:
        pooled = tl.maximum(pooled, -_LARGEST)
    return tl.minimum(pooled, _LARGEST)


@triton.jit
def _score_span(
    begin,
    end,
    IS_EDGE: tl.constexpr,
    is_mine,
    anchor,
    mask_rows,
    scale_row,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    scores_of_rows,
    score_stride,
    tile,
):
    """Store the scores of blocks `begin .. end - 1` that start at `anchor`, for the rows that `is_mine` says."""
    for step in range(begin, end, BLOCKS):
        pooled = pool_scores(
            step,
            IS_EDGE,
            anchor,
            mask_rows,
            scale_row,
            BLOCK_SIZE,
            WIDTH,
            WIDTH_TILE,
            ROWS,
            BLOCKS,
            SLOTS,
            PIECES,
            *tile,
        )
        block = step + tl.arange(0, BLOCKS)
        place = scores_of_rows[:, None] + block.to(tl.int64)[None, :] * score_stride
        tl.store(place, pooled, mask=is_mine[:, None] & (block < end)[None, :])


@triton.jit
def _score_run(
    is_mine,
    anchor,
    mask_rows,
    scale_row,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    blocks_a_split,
    stop,
    scores_of_rows,
    score_stride,
    tile,
):
    """Score this program's share of the blocks that start at `anchor`, for the rows that are anchored there.

    `tile` holds the last arguments of `pool_scores`.
    """
    last = tl.max(tl.where(is_mine, stop, 0))
    begin = tl.program_id(2) * blocks_a_split
    end = tl.minimum(begin + blocks_a_split, tl.cdiv(tl.maximum(last - anchor, 0), BLOCK_SIZE))
    edge = begin
    if mask_rows is None:
        whole = (tl.min(tl.where(is_mine, stop, NO_ANCHOR)) - anchor) // BLOCK_SIZE
        edge = begin + tl.maximum(tl.minimum(whole, end) - begin, 0) // BLOCKS * BLOCKS
        _score_span(
            begin,
            edge,
            False,
            is_mine,
            anchor,
            mask_rows,
            scale_row,
            BLOCK_SIZE,
            WIDTH,
            WIDTH_TILE,
            ROWS,
            BLOCKS,
            SLOTS,
            PIECES,
            scores_of_rows,
            score_stride,
            tile,
        )
    _score_span(
        edge,
        end,
        True,
        is_mine,
        anchor,
        mask_rows,
        scale_row,
        BLOCK_SIZE,
        WIDTH,
        WIDTH_TILE,
        ROWS,
        BLOCKS,
        SLOTS,
        PIECES,
        scores_of_rows,
        score_stride,
        tile,
    )


@triton.jit(do_not_specialize=["chunk_start", "chunk_end", "query_length", "key_length", "blocks_a_split"])
def score_blocks(
    index_query,
    index_key,
    key_scales,
    scores,
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
    scale_stride_b,
    scale_stride_h,
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
    blocks_a_split,
    groups,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    PACKED_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the largest score of the visible slots of each block; -inf where a block has none.

    A program has `QUERIES` queries of one row of the batch and one key head. With a key head that all groups share,
    `PACKED_GROUPS` is their number, and their queries are rows of one product: the keys are read once.

    Args:
        index_query: `[B, Hkv, Tq, WIDTH]`, strides given, channels adjacent.
        index_key: `[B, 1 or Hkv, Tk, WIDTH]`, likewise; uint8 are the bytes of e4m3 numbers.
        key_scales: float32, what e4m3 keys are to be multiplied with, strides given; queries are then rounded to e4m3
            here, and their scales left out, for they change no order. None where keys are what they are.
        scores: `[B * Hkv, N, C]` float32, `C` queries from `chunk_start` on. What a query cannot see at all, blocks
            from `ceil((stop - anchor) / BLOCK_SIZE)` on, is not written.
        mask: uint8, broadcast to `[B, Hkv, Tq, Tk]` by strides, or None.
        blocks_a_split: blocks of each program of the third dimension of the grid, a multiple of `BLOCKS`.
        groups: `Hkv`.
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
    wide_query = query.to(tl.int64)
    channel = tl.arange(0, WIDTH_TILE)
    place = (
        index_query + wide_batch * query_stride_b + group.to(tl.int64) * query_stride_h + wide_query * query_stride_t
    )
    is_channel = (channel < WIDTH)[None, :]
    tile_of_queries = tl.load(place[:, None] + channel[None, :], mask=is_row[:, None] & is_channel, other=0.0)
    key_rows = index_key + wide_batch * key_stride_b
    if PACKED_GROUPS == 1:
        # A key head a group, or one for the only group there is, whose stride is not used.
        key_rows += key_head.to(tl.int64) * key_stride_h
    scale_row = None
    if key_scales is not None:
        tile_of_queries, _ = round_rows(tile_of_queries)
        scale_row = key_scales + wide_batch * scale_stride_b
        if PACKED_GROUPS == 1:
            scale_row += key_head.to(tl.int64) * scale_stride_h
    scores_of_rows = scores + (wide_batch * groups + group) * score_stride_h + (query - chunk_start)
    mask_rows = None
    if mask is not None:
        mask_rows = mask + wide_batch * mask_stride_b + group.to(tl.int64) * mask_stride_h + wide_query * mask_stride_q

    sees = is_row & (stop > anchor)
    tile = (
        first,
        stop,
        tile_of_queries,
        key_rows,
        key_length,
        key_stride_t,
        mask_stride_k,
    )
    if document_start is None:
        _score_run(
            sees,
            tl.max(anchor),
            mask_rows,
            scale_row,
            BLOCK_SIZE,
            WIDTH,
            WIDTH_TILE,
            ROWS,
            BLOCKS,
            SLOTS,
            PIECES,
            blocks_a_split,
            stop,
            scores_of_rows,
            score_stride_n,
            tile,
        )
    else:
        # Blocks start at the document: one pass a document that the tile touches, mostly one.
        here = tl.min(tl.where(sees, anchor, NO_ANCHOR))
        while here < NO_ANCHOR:
            is_mine = sees & (anchor == here)
            _score_run(
                is_mine,
                here,
                mask_rows,
                scale_row,
                BLOCK_SIZE,
                WIDTH,
                WIDTH_TILE,
                ROWS,
                BLOCKS,
                SLOTS,
                PIECES,
                blocks_a_split,
                stop,
                scores_of_rows,
                score_stride_n,
                tile,
            )
            here = tl.min(tl.where(sees & (anchor > here), anchor, NO_ANCHOR))
