"""The op `msa::select_blocks_at`: block selection where each query says at which slot it stands.

A model that selects blocks itself has positions of its own for that, and nothing says that they count up: those of a
row that is padded on the left begin anew at its first real token. Queries are cut where they do not count up.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels.autocast import register_autocast


def _run(
    index_query: Tensor,
    index_key: Tensor,
    positions: Tensor | None,
    key_length: int,
    block_size: int,
    topk: int,
    local_blocks: int,
) -> Tensor:
    """Choose key blocks for queries at `positions`, `[B, Tq]` or `[1, Tq]` int64, by default the last slots.

    A position below 0 counts as 0; one behind the last block is an error, which is seen on a CPU only.
    `key_length` is how many keys the attention has: index keys may be cached apart from them. The rest as in `op.py`.
    """
    batch, groups, queries, _ = index_query.shape
    if index_key.shape[2] != key_length:
        raise KernelArgumentError(
            f"index_key: found {index_key.shape[2]} slots; legal are {key_length}, those of the keys that they choose"
        )
    budget = {"block_size": block_size, "topk": topk, "local_blocks": local_blocks}
    if positions is None:
        return torch.ops.msa.select_blocks(index_query, index_key, **budget)  # type: ignore[no-any-return]
    positions = positions.expand(batch, -1).clamp(min=0)
    chosen = index_query.new_empty((batch, groups, queries, topk), dtype=torch.int32)
    for start, end in _counting_up(positions, -(-key_length // block_size) * block_size):
        first = positions[:, start].contiguous()
        chosen[:, :, start:end] = torch.ops.msa.select_blocks(
            index_query[:, :, start:end], index_key, **budget, query_start=first
        )
    return chosen


def _counting_up(positions: Tensor, slots: int) -> list[tuple[int, int]]:
    """Runs of queries that stand one after the other in every row, as `(start, end)`."""
    queries = positions.shape[1]
    if positions.device.type == "cpu" and positions.numel() and positions.max() >= slots:
        raise KernelArgumentError(f"positions: found {int(positions.max())}; legal are integers below {slots}")
    # A decode step does not wait for the device.
    breaks = (positions.diff(dim=1) != 1).any(0).nonzero().flatten().add(1).tolist() if queries > 1 else []
    bounds = [0, *breaks, queries]
    return [(start, end) for start, end in itertools.pairwise(bounds) if start < end]


_op = torch.library.custom_op("msa::select_blocks_at", _run, mutates_args=())


@_op.register_fake
def _fake(
    index_query: Tensor,
    index_key: Tensor,
    positions: Tensor | None,
    key_length: int,
    block_size: int,
    topk: int,
    *rest: Any,
) -> Tensor:
    return index_query.new_empty((*index_query.shape[:3], topk), dtype=torch.int32)


register_autocast("select_blocks_at", cast_first=0)
