"""The functional door: MSA for people who edit their own code, shaped like ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.given_mask import mask_positions


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    block_size: int = 128,
    topk_blocks: int = 16,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    index_query: Tensor | None = None,
    index_key: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
) -> Tensor:
    """Sparse grouped-query attention, the counterpart of ``F.scaled_dot_product_attention``.

    Each query and key/value head selects ``topk_blocks`` blocks of ``block_size`` keys and attends to their visible
    tokens exactly (spec 14). The attention is causal, a query never sees a later key, unless a mask alone says what is
    seen.

    Args:
        query: ``[B, Hq, Tq, D]``, floating point.
        key: ``[B, Hkv, Tk, D]``, ``Hq % Hkv == 0``.
        value: ``[B, Hkv, Tk, D]``.
        attn_mask: bool, true where a key is seen, broadcastable to ``[B, 1, Tq, Tk]``; with ``is_causal`` or
            ``query_start`` on top of causality. Without them it alone says what is seen, and the positions of queries
            and documents are read from it.
        dropout_p: Must be 0.
        is_causal: Query ``i`` stands at key slot ``i``. With ``Tq != Tk`` say where it stands with ``query_start``.
        scale: Factor on ``q . k``, default ``D ** -0.5``.
        block_size: Keys in a block.
        topk_blocks: Blocks for each query and group, the local ones included.
        local_blocks: The query's own block and those before it that are always in.
        sink_blocks: First blocks that are always in.
        index_query: ``[B, Hkv, Tq, D]``; default the mean query of each group.
        index_key: ``[B, 1 or Hkv, Tk, D]``; default ``key``.
        softcap: Cap of the tanh on the scores.
        sinks: ``[Hq]`` extra logits.
        query_start: int ``[B]``, key slot of the first query.
        key_start: int ``[B]``, first visible key slot; blocks are anchored there.
        key_end: int ``[B]``, one past the last visible key slot.
        document_start: int ``[B, Tq]``, first key slot of each query's document.

    Returns:
        ``[B, Hq, Tq, D]`` in the dtype of ``query``.

    Raises:
        KernelArgumentError: On dropout, on attention that is not causal, or on arguments that do not fit.
    """
    if dropout_p:
        raise KernelArgumentError(f"dropout_p is {dropout_p}; sparse attention has no dropout, pass 0")
    length, keys = query.shape[-2], key.shape[-2]
    if is_causal and length != keys and query_start is None:
        raise KernelArgumentError(
            f"is_causal with {length} queries and {keys} keys is ambiguous: pass query_start, the key slot of the "
            f"first query ({keys - length} when the queries are the last tokens of a cache, 0 for SDPA's top-left mask)"
        )
    if not is_causal and attn_mask is None and query_start is None and length != 1:
        raise KernelArgumentError(
            "neither is_causal nor attn_mask: every query would see every key, which MSA does not do; "
            "pass is_causal=True"
        )
    mask = attn_mask
    by_mask_alone = mask is not None and not is_causal and query_start is None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise KernelArgumentError(f"attn_mask is {mask.dtype}, legal is bool: true where a key is seen")
        mask = mask[(None,) * (4 - mask.dim())]
        if by_mask_alone:
            query_start, content, documents = mask_positions(mask.expand(-1, -1, length, keys), query)
            key_start = content if key_start is None else key_start
            document_start = documents if document_start is None else document_start
    groups = key.shape[1]
    if index_query is None:
        detached = query.detach()
        index_query = detached if query.shape[1] == groups else detached.unflatten(1, (groups, -1)).mean(2)
    where: dict[str, Any] = {
        "query_start": query_start,
        "key_start": key_start,
        "key_end": key_end,
        "document_start": document_start,
        "mask": mask,
        "is_causal": not by_mask_alone,
    }
    block_ids = select_blocks(
        index_query,
        (key if index_key is None else index_key).detach(),
        block_size=block_size,
        topk=topk_blocks,
        local_blocks=local_blocks,
        sink_blocks=sink_blocks,
        **where,
    )
    return block_sparse_attention(
        query, key, value, block_ids, block_size=block_size, scale=scale, softcap=softcap, sinks=sinks, **where
    )
