"""The Triton kernel of the forward pass: a tile of queries meets every block that one of them selected, once.

The heads of a group share their selection, so a tile is `QUERIES` queries times the heads of a group, enough rows for
the large matrix instructions; neighbouring queries select nearly the same blocks, so few rows are masked away.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_softmax import add_sink, capped_logits, weigh
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit
def _attend_span(
    steps,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    IS_CAREFUL: tl.constexpr,
    mask_rows,
    softcap,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    tile_of_queries,
    key_rows,
    value_rows,
    starts,
    members,
    turn_of_row,
    first,
    stop,
    first_of_tile,
    stop_of_tile,
    scale,
    key_stride_t,
    value_stride_t,
    mask_stride_k,
):
    """Run the blocks of a tile through an online softmax; return `accumulated, total, highest`.

    With `IS_CAREFUL` the values that a query does not see are replaced by 0, query by query.
    """
    channel = tl.arange(0, CHANNELS)
    accumulated = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for step in tl.range(0, steps, num_stages=1 if IS_CAREFUL else None):
        start = tl.load(starts + step // PIECES)
        bits = tl.load(members + step // PIECES)
        inside = (step % PIECES) * SLOTS + tl.arange(0, SLOTS)
        slot = start + inside
        # Slots that no query of the tile sees are not read: they may hold anything.
        is_key = (inside < BLOCK_SIZE) & (slot >= first_of_tile) & (slot < stop_of_tile)
        is_loaded = is_key[:, None] & (channel < HEAD_DIM)[None, :]
        wide_slot = slot.to(tl.int64)[:, None]
        keys = tl.load(key_rows + wide_slot * key_stride_t + channel[None, :], mask=is_loaded, other=0.0)
        logits = capped_logits(product(tile_of_queries, tl.trans(keys)), scale, softcap)

        is_member = ((bits >> turn_of_row) & 1) != 0
        visible = is_member[:, None] & is_key[None, :]
        visible = visible & (slot[None, :] >= first[:, None]) & (slot[None, :] < stop[:, None])
        if mask_rows is not None:
            shown = mask_rows[:, None] + slot.to(tl.int64)[None, :] * mask_stride_k
            visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
        weights, shrink, total, highest = weigh(logits, visible, total, highest)
        accumulated = accumulated * shrink[:, None]

        values = tl.load(value_rows + wide_slot * value_stride_t + channel[None, :], mask=is_loaded, other=0.0)
        if IS_CAREFUL:
            for turn in range(QUERIES):
                is_mine = turn_of_row == turn
                seen = tl.max((visible & is_mine[:, None]).to(tl.int32), 0)
                kept = tl.where(seen[:, None] != 0, values, tl.zeros_like(values))
                added = product(weights.to(values.dtype), kept)
                accumulated = tl.where(is_mine[:, None], accumulated + added, accumulated)
        else:
            accumulated += product(weights.to(values.dtype), values)
    return accumulated, total, highest


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length"])
def attend_tiles(
    query,
    key,
    value,
    output,
    starts,
    members,
    counts,
    sinks,
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
    value_stride_b,
    value_stride_h,
    value_stride_t,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    scale,
    softcap,
    chunk_start,
    query_length,
    key_length,
    window,
    groups,
    list_size,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the attention output of a tile of queries of one group.

    Args:
        query: `[B, Hq, Tq, D]`, strides given, channels adjacent; `key` and `value` `[B, Hkv, Tk, D]` likewise.
        output: `[B, Hq, Tq, D]`, contiguous.
        starts: with `members` and `counts` as `list_blocks` writes them, `list_size` entries a tile.
        sinks: `[Hq]`, contiguous, or None.
        mask: uint8, broadcast to `[B, Hkv, Tq, Tk]` by strides, or None.
        HEADS: heads of a group; `HEADS_TILE` is the power of two from there.
    """
    ROWS: tl.constexpr = HEADS_TILE * QUERIES
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    row = tl.arange(0, ROWS)
    turn_of_row = row // HEADS_TILE
    token = chunk_start + tl.program_id(0) * QUERIES + turn_of_row
    head = group * HEADS + row % HEADS_TILE
    is_row = (token < query_length) & (row % HEADS_TILE < HEADS)
    _, _, first, stop = bounds_of_rows(
        batch,
        token,
        is_row,
        query_start,
        key_start,
        key_end,
        document_start,
        query_length,
        key_length,
        window,
        IS_CAUSAL,
    )
    wide_batch, wide_group, wide_token = batch.to(tl.int64), group.to(tl.int64), token.to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    is_stored = is_row[:, None] & (channel < HEAD_DIM)[None, :]
    place = query + wide_batch * query_stride_b + head.to(tl.int64) * query_stride_h + wide_token * query_stride_t
    tile_of_queries = tl.load(place[:, None] + channel[None, :], mask=is_stored, other=0.0)
    key_rows = key + wide_batch * key_stride_b + wide_group * key_stride_h
    value_rows = value + wide_batch * value_stride_b + wide_group * value_stride_h
    mask_rows = None
    if mask is not None:
        mask_rows = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_token * mask_stride_q
    sees = is_row & (stop > first)
    first_of_tile = tl.min(tl.where(sees, first, key_length))
    stop_of_tile = tl.max(tl.where(sees, stop, 0))

    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    starts += tile * list_size
    members += tile * list_size
    blocks = tl.load(counts + tile)
    span = (
        tile_of_queries,
        key_rows,
        value_rows,
        starts,
        members,
        turn_of_row,
        first,
        stop,
        first_of_tile,
        stop_of_tile,
        scale,
        key_stride_t,
        value_stride_t,
        mask_stride_k,
    )
    accumulated, total, highest = _attend_span(
        blocks * PIECES, SLOTS, PIECES, False, mask_rows, softcap, BLOCK_SIZE, HEAD_DIM, ROWS, CHANNELS, QUERIES, *span
    )
    # A weight of 0 times NaN is NaN: a value that one query sees may have reached another. Then once more, with care.
    # It costs nothing where all values are finite, and the loop above keeps its loads in flight. Fewer slots at a time
    # take fewer registers than that loop has.
    CAREFUL_SLOTS: tl.constexpr = 16
    CAREFUL_PIECES: tl.constexpr = (BLOCK_SIZE + 15) // 16
    is_broken = tl.max(tl.where(tl.abs(accumulated) < float("inf"), 0, 1))
    if is_broken != 0:
        accumulated, total, highest = _attend_span(
            blocks * CAREFUL_PIECES,
            CAREFUL_SLOTS,
            CAREFUL_PIECES,
            True,
            mask_rows,
            softcap,
            BLOCK_SIZE,
            HEAD_DIM,
            ROWS,
            CHANNELS,
            QUERIES,
            *span,
        )
    if sinks is not None:
        shrink, total, highest = add_sink(tl.load(sinks + head, mask=is_row, other=0.0), total, highest)
        accumulated = accumulated * shrink[:, None]
    total = tl.where(total == 0, 1.0, total)
    result = accumulated / total[:, None]
    place = (wide_batch * groups * HEADS + head) * query_length + wide_token
    stored = output + place[:, None] * HEAD_DIM + channel[None, :]
    tl.store(stored, result.to(output.dtype.element_ty), mask=is_stored)
