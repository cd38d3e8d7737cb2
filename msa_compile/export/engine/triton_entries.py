"""Entries of the GPU kernels as a plugin calls them: tensors in, tensors out, and nothing else.

A plugin has no strides and no offsets to hand over, and cannot leave an argument out. Its tensors are contiguous, so
the strides follow from the lengths; what is fixed when the engine is built is a constant here; and a tensor that says
nothing (positions that are the default, no padding) is not read. The two lengths are a tensor too: of the numbers that
a plugin may pass, TensorRT 11.0 documents that they come before the outputs, and later examples of torch-tensorrt that
they come after them. The kernels are those of the GPU, unchanged.
"""

import triton
import triton.language as tl

from msa_compile.kernels.block_sparse_attention.triton_lists import list_blocks
from msa_compile.kernels.block_sparse_attention.triton_tiles import attend_tiles
from msa_compile.kernels.select_blocks.triton_choose import choose_blocks
from msa_compile.kernels.select_blocks.triton_scores import score_blocks


@triton.jit
def lengths_of_call(lengths):
    """Return `Tq, Tk`, int32, of the tensor that holds them."""
    return tl.load(lengths).to(tl.int32), tl.load(lengths + 1).to(tl.int32)


@triton.jit
def score_blocks_entry(
    index_query,
    index_key,
    query_start,
    key_start,
    key_visible,
    lengths,
    scores,
    GROUPS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS_A_SPLIT: tl.constexpr,
    IS_PADDED: tl.constexpr,
    IS_POSITIONED: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    PACKED_GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write `scores`, `[B, Hkv, N, Tq]` float32, as `score_blocks` does."""
    query_length, key_length = lengths_of_call(lengths)
    queries, keys = query_length.to(tl.int64), key_length.to(tl.int64)
    score_blocks(
        index_query,
        index_key,
        None,
        scores,
        query_start if IS_POSITIONED else None,
        key_start if IS_PADDED else None,
        None,
        None,
        key_visible if IS_PADDED else None,
        queries * (GROUPS * WIDTH),
        queries * WIDTH,
        WIDTH,
        keys * (KEY_HEADS * WIDTH),
        keys * WIDTH if KEY_HEADS > 1 else 0,
        WIDTH,
        0,
        0,
        keys,
        0,
        0,
        1,
        queries * tl.cdiv(keys, BLOCK_SIZE),
        queries,
        0,
        query_length,
        query_length,
        key_length,
        BLOCKS_A_SPLIT,
        GROUPS,
        BLOCK_SIZE,
        WIDTH,
        True,
        WIDTH_TILE,
        PACKED_GROUPS,
        QUERIES,
        BLOCKS,
        SLOTS,
        PIECES,
    )


@triton.jit
def choose_blocks_entry(
    scores,
    query_start,
    key_start,
    lengths,
    block_ids,
    GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    IS_PADDED: tl.constexpr,
    IS_POSITIONED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write `block_ids` from `scores` as `choose_blocks` does."""
    query_length, key_length = lengths_of_call(lengths)
    queries = query_length.to(tl.int64)
    choose_blocks(
        scores,
        block_ids,
        query_start if IS_POSITIONED else None,
        key_start if IS_PADDED else None,
        None,
        None,
        queries * tl.cdiv(key_length, BLOCK_SIZE),
        queries,
        0,
        query_length,
        query_length,
        key_length,
        GROUPS,
        TOPK,
        LOCAL_BLOCKS,
        SINK_BLOCKS,
        BLOCK_SIZE,
        True,
        ROWS,
        COLUMNS,
        PLACES,
    )


@triton.jit
def list_blocks_entry(
    block_ids,
    query_start,
    key_start,
    lengths,
    starts,
    members,
    counts,
    GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    IS_PADDED: tl.constexpr,
    IS_POSITIONED: tl.constexpr,
    QUERIES: tl.constexpr,
    PLACES: tl.constexpr,
    PART: tl.constexpr,
):
    """Write the lists of all tiles as `list_blocks` does."""
    query_length, key_length = lengths_of_call(lengths)
    list_blocks(
        block_ids,
        starts,
        members,
        counts,
        query_start if IS_POSITIONED else None,
        key_start if IS_PADDED else None,
        None,
        None,
        0,
        query_length,
        key_length,
        None,
        GROUPS,
        TOPK,
        BLOCK_SIZE,
        True,
        QUERIES,
        PLACES,
        PART,
    )


@triton.jit
def attend_blocks_entry(
    query,
    key,
    value,
    starts,
    members,
    counts,
    query_start,
    key_start,
    key_visible,
    lengths,
    sinks,
    output,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    IS_PADDED: tl.constexpr,
    IS_POSITIONED: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Write `output` from the lists as `attend_tiles` does; `sinks` and `SOFTCAP` are None where there are none."""
    query_length, key_length = lengths_of_call(lengths)
    queries, keys = query_length.to(tl.int64), key_length.to(tl.int64)
    attend_tiles(
        query,
        key,
        value,
        output,
        starts,
        members,
        counts,
        sinks,
        query_start if IS_POSITIONED else None,
        key_start if IS_PADDED else None,
        None,
        None,
        key_visible if IS_PADDED else None,
        queries * (GROUPS * HEADS * HEAD_DIM),
        queries * HEAD_DIM,
        HEAD_DIM,
        keys * (GROUPS * HEAD_DIM),
        keys * HEAD_DIM,
        HEAD_DIM,
        keys * (GROUPS * HEAD_DIM),
        keys * HEAD_DIM,
        HEAD_DIM,
        keys,
        0,
        0,
        1,
        SCALE,
        SOFTCAP,
        0,
        query_length,
        key_length,
        None,
        GROUPS,
        LIST_SIZE,
        BLOCK_SIZE,
        HEAD_DIM,
        HEADS,
        True,
        CHANNELS,
        HEADS_TILE,
        QUERIES,
        SLOTS,
        PIECES,
    )
