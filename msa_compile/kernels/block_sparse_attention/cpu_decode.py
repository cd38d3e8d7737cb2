"""Block-sparse attention on a CPU for few queries: every query copies the slots that it may use, and no others.

Arguments and result as in `op.py`, without a mask. Nothing grows with the number of keys, and nothing needs a mask: the
visible part of a block is a run of slots.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msa_compile.kernels.threads import run_all
from msa_compile.kernels.visibility import find_visibility


def attend_few_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
) -> Tensor:
    """Attend to the visible tokens of the selected blocks."""
    batch, heads, query_length, _ = query.shape
    groups, key_length = key.shape[1:3]
    heads_a_group = heads // groups
    output = query.new_zeros(query.shape)
    seen = find_visibility(
        query_length=query_length,
        key_length=key_length,
        device=query.device,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
    )
    anchors, firsts, stops = (of_query.expand(batch, -1).tolist() for of_query in (seen.anchor, seen.first, seen.stop))
    ids = block_ids.tolist()
    tasks: list[Callable[[], None]] = []
    for row in range(batch):
        for at in range(query_length):
            for group in range(groups):
                runs = _find_runs(
                    ids[row][group][at],
                    block_size,
                    anchor=anchors[row][at],
                    first=firsts[row][at],
                    stop=stops[row][at],
                )
                if not runs:
                    continue
                of_group = slice(group * heads_a_group, (group + 1) * heads_a_group)
                tasks.append(
                    partial(
                        _attend,
                        query[row, of_group, at],
                        key[row, group],
                        value[row, group],
                        runs,
                        None if sinks is None else sinks[of_group],
                        output[row, of_group, at],
                        scale=scale,
                        softcap=softcap,
                    )
                )
    run_all(tasks)
    return output


def _find_runs(ids: list[int], block_size: int, *, anchor: int, first: int, stop: int) -> list[slice]:
    """Return the slots of the selected blocks that lie in `[first, stop)`, neighbouring blocks in one run."""
    runs: list[slice] = []
    for block in ids:
        if block < 0:
            continue
        start = anchor + block * block_size
        end = min(start + block_size, stop)
        start = max(start, first)
        if start >= end:
            continue
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(slice(start, end))
    return runs


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: list[slice],
    sinks: Tensor | None,
    output: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Attend for one query of one group.

    Args:
        query: `[G, D]`.
        key: `[Tk, D]`.
        value: `[Tk, D]`.
        runs: slots to attend to, one at least.
        sinks: `[G]`, or None.
        output: `[G, D]`: where the result goes.
        scale: factor of the logits.
        softcap: bound of the logits, or None.
    """
    logits = (query.to(torch.float32) * scale) @ _gather(key, runs).t()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    width = logits.shape[-1]
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(torch.float32)[:, None]], -1)
    probabilities = torch.softmax(logits, -1)
    # Of nothing but -inf softmax makes NaN, and attention zeros.
    is_empty = logits.amax(-1, keepdim=True) == -torch.inf
    probabilities = probabilities.masked_fill_(is_empty, 0.0)
    output.copy_(probabilities[:, :width] @ _gather(value, runs))


def _gather(rows: Tensor, runs: list[slice]) -> Tensor:
    """Return `[W, D]` float32."""
    return torch.cat([rows[run] for run in runs]).to(torch.float32)
