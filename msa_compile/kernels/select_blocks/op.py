"""The op `msa::select_blocks`: schema, fake, autocast, and the public function that checks arguments and calls it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels.arguments import (
    check_at_least,
    check_device,
    check_dimensions,
    check_floating,
    check_size,
    check_visibility,
)
from msa_compile.kernels.autocast import register_autocast
from msa_compile.kernels.register import register
from msa_compile.kernels.select_blocks import cpu, cuda, reference
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3


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
    """Choose, for each query and group, the key blocks worth attending to.

        s[j] = <index_query[b, r, i], index_key[b, r, j]>        for visible slots j, in float32 (float64 for float64)
        m[n] = max of s[j] over the visible slots of block n

    Query `i` of row `b` is at slot `p = query_start[b] + i`. It sees slot `j` when `j <= p`,
    `key_start[b] <= j < key_end[b]`, `j >= document_start[b, i]` and the mask allows it. Blocks start at its anchor
    `a = max(key_start[b], document_start[b, i])`: block `n` covers the slots `[a + n * block_size,
    a + (n + 1) * block_size)`. A block without a visible slot is never chosen. The block of the query,
    `(p - a) // block_size`, the `local_blocks - 1` before it and the first `sink_blocks` blocks are always chosen and
    use places of `topk`; the other places go to the highest `m`, ties to the lower id. A NaN score counts as the
    lowest; infinite scores count as the largest and smallest finite numbers.

    With `candidates`, blocks are scored twice. First with queries and keys rounded to e4m3, each row by a power of two
    that brings its largest number to between 128 and 256; a row that is not finite scores lowest. Candidates are the
    blocks that are always chosen, which count, and those that then score at least as high as the `candidates`-th best,
    all ties in. Among the candidates it is chosen as above. So a block is missed that e4m3 does not find among so many,
    and nothing else changes. It pays where scores are products of many queries: a call of at most 16 queries, or of no
    more blocks than candidates, does without.

    Args:
        index_query: `[B, Hkv, Tq, D]` floating point.
        index_key: `[B, Hkv, Tk, D]`, or `[B, 1, Tk, D]` for one key head shared by all groups; dtype of `index_query`,
            or uint8, the bytes of e4m3 numbers (`e4m3.py`), which are multiplied as the numbers that they are.
        block_size: slots a block, at least 1.
        topk: places a query, at least `local_blocks + sink_blocks`.
        local_blocks: newest blocks that are always chosen, at least 1.
        sink_blocks: oldest blocks that are always chosen, at least 0.
        query_start: `[B]` int32 or int64, slot of the first query; default `Tk - Tq`.
        key_start: `[B]` int32 or int64, first visible slot of the row, `0 .. Tk`; default 0.
        key_end: `[B]` int32 or int64, one past the last visible slot of the row, `0 .. Tk`; default `Tk`.
        document_start: `[B, Tq]` int32 or int64, first slot of the document of each query; default 0.
        mask: bool, broadcastable to `[B, Hkv, Tq, Tk]`, True where the slot may be seen; it can only hide slots.
        is_causal: whether `j <= p` is asked for; without it the other bounds alone say what is seen.
        candidates: blocks a query that are scored again, at least `topk`; 0 scores all blocks once, as they are.

    Returns:
        `[B, Hkv, Tq, topk]` int32, contiguous: block ids ascending, without duplicates, -1 on the right. No gradient.

    Raises:
        KernelArgumentError: a shape, dtype, device or number outside the ranges above.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), equations 6 and 7; DESIGN.md section 3.
    """
    check_dimensions("index_query", index_query, "[B, Hkv, Tq, D]")
    check_dimensions("index_key", index_key, "[B, 1 or Hkv, Tk, D]")
    check_floating("index_query", index_query)
    batch, groups, query_length, width = index_query.shape
    check_device("index_key", index_key, index_query.device)
    if index_key.dtype not in (index_query.dtype, torch.uint8):
        raise KernelArgumentError(
            f"index_key: found dtype {index_key.dtype}; legal are {index_query.dtype}, the dtype of index_query, and "
            "torch.uint8, the bytes of e4m3 numbers"
        )
    check_size("index_key", index_key, 0, batch, "the batch of index_query")
    check_size("index_key", index_key, 3, width, "the width of index_query")
    if index_key.shape[1] != 1 and index_key.shape[1] != groups:
        raise KernelArgumentError(
            f"index_key: found {index_key.shape[1]} heads; legal are 1 or {groups}, the heads of index_query"
        )
    check_at_least("block_size", block_size, 1)
    check_at_least("local_blocks", local_blocks, 1)
    check_at_least("sink_blocks", sink_blocks, 0)
    if topk < local_blocks + sink_blocks:
        raise KernelArgumentError(
            f"topk: found {topk}; legal are integers from {local_blocks + sink_blocks}, "
            f"local_blocks ({local_blocks}) + sink_blocks ({sink_blocks}), which use places of topk"
        )
    if candidates != 0 and candidates < topk:
        raise KernelArgumentError(f"candidates: found {candidates}; legal are 0 and integers from {topk}, topk")
    check_visibility(
        batch=batch,
        groups=groups,
        query_length=query_length,
        key_length=index_key.shape[2],
        device=index_query.device,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
    )
    selected: Tensor = torch.ops.msa.select_blocks(
        index_query,
        index_key,
        block_size,
        topk,
        local_blocks,
        sink_blocks,
        query_start,
        key_start,
        key_end,
        document_start,
        mask,
        is_causal=is_causal,
        candidates=candidates,
    )
    return selected


# Up to this many queries a call is bound by reading the keys, which have to be read to be rounded.
_FEW_QUERIES = 16


def _on_cpu(index_query: Tensor, index_key: Tensor, *, candidates: int, **options: Any) -> Tensor:
    if index_key.dtype == torch.uint8:
        index_key = from_e4m3(index_key, index_query.dtype)
    if candidates:
        return reference.select_blocks(index_query, index_key, candidates=candidates, **options)
    return cpu.select_blocks(index_query, index_key, **options)


def _on_cuda(index_query: Tensor, index_key: Tensor, **options: Any) -> Tensor:
    return cuda.select_blocks(index_query, index_key, **options)


def _run_with(select: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the op's kernel of what selects on a device."""

    def run(
        index_query: Tensor,
        index_key: Tensor,
        block_size: int,
        topk: int,
        local_blocks: int = 1,
        sink_blocks: int = 0,
        query_start: Tensor | None = None,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        document_start: Tensor | None = None,
        mask: Tensor | None = None,
        dense_below: int = 0,
        is_causal: bool = True,
        candidates: int = 0,
    ) -> Tensor:
        if index_key.shape[2] <= dense_below:
            # The attention op ignores the ids of a call this short. Decided here, from the size at hand: a cache that
            # grows past the bound needs no new graph.
            return index_query.new_full((*index_query.shape[:3], topk), -1, dtype=torch.int32)
        is_worth_it = index_query.shape[2] > _FEW_QUERIES and index_key.shape[2] > candidates * block_size
        return select(
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
            candidates=candidates if is_worth_it else 0,
        )

    return run


def _fake(index_query: Tensor, index_key: Tensor, block_size: int, topk: int, *rest: Any, **options: Any) -> Tensor:
    return index_query.new_empty((*index_query.shape[:3], topk), dtype=torch.int32)


register("select_blocks", cpu=_run_with(_on_cpu), cuda=_run_with(_on_cuda), fake=_fake)
# Index scores keep the precision of their inputs: autocast would round the products that are compared.
register_autocast("select_blocks", cast_first=0)
