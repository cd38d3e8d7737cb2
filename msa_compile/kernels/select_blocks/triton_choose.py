"""The Triton kernel that chooses the blocks of each query: a search for the threshold, without a sort.

Scores become unsigned integers of the same order. The `topk`-th largest of a row is found bit by bit: a bit is set
where at least `topk` scores are still as large. Then the larger ones are chosen, and of the equal ones the first in the
order of ids, so ties go to the lower id, and a running count of the chosen writes them out in ascending order.
"""

import triton
import triton.language as tl

from msa_compile.kernels.triton_rows import bounds_of_rows


@triton.jit
def _rank_rows(
    scores,
    batch,
    query,
    is_query,
    query_start,
    key_start,
    key_end,
    document_start,
    score_stride_h,
    score_stride_n,
    chunk_start,
    query_length,
    key_length,
    most,
    local_blocks,
    sink_blocks,
    BLOCK_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return `place, rank, can_be_chosen, threshold` of rows of scores; the threshold is the `most`-th largest rank.

    A rank is an unsigned integer of the same order as the score; forced blocks have the largest, blocks that cannot be
    chosen 0.
    """
    position, anchor, _, stop = bounds_of_rows(
        batch,
        query,
        is_query,
        query_start,
        key_start,
        key_end,
        document_start,
        query_length,
        key_length,
        None,
        IS_CAUSAL,
    )
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    # What lies behind the last block of a row was never written.
    blocks = tl.cdiv(tl.maximum(stop - anchor, 0), BLOCK_SIZE)
    is_block = column[None, :] < blocks[:, None]
    place = (
        scores + head * score_stride_h + (query - chunk_start)[:, None] + column.to(tl.int64)[None, :] * score_stride_n
    )
    score = tl.load(place, mask=is_block, other=float("-inf"))

    # Negative floats in reverse, positive ones above them.
    bits = score.to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    can_be_chosen = score > float("-inf")
    local = tl.where(position >= anchor, (position - anchor) // BLOCK_SIZE, -1)
    is_forced = (column[None, :] <= local[:, None]) & (column[None, :] > (local - local_blocks)[:, None])
    is_forced = is_forced | (column < sink_blocks)[None, :]
    rank = tl.where(is_forced, tl.full((ROWS, COLUMNS), 0xFFFFFFFF, tl.uint32), rank)
    rank = tl.where(can_be_chosen, rank, tl.zeros((ROWS, COLUMNS), tl.uint32))

    threshold = tl.zeros((ROWS,), tl.uint32)
    bit = tl.full((ROWS,), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = threshold | bit
        count = tl.sum((rank >= trial[:, None]).to(tl.int32), 1)
        threshold = tl.where(count >= most, trial, threshold)
        bit = bit >> 1
    return place, rank, can_be_chosen, threshold


@triton.jit(do_not_specialize=["chunk_start", "chunk_end", "query_length", "key_length"])
def choose_blocks(
    scores,
    block_ids,
    query_start,
    key_start,
    key_end,
    document_start,
    score_stride_h,
    score_stride_n,
    chunk_start,
    chunk_end,
    query_length,
    key_length,
    groups,
    topk,
    local_blocks,
    sink_blocks,
    BLOCK_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write the ids of the chosen blocks, ascending, -1 on the right; a program has `ROWS` queries of one group.

    Args:
        scores: as `score_blocks` writes them; `COLUMNS` is at least the number of blocks.
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
    """
    batch = tl.program_id(1) // groups
    query = chunk_start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_query = query < chunk_end
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    _, rank, can_be_chosen, threshold = _rank_rows(
        scores,
        batch,
        query,
        is_query,
        query_start,
        key_start,
        key_end,
        document_start,
        score_stride_h,
        score_stride_n,
        chunk_start,
        query_length,
        key_length,
        topk,
        local_blocks,
        sink_blocks,
        BLOCK_SIZE,
        IS_CAUSAL,
        ROWS,
        COLUMNS,
    )
    is_above = rank > threshold[:, None]
    is_equal = (rank == threshold[:, None]) & can_be_chosen
    room = topk - tl.sum(is_above.to(tl.int32), 1)
    is_chosen = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 1) <= room[:, None]))
    chosen = is_chosen.to(tl.int32)
    place = tl.cumsum(chosen, 1) - 1
    ids_of_rows = block_ids + (head * query_length + query) * topk
    tl.store(ids_of_rows[:, None] + place, tl.zeros_like(place) + column[None, :], mask=is_chosen & is_query[:, None])
    free = tl.arange(0, PLACES)
    is_free = (free[None, :] >= tl.sum(chosen, 1)[:, None]) & (free < topk)[None, :]
    nothing = tl.full((ROWS, PLACES), -1, tl.int32)
    tl.store(ids_of_rows[:, None] + free[None, :], nothing, mask=is_free & is_query[:, None])


@triton.jit(do_not_specialize=["chunk_start", "chunk_end", "query_length", "key_length", "blocks", "tiles"])
def keep_candidates(
    scores,
    wanted,
    query_start,
    key_start,
    key_end,
    document_start,
    score_stride_h,
    score_stride_n,
    chunk_start,
    chunk_end,
    query_length,
    key_length,
    blocks,
    tiles,
    groups,
    candidates,
    local_blocks,
    sink_blocks,
    BLOCK_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Replace the scores of blocks that are no candidates by -inf, and mark what each tile of queries wants.

    Candidates are the forced blocks and those that score at least as high as the `candidates`-th best, all ties in.

    Args:
        scores: as `score_blocks` writes them; `COLUMNS` is at least the number of blocks.
        wanted: `[tiles, blocks]` uint8, all 0 before, tiles of all groups one after the other; 1 is stored, by several
            programs where their queries agree.
        tiles: tiles of a chunk; each has `QUERIES` queries of `PACKED_GROUPS` groups, one group or all there are.
    """
    batch = tl.program_id(1) // groups
    query = chunk_start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_query = query < chunk_end
    place, rank, can_be_chosen, threshold = _rank_rows(
        scores,
        batch,
        query,
        is_query,
        query_start,
        key_start,
        key_end,
        document_start,
        score_stride_h,
        score_stride_n,
        chunk_start,
        query_length,
        key_length,
        candidates,
        local_blocks,
        sink_blocks,
        BLOCK_SIZE,
        IS_CAUSAL,
        ROWS,
        COLUMNS,
    )
    # Where fewer blocks than that can be chosen, the threshold is 0, the rank of those that cannot.
    is_candidate = can_be_chosen & (rank >= threshold[:, None])
    tl.store(place, tl.full((ROWS, COLUMNS), float("-inf"), tl.float32), mask=can_be_chosen & ~is_candidate)
    owner = batch if PACKED_GROUPS > 1 else tl.program_id(1)
    tile = owner.to(tl.int64) * tiles + (query - chunk_start) // QUERIES
    column = tl.arange(0, COLUMNS)
    marked = wanted + tile[:, None] * blocks + column[None, :]
    tl.store(marked, tl.full((ROWS, COLUMNS), 1, tl.uint8), mask=is_candidate & is_query[:, None])
