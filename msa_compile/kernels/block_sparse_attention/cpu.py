"""Block-sparse attention on a CPU, by compiled kernels (`native/block_sparse_attention.cpp`).

Arguments and result as in `op.py`. Sums are in float32; products too, but those of bfloat16 where the machine has them,
and then the weights of values are rounded to it. A call in float64, or with a mask that bounds cannot say, goes to the
reference, as every call does where no kernel can be compiled.
"""

import math
import struct

import torch
from torch import Tensor

from msa_compile.kernels import native
from msa_compile.kernels.block_sparse_attention import reference
from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.segments import Segment, find_segments

# Up to this many queries, keys and values are read where they are, and not packed first.
_FEW_QUERIES = 16
# Floats of the outputs of the queries that stay in a core's cache while blocks pass by.
_TILE_FLOATS = 1 << 16
# Packed keys and values of as many heads at once as fit here, and of one at least.
_PACKED_BYTES = 1 << 28


# `Attention` of the kernels: six addresses, three strides of the first four and the last, ten sizes, two factors, two
# switches, threads and workspace.
_ATTENTION = struct.Struct("6Q 15q 10q 2f 5q")
# `Backward` goes on: the gradient of the output, four results, and their strides.
_BACKWARD = struct.Struct("Q 3q 4Q 8q")


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Attend to the visible tokens of the selected blocks; as in `op.py`."""
    batch, _, query_length, _ = query.shape
    key_length = key.shape[2]
    bounds = None
    if native.holds("block_sparse_attention", query.dtype):
        bounds = find_closed_form(
            batch=batch,
            query_length=query_length,
            key_length=key_length,
            device=query.device,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        )
    if bounds is None:
        return reference.block_sparse_attention(
            query,
            key,
            value,
            block_ids,
            block_size=block_size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            window=window,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        )
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output.to(query.dtype)
    query, key, value = native.readable(query), native.readable(key), native.readable(value)
    block_ids = block_ids.contiguous()
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    for one in find_segments(batch=batch, query_length=query_length, key_length=key_length, **bounds):
        call = _describe(
            one,
            query,
            key,
            value,
            block_ids,
            sinks,
            output,
            block_size=block_size,
            scale=scale,
            softcap=softcap,
            window=window,
        )
        native.run("block_sparse_attention", call)
    return output.to(query.dtype)


def block_sparse_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> reference.Gradients:
    """Differentiate `block_sparse_attention`, recomputing its softmax; `grad_output` is `[B, Hq, Tq, D]`.

    In float32 for every dtype. A call in which a query, or a key that some query may see, is not finite goes to the
    reference, as a call in float64 or with a mask that bounds cannot say does.
    """
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    bounds = None
    if query.numel() > 0 and native.holds("block_sparse_attention_backward", query.dtype):
        bounds = find_closed_form(
            batch=batch,
            query_length=query_length,
            key_length=key_length,
            device=query.device,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        )
    is_covered = False
    segments: list[Segment] = []
    if bounds is not None:
        segments = find_segments(batch=batch, query_length=query_length, key_length=key_length, **bounds)
        is_covered = all(_is_finite(one, (query, grad_output), (key, value)) for one in segments)
    if not is_covered:
        return reference.block_sparse_attention_backward(
            grad_output,
            query,
            key,
            value,
            block_ids,
            block_size=block_size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            window=window,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        )
    query, key, value = native.readable(query), native.readable(key), native.readable(value)
    grad_output, block_ids = native.readable(grad_output), block_ids.contiguous()
    grad_query, grad_key, grad_value = (
        torch.zeros(tensor.shape, dtype=torch.float32, device=query.device) for tensor in (query, key, value)
    )
    of_sinks = None if sinks is None else grad_query.new_zeros(batch, heads, query_length)
    plain_sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    for one in segments:
        rows, queries = slice(one.row, one.row_end), slice(one.start, one.end)
        slots = slice(one.anchor, one.anchor + one.length)
        of_query = grad_query[rows, :, queries]
        of_key, of_value = grad_key[rows, :, slots], grad_value[rows, :, slots]
        of_sink = None if of_sinks is None else of_sinks[rows, :, queries]
        forward = _describe(
            one,
            query,
            key,
            value,
            block_ids,
            plain_sinks,
            None,
            block_size=block_size,
            scale=scale,
            softcap=softcap,
            window=window,
        )
        strides = native.byte_strides(grad_output)
        rest = _BACKWARD.pack(
            grad_output.data_ptr() + one.row * strides[0] + one.start * strides[2],
            *strides,
            of_query.data_ptr(),
            of_key.data_ptr(),
            of_value.data_ptr(),
            0 if of_sink is None else of_sink.data_ptr(),
            *of_query.stride()[:3],
            *of_key.stride()[:3],
            *((0, 0) if of_sink is None else of_sink.stride()[:2]),
        )
        native.run("block_sparse_attention_backward", forward + rest)
    return reference.Gradients(
        grad_query.to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        None if sinks is None or of_sinks is None else -of_sinks.sum((0, 2)).to(sinks.dtype),
    )


def _describe(
    segment: Segment,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    sinks: Tensor | None,
    output: Tensor | None,
    *,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    window: int | None,
) -> bytes:
    """Describe the part of a call that is a segment; `output` is None where there is none."""
    # Addresses are computed: a slice of a tensor is an object, and a decode step would feel eleven of them.
    of_query, of_key, of_value = (native.byte_strides(tensor) for tensor in (query, key, value))
    of_ids, of_output = block_ids.stride()[:3], (0, 0, 0) if output is None else output.stride()[:3]
    row, start, anchor = segment.row, segment.start, segment.anchor
    _, heads, _, head_dim = query.shape
    groups, topk = key.shape[1], block_ids.shape[3]
    rows, queries = segment.row_end - row, segment.end - start
    return _ATTENTION.pack(
        query.data_ptr() + row * of_query[0] + start * of_query[2],
        key.data_ptr() + row * of_key[0] + anchor * of_key[2],
        value.data_ptr() + row * of_value[0] + anchor * of_value[2],
        block_ids.data_ptr() + 4 * (row * of_ids[0] + start * of_ids[2]),
        0 if sinks is None else sinks.data_ptr(),
        0 if output is None else output.data_ptr() + 4 * (row * of_output[0] + start * of_output[2]),
        *of_query,
        *of_key,
        *of_value,
        *of_ids,
        *of_output,
        rows,
        groups,
        heads // groups,
        queries,
        segment.length,
        head_dim,
        segment.position,
        min(block_size, segment.length),
        topk,
        0 if window is None else window,
        head_dim**-0.5 if scale is None else scale,
        0.0 if softcap is None else softcap,
        queries <= _FEW_QUERIES,
        native.dtype_number(query.dtype),
        native.threads_for(2 * rows * heads * queries * head_dim * topk * block_size),
        _TILE_FLOATS,
        _PACKED_BYTES,
    )


def _is_finite(segment: Segment, of_queries: tuple[Tensor, Tensor], of_keys: tuple[Tensor, Tensor]) -> bool:
    rows = slice(segment.row, segment.row_end)
    queries, keys = slice(segment.start, segment.end), slice(segment.anchor, segment.anchor + segment.length)
    tensors = [tensor[rows, :, queries] for tensor in of_queries] + [tensor[rows, :, keys] for tensor in of_keys]
    # A sum is finite if nothing in it is infinite or NaN, unless it overflows; and then only time is lost.
    return all(math.isfinite(float(tensor.sum(dtype=torch.float32))) for tensor in tensors)
