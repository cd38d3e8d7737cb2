"""Make the losses of index branches outputs of a graph, also where their sites lie in bodies inside it."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from msa_compile._compat import HigherOrderOperator
from msa_compile.passes.rewrite_attention import LOSS


def return_losses(gm: GraphModule) -> tuple[str, ...]:
    """Return every index loss behind the outputs of ``gm``; the names of their sites, in that order.

    A body hands its losses to the graph that calls it: it is one pure function of its inputs that way, which is what
    checkpointing may run again.
    """
    losses = [(node.meta[LOSS], node) for node in _losses_in(gm)]
    if losses:
        _append_outputs(gm.graph, [node for _, node in losses])
        gm.graph.lint()
        gm.recompile()
    return tuple(name for name, _ in losses)


def _losses_in(gm: GraphModule) -> list[Node]:
    """The losses that ``gm`` computes or gets from the bodies that it calls, as nodes of its own."""
    found = []
    for node in list(gm.graph.nodes):
        if LOSS in node.meta:
            found.append(node)
        if not isinstance(node.target, HigherOrderOperator):
            continue
        for source in node.all_input_nodes:
            body = getattr(gm, str(source.target), None) if source.op == "get_attr" else None
            if isinstance(body, GraphModule):
                found += _taken_out(gm.graph, node, body)
    return found


def _taken_out(graph: Graph, call: Node, body: GraphModule) -> list[Node]:
    """The losses of a body, made outputs of it and read where it is called."""
    inner = _losses_in(body)
    if not inner:
        return []
    first = _append_outputs(body.graph, inner)
    body.graph.lint()
    body.recompile()
    call.meta["val"] = (*call.meta["val"], *(node.meta["val"] for node in inner))
    taken = []
    for place, loss in enumerate(inner):
        with graph.inserting_after(taken[-1] if taken else call):
            node = graph.call_function(operator.getitem, (call, first + place))
        node.meta["val"] = loss.meta["val"]
        node.meta[LOSS] = loss.meta[LOSS]
        taken.append(node)
    return taken


def _append_outputs(graph: Graph, nodes: list[Node]) -> int:
    """Put nodes behind the outputs of a graph; how many it had."""
    output = graph.output_node()
    own = output.args[0]
    assert isinstance(own, (tuple, list)), "a canonical graph returns a tuple"
    output.args = ((*own, *nodes),)
    assert all(isinstance(node.meta["val"], torch.Tensor) for node in nodes), "a loss is a tensor"
    return len(own)
