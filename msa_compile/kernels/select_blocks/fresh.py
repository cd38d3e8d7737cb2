"""The op `msa::select_blocks_if_fresh`: block selection by index keys, or by `"keys"` where index keys are missing.

Index keys are kept beside a model's own key cache. What wrote that cache may not have written them: a call of the dense
model, a prefix that was pasted, a cache from elsewhere. Such slots hold NaN, and only a call knows whether one of its
queries sees one: it is then scored with the group's mean query and the keys themselves, and the site says so.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.autocast import register_autocast
from msa_compile.kernels.select_blocks.e4m3 import is_nan

log = logging.getLogger(__name__)

# Selections of this process that were scored with "keys" for want of index keys, by compiled model and site.
missed_selections: Counter[tuple[int, str]] = Counter()
_lock = threading.Lock()


def _run(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    site: str,
    owner: int,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    dense_below: int = 0,
    is_causal: bool = True,
    candidates: int = 0,
) -> Tensor:
    """Choose key blocks, by index keys or by keys.

    Arguments and result as in `op.py`. `index_query` and `index_key` (`[B, 1, Tk, D]`; a slot that was not written
    begins with NaN) are those of the index branch, `query` (`[B, Hkv, Tq, D]`) and `key` those of the `"keys"` indexer.
    `site` and `owner`, the number of the compiled model, name the attention site for the log and the report.
    """
    bounds = (query_start, key_start, key_end, document_start, mask)
    operands = (index_query, index_key)
    if key.shape[2] > dense_below and sees_unwritten(index_key, query.shape[2], *bounds, is_causal=is_causal):
        operands = (query, key)
        with _lock:
            is_first = all(other != owner for other, _ in missed_selections)
            missed_selections[owner, site] += 1
        if is_first:
            log.warning(
                '%s scores with "keys" for this cache (other sites may too; explain() counts them): index keys of some '
                "of its tokens are missing or out of date. A dense call or another model wrote the cache, it was "
                "reordered, cropped or copied, the indexer changed, or somebody else made it in inference mode. A "
                "cache that starts anew is scored with the learned indexer again.",
                site or "<root>",
            )
    chosen: Tensor = torch.ops.msa.select_blocks(
        *operands, block_size, topk, local_blocks, sink_blocks, *bounds, dense_below, is_causal, candidates
    )
    return chosen


def sees_unwritten(
    index_key: Tensor,
    queries: int,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    mask: Tensor | None,
    *,
    is_causal: bool,
) -> bool:
    """Whether some query may see a slot without an index key."""
    unwritten = is_nan(index_key[:, 0, :, 0])
    if not unwritten.any():
        return False
    slots = torch.arange(index_key.shape[2], device=index_key.device)
    if is_causal:
        first = query_start[:, None] if query_start is not None else len(slots) - queries
        unwritten &= slots < first + queries
    if key_start is not None:
        unwritten &= slots >= key_start[:, None]
    if key_end is not None:
        unwritten &= slots < key_end[:, None]
    if document_start is not None:
        unwritten &= slots >= document_start.amin(1, keepdim=True)
    if mask is not None:
        unwritten &= mask.any(2).any(1)
    return bool(unwritten.any())


_op = torch.library.custom_op("msa::select_blocks_if_fresh", _run, mutates_args=())


@_op.register_fake
def _fake(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    site: str,
    owner: int,
    block_size: int,
    topk: int,
    *rest: Any,
) -> Tensor:
    return index_query.new_empty((*index_query.shape[:3], topk), dtype=torch.int32)


register_autocast("select_blocks_if_fresh", cast_first=0)
