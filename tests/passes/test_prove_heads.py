"""Which query heads belong to which key/value head is proved by running the repeat, in every spelling."""

import pytest
import torch
from tiny_attention import GROUPS, HEAD_DIM, HEADS, STATIC, capture, only, project, repeat_kv, sparse, tokens, weights
from torch.nn import functional as F

from msa_compile.records import Reason

TIMES = HEADS // GROUPS


def sdpa(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **kwargs)


def eager(q, k, v):
    scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5
    length = q.shape[-2]
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


def repeated_before_transpose(x):
    batch, heads, length, dim = x.shape
    x = x.transpose(1, 2)[:, :, :, None, :].expand(batch, length, heads, TIMES, dim)
    return x.reshape(batch, length, heads * TIMES, dim).transpose(1, 2)


SPELLINGS = {
    "enable_gqa": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), "sdpa/enable_gqa"),
    "expand and reshape": (lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v)), "sdpa/repeat_kv"),
    "repeat_interleave": (
        lambda q, k, v: sdpa(q, k.repeat_interleave(TIMES, 1), v.repeat_interleave(TIMES, 1)),
        "sdpa/repeat_interleave",
    ),
    "negative dimension": (
        lambda q, k, v: sdpa(q, k.repeat_interleave(TIMES, -3), v.repeat_interleave(TIMES, dim=-3)),
        "sdpa/repeat_interleave",
    ),
    "repeat and reshape": (
        lambda q, k, v: sdpa(q, *(x[:, :, None].repeat(1, 1, TIMES, 1, 1).flatten(1, 2) for x in (k, v))),
        "sdpa/repeat_kv",
    ),
    "repeat before transpose": (
        lambda q, k, v: sdpa(q, repeated_before_transpose(k), repeated_before_transpose(v)),
        "sdpa/repeat_kv",
    ),
    "repeat_interleave before transpose": (
        lambda q, k, v: sdpa(q, *(x.transpose(1, 2).repeat_interleave(TIMES, 2).transpose(1, 2) for x in (k, v))),
        "sdpa/repeat_interleave",
    ),
    "eager": (lambda q, k, v: eager(q, repeat_kv(k), repeat_kv(v)), "eager/repeat_kv"),
    "eager, keys kept transposed": (
        lambda q, k, v: (
            (
                (q @ k.transpose(-1, -2).repeat_interleave(TIMES, 1) * 0.3)
                + torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1)
            ).softmax(-1)
            @ repeat_kv(v)
        ),
        "eager/repeat_interleave",
    ),
}


def function_of(attention, heads=HEADS, groups=GROUPS):
    w = weights(heads, groups)
    return lambda x: attention(*project(x, *w))


@pytest.mark.parametrize("sizes", ["dynamic", STATIC])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_repeat_in_any_spelling_is_undone(name, sizes):
    attention, form = SPELLINGS[name]
    found = only(capture(function_of(attention), tokens(), sizes=sizes).found())
    assert found.reason is None, found.detail
    assert (found.form, found.query_heads, found.key_value_heads, found.head_dim) == (form, HEADS, GROUPS, HEAD_DIM)
    assert found.proved.key.count == found.proved.value.count == GROUPS
    key = found.proved.key
    assert key.node.meta["val"].permute(key.permutation).shape[1] == GROUPS


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_repeat_in_any_spelling_is_computed_right(name, sparse_calls):
    function = function_of(SPELLINGS[name][0])
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert sparse_calls


def test_as_many_keys_as_queries_are_their_own_groups():
    found = only(capture(function_of(sdpa, HEADS, HEADS), tokens()).found())
    assert (found.form, found.key_value_heads, found.reason) == ("sdpa/heads", HEADS, None)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_one_key_head_broadcasts_over_all_queries(form, sparse_calls):
    def attention(q, k, v):
        if form == "eager":
            return eager(q, k, v)
        return sdpa(q, k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1))

    function = function_of(attention, HEADS, 1)
    found = only(capture(function, tokens()).found())
    assert (found.key_value_heads, found.reason) == (1, None)
    torch._dynamo.reset()
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert sparse_calls


WRONG_ORDERS = {
    "repeat": lambda x: x.repeat(1, TIMES, 1, 1),
    "expand": lambda x: x[:, None].expand(-1, TIMES, -1, -1, -1).reshape(x.shape[0], HEADS, -1, HEAD_DIM),
    "before transpose": lambda x: x.transpose(1, 2).repeat(1, 1, TIMES, 1).transpose(1, 2),
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
@pytest.mark.parametrize("form", [sdpa, eager])
def test_a_repeat_in_the_other_order_is_refused(name, form):
    repeat = WRONG_ORDERS[name]
    found = only(capture(function_of(lambda q, k, v: form(q, repeat(k), repeat(v))), tokens()).found())
    assert found.reason is Reason.HEAD_LAYOUT


def test_keys_and_values_of_different_groups_are_refused():
    wq, wk, _ = weights()
    wv = weights(HEADS, HEADS)[2]
    found = only(
        capture(lambda x: (lambda q, k, v: sdpa(q, repeat_kv(k), v))(*project(x, wq, wk, wv)), tokens()).found()
    )
    assert found.reason is Reason.HEAD_LAYOUT


def test_values_of_another_head_dimension_are_refused():
    wq, wk, _ = weights(HEADS, HEADS)
    wv = torch.randn(HEADS * 6, 16)

    def function(x):
        q, k, _ = project(x, wq, wk, wk)
        v = F.linear(x, wv).unflatten(-1, (HEADS, 6)).transpose(1, 2)
        return sdpa(q, k, v)

    assert only(capture(function, tokens()).found()).reason is Reason.HEAD_DIM


def test_a_cache_written_between_repeat_and_attention_is_refused():
    w = weights()

    def function(x, keys):
        q, k, v = project(x, *w)
        keys[:, :, : x.shape[1]] = k
        seen = keys[:, :, : x.shape[1]]
        repeated, values = repeat_kv(seen), repeat_kv(v)
        keys.mul_(2.0)
        return sdpa(q, repeated, values)

    assert only(capture(function, tokens(), torch.zeros(3, 2, 13, 8)).found()).reason is Reason.CACHE_WRITE


def test_a_cache_written_between_the_scores_and_the_values_keeps_its_meaning():
    w = weights(HEADS, HEADS)

    def function(x, keys):
        q, k, v = project(x, *w)
        keys[:, :, : x.shape[1]] = k
        scores = q @ keys[:, :, : x.shape[1]].transpose(-1, -2) * 0.3
        scores = scores + torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        keys.mul_(2.0)
        return scores.softmax(-1) @ v

    found = only(capture(function, tokens(), torch.zeros(3, HEADS, 13, 8)).found())
    torch._dynamo.reset()
    got = sparse(function)(tokens(), torch.zeros(3, HEADS, 13, 8))
    torch.testing.assert_close(got, function(tokens(), torch.zeros(3, HEADS, 13, 8)), atol=1e-5, rtol=1e-5)
    assert found.reason in (None, Reason.CACHE_WRITE)


def test_heads_are_proved_under_a_guard_on_the_length():
    def function(x):
        attention = function_of(SPELLINGS["expand and reshape"][0])
        return attention(x) * (2.0 if x.shape[1] > 300 else 1.0)

    found = only(capture(function, tokens(2, 310)).found())
    assert (found.key_value_heads, found.reason) == (GROUPS, None)
