"""Leave every call that touches a tensor subclass (DTensor) as Dynamo wrote it.

A DTensor cannot be re-traced: its operations need the real device mesh and run collectives. It need not be either.
Under tensor parallelism a projection takes a DTensor in and hands each rank its own heads out as a plain tensor, so
attention lies between such calls, in plain ATen. Those calls stay in the canonical graph as opaque nodes with the
values that Dynamo knows of them, and the inner compiler reads them as it would have read them from Dynamo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from msa_compile import _compat

_ATTENTION = ("scaled_dot_product_attention", "softmax", "_softmax")
# What a subclass is re-arranged by, or made from and turned into, without another value.
_MOVES = (
    "from_local", "to_local", "redistribute", "full_tensor", "to", "view", "reshape", "contiguous", "clone", "detach",
    "transpose", "permute", "squeeze", "unsqueeze", "flatten", "unflatten",
)  # fmt: skip


@dataclass(eq=False)
class Kept:
    """Stands in the re-trace for a value that holds a tensor subclass, so that the tracer never meets one.

    Attributes:
        example: The value as Dynamo knows it.
        proxy: What the trace calls it; a placeholder learns it when the trace begins.
    """

    example: Any
    proxy: Any = None


def holds_subclass(value: Any) -> bool:
    """Whether ``value`` is a wrapper subclass of a tensor, or a collection with one in it."""
    return any(_compat.is_traceable_wrapper_subclass(leaf) for leaf in pytree.tree_leaves(value))


def must_keep(node: Node, args: Any, kwargs: Any) -> bool:
    """Whether a call of a Dynamo graph reads (``args`` and ``kwargs`` are its operands) or makes a subclass."""
    if node.op not in ("call_function", "call_method"):
        return False
    if any(isinstance(leaf, Kept) for leaf in pytree.tree_leaves((args, kwargs))):
        return True
    return holds_subclass(node.meta.get("example_value"))


def unkept(value: Any) -> Any:
    """``value`` with the trace's own names for what was kept."""
    return pytree.tree_map(lambda leaf: leaf.proxy if isinstance(leaf, Kept) else leaf, value)


def kept_call(node: object) -> str:
    """The bare name of a kept call of a canonical graph, ``"linear"``; ``""`` for any other node."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    if not any(holds_subclass(entry.meta.get("val")) for entry in (node, *node.all_input_nodes)):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


def is_kept_attention(node: Node) -> bool:
    """Whether attention itself runs on a subclass here, where no rewrite reaches it."""
    name = kept_call(node)
    if name not in _ATTENTION:
        return False
    value = node.meta.get("val")
    return name == _ATTENTION[0] or value is None or value.dim() == 4


def is_kept_move(node: Node) -> bool:
    """Whether a kept call hands its first operand on, placed or arranged in another way."""
    return kept_call(node) in _MOVES


def kept_projection(node: Node) -> object:
    """What a linear projection on subclasses reads, or ``None`` for any other node."""
    name = kept_call(node)
    if name in ("linear", "mm"):
        return node.args[0]
    return node.args[1] if name == "addmm" else None
