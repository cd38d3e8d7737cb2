"""The Triton kernels of the order with blocks outside: a block meets the queries that selected it, wherever they are.

Keys and values of a block are loaded once and stay, and queries are gathered into full tiles, so no row is in vain,
however little neighbours have in common. The price is a result for each query and block, in the place that the block
has among those of the query, and a second kernel that merges them.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_queries import find_item, origin_of_row
from msa_compile.kernels.block_sparse_attention.triton_slots import merge_parts
from msa_compile.kernels.block_sparse_attention.triton_softmax import capped_logits, weigh
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit
def _attend_list(
    begin,
    end,
    IS_CAREFUL: tl.constexpr,
    mask_of_head,
    softcap,
    window,
    query_start,
    key_start,
    key_end,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    keys,
    values,
    query_rows,
    ids_of_head,
    list_of_head,
    output_of_head,
    total_of_head,
    highest_of_head,
    batch,
    block,
    slot,
    scale,
    query_stride_t,
    mask_stride_q,
    mask_stride_k,
    chunk_start,
    query_length,
    key_length,
    topk,
):
    """Write the results of the queries of a part of a block's list; return whether one of them is not finite.

    With `IS_CAREFUL` the values that a query does not see are replaced by 0, query by query.
    """
    row = tl.arange(0, HEADS_TILE * QUERIES)
    channel = tl.arange(0, CHANNELS)
    of_place = tl.arange(0, PLACES)
    is_channel = (channel < HEAD_DIM)[None, :]
    inside = tl.arange(0, SLOTS)
    wide_slot = slot.to(tl.int64)
    is_broken = 0
    for step in tl.range(begin, end, QUERIES, num_stages=1 if IS_CAREFUL else None):
        place = step + row // HEADS_TILE
        is_row = (place < end) & (row % HEADS_TILE < HEADS)
        token = tl.load(list_of_head + place, mask=is_row, other=0)
        wide_token = token.to(tl.int64)
        found = (query_rows + wide_token * query_stride_t)[:, None] + channel[None, :]
        tile_of_queries = tl.load(found, mask=is_row[:, None] & is_channel, other=0.0)
        _, _, first, stop = bounds_of_rows(
            batch,
            token,
            is_row,
            query_start,
            key_start,
            key_end,
            None,
            query_length,
            key_length,
            window,
            IS_CAUSAL,
        )
        visible = (inside < BLOCK_SIZE)[None, :] & (slot[None, :] >= first[:, None]) & (slot[None, :] < stop[:, None])
        if mask_of_head is not None:
            shown = (mask_of_head + wide_token * mask_stride_q)[:, None] + wide_slot[None, :] * mask_stride_k
            visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
        logits = capped_logits(product(tile_of_queries, tl.trans(keys)), scale, softcap)
        nothing = tl.zeros((HEADS_TILE * QUERIES,), tl.float32)
        weights, _, total, highest = weigh(logits, visible, nothing, nothing + float("-inf"))
        if IS_CAREFUL:
            result = tl.zeros((HEADS_TILE * QUERIES, CHANNELS), tl.float32)
            for turn in range(QUERIES):
                is_mine = row // HEADS_TILE == turn
                seen = tl.max((visible & is_mine[:, None]).to(tl.int32), 0)
                kept = tl.where(seen[:, None] != 0, values, tl.zeros_like(values))
                result = tl.where(is_mine[:, None], product(weights.to(values.dtype), kept), result)
        else:
            result = product(weights.to(values.dtype), values)
            is_broken = tl.maximum(is_broken, tl.max(tl.where(tl.abs(result) < float("inf"), 0, 1)))
        # The place of the block among those of the query: as many as are before it, ids ascend.
        is_id = is_row[:, None] & (of_place < topk)[None, :]
        ids = tl.load((ids_of_head + wide_token * topk)[:, None] + of_place[None, :], mask=is_id, other=-1)
        before = tl.sum(((ids >= 0) & (ids < block)).to(tl.int32), 1)
        part = ((wide_token - chunk_start) * topk + before) * HEADS + row % HEADS_TILE
        result = result / tl.where(total == 0, 1.0, total)[:, None]
        stored = output_of_head + part[:, None] * HEAD_DIM + channel[None, :]
        tl.store(stored, result.to(output_of_head.dtype.element_ty), mask=is_row[:, None] & is_channel)
        tl.store(total_of_head + part, total, mask=is_row)
        tl.store(highest_of_head + part, highest, mask=is_row)
    return is_broken


@triton.jit(do_not_specialize=["chunk_start", "chunk", "query_length", "key_length", "blocks", "list_size", "items"])
def attend_blocks(
    query,
    key,
    value,
    block_ids,
    queries,
    list_start,
    item_start,
    item_blocks,
    partial_output,
    partial_total,
    partial_highest,
    query_start,
    key_start,
    key_end,
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
    chunk,
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
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    QUERIES_AN_ITEM: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write, for the queries of an item, the softmax over the slots of its block.

    Args:
        query: as for `attend_tiles`, and so are `key`, `value`, `mask` and the bounds; there are no documents.
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
        queries: with `list_start`, `item_start` and `item_blocks` as `triton_queries.py` writes them.
        partial_output: `[B * Hkv, C, topk, HEADS, HEAD_DIM]` in the dtype of the output, divided; `C` is `chunk`.
        partial_total: `[B * Hkv, C, topk, HEADS]` float32, the sum of the weights.
        partial_highest: as `partial_total`, the largest logit in units of log 2.
        SLOTS: at least `BLOCK_SIZE`: a block stays where it is loaded.
    """
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    wide_batch, wide_group = batch.to(tl.int64), group.to(tl.int64)
    wide_head = tl.program_id(1).to(tl.int64)
    block, begin, end = find_item(
        list_start, item_start, item_blocks, wide_head, tl.program_id(0), blocks, items, QUERIES_AN_ITEM
    )
    inside = tl.arange(0, SLOTS)
    slot = origin_of_row(key_start, batch) + block * BLOCK_SIZE + inside
    stop_of_row = key_length
    if key_end is not None:
        stop_of_row = tl.minimum(tl.load(key_end + batch).to(tl.int32), key_length)
    is_key = (inside < BLOCK_SIZE) & (slot < stop_of_row) & (end > begin)
    channel = tl.arange(0, CHANNELS)
    is_loaded = is_key[:, None] & (channel < HEAD_DIM)[None, :]
    place = key + wide_batch * key_stride_b + wide_group * key_stride_h + slot.to(tl.int64) * key_stride_t
    keys = tl.load(place[:, None] + channel[None, :], mask=is_loaded, other=0.0)
    place = value + wide_batch * value_stride_b + wide_group * value_stride_h + slot.to(tl.int64) * value_stride_t
    values = tl.load(place[:, None] + channel[None, :], mask=is_loaded, other=0.0)
    head = wide_group * HEADS + tl.arange(0, HEADS_TILE * QUERIES) % HEADS_TILE
    first_part = wide_head * chunk * topk * HEADS
    mask_of_head = None
    if mask is not None:
        mask_of_head = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h
    of_list = (
        keys,
        values,
        query + wide_batch * query_stride_b + head * query_stride_h,
        block_ids + wide_head * query_length * topk,
        queries + wide_head * list_size,
        partial_output + first_part * HEAD_DIM,
        partial_total + first_part,
        partial_highest + first_part,
        batch,
        block,
        slot,
        scale,
        query_stride_t,
        mask_stride_q,
        mask_stride_k,
        chunk_start,
        query_length,
        key_length,
        topk,
    )
    is_broken = _attend_list(
        begin,
        end,
        False,
        mask_of_head,
        softcap,
        window,
        query_start,
        key_start,
        key_end,
        BLOCK_SIZE,
        HEAD_DIM,
        HEADS,
        IS_CAUSAL,
        PLACES,
        CHANNELS,
        HEADS_TILE,
        QUERIES,
        SLOTS,
        *of_list,
    )
    # A value that is not finite may have reached a query that does not see it; see `attend_tiles`.
    if is_broken != 0:
        _attend_list(
            begin,
            end,
            True,
            mask_of_head,
            softcap,
            window,
            query_start,
            key_start,
            key_end,
            BLOCK_SIZE,
            HEAD_DIM,
            HEADS,
            IS_CAUSAL,
            PLACES,
            CHANNELS,
            HEADS_TILE,
            QUERIES,
            SLOTS,
            *of_list,
        )


@triton.jit(do_not_specialize=["chunk_start", "chunk", "query_length", "key_length"])
def merge_places(
    block_ids,
    partial_output,
    partial_total,
    partial_highest,
    sinks,
    output,
    query_start,
    key_start,
    key_end,
    chunk_start,
    chunk,
    query_length,
    key_length,
    window,
    groups,
    topk,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merge what `attend_blocks` wrote, and the sink, into the output of one query and head."""
    group = tl.program_id(1) // HEADS
    head_of_group = tl.program_id(1) % HEADS
    batch = group // groups
    # One query, as a row of one: bounds come as vectors.
    token = chunk_start + tl.program_id(0) + tl.arange(0, 1)
    _, anchor, first, stop = bounds_of_rows(
        batch,
        token,
        token < query_length,
        query_start,
        key_start,
        key_end,
        None,
        query_length,
        key_length,
        window,
        IS_CAUSAL,
    )
    place = tl.arange(0, PLACES)
    wide_group = group.to(tl.int64)
    ids = block_ids + (wide_group * query_length + chunk_start + tl.program_id(0)) * topk
    block = tl.load(ids + place, mask=place < topk, other=-1)
    start = anchor + block * BLOCK_SIZE
    # What is not on a list has no part.
    is_part = (block >= 0) & (start < stop) & (start + BLOCK_SIZE > first)
    result = merge_parts(
        ((wide_group * chunk + tl.program_id(0)) * topk + place) * HEADS + head_of_group,
        is_part,
        sinks,
        (group % groups) * HEADS + head_of_group,
        partial_output,
        partial_total,
        partial_highest,
        HEAD_DIM,
        CHANNELS,
        True,
    )
    channel = tl.arange(0, CHANNELS)
    stored = tl.program_id(1).to(tl.int64) * query_length + chunk_start + tl.program_id(0)
    tl.store(output + stored * HEAD_DIM + channel, result.to(output.dtype.element_ty), mask=channel < HEAD_DIM)
