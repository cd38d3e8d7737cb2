"""The Triton kernel of the normalisers: the logarithm of the sum of a row's softmax over its support.

It serves the teacher, whose rows are the heads of a group, and the student, whose rows are groups that share an index
key. Rows and heads of a tile see the same slots, so keys are read once for all of them.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_softmax import capped_logits, weigh
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit
def is_counted(counted, batch, token, is_token, query_length):
    """Say which of the queries count; all do where nothing is said."""
    if counted is not None:
        place = batch.to(tl.int64) * query_length + token
        is_token = is_token & (tl.load(counted + place, mask=is_token, other=0) != 0)
    return is_token


@triton.jit
def slots_of_step(
    step,
    starts,
    first_of_tile,
    stop_of_tile,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Return `slot, is_key` of a step: a piece of a listed block or, without lists, what follows the step before."""
    if starts is not None:
        inside = (step % PIECES) * SLOTS + tl.arange(0, SLOTS)
        slot = tl.load(starts + step // PIECES) + inside
        is_key = (inside < BLOCK_SIZE) & (slot >= first_of_tile) & (slot < stop_of_tile)
    else:
        slot = first_of_tile + step * SLOTS + tl.arange(0, SLOTS)
        is_key = slot < stop_of_tile
    return slot, is_key


@triton.jit
def leave_out(
    position,
    anchor,
    first,
    stop,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Return `first, stop, gap, beyond`: visible slots outside forced blocks, from `first` to `stop`, without a gap.

    The gap, `gap .. beyond - 1`, is the local blocks of a query that sees slots behind them, which is to be left out by
    whoever knows that queries are not causal; others have nothing behind it.
    """
    gap, beyond = stop, stop
    if SINK_BLOCKS > 0:
        first = tl.maximum(first, anchor + SINK_BLOCKS * BLOCK_SIZE)
    if LOCAL_BLOCKS > 0:
        # Up to the query's own block, of which one in front of the row's first slot has none; `//` rounds towards 0.
        blocks = tl.where(position >= anchor, tl.maximum(position - anchor, 0) // BLOCK_SIZE + 1, 0)
        gap = anchor + (blocks - LOCAL_BLOCKS) * BLOCK_SIZE
        beyond = anchor + blocks * BLOCK_SIZE
        if IS_CAUSAL:
            stop = tl.minimum(stop, gap)
    return first, stop, gap, beyond


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length"])
def sum_logits(
    query,
    key,
    log_sums,
    counted,
    starts,
    members,
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
    HEADS_A_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the normalisers of a tile of queries of the heads that share one key head.

    Args:
        query: `[B, groups * HEADS, Tq, HEAD_DIM]`, strides given, channels adjacent; `key` `[B, groups, Tk, HEAD_DIM]`.
        log_sums: `[B, groups * HEADS, Tq]` float32, in units of log 2; -inf for a query that sees nothing, or that does
            not count.
        counted: uint8 `[B, Tq]`, contiguous, or None.
        starts: with `members` and `counts` as `list_blocks` writes them, `list_size` entries a tile; None where the
            support is everything that is visible.
        mask: uint8, by strides; one for each `HEADS_A_MASK` heads, or None.
        LOCAL_BLOCKS: with `SINK_BLOCKS` how many blocks are left out at either end.
    """
    ROWS: tl.constexpr = HEADS_TILE * QUERIES
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    # The last queries see the most: they begin first.
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.arange(0, ROWS)
    turn_of_row = row // HEADS_TILE
    token = chunk_start + turn * QUERIES + turn_of_row
    head = group * HEADS + row % HEADS_TILE
    is_there = (token < query_length) & (row % HEADS_TILE < HEADS)
    is_row = is_counted(counted, batch, token, is_there, query_length)
    position, anchor, first, stop = bounds_of_rows(
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
    first, stop, gap, beyond = leave_out(
        position, anchor, first, stop, BLOCK_SIZE, LOCAL_BLOCKS, SINK_BLOCKS, IS_CAUSAL
    )
    wide_batch, wide_group, wide_token = batch.to(tl.int64), group.to(tl.int64), token.to(tl.int64)
    wide_head = head.to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    is_channel = (channel < HEAD_DIM)[None, :]
    place = query + wide_batch * query_stride_b + wide_head * query_stride_h + wide_token * query_stride_t
    tile_of_queries = tl.load(place[:, None] + channel[None, :], mask=is_row[:, None] & is_channel, other=0.0)
    key_rows = key + wide_batch * key_stride_b + wide_group * key_stride_h
    if mask is not None:
        mask_rows = mask + wide_batch * mask_stride_b + wide_token * mask_stride_q
        mask_rows += (wide_head // HEADS_A_MASK) * mask_stride_h
    sees = is_row & (stop > first)
    first_of_tile = tl.min(tl.where(sees, first, key_length))
    stop_of_tile = tl.max(tl.where(sees, stop, 0))
    steps = tl.cdiv(tl.maximum(stop_of_tile - first_of_tile, 0), SLOTS)
    if starts is not None:
        tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + turn
        starts += tile * list_size
        members += tile * list_size
        steps = tl.load(counts + tile) * PIECES

    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for step in range(0, steps):
        slot, is_key = slots_of_step(step, starts, first_of_tile, stop_of_tile, BLOCK_SIZE, SLOTS, PIECES)
        wide_slot = slot.to(tl.int64)
        keys = tl.load(
            key_rows + wide_slot[:, None] * key_stride_t + channel[None, :],
            mask=is_key[:, None] & is_channel,
            other=0.0,
        )
        logits = capped_logits(product(tile_of_queries, tl.trans(keys)), scale, softcap)
        visible = is_key[None, :] & (slot[None, :] >= first[:, None]) & (slot[None, :] < stop[:, None])
        if LOCAL_BLOCKS > 0 and not IS_CAUSAL:
            visible = visible & ((slot[None, :] < gap[:, None]) | (slot[None, :] >= beyond[:, None]))
        if starts is not None:
            bits = tl.load(members + step // PIECES)
            visible = visible & (((bits >> turn_of_row) & 1) != 0)[:, None]
        if mask is not None:
            shown = mask_rows[:, None] + wide_slot[None, :] * mask_stride_k
            visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
        _weights, _shrink, total, highest = weigh(logits, visible, total, highest)
    place = (wide_batch * groups * HEADS + head) * query_length + wide_token
    tl.store(log_sums + place, highest + tl.log2(total), mask=is_there)
