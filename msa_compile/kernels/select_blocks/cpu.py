"""Block selection on a CPU: whole blocks are scored without a token mask, because only the local one needs it.

Arguments and result as in `op.py`. Cut into segments (`segments.py`), a call has no padding and no documents, and a
block before the local one of a query is visible as a whole. The local block is always chosen and later ones never: so
scores are a product and a maximum, in float32, and what is computed of a block that a query may not choose is
overwritten. A call with a mask that bounds cannot say, or in float64, goes to the reference.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_compile._compat import multiply_rows
from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.segments import Segment, find_segments
from msa_compile.kernels.select_blocks import reference
from msa_compile.kernels.threads import run_all

# Queries of a task, keys of a product, and block scores held at once by a task. The product of a tile of queries and
# one of keys should stay in a core's cache.
_QUERY_TILE = 1024
_KEY_TILE = 512
_KEY_TILE_OF_FEW_QUERIES = 8192
_WORKSPACE = 1 << 21
# Rows of a product are rounded up to this: oneDNN prepares and keeps code for every size that it meets.
_ROWS = 128
# Up to this many queries, products are bound by memory.
_FEW_QUERIES = 32
# Up to this many scores torch does not split an operation among its threads.
_FEW_SCORES = 1 << 15


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
    bounds = find_closed_form(
        batch=batch,
        query_length=query_length,
        key_length=index_key.shape[2],
        device=index_query.device,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
        is_causal=is_causal,
    )
    if bounds is None or index_query.dtype == torch.float64:
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
    segments = find_segments(batch=batch, query_length=query_length, key_length=index_key.shape[2], **bounds)
    tasks: list[Callable[[], None]] = []
    for segment in segments:
        for rows, heads, start, end in _cut(segment, groups, block_size):
            key_heads = heads if index_key.shape[1] == groups else slice(0, 1)
            anchor = segment.anchor
            tasks.append(
                partial(
                    _select,
                    index_query[rows, heads, start:end],
                    index_key[rows, key_heads, anchor : anchor + segment.length],
                    selected[rows, heads, start:end],
                    position=segment.position + start - segment.start,
                    block_size=block_size,
                    local_blocks=local_blocks,
                    sink_blocks=sink_blocks,
                )
            )
    run_all(tasks)
    return selected


def _cut(segment: Segment, groups: int, block_size: int) -> list[tuple[slice, slice, int, int]]:
    """Cut a segment into tasks `(rows, heads, first query, one past the last)`: one, if it is small."""
    queries = segment.end - segment.start
    rows = segment.row_end - segment.row
    if queries * groups * rows * segment.length <= _FEW_SCORES:
        return [(slice(segment.row, segment.row_end), slice(0, groups), segment.start, segment.end)]
    step = max(1, min(_QUERY_TILE, _WORKSPACE * block_size // segment.length))
    return [
        (slice(row, row + 1), slice(head, head + 1), start, min(start + step, segment.end))
        # The longest tasks first, so that no thread is left alone with one at the end.
        for start in reversed(range(segment.start, segment.end, step))
        for row in range(segment.row, segment.row_end)
        for head in range(groups)
    ]


def _select(
    index_query: Tensor,
    index_key: Tensor,
    selected: Tensor,
    *,
    position: int,
    block_size: int,
    local_blocks: int,
    sink_blocks: int,
) -> None:
    """Choose the blocks of one task.

    Args:
        index_query: `[B, Hkv, C, D]`, at the slots `position .. position + C - 1`.
        index_key: `[B, Hkv|1, L, D]`, from the anchor to the last visible slot.
        selected: `[B, Hkv, C, topk]` int32, all -1: where the ids go.
        position: slot of the first query, counted from the anchor.
        block_size: slots a block.
        local_blocks: newest blocks that are always chosen.
        sink_blocks: oldest blocks that are always chosen.
    """
    queries, topk = selected.shape[2:]
    local = torch.arange(position, position + queries, device=selected.device)[:, None] // block_size
    # Blocks with a slot that the last query sees.
    blocks = min((position + queries - 1) // block_size + 1, -(-index_key.shape[2] // block_size))
    block = torch.arange(blocks, device=selected.device)
    if blocks <= topk:
        # Room for all of them: no score matters.
        selected[..., :blocks] = torch.where(block <= local, block, -1).to(torch.int32)
        return
    scores = _score_blocks(index_query, index_key, blocks, block_size, ignore_nan=False)
    if scores.isnan().any():
        # Of a token that is not visible yet, or of one that must not hide its neighbours.
        scores = _score_blocks(index_query, index_key, blocks, block_size, ignore_nan=True)
    # Finite scores leave +inf to forced blocks and -inf to blocks that cannot be chosen, so one ranking holds them all.
    finite = torch.finfo(scores.dtype)
    rank = scores.clamp_(finite.min, finite.max)
    rank.masked_fill_((block > local - local_blocks) | (block < sink_blocks), torch.inf)
    rank.masked_fill_(block > local, -torch.inf)
    selected.copy_(_best(rank, topk))


def _best(rank: Tensor, topk: int) -> Tensor:
    """Return the ids of the highest ranks, ascending, -1 on the right.

    Args:
        rank: `[..., N]`, `N > topk`; +inf where forced, -inf where not to be chosen. Equal ranks go to the lower id.
        topk: most ids to return.

    Returns:
        `[..., topk]` int64.
    """
    last = rank.shape[-1]
    values, indices = rank.topk(topk + 1, dim=-1)
    # topk() promises no order among ties. Inside the best ones that changes nothing; across their edge it does.
    is_tied = (values[..., -1] == values[..., -2]) & (values[..., -1] > -torch.inf)
    chosen = indices[..., :-1].masked_fill(values[..., :-1] == -torch.inf, last)
    if is_tied.any():
        best = rank[is_tied].sort(dim=-1, descending=True, stable=True)
        chosen[is_tied] = best.indices[..., :topk].masked_fill(best.values[..., :topk] == -torch.inf, last)
    chosen = chosen.sort(dim=-1).values
    return chosen.masked_fill_(chosen == last, -1)


def _score_blocks(index_query: Tensor, index_key: Tensor, blocks: int, block_size: int, *, ignore_nan: bool) -> Tensor:
    """Return the best token score of each block, `[B, Hkv, C, N]` float32, visible or not."""
    batch, groups, queries, _ = index_query.shape
    if index_key.shape[1] != groups:
        # One shared key head: the groups become rows of one product.
        index_query = index_query.flatten(1, 2)[:, None]
    # Head by head: torch splits a batch of products among threads that wait for each other, however small they are.
    scores = [
        _score_head(query, key, blocks, block_size, ignore_nan=ignore_nan)
        for of_row in zip(index_query, index_key, strict=True)
        for query, key in zip(*of_row, strict=True)
    ]
    return torch.stack(scores).view(batch, groups, queries, blocks)


def _score_head(query: Tensor, key: Tensor, blocks: int, block_size: int, *, ignore_nan: bool) -> Tensor:
    """Return `[C, N]` for a query `[C, D]` and a key `[L, D]`.

    The keys are cast to float32 a tile at a time, so nothing but the result grows with their number.
    """
    queries = len(query)
    is_few = queries <= _FEW_QUERIES
    query = query.to(torch.float32)
    if not is_few:
        query = _pad(query, queries + -queries % _ROWS)
    scores = query.new_empty((len(query), blocks))
    step = max(1, (_KEY_TILE_OF_FEW_QUERIES if is_few else _KEY_TILE) // block_size)
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        tile = key[first * block_size : last * block_size].to(torch.float32)
        of_tokens = query @ tile.t() if is_few else multiply_rows(query, _pad(tile, (last - first) * block_size))
        if ignore_nan:
            of_tokens = of_tokens.masked_fill_(of_tokens.isnan(), -torch.inf)
        # The last block may be cut off by the end of the keys.
        whole = len(tile) // block_size
        by_block = of_tokens[:, : whole * block_size].unflatten(-1, (whole, block_size))
        scores[:, first : first + whole] = by_block.amax(-1)
        if first + whole < last:
            scores[:, last - 1] = of_tokens[:, whole * block_size : len(tile)].amax(-1)
    return scores[:queries]


def _pad(rows: Tensor, length: int) -> Tensor:
    """Return `[length, D]`: the rows, then zeros."""
    return rows if len(rows) == length else F.pad(rows, (0, 0, 0, length - len(rows)))
