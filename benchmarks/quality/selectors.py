"""Ways to choose the key blocks of each query and group; what is attended to is the same op for all of them.

The product's own, `"keys"` and the learned index branch, run as a user runs them, through `sparsify`. The others choose
from queries and keys by a few lines of torch:

- ``oracle``: blocks that hold most of the true attention mass, mean over the group's heads. No selector can know them.
- ``window``: the first block and the newest ones; looks at nothing.
- ``mean``: one vector a block, the mean of its keys, against the mean query of the group.
- ``min/max``: two vectors a block, the least and the greatest of each dimension; an upper bound of each head's score,
  mean over the group's heads (Quest).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from msa_compile.kernels import block_sparse_attention

CHUNK = 256  # queries whose probabilities are held at a time

# Query [B, Hq, T, D] and key [B, Hkv, T, D], and a block size, to scores [B, Hkv, T, N].
BlockScore = Callable[[Tensor, Tensor, int], Tensor]


def choose_blocks(scores: Tensor, block_size: int, topk: int, rows: Tensor | None = None) -> Tensor:
    """The query's own block and the best of those before it, as `msa::select_blocks` returns them.

    Args:
        scores: ``[B, Hkv, Q, N]``.
        block_size: Keys in a block.
        topk: Blocks a query.
        rows: int64 ``[Q]``, places of the queries; default ``0 .. Q - 1``.
    """
    queries, blocks = scores.shape[2:]
    places = torch.arange(queries, device=scores.device) if rows is None else rows
    own = (places // block_size)[:, None]
    number = torch.arange(blocks, device=scores.device)
    scores = scores.masked_fill(number > own, -math.inf).masked_fill(number == own, math.inf)
    best = scores.topk(min(topk, blocks), dim=-1)
    ids = best.indices.masked_fill(best.values == -math.inf, blocks).sort(dim=-1).values
    return ids.masked_fill(ids == blocks, -1).int()


def attention_mass(query: Tensor, key: Tensor, block_size: int, rows: Tensor | None = None) -> Tensor:
    """Softmax probability in each block, mean over the heads of a group, ``[B, Hkv, Q, N]``; see `choose_blocks`."""
    groups, length, width = key.shape[1:]
    places = torch.arange(length, device=key.device) if rows is None else rows
    heads = query.unflatten(1, (groups, -1))
    blocks = -(-length // block_size)
    parts = []
    for part in places.split(CHUNK):
        seen = int(part.max()) + 1
        logits = heads[:, :, :, part] @ key[:, :, None, :seen].transpose(-1, -2) * width**-0.5
        logits = logits.masked_fill(torch.arange(seen, device=key.device) > part[:, None], -math.inf)
        probability = F.pad(logits.softmax(-1).mean(2), (0, blocks * block_size - seen))
        parts.append(probability.unflatten(-1, (blocks, block_size)).sum(-1))
    return torch.cat(parts, dim=2)


def newest(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Later blocks score higher, and the first one highest."""
    blocks = -(-key.shape[2] // block_size)
    scores = torch.arange(blocks, dtype=query.dtype, device=query.device)
    scores[0] = blocks
    return scores.expand(*key.shape[:3], blocks)


def mean_key(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Product of the group's mean query with the mean key of each block."""
    middle = query.unflatten(1, (key.shape[1], -1)).mean(2)
    return middle @ _blocks(key, block_size).mean(3).transpose(-1, -2)


def box_bound(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Bound of the best score in each block from the least and greatest of each dimension, mean over the heads."""
    heads, blocks = query.unflatten(1, (key.shape[1], -1)), _blocks(key, block_size)
    low, high = blocks.amin(3), blocks.amax(3)
    # The products with positive and with negative parts are linear, so that the heads can be averaged before.
    return heads.clamp(min=0).mean(2) @ high.transpose(-1, -2) + heads.clamp(max=0).mean(2) @ low.transpose(-1, -2)


BLOCK_SCORES: dict[str, BlockScore] = {
    "oracle": attention_mass,
    "window": newest,
    "mean": mean_key,
    "min/max": box_bound,
}


class SelectedAttention:
    """Attention of a model to the blocks that a block score chooses."""

    def __init__(self, score: BlockScore, block_size: int, topk: int) -> None:
        self.score, self.block_size, self.topk = score, block_size, topk

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `attend_densely`."""
        ids = choose_blocks(self.score(query, key, self.block_size), self.block_size, self.topk)
        return block_sparse_attention(query, key, value, ids, block_size=self.block_size)


def _blocks(key: Tensor, block_size: int) -> Tensor:
    """Keys ``[B, Hkv, N, block_size, D]``; the length is a multiple of the block size."""
    return key.unflatten(2, (-1, block_size))
