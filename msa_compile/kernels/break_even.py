"""From which length sparse attention is at least as fast as dense: measured once a machine and shape, kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from msa_compile.kernels.block_sparse_attention import block_sparse_attention
from msa_compile.kernels.select_blocks import select_blocks
from msa_compile.kernels.stopwatch import interleaved_seconds, seconds_of

log = logging.getLogger(__name__)

CACHE_VARIABLE = "MSA_COMPILE_CACHE"
# Seconds that a measurement may take; a single step that was not foreseen can overrun it.
TIME_LIMIT = 2.5
# Seconds after which a measurement is given up.
PATIENCE = 30.0
# Where sparse does not win in the time there is, it is taken from this many budgets, or this many keys, on at most.
MOST_BUDGETS, MOST_KEYS = 16, 32768
# Groups of heads that are timed on a CPU, where time is proportional to their number.
_TIMED_GROUPS = 2


@dataclass(frozen=True)
class ShapeClass:
    """What the break-even depends on, besides the machine.

    Attributes:
        device, dtype: Of the queries.
        query_heads, key_value_heads, head_dim: ``Hq``, ``Hkv``, ``D``.
        block_size, topk: Keys in a block, blocks a query.
    """

    device: torch.device
    dtype: torch.dtype
    query_heads: int
    key_value_heads: int
    head_dim: int
    block_size: int
    topk: int

    @property
    def budget(self) -> int:
        """Keys that a query reads; up to here sparse attention is dense attention."""
        return self.block_size * self.topk


@dataclass(frozen=True)
class Step:
    """Seconds of one call at one length: a prefill of ``length`` tokens, and one token after as many."""

    length: int
    dense_prefill: float
    sparse_prefill: float
    dense_decode: float
    sparse_decode: float

    @property
    def is_won(self) -> bool:
        """Whether sparse is at least as fast in both."""
        return self.sparse_prefill <= self.dense_prefill and self.sparse_decode <= self.dense_decode


@dataclass(frozen=True)
class BreakEven:
    """The length, in keys, from which calls run sparse, and how it is known.

    Attributes:
        keys: The length.
        origin: ``"measured"``; ``"extrapolated"`` from the lengths that there was time for; ``"bound"`` where sparse
            came no nearer, or not near enough, and the longest length that is kept dense was reached; ``"unmeasured"``.
        detail: For the report.
    """

    keys: int
    origin: str
    detail: str


def break_even(shape: ShapeClass) -> BreakEven:
    """The break-even of ``shape`` on this machine: remembered, from disk, or measured now in two or three seconds."""
    with _lock:
        found = known_break_even(shape)
        if found is None:
            log.info("measuring from which length sparse is as fast as dense, for %s", shape)
            started = time.perf_counter()
            found = _measure_apart(shape)
            log.info("measured in %.1f s: %s", time.perf_counter() - started, found.detail)
            if found.origin == "bound":
                log.warning("sparse attention did not become faster than dense: %s", found.detail)
            key = _key(shape)
            _remembered[_text(key)] = found
            if found.origin != "unmeasured":
                _write(key, found)
        return found


def known_break_even(shape: ShapeClass) -> BreakEven | None:
    """The break-even of ``shape`` if it was measured before, by this process or another one."""
    key = _key(shape)
    with _lock:
        if _text(key) not in _remembered:
            found = _read(key)
            if found is None:
                return None
            _remembered[_text(key)] = found
        return _remembered[_text(key)]


_lock = threading.RLock()
_remembered: dict[str, BreakEven] = {}


def forget() -> None:
    """Forget what this process remembers; the files stay."""
    with _lock:
        _remembered.clear()


def _measure_apart(shape: ShapeClass) -> BreakEven:
    """Measure in a thread of its own, free of what belongs to the caller's: fake tensors, autocast, gradient mode.

    The caller may be inside of Dynamo and hold its lock; an op that compiled something at its first call would wait for
    it without end, so the thread is not waited for without end either.
    """
    found: list[BreakEven] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(measure(shape))
        except Exception as error:  # a machine out of memory shall still compile the model
            log.debug("the break-even could not be measured", exc_info=True)
            found.append(BreakEven(shape.budget, "unmeasured", f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name="msa_compile break-even", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    result = found[0] if found else BreakEven(shape.budget, "unmeasured", f"no result after {PATIENCE:.0f} s")
    if result.origin == "unmeasured":
        log.warning("the break-even could not be measured, so dense_below is the budget: %s", result.detail)
    return result


def measure(shape: ShapeClass) -> BreakEven:
    """Time dense and sparse attention of ``shape`` at growing lengths."""
    steps = take_steps(shape.budget, lambda length: _time_step(shape, length))
    return judge(shape.budget, steps)


def take_steps(
    budget: int,
    time_step: Callable[[int], Step],
    clock: Callable[[], float] = time.perf_counter,
    limit: float = TIME_LIMIT,
) -> list[Step]:
    """Steps at growing lengths, until two in a row are won or the time would be over.

    Args:
        budget: Keys that a query reads; shorter lengths only tell what a longer one will cost.
        time_step: Measures at a length.
        clock: Seconds.
        limit: Seconds for all.
    """
    started = clock()
    steps: list[Step] = []
    cost = 0.0
    for length in _lengths(budget):
        # Nothing here grows faster than with the square.
        if steps and clock() - started + cost * (length / steps[-1].length) ** 2 > limit:
            break
        before = clock()
        steps.append(time_step(length))
        cost = clock() - before
        if [step.is_won and step.length >= budget for step in steps[-2:]] == [True, True]:
            break
    return steps


def _lengths(budget: int) -> list[int]:
    longest = longest_dense(budget)
    ramp = [length for length in (budget // 16, budget // 4) if length >= 16]
    grid = [budget * 2**power * part // 2 for power in range(32) for part in (2, 3)]
    return [*ramp, *(length for length in grid if length <= longest)]


def longest_dense(budget: int) -> int:
    """The longest length that is kept dense however slow sparse is: beyond it sparse is what was asked for."""
    return max(MOST_BUDGETS * budget, MOST_KEYS)


def judge(budget: int, steps: Sequence[Step]) -> BreakEven:
    """The break-even that steps of growing length show: the shortest from which every longer one is won.

    Args:
        budget: No break-even is shorter.
        steps: At least one.
    """
    won: list[Step] = []
    for step in reversed(steps):
        if not step.is_won or step.length < budget:
            break
        won.append(step)
    if won:
        return BreakEven(won[-1].length, "measured", f"sparse is as fast from {won[-1].length} keys on")
    last = steps[-1]
    pairs = [
        [(step.length, step.sparse_prefill / step.dense_prefill) for step in steps],
        [(step.length, step.sparse_decode / step.dense_decode) for step in steps],
    ]
    met = max(_crossing(ratios) for ratios in pairs)
    slower = (
        f"at {last.length} keys sparse takes {last.sparse_prefill / last.dense_prefill:.2f}x the time in prefill and "
        f"{last.sparse_decode / last.dense_decode:.2f}x in decode"
    )
    longest = longest_dense(budget)
    if met <= longest:
        keys = max(budget, math.ceil(met))
        return BreakEven(keys, "extrapolated", f"{slower}; as fast from {keys} keys on, extrapolated")
    return BreakEven(longest, "bound", f"{slower}; taken from {longest} keys on, the most that is kept dense")


def _crossing(ratios: Sequence[tuple[int, float]]) -> float:
    """Where the ratio sparse / dense reaches 1, by the line through the last two in a log-log plot."""
    length, ratio = ratios[-1]
    if ratio <= 1:
        return float(length)
    if len(ratios) < 2:
        return math.inf
    before, ratio_before = ratios[-2]
    slope = math.log(ratio / ratio_before) / math.log(length / before)
    return length * ratio ** (-1 / slope) if slope < -0.05 else math.inf


def _time_step(shape: ShapeClass, length: int) -> Step:
    groups = shape.key_value_heads
    if shape.device.type == "cpu":
        groups = min(groups, _TIMED_GROUPS)
    heads = shape.query_heads // shape.key_value_heads * groups
    generator = torch.Generator(shape.device).manual_seed(0)

    def random(count: int) -> torch.Tensor:
        size = (1, count, length, shape.head_dim)
        return torch.randn(size, generator=generator, device=shape.device, dtype=torch.float32).to(shape.dtype)

    query, key, value = random(heads), random(groups), random(groups)
    newest = query[:, :, -1:]

    def sparse(rows: torch.Tensor) -> torch.Tensor:
        index_query = rows if heads == groups else rows.unflatten(1, (groups, -1)).mean(2)
        ids = select_blocks(index_query, key, block_size=shape.block_size, topk=shape.topk)
        return block_sparse_attention(rows, key, value, ids, block_size=shape.block_size)

    def dense(rows: torch.Tensor) -> torch.Tensor:
        is_causal = rows.shape[2] > 1
        return F.scaled_dot_product_attention(rows, key, value, is_causal=is_causal, enable_gqa=True)

    prefill = _medians([lambda: dense(query), lambda: sparse(query)], shape.device, rounds=3)
    decode = _medians([lambda: dense(newest), lambda: sparse(newest)], shape.device, rounds=15)
    return Step(length, *prefill, *decode)


def _medians(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median seconds of each call; a first call that was slow is the only one."""
    first = [seconds_of(call, device) for call in calls]
    if sum(first) > TIME_LIMIT / 8:
        return first
    return [statistics.median(taken) for taken in zip(*interleaved_seconds(calls, device, rounds), strict=True)]


def _key(shape: ShapeClass) -> dict[str, Any]:
    """What has to be the same for a number from disk to be used."""
    on_cpu = shape.device.type == "cpu"
    return {
        "device": cpu_name() if on_cpu else torch.get_device_module(shape.device).get_device_name(shape.device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "heads": [shape.query_heads, shape.key_value_heads, shape.head_dim],
        "block_size": shape.block_size,
        "topk": shape.topk,
        "torch": torch.__version__,
        "kernels": kernels_version(),
    }


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


@functools.cache
def cpu_name() -> str:
    """The processor and the vector instructions that torch uses on it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


@functools.cache
def kernels_version() -> str:
    """A hash of the sources of the ops: another implementation has another break-even."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """Where break-evens are kept: ``$MSA_COMPILE_CACHE``, or ``msa_compile`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "msa_compile"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "msa_compile"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msa_compile"


def _path(key: dict[str, Any]) -> Path:
    # One file a shape: two processes that measure at once do not lose each other's.
    return cache_dir() / "break_even" / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:16]}.json"


def _read(key: dict[str, Any]) -> BreakEven | None:
    path = _path(key)
    try:
        kept = json.loads(path.read_text())
        if kept["key"] != key:
            raise ValueError("it belongs to another shape")
        value = kept["value"]
        found = BreakEven(int(value["keys"]), str(value["origin"]), str(value["detail"]))
        if found.keys < key["block_size"] * key["topk"]:
            raise ValueError(f"{found.keys} keys are fewer than the budget")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is ignored, and measured anew where needed: %s: %s", path, type(error).__name__, error)
        return None
    return found


def _write(key: dict[str, Any], found: BreakEven) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"key": key, "value": asdict(found)}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the break-even could not be kept in %s: %s; set %s", path.parent, error, CACHE_VARIABLE)
