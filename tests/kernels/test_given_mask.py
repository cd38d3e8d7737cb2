"""What is read from a mask at run time: visibility, a bias, positions; and exact attention where it is a bias."""

import logging
import math

import pytest
import torch

import msa_compile
from msa_compile.kernels.given_mask import bias, biased_calls, exact_where_biased, mask_positions, visible

LENGTH = 9


def causal(queries=LENGTH, keys=LENGTH):
    return torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries


def query(batch=3, length=LENGTH):
    return torch.zeros(batch, 4, length, 8)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_seen_and_very_negative_is_not(hidden, dtype):
    seen = torch.rand(2, 1, 5, 7) > 0.5
    mask = torch.where(seen, 0.0, hidden).to(dtype)
    got, is_bias = visible(mask)
    assert got.dtype == torch.bool
    assert torch.equal(got, seen)
    assert not is_bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_minimum_of_a_half_dtype_hides(dtype):
    mask = torch.tensor([0.0, torch.finfo(dtype).min, -0.0], dtype=dtype)
    got, is_bias = visible(mask)
    assert got.tolist() == [True, False, True]
    assert not is_bias


def test_an_expanded_mask_gives_a_contiguous_one():
    got, _ = visible(torch.zeros(1, 1, 1, 5).expand(2, 3, 4, 5))
    assert got.shape == (2, 3, 4, 5)
    assert got.is_contiguous()


@pytest.mark.parametrize("value", [0.5, -0.5, -9999.0, math.inf, math.nan, 1e-8])
def test_any_other_value_is_a_bias_and_hides_nothing(value):
    mask = torch.full((2, 1, 4, 4), -math.inf)
    mask[1, 0, 2, 3] = value
    got, is_bias = visible(mask)
    assert is_bias
    assert got.nonzero().tolist() == [[1, 0, 2, 3]]


@pytest.mark.parametrize("rows", [1, 3])
def test_causal_queries_stand_at_the_end_of_the_keys(rows):
    mask = causal(4, LENGTH).expand(rows, 1, 4, LENGTH)
    query_start, key_start, _ = mask_positions(mask, query(3, 4))
    assert query_start.tolist() == [5, 5, 5]
    assert key_start.tolist() == [0, 0, 0]
    assert query_start.dtype == key_start.dtype == torch.int64


def test_left_padding_moves_the_first_key_and_not_the_queries():
    padding = torch.arange(LENGTH) >= torch.tensor([[0], [3], [8]])
    query_start, key_start, _ = mask_positions(causal() & padding[:, None, None, :], query())
    assert query_start.tolist() == [0, 0, 0]
    assert key_start.tolist() == [0, 3, 8]


def test_right_padding_moves_nothing():
    padding = torch.arange(LENGTH) < torch.tensor([[9], [6], [1]])
    query_start, key_start, _ = mask_positions(causal() & padding[:, None, None, :], query())
    assert query_start.tolist() == [0, 0, 0]
    assert key_start.tolist() == [0, 0, 0]


def test_a_row_that_sees_nothing_stands_at_zero():
    mask = causal().expand(3, 1, LENGTH, LENGTH).clone()
    mask[1] = False
    query_start, key_start, _ = mask_positions(mask, query())
    assert query_start.tolist() == [0, 0, 0]
    assert key_start.tolist() == [0, 0, 0]


def test_a_mask_that_differs_between_heads_counts_what_any_head_sees():
    mask = causal().expand(1, 2, LENGTH, LENGTH).clone()
    mask[:, 0, :, :4] = False
    assert mask_positions(mask, query(1))[1].tolist() == [0]
    mask[:, 1, :, :2] = False
    assert mask_positions(mask, query(1))[1].tolist() == [2]


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("prefix", [0, 1, 5, LENGTH - 1])
def test_a_bidirectional_prefix_does_not_move_the_queries(prefix, offset):
    keys = LENGTH + offset
    mask = causal(LENGTH, keys) | (torch.arange(keys) < prefix + offset)
    assert mask_positions(mask[None, None], query(2))[0].tolist() == [offset, offset]


def test_a_call_that_is_all_prefix_stands_where_its_last_query_does():
    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    assert mask_positions(everything, query(1))[0].tolist() == [0]


@pytest.mark.parametrize("keys", [9, 40])
def test_one_real_query_before_padding_stands_at_its_slot(keys):
    # Slots 5 .. 8, of which only 5 is real; the cache grows, or is longer than what it holds.
    mask = ((torch.arange(keys) <= torch.arange(5, 9)[:, None]) & (torch.arange(keys) < 6))[None, None]
    assert mask_positions(mask, query(1, 4))[0].tolist() == [5]


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_chunks_of_a_right_padded_row_are_the_prefill(chunk):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    mask = (causal(40, 40) & (torch.arange(40) < 33))[None, None]
    budget = {"block_size": 4, "topk_blocks": 3}
    once = msa_compile.attention(q, k, v, mask, **budget)
    for start in range(0, 40, chunk):
        queries, keys = slice(start, start + chunk), slice(0, start + chunk)
        part = msa_compile.attention(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], mask[:, :, queries, keys], **budget
        )
        real = slice(0, max(0, min(chunk, 33 - start)))
        torch.testing.assert_close(part[:, :, real], once[:, :, queries][:, :, real])


def test_a_prefix_with_padding_keeps_the_position():
    padding = torch.arange(LENGTH) >= torch.tensor([[0], [2]])
    mask = (causal() | (torch.arange(LENGTH) < 5)) & padding[:, None, None, :]
    query_start, key_start, _ = mask_positions(mask, query(2))
    assert query_start.tolist() == [0, 0]
    assert key_start.tolist() == [0, 2]


def test_with_a_prefix_decoding_is_a_row_of_the_prefill():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    mask = (causal(40, 40) | (torch.arange(40) < 13))[None, None]
    budget = {"block_size": 4, "topk_blocks": 2}
    prefill = msa_compile.attention(q, k, v, mask, **budget)
    for slot in (13, 14, 22, 39):
        keys = slice(0, slot + 1)
        row = q[:, :, slot : slot + 1]
        step = msa_compile.attention(row, k[:, :, keys], v[:, :, keys], mask[:, :, slot : slot + 1, keys], **budget)
        torch.testing.assert_close(step, prefill[:, :, slot : slot + 1])


def test_a_static_cache_stands_at_its_position():
    mask = torch.arange(20) <= torch.arange(3)[:, None] + 7
    assert mask_positions(mask[None, None], query(2, 3))[0].tolist() == [7, 7]


def test_each_query_stands_in_its_own_document():
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    mask = causal() & (document[:, None] == document)
    query_start, key_start, document_start = mask_positions(mask[None, None], query(2))
    assert query_start.tolist() == key_start.tolist() == [0, 0]
    assert document_start.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 7]] * 2
    # A decode step sees one row of the mask and must come to the same.
    assert mask_positions(mask[None, None, 5:6], query(1, 1))[2].tolist() == [[3]]


def biased_case(*, sinks, softcap, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    q, k, v, grad, sparse = (
        torch.randn(2, heads, length, 6, generator=generator, dtype=torch.float64).to(dtype)
        for heads, length in ((4, 7), (2, 11), (2, 11), (4, 7), (4, 7))
    )
    added = torch.randn(2, 1, 7, 11, generator=generator).masked_fill(~causal(7, 11), -math.inf)
    added[0, 0, 3] = -math.inf  # this query sees nothing
    options = {"softcap": softcap, "sinks": torch.randn(4, generator=generator).to(dtype) if sinks else None}
    return q, k, v, grad, sparse, added, options


def exactly(q, k, v, added, scale, softcap, sinks):
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + added.double()
    if sinks is not None:
        logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(2, -1, 7, 1)], -1)
    sees_nothing = (logits == -math.inf).all(-1, keepdim=True)
    weights = torch.where(sees_nothing, 0.0, logits).softmax(-1) * ~sees_nothing
    return weights[..., :11] @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("workspace", [1 << 22, 100])
@pytest.mark.parametrize(("sinks", "softcap"), [(False, None), (True, None), (False, 1.5), (True, 1.5)])
def test_a_bias_gives_exact_attention_and_its_gradients(sinks, softcap, workspace, monkeypatch):
    monkeypatch.setattr(bias, "_WORKSPACE", workspace)
    q, k, v, grad, sparse, added, options = biased_case(sinks=sinks, softcap=softcap)
    mask, is_bias = visible(added)
    given = [tensor.requires_grad_() for tensor in (q, k, v, sparse, *([options["sinks"]] if sinks else []))]
    output = exact_where_biased(sparse, q, k, v, added, mask, is_bias, "site", 0, 0.4, **options)
    expected = exactly(q, k, v, added, 0.4, **options)
    torch.testing.assert_close(output, expected)
    assert bool((output[0, :, 3] == 0).all()), "sees nothing"
    got = torch.autograd.grad(output, given, grad)
    assert bool((got[3] == 0).all()), "the sparse result was not used"
    wanted = torch.autograd.grad(expected, [q, k, v, *given[4:]], grad)
    for one, other in zip((*got[:3], *got[4:]), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_that_only_hides_keeps_the_sparse_result():
    q, k, v, grad, sparse, added, _ = biased_case(sinks=False, softcap=None)
    mask, is_bias = visible(torch.where(added > -math.inf, 0.0, -math.inf))
    for tensor in (q, k, v, sparse):
        tensor.requires_grad_()
    output = exact_where_biased(sparse, q, k, v, added, mask, is_bias, "site", 0, 0.4)
    assert torch.equal(output, sparse)
    got = torch.autograd.grad(output, [sparse, q, k, v], grad)
    assert torch.equal(got[0], grad)
    assert not any(bool(tensor.any()) for tensor in got[1:])


def test_a_biased_call_is_said_once_and_counted(caplog):
    q, k, v, _, sparse, added, _ = biased_case(sinks=False, softcap=None)
    biased_calls.clear()
    with caplog.at_level(logging.WARNING, "msa_compile"):
        for owner in (1, 1, 2, 1):
            exact_where_biased(sparse, q, k, v, added, *visible(added), "layers.7", owner, 0.4)
    assert len(caplog.records) == 2, "once for each model"
    assert "layers.7 ran DENSE" in caplog.text
    assert "bias" in caplog.text
    assert biased_calls == {(1, "layers.7"): 3, (2, "layers.7"): 1}


@pytest.mark.parametrize("op", ["visible", "mask_positions", "exact_where_biased"])
def test_opcheck(op):
    if op == "visible":
        torch.library.opcheck(torch.ops.msa.visible.default, (torch.zeros(2, 1, 3, 4),))
    elif op == "mask_positions":
        arguments = (causal()[None, None], query(2))
        torch.library.opcheck(torch.ops.msa.mask_positions.default, arguments)
    else:
        q, k, v, _, sparse, added, options = biased_case(sinks=True, softcap=1.5)
        given = [tensor.requires_grad_() for tensor in (sparse, q, k, v)]
        arguments = (*given, added, *visible(added), "site", 0, 0.4, 1.5, options["sinks"].requires_grad_())
        torch.library.opcheck(torch.ops.msa.exact_where_biased.default, arguments)
