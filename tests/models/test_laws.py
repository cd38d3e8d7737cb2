"""The laws of DESIGN.md 3 on whole models, with the `"keys"` indexer; each forward counts its sparse ops."""

import pytest
import torch

from models.subject import BUDGET, EXACT, difference, left_padding, tokens
from models.zoo import VOCAB, ZOO
from msa_compile.kernels.block_sparse_attention import cpu as attend_cpu
from msa_compile.kernels.select_blocks import cpu as select_cpu

PADDED = [name for name, entry in ZOO.items() if entry.calls.pads]
CACHES = sorted({cache for entry in ZOO.values() for cache in entry.calls.caches})


def caches_of(subject):
    return subject.entry.calls.caches


def padding_of(subject, length, *pads):
    """A left padding for models that take one."""
    return left_padding(length, *pads) if subject.entry.calls.pads else None


# The oracle itself -----


def test_oracle_with_a_full_budget_is_the_dense_model(subject):
    ids, mask = tokens(2, 29), padding_of(subject, 29, 0, 6)
    assert difference(subject.oracle_with(100).whole(ids, mask), subject.dense.whole(ids, mask), mask) < EXACT


# Law 1: a budget that covers everything gives dense attention -----


def test_a_full_budget_gives_the_dense_logits(subject):
    ids = tokens(2, BUDGET)
    assert difference(subject.sparse.whole(ids), subject.dense.whole(ids)) < EXACT
    if subject.entry.calls.pads:
        ids, mask = tokens(2, BUDGET + 3), left_padding(BUDGET + 3, 3, 10)
        assert difference(subject.sparse.whole(ids, mask), subject.dense.whole(ids, mask), mask) < EXACT


def test_a_full_budget_generates_the_dense_tokens(subject):
    length = 12 if subject.entry.calls.pads else 10
    ids, mask = tokens(2, length), padding_of(subject, length, 2, 5)
    for cache in ("none", *caches_of(subject)):
        found = subject.sparse.generate(ids, BUDGET - 9, cache, mask)
        assert torch.equal(found, subject.dense.generate(ids, BUDGET - 9, cache, mask)), cache


# Few blocks: the logits are the oracle's -----


def test_few_blocks_give_the_logits_of_the_oracle(subject):
    ids = tokens(2, 37)
    found, dense = subject.sparse.whole(ids), subject.dense.whole(ids)
    assert difference(found, subject.oracle.whole(ids)) < EXACT
    assert difference(found[:, :BUDGET], dense[:, :BUDGET]) < EXACT
    assert difference(found, dense) > 1e-2, "so few blocks must show"


@pytest.mark.parametrize("zoo_name", PADDED, indirect=True)
def test_few_blocks_give_the_logits_of_the_oracle_under_padding_with_holes(subject):
    ids, mask = tokens(3, 38), left_padding(38, 0, 5, 14)
    mask[1, [9, 17, 18, 19, 20, 30]] = 0
    mask[2, [15, 22]] = 0
    assert difference(subject.sparse.whole(ids, mask), subject.oracle.whole(ids, mask), mask) < EXACT


def test_few_blocks_give_the_logits_of_the_oracle_in_every_decode_step(subject):
    ids, mask = tokens(2, 33), padding_of(subject, 33, 0, 6)
    sizes = [13] + [1] * 20
    for cache in caches_of(subject):
        found = subject.sparse.pieces(ids, sizes, cache, mask)
        assert difference(found, subject.oracle.pieces(ids, sizes, cache, mask), mask) < EXACT, cache


# Law 2: one shot, chunks and single tokens agree -----


def test_chunks_and_single_tokens_equal_one_shot(subject):
    ids = tokens(2, 37, seed=1)
    once = subject.sparse.whole(ids)
    for cache in caches_of(subject):
        assert difference(subject.sparse.pieces(ids, [13, 1, 9, 14], cache), once) < EXACT, cache
        assert difference(subject.sparse.pieces(ids, [9] + [1] * 28, cache), once) < EXACT, cache


def test_a_second_prompt_of_another_length_and_batch_is_as_right_as_the_first(subject):
    first, second = tokens(2, 30, seed=2), tokens(3, 26, seed=3)
    for cache in caches_of(subject):
        subject.sparse.pieces(first, [28, 1, 1], cache)
        found = subject.sparse.pieces(second, [11, 1, 1, 12, 1], cache)
        assert difference(found, subject.oracle.whole(second)) < EXACT, cache


# Law 3: padding changes nothing -----


@pytest.mark.parametrize("zoo_name", PADDED, indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(subject, side):
    width, lengths = 34, (29, 22)
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, content in enumerate(rows):
        place = slice(width - content.shape[1], width) if side == "left" else slice(content.shape[1])
        ids[row, place], mask[row, place] = content[0], 1
    found = subject.sparse.whole(ids, mask)
    assert found.isfinite().all()
    for row, content in enumerate(rows):
        alone = subject.sparse.whole(content.expand(2, -1), torch.ones(2, content.shape[1], dtype=torch.long))
        assert difference(found[row][mask[row].bool()], alone[0]) < EXACT
    poisoned = torch.where(mask.bool(), ids, tokens(2, width, seed=9))
    assert not torch.equal(poisoned, ids)
    assert difference(subject.sparse.whole(poisoned, mask), found, mask) < 1e-5


@pytest.mark.parametrize("zoo_name", PADDED, indirect=True)
def test_poison_in_the_padding_does_not_reach_cached_steps(subject):
    ids, mask = tokens(2, 31, seed=4), left_padding(31, 3, 9)
    poisoned = torch.where(mask.bool(), ids, tokens(2, 31, seed=5))
    for cache in caches_of(subject):
        clean, dirty = (subject.sparse.pieces(each, [24] + [1] * 7, cache, mask) for each in (ids, poisoned))
        assert difference(clean, dirty, mask) < 1e-5, cache


# Law 4: no look ahead -----


def test_a_future_token_changes_nothing_before_it(subject):
    ids = tokens(2, 37, seed=6)
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1 - 3) % (VOCAB - 3) + 3
    before, after = subject.sparse.whole(ids), subject.sparse.whole(changed)
    assert difference(before[:, :30], after[:, :30]) < 1e-5
    assert difference(before[:, 30:], after[:, 30:]) > 1e-2


# Law 8: the comparisons above see what is wrong -----


def drop_a_slot(monkeypatch):
    """The first of several chosen blocks is lost."""
    select = select_cpu.select_blocks

    def mutant(*args, **kwargs):
        ids = select(*args, **kwargs)
        shorter = torch.cat([ids[..., 1:], torch.full_like(ids[..., :1], -1)], dim=-1)
        return torch.where((ids >= 0).sum(-1, keepdim=True) > 1, shorter, ids)

    monkeypatch.setattr(select_cpu, "select_blocks", mutant)


def forget_the_local_block(monkeypatch):
    """The query's own block has to compete like any other."""
    select = select_cpu.select_blocks

    def mutant(*args, **kwargs):
        return select(*args, **{**kwargs, "local_blocks": 0})

    monkeypatch.setattr(select_cpu, "select_blocks", mutant)


def anchor_at_slot_zero(monkeypatch):
    """Blocks are counted from the buffer's start; what is visible stays right."""
    select, attend = select_cpu.select_blocks, attend_cpu.block_sparse_attention
    monkeypatch.setattr(select_cpu, "select_blocks", lambda *a, **k: select(*a, **{**k, "key_start": None}))
    monkeypatch.setattr(attend_cpu, "block_sparse_attention", lambda *a, **k: attend(*a, **{**k, "key_start": None}))


def ignore_the_mask(monkeypatch):
    """What only the mask hides is seen."""
    select, attend = select_cpu.select_blocks, attend_cpu.block_sparse_attention
    monkeypatch.setattr(select_cpu, "select_blocks", lambda *a, **k: select(*a, **{**k, "mask": None}))
    monkeypatch.setattr(attend_cpu, "block_sparse_attention", lambda *a, **k: attend(*a, **{**k, "mask": None}))


@pytest.mark.parametrize("mutate", [drop_a_slot, forget_the_local_block])
def test_a_wrong_selection_does_not_pass_for_the_oracle(subject, monkeypatch, mutate):
    ids = tokens(2, 37)
    mutate(monkeypatch)
    assert difference(subject.sparse.whole(ids), subject.oracle.whole(ids)) > 100 * EXACT


@pytest.mark.parametrize("zoo_name", PADDED, indirect=True)
@pytest.mark.parametrize("mutate", [anchor_at_slot_zero, ignore_the_mask])
def test_wrong_visibility_does_not_pass_for_the_oracle(subject, monkeypatch, mutate):
    ids, mask = tokens(3, 38), left_padding(38, 0, 5, 14)
    mask[1, [9, 17, 18, 19, 20, 30]] = 0
    mutate(monkeypatch)
    assert difference(subject.sparse.whole(ids, mask), subject.oracle.whole(ids, mask), mask) > 100 * EXACT
