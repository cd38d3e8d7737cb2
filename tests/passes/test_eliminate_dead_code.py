"""Dead calls go, cache writes stay."""

import pytest
import torch
from tiny_attention import STATIC, capture, tokens

from msa_compile.passes.eliminate_dead_code import eliminate_dead_code, is_used

aten = torch.ops.aten

WRITES = {
    "index_copy_": lambda cache, x, position: cache.index_copy_(1, position, x),
    "copy_": lambda cache, x, position: cache[:, 3:16].copy_(x),
    "index_put_": lambda cache, x, position: cache.index_put_((torch.arange(3)[:, None], position[None]), x),
    "slice assignment": lambda cache, x, position: cache.__setitem__((slice(None), slice(1, 14)), x),
    "add_": lambda cache, x, position: cache.narrow(1, 0, 13).add_(x),
    "scatter_": lambda cache, x, position: cache.scatter_(1, position[None, :, None].expand_as(x), x),
    "fill_": lambda cache, x, position: cache.fill_(4.0),
    "zero_": lambda cache, x, position: cache[0].zero_(),
}


@pytest.mark.parametrize("sizes", ["dynamic", STATIC])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_without_users_stays(name, sizes):
    def function(x, cache, position):
        x.relu().sin()
        WRITES[name](cache, x, position)
        return x + 1

    arguments = tokens(), torch.ones(3, 20, 16), torch.arange(13)
    captured = capture(function, *arguments, sizes=sizes)
    eliminate_dead_code(captured.graph)
    assert not captured.nodes(aten.relu, aten.sin)
    captured.canonical.recompile()
    theirs = arguments[1].clone()
    function(arguments[0], theirs, arguments[2])

    def rewritten(gm, example_inputs):
        from msa_compile.passes.canonicalize import canonicalize

        canonical = canonicalize(gm)
        eliminate_dead_code(canonical.graph)
        canonical.recompile()
        return canonical

    torch._dynamo.reset()
    mine = arguments[1].clone()
    torch.compile(function, backend=rewritten, dynamic=sizes == "dynamic")(arguments[0], mine, arguments[2])
    assert not torch.equal(mine, arguments[1])
    torch.testing.assert_close(mine, theirs)


def test_a_write_into_what_nobody_reads_goes_and_into_what_somebody_reads_stays():
    def function(x):
        unread, read = x.relu(), x.sin()
        unread.scatter_(1, torch.zeros_like(x, dtype=torch.int64), 2.0).cos()
        read.mul_(2)
        return read + 1

    captured = capture(function, tokens())
    eliminate_dead_code(captured.graph)
    assert not captured.nodes(aten.relu, aten.scatter_, aten.cos)
    assert captured.nodes(aten.mul_)


def test_a_chain_of_dead_calls_goes_and_is_counted():
    captured = capture(lambda x: x + 1, tokens())
    graph = captured.graph
    source = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(source):
        first = graph.call_function(aten.relu.default, (source,))
    with graph.inserting_after(first):
        graph.call_function(aten.sin.default, (first,))
    assert eliminate_dead_code(graph) == 2
    assert not captured.nodes(aten.relu, aten.sin)


def test_inputs_without_users_and_random_calls_stay():
    captured = capture(lambda x: x + 1, tokens())
    graph = captured.graph
    source = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(source):
        graph.call_function(aten.rand.default, ([2],))
        graph.placeholder("unused")
    before = len(graph.nodes)
    eliminate_dead_code(graph)
    assert len(graph.nodes) == before


def test_regions_stay():
    def function(x):
        with torch.no_grad():
            y = x * 2
        with torch.autocast("cpu", torch.bfloat16):
            z = x @ x.transpose(1, 2)
        return y, z

    captured = capture(function, tokens().requires_grad_(), run=False)
    names = [getattr(node.target, "__name__", "") for node in captured.graph.nodes]
    eliminate_dead_code(captured.graph)
    kept = [getattr(node.target, "__name__", "") for node in captured.graph.nodes]
    for name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast"):
        assert kept.count(name) == names.count(name) > 0


def test_what_only_dead_calls_read_is_not_used():
    def function(x, cache):
        x.relu().sin()
        cache.copy_(x.cos().exp())
        return x.tan().neg()

    captured = capture(function, tokens(), torch.zeros(3, 13, 16))
    used = {name: is_used(captured.nodes(op)[0]) for name, op in (("relu", aten.relu), ("sin", aten.sin))}
    assert not any(used.values())
    assert all(is_used(captured.nodes(op)[0]) for op in (aten.cos, aten.exp, aten.tan, aten.neg))
