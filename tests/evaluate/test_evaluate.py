"""`evaluate` on whole models: its numbers, its notes, its errors, and that it leaves the model as it was."""

import copy
import json
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from runtime.tiny import CONFIG, EVERYTHING, llama, small, sparse, tokens
from torch import nn

import msa_compile
from msa_compile import MSAConfig, errors

TINY = MSAConfig(block_size=4, topk_blocks=1, dense_below=0)


def quietly(model, batches, **options):
    return msa_compile.evaluate(model, batches, progress=False, **options)


def logits_by_hand(model, **inputs):
    with torch.no_grad():
        mine = model(**inputs).logits.double()
        with msa_compile.dense(model):
            return model(**inputs).logits.double(), mine


@pytest.fixture(scope="module")
def model():
    """A llama that reads one block; tests leave it as it was."""
    return sparse(llama(), TINY)


class Wraps(nn.Module):
    """A model whose output a test changes."""

    def __init__(self, change):
        super().__init__()
        self.inner = small()
        self.change = change

    def forward(self, ids):
        return self.change(self.inner(ids))


def wrapped(change):
    return sparse(Wraps(change), CONFIG, example_inputs=(tokens(),))


def test_a_tiny_budget_differs_and_every_number_equals_that_by_hand(model):
    ids, labels = tokens(37), tokens(37).clone()
    labels[0, :9] = -100
    found = quietly(model, [{"input_ids": ids, "labels": labels}], position_edges=(4, 20))
    dense, mine = logits_by_hand(model, input_ids=ids, use_cache=False)
    p, q = (side[:, :-1].log_softmax(-1) for side in (dense, mine))
    kept = labels[:, 1:] != -100
    want = ids[:, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    position = torch.arange(36).expand(2, 36)
    assert [(bucket.start, bucket.stop) for bucket in found.buckets] == [(0, 4), (4, 20), (20, 36)]
    for bucket in (*found.buckets, found.total):
        mine = kept & (position >= bucket.start) & (position < bucket.stop)
        assert bucket.tokens == int(mine.sum())
        assert bucket.dense_nll == pytest.approx(-float(p.gather(2, want)[..., 0][mine].mean()), abs=1e-5)
        assert bucket.sparse_nll == pytest.approx(-float(q.gather(2, want)[..., 0][mine].mean()), abs=1e-5)
        assert bucket.kl == pytest.approx(float(kl[mine].mean()), abs=1e-6)
        assert bucket.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1))[mine].double().mean()))
    first, *later = found.buckets
    assert first.kl < 1e-6, "up to the budget sparse is dense"
    assert all(bucket.kl > 1e-4 and bucket.agreement < 1 for bucket in later)
    assert found.total.nll_error > 0
    assert found.notes == ()


def test_a_budget_of_every_block_shows_no_difference(sparse_calls):
    found = quietly(sparse(llama(), EVERYTHING), [{"input_ids": tokens(37)}])
    assert len(sparse_calls) == 2, "the sparse op ran in both layers, and in the sparse half only"
    assert found.total.kl < 1e-6
    assert abs(found.total.nll_change) < 1e-6
    assert found.total.agreement == 1
    assert any("dense there by construction" in note for note in found.notes)


def test_dicts_tuples_and_tensors_give_the_same_numbers(model):
    ids = tokens(29)
    ways = [{"input_ids": ids}, (ids,), ids, [ids]]
    found = [quietly(model, [way]).total for way in ways]
    assert all(other.kl == pytest.approx(found[0].kl, rel=1e-4) for other in found)
    assert {other.tokens for other in found} == {2 * 28}
    assert quietly(model, iter([ids, ids])).batches == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_number_and_no_bucket(model, side):
    ids, pad = tokens(23, batch=1), torch.zeros(1, 5, dtype=torch.int64)
    parts, masks = [ids, pad], [torch.ones_like(ids), pad]
    padded, mask = (torch.cat(each if side == "right" else each[::-1], 1) for each in (parts, masks))
    plain = quietly(model, [{"input_ids": ids}])
    found = quietly(model, [{"input_ids": padded, "attention_mask": mask}])
    assert [bucket.tokens for bucket in found.buckets] == [bucket.tokens for bucket in plain.buckets]
    for one, other in zip(found.buckets, plain.buckets, strict=True):
        assert (one.start, one.stop) == (other.start, other.stop)
        assert one.sparse_nll == pytest.approx(other.sparse_nll, abs=1e-5)
        assert one.dense_nll == pytest.approx(other.dense_nll, abs=1e-5)


def test_a_model_that_returns_a_tensor_or_a_tuple_will_do():
    ids = tokens(21)
    plain = quietly(sparse(small()), [ids]).total
    paired = quietly(wrapped(lambda logits: (logits.sum(), logits)), [ids]).total
    assert paired == plain
    assert plain.kl > 1e-6


def test_the_model_is_left_as_it_was():
    model = sparse(llama()).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids = tokens(19)
    model.eval()
    want = model(ids).logits
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    door, state = model.forward, copy.deepcopy(model.state_dict())
    quietly(model, [ids])
    assert model.forward is door
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    graphs = len(door.backend.records)
    quietly(model, [ids, ids])
    assert len(door.backend.records) == graphs, "a second evaluation compiles nothing"
    model.eval()
    assert torch.equal(model(ids).logits, want)


def test_ctrl_c_leaves_the_model_sparse_and_says_what_was_found_so_far(model):
    def stopped():
        yield tokens(21)
        raise KeyboardInterrupt

    door = model.forward
    with pytest.raises(KeyboardInterrupt) as caught:
        quietly(model, stopped())
    assert "40 predictions of 1 batch" in caught.value.__notes__[0]
    assert model.forward is door


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda logits: {"hidden": logits}, errors.NoLogitsError, "dict without logits"),
        (lambda logits: logits[:, -1:], errors.NoLogitsError, "the last token's alone"),
        (lambda logits: logits * torch.nan, errors.NonFiniteError, "the dense model's logits hold NaN"),
    ],
)
def test_logits_that_will_not_do_are_an_error_and_the_model_stays_sparse(change, error, match):
    model = wrapped(change)
    door = model.forward
    with pytest.raises(error, match=match):
        quietly(model, [tokens()])
    assert model.forward is door
    assert msa_compile.explain(model).sparse


@pytest.mark.parametrize(
    "batches",
    [
        [],
        iter(()),
        [torch.zeros(2, 1, dtype=torch.int64)],
        [{"input_ids": tokens(9), "labels": torch.full((2, 9), -100)}],
        [{"input_ids": tokens(9), "attention_mask": torch.zeros(2, 9)}],
    ],
)
def test_data_without_a_prediction_is_an_error(model, batches):
    with pytest.raises(errors.EmptyDataError, match="no token counts in any batch"):
        quietly(model, batches)


def test_only_a_sparse_model_can_be_evaluated():
    model, ids = small(), tokens()
    for verb in (msa_compile.evaluate, lambda *given: msa_compile.fit_budget(*given, max_nll_increase=0.1)):
        with pytest.raises(errors.NotSparseError, match=r"is not sparsified; call msa_compile\.sparsify"):
            verb(model, [ids])
        with (
            msa_compile.dense(sparse(model)),
            pytest.raises(errors.NotSparseError, match=r"dense in this `with msa_compile.dense\(model\)` block"),
        ):
            verb(model, [ids])
        msa_compile.unsparsify(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"position_edges": [3, 2]}, "position_edges"),
        ({"probe_lengths": [0]}, "probe_lengths"),
        ({"probe_samples": 0}, "probe_samples"),
        (
            {"probe_lengths": [40]},
            "has no room for the 76 tokens of the probe 'variable-tracking'; give .* 152 or more",
        ),
        ({"probe_lengths": [128], "tokenizer": "gpt2"}, "tokenizer is a str without encode"),
    ],
)
def test_an_illegal_number_is_refused_before_anything_runs(model, options, match):
    def never():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(errors.EvaluateArgumentError, match=match):
        quietly(model, never(), **options)


def test_short_calls_that_run_dense_are_said():
    model = sparse(llama(), MSAConfig(block_size=4, topk_blocks=2, dense_below=30))
    found = quietly(model, [tokens(29), tokens(41)])
    assert any("1 of 2 batches and probes have at most 30 keys" in note for note in found.notes)
    assert found.total.kl > 0
    alone = quietly(model, [tokens(29)])
    assert alone.total.kl < 1e-6


def test_calls_that_went_around_the_sparse_op_are_said():
    model = sparse(small(), CONFIG)

    def batches():
        yield tokens()
        model.layers[0].attn(torch.zeros(1, 4, 32))  # an inner module, called directly, is dense
        yield tokens()

    found = quietly(model, batches())
    assert [note.partition(" calls")[0] for note in found.notes] == ["WARNING: 1"]
    assert quietly(model, [tokens()]).notes == (), "what happened before is not held against it"


def test_the_result_is_text_json_and_a_line_of_the_report():
    model = sparse(small(), CONFIG)
    assert "not evaluated on your data yet" in str(msa_compile.explain(model))
    found = quietly(model, [tokens(40)])
    assert found.headline in str(msa_compile.explain(model))
    assert "not evaluated" not in str(msa_compile.explain(model))
    text = str(found)
    for bucket in found.buckets:
        assert f"{bucket.start} to {bucket.stop - 1}" in text
        assert f"{bucket.nll_change:+.4f}" in text
        assert f"{math.expm1(bucket.nll_change):+.2%}" in text
    assert json.loads(json.dumps(found.to_dict()))["total"]["tokens"] == found.total.tokens == 78
    own = replace(found, config=MSAConfig(budgets={"a": 2}))
    assert "some sites with a budget of their own" in str(own)


def test_the_picture_is_written_or_the_error_names_the_package(tmp_path):
    found = quietly(sparse(small(), CONFIG), [tokens(40)])
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert str(found), "the table needs no package"
        with pytest.raises(errors.MissingPackageError, match="pip install"):
            found.plot(tmp_path / "none.png")
    pytest.importorskip("matplotlib", reason="a picture needs the viz extra")
    found.plot(tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").stat().st_size > 5000
