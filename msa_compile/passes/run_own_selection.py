"""Run a model's own block selection on random scores and positions, beside the rule of `msa::select_blocks_at`.

A row in which two blocks score the same where the budget ends proves nothing and is left out: no rule is promised
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from msa_compile.passes.attention import Refused
from msa_compile.passes.choose_sizes import SizeSpace
from msa_compile.passes.find_own_selection import OwnSelection
from msa_compile.passes.graph_facts import GraphFacts
from msa_compile.passes.replay import Sizes, bind, concrete, expression, is_runnable, replay, symbols_of
from msa_compile.records import Reason

_LARGEST_RUN = 2**26  # scores of one run
_LARGEST_SUM = 2**27  # scores of all runs of a site
_MOST_SIZES = 20
# What the scores of a run look like. The rule hangs on their order alone, and so must what a model does with them: a
# bound, a threshold or a number that stands for a hidden score shows where scores are large, small or all below zero.
_LOOKS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda scores: scores,
    lambda scores: -scores.abs() - 1,
    lambda scores: scores * 1e6,
    lambda scores: scores * 1e-6,
)


@dataclass(frozen=True)
class Trial:
    """Scores ``[B, Hkv, Tq, Tk]`` and positions ``[B, Tq]`` to run at, and the sizes that they have."""

    sizes: Sizes
    scores: Tensor
    positions: Tensor


def trials_of(own: OwnSelection, topk: int) -> Iterator[Trial]:
    """Trials at sizes around a block and around the budget, the sizes of the captured call first.

    Args:
        own: The selection.
        topk: Blocks that it chooses.

    Raises:
        Refused: The graph may be called beyond the budget, and could not be run there.
    """
    shape, kept = own.scores.meta["val"].shape, own.kept.meta["val"].shape
    tensors = (own.scores, own.kept, own.seen, own.term.node)
    symbols = symbols_of(set(tensors))
    rows = set().union(*(expression(node.meta["val"].shape[0]).free_symbols for node in tensors))
    tied = tied_sizes(own)
    lengths = symbols - (rows - expression(shape[2]).free_symbols - expression(shape[3]).free_symbols) - set(tied)
    space = SizeSpace(size for size in (*shape, *kept) if isinstance(size, torch.SymInt))
    block, budget = own.block_size, own.block_size * topk
    wanted = [5, block, block + 1, 2 * block + 3, *(budget + more for more in (-1, 0, 1, block, 2 * block + 1))]
    pool = sorted({size - less for size in wanted for less in (0, 1) if size - less > 1})
    generator = torch.Generator().manual_seed(0)
    left, longest, number = _LARGEST_SUM, 0, 0
    for chosen in space.spread(lengths, pool, limit=_MOST_SIZES):
        sizes = {**dict.fromkeys(symbols - lengths, 2), **chosen}
        sizes |= {symbol: int(bind(size, sizes)) for symbol, size in tied.items()}
        batch, heads, queries, keys = (concrete(size, sizes) for size in shape)
        cost = batch * heads * queries * keys
        is_call = space.holds(sizes) and queries <= keys == concrete(kept[3], sizes)
        if not is_call or cost > min(_LARGEST_RUN, left):
            continue
        left, longest = left - cost, max(longest, keys)
        last = torch.arange(keys - queries, keys).expand(batch, -1).contiguous()
        anywhere = torch.randint(-2, -(-keys // block) * block, (batch, queries), generator=generator)
        for positions in (last, anywhere):
            scores = _LOOKS[number % len(_LOOKS)](torch.randn(batch, heads, queries, keys, generator=generator))
            number += 1
            yield Trial(sizes, scores.to(own.scores.meta["val"].dtype), positions)
    bound = shape[3] if isinstance(shape[3], int) else space.upper_bound(shape[3])
    if longest <= budget and (longest == 0 or bound is None or bound > budget):
        raise refused(f"it could not be run beyond its budget of {budget} keys")


def refused(why: str) -> Refused:
    """The refusal of a block selection."""
    return Refused(Reason.DATA_DEPENDENT_MASK, f"the model's own block selection: {why}")


def tied_sizes(own: OwnSelection) -> dict[sympy.Symbol, sympy.Expr]:
    """The symbol that makes index keys as many as keys, and its value; empty where the graph knows that they are.

    Index keys that are cached apart from keys have a length of their own, which is the same in every call: the op
    checks it.
    """
    lengths = (expression(node.meta["val"].shape[3]) for node in (own.scores, own.kept))
    difference = next(lengths) - next(lengths)
    for symbol in sorted(difference.free_symbols, key=str):
        factor = difference.coeff(symbol)
        rest = sympy.expand(difference - factor * symbol)
        if factor in (1, -1) and symbol not in rest.free_symbols:
            return {symbol: -rest * factor}
    return {}


def is_rule(facts: GraphFacts, own: OwnSelection, positions: Node, trial: Trial, topk: int, local_blocks: int) -> bool:
    """Whether ``own`` chooses in ``trial`` what the rule chooses for queries at ``positions``.

    Raises:
        ReplayError: It cannot be run on these.
    """
    given = _positions_like(positions, trial)
    inner, boundary = facts.makers(own.kept, own.kept, stop=lambda node: node in (own.scores, positions))
    runnable = {node for node in boundary if is_runnable(node)}
    kept = replay(facts, inner | runnable, {own.scores: trial.scores, positions: given}, trial.sizes, own.kept)
    places = given.expand(len(trial.scores), -1)
    expected, is_decided = _choose(trial.scores, places, own.block_size, topk, local_blocks)
    return kept.shape == expected.shape and bool((kept == expected)[is_decided].all())


def concrete_shape(node: Node, sizes: Sizes) -> list[int]:
    """The shape of a tensor at ``sizes``."""
    return [concrete(size, sizes) for size in node.meta["val"].shape]


def _positions_like(node: Node, trial: Trial) -> Tensor:
    """The positions of a trial in the shape of ``node``."""
    shape = concrete_shape(node, trial.sizes)
    return trial.positions[0] if len(shape) == 1 else trial.positions[: shape[0]].contiguous()


def _choose(scores: Tensor, positions: Tensor, block_size: int, topk: int, local_blocks: int) -> tuple[Tensor, Tensor]:
    """The rule: which keys are in a chosen block ``[B, H, Tq, Tk]``, and in which rows it is decided ``[B, H, Tq]``.

    A position below 0 counts as 0.
    """
    positions = positions.clamp(min=0)
    keys = scores.shape[-1]
    blocks = -(-keys // block_size)
    scores = scores.masked_fill(torch.arange(keys) > positions[:, None, :, None], -torch.inf)
    best = F.pad(scores, (0, blocks * block_size - keys), value=-torch.inf).unflatten(-1, (blocks, -1)).amax(-1)
    block, local = torch.arange(blocks), (positions // block_size)[:, None, :, None]
    best = best.masked_fill((block <= local) & (block > local - local_blocks), torch.inf)
    ranked = best.sort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen.scatter_(-1, ranked.indices[..., :topk], ranked.values[..., :topk] > -torch.inf)
    is_decided = torch.ones_like(best[..., 0], dtype=torch.bool)
    if blocks > topk:
        last, next_best = ranked.values[..., topk - 1], ranked.values[..., topk]
        is_decided = (last > next_best) | (next_best == -torch.inf)
    return chosen.repeat_interleave(block_size, -1)[..., :keys], is_decided
