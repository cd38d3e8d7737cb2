"""Lift the masks of an attention out of the graph with all that makes them; refuse what is more than visibility."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, Heads, MaskTerm, Refused
from msa_compile.passes.graph_facts import GraphFacts, is_op, is_owned, is_trained, tensor_value
from msa_compile.passes.replay import expression, is_runnable
from msa_compile.records import Reason

aten = torch.ops.aten
FROM_ACTIVATIONS = (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.topk, aten.softmax)
_LOOKED_UP = (aten.embedding,)
_MOVES = (aten.slice, aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.contiguous, aten.to, aten.clone)


@dataclass(frozen=True)
class LiftedMask:
    """The closed piece that makes all mask terms, and its open inputs."""

    inner: set[Node]
    paddings: tuple[Node, ...]
    offsets: tuple[Node, ...]
    others: tuple[Node, ...]


def lift_mask(facts: GraphFacts, attention: Attention, query: Heads, key: Heads) -> LiftedMask:
    """Everything that makes the mask terms of ``attention``, its open inputs sorted by what they may hold."""
    inner: set[Node] = set()
    boundary: set[Node] = set()
    for term in attention.mask:
        # The size of an activation has a value of its own at every assignment; how the activation was made is no part.
        made, leaves = facts.makers(term.node, attention.output, stop=lambda node: is_op(node, aten.sym_size))
        inner, boundary = inner | made, boundary | leaves
    runnable = {node for node in boundary if is_runnable(node)}
    paddings, offsets, others = [], [], []
    for leaf in boundary - runnable:
        value = tensor_value(leaf)
        if value is None:
            continue  # a size: it has a value at every assignment
        if _is_row_of_batch(leaf, query, key) and _is_read_as_truth(leaf, inner):
            paddings.append(leaf)
        elif value.numel() == 1 and not value.dtype.is_floating_point and leaf.op == "placeholder":
            offsets.append(leaf)
        else:
            others.append(leaf)
    return LiftedMask(inner | runnable, tuple(paddings), tuple(offsets), tuple(others))


def _is_row_of_batch(leaf: Node, query: Heads, key: Heads) -> bool:
    """Whether ``leaf`` is an input ``[B, T]``: a triangle ``[T, T]`` handed in or kept by the model is no padding."""
    value = tensor_value(leaf)
    if value is None or value.dim() != 2 or leaf.op != "placeholder" or is_owned(leaf):
        return False
    rows = expression(value.shape[0])
    # An input may have a batch symbol of its own, which nothing in the graph ties to the queries' batch.
    own = rows.is_Symbol and rows not in expression(query.length).free_symbols | expression(key.length).free_symbols
    return bool(own or rows == expression(query.batch))


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
        return bool(user.args[0] is node and user.args[1] == 0)
    value = tensor_value(user)
    to_bool = value is not None and value.dtype == torch.bool
    return bool(to_bool and is_op(user, aten.to, aten._to_copy, aten.logical_not))


def check_term(term: MaskTerm, lifted: LiftedMask) -> None:
    """Refuse a term that is not causal visibility, the same for all heads.

    Raises:
        Refused: With what was found.
    """
    value = tensor_value(term.node)
    grouped = value is not None and value.dim() == 5 and (value.shape[1], value.shape[2]) == (1, 1)
    if value is None or (value.dim() > 4 and not grouped):
        raise Refused(Reason.UNKNOWN_FORM, f"mask {term.node} has no [B, H, Tq, Tk] shape")
    # Activations first: behind them stands the token embedding, which is a look-up too.
    for ops, reason in ((FROM_ACTIVATIONS, Reason.DATA_DEPENDENT_MASK), (_LOOKED_UP, Reason.ATTENTION_BIAS)):
        step = next((node for node in lifted.inner if is_op(node, *ops)), None)
        if step is not None:
            raise Refused(reason, f"{step.target} in what makes {term.node}")
    per_head = value.dim() == 4 and expression(value.shape[1]) != 1 and not _is_head_broadcast(term.node)
    if per_head or (value.dim() == 3 and expression(value.shape[0]) != 1):
        # What is added and differs between heads is a bias (ALiBi) far more often than a mask.
        reason = Reason.ATTENTION_BIAS if term.kind == "additive" else Reason.MASK_PER_HEAD
        raise Refused(reason, f"{term.node} is {tuple(value.shape)}")
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
    """Whether a float input is the additive mask itself, sliced at most, and nothing that is trained or kept.

    Its values are checked when they arrive (``msa::visible``).
    """
    value = tensor_value(leaf)
    if value is None or value.dim() < 2 or is_owned(leaf) or is_trained(leaf):
        return False
    node = term
    while node is not leaf:
        if not is_op(node, *_MOVES) or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return True


def constants_of(lifted: LiftedMask) -> list[int]:
    """Integers that the mask compares or shifts with: where its behaviour may change."""
    found: list[int] = []
    for node in lifted.inner:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, int) and not isinstance(value, bool) and 2 < abs(value) < 2**40:
                found.append(abs(value))
    # Offsets add up: the mask may change at the sum of all of them.
    return sorted({*found, sum(found)}) if found else []


_STEPS = (
    aten.arange, aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne, aten.add, aten.sub, aten.rsub, aten.neg,
    aten.bitwise_and, aten.bitwise_or, aten.bitwise_not, aten.logical_and, aten.logical_or, aten.logical_not,
    aten.__and__, aten.__or__, aten.where, aten.masked_fill, aten.masked_fill_, aten.full, aten.ones, aten.zeros,
    aten.full_like, aten.ones_like, aten.zeros_like, aten.new_ones, aten.new_full, aten.new_zeros, aten.scalar_tensor,
    aten.tril, aten.triu, aten.index, aten.cumsum, aten.diff, aten.pad, aten.cat, aten.hstack, aten.squeeze,
    aten.transpose, aten.permute, aten._to_copy, aten.alias, aten.detach, aten.expand_as, aten.select, *_MOVES,
)  # fmt: skip


def unproved_step(lifted: LiftedMask) -> str | None:
    """What keeps runs at a few sizes from telling for every size, or ``None``.

    Runs straddle sums of integers, and nothing else: a float width, a product, a quotient or a shift changes the mask
    at sizes that no constant shows.
    """
    for node in lifted.inner:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        scales = is_op(node, aten.mul, aten.mul_) and any(_is_harmless(part) for part in node.args)
        if not scales and not is_op(node, *_STEPS):
            return str(node.target)
        for part in (*node.args, *node.kwargs.values()):
            if isinstance(part, float) and not _is_harmless(part):
                return f"the constant {part}"
            size = part.meta.get("val") if isinstance(part, Node) else None
            if isinstance(size, torch.SymInt) and not _is_sum(size):
                return f"the size {size}"
    return None


def _is_harmless(part: object) -> bool:
    """Whether a factor or constant only says seen, hidden or as it was."""
    return isinstance(part, (int, float)) and (part in (0, 1) or part <= -1e4)


def _is_sum(size: torch.SymInt) -> bool:
    """Whether a size is a sum of sizes and integers."""
    terms = expression(size).as_coefficients_dict()
    return all(factor.is_Integer and (term.is_Symbol or term.is_Integer) for term, factor in terms.items())
