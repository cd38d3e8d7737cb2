"""What the Triton kernels of both families say in the same words: what a row of queries sees, and a matrix product.

Only the modules named `triton*.py` import this one, and only a call on CUDA (or a test of them) imports those.
"""

import triton
import triton.language as tl

# True where kernels run as numpy under TRITON_INTERPRET=1, whose product of bfloat16 multiplies bit patterns.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right):
    """Return `left @ right` in float32; float32 operands go through matrix units in three parts, not rounded to one."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def bounds_of_rows(
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
    IS_CAUSAL: tl.constexpr,
):
    """Return `position, anchor, first, stop` of queries of one row of the batch, as in `visibility.py`, int32.

    A query that does not exist has a `stop` of 0 and sees nothing. An argument that is None is not there.
    """
    offset = key_length - query_length
    if query_start is not None:
        offset = tl.load(query_start + batch).to(tl.int32)
    position = offset + query
    anchor = tl.zeros_like(query)
    if key_start is not None:
        anchor = tl.maximum(anchor, tl.load(key_start + batch).to(tl.int32))
    if document_start is not None:
        place = batch.to(tl.int64) * query_length + query
        anchor = tl.maximum(anchor, tl.load(document_start + place, mask=is_query, other=0).to(tl.int32))
    end = key_length
    if key_end is not None:
        end = tl.minimum(tl.load(key_end + batch).to(tl.int32), key_length)
    stop = tl.zeros_like(query) + end
    if IS_CAUSAL:
        stop = tl.minimum(stop, position + 1)
    first = anchor
    if window is not None:
        first = tl.maximum(anchor, position - window + 1)
    return position, anchor, first, tl.where(is_query, stop, 0)
