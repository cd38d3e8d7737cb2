"""What somebody sees who watches the attention of a model at work: one record a call of a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SiteCall:
    """One call of one attention site that has an index branch.

    Attributes:
        name: Of the site.
        hidden: ``[B, Tq, C]``, what the branch reads.
        plain_query: ``[B, Tq, Hkv, D]``, the branch's queries before RoPE, with its autograd graph behind them.
        plain_key: ``[B, Tq, 1, D]``, likewise.
        index_query: ``[B, Hkv, Tq, D]``, with the branch's autograd graph behind it.
        index_key: ``[B, 1, Tk, D]``, likewise; a slot that was not written begins with NaN.
        query: ``[B, Hq, Tq, D]``, as attention takes it.
        key, value: ``[B, Hkv, Tk, D]``.
        budget: ``topk``, ``local_blocks``, ``sink_blocks`` and ``candidates``, for ``msa::select_blocks``.
        bounds: ``block_size`` and what a query sees, as both ops take it: ``query_start``, ``mask``, ...
        factors: ``scale``, ``softcap`` and ``sinks``, for ``msa::block_sparse_attention``.
    """

    name: str
    hidden: Tensor
    plain_query: Tensor
    plain_key: Tensor
    index_query: Tensor
    index_key: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    budget: Mapping[str, int]
    bounds: Mapping[str, Any]
    factors: Mapping[str, Any]


Observer = Callable[[SiteCall], None]
