"""Block selection in plain torch: the specification, on any device. Arguments and result as in `op.py`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_compile.kernels.visibility import Visibility, find_visibility

# Token scores held at once, in elements; a chunk of queries is sized to it, so memory grows with Tk and never Tq * Tk.
_WORKSPACE = 1 << 21


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
    candidates: int = 0,
) -> Tensor:
    """Choose key blocks by the best visible token of each; as in `op.py`."""
    batch, groups, query_length, _ = index_query.shape
    key_length = index_key.shape[2]
    device = index_query.device
    selected = torch.full((batch, groups, query_length, topk), -1, dtype=torch.int32, device=device)
    if selected.numel() == 0 or key_length == 0:
        return selected

    blocks = -(-key_length // block_size)
    visibility = find_visibility(
        query_length=query_length,
        key_length=key_length,
        device=device,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
        is_causal=is_causal,
    )
    is_anchored_at_zero = key_start is None and document_start is None
    precision = torch.float64 if index_query.dtype == torch.float64 else torch.float32
    index_key = index_key.to(precision)
    rounded_key = round_to_e4m3(index_key) if candidates else None
    budget = {"block_size": block_size, "local_blocks": local_blocks, "sink_blocks": sink_blocks}
    step = max(1, _WORKSPACE // (batch * groups * blocks * block_size))
    for start in range(0, query_length, step):
        end = min(start + step, query_length)
        seen = visibility.rows(start, end)
        slots = None
        if is_anchored_at_zero:
            visible = F.pad(seen.of_all_slots(), (0, blocks * block_size - key_length), value=False)
        else:
            slots = seen.anchor[:, None, :, None] + torch.arange(blocks * block_size, device=device)
            visible = seen.of_slots(slots)
        queries = index_query[:, :, start:end].to(precision)
        ranks = _rank_blocks(_score_tokens(queries, index_key), slots, visible, seen, **budget)
        if rounded_key is not None:
            scores = _score_tokens(round_to_e4m3(queries), rounded_key)
            first = _rank_blocks(scores, slots, visible, seen, **budget)
            least = first.topk(min(candidates, blocks), dim=-1).values[..., -1:]
            ranks = ranks.masked_fill(first < least, -torch.inf)
        chosen = _choose(ranks, topk)
        selected[:, :, start:end, : chosen.shape[-1]] = chosen
    return selected


def round_to_e4m3(rows: Tensor) -> Tensor:
    """Round rows of index queries or keys to e4m3, each by a scale of its own; the result keeps the dtype of `rows`.

    A scale is the power of two that brings the largest number of a row to between 128 and 256, of the 448 that e4m3
    reaches: so nothing is lost by scaling where all numbers are at least 2**-13 of the largest, and what has 3 bits of
    mantissa comes back unchanged. A row that is not finite becomes NaN.
    """
    exponent = torch.frexp(rows.abs().amax(-1, keepdim=True)).exponent.clamp(-118, 128)
    scaled = torch.ldexp(rows, 8 - exponent).to(torch.float32).to(torch.float8_e4m3fn)
    rounded = torch.ldexp(scaled.to(rows.dtype), exponent - 8)
    return rounded.masked_fill(~rows.isfinite().all(-1, keepdim=True), torch.nan)


def _score_tokens(index_query: Tensor, index_key: Tensor) -> Tensor:
    """Return `<index_query, index_key>`, `[B, Hkv, Tq, Tk]`, for `index_key` of one head or `Hkv`."""
    if index_key.shape[1] == index_query.shape[1]:
        return index_query @ index_key.transpose(-1, -2)
    # One shared key head: the groups become rows of one product, which does not copy the keys once a group.
    batch, groups, query_length, width = index_query.shape
    scores = index_query.reshape(batch, groups * query_length, width) @ index_key[:, 0].transpose(-1, -2)
    return scores.view(batch, groups, query_length, -1)


def _rank_blocks(
    scores: Tensor,
    slots: Tensor | None,
    visible: Tensor,
    seen: Visibility,
    *,
    block_size: int,
    local_blocks: int,
    sink_blocks: int,
) -> Tensor:
    """Rank blocks by their best visible token.

    Args:
        scores: `[B, Hkv, Tq, Tk]`, of tokens; anything where not visible.
        slots: `[B|1, 1, Tq, N * block_size]` int64, those of the blocks, block after block; default `0, 1, ...`.
        visible: `[B|1, Hkv|1, Tq, N * block_size]` bool, whether they are seen; what is no slot is not.
        seen: visibility of the same queries.
        block_size: tokens a block.
        local_blocks: newest blocks that are always chosen.
        sink_blocks: oldest blocks that are always chosen.

    Returns:
        `[B, Hkv, Tq, N]`: the scores, finite; +inf for blocks that are always chosen, -inf for those that never are.
    """
    if slots is None:
        scores = F.pad(scores, (0, visible.shape[-1] - scores.shape[-1]))
    else:
        scores = scores.gather(-1, slots.clamp(max=scores.shape[-1] - 1).expand(*scores.shape[:3], -1))
    # Masked before the maximum: an invisible slot may hold NaN, and a visible NaN must not hide its neighbours.
    scores = scores.masked_fill(~visible | scores.isnan(), -torch.inf)
    by_block = scores.view(*scores.shape[:3], -1, block_size).amax(-1)
    has_visible = visible.view(*visible.shape[:3], -1, block_size).any(-1)

    block = torch.arange(by_block.shape[-1], device=scores.device)
    local = torch.div(seen.position - seen.anchor, block_size, rounding_mode="floor")[:, None, :, None]
    is_forced = ((block <= local) & (block > local - local_blocks)) | (block < sink_blocks)

    finite = torch.finfo(by_block.dtype)
    rank = by_block.clamp(finite.min, finite.max).masked_fill(is_forced, torch.inf)
    return rank.masked_fill(~has_visible, -torch.inf)


def _choose(rank: Tensor, topk: int) -> Tensor:
    """Return the ids of the `topk` highest ranks, `[B, Hkv, Tq, min(topk, N)]` int64, ascending, -1 on the right."""
    # Stable: equal scores keep the order of their ids. topk() promises no order among ties.
    best = rank.sort(dim=-1, descending=True, stable=True)
    last = rank.shape[-1]
    chosen = best.indices[..., :topk].masked_fill(best.values[..., :topk] == -torch.inf, last)
    chosen = chosen.sort(dim=-1).values
    return chosen.masked_fill(chosen == last, -1)
