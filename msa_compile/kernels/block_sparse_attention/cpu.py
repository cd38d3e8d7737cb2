"""Block-sparse attention on a CPU, a key block at a time.

Arguments and result as in `op.py`. The work is turned around: not every query gathers its blocks, but every block meets
all the queries that selected it in one product of up to a thousand rows (the heads of a group share the selection, so
a query has `G` rows). Each such piece is a softmax over one block; the pieces of a query are merged at the end,
weighted by their shares of the whole. The maximum and the sum of a piece stay apart until then: no logit overflows.

Products are in float32 whatever the inputs are, by oneDNN, and only the result is rounded. A call in float64, or with a
mask that bounds cannot say, goes to the reference.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention import reference
from msa_compile.kernels.block_sparse_attention.cpu_backward import GroupGradients, differentiate
from msa_compile.kernels.block_sparse_attention.cpu_decode import attend_few_queries
from msa_compile.kernels.block_sparse_attention.cpu_pairs import find_pairs
from msa_compile.kernels.block_sparse_attention.cpu_pieces import Blocks, Softmax, find_shares, merge, run_pieces
from msa_compile.kernels.closed_form import find_closed_form
from msa_compile.kernels.segments import Segment, find_segments
from msa_compile.kernels.threads import Scratch, run_all

# Up to this many queries, each gathers its own blocks.
_FEW_QUERIES = 16
# Elements of the results of pieces that a task holds until it merges them, and that all tasks together do.
_WORKSPACE = 1 << 25
_WORKSPACE_OF_ALL = 1 << 26
# Queries that a task should have, in rows a block: fewer make products too thin, more only take memory.
_ROWS_A_BLOCK = 2048


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
    batch, heads, query_length, head_dim = query.shape
    bounds = find_closed_form(
        batch=batch,
        query_length=query_length,
        key_length=key.shape[2],
        device=query.device,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
        is_causal=is_causal,
    )
    if bounds is None or query.dtype == torch.float64:
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
    if query.numel() == 0:
        return query.new_zeros(query.shape)
    groups, topk = key.shape[1], block_ids.shape[-1]
    heads_a_group = heads // groups
    scale = head_dim**-0.5 if scale is None else scale
    if query_length <= _FEW_QUERIES:
        return attend_few_queries(
            query,
            key,
            value,
            block_ids,
            block_size=block_size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            window=window,
            **bounds,
        )
    output = query.new_zeros(query.shape)
    segments = find_segments(batch=batch, query_length=query_length, key_length=key.shape[2], **bounds)
    softmax = Softmax(block_size, scale, softcap, window)
    scratch = Scratch()
    tasks: list[Callable[[], None]] = []
    for segment in segments:
        step = _step(segment, heads_a_group * topk, head_dim, block_size, torch.get_num_threads())
        slots = slice(segment.anchor, segment.anchor + segment.length)
        for start in range(segment.start, segment.end, step):
            end = min(start + step, segment.end)
            for row in range(segment.row, segment.row_end):
                for group in range(groups):
                    of_group = slice(group * heads_a_group, (group + 1) * heads_a_group)
                    tasks.append(
                        partial(
                            _attend,
                            query[row, of_group, start:end],
                            Blocks(key[row, group, slots], value[row, group, slots], block_size),
                            block_ids[row, group, start:end],
                            None if sinks is None else sinks[of_group],
                            output[row, of_group, start:end],
                            position=segment.position + start - segment.start,
                            softmax=softmax,
                            scratch=scratch,
                        )
                    )
    run_all(tasks)
    return output


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

    A call in which a query, or a key that some query may see, is not finite goes to the reference, as a call in
    float64 or with a mask that bounds cannot say does.
    """
    batch, heads, query_length, head_dim = query.shape
    groups, key_length = key.shape[1:3]
    bounds = find_closed_form(
        batch=batch,
        query_length=query_length,
        key_length=key.shape[2],
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
    if bounds is not None and query.dtype != torch.float64:
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
    heads_a_group = heads // groups
    softmax = Softmax(block_size, head_dim**-0.5 if scale is None else scale, softcap, window)
    grad_query = query.new_zeros(query.shape)
    # Of keys and values a column is a key: so their products come out.
    grad_key, grad_value = (
        torch.zeros(batch, groups, head_dim, key_length, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    grad_sinks = torch.zeros(batch, heads, dtype=torch.float32, device=query.device)
    scratch = Scratch()
    threads = torch.get_num_threads()  # a worker has one

    def differentiate_group(row: int, group: int) -> None:
        of_group = slice(group * heads_a_group, (group + 1) * heads_a_group)
        for segment in segments:
            if not segment.row <= row < segment.row_end:
                continue
            queries = slice(segment.start, segment.end)
            slots = slice(segment.anchor, segment.anchor + segment.length)
            differentiate(
                grad_output[row, of_group, queries],
                query[row, of_group, queries],
                Blocks(key[row, group, slots], value[row, group, slots], block_size),
                block_ids[row, group, queries],
                None if sinks is None else sinks[of_group],
                GroupGradients(
                    grad_query[row, of_group, queries],
                    grad_key[row, group, :, slots],
                    grad_value[row, group, :, slots],
                    grad_sinks[row, of_group],
                ),
                position=segment.position,
                step=_step(segment, heads_a_group * block_ids.shape[-1], head_dim, block_size, threads),
                softmax=softmax,
                scratch=scratch,
            )

    # A task is a group and not a run of queries: what is added to a key comes in one order, so results never differ.
    run_all([partial(differentiate_group, row, group) for row in range(batch) for group in range(groups)])
    return reference.Gradients(
        grad_query,
        grad_key.transpose(-1, -2).to(key.dtype).contiguous(),
        grad_value.transpose(-1, -2).to(value.dtype).contiguous(),
        None if sinks is None else grad_sinks.sum(0).to(sinks.dtype),
    )


def _step(segment: Segment, rows_a_query: int, head_dim: int, block_size: int, threads: int) -> int:
    """Return how many queries of a segment to take at once; `rows_a_query` is `G * topk`."""
    blocks = -(-segment.length // block_size)
    workspace = min(_WORKSPACE, _WORKSPACE_OF_ALL // threads)
    return max(1, min(_ROWS_A_BLOCK * blocks // rows_a_query, workspace // (rows_a_query * head_dim)))


def _is_finite(segment: Segment, of_queries: tuple[Tensor, Tensor], of_keys: tuple[Tensor, Tensor]) -> bool:
    rows = slice(segment.row, segment.row_end)
    queries, keys = slice(segment.start, segment.end), slice(segment.anchor, segment.anchor + segment.length)
    tensors = [tensor[rows, :, queries] for tensor in of_queries] + [tensor[rows, :, keys] for tensor in of_keys]
    # A sum is finite if nothing in it is infinite or NaN, unless it overflows; and then only time is lost.
    return all(math.isfinite(float(tensor.sum(dtype=torch.float32))) for tensor in tensors)


def _attend(
    query: Tensor,
    blocks: Blocks,
    block_ids: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    *,
    position: int,
    softmax: Softmax,
    scratch: Scratch,
) -> None:
    """Attend for the queries of one group.

    Args:
        query: `[G, C, D]`, at the slots `position .. position + C - 1`.
        blocks: keys and values from the anchor to the last visible slot.
        block_ids: `[C, topk]` int32.
        sinks: `[G]`, or None.
        output: `[G, C, D]`, zeros: where the result goes.
        position: slot of the first query, counted from the anchor.
        softmax: constants of the call.
        scratch: memory for the results of pieces.
    """
    group = len(query)
    pairs = find_pairs(
        block_ids,
        position=position,
        length=len(blocks.key),
        block_size=softmax.block_size,
        window=softmax.window,
        heads_a_group=group,
    )
    if not pairs.pieces:
        return
    by_query = query.transpose(0, 1).to(torch.float32).contiguous() * softmax.scale
    results = run_pieces(by_query, blocks, pairs, position=position, softmax=softmax, scratch=scratch)
    shares = find_shares(results, pairs.place, sinks, group)
    output.copy_(merge(results, shares).transpose(0, 1))
