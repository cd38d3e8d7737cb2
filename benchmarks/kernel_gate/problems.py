"""What the gate compiles: calls of the ops over heads, dtypes, blocks and features, as launches that never run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Launch


@dataclass(frozen=True)
class Problem:
    """One call of selection and attention, or of what trains them, batch 1 unless it says so.

    Attributes:
        name: On the command line.
        heads: ``Hq, Hkv, D``.
        queries, keys: ``Tq``, ``Tk``.
        dtype: Of all tensors.
        block_size, topk: Keys in a block, blocks a query.
        is_shared: One index key for all groups, as the learned indexer has.
        batch: Rows.
        has_documents: Packed documents, and nothing else.
        has_everything: Sinks, softcap, window, ragged rows, documents and a mask.
        is_backward: The gradients of the attention, and no forward.
        loss: The index loss and its gradients alone, over ``"all"`` slots or those of ``"selected"`` blocks.
        is_select: Of that loss the form that calibration begins with: a raised teacher, and forced blocks left out.
        order: Of many queries, ``"tiles"`` or ``"blocks"``; default as shapes choose.
        candidates: Blocks a query that are scored again; the selection alone, on chips that multiply e4m3.
        has_bytes: Index keys are bytes of e4m3; the selection alone.
    """

    name: str
    heads: tuple[int, int, int]
    queries: int
    keys: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 128
    topk: int = 16
    is_shared: bool = True
    batch: int = 1
    has_documents: bool = False
    has_everything: bool = False
    is_backward: bool = False
    loss: str | None = None
    is_select: bool = False
    order: str | None = None
    candidates: int = 0
    has_bytes: bool = False


K = 1024
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("prefill, 16 heads a group", (64, 4, 128), 128 * K, 128 * K),
        Problem("prefill, 4 heads a group, own keys", (32, 8, 128), 32 * K, 32 * K, is_shared=False),
        Problem("prefill, 1M tokens", (64, 4, 128), 1024 * K, 1024 * K),
        Problem("prefill, 1 head a group, D 64", (16, 16, 64), 32 * K, 32 * K, torch.float16, is_shared=False),
        Problem("prefill, 8 heads a group, D 96, blocks of 64", (32, 4, 96), 32 * K, 32 * K, block_size=64, topk=32),
        Problem("prefill, 2 heads a group, D 256", (16, 8, 256), 32 * K, 32 * K),
        Problem("prefill, blocks of 32", (32, 8, 64), 32 * K, 32 * K, block_size=32, topk=32),
        Problem("prefill, one group, documents", (8, 1, 128), 32 * K, 32 * K, has_documents=True),
        Problem("prefill, everything", (64, 8, 64), 32 * K, 32 * K, batch=2, has_everything=True),
        Problem("prefill, float32", (32, 8, 128), 8 * K, 8 * K, torch.float32),
        Problem("blocks outside, 16 heads a group", (64, 4, 128), 128 * K, 128 * K, order="blocks"),
        Problem("blocks outside, 1 head a group, D 64", (16, 16, 64), 32 * K, 32 * K, torch.float16, order="blocks"),
        Problem("blocks outside, 2 heads a group, D 256", (16, 8, 256), 32 * K, 32 * K, order="blocks"),
        Problem("blocks outside, blocks of 32", (32, 8, 64), 32 * K, 32 * K, block_size=32, topk=32, order="blocks"),
        Problem("blocks outside, float32", (32, 8, 64), 8 * K, 8 * K, torch.float32, block_size=32, order="blocks"),
        Problem("fp8 scores, 16 heads a group", (64, 4, 128), 128 * K, 128 * K, candidates=32),
        Problem("fp8 scores, 1M tokens", (64, 4, 128), 1024 * K, 1024 * K, candidates=32),
        Problem("fp8 scores, own keys, D 64", (32, 8, 64), 32 * K, 32 * K, is_shared=False, candidates=32),
        Problem("fp8 scores, D 256, blocks of 32", (16, 8, 256), 32 * K, 32 * K, block_size=32, candidates=32),
        Problem("fp8 scores, everything", (64, 8, 64), 8 * K, 8 * K, batch=2, has_everything=True, candidates=32),
        Problem("decode, 16 heads a group", (64, 4, 128), 1, 128 * K),
        Problem("decode, 4 heads a group, own keys", (32, 8, 128), 1, 128 * K, is_shared=False, batch=16),
        Problem("decode, fp8 index keys, 16 heads a group", (64, 4, 128), 1, 128 * K, has_bytes=True),
        Problem("decode, fp8 index keys, 4 queries", (32, 8, 128), 4, 128 * K, batch=16, has_bytes=True),
        Problem("decode, fp8 index keys, everything", (64, 8, 64), 4, 32 * K, has_everything=True, has_bytes=True),
        Problem("decode, D 256", (16, 8, 256), 1, 32 * K),
        Problem("decode, one group, documents", (8, 1, 128), 1, 32 * K, has_documents=True),
        Problem("decode, everything", (64, 8, 64), 4, 32 * K, batch=2, has_everything=True),
        Problem("decode, float32", (32, 8, 128), 1, 8 * K, torch.float32),
        Problem("backward, 16 heads a group", (64, 4, 128), 128 * K, 128 * K, is_backward=True),
        Problem("backward, 4 heads a group", (32, 8, 128), 32 * K, 32 * K, is_backward=True),
        Problem("backward, 1 head a group, D 64", (16, 16, 64), 32 * K, 32 * K, torch.float16, is_backward=True),
        Problem("backward, 2 heads a group, D 256", (16, 8, 256), 32 * K, 32 * K, is_backward=True),
        Problem("backward, blocks of 32", (32, 8, 64), 32 * K, 32 * K, block_size=32, topk=32, is_backward=True),
        Problem("backward, everything", (64, 8, 64), 8 * K, 8 * K, batch=2, has_everything=True, is_backward=True),
        Problem("backward, float32", (32, 8, 128), 8 * K, 8 * K, torch.float32, is_backward=True),
        Problem("index loss, 16 heads a group", (64, 4, 128), 32 * K, 32 * K, loss="all"),
        Problem("index loss, 16 heads a group, selected", (64, 4, 128), 128 * K, 128 * K, loss="selected"),
        Problem("index loss, 4 heads a group", (32, 8, 128), 32 * K, 32 * K, loss="all"),
        Problem("index loss, 1 head a group, D 64", (16, 16, 64), 32 * K, 32 * K, torch.float16, loss="all"),
        Problem(
            "index loss, 8 heads a group, D 96, blocks of 64, selected",
            (32, 4, 96),
            32 * K,
            32 * K,
            block_size=64,
            topk=32,
            loss="selected",
        ),
        Problem("index loss, 2 heads a group, D 256", (16, 8, 256), 32 * K, 32 * K, loss="all"),
        Problem("index loss, 2 heads a group, D 256, selected", (16, 8, 256), 32 * K, 32 * K, loss="selected"),
        Problem("index loss, one group, documents", (8, 1, 128), 32 * K, 32 * K, has_documents=True, loss="all"),
        Problem("index loss, everything", (64, 8, 64), 8 * K, 8 * K, batch=2, has_everything=True, loss="all"),
        Problem(
            "index loss, everything, selected", (64, 8, 64), 8 * K, 8 * K, batch=2, has_everything=True, loss="selected"
        ),
        Problem("index loss, float32", (32, 8, 128), 8 * K, 8 * K, torch.float32, loss="all"),
        Problem("index loss, float32, selected", (32, 8, 128), 8 * K, 8 * K, torch.float32, loss="selected"),
        Problem("index loss, select, 16 heads a group", (64, 4, 128), 32 * K, 32 * K, loss="all", is_select=True),
        Problem("index loss, select, 1 head a group, D 64", (16, 16, 64), 32 * K, 32 * K, loss="all", is_select=True),
        Problem("index loss, select, 2 heads a group, D 256", (16, 8, 256), 32 * K, 32 * K, loss="all", is_select=True),
        Problem(
            "index loss, select, everything",
            (64, 8, 64),
            8 * K,
            8 * K,
            batch=2,
            has_everything=True,
            loss="all",
            is_select=True,
        ),
        Problem(
            "index loss, select, everything, selected",
            (64, 8, 64),
            8 * K,
            8 * K,
            batch=2,
            has_everything=True,
            loss="selected",
            is_select=True,
        ),
        Problem(
            "index loss, select, float32",
            (32, 8, 128),
            8 * K,
            8 * K,
            torch.float32,
            loss="all",
            is_select=True,
        ),
    )
}


def launches_of(problem: Problem, chip: Chip) -> Iterator[Launch]:
    """Give the first launch of each kernel that the problem runs on a chip; tensors have no memory."""
    from msa_compile.kernels.block_sparse_attention import triton as attention
    from msa_compile.kernels.block_sparse_attention import triton_backward as backward
    from msa_compile.kernels.index_loss import triton as loss
    from msa_compile.kernels.index_loss.align_loss import Support
    from msa_compile.kernels.select_blocks import triton as selection

    heads, groups, dim = problem.heads
    batch, queries, keys = problem.batch, problem.queries, problem.keys

    def of_rows(count: int, tokens: int) -> Tensor:
        return torch.empty(batch, count, tokens, dim, dtype=problem.dtype, device="meta")

    def slots(*shape: int) -> Tensor | None:
        is_there = problem.has_everything or (problem.has_documents and len(shape) == 2)
        return torch.empty(shape, dtype=torch.int64, device="meta") if is_there else None

    mask = torch.empty(batch, 1, queries, keys, dtype=torch.bool, device="meta") if problem.has_everything else None
    block_ids = torch.empty(batch, groups, queries, problem.topk, dtype=torch.int32, device="meta")
    common: dict[str, Any] = {
        "block_size": problem.block_size,
        "query_start": slots(batch),
        "key_start": slots(batch),
        "key_end": slots(batch),
        "document_start": slots(batch, queries),
        "mask": mask,
        "is_causal": True,
        "chip": chip,
    }
    of_logits: dict[str, Any] = {
        "scale": None,
        "softcap": 50.0 if problem.has_everything else None,
        "sinks": torch.empty(heads, device="meta") if problem.has_everything else None,
        "window": 4096 if problem.has_everything else None,
    }
    query, key, value = of_rows(heads, queries), of_rows(groups, keys), of_rows(groups, keys)
    if problem.is_backward:
        of_keys, of_values = torch.empty(2, *key.shape, device="meta").unbind()
        log_sums, deltas = torch.empty(2, *query.shape[:3], device="meta").unbind()
        yield from _first_of_each(
            backward.find_launches(
                torch.empty_like(query),
                query,
                key,
                value,
                block_ids,
                torch.empty_like(query),
                of_keys,
                of_values,
                log_sums,
                deltas,
                **common,
                **of_logits,
            )
        )
        return
    index_query, index_key = of_rows(groups, queries), of_rows(1 if problem.is_shared else groups, keys)
    if problem.loss is not None:
        of_support = {name: value for name, value in common.items() if name not in ("chip", "block_size")}
        support = Support(
            block_ids=block_ids if problem.loss == "selected" else None,
            block_size=problem.block_size,
            local_blocks=1 if problem.is_select else 0,
            sink_blocks=1 if problem.is_select else 0,
            window=of_logits["window"],
            counted=torch.empty(batch, queries, dtype=torch.bool, device="meta"),
            **of_support,
        )
        sums = (torch.empty(tensor.shape[:3], device="meta") for tensor in (index_query, query, index_query))
        gradients = (torch.empty(tensor.shape, device="meta") for tensor in (index_query, index_key))
        yield from _first_of_each(
            loss.find_launches(
                index_query,
                index_key,
                query,
                key,
                support,
                *sums,
                *gradients,
                index_scale=None,
                scale=None,
                softcap=of_logits["softcap"],
                power=2.0 if problem.is_select else 1.0,
                chip=chip,
            )
        )
        return
    if problem.has_bytes:
        index_key = index_key.to(torch.uint8)
    if problem.candidates and chip.capability < 89:
        return
    how: dict[str, Any] = {"local_blocks": 1, "sink_blocks": 0, "candidates": problem.candidates}
    yield from _first_of_each(selection.find_launches(index_query, index_key, block_ids, **how, **common))
    if problem.candidates or problem.has_bytes:
        return
    yield from _first_of_each(
        attention.find_launches(
            query, key, value, block_ids, torch.empty_like(query), order=problem.order, **common, **of_logits
        )
    )


def _first_of_each(launches: Iterator[Launch]) -> Iterator[Launch]:
    """Kernels take turns over chunks of queries; the first launch of each kernel and tile stands for all."""
    seen = set()
    for launch in launches:
        compiled = (launch.kernel, *launch.tile.sizes.items())
        if compiled not in seen:
            seen.add(compiled)
            yield launch
