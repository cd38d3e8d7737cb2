"""Match ``scaled_dot_product_attention``: one node that says everything but the grouping and the mask's meaning."""

from __future__ import annotations

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, MaskTerm, Refused
from msa_compile.passes.graph_facts import argument, is_op, tensor_value
from msa_compile.records import Reason

_SDPA = torch.ops.aten.scaled_dot_product_attention


def is_sdpa(node: Node) -> bool:
    """Whether ``node`` is a call that this file matches."""
    return is_op(node, _SDPA)


def match_sdpa(node: Node) -> Attention:
    """Read an SDPA call.

    Raises:
        Refused: With active dropout, a scale that is no number, or operands that are not ``[B, H, T, D]``.
    """
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    for name, operand in (("query", query), ("key", key), ("value", value)):
        tensor = tensor_value(operand)
        if tensor is None or tensor.dim() != 4:
            found = "?" if tensor is None else tuple(tensor.shape)
            raise Refused(Reason.HEAD_LAYOUT, f"{name} is {found}, not [B, H, T, D]")
    rate = argument(node, "dropout_p")
    if not isinstance(rate, (int, float)) or rate > 0:
        raise Refused(Reason.DROPOUT, f"dropout_p={rate}")
    scale = argument(node, "scale")
    head_dim = int(query.meta["val"].shape[-1])
    if scale is None:
        scale = head_dim**-0.5
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise Refused(Reason.SCALE, f"scale={scale}")
    mask = argument(node, "attn_mask")
    terms: tuple[MaskTerm, ...] = ()
    if isinstance(mask, Node):
        kind = "visible" if mask.meta["val"].dtype == torch.bool else "additive"
        terms = (MaskTerm(mask, kind),)  # type: ignore[arg-type]
    return Attention(
        output=node,
        query=query,
        key=key,
        value=value,
        scale=float(scale),
        softcap=None,
        sinks=None,
        mask=terms,
        is_causal=bool(argument(node, "is_causal")),
        grouped=bool(argument(node, "enable_gqa")),
        form="sdpa",
    )
