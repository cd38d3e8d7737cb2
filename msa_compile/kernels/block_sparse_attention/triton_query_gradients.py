"""The Triton kernel of the gradients of queries: a tile of queries meets the blocks of its list, as in the forward.

Nothing is kept from the forward pass. A first turn over the blocks finds the sum of each row's softmax and the mean of
its slopes, which the gradients of keys and values need too; a second adds up the gradients. One program writes a row,
so the same bits come out every time.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_softmax import add_sink, capped_logits, through_cap, weigh
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit
def _load_step(
    step,
    mask_rows,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    key_rows,
    value_rows,
    starts,
    members,
    turn_of_row,
    first,
    stop,
    first_of_tile,
    stop_of_tile,
    key_stride_t,
    value_stride_t,
    mask_stride_k,
):
    """Return `visible, keys, values` of a piece of a listed block; slots that no query of the tile sees are 0."""
    channel = tl.arange(0, CHANNELS)
    start = tl.load(starts + step // PIECES)
    bits = tl.load(members + step // PIECES)
    inside = (step % PIECES) * SLOTS + tl.arange(0, SLOTS)
    slot = start + inside
    is_key = (inside < BLOCK_SIZE) & (slot >= first_of_tile) & (slot < stop_of_tile)
    visible = (((bits >> turn_of_row) & 1) != 0)[:, None] & is_key[None, :]
    visible = visible & (slot[None, :] >= first[:, None]) & (slot[None, :] < stop[:, None])
    wide_slot = slot.to(tl.int64)
    if mask_rows is not None:
        shown = mask_rows[:, None] + wide_slot[None, :] * mask_stride_k
        visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
    is_loaded = is_key[:, None] & (channel < HEAD_DIM)[None, :]
    keys = tl.load(key_rows + wide_slot[:, None] * key_stride_t + channel[None, :], mask=is_loaded, other=0.0)
    values = tl.load(value_rows + wide_slot[:, None] * value_stride_t + channel[None, :], mask=is_loaded, other=0.0)
    return visible, keys, values


@triton.jit
def _differentiate_span(
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
    tile_of_grads,
    log_sum,
    delta,
    scale,
    turn_of_row,
    keys_of_tile,
):
    """Return the gradient of the tile's queries by the capped logits' slopes, before the factor `scale`.

    With `IS_CAREFUL` the keys that a query does not see are replaced by 0, query by query.
    """
    accumulated = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in tl.range(0, steps, num_stages=1 if IS_CAREFUL else None):
        visible, keys, values = _load_step(
            step, mask_rows, BLOCK_SIZE, HEAD_DIM, CHANNELS, SLOTS, PIECES, *keys_of_tile
        )
        logits = capped_logits(product(tile_of_queries, tl.trans(keys)), scale, softcap)
        slope = product(tile_of_grads, tl.trans(values)) - delta[:, None]
        slope = through_cap(tl.exp2(logits - log_sum[:, None]) * slope, logits, softcap)
        # What is not seen may be NaN in both factors.
        slope = tl.where(visible, slope, 0.0).to(keys.dtype)
        if IS_CAREFUL:
            for turn in range(QUERIES):
                is_mine = turn_of_row == turn
                seen = tl.max((visible & is_mine[:, None]).to(tl.int32), 0)
                kept = tl.where(seen[:, None] != 0, keys, tl.zeros_like(keys))
                added = product(slope, kept)
                accumulated = tl.where(is_mine[:, None], accumulated + added, accumulated)
        else:
            accumulated += product(slope, keys)
    return accumulated


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length"])
def differentiate_tiles(
    query,
    key,
    value,
    grad_output,
    grad_query,
    log_sums,
    deltas,
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
    grad_stride_b,
    grad_stride_h,
    grad_stride_t,
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
    """Write the gradient of a tile of queries of one group, and what the gradients of its keys need of them.

    Args:
        query: as for `attend_tiles`, and so are the keys, the lists, the bounds and the sizes.
        grad_output: `[B, Hq, Tq, D]`, strides given, channels adjacent.
        grad_query: `[B, Hq, Tq, D]`, contiguous.
        log_sums: `[B, Hq, Tq]` float32, the logarithm of the sum of a row's softmax in units of log 2.
        deltas: as `log_sums`, the mean of `<grad_output, value>` under that softmax.
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
    wide_head = head.to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    is_stored = is_row[:, None] & (channel < HEAD_DIM)[None, :]
    place = query + wide_batch * query_stride_b + wide_head * query_stride_h + wide_token * query_stride_t
    tile_of_queries = tl.load(place[:, None] + channel[None, :], mask=is_stored, other=0.0)
    place = grad_output + wide_batch * grad_stride_b + wide_head * grad_stride_h + wide_token * grad_stride_t
    tile_of_grads = tl.load(place[:, None] + channel[None, :], mask=is_stored, other=0.0)
    mask_rows = None
    if mask is not None:
        mask_rows = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_token * mask_stride_q
    sees = is_row & (stop > first)
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    keys_of_tile = (
        key + wide_batch * key_stride_b + wide_group * key_stride_h,
        value + wide_batch * value_stride_b + wide_group * value_stride_h,
        starts + tile * list_size,
        members + tile * list_size,
        turn_of_row,
        first,
        stop,
        tl.min(tl.where(sees, first, key_length)),
        tl.max(tl.where(sees, stop, 0)),
        key_stride_t,
        value_stride_t,
        mask_stride_k,
    )
    blocks = tl.load(counts + tile)

    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    for step in range(0, blocks * PIECES):
        visible, keys, values = _load_step(
            step, mask_rows, BLOCK_SIZE, HEAD_DIM, CHANNELS, SLOTS, PIECES, *keys_of_tile
        )
        logits = capped_logits(product(tile_of_queries, tl.trans(keys)), scale, softcap)
        weights, shrink, total, highest = weigh(logits, visible, total, highest)
        slope = tl.where(visible, product(tile_of_grads, tl.trans(values)), 0.0)
        mean = mean * shrink + tl.sum(weights * slope, 1)
    if sinks is not None:
        shrink, total, highest = add_sink(tl.load(sinks + head, mask=is_row, other=0.0), total, highest)
        mean = mean * shrink
    # A row that has seen nothing has no slope, whatever its sum is.
    is_empty = total == 0
    total = tl.where(is_empty, 1.0, total)
    delta = mean / total
    log_sum = tl.where(is_empty, 0.0, highest) + tl.log2(total)

    span = (tile_of_queries, tile_of_grads, log_sum, delta, scale, turn_of_row, keys_of_tile)
    accumulated = _differentiate_span(
        blocks * PIECES, SLOTS, PIECES, False, mask_rows, softcap, BLOCK_SIZE, HEAD_DIM, ROWS, CHANNELS, QUERIES, *span
    )
    # A slope of 0 times a key that is NaN, and that another query of the tile sees; see `attend_tiles`.
    CAREFUL_SLOTS: tl.constexpr = 16
    CAREFUL_PIECES: tl.constexpr = (BLOCK_SIZE + 15) // 16
    is_broken = tl.max(tl.where(tl.abs(accumulated) < float("inf"), 0, 1))
    if is_broken != 0:
        accumulated = _differentiate_span(
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
    place = (wide_batch * groups * HEADS + head) * query_length + wide_token
    stored = grad_query + place[:, None] * HEAD_DIM + channel[None, :]
    tl.store(stored, (accumulated * scale).to(grad_query.dtype.element_ty), mask=is_stored)
    tl.store(log_sums + place, log_sum, mask=is_row)
    tl.store(deltas + place, delta, mask=is_row)
