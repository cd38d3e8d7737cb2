"""Block selection on a CPU, by a compiled kernel (`native/select_blocks.cpp`).

Arguments and result as in `op.py`. Cut into segments (`segments.py`), a call has no padding and no documents, and a
block before the local one of a query is visible as a whole. The local block is always chosen and later ones never: so
scores are a product and a maximum, in float32, of blocks as wholes. A call with a mask that bounds cannot say, or in
float64, goes to the reference, as every call does where no kernel can be compiled.
"""

import ctypes

import torch
from torch import Tensor

from msa_compile.kernels import native
from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.segments import Segment, find_segments
from msa_compile.kernels.select_blocks import reference

# Up to this many queries, keys are read where they are, and not packed first.
_FEW_QUERIES = 16
# Queries of a task: they stay in a core's cache while the keys pass by.
_TILE = 64


class _Selection(ctypes.Structure):
    """`Selection` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "ids")),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides", "ids_strides")),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "key_heads", "queries", "length", "width")),
        *((name, ctypes.c_int64) for name in ("position", "block_size", "topk", "local_blocks", "sink_blocks")),
        *((name, ctypes.c_int64) for name in ("is_few", "dtype", "threads", "tile")),
    )


def select_blocks(
    index_query: Tensor,
    index_key: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Choose key blocks by the best visible token of each; as in `op.py`."""
    batch, groups, query_length, _ = index_query.shape
    key_length = index_key.shape[2]
    bounds = None
    if native.holds(index_query.dtype):
        bounds = find_closed_form(
            batch=batch,
            query_length=query_length,
            key_length=key_length,
            device=index_query.device,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        )
    if bounds is None:
        return reference.select_blocks(
            index_query,
            index_key,
            block_size=block_size,
            topk=topk,
            local_blocks=local_blocks,
            sink_blocks=sink_blocks,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        )
    selected = index_query.new_full((batch, groups, query_length, topk), -1, dtype=torch.int32)
    index_query, index_key = native.readable(index_query), native.readable(index_key)
    for one in find_segments(batch=batch, query_length=query_length, key_length=key_length, **bounds):
        query, key, ids = _cut(one, index_query, index_key, selected)
        queries, width = query.shape[2:]
        # Scores of the blocks before the local one; below, of half the keys.
        work = query.shape[0] * groups * queries * (one.position + queries / 2) * width
        native.run(
            "select_blocks",
            _Selection(
                query.data_ptr(),
                key.data_ptr(),
                ids.data_ptr(),
                native.byte_strides(query),
                native.byte_strides(key),
                ids.stride()[:3],
                query.shape[0],
                groups,
                key.shape[1],
                queries,
                key.shape[2],
                width,
                one.position,
                block_size,
                topk,
                local_blocks,
                sink_blocks,
                queries <= _FEW_QUERIES,
                native.dtype_number(query.dtype),
                native.threads_for(work),
                _TILE,
            ),
        )
    return selected


def _cut(segment: Segment, index_query: Tensor, index_key: Tensor, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, queries = slice(segment.row, segment.row_end), slice(segment.start, segment.end)
    slots = slice(segment.anchor, segment.anchor + segment.length)
    return index_query[rows, :, queries], index_key[rows, :, slots], selected[rows, :, queries]
