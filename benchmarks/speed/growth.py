"""How time and memory grow with the length: fitted exponents, and what a longer call would take."""

from __future__ import annotations

import math
from collections.abc import Sequence


def fit_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent ``e`` of ``value = c * length ** e``, by least squares in a log-log plot.

    Args:
        points: Length and value; those with a value of 0 are left out.

    Returns:
        ``None`` with fewer than two different lengths.
    """
    logs = [(math.log(length), math.log(value)) for length, value in points if value > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)


def extrapolate(measured: Sequence[tuple[int, float]], length: int, power: int) -> float:
    """The value at ``length``, from the longest that was measured and growth with ``length ** power``."""
    longest, value = max(measured)
    return value * (length / longest) ** power
