"""One command for a machine with a GPU: are the kernels right there, and how fast are they?

    python -m benchmarks.gpu_check --budget 520         # seconds; needs torch 2.11 and triton 3.6 or later, no more
    TRITON_INTERPRET=1 python -m benchmarks.gpu_check --dry-run     # no GPU: tiny shapes, to see that the command works

First every kernel is compared with float64 on the GPU. Then come the tables, the most important rows first, and whole
models. Every row is written as soon as it is measured, so a run that is cut keeps what it has. Exits with 1 if anything
is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_check.backward import measure_backward
from benchmarks.gpu_check.correct import Ops, run_checks
from benchmarks.gpu_check.loss import ALL, SELECT, measure_loss
from benchmarks.gpu_check.timing import Wanted, measure
from benchmarks.gpu_check.write import Findings
from benchmarks.speed.measure import warm_up
from benchmarks.speed.roofline import measure_roofline
from msa_compile.bench.model import run_model
from msa_compile.bench.result import Request
from msa_compile.bench.table import to_markdown
from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import cuda as attention_cuda
from msa_compile.kernels.select_blocks import cuda as selection_cuda
from msa_compile.kernels.triton_support import why_no_e4m3

K = 1024
_PAPER, _QWEN = (64, 4, 128), (32, 8, 128)
ROWS = (
    *(Wanted("prefill", _PAPER, length, kind) for length in (32 * K, 128 * K) for kind in ("random", "correlated")),
    *(Wanted("decode", _PAPER, length) for length in (32 * K, 128 * K, 1024 * K)),
    Wanted("prefill", _PAPER, 8 * K),
    *(Wanted("prefill", _QWEN, length, indexer="keys") for length in (8 * K, 32 * K, 128 * K)),
    *(Wanted("prefill", _PAPER, length, "correlated") for length in (512 * K, 1024 * K)),
    *(Wanted("prefill", _PAPER, length, "correlated", candidates=32) for length in (32 * K, 128 * K, 512 * K)),
    Wanted("prefill", _PAPER, 128 * K, "random", candidates=32),
    *(Wanted("decode", _QWEN, length, indexer=kind) for length in (32 * K, 128 * K) for kind in ("learned", "keys")),
    *(Wanted("backward", _PAPER, length, "correlated") for length in (8 * K, 32 * K)),
    *(Wanted("index loss", _PAPER, 8 * K, kind) for kind in (SELECT, ALL, "correlated")),
    Wanted("decode", _PAPER, 512 * K),
    *(Wanted("decode", heads, 128 * K, has_bytes=True) for heads in (_PAPER, _QWEN)),
    Wanted("decode", _PAPER, 1024 * K, has_bytes=True),
    *(Wanted("decode", _PAPER, length, batch=16) for length in (32 * K, 128 * K)),
    *(Wanted("prefill", _PAPER, length) for length in (512 * K, 1024 * K)),
)
MODELS = (("qwen3-8b", 2, (32 * K,)), ("minimax-m3", 2, (32 * K,)))
# Seconds that are left for the models, and that one of them may need.
_FOR_MODELS, _FOR_A_MODEL = 150, 60
# A row is begun while so many seconds are left for it.
_FOR_A_ROW = 25
_MEASURES = {"prefill": measure, "decode": measure, "backward": measure_backward, "index loss": measure_loss}


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="check and time on a GPU")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for everything (default 520)")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, interpreted; written to out")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; nothing was run")
    started = time.monotonic()
    device = torch.device("cpu" if options.dry_run else "cuda")
    folder = options.out or (Path("out/gpu_check") if options.dry_run else Path(__file__).parent.parent / "results")

    def left() -> float:
        return options.budget - (time.monotonic() - started)

    warm_up(device)
    roofline = measure_roofline(
        torch.bfloat16, device, size=64 if options.dry_run else 8192, megabytes=1 if options.dry_run else 2048
    )
    findings = Findings.of(device, roofline, folder, is_dry=options.dry_run)
    with torch.no_grad():
        for name, wrong in run_checks(_ops(options.dry_run), device, shrink=16 if options.dry_run else 1):
            findings.add_check(name, wrong)
            _say(f"{name}: {wrong or 'right'}", left())
        if findings.is_wrong:
            _say("wrong kernels are not timed", left())
            return 1
        _time(findings, device, options.dry_run, left)
    _run_models(findings, device, options.dry_run, left)
    return 1 if findings.is_wrong else 0


def _ops(is_dry: bool) -> Ops:
    """The public functions; on a CPU they would run other kernels, so a dry run takes what a CUDA device runs."""
    if is_dry:
        return Ops(selection_cuda.select_blocks, attention_cuda.block_sparse_attention)
    return Ops(select_blocks, block_sparse_attention)


def _time(findings: Findings, device: torch.device, is_dry: bool, left: Callable[[], float]) -> None:
    rows: Sequence[Wanted] = ROWS
    budget = {}
    if is_dry:
        rows = (
            Wanted("prefill", (2, 1, 16), 40, "correlated"),
            Wanted("prefill", (2, 1, 16), 40, candidates=4),
            Wanted("decode", (2, 1, 16), 40, indexer="keys"),
            Wanted("decode", (2, 1, 16), 40, has_bytes=True),
            Wanted("backward", (2, 1, 16), 40),
            Wanted("index loss", (2, 1, 16), 40),
            Wanted("index loss", (2, 1, 16), 40, SELECT),
        )
        budget = {"block_size": 8, "topk": 3}
    for wanted in rows:
        if wanted.candidates and why_no_e4m3(device):
            findings.add_note(f"left out, products of e4m3 are not there: {wanted}")
            continue
        if left() < _FOR_A_ROW + (0 if is_dry else _FOR_MODELS):
            findings.add_note(f"left out for want of time: {wanted}")
            continue
        try:
            row = _MEASURES[wanted.case](wanted, device, findings.roofline, **budget)
        except torch.OutOfMemoryError:
            findings.add_note(f"left out, the memory is too small: {wanted}")
            continue
        findings.add_row(row)
        _say(f"{wanted}: {row.gate}; {row.seconds * 1e3:.3f} ms, {row.speed_up or 0:.2f}x", left())


def _run_models(findings: Findings, device: torch.device, is_dry: bool, left: Callable[[], float]) -> None:
    models = (("tiny", 1, (64,)),) if is_dry else MODELS
    for name, layers, lengths in models:
        if left() < _FOR_A_MODEL:
            findings.add_note(f"left out for want of time: {name}")
            continue
        request = Request(
            model=name,
            lengths=lengths,
            layers=layers,
            dtype=torch.bfloat16,
            device=device,
            inner="eager" if is_dry else "inductor",
            block_size=16 if is_dry else 128,
            topk=2 if is_dry else 16,
            dense_below=0,
            seconds=0.1 if is_dry else 5.0,
            has_compile_times=False,
        )
        result = run_model(request, lambda text: _say(text, left()))
        findings.add_model(result.is_green, asdict(result), to_markdown(result))


def _say(text: str, left: float) -> None:
    print(f"[{left:5.0f} s left] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
