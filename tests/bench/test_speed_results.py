"""Spreads, exponents, and the files: synthetic numbers in, text out."""

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.speed.growth import extrapolate, fit_exponent
from benchmarks.speed.measure import Row
from benchmarks.speed.roofline import Roofline
from benchmarks.speed.write import Machine, Results, draw_speed_up, to_markdown, write_results
from msa_compile.bench.memory import available_bytes, peak_above
from msa_compile.bench.spread import Rounds, Spread, extrapolated, spread_of, take_rounds

CPU = torch.device("cpu")
MACHINE = Machine("Some CPU", "cpu", 2, "2.13.0", "0.1.0", "abc")


def row(length, sparse, dense, gate="green, relative error 1.0e-07", **fields):
    base = Row(
        case="prefill", indexer="keys", device="cpu", dtype="fp32", threads=2, heads="16,2,64", block_size=128,
        topk=16, length=length, gate=gate, theory=3.5, flops=1.0, dense_flops=3.5, bytes=1.0, dense_bytes=1.0,
    )  # fmt: skip
    if gate.startswith("RED"):
        return replace(base, **fields)
    times = {"sparse": spread_of([sparse] * 3), "sdpa": spread_of([dense] * 3), "sdpa, oneDNN": spread_of([dense / 2])}
    ratios = {"sdpa": Spread(dense / sparse, 1.0, 9.0, 3), "sdpa, oneDNN": Spread(dense / sparse / 2, 1.0, 9.0, 3)}
    memory = {"sparse": length * 1024, "sdpa": None}
    made = replace(base, seconds=times, ratios=ratios, peak_bytes=memory, roofline_share=0.25)
    return replace(made, **fields)


def results(*rows, machine=MACHINE, dates=("2026-01-31",), models=()):
    return Results(machine, dates, rows, {"fp32, 2": Roofline(2e11, 3e10)}, models)


def test_a_spread_is_quartiles():
    assert spread_of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert spread_of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert extrapolated(7.0).is_extrapolated
    assert not spread_of([7.0]).is_extrapolated


def test_ratios_are_taken_within_a_round():
    # The machine is twice as slow in the second round; the ratio does not see it.
    rounds = Rounds(("a", "b"), ((4.0, 1.0), (8.0, 2.0), (4.4, 1.1)))
    assert rounds.ratio("a", "b").median == pytest.approx(4.0)
    assert rounds.ratio("a", "b").high == pytest.approx(4.0)
    assert rounds.of("b").median == 1.1


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = take_rounds(calls, CPU, seconds=0.0, least=3, most=3)
    assert order in (list("abc"), list("abcabcabc")), "one round where one alone is longer than the time there is"
    assert len(rounds.seconds) == len(order) // 3
    order.clear()
    take_rounds(calls, CPU, seconds=60.0, least=2, most=4)
    assert order == list("abc") * 4


def test_calls_of_a_turn_are_averaged():
    called = []
    started = time.perf_counter()
    rounds = take_rounds({"a": lambda: called.append(time.sleep(0.002))}, CPU, seconds=0.0, least=2, most=2, in_a_row=5)
    assert len(called) in (5, 10)
    assert 0.002 <= rounds.of("a").low <= (time.perf_counter() - started) / len(called)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.37, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent):
    points = [(2.0**n, 3.0 * (2.0**n) ** exponent) for n in range(11, 18)]
    assert fit_exponent(points) == pytest.approx(exponent)


def test_an_exponent_needs_two_lengths_and_leaves_zeros_out():
    assert fit_exponent([]) is None
    assert fit_exponent([(4.0, 1.0), (4.0, 2.0)]) is None
    assert fit_exponent([(2.0, 0.0), (4.0, 4.0), (8.0, 8.0)]) == pytest.approx(1.0)


def test_extrapolation_starts_at_the_longest_that_was_measured():
    assert extrapolate([(100, 1.0), (200, 5.0)], 400, 2) == 20.0
    assert extrapolate([(200, 5.0), (100, 1.0)], 400, 1) == 10.0


def test_the_peak_of_a_call_is_above_what_was_there():
    size = 64 << 20
    held, peak = peak_above(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert held.numel() == size
    if peak is not None:  # where the system tells
        assert 0.8 * size < peak < 1.6 * size
    assert available_bytes(CPU) > size


def test_json_brings_back_what_was_written():
    whole = results(row(1024, 1.0, 2.0), row(2048, 1.0, 2.0, gate="RED: wrong"))
    assert Results.from_json(whole.to_json()) == whole


def test_markdown_has_times_ratios_growth_and_marks():
    far = row(4096, 4.0, 32.0)
    far.seconds["sdpa"], far.ratios["sdpa"] = extrapolated(32.0), extrapolated(8.0)
    text = to_markdown(results(row(1024, 1.0, 2.0), row(2048, 2.0, 8.0), far, row(8192, 0, 0, gate="RED: so")), "p.png")
    lines = {line.split(" | ")[4]: line for line in text.splitlines() if line.startswith("| 16,2,64 | fp32 | 2 | keys")}
    assert "2.00x [1.00, 9.00] | 1.00x [1.00, 9.00]" in lines["1K"]
    assert "1 s | 2 s (sdpa) | 1 s (sdpa, oneDNN)" in lines["1K"]
    assert "1 MiB / -" in lines["1K"]
    assert "~32 s" in lines["4K"]
    assert "~8.00x" in lines["4K"]
    assert "RED: so" in lines["8K"]
    assert "x [" not in lines["8K"]
    assert "| 16,2,64 | fp32 | 2 | sparse | 1K to 4K | 1.00 | 1.00 |" in text
    assert "| 16,2,64 | fp32 | 2 | sdpa | 1K to 2K | 2.00 | - |" in text
    assert "| fp32, 2 | 200 | 30.0 |" in text
    assert "Not run here: CUDA" in text
    assert text.count("Not run.") == 5, "decode, decode_again, select, backward, end_to_end"


def test_files_keep_the_rows_of_earlier_runs_on_the_same_machine(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs the viz extra")
    model = {"model": "m", "layers": 1, "dtype": "float32", "threads": 2, "inner": "eager", "indexer": "keys"}
    model["markdown"] = ["### m"]
    write_results(results(row(1024, 1.0, 2.0), row(2048, 1.0, 2.0), models=(model,)), tmp_path, "cpu")
    paths = write_results(results(row(2048, 1.0, 4.0), dates=("2026-02-01",)), tmp_path, "cpu")
    assert [path.name for path in paths] == ["cpu.json", "cpu.md", "cpu.png"]
    kept = Results.from_json((tmp_path / "cpu.json").read_text())
    assert [(entry.length, entry.ratios["sdpa"].median) for entry in kept.rows] == [(1024, 2.0), (2048, 4.0)]
    assert kept.dates == ("2026-01-31", "2026-02-01")
    assert len(kept.models) == 1
    assert "### m" in (tmp_path / "cpu.md").read_text()
    write_results(results(row(512, 1.0, 2.0), machine=replace(MACHINE, kernels="other")), tmp_path, "cpu")
    assert len(json.loads((tmp_path / "cpu.json").read_text())["rows"]) == 1, "other kernels: nothing is carried over"


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert not draw_speed_up([row(8, 0, 0, gate="RED: so")], tmp_path / "x.png", "Some CPU")
    assert not (tmp_path / "x.png").exists()


def test_the_command_runs_the_cases_named(tmp_path, capsys):
    arguments = ["--quick", "--cases", "decode", "--dtypes", "fp32", "--lengths", "48", "--threads", "1"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    kept = Results.from_json((tmp_path / "cpu.json").read_text())
    assert {(entry.case, entry.length, entry.heads) for entry in kept.rows} == {("decode", 48, "4,2,16")}
    assert torch.get_num_threads() == 1
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "prefil"], "'prefil' is none of prefill"),
        (["--dtypes", "fp8"], "'fp8' is none of fp32"),
        (["--lengths", "4K"], "no whole numbers"),
        (["--heads", "16,3,64"], "Hq a multiple of Hkv"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err
