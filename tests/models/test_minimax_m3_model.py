"""MiniMax-M3 itself, which is sparse already: its own block selection is recognised and runs on the ops, exactly."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import msa_compile
from models.minimax_m3 import BLOCK_SIZE, TOPK, config_of, m3, with_weights
from models.subject import OpCalls, difference
from models.zoo import VOCAB
from msa_compile import MSAConfig
from msa_compile.errors import (
    AdapterError,
    EvaluateArgumentError,
    ExportIndexerError,
    NothingToCalibrateError,
    NothingToSparsifyError,
)

# In the second layer, what the first one gives to padding takes part in choosing blocks.
LAYERS, LENGTH = 2, 61
SITES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
OURS = MSAConfig(block_size=4, topk_blocks=7)
IDS = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
UNPADDED = torch.ones(2, LENGTH, dtype=torch.long)
RIGHT_PADDED = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [41]])).long()
LEFT_PADDED = (torch.arange(LENGTH) >= torch.tensor([[0], [9]])).long()


def new_model(**changes: object) -> nn.Module:
    model: nn.Module = with_weights(m3.MiniMaxM3VLForCausalLM(config_of(num_hidden_layers=LAYERS, **changes)))
    return model


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """The reference, and itself made sparse by us with another budget, which its own overrules."""
    theirs = new_model()
    return theirs, msa_compile.sparsify(copy.deepcopy(theirs), OURS, inner="eager")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def feed(model: nn.Module, ids: Tensor, mask: Tensor, places: Tensor, cache: object = None) -> Tensor:
    given = {"attention_mask": mask.contiguous(), "position_ids": places.contiguous(), "past_key_values": cache}
    logits: Tensor = model(ids.contiguous(), **given).logits
    return logits


def by_content(mask: Tensor) -> Tensor:
    """Positions as `generate` counts them: from the first real token of a row."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


@pytest.mark.parametrize("length", [LENGTH, 13])
@pytest.mark.parametrize("place", ["by slot", "by content"])
@pytest.mark.parametrize("mask", [UNPADDED, RIGHT_PADDED, LEFT_PADDED], ids=["unpadded", "right", "left"])
def test_a_prefill_gives_the_same_logits_on_our_ops(
    models, mask: Tensor, place: str, length: int, ops: OpCalls
) -> None:
    theirs, ours = models
    mask = mask[:, :length]
    places = torch.arange(length).expand(2, -1) if place == "by slot" else by_content(mask)
    expected = feed(theirs, IDS[:, :length], mask, places)
    before = ops.attentions
    found = feed(ours, IDS[:, :length], mask, places)
    assert ops.attentions == before + LAYERS
    assert difference(found, expected, mask) < 1e-4


def pieces_agree(
    models: tuple[nn.Module, nn.Module], ops: OpCalls, kind: str, lengths: tuple[int, ...], mask: Tensor
) -> None:
    """Logits of pieces fed through a cache, every call of ours on the ops."""
    before = ops.attentions
    new_cache = transformers.DynamicCache if kind == "dynamic" else transformers.StaticCache
    room = {} if kind == "dynamic" else {"max_cache_len": LENGTH + 5}
    caches = [new_cache(config=models[0].config, **room) for _ in range(2)]
    start = 0
    for length in lengths:
        end = start + length
        given = (IDS[:, start:end], mask[:, :end], torch.arange(start, end).expand(2, -1))
        expected, found = (feed(model, *given, cache) for model, cache in zip(models, caches, strict=True))
        assert difference(found, expected, mask[:, start:end]) < 1e-4
        start = end
    assert ops.attentions == before + LAYERS * len(lengths)


# A first piece beyond the budget; steps into a new block; another piece, up to the end of a block; steps again.
SHORT = (27, *[1] * 6)
LONG = (*SHORT, 15, *[1] * 5)
FROM_NOTHING = (5, *[1] * 40)


@pytest.mark.parametrize("mask", [UNPADDED, RIGHT_PADDED], ids=["unpadded", "right"])
def test_decoding_gives_the_same_logits(models, mask: Tensor, ops: OpCalls) -> None:
    pieces_agree(models, ops, "dynamic", SHORT[:3], mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [UNPADDED, RIGHT_PADDED, LEFT_PADDED], ids=["unpadded", "right", "left"])
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("static", LONG), ("static", FROM_NOTHING), ("dynamic", LONG), ("dynamic", FROM_NOTHING)],
    ids=["static", "static from nothing", "dynamic", "dynamic from nothing"],
)
def test_every_cache_gives_the_same_logits(
    models, kind: str, lengths: tuple[int, ...], mask: Tensor, ops: OpCalls
) -> None:
    pieces_agree(models, ops, kind, lengths, mask)


@pytest.mark.slow
def test_positions_that_the_model_makes_itself_need_not_be_read(models) -> None:
    caches = [transformers.DynamicCache(config=models[0].config) for _ in models]
    start = 0
    for length in SHORT:
        ids = IDS[:, start : start + length].contiguous()
        pairs = zip(models, caches, strict=True)
        expected, found = (model(input_ids=ids, past_key_values=cache).logits for model, cache in pairs)
        assert difference(found, expected) < 1e-4
        start += length
    assert {site.indexer for site in msa_compile.explain(models[1]).sites} == {"own"}


@pytest.mark.slow
@pytest.mark.parametrize("mask", [UNPADDED, LEFT_PADDED], ids=["unpadded", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(models, cache: str, mask: Tensor) -> None:
    settings = {"max_new_tokens": 14, "do_sample": False, "cache_implementation": cache}
    tokens = [model.generate(IDS[:, :20], attention_mask=mask[:, :20], **settings) for model in models]
    assert torch.equal(*tokens)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_is_as_near_to_float32_as_the_model_itself(attention: str) -> None:
    wide = new_model(attn_implementation=attention)
    theirs = copy.deepcopy(wide).bfloat16()
    ours = msa_compile.sparsify(copy.deepcopy(theirs), OURS, inner="eager")
    places = torch.arange(LENGTH).expand(2, -1)
    exact, expected, found = (feed(model, IDS, UNPADDED, places).float() for model in (wide, theirs, ours))
    assert {site.indexer for site in msa_compile.explain(ours).sites} == {"own"}
    assert (found - expected).abs().mean() < (expected - exact).abs().mean()


def test_the_report_says_whose_budget_counts(models) -> None:
    report = msa_compile.explain(models[1])
    assert {site.name for site in report.sparse} == set(SITES)
    assert {site.indexer for site in report.sparse} == {"own"}
    assert {site.own_budget for site in report.sparse} == {(BLOCK_SIZE, TOPK)}
    assert report.dense == ()
    assert report.dense_calls == 0
    text = re.sub(r"\s+", " ", str(report))
    assert f"own indexer: the model's own {TOPK} blocks" in text
    assert "sparse rows select by the model's own indexer" in text
    assert "MSA is an approximation" not in text


@pytest.mark.slow
def test_what_changes_indexers_and_budgets_leaves_its_own_alone(models, tmp_path: Path) -> None:
    _, ours = models
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    batches = [{"input_ids": IDS, "attention_mask": UNPADDED}]
    total = msa_compile.evaluate(ours, batches, progress=False).total
    assert abs(total.sparse_nll - total.dense_nll) < 1e-5
    with pytest.raises(EvaluateArgumentError, match="2 sites keep the model's own indexer and budget"):
        msa_compile.fit_budget(ours, batches, max_nll_increase=0.1, progress=False)
    with torch.enable_grad(), pytest.raises(NothingToCalibrateError, match="own indexer: the model's own 3 blocks"):
        msa_compile.calibrate(ours, batches, steps=1, progress=False)
    with pytest.raises(AdapterError, match="an indexer of its own, which is part of its base"):
        msa_compile.save(ours, tmp_path / "adapter")
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(ExportIndexerError, match=r"(?s)own indexer.*layers\.0\.self_attn.*layers\.1\.self_attn"):
            msa_compile.export(ours, tmp_path / name, example_inputs=batches[0])
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.slow
def test_its_own_number_of_local_blocks_counts() -> None:
    theirs = new_model(index_local_blocks=2)
    ours = msa_compile.sparsify(copy.deepcopy(theirs), OURS, inner="eager")
    places = torch.arange(LENGTH).expand(2, -1)
    assert difference(feed(ours, IDS, UNPADDED, places), feed(theirs, IDS, UNPADDED, places)) < 1e-4
    assert {site.indexer for site in msa_compile.explain(ours).sites} == {"own"}


class OtherChoice(m3.MiniMaxM3VLIndexer):
    """Chooses the blocks before the best ones."""

    def forward(self, *args: object) -> Tensor:
        return (super().forward(*args) - 1).clamp(min=-1)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["no local block", "blocks before"])
def test_another_rule_of_choosing_is_refused_with_a_reason(other: str) -> None:
    model = new_model(index_local_blocks=0 if other == "no local block" else 1)
    for layer in model.model.layers:
        layer.self_attn.indexer.__class__ = OtherChoice if other == "blocks before" else m3.MiniMaxM3VLIndexer
    with pytest.raises(NothingToSparsifyError, match="data_dependent_mask: the model's own block selection: another"):
        msa_compile.sparsify(model, example_inputs={"input_ids": IDS, "attention_mask": UNPADDED})
