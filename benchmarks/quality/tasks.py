"""What the models read: real text, and the same text with facts hidden in it that are asked for later.

A token is a byte, or one of a few symbols beyond the bytes. A fact is a key symbol and a value symbol; where the key
stands again, its value has to be found again:

    import os  K7 V3  def main():  K9 V9  ...  K7 -> V3  ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.byte_model import Corpus

BYTES, KEYS, VALUES = 256, 64, 64
VOCABULARY = BYTES + KEYS + VALUES
_PAIR = 2  # tokens


@dataclass(frozen=True)
class Sequences:
    """Token ids and what is asked of them.

    Attributes:
        ids: int64 ``[B, T]``.
        is_text: bool ``[B, T]``: bytes of the text, to be predicted as well as possible.
        is_answer: bool ``[B, T]``: values that can be known, because their fact stands before.
    """

    ids: Tensor
    is_text: Tensor
    is_answer: Tensor


def plain_text(text: Tensor, count: int, length: int, choose: torch.Generator) -> Sequences:
    """Random windows of the text ``[bytes]``."""
    starts = torch.randint(len(text) - length, (count,), generator=choose)
    ids = torch.stack([text[start : start + length] for start in starts.tolist()])
    is_text = torch.ones_like(ids, dtype=torch.bool)
    return Sequences(ids, is_text, ~is_text)


def practice(text: Tensor, count: int, length: int, choose: torch.Generator) -> Sequences:
    """Windows with facts at random places, which are asked for again and again, or once: what is trained on."""
    rows = []
    for _ in range(count):
        facts = _between(2, min(KEYS, length // 8), choose)
        pairs = 2 * facts if _between(0, 1, choose) else _between(2 * facts, max(2 * facts, length // 4), choose)
        order = torch.cat([torch.arange(pairs - facts) % facts, torch.arange(facts)])
        order = order[torch.randperm(pairs, generator=choose)]
        cuts = torch.randint(length - pairs * _PAIR + 1, (pairs,), generator=choose).sort().values
        rows.append(_hide(text, length, order, cuts, choose))
    return _stacked(rows)


def questions(text: Tensor, count: int, length: int, facts: int, choose: torch.Generator) -> Sequences:
    """Windows with facts at random depths, all asked for at the very end, in random order: what is measured."""
    rows = []
    for _ in range(count):
        order = torch.cat([torch.arange(facts), torch.randperm(facts, generator=choose)])
        room = length - 2 * facts * _PAIR
        depths = torch.randint(room + 1, (facts,), generator=choose).sort().values
        rows.append(_hide(text, length, order, torch.cat([depths, depths.new_full((facts,), room)]), choose))
    return _stacked(rows)


def windows(text: Tensor, count: int, length: int) -> Tensor:
    """Windows spread evenly over the text, int64 ``[count, length]``."""
    starts = torch.linspace(0, len(text) - length, count).long().tolist()
    return torch.stack([text[start : start + length] for start in starts])


def calibration_batches(corpus: Corpus, count: int, length: int, seed: int) -> list[Tensor]:
    """Batches of one window of text and one with facts, int64 ``[2, length]``, as the models were trained on."""
    choose = torch.Generator().manual_seed(seed)
    makers = (plain_text, practice)
    return [torch.cat([make(corpus.train, 1, length, choose).ids for make in makers]) for _ in range(count)]


def _hide(text: Tensor, length: int, order: Tensor, cuts: Tensor, choose: torch.Generator) -> Sequences:
    """One sequence: pair number `n` is that of fact `order[n]`, after `cuts[n]` bytes of text and `n` pairs."""
    facts = int(order.max()) + 1
    keys = BYTES + torch.randperm(KEYS, generator=choose)[:facts]
    values = BYTES + KEYS + torch.randint(VALUES, (facts,), generator=choose)
    room = length - len(order) * _PAIR
    start = _between(0, len(text) - room, choose)
    places = cuts + _PAIR * torch.arange(len(order))
    is_seen = (order[:, None] == order[None, :]).tril(-1).any(1)
    ids = torch.zeros(length, dtype=torch.long)
    is_pair, is_answer = torch.zeros(length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)
    ids[places], ids[places + 1] = keys[order], values[order]
    is_pair[places] = is_pair[places + 1] = True
    is_answer[places[is_seen] + 1] = True
    ids[~is_pair] = text[start : start + room]
    return Sequences(ids[None], ~is_pair[None], is_answer[None])


def _between(low: int, high: int, choose: torch.Generator) -> int:
    """A whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=choose))


def _stacked(rows: list[Sequences]) -> Sequences:
    return Sequences(
        torch.cat([row.ids for row in rows]),
        torch.cat([row.is_text for row in rows]),
        torch.cat([row.is_answer for row in rows]),
    )
