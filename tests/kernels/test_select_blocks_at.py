"""`msa::select_blocks_at` is `select_blocks` for each query alone, wherever it stands."""

import pytest
import torch

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels.select_blocks import reference

BATCH, GROUPS, QUERIES, KEYS, WIDTH, BLOCK, TOPK = 2, 2, 9, 40, 16, 4, 3


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(31, 40).expand(1, -1),
        torch.stack([torch.arange(31, 40), torch.arange(20, 29)]),
        torch.tensor([[1, -1, 1, 30, 31, 32, 33, 34, 35], [1, 28, 29, 30, 31, 32, 33, 34, 35]]),
    ],
    ids=["one row for all", "other places in each row", "left padded"],
)
def test_each_query_has_the_blocks_of_its_own_place(positions: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, GROUPS, QUERIES, WIDTH, generator=generator)
    key = torch.randn(BATCH, 1, KEYS, WIDTH, generator=generator)
    found = torch.ops.msa.select_blocks_at(query, key, positions, KEYS, BLOCK, TOPK, 1)
    assert found.shape == (BATCH, GROUPS, QUERIES, TOPK)
    for place in range(QUERIES):
        start = positions[:, place].expand(BATCH).clamp(min=0)  # what is below 0 counts as 0
        alone = query[:, :, place : place + 1]
        expected = reference.select_blocks(alone, key, block_size=BLOCK, topk=TOPK, query_start=start)
        assert torch.equal(found[:, :, place : place + 1], expected)


def test_without_positions_the_queries_are_the_last():
    query, key = torch.randn(BATCH, GROUPS, QUERIES, WIDTH), torch.randn(BATCH, 1, KEYS, WIDTH)
    found = torch.ops.msa.select_blocks_at(query, key, None, KEYS, BLOCK, TOPK, 2)
    assert torch.equal(found, reference.select_blocks(query, key, block_size=BLOCK, topk=TOPK, local_blocks=2))


@pytest.mark.parametrize(("keys", "first"), [(KEYS - 1, 0), (KEYS, KEYS - QUERIES + 1)])
def test_index_keys_of_another_length_and_places_that_are_no_slot_are_refused(keys: int, first: int) -> None:
    query, key = torch.zeros(BATCH, GROUPS, QUERIES, WIDTH), torch.zeros(BATCH, 1, KEYS, WIDTH)
    places = torch.arange(first, first + QUERIES).expand(1, -1)
    with pytest.raises(KernelArgumentError, match="found"):
        torch.ops.msa.select_blocks_at(query, key, places, keys, BLOCK, TOPK, 1)
