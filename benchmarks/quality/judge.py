"""How good the chosen blocks are, layer by layer, in the states of the dense model.

While a judge watches, each call of the sparse attention op is compared with dense attention on the very same queries,
keys and values, and answered with the dense output: so every layer is judged on what the dense model gives it, and a
bad choice in one layer does not spoil the input of the next. That holds for any selector, the product's own too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.quality.model import attend_densely
from benchmarks.quality.selectors import attention_mass, choose_blocks
from msa_compile.kernels.block_sparse_attention import cpu


@dataclass(frozen=True)
class Choice:
    """The blocks that one layer chose in one call, and what was there to choose from.

    Attributes:
        ids: int32 ``[B, Hkv, Q, topk]``, of the judged queries.
        best: Of the same shape, what the oracle chooses.
        mass: ``[B, Hkv, Q, N]``, true attention mass of each block, mean over the heads of a group.
        rows: int64 ``[Q]``, places of the judged queries.
        error: Of the attention output of the judged queries, relative to the dense output (ratio of Euclidean norms).
    """

    ids: Tensor
    best: Tensor
    mass: Tensor
    rows: Tensor
    error: float

    def captured(self, ids: Tensor) -> float:
        """Mean mass in the blocks ``ids``."""
        return float((self.mass * is_chosen(ids, self.mass.shape[3])).sum(-1).mean())

    def recall(self) -> float:
        """Share of the oracle's blocks that were chosen; the query's own block, which nobody can miss, left out."""
        chosen, best = (is_chosen(ids, self.mass.shape[3]) for ids in (self.ids, self.best))
        # Own blocks are in both.
        queries = self.mass[..., 0].numel()
        return float(((chosen & best).sum() - queries) / (best.sum() - queries).clamp(min=1))


def is_chosen(ids: Tensor, blocks: int) -> Tensor:
    """Bool ``[..., N]`` from ids ``[..., topk]``, -1 being none."""
    chosen = torch.zeros((*ids.shape[:-1], blocks + 1), dtype=torch.bool, device=ids.device)
    return chosen.scatter_(-1, ids.long() % (blocks + 1), True)[..., :blocks]


@dataclass
class Judge:
    """Judges the later part of each sequence, where a budget is a smaller share of what a query sees.

    Attributes:
        skipped: Share of the queries that are not judged, the first ones.
        stride: Every so many of the others are.
        choices: One for each call of the op, so for each layer in turn.
    """

    skipped: float = 0.5
    stride: int = 8
    choices: list[Choice] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Judge every call of the op inside."""
        attend = cpu.block_sparse_attention

        def judged(query: Tensor, key: Tensor, value: Tensor, block_ids: Tensor, **options: Any) -> Tensor:
            dense = attend_densely(query, key, value)
            sparse = attend(query, key, value, block_ids, **options)
            length, size = key.shape[2], options["block_size"]
            rows = torch.arange(int(self.skipped * length), length, self.stride)
            mass = attention_mass(query, key, size, rows)
            error = (sparse - dense)[:, :, rows].norm() / dense[:, :, rows].norm()
            best = choose_blocks(mass, size, block_ids.shape[3], rows)
            self.choices.append(Choice(block_ids[:, :, rows], best, mass, rows, float(error)))
            return dense

        with mock.patch.object(cpu, "block_sparse_attention", judged):
            yield
