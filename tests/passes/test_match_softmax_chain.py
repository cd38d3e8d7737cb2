"""Attention written out is read exactly; what cannot be read is refused, and what is no attention is left alone."""

import math

import pytest
import torch
from tiny_attention import HEAD_DIM, HEADS, SIZES, capture, only, project, repeat_kv, sparse, tokens, weights
from torch.nn import functional as F

from msa_compile.records import Reason

SCALE = HEAD_DIM**-0.5
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def hidden(scores):
    return ~torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool).tril()


def function_of(attention, heads=HEADS, groups=2):
    w = weights(heads, groups)

    def function(x, *extra):
        q, k, v = project(x, *w)
        return attention(q, repeat_kv(k, heads // groups), repeat_kv(v, heads // groups), *extra)

    return function


def chain(score, *, hide=lambda s: s.masked_fill(hidden(s), -math.inf), soft=lambda s: s.softmax(-1)):
    return function_of(lambda q, k, v: soft(hide(score(q, k))) @ v)


def scaled(q, k):
    return q @ k.transpose(-1, -2) * SCALE


def with_sinks(scores, sinks=SINKS, keep=slice(None, -1)):
    column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    return torch.cat([scores, column], -1).softmax(-1)[..., keep]


def with_sinks_and_shift(scores):
    column = SINKS.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    both = torch.cat([scores, column], -1)
    return (both - both.max(-1, keepdim=True).values).softmax(-1)[..., :-1]


def folded(q, k, v):
    """Heads in the batch, by `flatten` and `unflatten`."""
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * SCALE
    weights = scores.unflatten(0, q.shape[:2]).masked_fill(hidden(scores), -math.inf).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


READ = {
    "multiplied": (chain(scaled), SCALE),
    "multiplied on the left": (chain(lambda q, k: 0.3 * (q @ k.mT)), 0.3),
    "divided": (chain(lambda q, k: q @ k.transpose(2, 3) / math.sqrt(HEAD_DIM)), SCALE),
    "multiplied and divided": (chain(lambda q, k: q @ k.mT * 3 / 7.0), 3 / 7),
    "divided by a tensor": (chain(lambda q, k: q @ k.mT / torch.full([], HEAD_DIM**0.5)), SCALE),
    "multiplied by a computed tensor": (chain(lambda q, k: q @ k.mT * torch.full((), 4.0).rsqrt()), 0.5),
    "in place": (chain(lambda q, k: (q @ k.mT).mul_(0.3)), 0.3),
    "divided in place": (chain(lambda q, k: (q @ k.mT).div_(4)), 0.25),
    "queries scaled before": (chain(lambda q, k: (q * SCALE) @ k.mT), 1.0),
    "keys scaled before": (
        function_of(lambda q, k, v: chain_probabilities(q * SCALE**0.5, k * SCALE**-0.5) @ v, 4, 4),
        SCALE,
    ),
    "not scaled": (chain(lambda q, k: q @ k.mT), 1.0),
    "where": (chain(scaled, hide=lambda s: torch.where(hidden(s), torch.tensor(0.0), s) + 0), None),
    "where with a scalar": (chain(scaled, hide=lambda s: torch.where(~hidden(s), s, -1e9)), SCALE),
    "where with a tensor": (chain(scaled, hide=lambda s: torch.where(~hidden(s), s, torch.full([], -1e9))), SCALE),
    "minimum of the dtype": (chain(scaled, hide=lambda s: s.masked_fill(hidden(s), torch.finfo(s.dtype).min)), SCALE),
    "masked in place": (chain(scaled, hide=lambda s: s.masked_fill_(hidden(s), -math.inf)), SCALE),
    "additive": (chain(scaled, hide=lambda s: s + torch.where(hidden(s), -math.inf, 0.0)), SCALE),
    "additive on the left": (chain(scaled, hide=lambda s: torch.where(hidden(s), -math.inf, 0.0) + s), SCALE),
    "additive in place": (chain(scaled, hide=lambda s: s.add_(torch.where(hidden(s), -math.inf, 0.0))), SCALE),
    "softmax with dtype": (chain(scaled, soft=lambda s: F.softmax(s, dim=-1, dtype=torch.float32)), SCALE),
    "softmax over dimension 3": (chain(scaled, soft=lambda s: s.softmax(3)), SCALE),
    "row maximum taken off": (chain(scaled, soft=lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1)), SCALE),
    "dropout in eval": (chain(scaled, soft=lambda s: F.dropout(s.softmax(-1), 0.3, training=False)), SCALE),
    "softcap": (chain(lambda q, k: torch.tanh(scaled(q, k) / 2.0) * 2.0), SCALE),
    "softcap, other factor outside": (chain(lambda q, k: 3.0 * torch.tanh(q @ k.mT * 0.25)), 0.75),
    "sinks": (chain(scaled, soft=with_sinks), SCALE),
    "sinks, shifted": (chain(scaled, soft=with_sinks_and_shift), SCALE),
    "heads folded into the batch": (function_of(folded), SCALE),
}
del READ["where"]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", READ)
def test_a_written_out_attention_is_read(name, sizes):
    function, scale = READ[name]
    found = only(capture(function, tokens(), sizes=sizes).found())
    if name == "keys scaled before" and sizes == "all":
        # Behind a product no head count is written down, and here the count itself is open: not proved, so refused.
        assert found.reason is Reason.HEAD_LAYOUT
        return
    assert found.reason is None, found.detail
    attention = found.proved.attention
    assert attention.scale == pytest.approx(scale, rel=1e-6)
    cap = {"softcap": 2.0, "softcap, other factor outside": 3.0}.get(name)
    assert attention.softcap == (None if cap is None else pytest.approx(cap))
    assert (attention.sinks is not None) == name.startswith("sinks")
    assert found.proved.mask.form == "causal"


@pytest.mark.parametrize("name", READ)
def test_a_written_out_attention_is_computed_right(name, sparse_calls):
    function, _ = READ[name]
    fast = sparse(function)
    for length in (13, 29):
        torch.testing.assert_close(fast(tokens(2, length)), function(tokens(2, length)), atol=1e-5, rtol=1e-5)
    assert len(sparse_calls) == 2


def _write_scores(scores):
    scores[..., 3:5] = -math.inf
    scores[..., 0] += 1.0
    return scores


def _halve_near(scores):
    scores[:, :, :, :2].mul_(0.5)
    return scores


REFUSED = {
    "dropout in training": (
        chain(scaled, soft=lambda s: F.dropout(s.softmax(-1), 0.3, training=True) * 0 + s.softmax(-1)),
        {Reason.WEIGHTS_USED, Reason.UNKNOWN_FORM, Reason.DROPOUT},
    ),
    "scale of each head": (chain(lambda q, k: scaled(q, k) * torch.arange(1.0, 5.0)[:, None, None]), {Reason.SCALE}),
    "negative scale": (chain(lambda q, k: q @ k.mT * -0.5), {Reason.SCALE}),
    "zero scale": (chain(lambda q, k: q @ k.mT * 0.0), {Reason.SCALE}),
    "scores squared": (chain(lambda q, k: scaled(q, k) ** 2), {Reason.UNKNOWN_FORM}),
    "scores clamped": (chain(lambda q, k: scaled(q, k).clamp(max=1.0)), {Reason.UNKNOWN_FORM}),
    "mask under the cap": (
        chain(lambda q, k: torch.tanh(scaled(q, k).masked_fill(hidden(q @ k.mT), -1e9)) * 20.0, hide=lambda s: s),
        {Reason.UNKNOWN_FORM},
    ),
    "fill that does not hide": (
        chain(scaled, hide=lambda s: s.masked_fill(hidden(s), -5.0)),
        {Reason.UNKNOWN_FORM, Reason.ATTENTION_BIAS},
    ),
    "bias that is no number": (
        chain(scaled, hide=lambda s: (s + 0.25 * torch.arange(s.shape[-1])).masked_fill(hidden(s), -math.inf)),
        {Reason.ATTENTION_BIAS, Reason.NOT_CAUSAL},
    ),
    "sinks not dropped": (
        function_of(lambda q, k, v: with_sinks(scaled(q, k), keep=slice(None)) @ F.pad(v, (0, 0, 0, 1), value=1.0)),
        {Reason.UNKNOWN_FORM, Reason.NOT_CAUSAL},
    ),
    "first column dropped": (
        function_of(
            lambda q, k, v: with_sinks(scaled(q, k).masked_fill(hidden(q @ k.mT), -1e9), keep=slice(1, None)) @ v
        ),
        {Reason.UNKNOWN_FORM},
    ),
    "probabilities renormalised": (
        chain(scaled, soft=lambda s: (lambda p: p / (p.sum(-1, keepdim=True) + 1))(s.softmax(-1))),
        {Reason.UNKNOWN_FORM, Reason.WEIGHTS_USED},
    ),
    "softmax over queries": (chain(scaled, soft=lambda s: s.softmax(-2)), None),
    "scores written through a slice": (
        chain(lambda q, k: _write_scores(scaled(q, k))),
        {Reason.UNKNOWN_FORM, Reason.ATTENTION_BIAS},
    ),
    "scores scaled through a slice": (chain(lambda q, k: _halve_near(scaled(q, k))), {Reason.UNKNOWN_FORM}),
    "values on the left": (
        function_of(lambda q, k, v: v.mT @ chain_probabilities(q, k)),
        {Reason.UNKNOWN_FORM},
    ),
    "no order": (chain(scaled, hide=lambda s: s), {Reason.NOT_CAUSAL}),
}


def chain_probabilities(q, k):
    scores = scaled(q, k)
    return scores.masked_fill(hidden(scores), -math.inf).softmax(-1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason(name):
    function, reasons = REFUSED[name]
    run = name != "dropout in training"
    found = capture(function, tokens(), run=run).found() if run else _captured_in_training(function)
    if reasons is None:
        assert all(entry.reason is not None for entry in found)
    else:
        assert {entry.reason for entry in found} <= reasons
        assert found


def _captured_in_training(function):
    """The dropped-out probabilities are random, but this function multiplies them by zero."""
    return capture(function, tokens()).found()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_stays_right(name, sparse_calls):
    function, _ = REFUSED[name]
    torch.testing.assert_close(sparse(function)(tokens()), function(tokens()), atol=1e-5, rtol=1e-5)
    assert not sparse_calls


def test_dropout_in_training_is_refused():
    def function(x):
        return chain(scaled, soft=lambda s: F.dropout(s.softmax(-1), 1.0, training=True))(x)

    assert only(capture(function, tokens()).found()).reason is Reason.DROPOUT


def test_sdpa_dropout_in_training_is_refused():
    function = function_of(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.25).sum() * 0
    )
    assert only(capture(function, tokens()).found()).reason is Reason.DROPOUT


@pytest.mark.parametrize("scale", [0.3, 1.0, None])
def test_the_scale_of_sdpa_is_read(scale):
    function = function_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    found = only(capture(function, tokens()).found())
    assert found.proved.attention.scale == pytest.approx(SCALE if scale is None else scale)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_of_sdpa_that_is_not_positive_is_refused(scale):
    function = function_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    assert only(capture(function, tokens()).found()).reason is Reason.SCALE


def test_probabilities_that_are_returned_too_are_refused():
    def function(x):
        w = weights()
        q, k, v = project(x, *w)
        probabilities = chain_probabilities(q, repeat_kv(k))
        return probabilities @ repeat_kv(v), probabilities

    assert only(capture(function, tokens()).found()).reason is Reason.WEIGHTS_USED


def _router(x):
    gate = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    experts = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1))
    routed = (x @ gate).softmax(-1)
    return torch.einsum("bte,eij,bti->btj", routed, experts, x)


def _classifier(x):
    return F.linear(x, torch.ones(7, 16)).softmax(-1)


def _classifier_between_linears(x):
    return F.linear(F.linear(x, torch.ones(7, 16)).softmax(-1), torch.ones(5, 7))


def _pooling(x):
    weight = (x @ torch.ones(16, 1)).softmax(1)
    return (weight * x).sum(1)


def _pooling_by_product(x):
    weight = F.linear(x, torch.ones(1, 16)).transpose(1, 2).softmax(-1)
    return weight @ x


@pytest.mark.parametrize("function", [_router, _classifier, _classifier_between_linears, _pooling])
def test_a_softmax_that_is_no_attention_is_not_matched(function):
    assert capture(function, tokens()).found() == []


def test_attention_pooling_is_never_sparse():
    found = capture(_pooling_by_product, tokens()).found()
    assert all(entry.reason is not None for entry in found)
