"""``msa_compile.attention`` is SDPA when the budget covers everything."""

import pytest
import torch
from runtime.tiny import counted_ops
from torch.nn import functional as F

import msa_compile
from msa_compile.errors import KernelArgumentError

COVERING = {"block_size": 4, "topk_blocks": 8}


def qkv(length=29, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = length if keys is None else keys
    shapes = [(2, 4, length, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def check(got, want):
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_causal(scale):
    q, k, v = qkv()
    with counted_ops() as ops:
        got = msa_compile.attention(q, k, v, is_causal=True, scale=scale, **COVERING)
    assert ops.take() == 1
    want = sdpa(q, k, v, is_causal=True, scale=scale)
    check(got, want)
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        check(mine, theirs)


@pytest.mark.parametrize("batched", [False, True])
def test_bool_mask(batched):
    q, k, v = qkv()
    mask = torch.ones(29, 29, dtype=torch.bool).tril()
    if batched:
        mask = mask.expand(2, 1, -1, -1).clone()
        mask[1, :, :, :5] = False
    got = msa_compile.attention(q, k, v, attn_mask=mask, **COVERING)
    seen = mask.any(-1, keepdim=True)
    check(got, torch.where(seen, sdpa(q, k, v, attn_mask=mask), torch.zeros(())))


def test_mask_on_top_of_causality():
    q, k, v = qkv()
    mask = torch.ones(29, dtype=torch.bool)
    mask[3:7] = False
    got = msa_compile.attention(q, k, v, attn_mask=mask, is_causal=True, **COVERING)
    check(got, sdpa(q, k, v, attn_mask=torch.ones(29, 29, dtype=torch.bool).tril() & mask))


def test_decode_step_sees_the_whole_cache():
    q, k, v = qkv(1, 29)
    check(msa_compile.attention(q, k, v, **COVERING), sdpa(q, k, v))


def test_query_start_says_where_a_chunk_stands():
    q, k, v = qkv(29)
    want = sdpa(q, k, v, is_causal=True)[:, :, 10:16]
    start = torch.tensor([10, 10])
    got = msa_compile.attention(q[:, :, 10:16], k, v, is_causal=True, query_start=start, **COVERING)
    check(got, want)


def test_few_blocks_differ_from_dense_and_from_other_indexers():
    q, k, v = qkv(64)
    few = msa_compile.attention(q, k, v, is_causal=True, block_size=4, topk_blocks=2)
    assert (few - sdpa(q, k, v, is_causal=True)).abs().max() > 1e-2
    check(few[:, :, :8], sdpa(q, k, v, is_causal=True)[:, :, :8])
    other = msa_compile.attention(
        q, k, v, is_causal=True, block_size=4, topk_blocks=2, index_query=-q.unflatten(1, (2, 2)).mean(2)
    )
    assert (few - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True, "dropout_p": 0.1}, "dropout_p is 0.1"),
        ({}, "neither is_causal nor attn_mask"),
        ({"is_causal": True, "attn_mask": torch.zeros(29, 29)}, "attn_mask is torch.float32, legal is bool"),
        ({"is_causal": True, "block_size": 0}, "block_size"),
        ({"is_causal": True, "topk_blocks": 0}, "topk"),
        ({"is_causal": True, "local_blocks": 2, "topk_blocks": 1}, "local_blocks"),
        ({"is_causal": True, "softcap": -1.0}, "softcap"),
    ],
)
def test_errors(options, message):
    with pytest.raises(KernelArgumentError, match=message):
        msa_compile.attention(*qkv(), **options)


def test_causal_with_unequal_lengths_is_ambiguous():
    with pytest.raises(KernelArgumentError, match=r"pass query_start.*24"):
        msa_compile.attention(*qkv(5, 29), is_causal=True)
