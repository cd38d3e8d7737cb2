"""A vmap inside a model becomes plain ATen with the same numbers and gradients, and hides nothing from a proof."""

import pytest
import torch
from tiny_attention import capture, only, project, sparse, tokens, weights
from torch.nn import functional as F

from msa_compile import _compat
from msa_compile._compat import BackendCompilerFailed
from msa_compile.errors import CaptureError
from msa_compile.passes import flatten_vmap

W = weights()


def attend(x, mask=None):
    return F.scaled_dot_product_attention(*project(x, *W), attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def scan(x):
    """A vmap over the batch in a vmap over the width, as an associative scan makes them."""
    step = torch.vmap(torch.vmap(lambda a, b: a * b + a.cumsum(0) / a.shape[0]), in_dims=(1, 1), out_dims=1)
    return step(x.transpose(1, 2), x.transpose(1, 2).sin()).transpose(1, 2)


def vmapped_causal(x):
    row = torch.vmap(lambda q, k: q >= k, in_dims=(None, 0))
    length = torch.arange(x.shape[1])
    return torch.vmap(row, in_dims=(0, None))(length, length)


def names(graph):
    return {getattr(node.target, "__name__", "") for node in graph.nodes}


@pytest.mark.parametrize("sizes", ["dynamic", "static", "all"])
def test_no_level_is_left_and_all_calls_are_aten(sizes):
    captured = capture(lambda x: attend(scan(x)), tokens(), sizes=sizes)
    assert "_vmap_increment_nesting" in names(captured.dynamo.graph)
    assert not {name for name in names(captured.graph) if "vmap" in name or "batch_dim" in name or "lazy" in name}
    assert only(captured.found()).proved.mask.form == "causal"


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_numbers_and_gradients_are_those_of_the_model(inner, sparse_calls):
    def function(x):
        return attend(scan(x) + scan(x.cos()))

    fast = sparse(function, inner=inner)
    for length in (13, 29):
        x, y = (tokens(2, length).requires_grad_() for _ in range(2))
        expected, got = function(x), fast(y)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        expected.square().mean().backward()
        got.square().mean().backward()
        torch.testing.assert_close(y.grad, x.grad, atol=1e-5, rtol=1e-4)
    assert len(sparse_calls) == 2


@pytest.mark.slow
def test_inductor_compiles_what_is_left(sparse_calls):
    def function(x):
        return attend(scan(x))

    torch.testing.assert_close(sparse(function, inner="inductor")(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_a_mask_made_with_vmap_is_proved(sparse_calls):
    def function(x):
        return attend(x, vmapped_causal(x))

    assert only(capture(function, tokens()).found()).proved.mask.form == "causal"
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 1


def test_a_failure_inside_leaves_no_vmap_open(monkeypatch):
    class Failing(flatten_vmap.Interpreter):
        def call_method(self, target, args, kwargs):
            assert _compat.maybe_current_level() == 2
            raise NotImplementedError(target)

    monkeypatch.setattr(flatten_vmap, "Interpreter", Failing)
    with pytest.raises(BackendCompilerFailed, match="NotImplementedError: cumsum"):
        capture(lambda x: attend(scan(x)), tokens())
    assert _compat.maybe_current_level() is None


def test_constants_of_a_vmap_are_kept():
    def function(x):
        table = torch.tensor([1.0, -2.0, 3.0])
        return attend(x) + torch.vmap(lambda row: row * torch.tensor(2.5) + table[1])(x).mean()

    only(capture(function, tokens()).found())


def test_a_vmap_whose_result_nobody_uses_is_left_out_but_for_what_it_writes():
    def function(x, seen):
        torch.vmap(lambda row: row + 1)(x)
        torch.vmap(lambda row, kept: kept.add_(row))(x, seen)
        return attend(x) + seen.mean()

    seen = torch.zeros(3, 13, 16)
    only(capture(function, tokens(), seen).found())
    torch._dynamo.reset()
    mine, theirs = seen.clone(), seen.clone()
    torch.testing.assert_close(sparse(function)(tokens(), mine), function(tokens(), theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine, theirs)


def test_the_model_is_not_changed():
    captured = capture(lambda x: attend(scan(x)), tokens())
    assert "_vmap_increment_nesting" in names(captured.dynamo.graph)
    captured.dynamo.graph.lint()


def _no_grad_inside(x):
    def detached(row):
        with torch.no_grad():
            return row * 2

    return attend(torch.vmap(detached)(x) + x)


def _autocast_inside(x):
    def half(row):
        with torch.autocast("cpu", torch.bfloat16):
            return row @ row.T

    return attend(torch.vmap(half)(x).mean() + x)


def _gradient_inside(x):
    return attend(x + torch.func.grad(lambda y: y.square().sum())(x))


def _attention_inside(x):
    return torch.vmap(lambda row: attend(row[None])[0])(x)


def _branch_inside(x):
    return attend(torch.vmap(lambda row: torch.cond(row.sum() > 0, torch.sin, torch.cos, (row,)))(x))


LOST = [_no_grad_inside, _autocast_inside, _gradient_inside, _attention_inside, _branch_inside]


@pytest.mark.parametrize("function", LOST)
def test_what_a_trace_would_lose_is_an_error_in_words(function):
    with pytest.raises(BackendCompilerFailed) as failure:
        capture(function, tokens(), sizes="static")  # open sizes are no operands of a cond
    assert isinstance(failure.value.inner_exception, CaptureError)
    assert "leave the model dense" in str(failure.value.inner_exception)
