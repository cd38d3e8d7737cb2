"""Check one spelling: found where it should be, dense attention with every block, the oracle's with few."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.census.oracle import BlockOracle
from benchmarks.grammar.spellings import HEADS, WIDTH, Attention, Spelling, draw
from msa_compile import MSAConfig, Site
from msa_compile.passes.pipeline import run_passes
from msa_compile.runtime import mark_dynamic

BATCH, LENGTH, PAST, FEW = 3, 21, 9, 2
EVERY = MSAConfig(block_size=4, topk_blocks=32, dense_below=0)
SOME = MSAConfig(block_size=4, topk_blocks=FEW, dense_below=0)
EXACT = 1e-4  # float32, outputs of a size of about 1


@dataclass(frozen=True)
class Outcome:
    """What came of one spelling.

    Attributes:
        site: What the passes say of it, or ``None`` when they saw no attention.
        every: Largest difference to the untouched module when every block is selected.
        few: Largest difference to the oracle when few are.
        wrong: What is wrong, or ``""``.
    """

    site: Site | None
    every: float
    few: float
    wrong: str


def quiet() -> None:
    """Prepare a worker process: one thread, and no word of refusals and compilers, which are what is expected."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def check_seed(seed: int) -> tuple[int, Outcome | None, str]:
    """The seed, what came of its spelling, and the error if it ended in one."""
    try:
        return seed, check_spelling(draw(seed), seed), ""
    except Exception as error:
        return seed, None, f"{type(error).__name__}: {error}"


def check_spelling(spelling: Spelling, seed: int) -> Outcome:
    """Capture once, rewrite under two budgets, and compare with the untouched module and the oracle."""
    torch.manual_seed(seed)
    module = Attention(spelling).eval()
    arguments = _arguments(spelling, seed)
    rewritten = _Both(spelling)
    torch._dynamo.reset()
    if spelling.dynamic:
        mark_dynamic(arguments)
    with torch.no_grad():
        expected = copy.deepcopy(module)(*arguments)
        compiled = torch.compile(copy.deepcopy(module), backend=rewritten)
        every = _gap(compiled(*arguments), expected, arguments[1])
        rewritten.few = True
        found = compiled(*arguments)
        site = rewritten.sites[0] if len(rewritten.sites) == 1 else None
        oracle = BlockOracle([site.decision if site else "dense"], SOME.block_size, FEW, spelling.groups)
        oracle.batch, oracle.query_length, oracle.key_length = BATCH, LENGTH, arguments[1].shape[1]
        with oracle:
            few = _gap(found, copy.deepcopy(module)(*arguments), arguments[1])
    return Outcome(site, every, few, _verdict(spelling, site, every, few))


def _verdict(spelling: Spelling, site: Site | None, every: float, few: float) -> str:
    if site is None:
        return "not seen"
    if spelling.is_sparse != (site.decision == "sparse"):
        return f"{site.decision}: {site.reason.value if site.reason else ''}: {site.detail}"
    if site.decision == "sparse" and (site.query_heads, site.key_value_heads) != (HEADS, spelling.groups):
        return f"{site.query_heads} query heads on {site.key_value_heads} groups"
    if not every <= EXACT:
        return f"off by {every:.1g} with every block"
    return "" if few <= EXACT else f"off by {few:.1g} with few blocks"


class _Both:
    """A backend that rewrites one graph under both budgets and runs the one that is asked for."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling = spelling
        self.sites: list[Site] = []
        self.few = False

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        every, some = (run_passes(gm, config, {}) for config in (EVERY, SOME))
        self.sites += some.record.sites
        return lambda *args: (some if self.few else every).module(*args)


def _arguments(spelling: Spelling, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, int]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    past, start = None, 0
    if spelling.cache == "concat":
        start = PAST
        shape = (2, BATCH, spelling.groups, PAST, x.shape[-1] // 2)
        keys, values = torch.randn(*shape, generator=generator)
        past = (keys, values)
    padding = torch.arange(start + LENGTH) >= torch.tensor([[0], [2], [start + 3]])
    return x, padding.long(), past, start


def _gap(found: Tensor, expected: Tensor, padding: Tensor) -> float:
    """The largest difference at real tokens."""
    return float((found - expected).abs().amax(-1)[padding[:, -LENGTH:].bool()].max())
