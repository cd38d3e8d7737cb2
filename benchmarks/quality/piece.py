"""A run in pieces: each ends when its time is up, and the next goes on where it ended."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path


class TimeIsUp(Exception):
    """The time of this piece is over; everything that was done is kept."""


class Piece:
    """One piece of a run.

    Args:
        seconds: Its time; default no end.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise `TimeIsUp` when it is."""
        if time.monotonic() > self._end:
            raise TimeIsUp


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
