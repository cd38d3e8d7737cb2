"""Training references that know nothing of the package: blocks chosen by plain loops, attention dense under a mask."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F


def choose(query: Tensor, key: Tensor, seen: Tensor, *, block_size: int, topk: int) -> Tensor:
    """`[B, Hkv, Tq, Tk]` bool: the keys that are visible and lie in a chosen block.

    A block's score is the best of the group's mean dot products with its visible keys;
    the query's own block is always in.
    """
    batch, groups, length, dim = key.shape
    mean = query.detach().float().view(batch, groups, -1, length, dim).mean(2)
    scores = mean @ key.detach().float().transpose(-1, -2)
    chosen = torch.zeros(batch, groups, length, length, dtype=torch.bool)
    for row in range(batch):
        first = int(seen[row, 0].any(0).int().argmax())  # blocks are counted from the first key of the row
        for group in range(groups):
            for i in range(length):
                best: dict[int, float] = {}
                for j in range(length):
                    if seen[row, 0, i, j]:
                        block = (j - first) // block_size
                        best[block] = max(best.get(block, -float("inf")), float(scores[row, group, i, j]))
                own = (i - first) // block_size
                ranked = sorted(best, key=lambda block: (block != own, -best[block], block))[:topk]
                for j in range(length):
                    chosen[row, group, i, j] = bool(seen[row, 0, i, j]) and (j - first) // block_size in ranked
    return chosen


@contextlib.contextmanager
def sparse_reference(*, groups: int, block_size: int, topk: int) -> Iterator[list[Tensor]]:
    """Every SDPA call inside is masked dense attention over the chosen blocks; yields what share of keys each saw."""
    shares: list[Tensor] = []
    original = F.scaled_dot_product_attention

    def intercepted(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        heads, length = query.shape[1], query.shape[2]
        times = heads // groups
        seen = torch.ones(length, length, dtype=torch.bool).tril().expand(query.shape[0], 1, length, length)
        if attn_mask is not None:
            assert attn_mask.dtype == torch.bool
            seen = seen & attn_mask
        single = key if key.shape[1] == groups else key[:, ::times]
        chosen = choose(query, single, seen, block_size=block_size, topk=topk)
        shares.append(chosen.sum() / seen.expand_as(chosen).sum())
        mask = chosen.repeat_interleave(times, 1)
        if key.shape[1] == groups:
            key, value = (x.repeat_interleave(times, 1) for x in (key, value))
        return original(query, key, value, attn_mask=mask, scale=scale)

    with mock.patch.object(F, "scaled_dot_product_attention", intercepted):
        yield shares
