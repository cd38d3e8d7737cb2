"""`msa::visible` keeps visibility and refuses a bias; `msa::mask_positions` reads where content stands."""

import math

import pytest
import torch

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels.given_mask import mask_positions, visible

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
    got = visible(mask, "site")
    assert got.dtype == torch.bool
    assert torch.equal(got, seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_minimum_of_a_half_dtype_hides(dtype):
    mask = torch.tensor([0.0, torch.finfo(dtype).min, -0.0], dtype=dtype)
    assert visible(mask, "site").tolist() == [True, False, True]


def test_an_expanded_mask_gives_a_contiguous_one():
    got = visible(torch.zeros(1, 1, 1, 5).expand(2, 3, 4, 5), "site")
    assert got.shape == (2, 3, 4, 5)
    assert got.is_contiguous()


@pytest.mark.parametrize("value", [0.5, -0.5, -9999.0, math.inf, math.nan, 1e-8])
def test_a_bias_is_an_error_that_names_site_value_and_cure(value):
    mask = torch.zeros(2, 1, 4, 4)
    mask[1, 0, 2, 3] = value
    with pytest.raises(KernelArgumentError, match=r"layers\.0\.attn.*bias.*exclude=\('layers\.0\.attn'"):
        visible(mask, "layers.0.attn")


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


@pytest.mark.parametrize("seed", range(20))
def test_causality_never_hides_what_the_mask_shows(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 1, 5, LENGTH, generator=generator) > 0.7
    query_start, key_start, _ = mask_positions(mask, query(3, 5))
    for row, _, i, j in mask.nonzero().tolist():
        assert key_start[row] <= j <= query_start[row] + i


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


@pytest.mark.parametrize("op", ["visible", "mask_positions"])
def test_opcheck(op):
    if op == "visible":
        torch.library.opcheck(torch.ops.msa.visible.default, (torch.zeros(2, 1, 3, 4), "site"))
    else:
        arguments = (causal()[None, None], query(2))
        torch.library.opcheck(torch.ops.msa.mask_positions.default, arguments)
