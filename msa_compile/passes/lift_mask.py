"""Lift the masks of an attention out of the graph with all that makes them; refuse what is more than visibility."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, MaskTerm, Refused
from msa_compile.passes.graph_facts import GraphFacts, is_op, tensor_value
from msa_compile.passes.replay import expression, is_runnable
from msa_compile.records import Reason

aten = torch.ops.aten
_FROM_ACTIVATIONS = (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.topk, aten.softmax)
_LOOKED_UP = (aten.embedding,)
_MOVES = (aten.slice, aten.expand, aten.view, aten.reshape, aten.unsqueeze, aten.contiguous, aten.to, aten.clone)


@dataclass(frozen=True)
class LiftedMask:
    """The closed piece that makes all mask terms, and its open inputs."""

    inner: set[Node]
    paddings: tuple[Node, ...]
    offsets: tuple[Node, ...]
    others: tuple[Node, ...]


def lift_mask(facts: GraphFacts, attention: Attention) -> LiftedMask:
    """Everything that makes the mask terms of ``attention``, its open inputs sorted by what they may hold."""
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
    return LiftedMask(inner | runnable, tuple(paddings), tuple(offsets), tuple(others))


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
    if value.dim() == 3 and expression(value.shape[0]) != 1:
        raise Refused(Reason.MASK_PER_HEAD, f"mask {term.node} is {tuple(value.shape)}, batch and heads in one")
    for node in lifted.inner:
        if is_op(node, *_FROM_ACTIVATIONS):
            raise Refused(Reason.DATA_DEPENDENT_MASK, f"{node.target} in what makes {term.node}")
        if is_op(node, *_LOOKED_UP):
            raise Refused(Reason.ATTENTION_BIAS, f"a learned table is looked up to make {term.node}")
    if value.dim() == 4 and expression(value.shape[1]) != 1 and not _is_head_broadcast(term.node):
        raise Refused(Reason.MASK_PER_HEAD, f"mask {term.node} is {tuple(value.shape)}")
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
    owned = source is not None and any(mark in source.name for mark in ("_parameters", "_buffers"))
    if value is None or value.dim() < 3 or owned or value.requires_grad:
        return False
    node = term
    while node is not leaf:
        if not is_op(node, *_MOVES) or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return True


def constants_of(lifted: LiftedMask) -> list[int]:
    """Integers that the mask compares or shifts with: where its behaviour may change."""
    found: set[int] = set()
    for node in lifted.inner:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, int) and not isinstance(value, bool) and 2 < abs(value) < 2**40:
                found.add(abs(value))
    return sorted(found)
