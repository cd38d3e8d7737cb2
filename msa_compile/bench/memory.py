"""The most memory that a call held at once, above what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_above(call: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """Run ``call`` and say what it held at its peak, its result included, in bytes above what was held before.

    On CUDA that is the allocator's own account. On Linux it is the process's resident set, whose high-water mark is
    reset before the call; pages that the C library keeps from earlier calls are given back first, as far as it does.
    Elsewhere it is ``None``.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    # Large blocks are mapped and unmapped by themselves; this is for what was freed in the heap.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, KeyError):
        return call(), None
    result = call()
    return result, max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    rows = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


def available_bytes(device: torch.device) -> int:
    """Memory that could be filled now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return min(int(line.split()[1]) * 1024, _group_limit())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _group_limit() -> int:
    """Memory that the control group of a container allows, or more than there is."""
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return 1 << 62
