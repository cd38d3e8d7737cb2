"""Read the scores of attention written out: from the softmax back to ``q @ k.T``, collecting what lies between."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from msa_compile.kernels.given_mask.op import HIDDEN
from msa_compile.passes.attention import MaskTerm, Refused
from msa_compile.passes.graph_facts import GraphFacts, argument, is_noop, is_op, tensor_value
from msa_compile.passes.read_mask import mask_term
from msa_compile.passes.replay import ReplayError, is_runnable, replay
from msa_compile.records import Reason

aten = torch.ops.aten
PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)
PASS_THROUGH = (
    aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy,
)  # fmt: skip
RESHAPE = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten)
ELEMENTWISE = (
    *PASS_THROUGH, *RESHAPE, aten.add, aten.sub, aten.mul, aten.div, aten.tanh, aten.masked_fill, aten.where, aten.cat,
    aten.slice, aten.dropout, aten.add_, aten.mul_, aten.div_, aten.masked_fill_, aten.clamp, aten.permute,
    aten.transpose, aten.unsqueeze, aten.squeeze, aten.pow, aten.abs, aten.relu, aten.exp, aten.neg, aten.sigmoid,
)  # fmt: skip
_MIXING = (aten.linear, aten.addmm, aten.mm, aten.conv1d, aten.conv2d, aten.softmax, aten.scaled_dot_product_attention)
MOVES = (*RESHAPE, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze, aten.expand)


class ScoreReader:
    """Walks from the softmax back to ``q @ k.T``, collecting what lies between.

    Args:
        facts: Facts of the graph.
        loose: Also walk through re-arrangements of the scores, and end at any product. What is read then has to be
            proved by running it (``prove_products``).
    """

    def __init__(self, facts: GraphFacts, *, loose: bool = False) -> None:
        self.facts = facts
        self.loose = loose
        self.factor = 1.0
        self.softcap: float | None = None
        self.sinks: Node | None = None
        self.mask: list[MaskTerm] = []

    @property
    def scale(self) -> float:
        """Factor on ``q . k``: with a cap, ``cap * tanh(inner * q . k)`` has the scale ``inner * cap``."""
        return self.factor if self.softcap is None else self.factor * self.softcap

    def read(self, node: object, before: Node) -> Node:
        """The product ``q @ k.T`` behind what ``before`` reads; fills scale, softcap, sinks and mask on the way."""
        chain: set[Node] = set()
        while True:
            assert isinstance(node, Node)
            chain.add(node)
            # A write through a slice lies beside the way, and changes what is read.
            if not chain.issuperset(self.facts.writes(node, before)):
                raise Refused(Reason.UNKNOWN_FORM, f"{node} is written in place before the softmax")
            if is_op(node, *PRODUCTS) if self.loose else is_op(node, aten.matmul):
                return node
            step = self._step(node)
            if step is None:
                raise Refused(Reason.UNKNOWN_FORM, f"{node.target} between q @ k.T and the softmax")
            node = step

    def _step(self, node: Node) -> Node | None:
        first = node.args[0] if node.args else None
        if is_op(node, *PASS_THROUGH) or is_noop(node) or (self.loose and is_op(node, *MOVES)):
            return first if isinstance(first, Node) else None
        if is_op(node, aten.mul, aten.div, aten.mul_, aten.div_):
            return self._factor(node, divide=is_op(node, aten.div, aten.div_))
        if is_op(node, aten.add, aten.add_):
            return self._added(node)
        if is_op(node, aten.sub) and isinstance(first, Node) and _is_row_max(node.args[1], first):
            return first  # softmax does not see a shift of the row
        if is_op(node, aten.tanh) and isinstance(first, Node) and self.softcap is None:
            self.softcap, self.factor = self.factor, 1.0
            return first
        if is_op(node, aten.masked_fill, aten.masked_fill_):
            return self._hide(first, node.args[1], node.args[2], "hidden")
        if is_op(node, aten.where) and len(node.args) == 3:
            return self._hide(node.args[1], node.args[0], node.args[2], "visible")
        if is_op(node, aten.cat) and self.sinks is None:
            return self._sinks(node)
        return None

    def _factor(self, node: Node, *, divide: bool) -> Node | None:
        left, right = node.args[0], node.args[1]
        number = self._number(right)
        if number is None and not divide:
            left, number = right, self._number(left)
        if number is None:
            raise Refused(Reason.SCALE, f"the scores are scaled by {right}, which is not a constant")
        self.factor *= 1.0 / number if divide else number
        return left if isinstance(left, Node) else None

    def _added(self, node: Node) -> Node | None:
        left, right = node.args[0], node.args[1]
        if previous_product(left) is None:
            left, right = right, left
        if not isinstance(left, Node) or not isinstance(right, Node) or node.kwargs.get("alpha", 1) != 1:
            return None
        if self.softcap is not None:
            raise Refused(Reason.UNKNOWN_FORM, "a mask is added under the softcap")
        self.mask.append(mask_term(right, "additive"))
        return left

    def _hide(self, scores: object, mask: object, fill: object, kind: str) -> Node | None:
        number = self._number(fill)
        if not isinstance(scores, Node) or not isinstance(mask, Node) or number is None or self.softcap is not None:
            return None
        if number > HIDDEN:
            raise Refused(Reason.UNKNOWN_FORM, f"scores are replaced by {number}, which does not hide them")
        self.mask.append(mask_term(mask, kind))  # type: ignore[arg-type]
        return scores

    def _sinks(self, node: Node) -> Node | None:
        parts = node.args[0]
        value = tensor_value(node)
        dim = argument(node, "dim")
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or value is None or dim not in (-1, value.dim() - 1):
            return None
        scores, sinks = parts
        extra = tensor_value(sinks)
        if not isinstance(scores, Node) or not isinstance(sinks, Node) or extra is None or extra.shape[-1] != 1:
            return None
        if self.factor != 1.0 or self.softcap is not None:
            raise Refused(Reason.UNKNOWN_FORM, "the sinks are scaled with the scores")
        while is_op(sinks, *PASS_THROUGH, aten.expand) and isinstance(sinks.args[0], Node):
            sinks = sinks.args[0]
        shape = tuple(sinks.meta["val"].shape)
        if len(shape) != 4 or (shape[0], shape[2], shape[3]) != (1, 1, 1):
            raise Refused(Reason.UNKNOWN_FORM, f"sinks of shape {shape} are not one logit a head")
        self.sinks = sinks
        return scores

    def _number(self, value: object) -> float | None:
        """A Python number, or a one-element tensor that the graph makes from constants."""
        if isinstance(value, (int, float)):
            return float(value)
        if not isinstance(value, Node):
            return None
        symbolic = value.meta.get("val")
        if isinstance(symbolic, (torch.SymFloat, torch.SymInt)):
            return guarded_number(symbolic)
        if not isinstance(symbolic, torch.Tensor) or symbolic.numel() != 1:
            return None
        inner, boundary = self.facts.makers(value, value)
        if not all(is_runnable(node) for node in boundary):
            return None
        try:
            return float(replay(self.facts, inner | boundary, {}, {}, value))
        except ReplayError:
            return None


def guarded_number(symbolic: torch.SymFloat | torch.SymInt) -> float | None:
    """The value of a Python number that Dynamo left open; reading it makes the graph guard on it."""
    try:
        return float(symbolic)
    except Exception:  # a value that only the data knows: no constant
        return None


def _is_row_max(node: object, scores: Node) -> bool:
    """Whether ``node`` is the row maximum of ``scores``, kept as a column."""
    while is_op(node, *PASS_THROUGH) and isinstance(node, Node):
        node = node.args[0]
    if is_op(node, operator.getitem) and isinstance(node, Node) and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or not is_op(node, aten.max, aten.amax) or node.args[0] is not scores:
        return False
    dim = argument(node, "dim")
    value = tensor_value(scores)
    assert value is not None
    return dim in (-1, value.dim() - 1, [-1], [value.dim() - 1]) and argument(node, "keepdim") is True


def previous_product(node: object) -> Node | None:
    """A product of two activations from which ``node`` comes elementwise."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        seen.add(current)
        if is_op(current, *PRODUCTS):
            if not _is_projection(current):
                return current
        else:
            pending.extend(source for source in current.all_input_nodes if is_elementwise(current, source))
    return None


def is_elementwise(node: Node, source: Node) -> bool:
    """Whether ``node`` re-arranges ``source`` or keeps its shape, whatever it does to the values.

    An operation that no list names must not hide an attention: it is walked through here and refused by the reader.
    """
    if is_op(node, *ELEMENTWISE):
        return True
    after, before = tensor_value(node), tensor_value(source)
    same = after is not None and before is not None and str(after.shape) == str(before.shape)
    return same and not is_op(node, *_MIXING)


def _is_projection(product: Node) -> bool:
    """Whether a product is with a matrix that all rows share: a router or a classifier, no keys."""
    right = tensor_value(product.args[1]) if is_op(product, aten.matmul) else None
    return right is not None and right.dim() == 2
