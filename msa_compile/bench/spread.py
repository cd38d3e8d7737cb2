"""Repeated times of calls that are compared, and what they come to: medians, quartiles, paired ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from msa_compile.kernels.stopwatch import interleaved_seconds, seconds_of


@dataclass(frozen=True)
class Spread:
    """The middle half of repeated values.

    Attributes:
        median, low, high: The quartiles; ``low`` and ``high`` are the ends of the interquartile range.
        runs: How many values; 0 for one that was extrapolated and not measured.
    """

    median: float
    low: float
    high: float
    runs: int

    @property
    def is_extrapolated(self) -> bool:
        """Whether nothing was measured."""
        return self.runs == 0


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles of one or more values."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], len(values))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def extrapolated(value: float) -> Spread:
    """A value that was not measured."""
    return Spread(value, value, value, 0)


@dataclass(frozen=True)
class Rounds:
    """Seconds of calls that took turns; one entry a round, in the order of ``names``."""

    names: tuple[str, ...]
    seconds: tuple[tuple[float, ...], ...]

    def of(self, name: str) -> Spread:
        """The times of one call."""
        place = self.names.index(name)
        return spread_of([taken[place] for taken in self.seconds])

    def ratio(self, above: str, below: str) -> Spread:
        """How many times longer ``above`` takes than ``below``, from the ratios within each round."""
        top, bottom = self.names.index(above), self.names.index(below)
        return spread_of([taken[top] / taken[bottom] for taken in self.seconds])


def take_rounds(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 3,
    most: int = 15,
    in_a_row: int = 1,
) -> Rounds:
    """Time calls in turns, as often as fits.

    Args:
        calls: What to time; each has run before.
        device: Where they run.
        seconds: Time to fill. Fewer than ``least`` rounds are taken only where one alone takes longer.
        least: Fewest rounds.
        most: Most rounds.
        in_a_row: Calls of a turn; their mean is what counts.
    """
    functions = [_repeat(call, in_a_row) for call in calls.values()]
    first = tuple(seconds_of(call, device) for call in functions)
    once = sum(first)
    rounds = 1 if once > seconds else min(most, max(least, int(seconds / max(once, 1e-9))))
    taken = (first, *interleaved_seconds(functions, device, rounds - 1))
    return Rounds(tuple(calls), tuple(tuple(seconds / in_a_row for seconds in turn) for turn in taken))


def _repeat(call: Callable[[], object], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls
