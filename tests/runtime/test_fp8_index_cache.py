"""`index_cache="fp8"` on a model: bytes beside the cache, the same selection in pieces, no trust in foreign ones."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import msa_compile
from msa_compile import MSAConfig
from msa_compile.kernels.select_blocks import missed_selections, op
from runtime.test_index_keys import sharp_branches, sharp_llama
from runtime.tiny import sparse, tokens

FP8 = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned", index_cache="fp8")
IDS = tokens(33)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made = sparse(sharp_llama(), FP8)
    sharp_branches(made)
    return made


@pytest.fixture(autouse=True)
def lengths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many index keys each selection read as bytes."""
    read: list[int] = []
    expand = op.from_e4m3

    def counting(bits: Tensor, dtype: torch.dtype) -> Tensor:
        assert bits.dtype == torch.uint8
        read.append(bits.shape[2])
        return expand(bits, dtype)

    monkeypatch.setattr(op, "from_e4m3", counting)
    with torch.no_grad():
        yield read


def in_pieces(model: nn.Module, cache: transformers.Cache, sizes: tuple[int, ...]) -> Tensor:
    pieces, start = [], 0
    for size in sizes:
        at = torch.arange(start, start + size)
        step = IDS[:, start : start + size]
        pieces.append(model(step, past_key_values=cache, use_cache=True, position_ids=at[None]).logits)
        start += size
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_a_prompt_and_steps_select_by_bytes_and_equal_one_shot(model: nn.Module, kind: str, lengths: list[int]) -> None:
    once = model(IDS, use_cache=False).logits
    assert lengths == [33]
    cache = (
        transformers.DynamicCache(config=model.config)
        if kind == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=40)
    )
    missed = missed_selections.copy()
    torch.testing.assert_close(in_pieces(model, cache, (29, 1, 2, 1)), once, rtol=1e-4, atol=1e-4)
    assert lengths[1:] == ([29, 30, 32, 33] if kind == "dynamic" else [29, 40, 40, 40])
    assert missed_selections == missed


def test_the_report_says_so(model: nn.Module) -> None:
    assert "index keys of learned indexers are fp8" in str(msa_compile.explain(model, IDS))


def test_a_cache_that_somebody_else_wrote_is_scored_with_keys(model: nn.Module, lengths: list[int]) -> None:
    cache = transformers.DynamicCache(config=model.config)
    model(IDS[:, :29], past_key_values=cache, use_cache=True)
    cache.layers[0].keys.mul_(1.0)
    before = sum(missed_selections.values())
    model(IDS[:, 29:], past_key_values=cache, use_cache=True)
    assert sum(missed_selections.values()) == before + 1
    assert lengths == [29]
