"""Match ``flex_attention``: scaled products hidden by a mask that was written out before (``spell_block_masks``)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from msa_compile import _compat
from msa_compile.passes.attention import Attention, MaskTerm, Refused
from msa_compile.passes.eliminate_dead_code import is_used
from msa_compile.passes.graph_facts import GraphFacts, is_op, tensor_value
from msa_compile.passes.lift_mask import FROM_ACTIVATIONS
from msa_compile.passes.read_scores import guarded_number
from msa_compile.passes.replay import expression
from msa_compile.passes.spell_block_masks import MASK_NAME
from msa_compile.records import Reason

_ADDED = (operator.add, operator.sub)


def is_flex_attention(node: Node) -> bool:
    """Whether ``node`` is a call that this file matches."""
    return node.target is _compat.flex_attention


def match_flex_attention(facts: GraphFacts, node: Node) -> Attention:
    """Read a ``flex_attention`` call.

    Raises:
        Refused: With a ``score_mod`` that changes scores, a log-sum-exp that is used, a scale that is no number,
            operands that are not ``[B, H, T, D]`` of one batch, a mask that could not be written out, or blocks that
            were chosen by looking at the tokens.
    """
    query, key, value, score_mod, block_mask, scale = node.args[:6]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    for name, operand in (("query", query), ("key", key), ("value", value)):
        tensor = tensor_value(operand)
        if tensor is None or tensor.dim() != 4 or expression(tensor.shape[0]) != expression(query.meta["val"].shape[0]):
            found = "?" if tensor is None else tuple(tensor.shape)
            raise Refused(Reason.HEAD_LAYOUT, f"{name} is {found}, not [B, H, T, D] of the queries' batch")
    _check_scores(getattr(facts.graph.owning_module, str(score_mod.target)))  # type: ignore[union-attr]
    if isinstance(scale, Node):
        scale = guarded_number(scale.meta["val"])
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise Refused(Reason.SCALE, f"scale={scale}")
    mask = next((entry for entry in facts.graph.nodes if entry.name == node.meta.get(MASK_NAME)), None)
    if mask is None:
        raise Refused(Reason.UNKNOWN_FORM, "the mask_mod could not be run to see what it hides")
    _check_blocks(facts, node, block_mask)
    return Attention(
        output=_output(node),
        query=query,
        key=key,
        value=value,
        scale=float(scale),
        softcap=None,
        sinks=None,
        mask=(MaskTerm(mask, "visible"),),
        is_causal=False,
        grouped=True,
        form="flex",
    )


def _check_scores(score_mod: GraphModule) -> None:
    nodes = list(score_mod.graph.nodes)
    score, result = nodes[0], nodes[-1].args[0]
    if result is score or result == (score,):
        return
    calls = [str(getattr(entry.target, "__name__", entry.target)) for entry in nodes if entry.op.startswith("call_")]
    added = all(user.target in _ADDED for user in score.users)
    raise Refused(
        Reason.ATTENTION_BIAS if added else Reason.UNKNOWN_FORM, f"score_mod changes the scores: {', '.join(calls)}"
    )


def _check_blocks(facts: GraphFacts, node: Node, block_mask: Any) -> None:
    """Refuse a sparse attention of the model's own: compiled, such blocks hide more than ``mask_mod`` says."""
    for entry in block_mask[2:6]:
        if isinstance(entry, Node):
            made, _ = facts.makers(entry, node, stop=lambda source: is_op(source, torch.ops.aten.sym_size))
            step = next((source for source in made if is_op(source, *FROM_ACTIVATIONS)), None)
            if step is not None:
                raise Refused(Reason.DATA_DEPENDENT_MASK, f"{step.target} in what makes the blocks of {node}")


def _output(node: Node) -> Node:
    """The attended values among what the call returns; nothing else of it may be used."""
    taken: dict[Any, Node] = {}
    for user in node.users:
        if user.target is not operator.getitem:
            raise Refused(Reason.UNKNOWN_FORM, f"{user} uses all that {node} returns")
        if is_used(user):
            taken[user.args[1]] = user
    if set(taken) != {0}:
        raise Refused(Reason.WEIGHTS_USED, "the log-sum-exp or maximum of the scores is used beside the result")
    return taken[0]
