"""The same model under every selector: context managers that put one in, and take it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

import msa_compile
from benchmarks.quality.model import Attend, LanguageModel, attend_densely
from benchmarks.quality.selectors import BLOCK_SCORES, SelectedAttention
from msa_compile import MSAConfig

DENSE, KEYS, RANDOM, CALIBRATED = "dense", "keys", "learned, random", "learned, calibrated"
SELECTORS = (KEYS, RANDOM, CALIBRATED, *BLOCK_SCORES)


@contextlib.contextmanager
def attending(model: LanguageModel, attend: Attend) -> Iterator[None]:
    """The model with another attention."""
    try:
        for module in model.attentions():
            module.attend = attend
        yield
    finally:
        for module in model.attentions():
            module.attend = attend_densely


@contextlib.contextmanager
def selecting(
    model: LanguageModel, selector: str, *, block_size: int, topk: int, adapter: Path, seed: int
) -> Iterator[None]:
    """The model with its blocks chosen by a selector.

    Args:
        model: The dense model.
        selector: One of `SELECTORS`, or `DENSE`.
        block_size: Keys in a block.
        topk: Blocks a query.
        adapter: Folder of the calibrated index branches.
        seed: Of random index branches.
    """
    if selector == DENSE:
        yield
        return
    if selector in BLOCK_SCORES:
        with attending(model, SelectedAttention(BLOCK_SCORES[selector], block_size, topk)):
            yield
        return
    indexer: Literal["keys", "learned"] = "keys" if selector == KEYS else "learned"
    torch.manual_seed(seed)
    sparsify(model, MSAConfig(block_size=block_size, topk_blocks=topk, dense_below=0, indexer=indexer, strict=True))
    try:
        if selector == CALIBRATED:
            msa_compile.load(model, adapter)
        yield
        _check(model, indexer)
    finally:
        msa_compile.unsparsify(model)


def _check(model: LanguageModel, indexer: str) -> None:
    """Fail where something else was measured than what the row will say."""
    report = msa_compile.explain(model)
    used = [site.indexer for site in report.sites]
    if set(used) != {indexer} or report.dense_calls or report.missed_selections:
        raise RuntimeError(f"not {indexer!r} at each site: {report}")


def sparsify(model: LanguageModel, config: MSAConfig) -> None:
    """Every layer sparse, uncompiled: what is measured is not how fast it is."""
    ids = torch.zeros((2, 8 * config.block_size), dtype=torch.long)
    msa_compile.sparsify(model, config, example_inputs=(ids,), inner="eager")
