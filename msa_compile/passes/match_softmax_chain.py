"""Match attention written out: ``softmax(q @ k.T * scale + mask) @ v``, with softcap and sinks where a model has them.

The chain is read from the softmax both ways. A softmax that does not sit between two matrix products (a router, a
classifier) is none of ours; one that does, but in a way this file cannot read, is refused, never skipped in silence.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from msa_compile.passes.attention import Attention, Refused
from msa_compile.passes.graph_facts import GraphFacts, argument, is_noop, is_op, tensor_value
from msa_compile.passes.read_scores import (
    ELEMENTWISE,
    MOVES,
    PASS_THROUGH,
    PRODUCTS,
    ScoreReader,
    is_elementwise,
    previous_product,
)
from msa_compile.records import Reason

aten = torch.ops.aten
_SOFTMAX = (aten.softmax, aten._softmax, aten.special_softmax)


def is_softmax(node: Node) -> bool:
    """Whether ``node`` is a softmax over its last dimension."""
    if not is_op(node, *_SOFTMAX):
        return False
    value, dim = tensor_value(node), argument(node, "dim")
    return value is not None and dim in (-1, value.dim() - 1)


def match_softmax_chain(facts: GraphFacts, softmax: Node) -> Attention | None:
    """Read the attention around a softmax.

    Returns:
        The attention, or ``None`` when the softmax is not between two matrix products.

    Raises:
        Refused: If it is attention that this file cannot read to the end.
    """
    product = _next_product(softmax)
    if previous_product(softmax.args[0]) is None:
        return None
    if product is None:
        if softmax.meta["val"].dim() == 4 and _reaches_output(softmax):
            raise Refused(Reason.NOT_CAPTURED, "the graph ends between the softmax and the product with the values")
        return None
    scores = softmax.args[0]
    assert isinstance(scores, Node)
    loose = not _is_plain(product, previous_product(scores))
    sinks_dropped = _check_probabilities(softmax, product, loose=loose)
    reader = ScoreReader(facts, loose=loose)
    first = reader.read(scores, softmax)
    if (reader.sinks is not None) != sinks_dropped:
        raise Refused(Reason.UNKNOWN_FORM, "an extra score column is added but not dropped, or the other way round")
    query, key, factor = _operands(first, reader)
    _, value, _ = _operands(product, None)
    scale = reader.scale * factor
    if not (scale > 0 and math.isfinite(scale)):
        raise Refused(Reason.SCALE, f"scale={scale}")
    return Attention(
        output=product,
        query=query,
        key=key,
        value=value,
        scale=scale,
        softcap=reader.softcap,
        sinks=reader.sinks,
        mask=tuple(reader.mask),
        is_causal=False,
        grouped=False,
        form="products" if loose else "eager",
        key_transposed=not loose,
        scores=scores,
    )


def _is_plain(*products: Node | None) -> bool:
    """Whether all products are 4-D ``matmul``, whose operands have one reading only."""
    return all(
        product is not None
        and is_op(product, aten.matmul)
        and all((value := tensor_value(part)) is not None and value.dim() == 4 for part in (product, *product.args))
        for product in products
    )


def _operands(product: Node, reader: ScoreReader | None) -> tuple[Node, Node, float]:
    """Left and right operand of a product and the factor it applies; ``reader`` takes a term that it adds."""
    factor = 1.0
    parts = product.args
    if is_op(product, aten.einsum):
        parts = product.args[1]  # type: ignore[assignment]
    if is_op(product, aten.baddbmm):
        factor, beta = float(product.kwargs.get("alpha", 1)), product.kwargs.get("beta", 1)  # type: ignore[arg-type]
        if beta != 0:
            if reader is None:
                raise Refused(Reason.UNKNOWN_FORM, "a term is added to the product with the values")
            raise Refused(Reason.ATTENTION_BIAS, f"{product.args[0]} is added to the scores in baddbmm")
        parts = product.args[1:]
    if len(parts) != 2 or not all(isinstance(part, Node) for part in parts):
        raise Refused(Reason.UNKNOWN_FORM, f"{product.target} of {len(parts)} operands")
    return parts[0], parts[1], factor  # type: ignore[return-value]


def _next_product(node: Node) -> Node | None:
    """The first matrix product whose left operand comes elementwise from ``node``."""
    pending = [(user, node) for user in node.users]
    seen: set[Node] = set()
    while pending:
        user, source = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if is_op(user, *PRODUCTS):
            return user
        if is_elementwise(user, source):
            pending.extend((further, user) for further in user.users)
    return None


def _reaches_output(node: Node) -> bool:
    """Whether ``node`` comes elementwise to the end of the graph."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.op == "output":
            return True
        if is_op(user, *ELEMENTWISE):
            pending.extend(user.users)
    return False


def _check_probabilities(softmax: Node, product: Node, *, loose: bool) -> bool:
    """Follow the probabilities to the product with the values; returns whether a sink column is dropped on the way."""
    node, sinks_dropped = softmax, False
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise Refused(Reason.WEIGHTS_USED, f"{node} has {len(users)} uses (output_attentions?)")
        user = users[0]
        if user is product:
            operands = product.args[1] if is_op(product, aten.einsum) else product.args
            if not isinstance(operands, (list, tuple)) or operands[0] is not node:
                raise Refused(Reason.UNKNOWN_FORM, "the probabilities are not the left operand of the last product")
            return sinks_dropped
        if is_op(user, aten.dropout):
            if user.args[1] != 0 and user.args[2]:
                raise Refused(Reason.DROPOUT, f"dropout p={user.args[1]}")
        elif is_op(user, aten.slice) and _is_drop_last(user):
            sinks_dropped = True
        elif not (is_op(user, *PASS_THROUGH) or is_noop(user) or (loose and is_op(user, *MOVES))):
            raise Refused(Reason.UNKNOWN_FORM, f"{user.target} between the softmax and the values")
        node = user


def _is_drop_last(node: Node) -> bool:
    before, dim = tensor_value(node.args[0]), argument(node, "dim")
    last = before is not None and dim in (-1, before.dim() - 1)
    return last and argument(node, "start") in (0, None) and argument(node, "end") == -1 and argument(node, "step") == 1
