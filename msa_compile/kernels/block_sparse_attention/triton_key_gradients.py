"""The Triton kernels of the gradients of keys and values: a block meets, in parts, the queries that selected it.

A program has some keys of a block and the queries of one item of its list, gathered into full tiles, so no row is there
in vain. It writes its part by itself, and the parts of a block are added in their order: no atomics, and the same bits
every time.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_queries import find_item, origin_of_row
from msa_compile.kernels.block_sparse_attention.triton_softmax import capped_logits, through_cap
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit(do_not_specialize=["query_length", "key_length", "blocks", "list_size", "items"])
def differentiate_blocks(
    query,
    key,
    value,
    grad_output,
    block_ids,
    log_sums,
    deltas,
    queries,
    list_start,
    item_start,
    item_blocks,
    key_parts,
    value_parts,
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
    """Write what the queries of an item add to the gradients of `SLOTS` keys and values of its block.

    Args:
        query: as for `differentiate_tiles`, and so are `key`, `value`, `grad_output`, `log_sums`, `deltas`, the bounds.
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
        queries: with `list_start`, `item_start` and `item_blocks` as `triton_queries.py` writes them.
        key_parts: `[B * Hkv, items, pieces * SLOTS, HEAD_DIM]` float32; `value_parts` likewise.
    """
    ROWS: tl.constexpr = HEADS_TILE * QUERIES
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    wide_batch, wide_group = batch.to(tl.int64), group.to(tl.int64)
    wide_head = tl.program_id(1).to(tl.int64)
    block, begin, end = find_item(
        list_start, item_start, item_blocks, wide_head, tl.program_id(0), blocks, items, QUERIES_AN_ITEM
    )
    inside = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
    start = origin_of_row(key_start, batch) + block * BLOCK_SIZE
    slot = start + inside
    wide_slot = slot.to(tl.int64)
    is_key = (inside < BLOCK_SIZE) & (slot < key_length)
    channel = tl.arange(0, CHANNELS)
    is_channel = (channel < HEAD_DIM)[None, :]
    key_rows = key + wide_batch * key_stride_b + wide_group * key_stride_h + wide_slot * key_stride_t
    keys = tl.load(key_rows[:, None] + channel[None, :], mask=is_key[:, None] & is_channel, other=0.0)
    value_rows = value + wide_batch * value_stride_b + wide_group * value_stride_h + wide_slot * value_stride_t
    values = tl.load(value_rows[:, None] + channel[None, :], mask=is_key[:, None] & is_channel, other=0.0)
    row = tl.arange(0, ROWS)
    head = group * HEADS + row % HEADS_TILE
    query_rows = query + wide_batch * query_stride_b + head.to(tl.int64) * query_stride_h
    grad_rows = grad_output + wide_batch * grad_stride_b + head.to(tl.int64) * grad_stride_h
    of_rows = (wide_batch * groups * HEADS + head) * query_length
    list_of_head = queries + wide_head * list_size

    grad_key = tl.zeros((SLOTS, CHANNELS), tl.float32)
    grad_value = tl.zeros((SLOTS, CHANNELS), tl.float32)
    for step in range(begin, end, QUERIES):
        place = step + row // HEADS_TILE
        is_row = (place < end) & (row % HEADS_TILE < HEADS)
        token = tl.load(list_of_head + place, mask=is_row, other=0)
        wide_token = token.to(tl.int64)
        is_loaded = is_row[:, None] & is_channel
        tile_of_queries = tl.load(
            (query_rows + wide_token * query_stride_t)[:, None] + channel[None, :], mask=is_loaded, other=0.0
        )
        tile_of_grads = tl.load(
            (grad_rows + wide_token * grad_stride_t)[:, None] + channel[None, :], mask=is_loaded, other=0.0
        )
        log_sum = tl.load(log_sums + of_rows + token, mask=is_row, other=0.0)
        delta = tl.load(deltas + of_rows + token, mask=is_row, other=0.0)
        _, anchor, first, stop = bounds_of_rows(
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
        visible = is_key[:, None] & (slot[:, None] >= first[None, :]) & (slot[:, None] < stop[None, :])
        if document_start is not None:
            # The blocks of a document lie across ours: the slots before `edge` are of one, those from there on of the
            # next, and a query may have selected either.
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
        if mask is not None:
            shown = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_token * mask_stride_q
            shown = shown[None, :] + wide_slot[:, None] * mask_stride_k
            visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
        logits = capped_logits(product(keys, tl.trans(tile_of_queries)), scale, softcap)
        # What is not seen may be NaN.
        weights = tl.where(visible, tl.exp2(logits - log_sum[None, :]), 0.0)
        grad_value += product(weights.to(values.dtype), tile_of_grads)
        slope = weights * (product(values, tl.trans(tile_of_grads)) - delta[None, :])
        slope = tl.where(visible, through_cap(slope, logits, softcap), 0.0)
        grad_key += product(slope.to(keys.dtype), tile_of_queries)

    is_stored = (inside < BLOCK_SIZE)[:, None] & is_channel & (end > begin)
    part = (wide_head * items + tl.program_id(0)) * BLOCK_SIZE + inside
    stored = part[:, None] * HEAD_DIM + channel[None, :]
    tl.store(key_parts + stored, grad_key * scale, mask=is_stored)
    tl.store(value_parts + stored, grad_value, mask=is_stored)


@triton.jit(do_not_specialize=["key_length", "blocks", "items"])
def add_parts(
    key_parts,
    value_parts,
    item_start,
    key_start,
    grad_key,
    grad_value,
    key_length,
    blocks,
    groups,
    items,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Add the parts of a block, in order, to `grad_key` and `grad_value`, `[B, Hkv, Tk, D]` float32, contiguous.

    With `IS_FIRST` what stands there is replaced.
    """
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    inside = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
    slot = origin_of_row(key_start, tl.program_id(1) // groups) + block * BLOCK_SIZE + inside
    channel = tl.arange(0, CHANNELS)
    is_stored = ((inside < BLOCK_SIZE) & (slot < key_length))[:, None] & (channel < HEAD_DIM)[None, :]
    place = (head * key_length + slot)[:, None] * HEAD_DIM + channel[None, :]
    of_keys = tl.zeros((SLOTS, CHANNELS), tl.float32)
    of_values = tl.zeros((SLOTS, CHANNELS), tl.float32)
    if not IS_FIRST:
        of_keys = tl.load(grad_key + place, mask=is_stored, other=0.0)
        of_values = tl.load(grad_value + place, mask=is_stored, other=0.0)
    begin = tl.load(item_start + head * (blocks + 1) + block)
    end = tl.load(item_start + head * (blocks + 1) + block + 1)
    for item in range(begin, end):
        part = ((head * items + item) * BLOCK_SIZE + inside)[:, None] * HEAD_DIM + channel[None, :]
        of_keys += tl.load(key_parts + part, mask=is_stored, other=0.0)
        of_values += tl.load(value_parts + part, mask=is_stored, other=0.0)
    tl.store(grad_key + place, of_keys, mask=is_stored)
    tl.store(grad_value + place, of_values, mask=is_stored)
