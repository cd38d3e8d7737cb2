"""Compile every launch of a lowered graph, as the builder of an engine will ask for it, without TensorRT and a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from msa_compile.export.engine.entries import entry_of
from msa_compile.export.engine.plugins import PLUGINS, Plugin
from msa_compile.export.engine.ptx import Compiled, compile_entry
from msa_compile.kernels.chip import Chip


def compile_launches(program: ExportedProgram, chip: Chip) -> tuple[Compiled, ...]:
    """The kernels of a program, each once however many attentions share it.

    Args:
        program: As `lower` gives it.
        chip: What it was lowered for.
    """
    made: dict[Any, Compiled] = {}
    for node in program.graph.nodes:
        plugin = plugin_of(node)
        if plugin is None or plugin.is_python:
            continue
        tensors: Mapping[str, Node] = dict(zip(plugin.tensors, node.args, strict=False))
        numbers = dict(zip(plugin.numbers, node.args[len(plugin.tensors) :], strict=True))
        values = {name: tensor.meta["val"] for name, tensor in tensors.items()}
        inputs = [_dtype(value) for value in values.values()]
        item_size = next(iter(values.values())).itemsize
        shapes = {name: value.shape for name, value in values.items()}
        outputs = [_dtype(value) for value in pytree.tree_leaves(node.meta["val"])]
        kind = (plugin.name, tuple(numbers.items()), tuple(inputs))
        if kind not in made:
            made[kind] = compile_entry(entry_of(plugin, shapes, numbers, item_size, chip), inputs, outputs, chip)
    return tuple(made.values())


def plugin_of(node: Node) -> Plugin | None:
    """The plugin that a node calls, if it calls one."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "msa":
        return None
    return PLUGINS.get(node.target._opname)


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
