"""What is run: sizes of the model, its training, budgets, how much is asked; and what a toy version of it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from benchmarks.quality.model import ModelSize
from benchmarks.quality.tasks import VOCABULARY
from benchmarks.quality.train import Training
from msa_compile.kernels.break_even import kernels_version


@dataclass(frozen=True)
class Setting:
    """One run of the benchmark.

    Attributes:
        size: Of the models.
        training: Of the models.
        block_size: Keys in a block.
        shares: Budgets: one in so many of the context's keys.
        texts, prompts, judged: How much is asked, see `Exam`.
        calibration_steps, calibration_rate: Of the index branches.
        seeds: One model each.
    """

    size: ModelSize = field(default_factory=lambda: ModelSize(VOCABULARY))
    training: Training = field(default_factory=Training)
    block_size: int = 16
    shares: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    texts: int = 8
    prompts: int = 8
    judged: int = 4
    calibration_steps: int = 200
    calibration_rate: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)

    def topk(self, share: int) -> int:
        """Blocks a query at a budget."""
        return self.size.context // self.block_size // share

    @property
    def of_models(self) -> str:
        """Digest of what a trained model depends on, but for its seed."""
        return _digest(self.size, self.training, torch.__version__)

    @property
    def of_indexers(self) -> str:
        """Digest of what calibrated index branches depend on."""
        return _digest(self.of_models, self.block_size, self.calibration_steps, self.calibration_rate)

    def of_rows(self, *, has_indexers: bool) -> str:
        """Digest of what a measured row depends on, but for its budget; the code of the ops is part of it."""
        of = self.of_indexers if has_indexers else _digest(self.of_models, self.block_size)
        return _digest(of, self.texts, self.prompts, self.judged, kernels_version("cpu"))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


TOY = Setting(
    size=ModelSize(VOCABULARY, layers=1, hidden=32, query_heads=4, head_dim=16, context=128),
    training=Training(steps=6, tokens=256, stages=((0.5, 64), (1.0, 128))),
    block_size=8,
    shares=(2, 8),
    texts=2,
    prompts=1,
    judged=2,
    calibration_steps=2,
    seeds=(0,),
)
