"""A graph break elsewhere changes nothing; one inside an attention is reported, and its site is dense and named."""

import logging
import re

import pytest
import torch

import msa_compile
from msa_compile import MSAConfig, Reason
from msa_compile.errors import NothingToSparsifyError
from runtime.tiny import CONFIG, EVERYTHING, LAYERS, OpCount, small, sparse, tokens

NAMES = [f"layers.{index}.attn" for index in range(LAYERS)]


@pytest.mark.parametrize("where", ["in model", "in block", "after attention"])
def test_a_break_elsewhere_stays_sparse(ops: OpCount, where):
    ids = tokens()
    want = small()(ids)
    model = sparse(small(where, where), EVERYTHING)
    for length in (37, 22):
        torch.testing.assert_close(model(ids[:, :length]), want[:, :length])
        assert ops.take() == LAYERS
    report = msa_compile.explain(model)
    assert report.dense_calls == 0
    assert {site.name for site in report.sparse} == set(NAMES)
    assert report.dense == ()


@pytest.mark.parametrize("where", ["in block", "after attention"])
def test_exclude_holds_though_dynamo_would_share_the_graph_of_equal_layers(ops: OpCount, where):
    model = sparse(small(where, where), MSAConfig(4, 3, dense_below=0, exclude="layers.0.*"))
    model(tokens())
    assert ops.take() == 1
    report = msa_compile.explain(model)
    assert {site.name for site in report.sparse} == {NAMES[1]}
    assert {site.reason for site in report.dense} == {Reason.EXCLUDED}


def test_a_break_between_projections_and_attention_is_reported(ops: OpCount):
    ids = tokens()
    want = small()(ids)
    model = sparse(small("before attention", ""), EVERYTHING)
    torch.testing.assert_close(model(ids), want)
    assert ops.take() == 1
    report = msa_compile.explain(model)
    assert {site.name for site in report.sparse} == {NAMES[1]}
    assert {site.name for site in report.dense} == {NAMES[0]}
    assert all(site.reason for site in report.dense)
    assert report.dense_calls == 0, "the site was never said to be sparse"
    (cut,) = report.dense
    assert "graph_break()" in cut.detail, "Dynamo's own reason"
    assert re.search(r"\(tiny\.py:\d+\)", cut.detail), "and the line of the model"


@pytest.mark.parametrize("where", ["before attention", "after softmax"])
def test_a_break_in_every_attention_is_an_error(where):
    with pytest.raises(NothingToSparsifyError, match=r"graph break: .*graph_break\(\).*\(tiny\.py:\d+\)"):
        sparse(small(where, where))


def test_a_break_that_comes_later_is_said_and_counted(ops: OpCount, caplog):
    """Found sparse, then cut: the marker of the cut site runs.

    Equal layers may share the frames around the cut, so that their markers run apart from their attention and count
    too: what is said then is too much, never too little.
    """
    model = sparse(small())
    model.layers[0].attn.break_at = "before attention"
    with caplog.at_level(logging.WARNING, "msa_compile"):
        model(tokens())
    assert ops.take() == 1
    assert msa_compile.explain(model).dense_calls >= 1
    assert caplog.text.count(f"{NAMES[0]} ran DENSE") == 1


def test_a_site_that_turns_dense_in_another_graph_is_said_and_counted(ops: OpCount, caplog):
    """Found sparse on two-headed keys; then the mask of a call cannot be proved."""
    model = sparse(small())
    model(tokens())
    ops.take()
    model.layers[0].attn.forward = _cross_attention(model.layers[0].attn)
    with caplog.at_level(logging.WARNING, "msa_compile"):
        for _ in range(2):
            model(tokens())
    assert ops.take() == 2
    assert msa_compile.explain(model).dense_calls == 2
    assert caplog.text.count(f"{NAMES[0]} stays DENSE in a graph of this call") == 1


def _cross_attention(attention):
    def forward(x):
        batch, length, width = x.shape
        q = attention.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k = attention.k(x).view(batch, length, 2, 8).transpose(1, 2)
        # Every query sees every key: nothing that MSA can be.
        y = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        return attention.o(y.transpose(1, 2).reshape(batch, length, width))

    return forward


def test_report_of_an_untouched_model_with_a_break_names_every_site():
    report = msa_compile.explain(small("in block", "in block"), tokens(), config=CONFIG)
    assert [site.name for site in report.sites] == NAMES
    assert report.graphs > 1
