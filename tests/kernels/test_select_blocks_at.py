"""`msa::select_blocks_at` is `select_blocks` for each query alone, wherever it stands."""

import pytest
import torch

from msa_compile.kernels.select_blocks import reference

BATCH, GROUPS, QUERIES, KEYS, WIDTH, BLOCK, TOPK = 2, 2, 9, 40, 16, 4, 3


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(31, 40).expand(1, -1),
        torch.stack([torch.arange(31, 40), torch.arange(20, 29)]),
        torch.tensor([[1, 1, 1, 30, 31, 32, 33, 34, 35], [1, 28, 29, 30, 31, 32, 33, 34, 35]]),
    ],
    ids=["one row for all", "other places in each row", "left padded"],
)
def test_each_query_has_the_blocks_of_its_own_place(positions: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, GROUPS, QUERIES, WIDTH, generator=generator)
    key = torch.randn(BATCH, 1, KEYS, WIDTH, generator=generator)
    found = torch.ops.msa.select_blocks_at(query, key, positions, BLOCK, TOPK, 1)
    assert found.shape == (BATCH, GROUPS, QUERIES, TOPK)
    for place in range(QUERIES):
        start = positions[:, place].expand(BATCH)
        alone = query[:, :, place : place + 1]
        expected = reference.select_blocks(alone, key, block_size=BLOCK, topk=TOPK, query_start=start)
        assert torch.equal(found[:, :, place : place + 1], expected)
