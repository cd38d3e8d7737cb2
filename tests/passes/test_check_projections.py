"""Self-attention over one hidden state passes; keys from elsewhere and keys through a latent do not."""

import torch
from tiny_attention import capture, only, project, tokens, weights
from torch import nn
from torch.nn import functional as F

from msa_compile.records import Reason

W = weights(4, 4)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads(x):
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def reason(function, *args):
    return only(capture(function, *args).found()).reason


def test_a_fused_projection_is_self_attention():
    fused = torch.cat(W)
    assert reason(lambda x: attend(*map(heads, F.linear(x, fused).chunk(3, -1))), tokens()) is None


def test_low_rank_adapters_are_looked_through():
    down, up = torch.randn(4, 16), torch.randn(32, 4)

    def function(x):
        q, k, v = project(x, *W)
        return attend(q + heads(F.linear(F.linear(x, down), up)), k, v)

    assert reason(function, tokens()) is None


def test_keys_of_another_sequence_are_cross_attention():
    def function(x, memory):
        q, _, _ = project(x, *W)
        _, k, v = project(memory, *W)
        return attend(q, k, v)

    assert reason(function, tokens(2, 9), tokens(2, 9) + 1) is Reason.CROSS_ATTENTION


def test_keys_handed_in_are_cross_attention_also_for_one_query():
    def function(x, k, v):
        q, _, _ = project(x, *W)
        return F.scaled_dot_product_attention(q, k, v)

    assert reason(function, tokens(2, 1), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)) is Reason.CROSS_ATTENTION


def test_a_cache_that_takes_this_calls_keys_is_self_attention():
    def function(x, past_k, past_v):
        q, k, v = project(x, *W)
        return F.scaled_dot_product_attention(q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2))

    assert reason(function, tokens(2, 1), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)) is None


def test_a_learned_query_that_pools_is_refused():
    pool = nn.Parameter(torch.randn(1, 4, 1, 8))

    def function(x):
        _, k, v = project(x, *W)
        return F.scaled_dot_product_attention(pool.expand(x.shape[0], -1, -1, -1), k, v)

    assert reason(function, tokens()) is not None


def test_latent_keys_are_refused():
    down, up = torch.randn(4, 16), torch.randn(32, 4)

    def function(x):
        q, _, v = project(x, *W)
        return attend(q, heads(F.linear(F.relu(F.linear(x, down)), up)), v)

    assert reason(function, tokens()) is Reason.LATENT_ATTENTION
