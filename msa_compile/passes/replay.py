"""Run a closed piece of a captured graph on concrete tensors: the instrument of every proof.

A mask, a head repeat or a sink is not recognised by its spelling but by what it computes. The piece between some given
values and a result is lifted out of the graph, its symbolic sizes are bound to integers, and it is run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from msa_compile._compat import OpOverload
from msa_compile.passes.graph_facts import GraphFacts

Sizes = Mapping[sympy.Symbol, int]


class ReplayError(Exception):
    """The piece is not closed, or does not run at these sizes: nothing is proved."""


def expression(size: object) -> sympy.Expr:
    """The sympy expression of a size that may be an ``int`` or a ``torch.SymInt``."""
    if isinstance(size, int):
        return sympy.Integer(size)
    return size.node.expr  # type: ignore[attr-defined, no-any-return]


def bind(term: Any, sizes: Sizes) -> Any:
    """A sympy term with every symbol replaced by its value."""
    return term.xreplace({symbol: sympy.Integer(value) for symbol, value in sizes.items()})


def concrete(size: object, sizes: Sizes) -> int:
    """The value of a possibly symbolic size under ``sizes``."""
    value = bind(expression(size), sizes)
    if value.free_symbols:
        raise ReplayError(f"size {size} has no value")
    return int(value)


def symbols_of(nodes: set[Node]) -> set[sympy.Symbol]:
    """Every symbol in the sizes of ``nodes``."""
    found: set[sympy.Symbol] = set()
    for node in nodes:
        value = node.meta.get("val")
        parts = value.shape if isinstance(value, torch.Tensor) else (value,)
        for part in parts:
            if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                found |= part.node.expr.free_symbols
    return found


def is_runnable(node: Node) -> bool:
    """Whether a node may be replayed: an ATen call or size arithmetic, nothing random and nothing opaque."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags and node.target.namespace in ("aten", "prims")
    return getattr(node.target, "__module__", "") in ("_operator", "math") or node.target is operator.getitem


def replay(facts: GraphFacts, inner: set[Node], given: Mapping[Node, torch.Tensor], sizes: Sizes, result: Node) -> Any:
    """The value of ``result`` when the nodes ``inner`` run on ``given`` at ``sizes``.

    Args:
        facts: Facts of the graph.
        inner: The nodes to run, as ``GraphFacts.makers`` returns them.
        given: Concrete tensors for the boundary.
        sizes: A value for every symbol.
        result: A node of ``inner`` or of ``given``.

    Raises:
        ReplayError: If the piece is not closed or an operation fails.
    """
    values: dict[Node, Any] = dict(given)

    def fetch(node: Node) -> Any:
        symbolic = node.meta.get("val")
        if isinstance(symbolic, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            bound = bind(symbolic.node.expr, sizes)
            if bound.free_symbols:
                raise ReplayError(f"{node} has no value")
            if isinstance(symbolic, torch.SymBool):
                return bool(bound)
            return int(bound) if isinstance(symbolic, torch.SymInt) else float(bound)
        if node not in values:
            raise ReplayError(f"{node} ({node.op} {node.target}) is outside the piece")
        return values[node]

    with torch.no_grad():
        for node in facts.ordered(inner):
            if node in values or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                continue
            if not is_runnable(node):
                raise ReplayError(f"{node} ({node.target}) cannot be replayed")
            try:
                values[node] = node.target(*map_arg(node.args, fetch), **map_arg(node.kwargs, fetch))  # type: ignore[operator]
            except ReplayError:
                raise
            except Exception as error:  # any failure of a replayed operation means: not proved
                raise ReplayError(f"{node} failed: {error}") from error
    return fetch(result)
