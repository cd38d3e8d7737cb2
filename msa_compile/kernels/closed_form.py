"""Say what a mask shows by bounds, where bounds can say it: implementations that need no mask are then of use.

A model that is called with padding, or with a cache longer than what it holds, hands a mask to every attention, and
nearly always each query sees one run of keys, from its anchor to its own slot or to the end of the row.
"""

import torch
from torch import Tensor

from msa_compile.kernels.visibility import find_visibility

# Queries whose part of a mask is looked at together: a mask that has no bounds shows it soon.
_CHUNK = 256


def find_closed_form(
    *,
    batch: int,
    query_length: int,
    key_length: int,
    device: torch.device,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
) -> dict[str, Tensor | None] | None:
    """Return bounds that, with causality and without a mask, show what all the arguments show together.

    Anchors and slots of queries stay what they are; an argument that is not needed is None. The values of the arguments
    are read.

    Returns:
        `query_start`, `key_start`, `key_end` and `document_start` as in `op.py`, or None where a query sees something
        else than one run of keys from its anchor to its own slot or to the row's end, or where heads differ.
    """
    given = {
        "query_start": query_start,
        "key_start": key_start,
        "key_end": key_end,
        "document_start": document_start,
    }
    if mask is None and is_causal:
        return given
    if query_length == 0 or key_length == 0 or (mask is not None and mask.shape[1:4:2] != (1, key_length)):
        return None
    seen = find_visibility(
        query_length=query_length,
        key_length=key_length,
        device=device,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        is_causal=is_causal,
    )
    first, stop, is_empty = seen.first, seen.stop, seen.stop <= seen.first
    if mask is not None:
        runs = _find_runs(mask[:, 0])
        if runs is None:
            return None
        first, stop = torch.maximum(first, runs[0]), torch.minimum(stop, runs[1])
        is_empty = is_empty | (stop <= first)
    end = torch.where(is_empty, 0, stop).amax(-1)
    by_bounds = torch.minimum(seen.position + 1, end[:, None])
    if not bool((is_empty | ((first == seen.anchor) & (stop == by_bounds))).all()):
        return None
    # A query that sees nothing, though it stands behind its anchor, gets one that it stands before.
    is_hidden = is_empty & (by_bounds > seen.anchor)
    if bool(is_hidden.any()):
        anchors = torch.where(is_hidden, key_length, seen.anchor)
        given["document_start"] = anchors.expand(batch, query_length)
    given["key_end"] = end.expand(batch)
    return given


def _find_runs(shown: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the first and one past the last key that each query is shown, if all between are shown too.

    Args:
        shown: bool `[B|1, Tq|1, Tk|1]`.

    Returns:
        int64 `[B|1, Tq|1]`, both 0 for a query that is shown nothing; or None.
    """
    starts, stops = [], []
    for rows in shown.split(_CHUNK, dim=1):
        rows = rows.contiguous()
        start = rows.view(torch.uint8).argmax(-1)
        count = rows.sum(-1, dtype=torch.int32)
        stop = torch.where(count == 0, 0, rows.shape[-1] - rows.flip(-1).view(torch.uint8).argmax(-1))
        if not bool((count == stop - start).all()):
            return None
        starts.append(start)
        stops.append(stop)
    return torch.cat(starts, 1), torch.cat(stops, 1)
