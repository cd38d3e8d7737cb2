"""Whether TensorRT gets an engine out of a graph: every node has a converter in a table taken from torch-tensorrt.

torch-tensorrt decomposes a program once more before it converts it. Here the same is done as far as torch does it; what
torch-tensorrt rewrites by functions of its own is taken to come out well, and is the table's word. So a model that it
would refuse is refused in a second and by the name of the node, without TensorRT and before an engine is built.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from msa_compile import _compat
from msa_compile.errors import ExportConverterError
from msa_compile.export.engine.lower import decomposed
from msa_compile.export.engine.plugins import NAMESPACE, PLUGINS

TABLE = Path(__file__).with_name("converters.json")
# ITopK takes no more.
_MOST_TOPK = 3840


@dataclass(frozen=True)
class Converters:
    """The table, see `benchmarks/tensorrt_converters`.

    Attributes:
        version: Of torch-tensorrt.
        converters: For each operator, ``open``: whether its sizes may be open; ``validators``: one of these agrees.
        decomposed, kept: What torch decomposes for it, and what it does not.
        replaced: What torch-tensorrt decomposes by functions of its own.
        removed: What it drops.
    """

    version: str
    converters: Mapping[str, Mapping[str, Any]]
    decomposed: tuple[str, ...]
    kept: tuple[str, ...]
    replaced: tuple[str, ...]
    removed: tuple[str, ...]


@functools.cache
def converters() -> Converters:
    """The table of this package."""
    read = json.loads(TABLE.read_text(encoding="utf-8"))
    found: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
    return Converters(**found)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """What torch-tensorrt makes of a program before it converts it, as far as torch makes it."""
    table = converters()
    whole = {op for name in table.kept for op in _overloads(name)}
    # With its default settings it keeps attention whole.
    whole |= set(_overloads("aten.scaled_dot_product_attention"))
    enabled = [_operator(name) for name in table.decomposed]
    composite = {op: function for op, function in _compat.composite_decompositions().items() if op not in whole}
    return decomposed(program, {**_compat.get_decompositions(enabled), **composite})


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _overloads(name: str) -> list[Any]:
    found = _operator(name)
    return [found] if isinstance(found, torch._ops.OpOverload) else [getattr(found, each) for each in found.overloads()]


def check_converters(program: ExportedProgram) -> int:
    """How many nodes have a converter: all of them.

    Args:
        program: As `lower` gives it.

    Raises:
        ExportConverterError: Naming each kind of node that has none, and the first node of it.
    """
    refused: dict[str, str] = {}
    nodes = [node for node in decompose(program).graph.nodes if node.op == "call_function"]
    dropped = _dropped(nodes)
    for node in nodes:
        if node in dropped:
            continue
        why = why_not(node)
        if why is not None:
            refused.setdefault(f"{name_of(node.target)}: {why}", f"{node.name}{_place(node)}")
    if refused:
        lines = "\n".join(f"  {node}, {why}" for why, node in refused.items())
        raise ExportConverterError(
            f"torch-tensorrt {converters().version} cannot convert these nodes:\n{lines}\nWrite that part of the model "
            "in other operations, or export to ONNX (.onnx) or AOTInductor (.pt2)."
        )
    return len(nodes) - len(dropped)


def _dropped(nodes: Sequence[Node]) -> set[Node]:
    """What torch-tensorrt removes, and what only that reads, such as the comparison of an assertion."""
    found: set[Node] = set()
    for node in reversed(nodes):
        if name_of(node.target) in converters().removed or (node.users and found.issuperset(node.users)):
            found.add(node)
    return found


def name_of(target: Any) -> str:
    """The name of an operator as the table has it."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = "operator" if target.__module__ == "_operator" else target.__module__
    return f"{module}.{target.__name__}"


def why_not(node: Node) -> str | None:
    """Why a node of a decomposed graph cannot be converted, or ``None`` if it can."""
    table, name = converters(), name_of(node.target)
    packet = name.rpartition(".")[0]
    if {name, packet} & set(table.replaced):
        return None
    if packet.partition(".")[0] == NAMESPACE:
        is_plugin = packet.partition(".")[2] in PLUGINS
        return None if is_plugin else "an op of msa_compile that is no plugin"
    entry = table.converters.get(name) or table.converters.get(packet)
    if entry is None:
        return "no converter"
    if not entry["open"] and _has_open_size(node):
        return "its converter takes no open size"
    refusals = [_refusal(node, validator) for validator in entry["validators"]]
    return None if None in refusals else refusals[0]


def _has_open_size(node: Node) -> bool:
    tensors = [value for each in (node, *node.all_input_nodes) for value in pytree.tree_leaves(each.meta.get("val"))]
    return any(
        isinstance(size, torch.SymInt)
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
        for size in tensor.shape
    )


def _refusal(node: Node, validator: str | None) -> str | None:
    """What the validator of a converter would say; those that ask for numbers at hand are the ones that matter here."""
    if validator == "topk_validator" and not (isinstance(node.args[1], int) and node.args[1] <= _MOST_TOPK):
        return f"k is {node.args[1]}; it has to be a number, {_MOST_TOPK} at most"
    if validator == "sort_validator":
        given: Any = node.all_input_nodes[0].meta["val"]
        size = given.shape[node.args[1] if len(node.args) > 1 else -1]
        return None if isinstance(size, int) and size <= _MOST_TOPK else f"it sorts {size} numbers"
    if validator == "has_static_shapes_in_args([1])" and any(
        not isinstance(size, int) for size in pytree.tree_leaves(node.args[1])
    ):
        return "the sizes that it splits into are open"
    return None


def _place(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return f" in {list(stack.values())[-1][0]}" if stack else ""
