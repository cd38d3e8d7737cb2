"""Whole generations: beams, caches, one-token prompts, Inductor, and how often anything compiles."""

import contextlib
import copy

import pytest
import torch

import msa_compile
from models.subject import BLOCK_SIZE, BUDGET, EXACT, TOPK, Run, difference, left_padding, tokens
from models.zoo import ZOO
from msa_compile import MSAConfig

# Beams and greedy tokens from transformers' generate -----


def beams(run, ids, mask, steps, **how):
    """The three best beams and their scores."""
    out = run.model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, num_beams=3, num_return_sequences=3, do_sample=False,
        logits_to_keep=0, output_scores=True, return_dict_in_generate=True, **how,
    )  # fmt: skip
    return out.sequences, out.sequences_scores


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_beam_search_within_the_budget_is_dense(subject_of, ops, name):
    subject = subject_of(name)
    ids, mask = tokens(2, 12), left_padding(12, 2, 5)
    expected, scores = beams(subject.dense, ids, mask, BUDGET - 9)
    with ops.expecting((BUDGET - 9) * subject.entry.sparse_sites):
        found, found_scores = beams(subject.sparse, ids, mask, BUDGET - 9)
    assert torch.equal(found, expected)
    assert torch.allclose(found_scores, scores, atol=EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_beam_search_with_few_blocks_has_the_beams_of_the_oracle(subject_of, ops, name):
    subject, steps = subject_of(name), 16
    ids, mask = tokens(2, 22), left_padding(22, 0, 3)
    with subject.oracle.checking(steps):
        expected, scores = beams(subject.oracle, ids, mask, steps)
    dense, _ = beams(subject.dense, ids, mask, steps)
    with subject.sparse.checking(steps):
        found, found_scores = beams(subject.sparse, ids, mask, steps)
    assert torch.equal(found, expected)
    assert torch.allclose(found_scores, scores, atol=EXACT)
    assert not torch.equal(found, dense), "so few blocks must show"


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_generate_with_few_blocks_gives_the_tokens_of_the_oracle_with_any_cache(subject_of, name):
    subject = subject_of(name)
    ids, mask = tokens(2, 22, seed=7), left_padding(22, 0, 3)
    expected = subject.oracle.generate(ids, 16, "none", mask)
    assert not torch.equal(expected, subject.dense.generate(ids, 16, "dynamic", mask)), "so few blocks must show"
    for cache in ("none", "dynamic", "static"):
        assert torch.equal(subject.sparse.generate(ids, 16, cache, mask), expected), cache


@pytest.mark.parametrize("name", ["llama", "cat"])
def test_a_prompt_of_one_token_and_one_row(subject_of, name):
    subject = subject_of(name)
    ids = tokens(1, 30, seed=8)
    expected = subject.oracle.whole(ids)
    for cache in subject.entry.calls.caches:
        assert difference(subject.sparse.pieces(ids, [1] * 30, cache), expected) < EXACT, cache


# Compilations -----

DENSE_BELOW = 18
COUNTED = [
    ("llama", "dynamic"),
    ("llama", "static"),
    ("meta_llama", "slices"),
    ("gpt_fast", "buffers"),
    ("cat", "returned"),
]


def prompt_and_steps(model, entry, cache, batch, length, steps):
    """How many graphs the model has compiled, after the prompt and after each step."""
    feed = entry.calls.start(model, cache, batch, 48)
    ids = tokens(batch, length + steps, seed=length)
    counts = []
    for piece in ids.split([length] + [1] * steps, dim=1):
        feed(piece.contiguous())
        counts.append(len(model.forward.backend.records))
    return counts


@pytest.mark.parametrize(("name", "cache"), COUNTED)
def test_nothing_compiles_after_warm_up(ops, name, cache):
    """Over block edges, the budget of 12 and `dense_below`, and for a second prompt of another length and batch."""
    entry = ZOO[name]
    config = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=3, dense_below=DENSE_BELOW)
    model = msa_compile.sparsify(entry.build(), config, inner="eager")

    counts = prompt_and_steps(model, entry, cache, 2, 9, 24)
    assert counts[2] == counts[-1], f"compiled after two steps: {counts}"
    steps_seen = 24 - (DENSE_BELOW - 9) if cache in ("dynamic", "slices", "returned") else 25
    assert ops.attentions == ops.selections == steps_seen * entry.sparse_sites, "dense up to dense_below, sparse after"

    warm = counts[-1]
    second = prompt_and_steps(model, entry, cache, 2, 13, 10)
    assert second[-1] == warm, f"another length compiled: {warm} then {second}"
    third = prompt_and_steps(model, entry, cache, 3, 17, 10)
    # gpt-fast allocates new cache buffers for another batch, and Dynamo takes a buffer's shape as fixed.
    renewed = 2 if cache == "buffers" else 0
    assert third[-1] <= warm + renewed, f"another batch compiled: {warm} then {third}"
    assert third[2] == third[-1]

    single = prompt_and_steps(model, entry, cache, 1, 11, 10)
    assert single[2] == single[-1], f"one row compiled after two steps: {single}"
    again = prompt_and_steps(model, entry, cache, 1, 15, 10)
    assert again[-1] == single[-1], f"a second prompt of one row compiled: {single[-1]} then {again}"


# Inductor -----


@pytest.fixture(scope="module", params=["llama", "nanogpt"])
def inductor(request):
    """A dense model and its sparse copy, compiled by Inductor."""
    entry = ZOO[request.param]
    model = entry.build()
    config = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=TOPK, dense_below=0)
    return request.param, model, msa_compile.sparsify(copy.deepcopy(model), config)


def test_inductor_gives_dense_logits_within_the_budget_and_the_oracle_beyond(inductor, subject_of, ops):
    name, model, sparse_model = inductor
    entry = ZOO[name]
    dense = Run(model, entry, lambda forwards: contextlib.nullcontext())
    sparse = Run(sparse_model, entry, lambda forwards: ops.expecting(forwards * entry.sparse_sites))
    ids = tokens(2, 37)
    found, expected = sparse.whole(ids), dense.whole(ids)
    assert difference(found[:, :BUDGET], expected[:, :BUDGET]) < EXACT
    assert difference(found, subject_of(name).oracle.whole(ids)) < EXACT
    assert difference(found, expected) > 1e-2
    short = tokens(2, BUDGET, seed=1)
    assert difference(sparse.whole(short), dense.whole(short)) < EXACT
