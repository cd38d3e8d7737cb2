"""Train the dense models, short sequences first; what is done is kept, and an interrupted run goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.quality.model import LanguageModel, ModelSize
from benchmarks.quality.piece import Piece, keep
from benchmarks.quality.tasks import Sequences, plain_text, practice

RAMP = 40  # steps of rising learning rate


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        steps: Of the optimizer.
        tokens: A step.
        peak: Highest learning rate.
        stages: Up to which share of the steps sequences have which length.
    """

    steps: int = 900
    tokens: int = 4096
    peak: float = 3e-3
    stages: tuple[tuple[float, int], ...] = ((0.4, 256), (0.55, 512), (0.7, 1024), (1.0, 2048))

    def length(self, step: int) -> int:
        """Tokens of the sequences of a step."""
        return next(length for share, length in self.stages if step < share * self.steps)

    def learning_rate(self, step: int) -> float:
        """Linear up, then half a cosine down to a twentieth."""
        if step < RAMP:
            return self.peak * (step + 1) / RAMP
        return self.peak * (0.525 + 0.475 * math.cos(math.pi * (step - RAMP) / max(1, self.steps - RAMP)))


def train(size: ModelSize, training: Training, text: Tensor, seed: int, kept: Path, piece: Piece) -> LanguageModel:
    """A trained model, in eval mode.

    Args:
        size: Of the model.
        training: How.
        text: int64 ``[bytes]``.
        seed: Of the weights and of the choice of sequences.
        kept: File with what was done so far; written whenever this returns or raises.
        piece: Raises `TimeIsUp` from here.
    """
    torch.manual_seed(seed)
    model = LanguageModel(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.peak, betas=(0.9, 0.95), weight_decay=0.1)
    done = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    if done < training.steps:
        try:
            bar = tqdm(range(done, training.steps), desc=f"training, seed {seed}", unit="step", mininterval=5)
            for step in bar:
                piece.check()
                told = _step(model, optimizer, training, text, seed, step)
                bar.set_postfix_str(told, refresh=False)
                done = step + 1
        finally:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
            keep(kept, lambda path: torch.save(state, path))
    return model.eval()


def _step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, training: Training, text: Tensor, seed: int, step: int
) -> str:
    """One step; returns what to show of it."""
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate(step)
    # A generator of its own for each step: what a step reads does not depend on where a run was interrupted.
    choose = torch.Generator().manual_seed(1_000_003 * seed + step)
    length = training.length(step)
    half = max(1, training.tokens // length // 2)
    of_text, _ = losses(model, plain_text(text, half, length, choose))
    around, of_answers = losses(model, practice(text, half, length, choose))
    optimizer.zero_grad()
    (of_text + around + of_answers).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return f"length {length}, text {of_text.item():.3f}, answers {of_answers.item():.3f}"


def losses(model: LanguageModel, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood in nats of the bytes of the text, and of the answers (0 where there are none)."""
    logits = model(sequences.ids)[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), sequences.ids[:, 1:].flatten(), reduction="none")
    is_text, is_answer = sequences.is_text[:, 1:].flatten(), sequences.is_answer[:, 1:].flatten()
    return nll[is_text].mean(), nll[is_answer].sum() / is_answer.sum().clamp(min=1)
