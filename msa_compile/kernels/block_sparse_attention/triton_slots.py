"""The Triton kernels for few queries: the places of a query are shared out among programs, and their results merged.

One program a query and group would leave most of the chip idle. Here a program has the heads of a group as rows and
some of the selected blocks; all rows see the same slots, so what is not seen is not even read.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_softmax import LOG2_E, capped_logits, weigh
from msa_compile.kernels.triton_rows import bounds_of_rows, product


@triton.jit(do_not_specialize=["query_length", "key_length"])
def attend_slots(
    query,
    key,
    value,
    block_ids,
    partial_output,
    partial_total,
    partial_highest,
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
    query_length,
    key_length,
    window,
    groups,
    topk,
    places_a_split,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the softmax of one query and group over `places_a_split` of its selected blocks, not yet divided.

    Args:
        query: as for `attend_tiles`, and so are `key`, `value`, `mask` and the bounds.
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous.
        partial_output: `[B * Hkv, Tq, splits, HEADS, HEAD_DIM]` float32.
        partial_total: `[B * Hkv, Tq, splits, HEADS]` float32, the sum of the weights.
        partial_highest: as `partial_total`, the largest logit in units of log 2.
    """
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    token = tl.program_id(0)
    # One query, as a row of one: bounds come as vectors.
    tokens = token + tl.arange(0, 1)
    _, anchor_row, first_row, stop_row = bounds_of_rows(
        batch,
        tokens,
        tokens < query_length,
        query_start,
        key_start,
        key_end,
        document_start,
        query_length,
        key_length,
        window,
        IS_CAUSAL,
    )
    anchor, first, stop = tl.max(anchor_row, 0), tl.max(first_row, 0), tl.max(stop_row, 0)

    wide_batch, wide_group, wide_token = batch.to(tl.int64), group.to(tl.int64), token.to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    is_stored = (row < HEADS)[:, None] & (channel < HEAD_DIM)[None, :]
    place = query + wide_batch * query_stride_b + wide_token * query_stride_t
    rows_of_query = place + (wide_group * HEADS + row) * query_stride_h
    tile_of_queries = tl.load(rows_of_query[:, None] + channel[None, :], mask=is_stored, other=0.0)
    key_rows = key + wide_batch * key_stride_b + wide_group * key_stride_h
    value_rows = value + wide_batch * value_stride_b + wide_group * value_stride_h
    mask_row = None
    if mask is not None:
        mask_row = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_token * mask_stride_q

    accumulated = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    begin = tl.program_id(2) * places_a_split
    end = tl.minimum(begin + places_a_split, topk)
    ids = block_ids + (tl.program_id(1).to(tl.int64) * query_length + token) * topk
    for step in range(begin * PIECES, end * PIECES):
        block = tl.load(ids + step // PIECES)
        inside = (step % PIECES) * SLOTS + tl.arange(0, SLOTS)
        slot = anchor + block * BLOCK_SIZE + inside
        # A place without a block hides its slots; a branch around the loads would stop them from being taken ahead.
        visible = (block >= 0) & (inside < BLOCK_SIZE) & (slot >= first) & (slot < stop)
        wide_slot = slot.to(tl.int64)
        if mask_row is not None:
            visible = visible & (tl.load(mask_row + wide_slot * mask_stride_k, mask=visible, other=0) != 0)
        is_loaded = visible[:, None] & (channel < HEAD_DIM)[None, :]
        keys = tl.load(key_rows + wide_slot[:, None] * key_stride_t + channel[None, :], mask=is_loaded, other=0.0)
        logits = capped_logits(product(tile_of_queries, tl.trans(keys)), scale, softcap)
        weights, shrink, total, highest = weigh(logits, visible[None, :], total, highest)
        values = tl.load(value_rows + wide_slot[:, None] * value_stride_t + channel[None, :], mask=is_loaded, other=0.0)
        accumulated = accumulated * shrink[:, None] + product(weights.to(values.dtype), values)

    part = (tl.program_id(1).to(tl.int64) * query_length + token) * tl.num_programs(2) + tl.program_id(2)
    head = part * HEADS + row
    tl.store(partial_output + head[:, None] * HEAD_DIM + channel[None, :], accumulated, mask=is_stored)
    tl.store(partial_total + head, total, mask=row < HEADS)
    tl.store(partial_highest + head, highest, mask=row < HEADS)


@triton.jit
def merge_parts(
    place,
    is_part,
    sinks,
    head,
    partial_output,
    partial_total,
    partial_highest,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    IS_DIVIDED: tl.constexpr,
):
    """Return the output of a query and head, of its parts at `place` and the sink of `head`, `[CHANNELS]` float32.

    With `IS_DIVIDED` the parts were divided by their sums.
    """
    channel = tl.arange(0, CHANNELS)
    highest = tl.load(partial_highest + place, mask=is_part, other=float("-inf"))
    total = tl.load(partial_total + place, mask=is_part, other=0.0)
    top = tl.max(highest, 0)
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(highest - base)
    of_parts = total * share
    total = tl.sum(of_parts, 0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    total = tl.where(total == 0, 1.0, total)
    is_loaded = is_part[:, None] & (channel < HEAD_DIM)[None, :]
    parts = tl.load(partial_output + place[:, None] * HEAD_DIM + channel[None, :], mask=is_loaded, other=0.0)
    if IS_DIVIDED:
        share = of_parts
    return tl.sum(parts.to(tl.float32) * share[:, None], 0) / total


@triton.jit(do_not_specialize=["query_length"])
def merge_slots(
    partial_output,
    partial_total,
    partial_highest,
    sinks,
    output,
    query_length,
    groups,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_TILE: tl.constexpr,
):
    """Merge what `attend_slots` wrote, and the sink, into the output of one query and head."""
    group = tl.program_id(1) // HEADS
    head_of_group = tl.program_id(1) % HEADS
    split = tl.arange(0, SPLITS_TILE)
    part = (group.to(tl.int64) * query_length + tl.program_id(0)) * SPLITS + split
    result = merge_parts(
        part * HEADS + head_of_group,
        split < SPLITS,
        sinks,
        (group % groups) * HEADS + head_of_group,
        partial_output,
        partial_total,
        partial_highest,
        HEAD_DIM,
        CHANNELS,
        False,
    )
    channel = tl.arange(0, CHANNELS)
    place = tl.program_id(1).to(tl.int64) * query_length + tl.program_id(0)
    tl.store(output + place * HEAD_DIM + channel, result.to(output.dtype.element_ty), mask=channel < HEAD_DIM)
