"""Ops on a mask that is applied as it is: its visibility, and where queries and keys stand.

``msa::visible`` turns an additive mask into a boolean one and says whether it is more than that, a bias.
``msa::mask_positions`` reads from a boolean mask the slot of each row's first query and where content and documents
start, so that blocks are anchored there when only the mask knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is added at a masked score, or less: eager masks use finfo.min, -inf, -1e9 or -1e4.
HIDDEN = -1e4


@torch.library.custom_op("msa::visible", mutates_args=())
def visible(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Visibility of an additive mask.

    Args:
        mask: Floating point, any shape; 0 where a key is seen, -1e4 or less where it is not.

    Returns:
        bool, the shape of ``mask``, contiguous: true where a key is seen; and bool ``[]``: whether some value is
        neither, so that the mask is a bias, which block selection would drop.
    """
    hidden = mask <= HIDDEN
    is_bias = ~(hidden | (mask == 0)).all()
    return hidden.logical_not_().contiguous(), is_bias


@visible.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(mask.shape, dtype=torch.bool, device=mask.device), mask.new_empty((), dtype=torch.bool)


@torch.library.custom_op("msa::mask_positions", mutates_args=())
def mask_positions(mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that a mask implies.

    With ``last_i`` the last key that query ``i`` sees, the first query stands at ``last_i - i``, the same for two
    neighbours ``i`` where the mask is causal: queries of a bidirectional prefix see further than where they stand, and
    padded ones at the end less far, but then neighbours differ. Where no two agree, the keys end where the queries do
    if that fits; otherwise (a cache longer than what it holds) one real query with padding behind it is assumed, and
    not a call that is all prefix, whose mask is the same. The content of a row starts at the first key that any of its
    queries sees; the document of a query (packed documents, chunks) at the first key that it sees itself. The latter
    hangs on the query's own row of the mask alone, so that a decode step anchors its blocks where a prefill does.

    Args:
        mask: bool ``[B or 1, heads, Tq or 1, Tk]``, true where a key is seen.
        query: ``[B, Hq, Tq, D]``, for the sizes.

    Returns:
        ``query_start`` and ``key_start``, int64 ``[B]``, and ``document_start``, int64 ``[B, Tq]``: key slots; 0 for a
        row or query that sees nothing. The mask may show keys after a query's slot.
    """
    seen = mask.any(1)
    rows, length = seen.shape[-2:]
    last = length - 1 - seen.flip(-1).int().argmax(-1)
    start = last - torch.arange(rows, device=mask.device)
    # The last query stands within the keys.
    counts = seen.any(-1) & (start <= length - rows)
    follows = counts[:, 1:] & counts[:, :-1] & (start[:, 1:] == start[:, :-1])
    lowest, highest = torch.where(counts, start, length).amin(-1), torch.where(counts, start, 0).amax(-1)
    at_end = length - rows
    alone = torch.where((lowest <= at_end) & (at_end <= highest), at_end, highest)
    query_start = torch.where(follows, start[:, 1:], -1).amax(-1) if rows > 1 else alone.new_full(alone.shape, -1)
    query_start = torch.where(query_start < 0, alone, query_start)
    key_start = seen.any(-2).int().argmax(-1)
    document_start = seen.int().argmax(-1)
    batch, queries = query.shape[0], query.shape[2]
    return (
        query_start.expand(batch).clone(),
        key_start.expand(batch).clone(),
        document_start.expand(batch, queries).clone(),
    )


@mask_positions.register_fake
def _(mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries = query.shape[0], query.shape[2]
    return tuple(  # type: ignore[return-value]
        torch.empty(shape, dtype=torch.int64, device=mask.device) for shape in ((batch,), (batch,), (batch, queries))
    )
