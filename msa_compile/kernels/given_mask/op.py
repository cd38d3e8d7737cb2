"""Ops on a mask that is applied as it is: its visibility, and where queries and keys stand.

``msa::visible`` turns an additive mask into a boolean one and refuses a bias. ``msa::mask_positions`` reads from a
boolean mask the slot of each row's first query and where content and documents start, so that blocks are anchored there
when only the mask knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError

HIDDEN = -1e4


@torch.library.custom_op("msa::visible", mutates_args=())
def visible(mask: Tensor, site: str) -> Tensor:
    """Visibility of an additive mask: true where it adds 0.

    Args:
        mask: Floating point, any shape; 0 where a key is seen, -1e4 or less where it is not.
        site: Name of the attention site, for the error.

    Returns:
        bool, the shape of ``mask``, contiguous.

    Raises:
        KernelArgumentError: If a value is neither: the mask is a bias, and block selection would drop it.
    """
    seen = mask == 0
    other = ~seen & ~(mask <= HIDDEN)
    if bool(other.any()):
        value = mask[other][0].item()
        raise KernelArgumentError(
            f"{site}: the additive attention mask holds {value}, which is neither 0 (seen) nor {HIDDEN:g} or less "
            "(hidden): it is a bias, and sparse attention would drop it. "
            f"Keep the site dense: MSAConfig(exclude=({site!r},))."
        )
    return seen.contiguous()


@visible.register_fake
def _(mask: Tensor, site: str) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.bool, device=mask.device)


@torch.library.custom_op("msa::mask_positions", mutates_args=())
def mask_positions(mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that a mask implies.

    With ``last_i`` the last key that query ``i`` sees, the first query stands at ``max_i(last_i - i)``: exactly its
    slot under a causal mask with left or right padding, and never so early that causality would hide what the mask
    shows, whatever the mask. The content of a row starts at the first key that any of its queries sees; the document of
    a query (packed documents, chunks) at the first key that it sees itself. The latter hangs on the query's own row of
    the mask alone, so that a decode step anchors its blocks where a prefill does.

    Args:
        mask: bool ``[B or 1, heads, Tq or 1, Tk]``, true where a key is seen.
        query: ``[B, Hq, Tq, D]``, for the sizes.

    Returns:
        ``query_start`` and ``key_start``, int64 ``[B]``, and ``document_start``, int64 ``[B, Tq]``: key slots; 0 for a
        row or query that sees nothing.
    """
    seen = mask.any(1)
    length = seen.shape[-1]
    last = length - 1 - seen.flip(-1).int().argmax(-1)
    start = last - torch.arange(seen.shape[-2], device=mask.device)
    query_start = torch.where(seen.any(-1), start, 0).amax(-1)
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
