"""Bring what hides scores to one form: as ``[B, H, Tq, Tk]`` rather than merged, and without a negation."""

from __future__ import annotations

from typing import Literal

import torch
from torch.fx import Node

from msa_compile.passes.attention import MaskTerm
from msa_compile.passes.graph_facts import is_op, tensor_value
from msa_compile.passes.replay import expression

aten = torch.ops.aten
_MERGES = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)
_NOT = (aten.bitwise_not, aten.logical_not)


def mask_term(node: Node, kind: Literal["visible", "hidden", "additive"]) -> MaskTerm:
    """The term that ``node`` is, taken from before batch and heads were merged for a ``bmm``.

    Args:
        node: What the scores are masked with, or what is added to them.
        kind: What it says, as in ``MaskTerm``.
    """
    value = tensor_value(node.args[0]) if is_op(node, *_NOT) else None
    if kind != "additive" and value is not None and value.dtype == torch.bool:
        assert isinstance(node.args[0], Node)
        return mask_term(node.args[0], "visible" if kind == "hidden" else "hidden")
    return MaskTerm(_unmerged(node), kind)


def _unmerged(mask: Node) -> Node:
    """``mask`` before its ``[B, Hq]`` became one dimension."""
    after = tensor_value(mask)
    before = tensor_value(mask.args[0]) if is_op(mask, *_MERGES) else None
    if after is None or before is None or after.dim() != 3 or before.dim() != 4:
        return mask
    same = all(expression(old) == expression(new) for old, new in zip(before.shape[2:], after.shape[1:], strict=True))
    return mask.args[0] if same else mask  # type: ignore[return-value]
