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
from msa_compile.kernels.cache_dir import CACHE_VARIABLE, cache_dir
from msa_compile.kernels.select_blocks import select_blocks
from msa_compile.kernels.stopwatch import interleaved_seconds, seconds_of

log = logging.getLogger(__name__)

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
    """Seconds of one call at one length."""

    length: int
    dense: float
    sparse: float

    @property
    def is_won(self) -> bool:
        """Whether sparse is at least as fast."""
        return self.sparse <= self.dense

    @property
    def ratio(self) -> float:
        """How many times longer sparse takes."""
        return self.sparse / self.dense


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
            # Another day the machine may be less busy: what is no answer is asked for again by the next process.
            if found.origin in ("measured", "extrapolated"):
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
    """Time dense and sparse attention of ``shape`` at growing lengths: of a prompt, and of one token after it."""
    _time_step(shape, 16, is_decode=False)  # what is made once, at a first call, is not a matter of length
    lengths = lengths_to_time(shape.budget)
    decode = take_steps(
        shape.budget,
        [length for length in lengths if length >= shape.budget],
        lambda length: _time_step(shape, length, is_decode=True),
        limit=TIME_LIMIT / 3,
    )
    prefill = take_steps(shape.budget, lengths, lambda length: _time_step(shape, length, is_decode=False))
    return judge(shape, prefill, decode)


def take_steps(
    budget: int,
    lengths: Sequence[int],
    time_step: Callable[[int], Step],
    clock: Callable[[], float] = time.perf_counter,
    limit: float = TIME_LIMIT,
) -> list[Step]:
    """Steps at growing lengths, until two in a row are won or the time would be over.

    Args:
        budget: Keys that a query reads; shorter lengths only tell what a longer one will cost.
        lengths: Growing.
        time_step: Measures at a length.
        clock: Seconds.
        limit: Seconds for all.
    """
    started = clock()
    steps: list[Step] = []
    for length in lengths:
        if steps:
            # Nothing here grows faster than with the square, and slow calls are timed once.
            once = (steps[-1].dense + steps[-1].sparse) * (length / steps[-1].length) ** 2
            if clock() - started + once > limit:
                break
        steps.append(time_step(length))
        if [step.is_won and step.length >= budget for step in steps[-2:]] == [True, True]:
            break
    return steps


def lengths_to_time(budget: int) -> list[int]:
    """Lengths up to the longest that is kept dense; the first few are below the budget."""
    longest = longest_dense(budget)
    ramp = [length for length in (budget // 16, budget // 8, budget // 4, budget // 2) if length >= 16]
    grid = [budget * 2**power * part // 2 for power in range(32) for part in (2, 3)]
    return [*ramp, *(length for length in grid if length <= longest)]


def longest_dense(budget: int) -> int:
    """The longest length that is kept dense however slow sparse is: beyond it sparse is what was asked for."""
    return max(MOST_BUDGETS * budget, MOST_KEYS)


def judge(shape: ShapeClass, prefill: Sequence[Step], decode: Sequence[Step]) -> BreakEven:
    """The break-even that steps of growing length show: prefill and decode both have to be won from there on.

    Args:
        shape: Whose steps they are; no break-even is shorter than its budget.
        prefill: At least one step.
        decode: At least one step.
    """
    won = [_won_from(steps, shape.budget) for steps in (prefill, decode)]
    if won[0] is not None and won[1] is not None:
        keys = max(won[0], won[1])
        return BreakEven(keys, "measured", f"sparse is as fast from {keys} keys on")
    told = " and ".join(
        f"takes {steps[-1].ratio:.2f}x the time in {name} at {steps[-1].length} keys"
        for name, steps, keys in (("prefill", prefill, won[0]), ("decode", decode, won[1]))
        if keys is None
    )
    longest = longest_dense(shape.budget)
    met = max(
        won[0] or _crossing(prefill, shape.budget) or _crossing_of_flops(shape, prefill[-1]),
        won[1] or _crossing(decode, shape.budget) or math.inf,
    )
    if met <= longest:
        keys = max(shape.budget, math.ceil(met))
        return BreakEven(keys, "extrapolated", f"sparse {told}; as fast from {keys} keys on, extrapolated")
    return BreakEven(longest, "bound", f"sparse {told}; taken from {longest} keys on, the most that is kept dense")


def _won_from(steps: Sequence[Step], budget: int) -> int | None:
    """The shortest length, not below the budget, from which every step is won."""
    shortest = None
    for step in reversed(steps):
        if not step.is_won or step.length < budget:
            break
        shortest = step.length
    return shortest


def _crossing(steps: Sequence[Step], budget: int) -> float | None:
    """Where sparse / dense reaches 1, by the line through the last two steps of a log-log plot; none below the budget.

    Up to the budget sparse reads all that dense reads, so the ratio there says nothing of its course beyond.
    """
    beyond = [step for step in steps if step.length >= budget]
    if len(beyond) < 2:
        return None
    before, last = beyond[-2:]
    slope = math.log(last.ratio / before.ratio) / math.log(last.length / before.length)
    return last.length * last.ratio ** (-1 / slope) if slope < -0.05 else math.inf


def _crossing_of_flops(shape: ShapeClass, step: Step) -> float:
    """Where sparse / dense reaches 1 in prefill, if it goes the way of the FLOPs from one step on."""
    index = shape.key_value_heads / (2 * shape.query_heads)

    def flops(length: float) -> float:
        share = min(1.0, shape.budget / length)
        return index + share * (2 - share)

    slower = step.ratio / flops(step.length)
    longest = longest_dense(shape.budget)
    if slower * flops(longest) > 1:
        return math.inf
    low, high = float(shape.budget), float(longest)
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if slower * flops(middle) <= 1 else (middle, high)
    return high


def _time_step(shape: ShapeClass, length: int, *, is_decode: bool) -> Step:
    groups = shape.key_value_heads
    if shape.device.type == "cpu":
        groups = min(groups, _TIMED_GROUPS)
    heads = shape.query_heads // shape.key_value_heads * groups
    generator = torch.Generator(shape.device).manual_seed(0)

    def random(count: int, tokens: int) -> torch.Tensor:
        made = torch.empty(1, count, tokens, shape.head_dim, device=shape.device, dtype=shape.dtype)
        return made.normal_(generator=generator)

    query, key, value = random(heads, 1 if is_decode else length), random(groups, length), random(groups, length)

    def dense() -> object:
        return F.scaled_dot_product_attention(query, key, value, is_causal=not is_decode, enable_gqa=True)

    def sparse() -> object:
        index_query = query if heads == groups else query.unflatten(1, (groups, -1)).mean(2)
        ids = select_blocks(index_query, key, block_size=shape.block_size, topk=shape.topk)
        return block_sparse_attention(query, key, value, ids, block_size=shape.block_size)

    first = (seconds_of(dense, shape.device), seconds_of(sparse, shape.device))
    # Of slow calls, one has to do: a longer one tells more than a second one of this length.
    rounds = 0 if sum(first) > TIME_LIMIT / 25 else 7 if is_decode else 3
    if rounds:
        taken = interleaved_seconds([dense, sparse], shape.device, rounds)
        first = (statistics.median(pair[0] for pair in taken), statistics.median(pair[1] for pair in taken))
    return Step(length, *first)


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
        "kernels": kernels_version(shape.device.type),
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


# What calls on a CPU run.
_CPU_SOURCES = ("native/*.*", "*/cpu.py", "*/dense.py", "segments.py", "closed_form.py", "visibility.py")


@functools.cache
def kernels_version(device_type: str) -> str:
    """A hash of the sources that run on a type of device: another implementation has another break-even."""
    folder = Path(__file__).parent
    of_cpu = {path for pattern in _CPU_SOURCES for path in folder.glob(pattern)}
    paths = of_cpu if device_type == "cpu" else set(folder.rglob("*.py")) - of_cpu
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".h", ".cpp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
