"""What a legal rewritten graph is, as rules; run after every rewrite."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from msa_compile.errors import GraphError
from msa_compile.index_keys import IndexBinding
from msa_compile.passes.keep_subclasses import kept_call


def verify_graph(
    after: GraphModule, before: GraphModule, bindings: Sequence[IndexBinding] = (), losses: Sequence[str] = ()
) -> None:
    """Check ``after`` against the captured graph it was made from.

    Args:
        after: The rewritten graph.
        before: The captured graph.
        bindings: What was added for index keys, behind the inputs and outputs of ``before``.
        losses: What was added for index losses, behind the outputs of those.

    Raises:
        GraphError: If a rule is broken; the message names the rule and the node.
    """
    old_inputs = [node.name for node in before.graph.nodes if node.op == "placeholder"]
    new_inputs = [node.name for node in after.graph.nodes if node.op == "placeholder"]
    handed_in = sum(binding.source is not None for binding in bindings)
    if old_inputs != new_inputs[: len(new_inputs) - handed_in]:
        raise GraphError(f"the rewritten graph has other inputs: {new_inputs} instead of {old_inputs}")
    old_outputs, new_outputs = _outputs(before), _outputs(after)
    if old_outputs != new_outputs - sum(binding.is_returned for binding in bindings) - len(losses):
        raise GraphError(f"the rewritten graph has {new_outputs} outputs instead of {old_outputs}")
    for node in after.graph.nodes:
        if node.op == "call_module" or (node.op == "call_method" and not kept_call(node)):
            raise GraphError(f"{node.format_node()} is not ATen")


def _outputs(gm: GraphModule) -> int:
    output: Node = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    value = output.args[0]
    return len(value) if isinstance(value, (list, tuple)) else 1
