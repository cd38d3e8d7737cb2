"""A value is made from its arguments and from the in-place writes to its memory that precede the read."""

import pytest
import torch
from tiny_attention import capture, tokens

from msa_compile.passes.graph_facts import GraphFacts, argument, is_op, tensor_value

aten = torch.ops.aten


def _by_index_copy(cache, x, position):
    cache.index_copy_(1, position, x)


def _by_slice(cache, x, position):
    cache[:, 2 : 2 + x.shape[1]] = x


def _by_index_put(cache, x, position):
    cache[:, position] = x


def _by_copy(cache, x, position):
    cache.narrow(1, 0, x.shape[1]).copy_(x)


def _by_scatter(cache, x, position):
    cache.scatter_(1, position[None, :, None].expand_as(x), x)


WRITES = [_by_index_copy, _by_slice, _by_index_put, _by_copy, _by_scatter]


def _placeholder(captured, shape):
    return next(
        n
        for n in captured.graph.nodes
        if n.op == "placeholder" and tensor_value(n) is not None and tuple(tensor_value(n).shape) == shape
    )


def _output(captured):
    return next(iter(reversed(captured.graph.nodes)))


@pytest.mark.parametrize("write", WRITES)
def test_a_read_of_a_cache_is_made_from_what_was_written(write):
    def function(x, cache, position):
        write(cache, x.relu(), position)
        return cache.sum()

    captured = capture(function, tokens(), torch.zeros(3, 20, 16), torch.arange(13), sizes="static")
    facts = GraphFacts(captured.graph)
    read = captured.nodes(aten.sum)[0]
    inner, boundary = facts.makers(read, _output(captured))
    assert captured.nodes(aten.relu)[0] in inner
    assert _placeholder(captured, (3, 13, 16)) in boundary
    assert _placeholder(captured, (3, 20, 16)) in boundary


@pytest.mark.parametrize("write", WRITES)
def test_a_read_before_the_write_is_not_made_from_it(write):
    def function(x, cache, position):
        early = cache.sum()
        write(cache, x.relu(), position)
        return early, cache.sum()

    captured = capture(function, tokens(), torch.zeros(3, 20, 16), torch.arange(13), sizes="static")
    facts = GraphFacts(captured.graph)
    early, late = captured.nodes(aten.sum)
    relu = captured.nodes(aten.relu)[0]
    assert relu not in facts.makers(early, _output(captured))[0]
    assert relu in facts.makers(late, _output(captured))[0]


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_found_through_every_alias(write):
    def function(x, cache, position):
        view = cache.view(3, 20, 4, 4).transpose(1, 2)
        write(cache, x, position)
        return view.sum()

    captured = capture(function, tokens(), torch.zeros(3, 20, 16), torch.arange(13), sizes="static")
    facts = GraphFacts(captured.graph)
    view, read = captured.nodes(aten.transpose)[0], captured.nodes(aten.sum)[0]
    cache = _placeholder(captured, (3, 20, 16))
    assert facts.root(view) is facts.root(cache) is cache
    assert facts.writes(view, read) == facts.writes(cache, read)
    assert len(facts.writes(view, read)) == 1
    assert facts.written_between(view, view, read)
    assert not facts.written_between(view, facts.writes(view, read)[0], read)
    assert facts.writes(view, view) == []


def test_a_copy_owns_its_memory_and_a_part_of_a_split_does_not():
    def function(x):
        first, second = x.split(8, -1)
        copied = first.clone()
        first.mul_(2)
        return copied.relu(), second.sigmoid()

    captured = capture(function, tokens(), sizes="static")
    facts = GraphFacts(captured.graph)
    x, copied = _placeholder(captured, (3, 13, 16)), captured.nodes(aten.clone)[0]
    assert facts.root(copied) is copied
    assert facts.root(captured.nodes(aten.sigmoid)[0].args[0]) is x
    assert not facts.written_between(copied, copied, _output(captured))
    assert len(facts.writes(x, _output(captured))) == 1


def test_makers_stop_where_they_are_told():
    def function(x):
        return (x.relu().sigmoid() + x.sin()).cos()

    captured = capture(function, tokens())
    facts = GraphFacts(captured.graph)
    (cos,), (sigmoid,), (relu,) = (captured.nodes(op) for op in (aten.cos, aten.sigmoid, aten.relu))
    inner, boundary = facts.makers(cos, _output(captured), stop=lambda node: node is sigmoid)
    assert sigmoid in boundary
    assert relu not in inner | boundary
    assert captured.nodes(aten.sin)[0] in inner


def test_what_has_the_size_of_a_tensor_is_not_made_from_the_tensor():
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.arange(x.shape[1]) * 2 + x[0, 0, 0]

    # A Dynamo graph is handed its sizes; an exported one asks its tensors.
    graph = torch.export.export(Model(), (tokens(),), dynamic_shapes=({1: torch.export.Dim("T")},)).graph
    facts = GraphFacts(graph)
    [double] = [node for node in graph.nodes if is_op(node, aten.mul)]
    [size] = [node for node in graph.nodes if is_op(node, aten.sym_size)]
    inner, boundary = facts.makers(double, double)
    assert boundary == {size}
    assert double in inner


def test_ordered_is_the_order_of_the_graph():
    captured = capture(lambda x: x.relu().sin().cos().tanh(), tokens())
    nodes = list(captured.graph.nodes)
    assert GraphFacts(captured.graph).ordered(set(nodes)) == nodes


def test_arguments_are_found_by_name_position_and_default():
    captured = capture(lambda x: x.softmax(-1).sum(1, keepdim=True), tokens())
    softmax, total = captured.nodes(aten.softmax)[0], captured.nodes(aten.sum)[0]
    assert argument(softmax, "dim") == -1
    assert argument(softmax, "dtype") is None
    assert argument(total, "keepdim") is True
    with pytest.raises(KeyError):
        argument(softmax, "nonsense")
    assert is_op(softmax, aten.softmax)
    assert is_op(softmax, aten.softmax.int)
    assert not is_op(softmax, aten.sum)
