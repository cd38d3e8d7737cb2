"""Each rule of a legal rewritten graph catches what breaks it."""

import copy

import pytest
import torch
from tiny_attention import capture, tokens

from msa_compile.errors import GraphError
from msa_compile.passes.verify_graph import verify_graph

aten = torch.ops.aten


@pytest.fixture
def captured():
    return capture(lambda x, y: (x + y, x - y), tokens(), tokens(), sizes="static")


def test_a_canonical_graph_is_legal(captured):
    verify_graph(captured.canonical, captured.dynamo)


def test_another_input_is_caught(captured):
    graph = captured.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("state")
    with pytest.raises(GraphError, match=r"other inputs.*state"):
        verify_graph(captured.canonical, captured.dynamo)


def test_inputs_in_another_order_are_caught(captured):
    first, second = (node for node in captured.graph.nodes if node.op == "placeholder")
    second.append(first)
    with pytest.raises(GraphError, match="other inputs"):
        verify_graph(captured.canonical, captured.dynamo)


def test_a_lost_output_is_caught(captured):
    output = next(iter(reversed(captured.graph.nodes)))
    output.args = (output.args[0][:1],)
    with pytest.raises(GraphError, match="1 outputs instead of 2"):
        verify_graph(captured.canonical, captured.dynamo)


@pytest.mark.parametrize("kind", ["call_method", "call_module"])
def test_what_is_not_aten_is_caught(captured, kind):
    graph = captured.graph
    source = next(iter(graph.nodes))
    captured.canonical.add_module("inner", torch.nn.Identity())
    with graph.inserting_before(next(iter(reversed(graph.nodes)))):
        graph.create_node(kind, "relu" if kind == "call_method" else "inner", (source,))
    with pytest.raises(GraphError, match="is not ATen"):
        verify_graph(captured.canonical, captured.dynamo)


def test_verifying_changes_nothing(captured):
    before = copy.deepcopy(captured.graph)
    verify_graph(captured.canonical, captured.dynamo)
    assert str(before) == str(captured.graph)
