"""``python -m benchmarks``, or ``make bench``: time sparse attention against dense, behind a correctness gate.

    python -m benchmarks --quick                                    # seconds; tries everything, says nothing of speed
    python -m benchmarks --cases decode --lengths 16384,65536 --dtypes bf16
    python -m benchmarks --device cuda

Results go to ``benchmarks/results/<device>.{json,md,png}``; rows of earlier runs on the same machine stay.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import msa_compile
from benchmarks.speed.cases import CASES, PREFILL
from benchmarks.speed.measure import Limits, Row, run_case, warm_up
from benchmarks.speed.roofline import Roofline, measure_roofline
from benchmarks.speed.setting import DTYPES, Setting
from benchmarks.speed.write import Machine, Results, write_results
from msa_compile.bench.model import run_model
from msa_compile.bench.result import Request
from msa_compile.bench.table import to_markdown
from msa_compile.kernels.break_even import cpu_name, kernels_version

END_TO_END = "end_to_end"
NAMES = (*CASES, END_TO_END)
HEADS = ((16, 2, 64), (8, 2, 128))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and write it."""
    options = _parse(argv)
    device = torch.device(options.device)
    rows: list[Row] = []
    rooflines: dict[str, Roofline] = {}
    models: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    written: list[Path] = []
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            warm_up(device)
            for dtype in options.dtypes:
                size = {"size": 256, "megabytes": 8} if options.quick else {}
                roofline = measure_roofline(DTYPES[dtype], device, **size)
                rooflines[f"{dtype}, {threads}"] = roofline
                for heads in options.heads:
                    setting = Setting(heads[0], heads[1], heads[2], dtype, device, threads)
                    rows += _run_kernels(setting, roofline, options)
                    # Written as they come: what fails later takes nothing with it.
                    written = _write(rows, rooflines, models, options)
                if END_TO_END in options.cases:
                    models.append(_run_end_to_end(dtype, device, threads, options))
                    written = _write(rows, rooflines, models, options)
    finally:
        torch.set_num_threads(before)
    for path in written:
        print(f"wrote {path}")
    red = [row for row in rows if not row.is_green]
    for row in red:
        print(f"{row.case} {row.heads} {row.dtype} {row.length}: {row.gate}", file=sys.stderr)
    return 1 if red else 0


def _write(
    rows: list[Row], rooflines: dict[str, Roofline], models: list[dict[str, Any]], options: argparse.Namespace
) -> list[Path]:
    device = torch.device(options.device)
    machine = Machine(
        device=cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        kind=device.type,
        cores=os.cpu_count() or 1,
        torch=torch.__version__,
        msa_compile=msa_compile.__version__,
        kernels=kernels_version(options.device),
    )
    results = Results(machine, (datetime.date.today().isoformat(),), tuple(rows), dict(rooflines), tuple(models))
    return write_results(results, options.out, options.name or device.type)


def _run_kernels(setting: Setting, roofline: Roofline, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    limits = Limits(options.seconds, options.dense_seconds, options.sparse_seconds)
    if options.quick:
        setting = replace(setting, block_size=16, topk=4)
    for name in options.cases:
        if name in CASES:
            lengths = options.lengths or ((128, 256) if options.quick else CASES[name].lengths)
            rows += run_case(CASES[name], setting, lengths, roofline=roofline, limits=limits, flex=options.flex)
    return rows


def _run_end_to_end(dtype: str, device: torch.device, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    request = Request(
        model="tiny" if options.quick else options.model,
        lengths=options.lengths or ((64, 128) if options.quick else (8192, 32768)),
        layers=options.layers,
        dtype=DTYPES[dtype],
        device=device,
        inner="eager" if options.quick else "inductor",
        block_size=16 if options.quick else 128,
        topk=2 if options.quick else 16,
        dense_below=0 if options.quick else "auto",
        indexer=options.indexer,
        new_tokens=4 if options.quick else 16,
        has_compile_times=not (options.quick or options.no_compile_times),
    )
    result = run_model(request)
    return {**asdict(result), "threads": threads, "markdown": to_markdown(result)}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="time sparse attention against dense")
    add = parser.add_argument
    add("--cases", type=_names, default=NAMES, metavar="A,B", help=f"of {', '.join(NAMES)} (default: all)")
    add("--lengths", type=_integers, metavar="N,N", help=f"tokens (default: the case's own; prefill {PREFILL})")
    add("--dtypes", type=_dtypes, default=("fp32", "bf16"), metavar="A,B", help=f"of {', '.join(DTYPES)}")
    add("--heads", type=_heads, nargs="+", default=HEADS, metavar="Hq,Hkv,D", help="(default 16,2,64 8,2,128)")
    add("--threads", type=_integers, default=(torch.get_num_threads(),), metavar="N,N", help="of a CPU, each in turn")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--quick", action="store_true", help="tiny shapes, to see that everything runs; written to out/bench")
    add("--flex", action="store_true", help="compiled flex_attention is a baseline of prefill too")
    add("--model", default="qwen3-8b", help="of end_to_end: as python -m msa_compile.bench takes it")
    add("--indexer", choices=("keys", "learned"), default="keys", help="of end_to_end (default %(default)s)")
    add("--no-compile-times", action="store_true", help="of end_to_end: leave out what takes four more processes")
    add("--layers", type=int, default=1, help="of that model (default 1)")
    add("--seconds", type=float, default=20.0, help="to fill with rounds of one row (default 20)")
    add("--dense-seconds", type=float, default=60.0, help="a longer dense call is extrapolated (default 60)")
    add("--sparse-seconds", type=float, default=120.0, help="a longer sparse call is left out (default 120)")
    add("--out", type=Path, help="folder (default benchmarks/results)")
    add("--name", help="of the files (default: the device)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; nothing was run")
    if options.quick:
        options.seconds = min(options.seconds, 0.2)
        options.heads = ((4, 2, 16),) if options.heads is HEADS else options.heads
    if options.out is None:
        options.out = Path("out/bench") if options.quick else Path(__file__).parent / "results"
    return options


def _names(text: str) -> tuple[str, ...]:
    return _chosen(text, NAMES)


def _dtypes(text: str) -> tuple[str, ...]:
    return _chosen(text, tuple(DTYPES))


def _chosen(text: str, legal: Sequence[str]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in legal]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(legal)}")
    return names


def _integers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers above 0")
    return numbers


def _heads(text: str) -> tuple[int, ...]:
    numbers = _integers(text)
    if len(numbers) != 3 or numbers[0] % numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not Hq,Hkv,D with Hq a multiple of Hkv")
    return numbers


if __name__ == "__main__":
    raise SystemExit(main())
