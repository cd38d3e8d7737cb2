"""Prove by running it that what a model chooses its blocks by is the rule of `msa::select_blocks_at`.

What lies between the scores and the chosen keys is run on random scores and positions, at sizes around its block size
and its budget, beside the rule written out; what lies behind, on random choices.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, Refused
from msa_compile.passes.find_own_selection import OwnSelection
from msa_compile.passes.graph_facts import GraphFacts, argument, is_op, tensor_value
from msa_compile.passes.replay import ReplayError, bind, expression, is_runnable, replay
from msa_compile.passes.run_own_selection import Trial, concrete_shape, is_rule, refused, trials_of
from msa_compile.passes.spell_own_selection import is_size, spell_own_selection

aten = torch.ops.aten
_FAR = 2**40  # a length beyond every budget
_DROWNS = -1e30  # less than this, and a score that it is added to is gone in rounding
_STEPS = (
    aten.arange, aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne, aten.sub, aten.add, aten.neg, aten.masked_fill,
    aten.pad, aten.view, aten.reshape, aten.amax, aten.floor_divide, aten.div, aten.unsqueeze, aten.clamp, aten.expand,
    aten.scatter, aten.scatter_, aten.topk, aten.new_full, aten.full, aten.slice, aten.repeat_interleave, aten.to,
    aten.where, aten.bitwise_not, aten.logical_not, aten.bitwise_and, aten.bitwise_or, aten.logical_and,
    aten.logical_or, aten.__and__, aten.__or__, aten.squeeze, aten.contiguous, aten.clone, aten.alias, aten.detach,
    aten.zeros, aten.full_like, aten.zeros_like,
)  # fmt: skip


@dataclass(frozen=True)
class SelectionProof:
    """The block selection that a model has of its own, proved.

    Attributes:
        index_query: ``[B, Hkv, Tq, D]``.
        index_key: ``[B, 1 or Hkv, Tk, D]``.
        positions: Slots of the queries, ``[Tq]``, ``[1, Tq]`` or ``[B, Tq]``; ``None`` where they are proved to be the
            last ones of the keys.
        block_size, topk, local_blocks: As in ``MSAConfig``.
        averages: Whether a query that sees nothing gets the mean of all values, as a softmax over scores that are all
            hidden by one finite number gives it, and not zeros.
    """

    index_query: Node
    index_key: Node
    positions: Node | None
    block_size: int
    topk: int
    local_blocks: int
    averages: bool


@dataclass(frozen=True)
class _Rule:
    """What was proved, without the nodes of one site: the layers of a model have the same selection."""

    positions: int | None
    topk: int
    local_blocks: int
    averages: bool


class SelectionProver:
    """Proves the block selections of one graph, equal ones once."""

    def __init__(self, facts: GraphFacts) -> None:
        self._facts = facts
        self._known: dict[tuple[str, ...], _Rule | Refused] = {}

    def prove(self, attention: Attention, own: OwnSelection) -> SelectionProof:
        """Prove the block selection ``own`` of ``attention``.

        Raises:
            Refused: It follows another rule, or could not be run.
        """
        nodes = self._pieces(attention, own)
        spelling = spell_own_selection(attention, own, nodes)
        if spelling not in self._known:
            try:
                self._known[spelling] = _prove(self._facts, attention, own, nodes)
            except Refused as refusal:
                self._known[spelling] = refusal
        rule = self._known[spelling]
        if isinstance(rule, Refused):
            raise rule
        positions = None if rule.positions is None else nodes[rule.positions]
        read = [node for node in (own.index_query, own.index_key, own.seen, positions) if node is not None]
        if any(self._facts.written_between(node, own.scores, attention.output) for node in read):
            raise refused("what it is made from is overwritten before the attention")
        return SelectionProof(
            own.index_query, own.index_key, positions, own.block_size, rule.topk, rule.local_blocks, rule.averages
        )

    def _pieces(self, attention: Attention, own: OwnSelection) -> list[Node]:
        """The tensors that the mask is made from, back to the scores and to what else hides keys, in order."""
        stops = (own.scores, own.seen)
        inner, boundary = self._facts.makers(own.term.node, attention.output, stop=lambda node: node in stops)
        return [node for node in self._facts.ordered(inner | boundary) if not is_size(node)]


def _prove(facts: GraphFacts, attention: Attention, own: OwnSelection, nodes: list[Node]) -> _Rule:
    try:
        topk = _budget(own)
        trials = list(trials_of(own, topk))
        positions, local_blocks = _find_positions(facts, own, topk, trials)
        averages = _check_mask(facts, attention, own, topk, trials)
        if positions not in nodes:
            raise refused("what else hides keys is part of the choice")
        where = None if _are_last(facts, own, positions, topk, trials) else nodes.index(positions)
        return _Rule(where, topk, local_blocks, averages)
    except ReplayError as error:
        raise refused(f"it could not be run: {error}") from None


def _budget(own: OwnSelection) -> int:
    """How many blocks are chosen where there are more."""
    given = argument(own.best, "k")
    size = expression(given.meta["val"] if isinstance(given, Node) else given)
    far = [bind(size, dict.fromkeys(size.free_symbols, length)) for length in (_FAR, 2 * _FAR)]
    if far[0] != far[1] or not isinstance(far[0], sympy.Integer):
        raise refused(f"its budget of {size} blocks is no number")
    return int(far[0])


def _find_positions(facts: GraphFacts, own: OwnSelection, topk: int, trials: list[Trial]) -> tuple[Node, int]:
    """The positions of queries and the number of local blocks with which the rule holds in every trial."""
    inner, boundary = facts.makers(own.kept, own.kept, stop=lambda node: node is own.scores)
    _check_steps(inner, own, topk, trials)
    queries = expression(own.scores.meta["val"].shape[2])
    # The last that will do: what comes before may have other values, and be brought into the bounds of the keys.
    for node in reversed(facts.ordered(inner | boundary)):
        value = tensor_value(node)
        is_row = value is not None and value.dtype == torch.int64 and value.dim() in (1, 2)
        if not is_row or expression(value.shape[-1]) != queries:  # type: ignore[union-attr]
            continue
        for local_blocks in range(1, topk + 1):
            try:
                if all(is_rule(facts, own, node, trial, topk, local_blocks) for trial in trials):
                    return node, local_blocks
            except ReplayError:
                break
    raise refused(f"another choice than the best {topk} blocks of {own.block_size} keys by their best key")


def _check_steps(inner: set[Node], own: OwnSelection, topk: int, trials: list[Trial]) -> None:
    """Refuse what a few runs do not tell of: steps that are no part of a selection, and constants beyond the runs."""
    # Runs go beyond the budget, or the graph never does.
    longest = max(own.block_size * topk, *(trial.scores.shape[-1] for trial in trials))
    for node in inner:
        if tensor_value(node) is not None and node.target is not operator.getitem and not is_op(node, *_STEPS):
            raise refused(f"{node.target} is no part of one that is known")
        for part in (*node.args, *node.kwargs.values()):
            if isinstance(part, int) and longest < abs(part) < 2**40:
                raise refused(f"it may change at {part}, beyond the sizes that it was run at")


def _are_last(facts: GraphFacts, own: OwnSelection, positions: Node, topk: int, trials: list[Trial]) -> bool:
    """Whether queries stand at the last slots of the keys in every call, by what makes their positions."""
    inner, boundary = facts.makers(positions, own.kept)
    if not all(is_runnable(node) or tensor_value(node) is None for node in boundary):
        return False
    try:
        _check_steps(inner, own, topk, trials)
        for trial in trials:
            queries, keys = trial.scores.shape[2:]
            found = replay(facts, inner | {node for node in boundary if is_runnable(node)}, {}, trial.sizes, positions)
            if not bool((found == torch.arange(keys - queries, keys)).all()):
                return False
    except (Refused, ReplayError):
        return False
    return True


def _check_mask(facts: GraphFacts, attention: Attention, own: OwnSelection, topk: int, trials: list[Trial]) -> bool:
    """Refuse a mask that is not, for the heads of each group, the chosen keys that are seen.

    Returns:
        ``SelectionProof.averages``.
    """
    inner, boundary = facts.makers(own.term.node, attention.output, stop=lambda node: node in (own.kept, own.seen))
    _check_steps(inner, own, topk, trials)
    inner |= {node for node in boundary if is_runnable(node)}
    generator = torch.Generator().manual_seed(0)
    averages = False
    for trial in trials:
        shapes = (concrete_shape(node, trial.sizes) for node in (own.kept, own.seen))
        kept, seen = (torch.rand(*shape, generator=generator) > 0.5 for shape in shapes)
        kept[..., :1, :], kept[..., :1] = False, False  # something is hidden at every size
        mask = replay(facts, inner, {own.kept: kept, own.seen: seen}, trial.sizes, own.term.node)
        visible = mask == 0 if own.term.kind == "additive" else mask if own.term.kind == "visible" else ~mask
        averages = _averages(attention, own, mask[~visible])
        expected = kept & seen
        if visible.dim() != 4 or visible.shape[1] % expected.shape[1]:
            raise refused(f"the mask is {tuple(visible.shape)}")
        if not torch.equal(visible, expected.repeat_interleave(visible.shape[1] // expected.shape[1], 1)):
            raise refused("the mask is not that of the chosen keys")
    return averages


def _averages(attention: Attention, own: OwnSelection, added: torch.Tensor) -> bool:
    """Whether softmax spreads evenly over keys that are all hidden, by what is ``added`` at hidden ones."""
    if own.term.kind != "additive":
        if attention.form not in ("sdpa", "flex"):
            raise refused("what a query gets that sees nothing is not known")
        return False
    if bool((added == -torch.inf).all()):
        return False
    if not bool((added < _DROWNS).all()) or bool((added == -torch.inf).any()):
        raise refused(f"it adds {float(added.max()):.6g} at a hidden key, which is less than hiding it")
    return attention.sinks is None
