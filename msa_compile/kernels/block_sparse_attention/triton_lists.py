"""The Triton kernel that lists, for each tile of queries, the blocks that any of them selected."""

import triton
import triton.language as tl

from msa_compile.kernels.triton_rows import bounds_of_rows


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length"])
def list_blocks(
    block_ids,
    starts,
    members,
    counts,
    query_start,
    key_start,
    key_end,
    document_start,
    chunk_start,
    query_length,
    key_length,
    window,
    groups,
    topk,
    BLOCK_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    PLACES: tl.constexpr,
    PART: tl.constexpr,
):
    """Write each block once, with a bit for each query of the tile that selected it.

    A block is named by its first slot, because queries of different documents count blocks from different anchors.
    Blocks in which a query sees nothing are left out. The order is that of the first query that has the block.

    Args:
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
        starts: `[B * Hkv, tiles, QUERIES * PLACES]` int32, first slots of the blocks.
        members: as `starts`, the bits: bit `i` for query `i` of the tile.
        counts: `[B * Hkv, tiles]` int32, how many blocks a tile has.
    """
    SIZE: tl.constexpr = QUERIES * PLACES
    batch = tl.program_id(1) // groups
    head = tl.program_id(1).to(tl.int64)
    tile = head * tl.num_programs(0) + tl.program_id(0)
    first_query = chunk_start + tl.program_id(0) * QUERIES
    ids_of_tile = block_ids + (head * query_length + first_query) * topk

    entry = tl.arange(0, SIZE)
    query = first_query + entry // PLACES
    is_place = (query < query_length) & (entry % PLACES < topk)
    _, anchor, first, stop = bounds_of_rows(
        batch,
        query,
        is_place,
        query_start,
        key_start,
        key_end,
        document_start,
        query_length,
        key_length,
        window,
        IS_CAUSAL,
    )
    block = tl.load(ids_of_tile + (entry // PLACES) * topk + entry % PLACES, mask=is_place, other=-1)
    start = anchor + block * BLOCK_SIZE
    is_valid = (block >= 0) & (start < stop) & (start + BLOCK_SIZE > first)
    # No slot is negative: what is not there equals nothing that is.
    start = tl.where(is_valid, start, -1)

    count = 0
    for step in range(0, SIZE, PART):
        part = step + tl.arange(0, PART)
        own = tl.gather(start, part, 0)
        is_same = own[:, None] == start[None, :]
        is_earlier = tl.max((is_same & (entry[None, :] < part[:, None])).to(tl.int32), 1)
        is_new = (own >= 0) & (is_earlier == 0)
        bits = tl.sum(tl.where(is_same, tl.full((1,), 1, tl.int32) << (entry // PLACES)[None, :], 0), 1)
        place = tile * SIZE + count + tl.cumsum(is_new.to(tl.int32), 0) - 1
        tl.store(starts + place, own, mask=is_new)
        tl.store(members + place, bits, mask=is_new)
        count += tl.sum(is_new.to(tl.int32), 0)
    tl.store(counts + tile, count)
