"""Calls of a program at other sizes than those of its example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from msa_compile.export.records import SparseProgram, evaluate_size

# Longer prompts would take an export minutes in eager PyTorch.
LONGEST = 4096


@dataclass(frozen=True)
class Sample:
    """One call: its sizes, and its arguments, flat and as the program takes them."""

    sizes: dict[str, int]
    flat: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items()) or "the sizes of the example"


def samples(sparse: SparseProgram, block_size: int, budget: int) -> tuple[list[Sample], tuple[str, ...]]:
    """The example, one token, and a length beyond the budget that no block divides; and what was left out.

    Values are those of the example, repeated: tokens stay tokens, and a mask stays one.
    """
    example = sizes_of(sparse)
    wanted: list[dict[str, int]] = [example]
    left_out = []
    if "past" in example:
        wanted.append(example | {"past": 0})
    if "length" in example:
        wanted.append(example | {"length": 1})
        beyond = 2 * budget + block_size // 2 + 1
        most = sparse.ranges["length"].most
        if beyond <= min(most, LONGEST):
            wanted.append(example | {"length": beyond} | ({"batch": 1} if "batch" in example else {}))
        elif min(most, LONGEST) > example["length"] and most <= LONGEST:
            wanted.append(example | {"length": most})
        else:
            left_out.append(f"lengths beyond the budget of {budget} keys: more than {LONGEST} were not run")
    made = []
    for sizes in wanted:
        if {"total", "past"} <= set(sizes):
            sizes = sizes | {"total": sizes["length"] + sizes["past"]}
        if all(sparse.ranges[name].least <= size <= sparse.ranges[name].most for name, size in sizes.items()):
            made.append(_sample(sparse, sizes))
    return made, tuple(left_out)


def sizes_of(sparse: SparseProgram) -> dict[str, int]:
    """The open sizes of the example."""
    return {
        size: tensor.shape[at]
        for port, tensor in zip(sparse.inputs, sparse.example, strict=True)
        for at, size in enumerate(port.shape)
        if isinstance(size, str) and size in sparse.ranges
    }


def _sample(sparse: SparseProgram, sizes: dict[str, int]) -> Sample:
    flat = []
    for port, tensor in zip(sparse.inputs, sparse.example, strict=True):
        for at, size in enumerate(port.shape):
            if isinstance(size, str):
                places = torch.arange(evaluate_size(size, sizes), device=tensor.device) % max(tensor.shape[at], 1)
                tensor = tensor.index_select(at, places)
        if port.name == "position":
            tensor = _position(sparse, tensor, sizes)
        flat.append(tensor)
    args, kwargs = sparse.program.example_inputs
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values = iter(flat)
    args, kwargs = pytree.tree_unflatten([next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
    return Sample(sizes, tuple(flat), args, kwargs)


def _position(sparse: SparseProgram, position: Tensor, sizes: dict[str, int]) -> Tensor:
    """Positions at which the tokens of a call still fit the buffers."""
    buffers = [port.shape[2] for port in sparse.inputs if port.name.startswith("past_key_values")]
    room = min(size for size in buffers if isinstance(size, int)) - sizes["length"]
    return position.clamp(max=max(room, 0))
