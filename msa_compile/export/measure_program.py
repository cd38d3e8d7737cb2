"""The size of everything that a program computes, at given sizes of its open dimensions; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from msa_compile.errors import ExportMemoryError


@dataclass(frozen=True)
class Intermediate:
    """One tensor that a node computes.

    Attributes:
        name: Of the node.
        operator: Its target.
        shape: Sizes.
        item_size: Bytes of an element.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    item_size: int

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.item_size


def measure_program(
    program: ExportedProgram, symbols: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[Intermediate, ...]:
    """Every tensor of a program, in order; views count as if they were copies.

    The scores of an attention that stays dense count too, as what it may hold inside.

    Args:
        program: What is measured.
        symbols: The name of each symbol.
        sizes: The size of each name.
    """
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor):
                shape = tuple(size_at(size, symbols, sizes) for size in value.shape)
                found.append(Intermediate(node.name, str(node.target), shape, value.itemsize))
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            query, key = (node.args[place].meta["val"].shape for place in (0, 1))
            shape = tuple(size_at(size, symbols, sizes) for size in (*query[:3], key[2]))
            found.append(Intermediate(f"{node.name} (its scores)", str(node.target), shape, 4))
    return tuple(found)


def size_at(size: int | torch.SymInt, symbols: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    """The number that a size of a tensor comes to; arguments as those of `measure_program`.

    Raises:
        ExportMemoryError: It depends on what is computed.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr
    unknown = sorted({str(symbol) for symbol in expression.free_symbols} - set(symbols))
    if unknown:
        raise ExportMemoryError(
            f"a tensor of the model has a size ({expression}) that is known only when it runs, so nobody can say that "
            "it fits. Write that part of the model with sizes that follow from those of its inputs."
        )
    return int(expression.subs({symbol: sizes[symbols[str(symbol)]] for symbol in expression.free_symbols}))
