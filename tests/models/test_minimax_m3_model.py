"""MiniMax-M3 itself, which is sparse already: its own block selection is recognised and runs on the ops, exactly."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import msa_compile
from models.minimax_m3 import BLOCK_SIZE, TOPK, config_of, m3, with_weights
from models.subject import OpCalls, difference
from models.zoo import VOCAB
from msa_compile import MSAConfig
from msa_compile.errors import NothingToSparsifyError

LENGTH = 61
IDS = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
UNPADDED = torch.ones(2, LENGTH, dtype=torch.long)
RIGHT_PADDED = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [41]])).long()
LEFT_PADDED = (torch.arange(LENGTH) >= torch.tensor([[0], [9]])).long()


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """The reference, and itself made sparse by us with another budget, which its own overrules."""
    theirs = with_weights(m3.MiniMaxM3VLForCausalLM(config_of()))
    ours = msa_compile.sparsify(copy.deepcopy(theirs), MSAConfig(block_size=4, topk_blocks=7), inner="eager")
    return theirs, ours


def feed(model: nn.Module, ids: Tensor, mask: Tensor, places: Tensor, cache: object = None) -> Tensor:
    given = {"attention_mask": mask.contiguous(), "position_ids": places.contiguous(), "past_key_values": cache}
    logits: Tensor = model(ids.contiguous(), **given).logits
    return logits


@pytest.mark.parametrize("mask", [UNPADDED, RIGHT_PADDED, LEFT_PADDED], ids=["unpadded", "right", "left"])
def test_a_prefill_gives_the_same_logits_on_our_ops(models, mask: Tensor, ops: OpCalls) -> None:
    theirs, ours = models
    places = torch.arange(LENGTH).expand(2, -1)
    expected = feed(theirs, IDS, mask, places)
    with ops.expecting(1):
        found = feed(ours, IDS, mask, places)
    assert difference(found, expected, mask) < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_and_decoding_give_the_same_logits(models, kind: str) -> None:
    config = models[0].config
    new_cache = transformers.DynamicCache if kind == "dynamic" else transformers.StaticCache
    room = {} if kind == "dynamic" else {"max_cache_len": LENGTH + 5}
    caches = [new_cache(config=config, **room) for _ in range(2)]
    start = 0
    for length in (40, 1, 1, 13, 1, 5):
        end = start + length
        places = torch.arange(start, end).expand(2, -1)
        expected, found = (
            feed(model, IDS[:, start:end], UNPADDED[:, :end], places, cache)
            for model, cache in zip(models, caches, strict=True)
        )
        assert difference(found, expected) < 1e-4
        start = end


def test_the_report_says_whose_budget_counts(models) -> None:
    ours = models[1]
    feed(ours, IDS, UNPADDED, torch.arange(LENGTH).expand(2, -1))
    report = msa_compile.explain(ours)
    assert {site.indexer for site in report.sparse} == {"own"}
    assert {site.own_budget for site in report.sparse} == {(BLOCK_SIZE, TOPK)}
    assert f"the model's own {TOPK} blocks of {BLOCK_SIZE} keys" in str(report.sparse[0].detail)
    assert report.dense == ()
    assert report.dense_calls == 0


class OtherChoice(m3.MiniMaxM3VLIndexer):
    """Chooses the blocks before the best ones."""

    def forward(self, *args: object) -> Tensor:
        return (super().forward(*args) - 1).clamp(min=-1)


def test_another_rule_of_choosing_is_refused_with_a_reason() -> None:
    model = with_weights(m3.MiniMaxM3VLForCausalLM(config_of()))
    model.model.layers[0].self_attn.indexer.__class__ = OtherChoice
    with pytest.raises(NothingToSparsifyError, match="data_dependent_mask: the model's own block selection: another"):
        msa_compile.sparsify(model, example_inputs={"input_ids": IDS, "attention_mask": UNPADDED})
