"""Run the cases: gate, peak memory, paired times, extrapolation of what would take too long."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.speed.baselines import DEFAULT
from benchmarks.speed.cases import Case, Problem
from benchmarks.speed.gate import Ops, Verdict
from benchmarks.speed.growth import extrapolate
from benchmarks.speed.roofline import Roofline
from benchmarks.speed.setting import Setting
from msa_compile.bench.memory import peak_above
from msa_compile.bench.spread import Spread, extrapolated, take_rounds
from msa_compile.kernels.stopwatch import seconds_of

SPARSE = "sparse"


@dataclass(frozen=True)
class Row:
    """What is known of one case at one length.

    Attributes:
        case, indexer, device, dtype, threads, heads, block_size, topk, length: What was measured.
        gate: ``"green ..."``, or what was found wrong; there are no times and ratios then.
        seconds: By name, ``"sparse"`` first, then the baselines.
        ratios: Baseline to sparse, above 1 where sparse is faster.
        peak_bytes: Above the inputs, of one call; ``None`` where it cannot be told.
        theory: Ratio to expect if both ran at the same rate.
        roofline_share: Least possible time of the sparse call over its own.
        flops, dense_flops, bytes, dense_bytes: Of one call.
    """

    case: str
    indexer: str
    device: str
    dtype: str
    threads: int
    heads: str
    block_size: int
    topk: int
    length: int
    gate: str
    theory: float
    flops: float
    dense_flops: float
    bytes: float
    dense_bytes: float
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    roofline_share: float | None = None

    @property
    def is_green(self) -> bool:
        """Whether there are times."""
        return self.gate.startswith("green")

    @property
    def default_baseline(self) -> str | None:
        """What a user gets without this package."""
        names = [name for name in self.seconds if name != SPARSE]
        return DEFAULT if DEFAULT in names else names[0] if names else None

    @property
    def best_baseline(self) -> str | None:
        """The fastest baseline, by its median."""
        names = [name for name in self.seconds if name != SPARSE]
        return min(names, key=lambda name: self.seconds[name].median) if names else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Row:
        """The inverse of ``to_dict``."""
        spreads = {name: {key: Spread(**value) for key, value in kept[name].items()} for name in ("seconds", "ratios")}
        return cls(**{**kept, **spreads})


@dataclass(frozen=True)
class Limits:
    """How long things may take.

    Attributes:
        seconds: Time to fill with rounds of one row.
        dense_seconds: A baseline call that would take longer is extrapolated.
        sparse_seconds: Where one sparse call would take longer, the row is left out, and the longer ones too.
    """

    seconds: float = 20.0
    dense_seconds: float = 60.0
    sparse_seconds: float = 120.0


def run_case(
    case: Case,
    setting: Setting,
    lengths: Sequence[int],
    *,
    roofline: Roofline,
    limits: Limits,
    ops: Ops | None = None,
    flex: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Row]:
    """All rows of one case in one setting, shortest length first.

    Args:
        case: What to run.
        setting: Heads, dtype, device.
        lengths: In tokens.
        roofline: Ceilings of this machine in this dtype.
        limits: How long things may take.
        ops: The implementation; default the package's.
        flex: Whether compiled ``flex_attention`` is a baseline too.
        say: Takes progress.
    """
    ops = ops or Ops()
    rows: list[Row] = []
    verdict = case.gate(setting, ops)
    for indexer in case.indexers:
        measured: dict[str, list[tuple[int, float]]] = {}
        for length in sorted(lengths):
            past = measured.get(SPARSE)
            if past and extrapolate(past, length, case.power) > limits.sparse_seconds:
                say(f"{case.name} {setting.heads} {setting.dtype_name} {length}: left out, it would take too long")
                break
            row = _run_row(case, setting, length, indexer, verdict, measured, roofline, limits, ops, flex)
            rows.append(row)
            best = row.best_baseline
            ratio = f"{row.ratios[best].median:.2f}x to {best}" if best else row.gate
            say(f"{case.name} {setting.heads} {setting.dtype_name} {indexer} {length}: {ratio}")
    return rows


def _run_row(
    case: Case,
    setting: Setting,
    length: int,
    indexer: str,
    verdict: Verdict,
    measured: dict[str, list[tuple[int, float]]],
    roofline: Roofline,
    limits: Limits,
    ops: Ops,
    flex: bool,
) -> Row:
    """One row; ``measured`` gets the times of this length for the next one to extrapolate."""
    problem = case.build(setting, length, indexer, ops, flex=flex)
    with torch.no_grad():
        if verdict.is_green:
            # The first row warms up what is made once, so that its memory and time are not on this row's account.
            if not measured:
                problem.sparse()
            output, peak = peak_above(problem.sparse, setting.device)
            verdict = problem.check(output)
            del output
        row = _untimed(case, setting, length, indexer, problem, verdict)
        if not verdict.is_green:
            return row
        row.peak_bytes[SPARSE] = peak
        _time(row, problem, case, setting, measured, limits)
    gc.collect()
    share = roofline.seconds(problem.sparse_work) / row.seconds[SPARSE].median
    return Row(**{**row.__dict__, "roofline_share": share})


def _time(
    row: Row,
    problem: Problem,
    case: Case,
    setting: Setting,
    measured: dict[str, list[tuple[int, float]]],
    limits: Limits,
) -> None:
    calls = {SPARSE: problem.sparse}
    for name, call in problem.baselines.items():
        past = measured.get(name)
        if past and extrapolate(past, row.length, case.power) > limits.dense_seconds:
            row.seconds[name] = extrapolated(extrapolate(past, row.length, case.power))
            continue
        _, row.peak_bytes[name] = peak_above(call, setting.device)
        calls[name] = call
    rounds = take_rounds(calls, setting.device, seconds=limits.seconds, in_a_row=case.in_a_row)
    late = dict(row.seconds)
    row.seconds.clear()
    for name in calls:
        row.seconds[name] = rounds.of(name)
        measured.setdefault(name, []).append((row.length, row.seconds[name].median))
        if name != SPARSE:
            row.ratios[name] = rounds.ratio(name, SPARSE)
    for name, value in late.items():
        row.seconds[name] = value
        row.ratios[name] = extrapolated(value.median / row.seconds[SPARSE].median)


def _untimed(case: Case, setting: Setting, length: int, indexer: str, problem: Problem, verdict: Verdict) -> Row:
    return Row(
        case=case.name,
        indexer=indexer,
        device=setting.device.type,
        dtype=setting.dtype_name,
        threads=setting.threads,
        heads=setting.heads,
        block_size=setting.block_size,
        topk=setting.topk,
        length=length,
        gate=str(verdict),
        theory=problem.theory,
        flops=problem.sparse_work.flops,
        dense_flops=problem.dense_work.flops,
        bytes=problem.sparse_work.bytes,
        dense_bytes=problem.dense_work.bytes,
    )


def warm_up(device: torch.device) -> None:
    """Wake the threads and the clocks of the device."""
    a = torch.randn(1024, 1024, device=device)
    for _ in range(20):
        seconds_of(lambda: a @ a, device)
