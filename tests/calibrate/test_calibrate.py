"""`calibrate` on whole models: branches learn, the base does not, and what is not good enough is not used."""

import copy
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from runtime.tiny import llama, small, sparse, tokens
from torch import nn

import msa_compile
from msa_compile import MSAConfig, errors
from msa_compile.calibrate import train
from msa_compile.calibrate.metrics import SiteMetrics
from msa_compile.calibrate.result import Bars, SiteCalibration
from msa_compile.indexer import IndexBranch

AUTO = MSAConfig(block_size=4, topk_blocks=3, dense_below=0)
BATCHES = [tokens(48, seed=seed) for seed in range(6)]


def sharp(model):
    """Attention that chooses: fresh weights score all keys alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def new(make=small, config=AUTO):
    return sparse(sharp(make()), config)


def calibrated(model, data=BATCHES, **options):
    bars = {"min_mass_ratio": 0.0, "min_found": 0.0}
    given = {"steps": 8, "learning_rate": 1e-2, "progress": False, **bars, **options}
    return msa_compile.calibrate(model, data, **given)


def branches_of(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, IndexBranch)}


@torch.no_grad()
def logits(model, ids=BATCHES[0]):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("make", "indexer"),
    [
        pytest.param(small, "auto", marks=slow),
        pytest.param(llama, "auto", marks=slow),
        pytest.param(small, "learned", marks=slow),
        pytest.param(llama, "learned", marks=slow),
    ],
)
def test_branches_learn_what_attention_looks_at_and_the_base_stays_as_it_is(make, indexer):
    model = new(make, MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer=indexer)).train()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if ".indexer." not in name}
    # Of so few random tokens more is learned by heart at a higher rate.
    result = calibrated(model, steps=30, learning_rate=1e-3)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert ".indexer." in name or torch.equal(parameter, base.pop(name))
    assert not base
    assert model.training
    for site in result.sites:
        assert site.decision == "learned"
        assert site.metrics.kl < site.kl_before
        assert site.metrics.oracle_mass >= site.metrics.mass > 0
    first, last = result.mass_history[0], result.mass_history[-1]
    assert (first[0], last[0], len(result.history)) == (0, 30, 30)
    model.eval()
    logits(model)
    report = msa_compile.explain(model)
    assert {site.indexer for site in report.sites} == {"learned"}
    assert "calibrated in 30 steps" in str(report)
    assert result.dense_nll != result.sparse_nll


@slow
def test_branches_start_near_the_layers_own_queries_and_keys():
    learned = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned")
    starts = []
    for gain in (0.0, 1e-6):  # norms that were moved say that the branch was trained
        model = new(llama, learned)
        for branch in branches_of(model).values():
            nn.init.constant_(branch.q_norm.weight, gain)
        starts.append([site.kl_before for site in calibrated(model, steps=1, stage="align").sites])
    assert all(own < 0.6 * random for own, random in zip(*starts, strict=True))


def test_the_table_the_picture_and_plain_values_have_every_site(tmp_path):
    result = calibrated(new(), steps=4)
    assert all(site.metrics.kl < site.kl_before for site in result.sites)
    assert all(name in str(result) for name in ("layers.0.attn", "layers.1.attn", "NLL", "block recall"))
    assert json.loads(json.dumps(result.to_dict()))["steps"] == 4
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("bar", ["min_mass_ratio", pytest.param("min_found", marks=slow)])
@pytest.mark.parametrize(
    ("fallback", "indexer"),
    [pytest.param("keys", "auto", marks=slow), pytest.param("keys", "learned", marks=slow), ("dense", "auto")],
)
def test_a_site_below_a_bar_falls_back(fallback, indexer, bar):
    config = MSAConfig(block_size=4, topk_blocks=3, dense_below=0, fallback=fallback, indexer=indexer)
    model = new(config=config)
    with mock.patch.object(SiteMetrics, "found_ratio", 0.99):
        result = calibrated(model, steps=2, **{bar: 1.0})
    assert all(site.metrics.decisive > 0 for site in result.sites)
    assert {site.decision for site in result.sites} == {fallback}
    assert {site.indexer for site in msa_compile.explain(model).sites} == {"keys" if fallback == "keys" else None}
    expected = new() if fallback == "keys" else sharp(small())
    assert torch.equal(logits(model), logits(expected))
    report = msa_compile.explain(model)
    assert report.dense_calls == 0
    if fallback == "dense":
        assert {site.reason for site in report.sites} == {msa_compile.Reason.EXCLUDED}


@slow
def test_decisions_and_metrics_are_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    model = new(config=MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned"))
    ratios = sorted(site.metrics.mass_ratio for site in calibrated(model).sites)
    result = calibrated(model, steps=1, learning_rate=1e-9, min_mass_ratio=sum(ratios) / 2)
    assert sorted(site.decision for site in result.sites) == ["keys", "learned"]
    msa_compile.save(model, tmp_path)
    other = msa_compile.load(new(config=msa_compile.explain(model).config), tmp_path)
    assert torch.allclose(logits(other), logits(model), atol=1e-5)
    found, said = msa_compile.explain(other), msa_compile.explain(model)
    assert (found.calibration, found.calibrated) == (said.calibration, said.calibrated)
    assert sorted(site.indexer for site in found.sites) == ["keys", "learned"]


def test_facts_that_are_lost_fail_a_bar_where_mass_does_not():
    metrics = SiteMetrics(0.1, 0.9, 0.98, 1.0, 0.98, 0.1, queries=10_000, decisive=200, found=0.9)
    assert not Bars(0.95, 0.98).are_met(metrics)
    assert Bars(0.95, 0.98).are_met(replace(metrics, keys_found=0.91)), "a fallback that finds as little is none"
    assert Bars(0.95, 0.9).are_met(metrics)
    assert not Bars(0.99, 0.9).are_met(metrics)


def test_metrics_of_a_version_that_did_not_count_what_is_found_are_read():
    said = SiteCalibration("layer", "learned", 1.0, SiteMetrics(0.1, 0.9, 0.98, 1.0, 0.98, 0.1, 100)).to_dict()
    for name in ("decisive", "found", "keys_found"):
        del said["metrics"][name]
    read = SiteCalibration.from_dict(said)
    assert read.metrics.decisive == 0
    assert "finds" not in str(read)


def trained(make):
    """A model whose branches are what they are: norms that were moved say that they need no start."""
    torch.manual_seed(5)
    model = new(make, MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer="learned"))
    for branch in branches_of(model).values():
        nn.init.constant_(branch.q_norm.weight, 0.1)
    return model


@slow
def test_padding_teaches_nothing():
    mask = (torch.arange(48) >= torch.tensor([[0], [9]])).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    histories = []
    for noise in (0, 1):
        other = torch.where(mask == 1, BATCHES[0], (BATCHES[0] + noise - 3) % 47 + 3)
        batch = {"input_ids": other, "attention_mask": mask, "position_ids": places}
        histories.append(calibrated(trained(llama), [batch, batch], steps=2).history)
    torch.testing.assert_close(histories[0], histories[1], rtol=1e-5, atol=1e-7)
    row = BATCHES[0][1:, 9:]
    alone = [calibrated(trained(llama), [part, part], steps=1).history[0] for part in (BATCHES[0][:1], row)]
    # The first four queries have their own block alone, and nothing to learn from.
    for site, found in enumerate(histories[0][0]):
        assert found == pytest.approx((44 * alone[0][site] + 35 * alone[1][site]) / 79, rel=1e-4)


@slow
def test_a_loop_of_the_users_own_teaches_the_same():
    def loop(model):
        for ids in BATCHES:
            model(ids)

    by_batches, by_loop = new(), new()
    expected, found = calibrated(by_batches), calibrated(by_loop, loop)
    assert found.history == expected.history
    assert torch.equal(logits(by_loop), logits(by_batches))
    assert found.dense_nll is None


@slow
def test_a_loop_that_generates_teaches_and_its_old_index_keys_do_not():
    def loop(model):
        model.generate(BATCHES[0], max_new_tokens=4, do_sample=False)

    result = calibrated(new(llama), loop, steps=3)
    assert len(result.history) == 3
    assert all(torch.tensor(row).isfinite().all() for row in result.history)


@slow
def test_rows_are_cut_to_the_longest_that_is_wanted():
    cut = [batch[:, :32] for batch in BATCHES]
    assert calibrated(new(), max_length=32).history == calibrated(new(), cut).history


@slow
def test_the_sparse_stage_compares_on_selected_blocks_alone():
    everything = MSAConfig(block_size=4, topk_blocks=11, dense_below=0)
    ids = [batch[:, :44] for batch in BATCHES]  # every block is selected
    with mock.patch.object(train.Run, "_check_long_enough"):
        align, selected = (calibrated(new(config=everything), ids, stage=stage) for stage in ("align", "sparse"))
    torch.testing.assert_close(torch.tensor(selected.history), torch.tensor(align.history), rtol=1e-3, atol=1e-5)
    align, selected = (calibrated(new(), stage=stage).history for stage in ("align", "sparse"))
    assert sum(selected[0]) != pytest.approx(sum(align[0]), rel=0.01)


def test_ctrl_c_ends_the_training_and_keeps_what_it_did():
    def interrupted():
        yield from BATCHES
        raise KeyboardInterrupt

    class Data:
        def __iter__(self):
            return interrupted()

    model = new()
    result = calibrated(model, Data(), steps=50)
    assert result.steps == 4
    assert any("Ctrl-C after 4 of 50" in note for note in result.notes)
    assert {site.decision for site in result.sites} == {"learned"}
    assert not any(parameter.grad is not None for parameter in model.parameters())


def broken_at(place):
    """Batches whose token 49 has no finite embedding."""
    data = [batch.clamp(max=48) for batch in BATCHES]
    data[place][0, 20] = 49
    return data


@slow
@pytest.mark.parametrize("indexer", ["auto", "learned"])
def test_nan_is_an_error_that_leaves_the_model_as_it_was(indexer):
    model = new(config=MSAConfig(block_size=4, topk_blocks=3, dense_below=0, indexer=indexer))
    with torch.no_grad():
        model.embed.weight[49] = torch.nan
    ids = BATCHES[0].clamp(max=48)
    before, names, expected = copy.deepcopy(model.state_dict()), list(model.state_dict()), logits(model, ids)
    with pytest.raises(errors.NonFiniteError, match="NaN"):
        calibrated(model, broken_at(3))
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items() if "embed" not in name)
    assert torch.equal(logits(model, ids), expected)
    assert calibrated(model, [ids, ids]).steps == 8


@pytest.fixture(scope="module")
def shared():
    """A model that refused data leaves as it was."""
    return new(llama)


def padding_only():
    return {"input_ids": BATCHES[0], "attention_mask": torch.zeros_like(BATCHES[0])}


@pytest.mark.parametrize(
    ("data", "error", "why"),
    [
        ([], errors.EmptyDataError, "no batch"),
        pytest.param(
            [BATCHES[0], BATCHES[0], padding_only()], errors.EmptyDataError, "batch 2 .* no padding", marks=slow
        ),
        pytest.param((batch for batch in BATCHES), errors.EmptyDataError, "ended after 4 batches", marks=slow),
        ([batch[:, :12] for batch in BATCHES], errors.EmptyDataError, "more than 12 tokens"),
        (BATCHES[0], errors.BatchError, "for one"),
        (lambda model: None, errors.EmptyDataError, "without a call"),
        (["text", "text"], errors.BatchError, "a batch is a str"),
    ],
)
def test_data_that_will_not_do_is_refused(data, error, why, shared):
    model = shared
    names = list(model.state_dict())
    with pytest.raises(error, match=why):
        calibrated(model, data)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"stage": "warm"}, "stage is 'warm'"),
        ({"min_mass_ratio": 2}, "min_mass_ratio is 2"),
        ({"min_found": -1}, "min_found is -1"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_arguments_outside_their_range_are_refused(options, why):
    with pytest.raises(errors.CalibrateArgumentError, match=why):
        calibrated(new(), **options)


@slow
def test_models_with_nothing_to_train_are_refused():
    with pytest.raises(errors.CalibrateArgumentError, match='indexer="keys"'):
        calibrated(new(config=MSAConfig(block_size=4, topk_blocks=3, indexer="keys")))
    with pytest.raises(errors.NotSparseError):
        calibrated(small())
    taken = sharp(small())
    for layer in taken.layers:
        layer.attn.indexer = nn.Identity()
    with pytest.raises(errors.NothingToCalibrateError, match=r'layers\.1\.attn: .* named "indexer"'):
        calibrated(sparse(taken, AUTO))
