"""The numbers of a comparison equal those computed by hand in float64, and land in the bucket of their position."""

import math

import pytest
import torch
from torch import nn

from msa_compile import errors
from msa_compile.batches import IGNORED, read_batch
from msa_compile.evaluate import compare
from msa_compile.evaluate.compare import ByPosition, check_edges, compare_logits, default_edges, sum_of_nll

VOCAB = 11


class Named(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return input_ids


def data(dtype=torch.float64):
    """Two rows of different length, padded on different sides, and logits of two models."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, 7:] = 0
    labels = ids.clone()
    labels[1, 3] = IGNORED
    logits = torch.randn(2, 2, 9, VOCAB, generator=generator, dtype=torch.float64).to(dtype)
    return read_batch(Named(), {"input_ids": ids, "attention_mask": mask, "labels": labels}), logits[0], logits[1]


def by_hand(batch, dense, sparse, edges):
    """Rows of (bucket, dense nll, sparse nll, same best, kl), one prediction at a time."""
    rows = []
    mask, labels = batch.named["attention_mask"], batch.target
    for b in range(2):
        for t in range(8):
            if not (mask[b, t] and mask[b, t + 1]) or labels[b, t] == IGNORED:
                continue
            position = int(mask[b, :t].sum())
            p, q = (side[b, t].double().exp() / side[b, t].double().exp().sum() for side in (dense, sparse))
            want = labels[b, t]
            kl = sum(float(p[v] * (p[v].log() - q[v].log())) for v in range(VOCAB))
            bucket = sum(position >= edge for edge in edges)
            rows.append((bucket, -math.log(p[want]), -math.log(q[want]), float(p.argmax() == q.argmax()), kl))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("workspace", [1, 5 * VOCAB, 1 << 20])
@pytest.mark.parametrize("edges", [(), (3,), (1, 2, 6)])
def test_buckets_equal_a_computation_by_hand_in_float64(edges, workspace, monkeypatch):
    monkeypatch.setattr(compare, "_WORKSPACE", workspace)
    batch, dense, sparse = data()
    sums = ByPosition(edges)
    sums.add_batch(dense, sparse, batch)
    rows = by_hand(batch, dense, sparse, edges)
    assert sums.tokens == len(rows) == 11
    starts = [0, *edges]
    found = {starts.index(bucket.start): bucket for bucket in sums.buckets()}
    assert set(found) == set(rows[:, 0].int().tolist())
    for index, bucket in found.items():
        mine = rows[rows[:, 0] == index]
        assert bucket.tokens == len(mine)
        got = (bucket.dense_nll, bucket.sparse_nll, bucket.agreement, bucket.kl)
        assert got == pytest.approx(mine[:, 1:].mean(0).tolist(), abs=1e-12)
    change = rows[:, 2] - rows[:, 1]
    total = sums.total()
    assert total.nll_change == pytest.approx(float(change.mean()), abs=1e-12)
    assert total.nll_error == pytest.approx(float(change.std(correction=0)) / len(rows) ** 0.5, abs=1e-12)
    assert sum_of_nll("dense", dense, batch) == pytest.approx(float(rows[:, 1].sum()), abs=1e-10)


def test_batches_add_up_by_tokens_and_not_by_batches():
    batch, dense, sparse = data()
    few = read_batch(Named(), {"input_ids": batch.ids, "labels": torch.full_like(batch.ids, IGNORED)})
    few.target[0, 4] = 3
    sums = ByPosition(())
    sums.add_batch(dense, sparse, batch)
    alone = sums.total()
    sums.add_batch(dense, sparse, few)
    one = -float(dense[0, 4].log_softmax(0)[3])
    assert sums.total().dense_nll == pytest.approx((11 * alone.dense_nll + one) / 12)


def test_half_precision_is_compared_in_float32():
    batch, dense, sparse = data(torch.bfloat16)
    sums = ByPosition(())
    sums.add_batch(dense, sparse, batch)
    rows = by_hand(batch, dense, sparse, ())
    assert sums.total().kl == pytest.approx(float(rows[:, 4].mean()), rel=1e-5)


def test_no_float32_copy_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(compare, "_WORKSPACE", 4 * VOCAB)
    sizes = []
    original = compare.compare_logits
    monkeypatch.setattr(compare, "compare_logits", lambda *parts: sizes.append(parts[0].numel()) or original(*parts))
    batch, dense, sparse = data(torch.bfloat16)
    ByPosition(()).add_batch(dense, sparse, batch)
    assert sizes == [4 * VOCAB, 4 * VOCAB, 3 * VOCAB]


def test_a_token_that_both_rule_out_is_no_difference():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    same = compare_logits(logits, logits, torch.tensor([1]))
    assert (same.kl.item(), same.agrees.item()) == (0.0, True)
    assert same.dense_nll.item() == pytest.approx(math.log(1 + math.exp(-1.0)))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([torch.nan, 0.0, 0.0], "logits hold NaN"),
        ([torch.inf, 0.0, 0.0], r"logits hold \+inf"),
        ([-torch.inf] * 3, "nothing but -inf in a row"),
        ([0.0, -torch.inf, 0.0], "rules out a token"),
    ],
)
@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_side(bad, match, side):
    good, bad = torch.zeros(1, 3), torch.tensor([bad])
    pair = (bad, good) if side == "dense" else (good, bad)
    with pytest.raises(errors.NonFiniteError, match=f"the {side} model.*{match}"):
        compare_logits(*pair, torch.tensor([1]))


@pytest.mark.parametrize("label", [VOCAB, -7])
def test_a_label_that_is_no_token_is_named(label):
    batch, dense, sparse = data()
    batch.target[0, 5] = label
    with pytest.raises(errors.BatchError, match=f"a label is {label}, and the model has logits of {VOCAB} tokens"):
        ByPosition(()).add_batch(dense, sparse, batch)


def test_edges_double_from_the_budget_on_and_have_to_ascend():
    assert default_edges(48)[:3] == (48, 96, 192)
    assert check_edges([1, 5]) == (1, 5)
    for edges in ([0, 1], [5, 5], [5, 1], [1.5], ["a"]):
        with pytest.raises(errors.EvaluateArgumentError, match="position_edges"):
            check_edges(edges)
