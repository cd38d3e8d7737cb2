"""The laws of DESIGN.md 3 on whole models with the learned indexer; nothing is scored with `"keys"` in between."""

import pytest
import torch

from models.learned import LearnedSubject
from models.subject import BUDGET, EXACT, difference, left_padding, tokens
from models.zoo import VOCAB, ZOO
from msa_compile.kernels.select_blocks import missed_selections

NAMES = ["llama", "meta_llama", "cat"]
_subjects: dict[str, LearnedSubject] = {}


@pytest.fixture(scope="session", params=NAMES)
def learned_name(request):
    return request.param


@pytest.fixture
def learned(learned_name, ops):
    if learned_name not in _subjects:
        _subjects[learned_name] = LearnedSubject(learned_name)
    subject = _subjects[learned_name]
    subject.ops = ops
    missed = missed_selections.copy()
    yield subject
    assert missed_selections == missed, "every selection is by index keys"


def caches_of(subject):
    return subject.entry.calls.caches


def padding_of(subject, length, *pads):
    return left_padding(length, *pads) if subject.entry.calls.pads else None


def test_a_full_budget_gives_the_dense_logits_and_tokens(learned):
    ids, mask = tokens(2, BUDGET), padding_of(learned, BUDGET, 0, 4)
    assert difference(learned.sparse.whole(ids, mask), learned.dense.whole(ids, mask), mask) < EXACT
    cache, prompt = caches_of(learned)[0], ids[:, :10].contiguous()
    assert torch.equal(
        learned.sparse.generate(prompt, BUDGET - 9, cache), learned.dense.generate(prompt, BUDGET - 9, cache)
    )


def test_few_blocks_give_the_logits_of_the_index_branch_run_eagerly(learned):
    ids, mask = tokens(2, 37), padding_of(learned, 37, 0, 6)
    found = learned.sparse.whole(ids, mask)
    assert difference(found, learned.oracle().whole(ids, mask), mask) < EXACT
    assert difference(found, learned.dense.whole(ids, mask), mask) > 1e-2, "so few blocks must show"


def test_chunks_and_single_tokens_equal_one_shot(learned):
    ids, mask = tokens(2, 37, seed=1), padding_of(learned, 37, 0, 6)
    once = learned.sparse.whole(ids, mask)
    for cache in caches_of(learned):
        assert difference(learned.sparse.pieces(ids, [13, 1, 9, 14], cache, mask), once, mask) < EXACT, cache
        assert difference(learned.sparse.pieces(ids, [9] + [1] * 28, cache, mask), once, mask) < EXACT, cache


@pytest.mark.slow
def test_a_second_prompt_of_another_length_and_batch_is_as_right_as_the_first(learned):
    first, second = tokens(2, 30, seed=2), tokens(3, 26, seed=3)
    expected = learned.oracle().whole(second)
    for cache in caches_of(learned):
        learned.sparse.pieces(first, [28, 1, 1], cache)
        assert difference(learned.sparse.pieces(second, [11, 1, 1, 12, 1], cache), expected) < EXACT, cache


@pytest.mark.parametrize("learned_name", [name for name in NAMES if ZOO[name].calls.pads], indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(learned, side):
    width, content = 34, tokens(1, 27, seed=4)
    place = slice(7, 34) if side == "left" else slice(27)
    ids, mask = tokens(1, width, seed=5), torch.zeros(1, width, dtype=torch.long)
    ids[0, place], mask[0, place] = content[0], 1
    both, full = ids.expand(2, -1).contiguous(), mask.expand(2, -1).contiguous()
    alone = learned.sparse.whole(content.expand(2, -1).contiguous(), torch.ones(2, 27, dtype=torch.long))
    assert difference(learned.sparse.whole(both, full)[:, place], alone) < EXACT


def test_a_future_token_changes_nothing_before_it(learned):
    ids = tokens(2, 37, seed=6)
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1 - 3) % (VOCAB - 3) + 3
    before, after = learned.sparse.whole(ids), learned.sparse.whole(changed)
    assert difference(before[:, :30], after[:, :30]) < 1e-5
    assert difference(before[:, 30:], after[:, 30:]) > 1e-2


def test_beyond_the_oracle_the_keys_would_choose_otherwise(learned, subject_of):
    """The oracle of the laws above does not accept what `"keys"` selects."""
    ids = tokens(2, 37)
    by_keys = subject_of(learned.name).oracle.whole(ids)
    assert difference(learned.sparse.whole(ids), by_keys) > 1e-2


@pytest.mark.slow
def test_index_keys_pass_by_the_norm_of_keys(ops):
    """Qwen3 norms its keys between projection and RoPE; only RoPE is lifted."""
    subject = LearnedSubject("qwen3")
    subject.ops = ops
    ids, mask = tokens(2, 30), left_padding(30, 0, 6)
    expected = subject.oracle().whole(ids, mask)
    assert difference(subject.sparse.pieces(ids, [26, 1, 1, 1, 1], "dynamic", mask), expected, mask) < EXACT


@pytest.mark.parametrize("write", ["index_put", pytest.param("index_copy", marks=pytest.mark.slow)])
def test_a_buffer_written_at_positions_keeps_index_keys(write, ops):
    subject = LearnedSubject("gpt_fast" if write == "index_put" else "index_copy")
    subject.ops = ops
    ids, missed = tokens(2, 37, seed=1), missed_selections.copy()
    once = subject.sparse.whole(ids)
    assert difference(subject.sparse.pieces(ids, [13, 1, 9, 14], "buffers"), once) < EXACT
    assert len(subject.branches) == ZOO[subject.name].sparse_sites
    assert missed_selections == missed
