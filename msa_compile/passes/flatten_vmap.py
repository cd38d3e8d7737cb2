"""Replace each ``vmap`` of a Dynamo graph by the batched ATen calls that it stands for.

Dynamo writes a vmap out as nodes that enter and leave its nesting level. Under a pre-dispatch trace they would act on
the trace itself, so each such region is traced alone and below them: what is left is plain ATen, which every later pass
can read, and run to prove a mask that was made with vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from msa_compile import _compat
from msa_compile.errors import CaptureError

_FUNCTORCH = ("torch._functorch.predispatch", "torch._C._functorch")
# What these switch on or off is not part of a trace below autograd.
_SWITCHES = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.autograd.grad_mode._enter_inference_mode,
)


Refake = Callable[[Node], Any]


def flatten_vmap(gm: GraphModule, refake: Refake) -> GraphModule:
    """``gm`` itself when it holds no vmap, otherwise a copy without; placeholders stay as they are.

    Args:
        gm: A graph from Dynamo; not changed.
        refake: Gives the example value of a node in the fake mode that is active.

    Raises:
        CaptureError: If the graph holds another transform of torch.func, or a region holds what a trace of its own
            would lose: gradient or autocast modes, higher-order operators, fused attention.
    """
    for node in gm.graph.nodes:
        if getattr(node.target, "__module__", "") in _FUNCTORCH and node.target not in _compat.VMAP_STEPS:
            raise CaptureError(
                f"the graph holds {node.target.__name__} of torch.func (grad or jvp inside the model), and re-tracing "
                "would lose it. Move it out of the forward, or leave the model dense."
            )
    if not any(node.target is _compat.vmap_increment_nesting for node in gm.graph.nodes):
        return gm
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    flat = GraphModule(gm, graph)
    for region in _regions(graph):
        _replace(flat, region, refake)
    return flat


def splice(gm: GraphModule, before: Node, traced: GraphModule, inputs: Sequence[Node]) -> Any:
    """Insert the calls of ``traced`` before a node of ``gm``; returns what ``traced`` returns, as nodes."""
    graph = before.graph
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            constant = getattr(traced, str(node.target))
            node.target = f"_{before.name}{node.target}"
            gm.register_buffer(node.target, constant, persistent=False)
    with graph.inserting_before(before):
        return graph.graph_copy(traced.graph, dict(zip(placeholders, inputs, strict=True)))


def _regions(graph: Graph) -> list[list[Node]]:
    """The nodes of each outermost vmap, in order; what only prepares torch for one is erased."""
    regions: list[list[Node]] = []
    depth = 0
    for node in list(graph.nodes):
        if node.target is _compat.vmap_increment_nesting:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        elif node.target is _compat.lazy_load_decompositions:
            node.target()
            graph.erase_node(node)
        if node.target is _compat.vmap_decrement_nesting:
            depth -= 1
    return regions


def _replace(gm: GraphModule, region: list[Node], refake: Refake) -> None:
    for node in region:
        if _is_lost(node):
            raise CaptureError(
                f"a vmap of the captured graph holds {node.target}, which is not supported inside vmap. "
                "Move it out of the vmap, or leave the model dense."
            )
    inside = set(region)
    inputs = list(dict.fromkeys(s for node in region for s in node.all_input_nodes if s not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]
    run = Interpreter(_alone(gm, region, inputs, results)).run
    level = _compat.maybe_current_level()
    try:
        with fx_traceback.preserve_node_meta():
            traced = _compat.make_fx(lambda *values: run(*values))(*(_value(node, refake) for node in inputs))
    finally:
        while _compat.maybe_current_level() != level:  # a failure inside would leave its vmap open for all that follows
            _compat.vmap_decrement_nesting()
    for node, flat in zip(results, splice(gm, region[0], traced, inputs), strict=True):
        node.replace_all_uses_with(flat)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _is_lost(node: Node) -> bool:
    """Whether a trace below autograd makes something else of a call: for attention, kernels that no pass knows."""
    if isinstance(node.target, _compat.HigherOrderOperator) or node.target in _SWITCHES:
        return True
    return "attention" in getattr(node.target, "__name__", "")


def _value(node: Node, refake: Refake) -> Any:
    """The value of a node; Dynamo keeps none for the arithmetic of sizes."""
    if "val" in node.meta:  # from a region that was replaced before
        return node.meta["val"]
    if "example_value" in node.meta or node.op != "call_function":
        return refake(node)
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: _value(source, refake))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _alone(gm: GraphModule, region: Iterable[Node], inputs: Iterable[Node], results: Iterable[Node]) -> GraphModule:
    """The nodes of a region as a module."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return GraphModule(gm, graph)
