"""The report: its fields, its JSON, its text, and the FLOPs of spec 9."""

import dataclasses
import importlib.util
import json
from unittest import mock

import pytest
from runtime.tiny import CONFIG, LAYERS, small, tokens

import msa_compile
from msa_compile import MSAConfig, Reason, Report, Site
from msa_compile.records import GraphRecord
from msa_compile.report import LENGTHS, build_report, site_flops

DEFAULT = MSAConfig()
PAPER = Site("layers.0.attn", "model.py:7", "sdpa", 64, 4, 128, "causal", "sparse", None, "", "keys")
REFUSED = dataclasses.replace(
    PAPER, name="layers.1.attn", decision="dense", reason=Reason.SLIDING_WINDOW, indexer=None, detail="512 keys"
)


def report_of(*sites, config=DEFAULT, dense_calls=0):
    return build_report([GraphRecord(sites, 10, 0.1, 0.1)], config, {"x": dense_calls}, sparsified=True)


@pytest.mark.parametrize(
    ("length", "ratio"), [(8 * 1024, 1.88), (32 * 1024, 6.40), (128 * 1024, 16.0), (10**6, 28.29), (2**20, 28.44)]
)
def test_flops_are_those_of_the_paper(length, ratio):
    dense, sparse = site_flops(PAPER, MSAConfig(block_size=128, topk_blocks=16), length)
    assert dense == 2 * 64 * 128 * length**2
    assert sparse == 4 * 128 * length**2 + 4 * 64 * 128 * length * 2048
    assert dense / sparse == pytest.approx(ratio, abs=0.005)


def test_flops_of_what_runs_dense_are_dense():
    config = MSAConfig(block_size=128, topk_blocks=16)
    assert len(set(site_flops(PAPER, config, 2048))) == 1, "dense_below"
    windowed = dataclasses.replace(REFUSED, mask="window(512)")
    assert site_flops(windowed, config, 2**20) == (4 * 64 * 128 * 2**20 * 512,) * 2
    assert report_of(PAPER, REFUSED).flops(2**20) == tuple(
        sum(parts) for parts in zip(site_flops(PAPER, config, 2**20), site_flops(REFUSED, config, 2**20), strict=True)
    )


def test_a_budget_of_its_own_is_counted_said_and_missed_where_it_matches_nothing():
    config = MSAConfig(budgets={"layers.0.*": 32, "layrs.*": 4})
    assert report_of(PAPER, config=config).flops(2**20) == site_flops(PAPER, MSAConfig(topk_blocks=32), 2**20)
    text = str(report_of(PAPER, config=config))
    assert "16 blocks of 128 keys (1 rows with a budget of their own)" in text
    assert "32 blocks" in text
    assert "budgets: 'layrs.*' matches no site" in text
    assert "'layers.0.*' matches no site" not in text


def test_flops_count_a_site_once_though_many_graphs_have_it():
    record = GraphRecord((PAPER,), 10, 0.1, 0.1)
    other = GraphRecord((dataclasses.replace(PAPER, mask="given"),), 10, 0.1, 0.1)
    many = build_report([record, record, other], MSAConfig(), {}, sparsified=True)
    assert many.flops(2**20) == report_of(PAPER).flops(2**20)
    assert [site.graph for site in many.sites] == [(0, 1), (2,)]
    assert many.graphs == 3


def test_lengths_are_those_of_the_issue():
    assert LENGTHS == (8192, 32768, 131072, 1048576)


def test_report_and_rows_are_frozen():
    report = report_of(PAPER)
    for record, field in ((report, "dense_calls"), (report.sites[0], "decision")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, 0)


def test_sparse_and_dense_part_the_sites():
    report = report_of(PAPER, REFUSED, dense_calls=3)
    assert [site.name for site in report.sparse] == ["layers.0.attn"]
    assert [site.name for site in report.dense] == ["layers.1.attn"]
    assert isinstance(report.sites, tuple)
    assert report.dense_calls == 3


def test_fields_of_a_real_model():
    report = msa_compile.explain(small(), tokens(), config=MSAConfig(4, 3, exclude="layers.1.*"))
    assert isinstance(report, Report)
    sparse, dense = report.sites
    assert (sparse.name, sparse.form, sparse.mask) == ("layers.0.attn", "sdpa/enable_gqa", "causal")
    assert sparse.source.startswith("tiny.py:")
    assert (sparse.query_heads, sparse.key_value_heads, sparse.head_dim) == (4, 2, 8)
    assert (sparse.decision, sparse.reason, sparse.indexer) == ("sparse", None, "keys")
    assert (dense.name, dense.decision, dense.reason, dense.indexer) == (
        "layers.1.attn",
        "dense",
        Reason.EXCLUDED,
        None,
    )
    assert dense.detail


def test_to_dict_is_json():
    report = msa_compile.explain(small(), tokens(), config=CONFIG)
    back = json.loads(json.dumps(report.to_dict()))
    assert len(back["sites"]) == LAYERS
    assert set(back["sites"][0]) == {field.name for field in dataclasses.fields(Site)}
    assert back["config"]["block_size"] == 4
    assert (back["graphs"], back["dense_calls"], back["sparsified"]) == (1, 0, False)
    assert set(back["flops"]) == {str(length) for length in LENGTHS}
    assert json.loads(json.dumps(report_of(REFUSED).to_dict()))["sites"][0]["reason"] == "sliding_window"


@pytest.mark.parametrize("rich", [True, False])
def test_text_says_what_why_and_what_it_saves(rich):
    report = report_of(PAPER, REFUSED, dense_calls=2)
    find = importlib.util.find_spec
    with mock.patch("importlib.util.find_spec", lambda name: find(name) if rich else None):
        text = str(report)
    assert "1 sparse and 1 dense" in text
    assert "16 blocks of 128 keys" in text
    assert "dense calls: 2" in text
    for part in ("layers.0.attn", "model.py:7", "64/4/128", "causal", "sliding_window: 512 keys"):
        assert part in text
    assert Reason.SLIDING_WINDOW.sentence in text
    alone = str(report_of(PAPER))
    assert [line.split()[-1] for line in alone.splitlines() if " tokens " in line] == ["1.9x", "6.4x", "16.0x", "28.4x"]
    assert "not evaluated on your data" in alone


def test_text_of_a_report_without_sites():
    assert "0 sparse and 0 dense" in str(report_of())


def test_every_reason_has_a_code_and_a_sentence():
    assert all(reason.sentence and reason.value == reason.name.lower() for reason in Reason)


def test_dense_below_auto_is_shown_with_its_origin(monkeypatch):
    from msa_compile.kernels import break_even

    monkeypatch.setattr(break_even, "measure", lambda shape: break_even.BreakEven(40, "measured", "as the test says"))
    model, ids = small(), tokens()
    before = msa_compile.explain(model, ids, config=MSAConfig(4, 3))
    assert "at most 12 keys run dense (budget: the break-even is measured when the model is compiled)" in str(before)
    msa_compile.sparsify(model, MSAConfig(4, 3), inner="eager")
    model(ids)
    after = msa_compile.explain(model)
    assert "at most 39 keys run dense (measured: as the test says)" in str(after)
    assert {site.dense_below.keys for site in after.sparse} == {39}
    assert json.loads(json.dumps(after.to_dict()))["sites"][0]["dense_below"]["origin"] == "measured"
    dense, sparse = zip(*(site_flops(after.sparse[0], MSAConfig(4, 3), length) for length in (39, 40)), strict=True)
    assert (dense[0] == sparse[0], dense[1] == sparse[1]) == (True, False)
    given = msa_compile.explain(small(), ids, config=MSAConfig(4, 3, dense_below=7))
    assert "at most 7 keys run dense (given)" in str(given)
