"""The Triton kernel of the loss and of the gradient of index queries: a tile of queries meets its support once more.

Slots are the rows of every product and queries its columns, so that few queries still fill the large matrix
instructions.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_softmax import LOG2_E
from msa_compile.kernels.index_loss.triton_sums import is_counted, leave_out, slots_of_step
from msa_compile.kernels.index_loss.triton_teacher import raise_to, teach
from msa_compile.kernels.triton_rows import bounds_of_rows, product

# Differences of probabilities are at most 1 and may be tiny: raised before they are rounded to 16 bits, lowered after
# they are added up. A power of two is exact, and this one is finite in float16.
RAISED = tl.constexpr(32768.0)


@triton.jit
def compare_slots(
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
    POWER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Return `teacher, log_student, change` of slots by queries; the second in units of log 2.

    Args:
        visible: `[SLOTS, QUERIES]`, the support; elsewhere teacher and change are 0, and the student means nothing.
        query_rows: as for `teach`, and so is `sums_of_rows`.
        share: `[QUERIES]`, by which raised probabilities are multiplied; None in the plain form. What is returned is
            weighed as this and `index_log_sum` are.
    """
    teacher = teach(
        keys,
        visible,
        is_row,
        query_rows,
        sums_of_rows,
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
    if share is not None:
        teacher = raise_to(teacher, POWER) * share[None, :]
    scores = product(index_keys, tl.trans(tile_of_index_queries)) * index_scale * LOG2_E
    log_student = scores - index_log_sum[None, :]
    return teacher, log_student, tl.where(visible, tl.exp2(log_student), 0.0) - teacher


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length"])
def compare_queries(
    query,
    key,
    index_query,
    index_key,
    log_sums,
    index_log_sums,
    log_weights,
    shares,
    counted,
    losses,
    grad_index_query,
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
    chunk_start,
    query_length,
    key_length,
    window,
    groups,
    list_size,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    POWER: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write the divergence of each query of a tile and one group, and its gradient by the index query.

    Args:
        query: `[B, groups * HEADS, Tq, HEAD_DIM]`, strides given, channels adjacent; `key` `[B, groups, Tk, HEAD_DIM]`,
            `index_query` `[B, groups, Tq, WIDTH]` and `index_key` `[B, groups, Tk, WIDTH]` likewise.
        log_sums: as `sum_logits` wrote them for `query`; `index_log_sums` for `index_query`.
        log_weights: with `shares` as `sum_teacher` wrote them; both None in the plain form.
        losses: `[B, groups, Tq]` float32, nats; 0 for a query that sees nothing, or that does not count.
        grad_index_query: `[B, groups, Tq, WIDTH]` float32, contiguous, of the mean of `losses` over groups; or None.
        counted: with the lists, the mask and the bounds as for `sum_logits`; the mask is one a group.
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
    feature = tl.arange(0, WIDTH_TILE)
    is_feature = (feature < WIDTH)[None, :]
    query_rows = query + wide_batch * query_stride_b + wide_group * HEADS * query_stride_h + wide_token * query_stride_t
    key_rows = key + wide_batch * key_stride_b + wide_group * key_stride_h
    index_key_rows = index_key + wide_batch * index_key_stride_b + wide_group * index_key_stride_h
    place = index_query + wide_batch * index_query_stride_b + wide_group * index_query_stride_h
    place += wide_token * index_query_stride_t
    tile_of_index_queries = tl.load(place[:, None] + feature[None, :], mask=is_row[:, None] & is_feature, other=0.0)
    own = wide_head * query_length + wide_token
    index_log_sum = tl.load(index_log_sums + own, mask=is_row, other=0.0)
    share = None
    if shares is not None:
        # Teacher and student are both weighed, and so is the loss, in whose logarithm the weight cancels out.
        share = tl.load(shares + own, mask=is_row, other=0.0)
        index_log_sum -= tl.load(log_weights + own, mask=is_row, other=0.0)
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

    loss = tl.zeros((QUERIES,), tl.float32)
    accumulated = tl.zeros((WIDTH_TILE, QUERIES), tl.float32)
    for step in range(0, steps):
        slot, is_key = slots_of_step(step, starts, first_of_tile, stop_of_tile, BLOCK_SIZE, SLOTS, PIECES)
        wide_slot = slot.to(tl.int64)
        keys = tl.load(
            key_rows + wide_slot[:, None] * key_stride_t + channel[None, :],
            mask=is_key[:, None] & (channel < HEAD_DIM)[None, :],
            other=0.0,
        )
        index_keys = tl.load(
            index_key_rows + wide_slot[:, None] * index_key_stride_t + feature[None, :],
            mask=is_key[:, None] & is_feature,
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
            # A mask may hide padding, which may be NaN, among slots that are seen.
            is_seen = tl.max(visible.to(tl.int32), 1) != 0
            index_keys = tl.where(is_seen[:, None], index_keys, tl.zeros_like(index_keys))
        teacher, log_student, change = compare_slots(
            keys,
            index_keys,
            tile_of_index_queries,
            index_log_sum,
            visible,
            is_row,
            query_rows,
            log_sums + (wide_head * HEADS * query_length + wide_token),
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
        # A comparison with 0, which NaN fails: it has to come out.
        surprise = tl.where(teacher == 0, 0.0, teacher * (tl.log2(teacher) - log_student))
        loss += tl.sum(surprise, 0)
        if grad_index_query is not None:
            accumulated += product(tl.trans(index_keys), (change * RAISED).to(index_keys.dtype))
    tl.store(losses + own, loss / LOG2_E, mask=is_there)
    if grad_index_query is not None:
        result = tl.trans(accumulated) * (index_scale / (groups * RAISED))
        stored = grad_index_query + own[:, None] * WIDTH + feature[None, :]
        tl.store(stored, result, mask=is_there[:, None] & is_feature)
