"""The break-even: what is concluded from times, and how it is kept. No test reads a clock."""

import json
import logging
import threading
from dataclasses import replace

import pytest
import torch

from msa_compile.kernels import break_even as module
from msa_compile.kernels.break_even import (
    BreakEven,
    ShapeClass,
    Step,
    judge,
    lengths_to_time,
    longest_dense,
    take_steps,
)
from msa_compile.kernels.cache_dir import CACHE_VARIABLE

SHAPE = ShapeClass(torch.device("cpu"), torch.float32, 4, 2, 8, block_size=4, topk=3)


def step(length, ratio):
    """A step at which sparse takes so many times the time of dense."""
    return Step(length, 1.0, ratio)


WON = [step(64, 0.5), step(96, 0.5)]
WIDE = replace(SHAPE, block_size=16, topk=4)  # a budget of 64


class Machine:
    """Times of a model of a machine, and the clock that they move."""

    def __init__(self, sparse, dense=lambda n: 1e-7 * n**2):
        self.now, self.sparse, self.dense = 0.0, sparse, dense

    def __call__(self, length):
        self.now += self.sparse(length) + self.dense(length)
        return Step(length, self.dense(length), self.sparse(length))

    def steps(self, budget, limit=2.5):
        return take_steps(budget, lengths_to_time(budget), self, clock=lambda: self.now, limit=limit)


def test_break_even_is_the_shortest_length_from_which_all_are_won():
    steps = [step(16, 0.1), step(64, 3), step(96, 0.9), step(128, 1.2), step(192, 1.0), step(256, 0.5)]
    assert judge(WIDE, steps, WON) == BreakEven(192, "measured", "sparse is as fast from 192 keys on")
    assert judge(WIDE, WON, steps).keys == 192, "decode has to be won too"


def test_a_length_below_the_budget_is_never_the_break_even():
    assert judge(WIDE, [step(16, 0.1), step(32, 0.1), step(64, 0.1)], WON).keys == 64


def test_what_was_not_reached_is_extrapolated_and_says_so():
    found = judge(WIDE, [step(64, 4), step(128, 2)], WON)
    assert (found.keys, found.origin) == (256, "extrapolated")
    assert "takes 2.00x the time in prefill at 128 keys" in found.detail
    assert "decode" not in found.detail


def test_from_below_the_budget_it_goes_the_way_of_the_flops():
    # Hq = 4, Hkv = 2: sparse does 1.25 times the FLOPs of dense up to the budget, and at length N beyond
    # 0.25 + share * (2 - share) times, share = 64 / N. As slow for its FLOPs as dense where the ratio is 1.25.
    found = judge(WIDE, [step(16, 9.0), step(32, 1.25)], WON)
    assert found.origin == "extrapolated"
    share = 64 / found.keys
    assert 0.25 + share * (2 - share) == pytest.approx(1, abs=0.02)
    assert judge(WIDE, [step(32, 6.0)], WON).origin == "bound", "a quarter of the FLOPs at best, at a fifth of the rate"


@pytest.mark.parametrize("steps", [[step(64, 30)], [step(64, 3), step(128, 3)], [step(64, 3), step(128, 2.99)]])
def test_where_sparse_comes_no_nearer_the_bound_is_taken(steps):
    found = judge(WIDE, steps, WON)
    assert (found.keys, found.origin) == (longest_dense(64), "bound")
    assert judge(WIDE, WON, steps).origin == "bound"
    assert longest_dense(64) == 32768
    assert longest_dense(4096) == 16 * 4096


def test_steps_end_when_two_in_a_row_are_won():
    machine = Machine(sparse=lambda n: 3e-4 * n)  # as fast from 3000 keys on
    steps = machine.steps(2048, limit=1e9)
    assert [entry.length for entry in steps] == [128, 256, 512, 1024, 2048, 3072, 4096]
    assert judge(replace(SHAPE, block_size=128, topk=16), steps, [step(2048, 0.1)]).keys == 3072


def test_steps_keep_to_the_time_that_there_is():
    machine = Machine(sparse=lambda n: 7e-3 * n, dense=lambda n: 1e-8 * n**2)
    steps = machine.steps(2048)
    assert machine.now < 2.8
    assert [entry.length for entry in steps] == [128]


def test_more_time_never_gives_a_step_less():
    counts = [len(Machine(sparse=lambda n: 1e-3 * n).steps(512, limit)) for limit in (0.5, 1, 4, 16, 64)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_it_is_measured_once_and_read_from_disk_then(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "made"))
    calls = []
    monkeypatch.setattr(module, "measure", lambda shape: calls.append(shape) or BreakEven(99, "measured", "so"))
    assert module.known_break_even(SHAPE) is None
    with caplog.at_level(logging.INFO, "msa_compile"):
        assert module.break_even(SHAPE).keys == 99
    assert "measuring from which length" in caplog.text
    assert "measured in" in caplog.text
    module.forget()
    assert module.break_even(SHAPE) == module.known_break_even(SHAPE) == BreakEven(99, "measured", "so")
    assert calls == [SHAPE]
    (file,) = (tmp_path / "made" / "break_even").iterdir()
    assert json.loads(file.read_text())["key"]["heads"] == [4, 2, 8]


def test_another_shape_dtype_thread_count_or_torch_is_another_number(monkeypatch):
    keys = [module._key(SHAPE), module._key(replace(SHAPE, dtype=torch.bfloat16)), module._key(replace(SHAPE, topk=4))]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.append(module._key(SHAPE))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.append(module._key(SHAPE))
    monkeypatch.setattr(module, "kernels_version", lambda device_type: "other")
    keys.append(module._key(SHAPE))
    assert len({module._path(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"key": {}}', '{"key": 1, "value": 2}', "null"],
    ids=["empty", "cut", "list", "no", "1", "0"],
)
def test_a_broken_file_is_ignored_with_a_warning_and_replaced(text, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(module, "measure", lambda shape: BreakEven(99, "measured", "so"))
    path = module._path(module._key(SHAPE))
    path.parent.mkdir()
    path.write_text(text)
    assert module.break_even(SHAPE).keys == 99
    assert "is ignored" in caplog.text
    assert json.loads(path.read_text())["value"]["keys"] == 99


def test_a_number_below_the_budget_is_not_believed(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    module._write(module._key(SHAPE), BreakEven(3, "measured", ""))
    assert module.known_break_even(SHAPE) is None
    assert "fewer than the budget" in caplog.text


def test_a_folder_that_cannot_be_written_is_only_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert module.break_even(SHAPE).keys == SHAPE.budget
    assert "could not be kept" in caplog.text
    assert module.known_break_even(SHAPE) is not None


def test_a_measurement_that_fails_leaves_the_budget_and_is_not_kept(monkeypatch, tmp_path, caplog):
    def fail(shape):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(module, "measure", fail)
    found = module.break_even(SHAPE)
    assert (found.keys, found.origin) == (SHAPE.budget, "unmeasured")
    assert "no memory" in caplog.text
    assert not list(tmp_path.rglob("*.json"))


def test_a_measurement_that_hangs_is_given_up(monkeypatch, caplog):
    going_on = threading.Event()
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(module, "measure", lambda shape: going_on.wait(20))
    found = module.break_even(SHAPE)
    going_on.set()
    assert (found.keys, found.origin) == (SHAPE.budget, "unmeasured")
    assert "no result after" in caplog.text


def test_the_measurement_is_free_of_the_callers_modes(monkeypatch):
    seen = {}

    def look(shape):
        seen["tensor"] = type(torch.zeros(1))
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        seen["thread"] = threading.current_thread()
        return BreakEven(shape.budget, "measured", "")

    monkeypatch.setattr(module, "measure", look)
    from msa_compile._compat import FakeTensorMode

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        module.break_even(SHAPE)
    assert seen["tensor"] is torch.Tensor
    assert not seen["autocast"]
    assert seen["thread"] is not threading.current_thread()


def test_a_bound_is_said_aloud(monkeypatch, caplog):
    monkeypatch.setattr(module, "measure", lambda shape: judge(shape, [step(12, 99)], WON))
    assert module.break_even(SHAPE).origin == "bound"
    assert "did not become faster than dense" in caplog.text
    module.forget()
    assert module.known_break_even(SHAPE) is None, "the next process asks again"


@pytest.mark.parametrize("is_decode", [False, True])
def test_a_step_calls_both_at_the_length_asked_for(is_decode, monkeypatch):
    called = []
    monkeypatch.setattr(module, "seconds_of", lambda call, device: called.append(call().shape) or 0.0)
    monkeypatch.setattr(module, "interleaved_seconds", lambda calls, device, rounds: [(1.0, 2.0)])
    assert module._time_step(SHAPE, 20, is_decode=is_decode) == Step(20, 1.0, 2.0)
    assert called == [(1, 4, 1 if is_decode else 20, 8)] * 2
