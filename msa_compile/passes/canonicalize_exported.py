"""Bring an exported program into the canonical IR: it is pre-dispatch ATen already, so nothing is re-traced.

What export writes differently from a re-traced Dynamo graph is undone on a copy: regions without gradients or under
autocast are bodies of higher-order operators there and calls in line here, and assertions on the metadata of computed
values, which are readers that an attention must not seem to have, are dropped.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from msa_compile import _compat
from msa_compile.errors import CaptureError
from msa_compile.passes.canonicalize import untie_types
from msa_compile.passes.graph_facts import OWNED, is_op
from msa_compile.passes.spell_block_masks import spell_block_masks

_KEPT_BY_MODEL = (InputKind.PARAMETER, InputKind.BUFFER)


def canonicalize_exported(program: ExportedProgram) -> GraphModule:
    """The canonical form of ``program``, with the same placeholders in the same order; ``program`` is not changed.

    Parameters, buffers and constants are placeholders, as in the program's own graph; the graph signature tells which.

    Args:
        program: What ``torch.export.export`` returned, before ``run_decompositions``.

    Raises:
        CaptureError: If decompositions were run: the attention, its projections and its writes to caches are then no
            longer there to be seen.
    """
    if program.dialect != "TRAINING":
        raise CaptureError(
            f"the exported program is in the {program.dialect} dialect, after run_decompositions(). Give the program "
            "as torch.export.export(...) returns it, and run decompositions afterwards."
        )
    kept = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind in _KEPT_BY_MODEL}
    canonical = copy.deepcopy(program.graph_module)
    for node in canonical.graph.nodes:
        if node.op == "placeholder":
            node.meta[OWNED] = node.name in kept
    bodies = [module for module in canonical.modules() if isinstance(module, GraphModule)]
    for body in reversed(bodies):  # a region inside a region first
        _inline_regions(body)
        _drop_assertions(body)
        untie_types(body)
        body.delete_all_unused_submodules()
        body.recompile()
    values = (node.meta.get("val") for node in canonical.graph.nodes)
    fake = next((value for value in values if isinstance(value, _compat.FakeTensor)), None)
    if fake is not None:
        spell_block_masks(canonical, fake.fake_mode)
    return canonical


def _inline_regions(gm: GraphModule) -> None:
    """Put the bodies of regions in line, between calls that enter and leave the region."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.target is _compat.wrap_with_set_grad_enabled:
            enabled, body, *given = node.args
            with graph.inserting_before(node):
                graph.call_function(_compat.set_grad_enabled, (enabled,))
                result = _inlined(gm, body, given)
                # Export makes such a region only where its mode is not the one around it.
                graph.call_function(_compat.set_grad_enabled, (not enabled,))
        elif node.target is _compat.wrap_with_autocast:
            *mode, body = node.args[:5]
            with graph.inserting_before(node):
                entered = graph.call_function(_compat.enter_autocast, tuple(mode))
                result = _inlined(gm, body, node.args[5:])
                graph.call_function(_compat.exit_autocast, (entered,))
        else:
            continue
        _replace(node, result)
        if not body.users:
            graph.erase_node(body)


def _inlined(gm: GraphModule, reference: Node, given: Sequence[Argument]) -> Argument:
    """Copy the body that ``reference`` gets to where ``gm`` inserts now; returns what the body returns."""
    name = str(reference.target)
    body: GraphModule = getattr(gm, name)
    copies: dict[Node, Any] = {}
    inputs = iter(given)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "get_attr":
            moved = f"{name}_{node.target}"
            setattr(gm, moved, getattr(body, str(node.target)))
            copies[node] = gm.graph.get_attr(moved)
            copies[node].meta = dict(node.meta)
    return gm.graph.graph_copy(body.graph, copies)


def _replace(call: Node, result: Argument) -> None:
    """Hand ``result`` to the readers of a region's call, which take its parts one by one if there are several."""
    if isinstance(result, Node):
        call.replace_all_uses_with(result)
    else:
        assert isinstance(result, (list, tuple)), "a region returns a value or several"
        for part in list(call.users):
            assert part.target is operator.getitem, f"{part} takes the parts of {call} together"
            taken = result[part.args[1]]  # type: ignore[index]
            assert isinstance(taken, Node), f"{call} returns {taken}, which is no value of its body"
            part.replace_all_uses_with(taken)
            part.graph.erase_node(part)
    call.graph.erase_node(call)


def _drop_assertions(gm: GraphModule) -> None:
    """Erase what asserts the metadata of a computed value: it follows from that of the inputs."""
    for node in list(gm.graph.nodes):
        if is_op(node, torch.ops.aten._assert_tensor_metadata) and node.all_input_nodes[0].op != "placeholder":
            gm.graph.erase_node(node)
