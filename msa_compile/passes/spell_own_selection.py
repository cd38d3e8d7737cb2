"""Spell the block selection of a site out, so that equal ones of a model's layers are proved once."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from msa_compile.passes.attention import Attention
from msa_compile.passes.find_own_selection import OwnSelection
from msa_compile.passes.replay import expression
from msa_compile.passes.run_own_selection import tied_sizes


def spell_own_selection(attention: Attention, own: OwnSelection, nodes: list[Node]) -> tuple[str, ...]:
    """The same for two selections that differ in nothing but what they are given.

    Args:
        attention: The attention whose mask it makes.
        own: The selection.
        nodes: The tensors that the mask is made from, in order.
    """
    numbers = {node: number for number, node in enumerate(nodes)}
    tied = tied_sizes(own)

    def shape_of(value: object) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {[expression(size).xreplace(tied) for size in value.shape]}"
        if isinstance(value, (list, tuple)):
            return str([shape_of(entry) for entry in value])
        return str(expression(value).xreplace(tied)) if isinstance(value, torch.SymInt) else str(value)

    def name_of(source: Node) -> str:
        # A size is what it is, and may be made at another place for another layer.
        return shape_of(source.meta["val"]) if is_size(source) else f"%{numbers.get(source, source)}"

    roles = [own.kept, own.seen, own.scores, own.best, own.term.node]
    head = f"{attention.form} {attention.sinks is None} {own.term.kind} {[numbers[node] for node in roles]}"
    lines = [head]
    for node in nodes:
        value = node.meta.get("val")
        given = map_arg((node.args, node.kwargs), name_of)  # type: ignore[arg-type]
        # What is given is anything of its shape.
        is_open = node in (own.scores, own.seen) or node.op == "placeholder"
        lines.append(f"{'' if is_open else f'{node.target} {given}'} {shape_of(value)}")
    return tuple(lines)


def is_size(node: Node) -> bool:
    """Whether a node stands for a number."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))
