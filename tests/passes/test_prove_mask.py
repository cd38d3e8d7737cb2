"""What is said of a mask is true at every length, and what cannot be said is refused."""

import math

import odd_masks
import pytest
import torch
from odd_masks import ALL, behind, causal, ragged
from tiny_attention import STATIC, capture, only, project, repeat_kv, sparse, tokens, weights
from torch.nn import functional as F

from msa_compile.passes.attention import MaskProof
from msa_compile.records import Reason
from msa_compile.runtime import mark_dynamic

# Beyond every constant of the masks, but for the widest windows, which must then be passed as they are.
LENGTHS = (13, 40, 150, 5)


def attend(make):
    wq, wk, wv = weights()

    def function(x, *extra):
        q, k, v = project(x, wq, wk, wv)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=make(x, *extra), enable_gqa=True)

    return function


def said(found):
    return found.reason if found.proved is None else found.proved.mask.form


def sees_something(mask, x):
    """`[B, 1, Tq, 1]`: whether a query has any key."""
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    seen = seen.any(-1, keepdim=True)
    seen = seen[(None,) * (4 - seen.dim())]
    return seen.any(1, keepdim=True).expand(x.shape[0], 1, x.shape[1], 1)


@pytest.mark.parametrize("sizes", ["dynamic", STATIC])
@pytest.mark.parametrize("name", ALL)
def test_a_mask_is_called_what_it_is(name, sizes):
    mask = ALL[name]
    legal = set(mask.said)
    if sizes == "static" and name in odd_masks.CAUSAL_WHEN_SHORT:
        legal |= {"causal", "given"}
    captured = capture(attend(mask.make), tokens(4, 23), *mask.extra(4, 23), sizes=sizes)
    assert said(only(captured.found())) in legal


@pytest.mark.parametrize("name", ALL)
def test_a_sparse_site_gives_the_dense_answer_at_every_length(name, sparse_calls):
    mask = ALL[name]
    function = attend(mask.make)
    fast = sparse(function)
    for length in LENGTHS:
        x, extra = tokens(4, length), mask.extra(4, length)
        mark_dynamic((x, extra))
        expected = function(x, *extra)
        # A query that sees nothing gets zeros here; what dense attention gives it is not defined.
        real = sees_something(mask.make(x, *extra), x)
        got, expected = (out.masked_fill(~real, 0.0) for out in (fast(x, *extra), expected))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    refusals = [isinstance(entry, Reason) for entry in mask.said]
    if all(refusals):
        assert not sparse_calls
    elif not any(refusals) and odd_masks.WINDOW not in mask.said:
        assert sparse_calls


@pytest.mark.parametrize("width", [1, 2, 3, 7, 16, 31, 64, 255, 1024])
def test_the_width_of_a_window_is_found(width):
    captured = capture(attend(lambda x: causal(x) & (behind(x) < width)), tokens(2, 12))
    assert only(captured.found()).proved.mask.window == width


def test_is_causal_is_causal():
    wq, wk, wv = weights()
    captured = capture(
        lambda x: F.scaled_dot_product_attention(*project(x, wq, wk, wv), is_causal=True, enable_gqa=True), tokens()
    )
    assert only(captured.found()).proved.mask == MaskProof("causal", detail="is_causal")


def test_no_mask_is_bidirectional_but_for_one_query():
    wq, wk, wv = weights()

    def last(x):
        q, k, v = project(x, wq, wk, wv)
        return F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)

    def every(x):
        return F.scaled_dot_product_attention(*project(x, wq, wk, wv), enable_gqa=True)

    assert only(capture(last, tokens()).found()).proved.mask.form == "causal"
    torch._dynamo.reset()
    assert only(capture(every, tokens()).found()).reason is Reason.NOT_CAUSAL


def test_is_causal_with_more_keys_than_queries_counts_from_the_top_left(sparse_calls):
    wq, wk, wv = weights()

    def function(x, past):
        q, k, v = project(x, wq, wk, wv)
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    arguments = tokens(2, 9), torch.randn(2, 2, 6, 8)
    assert only(capture(function, *arguments).found()).proved.mask.form == "top_left"
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(*arguments), function(*arguments), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def _static_cache(window=None):
    """Attention over a cache of a fixed length; the mask follows the position handed in."""
    wq, wk, wv = weights()

    def function(x, position, keys, values):
        q, k, v = project(x, wq, wk, wv)
        slots = position + torch.arange(x.shape[1])
        keys.index_copy_(2, slots, k)
        values.index_copy_(2, slots, v)
        seen = torch.arange(keys.shape[2])[None, :] <= slots[:, None]
        if window is not None:
            seen = seen & (torch.arange(keys.shape[2])[None, :] > slots[:, None] - window)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)

    return function


@pytest.mark.parametrize("sizes", ["dynamic", STATIC])
def test_a_static_cache_mask_is_applied_as_it_is(sizes):
    arguments = tokens(2, 3), torch.tensor(4), torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 8)
    assert said(only(capture(_static_cache(), *arguments, sizes=sizes).found())) == "given"


@pytest.mark.parametrize("window", [None, 5])
def test_a_static_cache_gives_the_dense_answer_at_every_position(window, sparse_calls):
    function = _static_cache(window)
    fast = sparse(function)
    dense_cache, fast_cache = [[torch.full((2, 2, 20, 8), 9.0) for _ in range(2)] for _ in range(2)]
    for start, length in ((0, 3), (3, 5), (8, 4), (12, 1), (13, 1)):
        x, position = tokens(2, length), torch.tensor(start)
        mark_dynamic(x)
        expected = function(x, position, *dense_cache)
        torch.testing.assert_close(fast(x, position, *fast_cache), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fast_cache, dense_cache)
    assert bool(sparse_calls) or window is not None


def test_a_handed_in_bias_is_attended_to_exactly_and_said(sparse_calls, caplog):
    function = attend(lambda x, m: m)
    fast = sparse(function, topk_blocks=2)
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    visibility = torch.where(seen, 0.0, -math.inf)
    assert (fast(tokens(2, 12), visibility) - function(tokens(2, 12), visibility)).abs().max() > 1e-3, "sparse"
    assert sparse_calls
    assert "ran DENSE" not in caplog.text
    biased = visibility - behind(tokens(2, 12)) * 0.25
    x = tokens(2, 12).requires_grad_()
    for _ in range(2):
        output, expected = fast(x, biased), function(x, biased)
        torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), x))
    assert caplog.text.count("ran DENSE") == 1
    assert "bias" in caplog.text


def test_a_handed_in_bias_that_is_trained_is_refused(sparse_calls):
    function = attend(lambda x, m: m)
    fast, x = sparse(function), tokens(2, 12)
    hidden = torch.where(causal(x), 0.0, -math.inf)[None, None]
    torch.testing.assert_close(fast(x, hidden), function(x, hidden))
    assert sparse_calls
    grads = []
    for call in (fast, function):
        bias = hidden.clone().requires_grad_()
        call(x, bias).square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)
    assert len(sparse_calls) == 1


def test_a_bias_at_lengths_that_are_not_run_is_not_lost_behind_a_prefix():
    def make(x):
        seen = causal(x) | (torch.arange(x.shape[1]) < 4)
        return torch.where(seen & (behind(x) * behind(x) > 90000), -1.0, torch.where(seen, 0.0, -math.inf))

    function = attend(make)
    fast = sparse(function, topk_blocks=200)
    for length in (64, 70, 500):
        x = tokens(1, length)
        mark_dynamic(x)
        torch.testing.assert_close(fast(x), function(x), atol=1e-5, rtol=1e-5)


def test_two_handed_in_masks_are_added_up():
    wq, wk, wv = weights()

    def function(x, one, other):
        q, k, v = project(x, wq, wk, wv)
        scores = q @ repeat_kv(k).transpose(-1, -2) / 8**0.5 + one + other
        return scores.softmax(-1) @ repeat_kv(v)

    fast, x = sparse(function), tokens(2, 12)
    hidden = torch.where(causal(x), 0.0, -math.inf)[None, None]
    only_keys = torch.zeros(2, 1, 1, 12).index_fill(3, torch.tensor([2, 5]), -1e9)
    near = behind(x).float()[None, None] * -0.3
    for one, other in ((hidden, only_keys), (hidden, near), (near, hidden + only_keys)):
        torch.testing.assert_close(fast(x, one, other), function(x, one, other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learned", ["vector", "table"])
def test_a_learned_bias_is_refused(learned):
    shape = {"vector": (8,), "table": (8, 4)}[learned]
    bias = torch.nn.Parameter(torch.randn(shape))

    def make(x, bias):
        near = behind(x).clamp(0, 7)
        added = bias[near] if learned == "vector" else F.embedding(near, bias).permute(2, 0, 1)
        return torch.where(causal(x), 0.0, -math.inf) + added

    captured = capture(attend(make), tokens(), bias)
    assert only(captured.found()).reason is Reason.ATTENTION_BIAS


def test_a_padding_term_apart_from_the_causal_term_is_kept(sparse_calls):
    wq, wk, wv = weights()

    def function(x, padding):
        q, k, v = project(x, wq, wk, wv)
        scores = q @ repeat_kv(k).transpose(-1, -2) / 8**0.5
        scores = scores.masked_fill(~causal(x), -1e9)
        scores = scores.masked_fill(padding[:, None, None, :] == 0, -1e9)
        return scores.softmax(-1) @ repeat_kv(v)

    (padding,) = ragged(4, 14)
    found = only(capture(function, tokens(4, 14), padding).found())
    assert said(found) in ("causal+padding", "given")
    torch._dynamo.reset()
    got, expected = (f(tokens(4, 14), padding) for f in (sparse(function), function))
    real = torch.cumsum(padding, 1)[:, None, :, None] > 0  # a query before all content sees nothing
    torch.testing.assert_close(got * real, expected * real, atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_a_mask_that_is_written_in_place_is_read_after_the_write(sparse_calls):
    def make(x):
        seen = causal(x).clone()
        seen[:, 1:4] = False
        seen |= torch.eye(x.shape[1], dtype=torch.bool)
        return seen

    function = attend(make)
    fast = sparse(function)
    for length in (13, 30):
        torch.testing.assert_close(fast(tokens(2, length)), function(tokens(2, length)), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_what_is_proved_of_one_graph_holds_only_for_its_own_sizes():
    make = lambda x: causal(x) & (behind(x) < 16)  # noqa: E731
    assert said(only(capture(attend(make), tokens(2, 12), sizes="static").found())) in ("causal", "given")
    torch._dynamo.reset()
    assert said(only(capture(attend(make), tokens(2, 12)).found())) == "window"
    torch._dynamo.reset()
    assert said(only(capture(attend(make), tokens(2, 40), sizes="static").found())) == "window"
