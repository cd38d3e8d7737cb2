"""The Triton kernels that turn a selection around: for each block of keys, the queries that selected it.

A query's bit is set in a word of each block that it selected; the words of a block are counted, the counts summed up,
and the bits written out as a list. Bits are the same in whatever order they are set, so the lists ascend and are the
same in every run. The lists are cut into items of bounded length: as many programs as shapes allow for, each with about
the same work, though some blocks are selected by every query.
"""

import triton
import triton.language as tl

from msa_compile.kernels.triton_rows import bounds_of_rows

# Queries of a word.
_BITS = tl.constexpr(32)


@triton.jit
def origin_of_row(key_start, batch):
    """Return the slot where block 0 of a row of the batch starts; documents start theirs elsewhere."""
    origin = batch * 0
    if key_start is not None:
        origin = tl.maximum(origin, tl.load(key_start + batch).to(tl.int32))
    return origin


@triton.jit(do_not_specialize=["chunk_start", "query_length", "key_length", "blocks"])
def mark_queries(
    block_ids,
    words,
    query_start,
    key_start,
    key_end,
    document_start,
    chunk_start,
    chunk_end,
    query_length,
    key_length,
    window,
    groups,
    topk,
    blocks,
    BLOCK_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Set the bits of 32 queries of one group in the words of the blocks that hold slots they see.

    Blocks are counted from the origin of the row. What a query of a document selected may lie across two of them, and
    then it is marked in both.

    Args:
        block_ids: `[B, Hkv, Tq, topk]` int32, contiguous; `PLACES` is at least `topk`.
        words: `[B * Hkv, ceil(C / 32), blocks]` int32, `C` queries from `chunk_start` on.
    """
    batch = tl.program_id(1) // groups
    head = tl.program_id(1).to(tl.int64)
    words_of_tile = words + (head * tl.num_programs(0) + tl.program_id(0)) * blocks
    for column in range(0, blocks, COLUMNS):
        block = column + tl.arange(0, COLUMNS)
        tl.store(words_of_tile + block, tl.zeros((COLUMNS,), tl.int32), mask=block < blocks)
    # Other threads of the program set bits in what this one has cleared.
    tl.debug_barrier()

    turn = tl.arange(0, _BITS)
    query = chunk_start + tl.program_id(0) * _BITS + turn
    is_query = query < chunk_end
    _, anchor, first, stop = bounds_of_rows(
        batch,
        query,
        is_query,
        query_start,
        key_start,
        key_end,
        document_start,
        query_length,
        key_length,
        window,
        IS_CAUSAL,
    )
    place = tl.arange(0, PLACES)
    is_place = is_query[:, None] & (place < topk)[None, :]
    ids = block_ids + (head * query_length + query) * topk
    block = tl.load(ids[:, None] + place[None, :], mask=is_place, other=-1)
    start = anchor[:, None] + block * BLOCK_SIZE
    begin, end = tl.maximum(start, first[:, None]), tl.minimum(start + BLOCK_SIZE, stop[:, None])
    is_seen = (block >= 0) & (begin < end)
    origin = origin_of_row(key_start, batch)
    low = tl.where(is_seen, begin - origin, 0) // BLOCK_SIZE
    high = tl.where(is_seen, end - 1 - origin, 0) // BLOCK_SIZE
    bits = tl.zeros_like(block) + (tl.full((_BITS,), 1, tl.int32) << turn)[:, None]
    tl.atomic_or(words_of_tile + low, bits, mask=is_seen, sem="relaxed")
    if document_start is not None:
        tl.atomic_or(words_of_tile + high, bits, mask=is_seen & (high > low), sem="relaxed")


@triton.jit
def _count_bits(word):
    """Return how many bits are set in each int32."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    bits = bits + (bits >> 8)
    return ((bits + (bits >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["tiles", "blocks"])
def count_queries(words, counts, tiles, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write how many queries selected each block, `[B * Hkv, blocks]` int32; `words` has `tiles` words a block."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    count = tl.zeros((COLUMNS,), tl.int32)
    for tile in range(0, tiles, ROWS):
        is_word = (tile + row < tiles)[:, None] & (block < blocks)[None, :]
        place = words + (head * tiles + tile + row)[:, None] * blocks + block[None, :]
        count += tl.sum(_count_bits(tl.load(place, mask=is_word, other=0)), 0)
    tl.store(counts + head * blocks + block, count, mask=block < blocks)


@triton.jit(do_not_specialize=["blocks"])
def place_queries(counts, list_start, item_start, blocks, QUERIES_AN_ITEM: tl.constexpr, COLUMNS: tl.constexpr):
    """Write where the list and the items of each block start, `[B * Hkv, blocks + 1]` int32; the last is the end."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    lists, items = 0, 0
    for begin in range(0, blocks + 1, COLUMNS):
        block = begin + column
        count = tl.load(counts + head * blocks + block, mask=block < blocks, other=0)
        pieces = tl.cdiv(count, QUERIES_AN_ITEM)
        place = head * (blocks + 1) + block
        tl.store(list_start + place, lists + tl.cumsum(count, 0) - count, mask=block <= blocks)
        tl.store(item_start + place, items + tl.cumsum(pieces, 0) - pieces, mask=block <= blocks)
        lists += tl.sum(count, 0)
        items += tl.sum(pieces, 0)


@triton.jit(do_not_specialize=["chunk_start", "tiles", "blocks", "list_size", "items"])
def list_queries(
    words,
    list_start,
    item_start,
    queries,
    item_blocks,
    chunk_start,
    tiles,
    blocks,
    list_size,
    items,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the queries of `COLUMNS` blocks, ascending, and the block of each of their items.

    Args:
        words: as `mark_queries` wrote them.
        queries: `[B * Hkv, list_size]` int32.
        item_blocks: `[B * Hkv, items]` int32.
    """
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_block = block < blocks
    row = tl.arange(0, ROWS)
    place = tl.load(list_start + head * (blocks + 1) + block, mask=is_block, other=0)
    for tile in range(0, tiles, ROWS):
        is_word = (tile + row < tiles)[:, None] & is_block[None, :]
        found = words + (head * tiles + tile + row)[:, None] * blocks + block[None, :]
        word = tl.load(found, mask=is_word, other=0)
        count = _count_bits(word)
        here = place[None, :] + tl.cumsum(count, 0) - count
        for turn in range(_BITS):
            is_set = ((word >> turn) & 1) != 0
            query = tl.zeros_like(word) + (chunk_start + (tile + row) * _BITS + turn)[:, None]
            tl.store(queries + head * list_size + here, query, mask=is_set)
            here += is_set.to(tl.int32)
        place += tl.sum(count, 0)
    item = tl.load(item_start + head * (blocks + 1) + block, mask=is_block, other=0)
    end = tl.load(item_start + head * (blocks + 1) + block + 1, mask=is_block, other=0)
    for turn in range(0, tl.max(end - item)):
        tl.store(item_blocks + head * items + item + turn, block, mask=item + turn < end)


@triton.jit
def find_item(list_start, item_start, item_blocks, head, item, blocks, items, QUERIES_AN_ITEM: tl.constexpr):
    """Return `block, begin, end` of an item: its block, and its part of the list of the head; empty beyond the last."""
    is_item = item < tl.load(item_start + head * (blocks + 1) + blocks)
    block = tl.load(item_blocks + head * items + item, mask=is_item, other=0)
    turn = item - tl.load(item_start + head * (blocks + 1) + block)
    begin = tl.load(list_start + head * (blocks + 1) + block) + turn * QUERIES_AN_ITEM
    end = tl.minimum(begin + QUERIES_AN_ITEM, tl.load(list_start + head * (blocks + 1) + block + 1))
    return block, begin, tl.where(is_item, end, begin)
