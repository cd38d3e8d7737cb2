"""Block selection on a CPU, by a compiled kernel (`native/select_blocks.cpp`).

Arguments and result as in `op.py`. Cut into segments (`segments.py`), a call has no padding and no documents, and a
block before the local one of a query is visible as a whole. The local block is always chosen and later ones never: so
scores are a product and a maximum, in float32, of blocks as wholes. A call with a mask that bounds cannot say, or in
float64, goes to the reference, as every call does where no kernel can be compiled.
"""

import struct

import torch
from torch import Tensor

from msa_compile.kernels import native
from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.segments import find_segments
from msa_compile.kernels.select_blocks import reference

# Up to this many queries, keys are read where they are, and not packed first.
_FEW_QUERIES = 16
# Queries of a task: they stay in a core's cache while the keys pass by.
_TILE = 64


# `Selection` of the kernel: three addresses, three strides of each, thirteen sizes, two switches, threads and tile.
_SELECTION = struct.Struct("3Q 9q 15q")


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
    batch, groups, query_length, width = index_query.shape
    key_length = index_key.shape[2]
    bounds = None
    if native.holds("select_blocks", index_query.dtype):
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
    if selected.numel() == 0:
        return selected
    index_query, index_key = native.readable(index_query), native.readable(index_key)
    of_query, of_key = native.byte_strides(index_query), native.byte_strides(index_key)
    of_ids = selected.stride()[:3]
    for one in find_segments(batch=batch, query_length=query_length, key_length=key_length, **bounds):
        rows, queries = one.row_end - one.row, one.end - one.start
        # Scores of the blocks before the local one: of half the keys of a prompt.
        work = rows * groups * queries * (one.position + queries // 2) * width
        call = _SELECTION.pack(
            index_query.data_ptr() + one.row * of_query[0] + one.start * of_query[2],
            index_key.data_ptr() + one.row * of_key[0] + one.anchor * of_key[2],
            selected.data_ptr() + 4 * (one.row * of_ids[0] + one.start * of_ids[2]),
            *of_query,
            *of_key,
            *of_ids,
            rows,
            groups,
            index_key.shape[1],
            queries,
            one.length,
            width,
            one.position,
            min(block_size, one.length),
            topk,
            local_blocks,
            sink_blocks,
            queries <= _FEW_QUERIES,
            native.dtype_number(index_query.dtype),
            native.threads_for(work),
            _TILE,
        )
        native.run("select_blocks", call)
    return selected
