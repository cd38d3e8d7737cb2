"""The command for a GPU machine, dry: it runs from end to end, writes as it goes, and wrong kernels make it fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401  # skips this file in other processes
import pytest
from torch import Tensor

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import correct
from msa_compile.kernels.block_sparse_attention import cuda as attention_cuda
from msa_compile.kernels.index_loss import triton as loss_kernels
from msa_compile.kernels.select_blocks import cuda as selection_cuda

FEW = tuple(check for check in correct.CHECKS if check.name.startswith("everything"))


@pytest.fixture(autouse=True)
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "CHECKS", FEW)


def test_a_dry_run_checks_times_and_writes_everything(tmp_path: Path) -> None:
    assert command.main(["--dry-run", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(kept["checks"]) == len(FEW) + 2
    assert not any(kept["checks"].values())
    cases = ["prefill", "prefill", "decode", "decode", "backward", "index loss", "index loss"]
    assert [row["case"] for row in kept["rows"]] == cases
    assert all(row["gate"].startswith("green") for row in kept["rows"])
    kernels = {name for row in kept["rows"] for name in row["kernels"]}
    forward = {"score_blocks", "choose_blocks", "list_blocks", "attend_tiles", "attend_slots", "merge_slots"}
    forward |= {"round_keys", "keep_candidates", "list_candidates", "rescore_blocks"}
    turned = {"mark_queries", "count_queries", "place_queries", "list_queries"}
    gradients = {"differentiate_tiles", "differentiate_blocks", "add_parts"}
    loss = {"sum_logits", "sum_teacher", "compare_queries", "compare_keys", "add_key_parts"}
    assert kernels == forward | turned | gradients | loss
    assert set(kept["rows"][0]["orders"]) == {"tiles", "blocks"}
    assert 1 <= kept["rows"][0]["blocks_a_tile"] <= 5
    text = (tmp_path / "gpu_check.md").read_text()
    assert "4 of 4 checks right" in text
    assert "A dry run" in text


def _one_less(ids: Tensor) -> Tensor:
    """Drop the last block of every query that has more than one."""
    is_last = (ids >= 0).cumsum(-1).eq((ids >= 0).sum(-1, keepdim=True)) & (ids >= 0)
    is_last &= (ids >= 0).sum(-1, keepdim=True) > 1
    return ids.masked_fill(is_last, -1)


def _select_one_less(*tensors: Tensor, **options: Any) -> Tensor:
    return _one_less(selection_cuda.select_blocks(*tensors, **options))


def _attend_one_less(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return attention_cuda.block_sparse_attention(query, key, value, _one_less(ids), **options)


def _differentiate_one_less(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, ids: Tensor, **options: Any
) -> Any:
    return attention_cuda.block_sparse_attention_backward(grad, query, key, value, _one_less(ids), **options)


def _align_half(*operands: Any, **options: Any) -> Any:
    """Drop every second query's gradient."""
    sums = loss_kernels.align_sums(*operands, **options)
    sums.grad_index_query[:, :, ::2] = 0
    return sums


@pytest.mark.parametrize(
    "wrong",
    [
        correct.Ops(_select_one_less, attention_cuda.block_sparse_attention),
        correct.Ops(selection_cuda.select_blocks, _attend_one_less),
        correct.Ops(selection_cuda.select_blocks, attention_cuda.block_sparse_attention, _attend_one_less),
        correct.Ops(
            selection_cuda.select_blocks, attention_cuda.block_sparse_attention, differentiate=_differentiate_one_less
        ),
        pytest.param(
            correct.Ops(selection_cuda.select_blocks, attention_cuda.block_sparse_attention, align=_align_half),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["selection", "attention", "blocks outside", "gradients", "index loss"],
)
def test_wrong_kernels_fail_and_are_not_timed(
    wrong: correct.Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_ops", lambda is_dry: wrong)
    monkeypatch.setattr(correct, "CHECKS", FEW[:1])
    monkeypatch.setattr(correct, "_check_bits", lambda *rest: "")
    assert command.main(["--dry-run", "--out", str(tmp_path)]) == 1
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert kept["checks"][FEW[0].name]
    assert kept["rows"] == []
    assert "WRONG" in (tmp_path / "gpu_check.md").read_text()


def test_what_there_is_no_time_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "CHECKS", ())
    monkeypatch.setattr(correct, "_check_bits", lambda *rest: "")
    assert command.main(["--dry-run", "--budget", "1", "--out", str(tmp_path)]) == 0
    notes = json.loads((tmp_path / "gpu_check.json").read_text())["notes"]
    assert sum(note.startswith("left out for want of time") for note in notes) == 8


def test_a_row_that_is_wrong_has_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import timing

    original = timing._attention

    def without_attention(*arguments: Any) -> Any:
        arguments[2].zero_()
        return [launch for launch in original(*arguments) if not launch.kernel.__name__.startswith("attend")]

    monkeypatch.setattr(timing, "_attention", without_attention)
    wanted = replace(command.ROWS[0], heads=(2, 1, 16), length=40)
    roofline = timing.Roofline(1e12, 1e12)
    row = timing.measure(wanted, timing.torch.device("cpu"), roofline, block_size=16, topk=2)
    assert row.gate.startswith("RED")
    assert row.speed_up is None
