"""Cut a call into segments: runs of queries that share an anchor and see a plain causal triangle of keys.

Counted from its anchor, a segment has no padding, no documents and no offset of its own: query `i` is at slot
`position + i`, its local block is `(position + i) // block_size`, and it sees the slots `0 .. min(position + i, length
- 1)`. So an implementation needs that one case only.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Queries that see something, of rows of the batch that agree.

    Args:
        row: first row of the batch.
        row_end: one past the last row.
        start: first query.
        end: one past the last query.
        anchor: slot in the key tensor where block 0 starts.
        length: key slots from the anchor on that some query of the segment sees, at least 1.
        position: slot of query `start`, counted from the anchor, at least 0.
    """

    row: int
    row_end: int
    start: int
    end: int
    anchor: int
    length: int
    position: int


def find_segments(
    *,
    batch: int,
    query_length: int,
    key_length: int,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
) -> list[Segment]:
    """Find the segments of a call without a mask; a query in none of them sees nothing."""
    if batch == 0 or query_length == 0:
        return []
    is_plain = query_start is None and key_start is None and key_end is None and document_start is None
    if is_plain and query_length <= key_length:
        return [Segment(0, batch, 0, query_length, 0, key_length, key_length - query_length)]
    offsets = _per_row(query_start, key_length - query_length, batch)
    anchors = _per_row(key_start, 0, batch)
    ends = _per_row(key_end, key_length, batch)
    segments: list[Segment] = []
    # Segments of the row before, to which equal ones of this row are joined.
    before: list[Segment] = []
    for row, (offset, anchor, end) in enumerate(zip(offsets, anchors, ends, strict=True)):
        runs = _runs_of_anchors(max(anchor, 0), query_length, None if document_start is None else document_start[row])
        of_row = [_segment(row, run, offset, min(end, key_length)) for run in runs]
        found = [segment for segment in of_row if segment is not None]
        if before and [one[2:] for one in before] == [one[2:] for one in found]:
            segments[-len(before) :] = [one._replace(row_end=row + 1) for one in before]
            before = segments[-len(before) :]
        else:
            segments += found
            before = found
    return segments


def _per_row(values: Tensor | None, default: int, batch: int) -> list[int]:
    return [default] * batch if values is None else values.tolist()


def _runs_of_anchors(anchor: int, query_length: int, document_start: Tensor | None) -> list[tuple[int, int, int]]:
    """Return `(anchor, first query, one past the last)` of each run of queries with one anchor."""
    if document_start is None:
        return [(anchor, 0, query_length)]
    anchors, counts = torch.unique_consecutive(document_start.clamp(min=anchor), return_counts=True)
    ends = counts.cumsum(0)
    return list(zip(anchors.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))


def _segment(row: int, run: tuple[int, int, int], offset: int, key_end: int) -> Segment | None:
    anchor, start, end = run
    # Queries before the anchor see nothing.
    start = max(start, anchor - offset)
    length = min(key_end, offset + end) - anchor
    if start >= end or length < 1:
        return None
    return Segment(row, row + 1, start, end, anchor, length, offset + start - anchor)
