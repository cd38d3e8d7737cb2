"""Prove what a mask is by running it, at sizes that straddle its own constants and on random paddings.

A mask is lifted out of the graph with everything that makes it. When it is closed (only sizes, a padding mask, a cache
offset), it is run and compared with causal, causal with padding, and sliding window. What is not one of these but is
certainly visibility (true/false) is passed to the op as it is, which is exact. What may be more than visibility (a bias) or
comes from activations is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, MaskProof, MaskTerm, Refused
from msa_compile.passes.choose_sizes import SizeSpace, shape_symbols
from msa_compile.passes.graph_facts import GraphFacts, is_op, tensor_value
from msa_compile.passes.match_softmax_chain import HIDDEN
from msa_compile.passes.replay import ReplayError, Sizes, concrete, expression, is_runnable, replay, symbols_of
from msa_compile.records import Reason

aten = torch.ops.aten
_FROM_ACTIVATIONS = (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.topk, aten.softmax)
_LOOKED_UP = (aten.embedding,)
_MOVES = (aten.slice, aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.contiguous, aten.to, aten.clone)
_SIZES = (2, 3, 5, 8, 17, 33)
_LARGEST_CONSTANT = 4096  # a window wider than this is not straddled by a proof; its mask is passed as it is
_LARGEST_RUN = 2**26  # elements of one concrete mask


@dataclass(frozen=True)
class _Lifted:
    """The closed piece that makes all mask terms, and its open inputs."""

    inner: set[Node]
    paddings: tuple[Node, ...]
    offsets: tuple[Node, ...]
    others: tuple[Node, ...]


def prove_mask(facts: GraphFacts, attention: Attention, key_length: object) -> MaskProof:
    """Say what hides the scores of ``attention``.

    Args:
        facts: Facts of the graph.
        attention: The attention.
        key_length: ``Tk``, possibly symbolic.

    Raises:
        Refused: If later keys are visible, the mask is a bias, comes from activations, or differs between heads.
    """
    query_length = attention.query.meta["val"].shape[2]
    if not attention.mask:
        return _without_mask(attention, query_length, key_length)
    lifted = _lift(facts, attention)
    for term in attention.mask:
        _check_term(term, lifted, query_length)
    if lifted.others:
        return MaskProof("given", detail="mask handed in or made from positions; applied as it is")
    try:
        return _classify(facts, attention, lifted, query_length, key_length)
    except ReplayError as error:
        if any(term.kind == "additive" for term in attention.mask):
            raise Refused(Reason.ATTENTION_BIAS, f"an added term could not be run to see its values: {error}") from None
        return MaskProof("given", detail="mask applied as it is")


def _without_mask(attention: Attention, query_length: object, key_length: object) -> MaskProof:
    same = expression(query_length) == expression(key_length)
    if attention.is_causal:
        return MaskProof("causal" if same else "top_left", detail="is_causal")
    if expression(query_length) == 1:
        return MaskProof("causal", detail="one query, every key visible")
    raise Refused(Reason.NOT_CAUSAL, "no mask: every query sees every key")


def _lift(facts: GraphFacts, attention: Attention) -> _Lifted:
    inner: set[Node] = set()
    boundary: set[Node] = set()
    for term in attention.mask:
        made, leaves = facts.makers(term.node, attention.output)
        inner, boundary = inner | made, boundary | leaves
    runnable = {node for node in boundary if is_runnable(node)}
    paddings, offsets, others = [], [], []
    for leaf in boundary - runnable:
        value = tensor_value(leaf)
        if value is None:
            continue  # a size: it has a value at every assignment
        if value.dim() == 2 and leaf.op == "placeholder" and _is_read_as_truth(leaf, inner):
            paddings.append(leaf)
        elif value.numel() == 1 and not value.dtype.is_floating_point and leaf.op == "placeholder":
            offsets.append(leaf)
        else:
            others.append(leaf)
    return _Lifted(inner | runnable, tuple(paddings), tuple(offsets), tuple(others))


def _is_read_as_truth(node: Node, inner: set[Node]) -> bool:
    """Whether only the truth of ``node`` matters to ``inner``, so that trying zeros and ones tries everything.

    Position ids are integers of the same shape as a padding mask; a proof on zeros and ones would say nothing of them.
    """
    value = tensor_value(node)
    if value is not None and value.dtype == torch.bool:
        return True
    users = [user for user in node.users if user in inner]
    return all(
        _is_truth_of(user, node) or (is_op(user, *_MOVES) and _is_read_as_truth(user, inner)) for user in users
    ) and bool(users)


def _is_truth_of(user: Node, node: Node) -> bool:
    if is_op(user, aten.ne, aten.eq):
        return user.args[0] is node and user.args[1] == 0
    value = tensor_value(user)
    to_bool = value is not None and value.dtype == torch.bool
    return to_bool and is_op(user, aten.to, aten._to_copy, aten.logical_not)


def _check_term(term: MaskTerm, lifted: _Lifted, query_length: object) -> None:
    value = tensor_value(term.node)
    if value is None or value.dim() > 4:
        raise Refused(Reason.UNKNOWN_FORM, f"mask {term.node} has no [B, H, Tq, Tk] shape")
    if value.dim() >= 3 and value.dim() == 4 and expression(value.shape[1]) != 1 and not _is_head_broadcast(term.node):
        raise Refused(Reason.MASK_PER_HEAD, f"mask {term.node} is {tuple(value.shape)}")
    if value.dim() >= 2 and expression(value.shape[-2]) == 1 and expression(query_length) != 1:
        raise Refused(Reason.NOT_CAUSAL, f"one mask row for all queries, {tuple(value.shape)}")
    for node in lifted.inner:
        if is_op(node, *_FROM_ACTIVATIONS):
            raise Refused(Reason.DATA_DEPENDENT_MASK, f"{node.target} in what makes {term.node}")
        if is_op(node, *_LOOKED_UP):
            raise Refused(Reason.ATTENTION_BIAS, f"a learned table is looked up to make {term.node}")
    if term.kind == "additive":
        for leaf in lifted.others:
            leaf_value = cast(torch.Tensor, tensor_value(leaf))
            if leaf_value.dtype.is_floating_point and not _is_handed_in_mask(leaf, term.node):
                raise Refused(Reason.ATTENTION_BIAS, f"{leaf} {tuple(leaf_value.shape)} is added to the scores")


def _is_head_broadcast(node: Node) -> bool:
    """Whether the head dimension of a mask is an expansion of one row."""
    while is_op(node, aten.expand, aten.slice, aten.to, aten._to_copy) and isinstance(node.args[0], Node):
        node = node.args[0]
        value = tensor_value(node)
        if value is not None and (value.dim() < 4 or expression(value.shape[1]) == 1):
            return True
    return False


def _is_handed_in_mask(leaf: Node, term: Node) -> bool:
    """Whether a float input is the additive mask itself, sliced at most, and no parameter or buffer of the model.

    Its values are checked when they arrive (``msa::visible``).
    """
    value = tensor_value(leaf)
    source = leaf.meta.get("_dynamo_source")
    owned = any(mark in source.name for mark in ("_parameters", "_buffers")) if source is not None else False
    if value is None or value.dim() < 3 or owned or value.requires_grad:
        return False
    node = term
    while node is not leaf:
        if not is_op(node, *_MOVES) or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return True


def _constants(lifted: _Lifted) -> list[int]:
    """Integers that the mask compares or shifts with: where its behaviour may change."""
    found: set[int] = set()
    for node in lifted.inner:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, int) and not isinstance(value, bool) and 2 < abs(value) < 2**40:
                found.add(abs(value))
    return sorted(found)


def _classify(
    facts: GraphFacts, attention: Attention, lifted: _Lifted, query_length: object, key_length: object
) -> MaskProof:
    constants = _constants(lifted)
    symbols = symbols_of(lifted.inner | set(lifted.paddings)) | shape_symbols(attention.query.meta["val"])
    symbols |= expression(key_length).free_symbols
    every = [query_length, key_length, *(node.meta["val"] for node in lifted.inner if "val" in node.meta)]
    space = SizeSpace(size for size in every if isinstance(size, torch.SymInt))
    lengths_of = expression(query_length).free_symbols | expression(key_length).free_symbols
    batches = [attention.query.meta["val"].shape[0], *(node.meta["val"].shape[0] for node in lifted.paddings)]
    batch_symbols = set().union(*(expression(size).free_symbols for size in batches)) - lengths_of
    straddle = [value + extra for value in constants if value <= _LARGEST_CONSTANT for extra in (1, 3)]
    straddle += [bound + extra for bound in space.lower_bounds(symbols - batch_symbols) for extra in (0, 1, 4)]
    runs: list[_Run] = []
    budget = _LARGEST_RUN * 4
    for lengths in space.samples(symbols - batch_symbols, sorted({*_SIZES, *straddle}), limit=40):
        sizes = {**dict.fromkeys(batch_symbols, 3), **lengths}
        tq, tk = concrete(query_length, sizes), concrete(key_length, sizes)
        cost = tq * tk * 3
        if not space.holds(sizes) or tq > tk or cost > _LARGEST_RUN or cost > budget:
            continue
        budget -= cost
        runs.extend(_run_all(facts, attention, lifted, sizes, tq, tk))
    if not runs:
        raise ReplayError("no sizes to run at")
    bound = key_length if isinstance(key_length, int) else space.upper_bound(key_length)
    return _compare(runs, lifted, constants, bound)


@dataclass(frozen=True)
class _Run:
    """One concrete mask: ``visible [B or 1, Tq, Tk]`` at cache offset ``offset``; ``padded`` says if keys were padded."""

    visible: torch.Tensor
    offset: int
    padded: bool

    def causal(self) -> torch.Tensor:
        """``[Tq, Tk]``: key ``j`` is not after query ``i``."""
        tq, tk = self.visible.shape[-2:]
        return torch.arange(tk)[None, :] <= torch.arange(tq)[:, None] + self.offset

    def distance(self) -> torch.Tensor:
        """``[Tq, Tk]``: how far key ``j`` is behind query ``i``."""
        tq, tk = self.visible.shape[-2:]
        return torch.arange(tq)[:, None] + self.offset - torch.arange(tk)[None, :]


def _run_all(
    facts: GraphFacts, attention: Attention, lifted: _Lifted, sizes: Sizes, tq: int, tk: int
) -> list[_Run]:
    runs = []
    offsets = sorted({0, (tk - tq) // 2, tk - tq}) if lifted.offsets else [tk - tq]
    for offset in offsets:
        for pattern in ("none", "left", "right", "holes") if lifted.paddings else ("none",):
            given: dict[Node, torch.Tensor] = {}
            for leaf in lifted.offsets:
                value = cast(torch.Tensor, tensor_value(leaf))
                given[leaf] = torch.full([concrete(s, sizes) for s in value.shape], offset, dtype=value.dtype)
            for leaf in lifted.paddings:
                value = cast(torch.Tensor, tensor_value(leaf))
                given[leaf] = _padding([concrete(size, sizes) for size in value.shape], pattern).to(value.dtype)
            visible: torch.Tensor = torch.ones(1, tq, tk, dtype=torch.bool)
            for term in attention.mask:
                visible = visible & _visible(replay(facts, lifted.inner, given, sizes, term.node), term, tq, tk)
            runs.append(_Run(visible, offset, pattern != "none"))
    return runs


def _padding(shape: list[int], pattern: str) -> torch.Tensor:
    rows, length = shape
    mask = torch.ones(rows, length)
    for row in range(rows):
        width = (row * 2 + 1) % max(length, 1)
        if pattern == "left":
            mask[row, :width] = 0
        elif pattern == "right":
            mask[row, length - width :] = 0
        elif pattern == "holes":
            mask[row, row % length :: 3] = 0
    return mask


def _visible(mask: torch.Tensor, term: MaskTerm, tq: int, tk: int) -> torch.Tensor:
    """The concrete term as visibility ``[B or 1, Tq, Tk]``."""
    mask = mask.to("cpu")
    if term.kind == "additive":
        if not ((mask == 0) | (mask <= HIDDEN)).all():
            raise Refused(Reason.ATTENTION_BIAS, f"{term.node} adds values other than 0 and minus infinity")
        seen = mask == 0
    else:
        seen = mask.bool() if term.kind == "visible" else ~mask.bool()
    seen = seen[(None,) * (4 - seen.dim())]
    if not (seen == seen[:, :1]).all():
        raise Refused(Reason.MASK_PER_HEAD, f"{term.node} differs between heads")
    return seen[:, 0].expand(-1, tq, tk)


def _compare(runs: list[_Run], lifted: _Lifted, constants: list[int], bound: int | None) -> MaskProof:
    """What all runs agree on; ``bound`` is the longest ``Tk`` that the graph's own guards allow."""
    plain = [run for run in runs if not run.padded]
    if any((run.visible & ~run.causal()).any() for run in plain) and not lifted.offsets:
        raise Refused(Reason.NOT_CAUSAL, "a query sees later keys")
    largest = max(run.visible.shape[-1] for run in runs)
    # A mask may still change at a constant beyond every size that was run, unless the graph never gets there.
    covered = all(constant < largest or (bound is not None and constant >= bound) for constant in constants)
    window = _window(plain)
    if window is not None:
        return MaskProof("window", window=window, detail=f"each query sees the last {window} keys")
    if not covered:
        return MaskProof("given", detail=f"mask has a constant beyond the sizes it was run at ({constants[-1]})")
    if lifted.offsets:
        return MaskProof("given", detail="mask follows the cache position; applied as it is")
    if all(bool((run.visible == run.causal()).all()) for run in plain):
        if not lifted.paddings:
            return MaskProof("causal", detail="mask proved causal")
        if all(bool((run.visible == (run.causal() & run.visible[:, -1:])).all()) for run in runs):
            return MaskProof("causal+padding", detail="mask proved causal with padded keys")
    return MaskProof("given", detail="mask applied as it is")


def _window(plain: list[_Run]) -> int | None:
    """The width of the sliding window that all unpadded runs agree on, if they show one."""
    shown = [run for run in plain if bool((run.causal() & ~run.visible).any())]
    if not shown:
        return None
    width = int((shown[0].causal() & shown[0].visible)[0, -1].sum())
    same = all(bool((run.visible == (run.causal() & (run.distance() < width))).all()) for run in plain)
    return width if same else None
