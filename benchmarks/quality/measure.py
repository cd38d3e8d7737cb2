"""What a model can do with the blocks that it is given: perplexity, retrieval, and the blocks themselves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.judge import Judge
from benchmarks.quality.model import LanguageModel
from benchmarks.quality.tasks import Sequences, questions, windows

BATCH = 2  # sequences a call


@dataclass(frozen=True)
class Exam:
    """What every model and selector is asked, the same for all.

    Attributes:
        text: Held-out windows, int64 ``[windows, T]``.
        needles: A few facts in much text.
        recall: Many facts in the text.
        judged: How many windows of text the blocks are judged on.
    """

    text: Tensor
    needles: Sequences
    recall: Sequences
    judged: int

    @classmethod
    def on(cls, held_out: Tensor, length: int, *, texts: int, prompts: int, judged: int) -> Exam:
        """An exam on held-out text, with sequences of `length` tokens.

        Args:
            held_out: int64 ``[bytes]``.
            length: Tokens of each sequence.
            texts: Windows of text.
            prompts: Windows with many facts; there are twice as many with few.
            judged: Windows of text that the blocks are judged on.
        """
        choose = torch.Generator().manual_seed(0)
        few, many = few_facts(length), many_facts(length)
        return cls(
            windows(held_out, texts, length),
            questions(held_out, 2 * prompts, length, few, choose),
            questions(held_out, prompts, length, many, choose),
            judged,
        )


def few_facts(length: int) -> int:
    """Needles in a sequence."""
    return max(2, length // 512)


def many_facts(length: int) -> int:
    """Facts in a sequence of which many are asked for."""
    return max(4, length // 43)


@dataclass(frozen=True)
class LayerScore:
    """The blocks of one layer, mean over its groups and the judged queries.

    Attributes:
        mass: True attention mass that the chosen blocks hold.
        oracle_mass: And what the best as many blocks would hold.
        block_recall: Share of the best blocks that were chosen, own blocks left out.
        output_error: Relative error of the attention output.
    """

    mass: float
    oracle_mass: float
    block_recall: float
    output_error: float


@dataclass(frozen=True)
class Row:
    """One model with one selector at one budget.

    Attributes:
        seed: Of the model.
        selector: Or ``"dense"``.
        share: One in how many keys is read; 1 for dense.
        perplexity: Of held-out text a byte, over the second half of each window.
        needles, recall: Share of the answers that were found.
        layers: Empty for dense.
    """

    seed: int
    selector: str
    share: int
    perplexity: float
    needles: float
    recall: float
    layers: tuple[LayerScore, ...] = ()

    @property
    def retrieval(self) -> float:
        """Both kinds of questions, one as important as the other."""
        return (self.needles + self.recall) / 2

    def mean(self, name: str) -> float:
        """Mean of a field of the layers."""
        return sum(getattr(layer, name) for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Row:
        """The inverse of ``to_dict``."""
        return cls(**{**kept, "layers": tuple(LayerScore(**layer) for layer in kept["layers"])})


@torch.no_grad()
def examine(model: LanguageModel, exam: Exam, *, seed: int, selector: str, share: int) -> Row:
    """Ask everything of a model that has its selector already."""
    judge = Judge()
    if share > 1:
        with judge.watching():
            for window in exam.text[: exam.judged].split(BATCH):
                model(window)
    return Row(
        seed=seed,
        selector=selector,
        share=share,
        perplexity=_perplexity(model, exam.text),
        needles=_found(model, exam.needles),
        recall=_found(model, exam.recall),
        layers=_layer_scores(judge, len(model.layers)),
    )


def _perplexity(model: LanguageModel, text: Tensor) -> float:
    half = text.shape[1] // 2
    losses = [
        F.cross_entropy(model(part)[:, half - 1 : -1].flatten(0, 1), part[:, half:].flatten(), reduction="none")
        for part in text.split(BATCH)
    ]
    return math.exp(torch.cat(losses).mean())


def _found(model: LanguageModel, asked: Sequences) -> float:
    right = []
    for ids, is_answer in zip(asked.ids.split(BATCH), asked.is_answer.split(BATCH), strict=True):
        is_right = model(ids)[:, :-1].argmax(-1) == ids[:, 1:]
        right.append(is_right[is_answer[:, 1:]])
    return float(torch.cat(right).float().mean())


def _layer_scores(judge: Judge, layers: int) -> tuple[LayerScore, ...]:
    scores = []
    for layer in range(layers):
        mine = judge.choices[layer::layers]
        if mine:
            rows = [(one.captured(one.ids), one.captured(one.best), one.recall(), one.error) for one in mine]
            scores.append(LayerScore(*torch.tensor(rows, dtype=torch.float64).mean(0).tolist()))
    return tuple(scores)
