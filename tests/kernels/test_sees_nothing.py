"""`msa::sees_nothing` and `msa::mean_if_any`: queries that see no key of their blocks, and what they get."""

import pytest
import torch

from msa_compile.kernels.given_mask import mean_if_any, sees_nothing

BATCH, GROUPS, QUERIES, KEYS, BLOCK, TOPK = 2, 2, 9, 38, 4, 3  # the last block is not full


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", ["none", "padding", "each query"])
def test_a_query_sees_nothing_where_no_key_of_its_blocks_is_visible(kind: str, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, -(-KEYS // BLOCK), (BATCH, GROUPS, QUERIES, TOPK), generator=generator, dtype=torch.int32)
    rows = QUERIES if kind == "each query" else 1
    mask = None if kind == "none" else torch.rand(BATCH, 1, rows, KEYS, generator=generator) > 0.9
    places = torch.arange(KEYS - QUERIES, KEYS)
    seen = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool) if mask is None else mask
    seen = seen & (torch.arange(KEYS) <= places[:, None]) if is_causal else seen
    in_blocks = (ids[..., None] == torch.arange(KEYS) // BLOCK).any(-2)
    found = sees_nothing(ids, mask, KEYS, BLOCK, is_causal)
    assert torch.equal(found, ~(in_blocks & seen).any(-1, keepdim=True))
    assert kind == "none" or found.any()


@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_mean_is_there_where_it_is_wanted_and_has_a_gradient(is_wanted: bool) -> None:
    value = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([False, is_wanted])[:, None, None, None].expand(2, 2, 4, 1)
    factor = torch.randn(2, 2, 4, 3, dtype=torch.float64)

    def gradient_of(mean: torch.Tensor) -> torch.Tensor:
        picked = torch.where(wanted, mean, 0.0)
        return torch.autograd.grad((picked * factor).sum(), value)[0]

    found = mean_if_any(value, wanted)
    assert torch.equal(
        found, value.mean(2, keepdim=True) if is_wanted else torch.zeros(2, 2, 1, 3, dtype=torch.float64)
    )
    torch.testing.assert_close(gradient_of(found), gradient_of(value.mean(2, keepdim=True)))
