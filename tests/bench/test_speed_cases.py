"""The kernel benchmarks: the registry, the gate against wrong kernels, what is counted. No time is asserted."""

import contextlib

import pytest
import torch

from benchmarks.speed import gate
from benchmarks.speed.baselines import decode_baselines, onednn_float32, prefill_baselines
from benchmarks.speed.cases import CASES, plain_selection, usable
from benchmarks.speed.gate import Ops, Verdict
from benchmarks.speed.measure import Limits, run_case
from benchmarks.speed.roofline import Roofline, measure_roofline
from benchmarks.speed.setting import Setting, Work, attended_keys, dense_prefill, sparse_decode, sparse_prefill
from msa_compile import attention
from msa_compile.kernels import select_blocks

CPU = torch.device("cpu")
SETTING = Setting(4, 2, 16, "fp32", CPU, 1, block_size=8, topk=3)
ROOF = Roofline(1e11, 1e10)
QUICK = Limits(seconds=0.01, dense_seconds=60, sparse_seconds=60)


def run(name, lengths=(40, 64), **options):
    options = {"roofline": ROOF, "limits": QUICK, "say": lambda text: None, **options}
    return run_case(CASES[name], options.pop("setting", SETTING), lengths, **options)


def drop_a_block(*args, **kwargs):
    ids = select_blocks(*args, **kwargs).clone()
    ids[..., 0] = ids[..., 1].where(ids[..., 1] >= 0, ids[..., 0])
    return ids


def forget_local(*args, **kwargs):
    ids = select_blocks(*args, **kwargs)
    return (ids - 1).clamp(min=0)


def sees_the_future(q, k, v, *, is_causal, block_size, topk_blocks, **given):
    out = attention(q, k, v, is_causal=is_causal, block_size=block_size, topk_blocks=topk_blocks, **given)
    return out + 1e-3 * v.mean()


def not_a_number(*args, **kwargs):
    out = attention(*args, **kwargs).clone()
    out[..., -1, 0] = torch.nan
    return out


def half_the_budget(q, k, v, *, is_causal, block_size, topk_blocks, **given):
    topk = max(1, topk_blocks - 1)
    return attention(q, k, v, is_causal=is_causal, block_size=block_size, topk_blocks=topk, **given)


def test_the_registry_names_what_make_bench_offers():
    assert set(CASES) == {"prefill", "decode", "decode_again", "select", "backward"}
    for name, case in CASES.items():
        assert case.name == name
        assert case.lengths == tuple(sorted(case.lengths))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_case_is_green_and_has_times_and_ratios(name, dtype):
    setting = Setting(4, 2, 16, dtype, CPU, 1, block_size=8, topk=3)
    rows = run(name, setting=setting)
    assert len(rows) == 2 * len(CASES[name].indexers)
    for row in rows:
        assert row.is_green, row.gate
        assert list(row.seconds)[:2] == ["sparse", row.default_baseline]
        assert row.default_baseline == ("plain PyTorch" if name == "select" else "sdpa")
        assert set(row.ratios) == set(row.seconds) - {"sparse"}
        assert row.best_baseline in row.ratios
        assert row.roofline_share > 0


@pytest.mark.parametrize(
    "ops",
    [Ops(select=drop_a_block), Ops(select=forget_local), Ops(whole=sees_the_future), Ops(whole=not_a_number),
     Ops(whole=half_the_budget)],
    ids=["drops a block", "forgets the local block", "sees the future", "NaN", "half the budget"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_wrong_kernel_turns_the_gate_red_and_no_ratio_is_there(name, ops):
    for row in run(name, ops=ops):
        assert row.gate.startswith("RED")
        assert not row.ratios
        assert not row.seconds
        assert row.best_baseline is None


def test_wrong_gradients_turn_the_gate_red():
    def wrong(q, k, v, **kwargs):
        return attention(q, k, v.detach() + 0.9 * (v - v.detach()), **kwargs)

    (row, _) = run("backward", ops=Ops(whole=wrong))
    assert "gradient of v" in row.gate


def test_a_kernel_that_is_wrong_only_at_length_is_caught_there():
    def wrong_from_60(q, k, v, **kwargs):
        out = attention(q, k, v, **kwargs)
        return out if k.shape[2] < 60 else 1.5 * out

    short, long = run("prefill", ops=Ops(whole=wrong_from_60))
    assert short.is_green
    assert long.gate.startswith("RED")


def test_what_would_take_too_long_is_extrapolated_and_marked():
    limits = Limits(seconds=0.01, dense_seconds=0.0, sparse_seconds=60)
    first, second = run("prefill", limits=limits)
    assert first.seconds["sdpa"].runs > 0
    assert second.seconds["sdpa"].is_extrapolated
    assert second.seconds["sdpa"].median == pytest.approx(first.seconds["sdpa"].median * (64 / 40) ** 2)
    assert second.ratios["sdpa"].is_extrapolated
    assert not second.seconds["sparse"].is_extrapolated


def test_a_sparse_call_that_would_take_too_long_is_left_out():
    rows = run("prefill", limits=Limits(seconds=0.01, sparse_seconds=0.0))
    assert [row.length for row in rows] == [40]


def test_attended_keys_are_those_of_the_queries_one_by_one():
    for length in (1, 7, 8, 9, 40, 61):
        expected = sum(p % 8 + 1 + min(2, p // 8) * 8 for p in range(length))
        assert attended_keys(length, 8, 3) == expected


def test_flops_approach_those_of_the_paper():
    setting = Setting(64, 4, 128, "bf16", CPU, 1)
    ratio = dense_prefill(setting, 2**20).flops / sparse_prefill(setting, 2**20).flops
    assert ratio == pytest.approx(28.44, rel=0.005)  # which charges early queries the full budget


def test_decode_reads_one_index_key_or_all_keys():
    setting = Setting(16, 4, 128, "bf16", CPU, 1, block_size=128, topk=16)
    keys, learned = (sparse_decode(setting, 2**17, heads).bytes for heads in (4, 1))
    budget = 2 * 4 * 2048 * 128 * 2
    assert keys == 4 * 2**17 * 128 * 2 + budget
    assert learned == 2**17 * 128 * 2 + budget


def test_baselines_agree_with_dense_attention_and_the_flag_is_put_back():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    assert {"sdpa", "sdpa, oneDNN"} >= set(usable(SETTING, prefill_baselines(SETTING))) >= {"sdpa"}
    assert set(usable(SETTING, decode_baselines(SETTING), decode=True)) == {"sdpa", "grouped bmm", "grouped sdpa"}
    with contextlib.suppress(RuntimeError), onednn_float32():
        assert settings.fp32_precision == "bf16"
        raise RuntimeError("what it is put back after, too")
    assert settings.fp32_precision == before


def test_a_baseline_that_is_wrong_or_cannot_run_is_left_out():
    def cannot(q, k, v):
        raise RuntimeError("not here")

    offered = {**decode_baselines(SETTING), "wrong": lambda q, k, v: 2 * q, "cannot": cannot}
    assert set(usable(SETTING, offered, decode=True)) == {"sdpa", "grouped bmm", "grouped sdpa"}


def test_plain_selection_selects_what_the_op_selects():
    operands = gate.make_operands(heads=(4, 2, 16), length=61, queries=61, dtype=torch.float32, device=CPU)
    budget = {"block_size": 8, "topk": 3}
    ids = select_blocks(operands.index_query, operands.index_key, **budget)
    plain = plain_selection(operands.index_query, operands.index_key, **budget)
    for row in range(24, 61):  # from here on there are three blocks
        assert torch.equal(ids[:, :, row].sort(-1).values, plain[:, :, row].sort(-1).values.int())


def test_the_roofline_is_the_slower_of_the_two_ceilings():
    assert ROOF.seconds(Work(1e11, 1e10)) == 1
    assert ROOF.seconds(Work(5e11, 1e10)) == 5
    assert ROOF.seconds(Work(0, 3e10)) == 3
    measured = measure_roofline(torch.float32, CPU, size=32, megabytes=1)
    assert measured.flops_per_second > 0
    assert measured.bytes_per_second > 0


def test_a_verdict_names_its_complaints():
    assert str(Verdict((), 1e-7)) == "green, relative error 1.0e-07"
    assert str(Verdict()) == "green"
    assert str(Verdict(("this", "that"))) == "RED: this; that"
