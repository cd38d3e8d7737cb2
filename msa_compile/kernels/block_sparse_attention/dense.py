"""The dense path: attention to every visible token, where a call is too short for blocks to pay."""

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_compile.kernels.block_sparse_attention import reference
from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.segments import Segment, find_segments
from msa_compile.kernels.visibility import find_visibility


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Attend to every visible token; arguments and result as in `op.py`, block ids left out."""
    # SDPA gives NaN for what is masked where the scale is not positive.
    if softcap is not None or sinks is not None or (scale is not None and scale <= 0):
        return reference.dense_attention(
            query,
            key,
            value,
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
    query_length, key_length = query.shape[2], key.shape[2]
    if query.numel() == 0 or key_length == 0:
        return query.new_zeros(query.shape)
    # Cut where the bounds are known without waiting for a device.
    if window is None and query.device.type == "cpu":
        found = find_closed_form(
            batch=query.shape[0],
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
        if found is not None:
            segments = find_segments(batch=query.shape[0], query_length=query_length, key_length=key_length, **found)
            return _attend_segments(query, key, value, segments, scale)
    bounds = (window, query_start, key_start, key_end, document_start, mask)
    is_plain = all(bound is None for bound in bounds)
    if is_plain and (query_length == key_length or query_length == 1 or not is_causal):
        # The one newest query sees every key; a square of queries is what SDPA's flag means.
        flag = is_causal and query_length > 1
        output = F.scaled_dot_product_attention(query, key, value, is_causal=flag, scale=scale, enable_gqa=True)
        return output.contiguous()
    visible = find_visibility(
        query_length=query_length,
        key_length=key_length,
        device=query.device,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
        is_causal=is_causal,
    ).of_all_slots()
    # Slots that no query sees may hold anything, and softmax weight 0 times NaN is NaN.
    is_seen = visible.any(-2)[..., None]
    key, value = torch.where(is_seen, key, 0), torch.where(is_seen, value, 0)
    sees_any = visible.any(-1, keepdim=True)
    if visible.shape[1] > 1:
        heads_a_group = query.shape[1] // key.shape[1]
        visible = visible.repeat_interleave(heads_a_group, dim=1)
        sees_any = sees_any.repeat_interleave(heads_a_group, dim=1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    return torch.where(sees_any, output, 0).contiguous()


def _attend_segments(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scale: float | None) -> Tensor:
    """Attend segment by segment: each is a plain causal call, and padding costs nothing."""
    parts = []
    for segment in segments:
        rows, queries = slice(segment.row, segment.row_end), slice(segment.start, segment.end)
        slots = slice(segment.anchor, segment.anchor + segment.length)
        tensors = query[rows, :, queries], key[rows, :, slots], value[rows, :, slots]
        parts.append(_attend_causally(*tensors, position=segment.position, scale=scale))
    if len(parts) == 1 and parts[0].shape == query.shape:
        return parts[0].contiguous()
    output = query.new_zeros(query.shape)
    for segment, part in zip(segments, parts, strict=True):
        output[segment.row : segment.row_end, :, segment.start : segment.end] = part
    return output


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, *, position: int, scale: float | None) -> Tensor:
    """Attend to the keys `0 .. position + i` for query `i`; the last query sees all of them."""
    batch, heads, queries, head_dim = query.shape
    groups, length = key.shape[1:3]
    if queries == 1:
        # The heads of a group as queries of one head: one product a group instead of one a head.
        by_group = query.reshape(batch, groups, heads // groups, head_dim)
        return F.scaled_dot_product_attention(by_group, key, value, scale=scale).reshape(query.shape)
    is_square = position == 0 and queries == length
    # What is_causal means is aligned with the first key: right for a square only.
    mask = None if is_square else torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(position)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_square, scale=scale, enable_gqa=True
    )
