"""`fit_budget` finds the fewest blocks that keep the bar, measures what it returns, and leaves the model as it was."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from runtime.tiny import CONFIG, small, sparse, tokens

import msa_compile
from msa_compile import MSAConfig, errors
from msa_compile.evaluate.budget import Layer, Search, check_candidates, config_for, keys_read
from msa_compile.records import Site

LADDER = (1, 2, 4, 8)
DATA = [tokens(61, seed=seed) for seed in range(2)]


def share(topk):
    return 1.0 if topk is None else topk / 16


def search(costs):
    """A search where layers cost what a table says, and costs add up."""
    layers = [Layer(str(index), 1 / len(costs)) for index in range(len(costs))]
    asked = []

    def measure(budgets):
        asked.append(dict(budgets))
        return sum(costs[int(name)][topk] for name, topk in budgets.items() if topk is not None)

    return Search(layers, LADDER, measure, share), asked


def best_of_all(costs, bar):
    """The fewest keys of every setting there is."""
    choices = itertools.product((None, *LADDER), repeat=len(costs))
    return min(
        sum(share(topk) for topk in choice) / len(costs)
        for choice in choices
        if sum(costs[index][topk] for index, topk in enumerate(choice) if topk is not None) <= bar
    )


@pytest.mark.parametrize("seed", range(8))
def test_where_costs_add_up_the_result_is_near_the_best_of_all_settings(seed):
    generator = torch.Generator().manual_seed(seed)
    # Convex in the budget, as quality is: the first blocks are worth the most.
    weights = torch.rand(4, generator=generator).tolist()
    costs = [{topk: weight * (1 / topk - 1 / 16) for topk in LADDER} for weight in weights]
    bar = 0.35 * sum(weights)
    found = search(costs)[0].run(bar)
    assert found.nll_increase <= bar
    # The chain cannot take half a step: one step of one layer is what it may be away.
    assert found.keys_read <= best_of_all(costs, bar) + 0.5 / 4


def test_a_layer_that_cannot_stand_it_stays_dense():
    costs = [dict.fromkeys(LADDER, 9.0), *[{topk: 0.001 / topk for topk in LADDER}] * 3]
    task, asked = search(costs)
    found = task.run(0.01)
    assert found.topk_blocks == (None, 1, 1, 1)
    alone = [budgets for budgets in asked if budgets["0"] is not None and budgets["1"] is None]
    assert len(alone) == 1, "what fails with 8 blocks is not tried with fewer"


def test_nothing_fits_but_dense():
    assert search([dict.fromkeys(LADDER, 1.0)] * 2)[0].run(0.5) is None


def test_one_budget_for_all_wins_where_layers_only_work_together():
    def measure(budgets):
        return 0.0 if set(budgets.values()) <= {2, None, 4, 8} and len(set(budgets.values())) == 1 else 1.0

    found = Search([Layer("a", 0.5), Layer("b", 0.5)], LADDER, measure, share).run(0.5)
    assert (found.name, found.topk_blocks) == ("all 2", (2, 2))


def test_noise_below_zero_buys_nothing():
    costs = [{1: -5.0, 2: -5.0, 4: -5.0, 8: -5.0}, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}]
    task, _ = search(costs)
    task.run(2.0)
    steps = [[*budgets.values()] for budgets in task.chain()]
    assert steps == [[None, None], [1, None], [1, 1]]


def test_keys_read_equals_a_count_of_every_key():
    for topk, block_size, length in ((1, 4, 13), (3, 4, 30), (2, 8, 8), (50, 4, 30)):
        read = sum(
            1 for query in range(length) for key in range(query + 1) if query // block_size - key // block_size < topk
        )
        assert keys_read(topk, block_size, length) == pytest.approx(read / (length * (length + 1) / 2))
    assert keys_read(None, 4, 30) == 1.0


def test_the_config_says_the_budget_of_every_site():
    def site(name):
        return Site(name, "", "sdpa", 8, 2, 8, "causal", "sparse", None, "", "keys")

    sites = [site(name) for name in ("a.0", "a.1", "a.1:1", "a.2", "a[3]")]
    base = MSAConfig(topk_blocks=16, exclude="lm.*", budgets={"*": 7})
    made = config_for(base, {"a.0": 4, "a.1": None, "a.2": 4, "a[3]": 8}, sites)
    assert made.topk_blocks == 4
    assert made.exclude == ("lm.*", "a.1", "a.1:1")
    assert [made.for_site(name).topk_blocks for name in ("a.0", "a.2", "a[3]")] == [4, 4, 8]
    assert [made.matches(site.name) for site in sites] == [True, False, False, True, True]


@pytest.fixture(scope="module")
def model():
    return sparse(small(), MSAConfig(block_size=4, topk_blocks=2, dense_below=0))


@pytest.fixture(scope="module")
def fit(model):
    return msa_compile.fit_budget(model, DATA, max_nll_increase=0.003, progress=False)


def test_what_is_found_keeps_the_bar_when_it_is_applied(fit):
    assert fit.nll_increase <= fit.max_nll_increase == 0.003
    assert min(layer.keys_read for layer in fit.layers) < 1
    applied = sparse(small(), fit.config)
    found = msa_compile.evaluate(applied, DATA, progress=False)
    assert found.total.tokens == fit.tokens
    assert found.total.nll_change == pytest.approx(fit.nll_increase, abs=1e-6)
    sites = {site.name: site for site in msa_compile.explain(applied).sites}
    for layer in fit.layers:
        assert (sites[layer.name].decision == "sparse") == (layer.topk_blocks is not None)


def test_every_point_of_the_frontier_is_what_evaluate_measures(fit):
    """One budget for all, and the increase of one layer alone, measured once more on a model made for it."""
    point = next(point for point in fit.frontier if point.name == "all 1")
    one = sparse(small(), MSAConfig(block_size=4, topk_blocks=1, dense_below=0))
    found = msa_compile.evaluate(one, DATA, progress=False).total
    assert found.nll_change == pytest.approx(point.nll_increase, abs=1e-6)
    assert abs(point.nll_increase) > 1e-4
    layer = fit.layers[1]
    topk, increase = layer.alone[-1]
    alone = MSAConfig(block_size=4, topk_blocks=64, dense_below=0, budgets={layer.name: topk})
    found = msa_compile.evaluate(sparse(small(), alone), DATA, progress=False).total
    assert found.nll_change == pytest.approx(increase, abs=1e-6)


def test_the_model_is_left_as_it_was(model, fit):
    ids = DATA[0]
    want, door, config = model(ids), model.forward, model.forward.config
    backend = door.backend
    msa_compile.fit_budget(model, iter(DATA), max_nll_increase=0.5, candidates=[2], progress=False)
    assert model.forward is door
    assert door.backend is backend
    assert door.config == config
    assert torch.equal(model(ids), want)
    assert len(backend.records) == 1


def test_text_and_json_hold_the_layers_and_the_frontier(fit, tmp_path):
    text = str(fit)
    assert all(layer.name in text for layer in fit.layers)
    assert text.count("all ") >= 4
    assert json.loads(json.dumps(fit.to_dict()))["nll_increase"] == fit.nll_increase
    pytest.importorskip("matplotlib", reason="a picture needs the viz extra")
    fit.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 5000


def test_calls_that_ran_dense_meanwhile_are_said(model, fit, monkeypatch):
    assert fit.notes == ()
    count = itertools.count()
    monkeypatch.setattr("msa_compile.quality.count_dense_calls", lambda *_: {"somewhere": next(count)})
    found = msa_compile.fit_budget(model, DATA, max_nll_increase=1.0, candidates=[2], progress=False)
    assert "WARNING: 1 calls of sparse sites ran DENSE" in str(found)


def test_a_bar_that_nothing_keeps_shows_the_frontier_and_changes_nothing(model):
    door, ids = model.forward, DATA[0]
    with torch.no_grad(), msa_compile.dense(model):
        best = model(ids).argmax(-1)
    # What the dense model would say itself: no other model is as good at that.
    labels = torch.cat([ids[:, :1], best[:, :-1]], 1)
    with pytest.raises(errors.BudgetNotMetError) as caught:
        msa_compile.fit_budget(
            model, [{"ids": ids, "labels": labels}], max_nll_increase=0.0, candidates=[1], progress=False
        )
    assert "no budget keeps NLL within +0.0000 nats a token, in no layer" in str(caught.value)
    assert "all 1" in str(caught.value)
    assert "give larger candidates than [1]" in str(caught.value)
    assert model.forward is door


@pytest.mark.parametrize("bar", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_bar_that_is_no_number_is_refused(model, bar):
    with pytest.raises(errors.EvaluateArgumentError, match="max_nll_increase is"):
        msa_compile.fit_budget(model, DATA, max_nll_increase=bar)


def test_candidates_that_decide_nothing_are_refused():
    config = MSAConfig(block_size=4, topk_blocks=4, local_blocks=2, sink_blocks=1)
    assert check_candidates(None, config, 61) == (4, 8)
    assert check_candidates([8, 3, 3, 99], config, 61) == (3, 8)
    for candidates in ([2], [0], [2.5], ["4"]):
        with pytest.raises(errors.EvaluateArgumentError, match="whole numbers from 3"):
            check_candidates(candidates, config, 61)
    for candidates, longest in ((None, 12), ([16, 99], 61)):
        with pytest.raises(errors.EvaluateArgumentError, match=f"the longest batch has {longest} tokens"):
            check_candidates(candidates, config, longest)


def test_no_data_and_ctrl_c_leave_the_model_sparse(model, monkeypatch):
    door = model.forward
    with pytest.raises(errors.EmptyDataError):
        msa_compile.fit_budget(model, [], max_nll_increase=0.1)
    tried = Search.try_all
    count = []

    def stop(self, *given):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return tried(self, *given)

    monkeypatch.setattr(Search, "try_all", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        msa_compile.fit_budget(model, DATA, max_nll_increase=0.1, progress=False)
    assert "all 8" in caught.value.__notes__[0]
    assert model.forward is door
    assert model(DATA[0]).shape[1] == 61


def test_a_model_whose_sites_are_not_known_yet_can_be_fitted():
    model = msa_compile.sparsify(small(), replace(CONFIG, topk_blocks=2), inner="eager")
    fit = msa_compile.fit_budget(model, DATA, max_nll_increase=1.0, progress=False)
    assert fit.config.topk_blocks == 1
    assert [layer.name for layer in fit.layers] == ["layers.0.attn", "layers.1.attn"]
    assert msa_compile.explain(model).dense_calls == 0
