"""Prove by running it that what a model chooses its blocks by is the rule of `msa::select_blocks_at`.

What lies between the scores and the chosen keys is run on random scores and positions, at sizes around its block size
and its budget, beside the rule written out; what lies behind, on random choices. A row in which two blocks score the
same where the budget ends proves nothing and is left out: no rule is promised there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from msa_compile.kernels.given_mask.op import HIDDEN
from msa_compile.passes.attention import Attention, Refused
from msa_compile.passes.choose_sizes import SizeSpace
from msa_compile.passes.find_own_selection import OwnSelection
from msa_compile.passes.graph_facts import GraphFacts, argument, is_op, tensor_value
from msa_compile.passes.replay import ReplayError, Sizes, bind, concrete, expression, is_runnable, replay, symbols_of
from msa_compile.records import Reason

aten = torch.ops.aten
_LARGEST_RUN = 2**26  # scores of one run
_LARGEST_SUM = 2**27  # scores of all runs of a site
_FAR = 2**40  # a length beyond every budget
_STEPS = (
    aten.arange, aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne, aten.sub, aten.add, aten.neg, aten.masked_fill,
    aten.pad, aten.view, aten.reshape, aten.amax, aten.floor_divide, aten.div, aten.unsqueeze, aten.clamp, aten.expand,
    aten.scatter, aten.scatter_, aten.topk, aten.new_full, aten.full, aten.slice, aten.repeat_interleave, aten.to,
    aten.where, aten.bitwise_not, aten.logical_not, aten.bitwise_and, aten.bitwise_or, aten.logical_and,
    aten.logical_or, aten.__and__, aten.__or__, aten.squeeze, aten.contiguous, aten.clone, aten.alias, aten.detach,
)  # fmt: skip


@dataclass(frozen=True)
class SelectionProof:
    """The block selection that a model has of its own, proved.

    Attributes:
        index_query: ``[B, Hkv, Tq, D]``.
        index_key: ``[B, 1 or Hkv, Tk, D]``.
        positions: Slots of the queries, ``[Tq]``, ``[1, Tq]`` or ``[B, Tq]``.
        block_size, topk, local_blocks: As in ``MSAConfig``.
    """

    index_query: Node
    index_key: Node
    positions: Node
    block_size: int
    topk: int
    local_blocks: int


@dataclass(frozen=True)
class _Trial:
    """Scores ``[B, Hkv, Tq, Tk]`` and positions ``[B, Tq]`` to run at, and the sizes that they have."""

    sizes: Sizes
    scores: Tensor
    positions: Tensor


def prove_own_selection(facts: GraphFacts, attention: Attention, own: OwnSelection) -> SelectionProof:
    """Prove the block selection ``own`` of ``attention``.

    Raises:
        Refused: It follows another rule, or could not be run.
    """
    try:
        topk = _budget(own)
        trials = list(_trials(own, topk))
        positions, local_blocks = _find_positions(facts, own, topk, trials)
        _check_mask(facts, attention, own, trials)
    except ReplayError as error:
        raise _refused(f"it could not be run: {error}") from None
    return SelectionProof(own.index_query, own.index_key, positions, own.block_size, topk, local_blocks)


def _refused(why: str) -> Refused:
    return Refused(Reason.DATA_DEPENDENT_MASK, f"the model's own block selection: {why}")


def _budget(own: OwnSelection) -> int:
    """How many blocks are chosen where there are more."""
    given = argument(own.best, "k")
    size = expression(given.meta["val"] if isinstance(given, Node) else given)
    far = [bind(size, dict.fromkeys(size.free_symbols, length)) for length in (_FAR, 2 * _FAR)]
    if far[0] != far[1] or not isinstance(far[0], sympy.Integer):
        raise _refused(f"its budget of {size} blocks is no number")
    return int(far[0])


def _trials(own: OwnSelection, topk: int) -> Iterator[_Trial]:
    """Sizes around a block and around the budget, some of them beyond it."""
    shape = own.scores.meta["val"].shape
    tensors = (own.scores, own.kept, own.seen, own.term.node)
    symbols = symbols_of(set(tensors))
    rows = set().union(*(expression(node.meta["val"].shape[0]).free_symbols for node in tensors))
    lengths = symbols - (rows - expression(shape[2]).free_symbols - expression(shape[3]).free_symbols)
    space = SizeSpace(size for size in shape if isinstance(size, torch.SymInt))
    block, budget = own.block_size, own.block_size * topk
    wanted = [
        5,
        block,
        block + 1,
        2 * block + 3,
        budget - 1,
        budget,
        budget + 1,
        budget + block,
        budget + 2 * block + 1,
    ]
    pool = sorted({size - less for size in wanted for less in (0, 1) if size - less > 1})
    generator = torch.Generator().manual_seed(0)
    left, longest = _LARGEST_SUM, 0
    for chosen in space.spread(lengths, pool, limit=64):
        sizes = {**dict.fromkeys(symbols - lengths, 2), **chosen}
        batch, heads, queries, keys = (concrete(size, sizes) for size in shape)
        cost = batch * heads * queries * keys
        if not space.holds(sizes) or queries > keys or cost > min(_LARGEST_RUN, left):
            continue
        left, longest = left - cost, max(longest, keys)
        scores = torch.randn(batch, heads, queries, keys, generator=generator).to(own.scores.meta["val"].dtype)
        last = torch.arange(keys - queries, keys).expand(batch, -1).contiguous()
        yield _Trial(sizes, scores, last)
        yield _Trial(sizes, scores, torch.randint(keys, (batch, queries), generator=generator))
    bound = shape[3] if isinstance(shape[3], int) else space.upper_bound(shape[3])
    if longest <= budget and (longest == 0 or bound is None or bound > budget):
        raise _refused(f"it could not be run beyond its budget of {budget} keys")


def _find_positions(facts: GraphFacts, own: OwnSelection, topk: int, trials: list[_Trial]) -> tuple[Node, int]:
    """The positions of queries and the number of local blocks with which the rule holds in every trial."""
    inner, boundary = facts.makers(own.kept, own.kept, stop=lambda node: node is own.scores)
    _check_steps(inner, max(trial.scores.shape[-1] for trial in trials))
    queries = expression(own.scores.meta["val"].shape[2])
    for node in facts.ordered(inner | boundary):
        value = tensor_value(node)
        if (
            value is None
            or value.dtype != torch.int64
            or value.dim() not in (1, 2)
            or expression(value.shape[-1]) != queries
        ):
            continue
        for local_blocks in range(1, topk + 1):
            try:
                if all(_is_rule(facts, own, node, trial, topk, local_blocks) for trial in trials):
                    return node, local_blocks
            except ReplayError:
                break
    raise _refused(f"another choice than the best {topk} blocks of {own.block_size} keys by their best key")


def _check_steps(inner: set[Node], longest: int) -> None:
    """Refuse what a few runs do not tell of: steps that are no part of a selection, and constants beyond the runs."""
    for node in inner:
        if tensor_value(node) is not None and node.target is not operator.getitem and not is_op(node, *_STEPS):
            raise _refused(f"{node.target} is no part of one that is known")
        for part in (*node.args, *node.kwargs.values()):
            if isinstance(part, int) and longest < abs(part) < 2**40:
                raise _refused(f"it may change at {part}, beyond the sizes that it was run at")


def _is_rule(
    facts: GraphFacts, own: OwnSelection, positions: Node, trial: _Trial, topk: int, local_blocks: int
) -> bool:
    given = _positions_like(positions, trial)
    inner, boundary = facts.makers(own.kept, own.kept, stop=lambda node: node in (own.scores, positions))
    runnable = {node for node in boundary if is_runnable(node)}
    kept = replay(facts, inner | runnable, {own.scores: trial.scores, positions: given}, trial.sizes, own.kept)
    where = given.expand(len(trial.scores), -1) if given.dim() == 2 else given.expand(len(trial.scores), len(given))
    expected, is_decided = _choose(trial.scores, where, own.block_size, topk, local_blocks)
    return bool((kept == expected)[is_decided].all())


def _positions_like(node: Node, trial: _Trial) -> Tensor:
    """The positions of a trial in the shape of ``node``."""
    shape = [concrete(size, trial.sizes) for size in node.meta["val"].shape]
    return trial.positions[0] if len(shape) == 1 else trial.positions[: shape[0]].contiguous()


def _choose(scores: Tensor, positions: Tensor, block_size: int, topk: int, local_blocks: int) -> tuple[Tensor, Tensor]:
    """The rule: which keys are in a chosen block ``[B, H, Tq, Tk]``, and in which rows it is decided ``[B, H, Tq]``."""
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


def _check_mask(facts: GraphFacts, attention: Attention, own: OwnSelection, trials: list[_Trial]) -> None:
    """Refuse a mask that is not, for the heads of each group, the chosen keys that are seen."""
    inner, boundary = facts.makers(own.term.node, attention.output, stop=lambda node: node in (own.kept, own.seen))
    inner |= {node for node in boundary if is_runnable(node)}
    generator = torch.Generator().manual_seed(0)
    for trial in sorted(trials, key=lambda trial: trial.scores.numel())[:3]:
        seen_shape = [concrete(size, trial.sizes) for size in own.seen.meta["val"].shape]
        kept, seen = (torch.rand(*shape, generator=generator) > 0.5 for shape in (trial.scores.shape, seen_shape))
        mask = replay(facts, inner, {own.kept: kept, own.seen: seen}, trial.sizes, own.term.node)
        if own.term.kind == "additive":
            if not ((mask == 0) | (mask <= HIDDEN)).all():
                raise _refused("the mask adds values other than 0 and minus infinity")
            visible = mask == 0
        else:
            visible = mask if own.term.kind == "visible" else ~mask
        expected = kept & seen
        if visible.dim() != 4 or visible.shape[1] % expected.shape[1]:
            raise _refused(f"the mask is {tuple(visible.shape)}")
        expected = expected.repeat_interleave(visible.shape[1] // expected.shape[1], 1)
        if not torch.equal(visible, expected):
            raise _refused("the mask is not that of the chosen keys")
