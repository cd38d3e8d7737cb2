"""Which key slots a query sees, and the slot at which its blocks are anchored.

For query `i` of row `b`, at slot `p = query_start[b] + i`:

    anchor(b, i)     = max(key_start[b], document_start[b, i])
    visible(b, i, j) = anchor <= j < key_end[b]  and  p - window < j <= p  and  mask[b, h, i, j]

where `j <= p` falls away without `is_causal`.

Block `n` of the query covers the slots `[anchor + n * block_size, anchor + (n + 1) * block_size)`. All but the mask is
an interval, so a `Visibility` holds two ends a query instead of a `[Tq, Tk]` matrix.

Source: DESIGN.md section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Visibility:
    """What a run of queries sees. The leading dimension is 1 where all rows of the batch agree.

    Args:
        position: `[B|1, Tq]` int64, the slot of each query.
        anchor: `[B|1, Tq]` int64, the first slot of block 0, never negative.
        first: `[B|1, Tq]` int64, the first slot that the query sees.
        stop: `[B|1, Tq]` int64, one past the last slot that the query sees.
        mask: bool, broadcastable to `[B, Hkv, Tq, Tk]`, or None; it can only hide slots.
        key_length: `Tk`.
    """

    position: Tensor
    anchor: Tensor
    first: Tensor
    stop: Tensor
    mask: Tensor | None
    key_length: int

    def rows(self, start: int, end: int) -> "Visibility":
        """Return what queries `start` to `end - 1` see."""
        mask = self.mask
        if mask is not None and mask.shape[2] != 1:
            mask = mask[:, :, start:end]
        return Visibility(
            self.position[:, start:end],
            self.anchor[:, start:end],
            self.first[:, start:end],
            self.stop[:, start:end],
            mask,
            self.key_length,
        )

    def of_slots(self, slots: Tensor) -> Tensor:
        """Say which slots are visible, where each query has its own list of slots.

        Args:
            slots: `[B|1, Hkv|1, Tq, W]` int64, any value; a slot outside `[0, Tk)` is not visible.

        Returns:
            `[B|1, Hkv|1, Tq, W]` bool.
        """
        visible = (slots >= _per_query(self.first)) & (slots < _per_query(self.stop))
        if self.mask is None:
            return visible
        sizes = [max(pair) for pair in zip(self.mask.shape[:3], slots.shape[:3], strict=True)]
        inside = slots.clamp(0, self.key_length - 1).expand(*sizes, -1)
        return visible & self.mask.expand(*sizes, self.key_length).gather(-1, inside)

    def of_all_slots(self) -> Tensor:
        """Say which of the slots `0 .. Tk - 1` are visible: `[B|1, Hkv|1, Tq, Tk]` bool."""
        slots = torch.arange(self.key_length, device=self.first.device)
        visible = (slots >= _per_query(self.first)) & (slots < _per_query(self.stop))
        return visible if self.mask is None else visible & self.mask


def find_visibility(
    *,
    query_length: int,
    key_length: int,
    device: torch.device,
    window: int | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> Visibility:
    """Work out the visible interval and the anchor of every query; arguments as in the ops' docstrings."""
    offset = _per_row(query_start, default=key_length - query_length, device=device)
    position = offset + torch.arange(query_length, device=device)
    # Clamped, so that a negative start (outside the contract) cannot move a block below slot 0.
    anchor = _per_row(key_start, default=0, device=device).clamp(min=0)
    if document_start is not None:
        anchor = torch.maximum(anchor, document_start.to(torch.int64))
    anchor = anchor.expand(-1, query_length)
    stop = _per_row(key_end, default=key_length, device=device).clamp(max=key_length).expand(-1, query_length)
    if is_causal:
        stop = torch.minimum(position + 1, stop)
    first = anchor if window is None else torch.maximum(anchor, position - window + 1)
    return Visibility(position, anchor, first, stop, mask, key_length)


def _per_row(values: Tensor | None, *, default: int, device: torch.device) -> Tensor:
    """Return `[B, 1]` int64 of a `[B]` tensor, or `[1, 1]` of the default."""
    if values is None:
        return torch.full((1, 1), default, dtype=torch.int64, device=device)
    return values.to(torch.int64)[:, None]


def _per_query(values: Tensor) -> Tensor:
    """Return `[B|1, 1, Tq, 1]` of `[B|1, Tq]`."""
    return values[:, None, :, None]
