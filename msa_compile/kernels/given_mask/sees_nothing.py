"""Queries that see no key at all in the blocks that they read, and what a softmax over hidden scores gives them.

`msa::sees_nothing` finds them. Where a model hides a key by adding one large negative number, the scores of such a
query are all that number, and it gets the mean of all values: `msa::mean_if_any`, which reads them if there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("msa::sees_nothing", mutates_args=())
def sees_nothing(block_ids: Tensor, mask: Tensor | None, key_length: int, block_size: int, is_causal: bool) -> Tensor:
    """Whether no key in the blocks of a query is visible; blocks start at slot 0.

    Args:
        block_ids: `[B, Hkv, Tq, topk]` int32, -1 where there is none.
        mask: bool `[B or 1, 1, Tq or 1, Tk]`, True where a key is seen; all are without one.
        key_length: `Tk`.
        block_size: Slots a block.
        is_causal: Whether the queries stand at the last slots, and see none behind their own.

    Returns:
        bool `[B, Hkv, Tq, 1]`.
    """
    queries, device = block_ids.shape[2], block_ids.device
    blocks = -(-key_length // block_size)
    first = torch.arange(blocks, device=device) * block_size
    if mask is not None:
        tail = (0, blocks * block_size - key_length)
        seen = F.pad(mask, tail, value=False).unflatten(-1, (blocks, block_size))
        # The first visible slot of each block, or one behind all; of equal bytes argmax returns the first.
        first = torch.where(seen.any(-1), first + seen.byte().argmax(-1), key_length)
    start = key_length - queries if is_causal else key_length - 1
    limit = torch.arange(start, key_length, device=device).view(-1, 1)
    first = first.expand(block_ids.shape[0], block_ids.shape[1], queries, blocks)
    first = first.gather(-1, block_ids.clamp(min=0).long())
    is_seen = (first <= limit) & (block_ids >= 0)
    return ~is_seen.any(-1, keepdim=True)


@sees_nothing.register_fake
def _(block_ids: Tensor, *rest: Any) -> Tensor:
    return block_ids.new_empty((*block_ids.shape[:3], 1), dtype=torch.bool)


@torch.library.custom_op("msa::mean_if_any", mutates_args=())
def mean_if_any(value: Tensor, wanted: Tensor) -> Tensor:
    """Mean over all slots, if it is wanted anywhere; zeros otherwise.

    Args:
        value: `[B, Hkv, Tk, D]` floating point.
        wanted: bool, any shape. The host waits for it, but while a CUDA graph is captured.

    Returns:
        `[B, Hkv, 1, D]`.
    """
    is_captured = value.is_cuda and torch.cuda.is_current_stream_capturing()
    if is_captured or bool(wanted.any()):
        return value.mean(2, keepdim=True)
    return value.new_zeros((*value.shape[:2], 1, value.shape[3]))


@mean_if_any.register_fake
def _(value: Tensor, wanted: Tensor) -> Tensor:
    return value.new_empty((*value.shape[:2], 1, value.shape[3]))


def _keep_length(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.length = inputs[0].shape[2]


def _mean_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return (gradient / ctx.length).expand(-1, -1, ctx.length, -1), None


mean_if_any.register_autograd(_mean_backward, setup_context=_keep_length)
