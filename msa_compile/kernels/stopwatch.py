"""Wall time of calls, taken so that they can be compared: on one device, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes until its result is there.

    On CUDA the time is that between two events on the current stream, launches included; elsewhere wall time.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):  # events belong to the current device's stream
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
) -> list[tuple[float, ...]]:
    """Seconds of each call in each round: A B C, A B C, ...

    What disturbs the machine meets all of them, so the ratio within a round is steadier than the times.

    Args:
        calls: What to time; each has run before.
        device: Where they run.
        rounds: How often.

    Returns:
        One entry a round, in the order of ``calls``.
    """
    return [tuple(seconds_of(call, device) for call in calls) for _ in range(rounds)]
