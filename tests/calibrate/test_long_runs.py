"""A calibration that is killed goes on where it was, and several processes learn as one."""

import signal
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
from torch import distributed

import msa_compile
from msa_compile import errors

SECONDS = 200  # many times what it takes on an idle core


def start(what: str, folder: Path, *rest: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, plain.__file__, what, str(folder), *map(str, rest)])


def same(found: dict, expected: dict) -> None:
    assert (found["history"], found["mass"], found["steps"]) == (
        expected["history"],
        expected["mass"],
        expected["steps"],
    )
    assert found["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(found["weights"][name], value) for name, value in expected["weights"].items())


@pytest.fixture(scope="module")
def expected() -> dict:
    """What one process gets without interruption."""
    return plain.calibrated(plain.plain(), plain.batches())


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_wrote_goes_on_to_the_same_result(tmp_path, expected):
    dying = start("die", tmp_path)
    assert dying.wait(SECONDS) == -signal.SIGKILL
    there = torch.load(tmp_path / "state.pt", weights_only=True)
    assert there["step"] == 2, "what was written before is whole"
    same(plain.calibrated(plain.plain(), plain.batches(), tmp_path / "state.pt"), expected)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_or_none_at_all_is_refused(tmp_path):
    state = tmp_path / "state.pt"
    model = plain.plain()
    plain.calibrated(model, plain.batches(), state)
    with pytest.raises(errors.CheckpointError, match=r"steps 6 there and 9 here"):
        msa_compile.calibrate(model, plain.batches(), steps=9, learning_rate=1e-2, checkpoint=state, progress=False)
    state.write_bytes(b"nothing")
    with pytest.raises(errors.CheckpointError, match="is no checkpoint"):
        msa_compile.calibrate(model, plain.batches(), steps=9, checkpoint=state, progress=False)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_result(tmp_path, expected):
    class Interrupted(list):
        def __iter__(self):
            yield from self[:4]
            raise KeyboardInterrupt

    data = plain.batches()
    assert plain.calibrated(plain.plain(), Interrupted(data), tmp_path / "state.pt")["steps"] == 3
    same(plain.calibrated(plain.plain(), data, tmp_path / "state.pt"), expected)
    same(plain.calibrated(plain.plain(), data, tmp_path / "state.pt"), expected)


def both_ranks(kind: str, folder: Path) -> list[dict]:
    """What two processes found."""
    running = [start(kind, folder, rank) for rank in range(2)]
    try:
        assert [process.wait(SECONDS) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


needs_gloo = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo here"
)


@pytest.mark.slow
@needs_gloo
def test_the_index_loss_teaches_the_same_under_distributed_data_parallel(tmp_path):
    ids = plain.batches()[0]
    halves = [plain.loss_gradients(plain.plain(), half)["gradients"] for half in ids.split(2)]
    for found in both_ranks("ddp", tmp_path):
        for name, gradient in found["gradients"].items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("kind", ["plain", "fsdp", "tp"])
def test_two_processes_learn_what_one_does(kind, tmp_path, expected):
    expected = plain.calibrated(plain.plain(), plain.batches(), kind="tp") if kind == "tp" else expected
    ranks = both_ranks(kind, tmp_path)
    for found in ranks:
        torch.testing.assert_close(found["history"], expected["history"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["mass"][-1][1], expected["mass"][-1][1], rtol=1e-3, atol=1e-4)
    for name, value in expected["weights"].items():
        parts = [found["weights"][name] for found in ranks]
        if kind == "tp" and "q_proj" in name:
            parts = [torch.cat(parts)]
        for part in parts:
            torch.testing.assert_close(part, value, rtol=1e-3, atol=1e-4)
    for rank, found in enumerate(ranks):
        if kind == "tp":
            assert "heads are split" in found["saved"]
            assert "no checkpoints where attention heads are split" in found["checkpoint"]
            continue
        assert found["saved"] == ""
        model = msa_compile.load(plain.plain(), tmp_path / f"adapter{rank}", example_inputs=(plain.batches()[0],))
        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[name], value) for name, value in found["weights"].items())
    if kind == "fsdp":
        states = [tmp_path / f"state{rank}.pt" for rank in range(2)]
        assert [state.exists() for state in states] == [True, False], "the first process writes"
        assert torch.load(states[0], weights_only=True)["step"] == plain.STEPS
