"""The Triton kernels of the gradient of index keys: some slots meet the queries whose support they are in.

Keys and index keys of a program stay where they are loaded, and queries come by: in order where the support is
everything that is visible, gathered from a block's list where it is the selected blocks. A program writes what it finds
by itself, and what a slot gets is added in a fixed order: no atomics, and the same bits every time.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_queries import find_item, origin_of_row
from msa_compile.kernels.index_loss.triton_compare import RAISED, compare_slots
from msa_compile.kernels.index_loss.triton_sums import is_counted, leave_out
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit
def _add_queries(
    accumulated,
    is_row,
    visible,
    wide_token,
    index_query_rows,
    index_query_stride_t,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    keys,
    index_keys,
    index_log_sum,
    query_rows,
    sums_of_rows,
    query_stride_h,
    query_length,
    scale,
    index_scale,
    softcap,
    share,
    POWER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Return `accumulated` and what a tile of queries adds to it."""
    feature = tl.arange(0, WIDTH_TILE)
    place = index_query_rows + wide_token * index_query_stride_t
    tile_of_index_queries = tl.load(
        place[:, None] + feature[None, :], mask=is_row[:, None] & (feature < WIDTH)[None, :], other=0.0
    )
    _, _, change = compare_slots(
        keys,
        index_keys,
        tile_of_index_queries,
        index_log_sum,
        visible,
        is_row,
        query_rows,
        sums_of_rows,
        query_stride_h,
        query_length,
        scale,
        index_scale,
        softcap,
        share,
        POWER,
        HEAD_DIM,
        HEADS,
        CHANNELS,
        SLOTS,
        QUERIES,
    )
    return accumulated + product((change * RAISED).to(index_keys.dtype), tile_of_index_queries)


@triton.jit(do_not_specialize=["query_length", "key_length", "blocks", "list_size", "items"])
def compare_keys(
    query,
    key,
    index_query,
    index_key,
    log_sums,
    index_log_sums,
    log_weights,
    shares,
    counted,
    block_ids,
    queries,
    list_start,
    item_start,
    item_blocks,
    parts,
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
    index_query_stride_b,
    index_query_stride_h,
    index_query_stride_t,
    index_key_stride_b,
    index_key_stride_h,
    index_key_stride_t,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    scale,
    index_scale,
    softcap,
    query_length,
    key_length,
    window,
    groups,
    topk,
    blocks,
    list_size,
    items,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    POWER: tl.constexpr,
    QUERIES_AN_ITEM: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write what the queries of one group add to the gradients of `SLOTS` index keys.

    Args:
        query: as for `compare_queries`, and so are the other operands, `log_weights`, `shares`, `counted`, the mask
            and the bounds.
        block_ids: `[B, groups, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
        queries: with `list_start`, `item_start` and `item_blocks` as `triton_queries.py` writes them; all four None
            where the support is everything that is visible.
        parts: float32, `[B * groups, items, BLOCK_SIZE, WIDTH]`, or without lists `[B * groups, Tk, WIDTH]`; of the
            mean of the losses over groups.
    """
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    wide_batch, wide_group = batch.to(tl.int64), group.to(tl.int64)
    wide_head = tl.program_id(1).to(tl.int64)
    if queries is not None:
        block, begin, end = find_item(
            list_start, item_start, item_blocks, wide_head, tl.program_id(0), blocks, items, QUERIES_AN_ITEM
        )
        inside = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
        start = origin_of_row(key_start, batch) + block * BLOCK_SIZE
        slot = start + inside
        is_key = (inside < BLOCK_SIZE) & (slot < key_length)
        stored = (wide_head * items + tl.program_id(0)) * BLOCK_SIZE + inside
        is_stored = (inside < BLOCK_SIZE) & (end > begin)
    else:
        first_slot = tl.program_id(0) * SLOTS
        slot = first_slot + tl.arange(0, SLOTS)
        is_key = slot < key_length
        stored = wide_head * key_length + slot
        is_stored = is_key
        offset = key_length - query_length
        if query_start is not None:
            offset = tl.load(query_start + batch).to(tl.int32)
        begin, end = 0, query_length
        if IS_CAUSAL:
            begin = tl.maximum(first_slot - offset, 0)
        if window is not None:
            end = tl.minimum(first_slot + SLOTS - 1 + window - offset, query_length)
    channel = tl.arange(0, CHANNELS)
    feature = tl.arange(0, WIDTH_TILE)
    wide_slot = slot.to(tl.int64)
    place = key + wide_batch * key_stride_b + wide_group * key_stride_h + wide_slot * key_stride_t
    is_loaded = is_key[:, None] & (channel < HEAD_DIM)[None, :]
    keys = tl.load(place[:, None] + channel[None, :], mask=is_loaded, other=0.0)
    place = index_key + wide_batch * index_key_stride_b + wide_group * index_key_stride_h
    place += wide_slot * index_key_stride_t
    is_loaded = is_key[:, None] & (feature < WIDTH)[None, :]
    index_keys = tl.load(place[:, None] + feature[None, :], mask=is_loaded, other=0.0)
    query_rows = query + wide_batch * query_stride_b + wide_group * HEADS * query_stride_h
    index_query_rows = index_query + wide_batch * index_query_stride_b + wide_group * index_query_stride_h

    accumulated = tl.zeros((SLOTS, WIDTH_TILE), tl.float32)
    for step in range(begin, end, QUERIES):
        token = step + tl.arange(0, QUERIES)
        is_token = token < end
        if queries is not None:
            token = tl.load(queries + wide_head * list_size + token, mask=is_token, other=0)
        is_row = is_counted(counted, batch, token, is_token, query_length)
        wide_token = token.to(tl.int64)
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
        own = wide_head * query_length + wide_token
        index_log_sum = tl.load(index_log_sums + own, mask=is_row, other=0.0)
        if queries is None:
            # A query that sees nothing may be padding, which may be NaN; one that is listed sees something.
            is_row = is_row & (stop > first)
        visible = is_key[:, None] & (slot[:, None] >= first[None, :]) & (slot[:, None] < stop[None, :])
        if LOCAL_BLOCKS > 0 and not IS_CAUSAL:
            visible = visible & ((slot[:, None] < gap[None, :]) | (slot[:, None] >= beyond[None, :]))
        if queries is not None and document_start is not None:
            # As in `differentiate_blocks`: the blocks of a document lie across ours.
            low = tl.maximum(start - anchor, 0) // BLOCK_SIZE
            edge = anchor + (low + 1) * BLOCK_SIZE
            of_place = tl.arange(0, PLACES)
            ids = block_ids + (wide_head * query_length + wide_token) * topk
            is_id = is_row[:, None] & (of_place < topk)[None, :]
            id_of_row = tl.load(ids[:, None] + of_place[None, :], mask=is_id, other=-1)
            has_low = tl.max((id_of_row == low[:, None]).to(tl.int32), 1) != 0
            has_high = tl.max((id_of_row == (low + 1)[:, None]).to(tl.int32), 1) != 0
            is_low = slot[:, None] < edge[None, :]
            visible = visible & ((is_low & has_low[None, :]) | (~is_low & has_high[None, :]))
        if mask is not None or shares is not None:
            # One with nothing to compare.
            is_row = is_row & (index_log_sum != float("-inf"))
        if shares is not None:
            share = tl.load(shares + own, mask=is_row, other=0.0)
            index_log_sum -= tl.load(log_weights + own, mask=is_row, other=0.0)
        else:
            share = None
        if mask is not None:
            shown = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_token * mask_stride_q
            shown = shown[None, :] + wide_slot[:, None] * mask_stride_k
            visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
        of_step = (
            keys,
            index_keys,
            index_log_sum,
            query_rows + wide_token * query_stride_t,
            log_sums + (wide_head * HEADS * query_length + wide_token),
            query_stride_h,
            query_length,
            scale,
            index_scale,
        )
        if document_start is None or queries is not None:
            accumulated = _add_queries(
                accumulated,
                is_row,
                visible,
                wide_token,
                index_query_rows,
                index_query_stride_t,
                WIDTH,
                WIDTH_TILE,
                *of_step,
                softcap,
                share,
                POWER,
                HEAD_DIM,
                HEADS,
                CHANNELS,
                SLOTS,
                QUERIES,
            )
        elif tl.max(visible.to(tl.int32)) != 0:
            # Most queries behind are of other documents.
            accumulated = _add_queries(
                accumulated,
                is_row,
                visible,
                wide_token,
                index_query_rows,
                index_query_stride_t,
                WIDTH,
                WIDTH_TILE,
                *of_step,
                softcap,
                share,
                POWER,
                HEAD_DIM,
                HEADS,
                CHANNELS,
                SLOTS,
                QUERIES,
            )
    result = accumulated * (index_scale / (groups * RAISED))
    tl.store(
        parts + stored[:, None] * WIDTH + feature[None, :],
        result,
        mask=is_stored[:, None] & (feature < WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["key_length", "blocks", "items"])
def add_key_parts(
    parts,
    item_start,
    key_start,
    grad_index_key,
    key_length,
    blocks,
    key_heads,
    groups_a_key,
    items,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_FIRST: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Add the parts of a block, group by group and item by item, to `grad_index_key`, `[B, key_heads, Tk, WIDTH]`.

    It is float32 and contiguous. With `IS_FIRST` what stands there is replaced. `parts` and `item_start` are as for
    `compare_keys`.
    """
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    inside = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
    slot = origin_of_row(key_start, tl.program_id(1) // key_heads) + block * BLOCK_SIZE + inside
    feature = tl.arange(0, WIDTH_TILE)
    is_stored = ((inside < BLOCK_SIZE) & (slot < key_length))[:, None] & (feature < WIDTH)[None, :]
    place = (head * key_length + slot)[:, None] * WIDTH + feature[None, :]
    added = tl.zeros((SLOTS, WIDTH_TILE), tl.float32)
    if not IS_FIRST:
        added = tl.load(grad_index_key + place, mask=is_stored, other=0.0)
    for turn in range(groups_a_key):
        group = head * groups_a_key + turn
        if item_start is not None:
            begin = tl.load(item_start + group * (blocks + 1) + block)
            end = tl.load(item_start + group * (blocks + 1) + block + 1)
            for item in range(begin, end):
                part = ((group * items + item) * BLOCK_SIZE + inside)[:, None] * WIDTH + feature[None, :]
                added += tl.load(parts + part, mask=is_stored, other=0.0)
        else:
            part = (group * key_length + slot)[:, None] * WIDTH + feature[None, :]
            added += tl.load(parts + part, mask=is_stored, other=0.0)
    tl.store(grad_index_key + place, added, mask=is_stored)
