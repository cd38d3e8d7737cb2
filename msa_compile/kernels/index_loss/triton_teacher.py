"""The Triton kernel of what a raised teacher is divided by and weighed with, and how a teacher is made.

Slots are the rows of a product and queries its columns. The heads of a group take turns on the same keys, and their
probabilities are added up in registers: the teacher of a tile is made without any of its heads being stored.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_softmax import capped_logits
from msa_compile.kernels.index_loss.triton_sums import is_counted, leave_out, slots_of_step
from msa_compile.kernels.triton_rows import bounds_of_rows, product

# The least normal number of float32, whose reciprocal is finite.
TINY = tl.constexpr(2.0**-126)


@triton.jit
def teach(
    keys,
    visible,
    is_row,
    query_rows,
    sums_of_rows,
    query_stride_h,
    query_length,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Return the probabilities of slots by queries, mean over the heads of a group; 0 where not `visible`.

    Args:
        query_rows: addresses of the queries of the first head, `sums_of_rows` of its normalisers.
    """
    channel = tl.arange(0, CHANNELS)
    is_loaded = is_row[:, None] & (channel < HEAD_DIM)[None, :]
    teacher = tl.zeros((SLOTS, QUERIES), tl.float32)
    for _ in range(HEADS):
        tile_of_queries = tl.load(query_rows[:, None] + channel[None, :], mask=is_loaded, other=0.0)
        log_sum = tl.load(sums_of_rows, mask=is_row, other=0.0)
        logits = capped_logits(product(keys, tl.trans(tile_of_queries)), scale, softcap)
        teacher += tl.exp2(logits - log_sum[None, :])
        # Added up, because a head times its stride may be beyond 32 bits.
        query_rows += query_stride_h
        sums_of_rows += query_length
    # Chosen and not multiplied by 0: what is not seen may be NaN.
    return tl.where(visible, teacher * (1.0 / HEADS), 0.0)


@triton.jit
def raise_to(probability, POWER: tl.constexpr):
    """Return `probability` raised to `POWER`, which is above 0; 0 stays 0."""
    if POWER == 1.0:
        raised = probability
    elif POWER == 2.0:
        raised = probability * probability
    else:
        raised = tl.exp2(POWER * tl.log2(probability))
    return raised


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length"])
def sum_teacher(
    query,
    key,
    log_sums,
    counted,
    log_weights,
    shares,
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
    IS_CAUSAL: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    POWER: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write what the probabilities that are compared add up to, for each query of a tile and one group.

    Args:
        query: with `key`, `log_sums`, `counted`, the lists, the mask and the bounds as for `compare_queries`.
        log_weights: `[B, groups, Tq]` float32, the logarithm of the sum of the probabilities, in units of log 2; -inf
            where nothing is compared.
        shares: `[B, groups, Tq]` float32, the sum of the probabilities by that of the raised ones; 0 there.
    """
    batch = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    # The last queries see the most: they begin first.
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    column = tl.arange(0, QUERIES)
    token = chunk_start + turn * QUERIES + column
    is_there = token < query_length
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
    wide_head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    query_rows = query + wide_batch * query_stride_b + wide_group * HEADS * query_stride_h + wide_token * query_stride_t
    key_rows = key + wide_batch * key_stride_b + wide_group * key_stride_h
    if mask is not None:
        mask_rows = mask + wide_batch * mask_stride_b + wide_group * mask_stride_h + wide_token * mask_stride_q
    sees = is_row & (stop > first)
    first_of_tile = tl.min(tl.where(sees, first, key_length))
    stop_of_tile = tl.max(tl.where(sees, stop, 0))
    steps = tl.cdiv(tl.maximum(stop_of_tile - first_of_tile, 0), SLOTS)
    if starts is not None:
        tile = wide_head * tl.num_programs(0) + turn
        starts += tile * list_size
        members += tile * list_size
        steps = tl.load(counts + tile) * PIECES

    weight = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for step in range(0, steps):
        slot, is_key = slots_of_step(step, starts, first_of_tile, stop_of_tile, BLOCK_SIZE, SLOTS, PIECES)
        wide_slot = slot.to(tl.int64)
        keys = tl.load(
            key_rows + wide_slot[:, None] * key_stride_t + channel[None, :],
            mask=is_key[:, None] & (channel < HEAD_DIM)[None, :],
            other=0.0,
        )
        visible = is_key[:, None] & (slot[:, None] >= first[None, :]) & (slot[:, None] < stop[None, :])
        if LOCAL_BLOCKS > 0 and not IS_CAUSAL:
            visible = visible & ((slot[:, None] < gap[None, :]) | (slot[:, None] >= beyond[None, :]))
        if starts is not None:
            bits = tl.load(members + step // PIECES)
            visible = visible & (((bits >> column) & 1) != 0)[None, :]
        if mask is not None:
            shown = mask_rows[None, :] + wide_slot[:, None] * mask_stride_k
            visible = visible & (tl.load(shown, mask=visible, other=0) != 0)
        teacher = teach(
            keys,
            visible,
            is_row,
            query_rows,
            log_sums + (wide_head * HEADS * query_length + wide_token),
            query_stride_h,
            query_length,
            scale,
            softcap,
            HEAD_DIM,
            HEADS,
            CHANNELS,
            SLOTS,
            QUERIES,
        )
        weight += tl.sum(teacher, 0)
        total += tl.sum(raise_to(teacher, POWER), 0)
    own = wide_head * query_length + wide_token
    tl.store(log_weights + own, tl.log2(weight), mask=is_there)
    tl.store(shares + own, weight / tl.maximum(total, TINY), mask=is_there)
