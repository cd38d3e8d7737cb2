"""The op `msa::write_cache`: a step of a cache of fixed length, as a function of the cache that it leaves alone.

An exported program has no state to write into; a runtime may do the write in place where nobody else reads the cache.
"""

import torch
from torch import Tensor


@torch.library.custom_op("msa::write_cache", mutates_args=())
def write_cache(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    """A cache with some of its slots written.

    Args:
        cache: `[B, H, L, D]`.
        update: `[B, H, T, D]`, dtype of `cache`.
        position: `[B]` int64, slot of the first token of each row, at most `L - T`.

    Returns:
        `[B, H, L, D]`.
    """
    slots = position[:, None] + torch.arange(update.shape[2], device=cache.device)
    return cache.scatter(2, slots[:, None, :, None].expand_as(update), update)


@write_cache.register_fake
def _(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    return cache.new_empty(cache.shape)
