"""Concrete sizes for symbolic shapes: what a proof runs at, always inside the guards of the graph it proves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

import sympy
import torch

from msa_compile.passes.replay import Sizes, bind

_MOST_COMBINATIONS = 4096


class SizeSpace:
    """The sizes at which one graph may be called."""

    def __init__(self, sizes: Iterable[object]) -> None:
        self._env = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)

    def holds(self, sizes: Sizes) -> bool:
        """Whether the graph's own guards allow ``sizes``."""
        if self._env is None:
            return True
        for symbol, value in sizes.items():
            bounds = self._env.var_to_range.get(symbol)
            if bounds is not None and not (bounds.lower <= value <= bounds.upper):
                return False
        return all(bind(guard.expr, sizes) != sympy.false for guard in self._env.guards)

    def upper_bound(self, size: object) -> int | None:
        """The largest value that the guards allow for a size, when it is bounded."""
        if self._env is None or not isinstance(size, torch.SymInt):
            return None
        bounds = self._env.bound_sympy(size.node.expr)
        return int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**31 else None

    def lower_bounds(self, symbols: Iterable[sympy.Symbol]) -> list[int]:
        """The smallest value that the guards allow for each symbol."""
        if self._env is None:
            return []
        bounds = (self._env.var_to_range.get(symbol) for symbol in symbols)
        return [int(bound.lower) for bound in bounds if bound is not None and bound.is_int and bound.lower > -(2**31)]

    def samples(self, symbols: Iterable[sympy.Symbol], values: Iterable[int], limit: int) -> Iterator[Sizes]:
        """Up to ``limit`` allowed assignments of ``values``: all symbols different first."""
        names = sorted(symbols, key=str)
        combinations = itertools.islice(itertools.product(values, repeat=len(names)), _MOST_COMBINATIONS)
        return self._allowed(names, sorted(combinations, key=lambda entry: -len(set(entry))), limit)

    def spread(self, symbols: Iterable[sympy.Symbol], values: Iterable[int], limit: int) -> Iterator[Sizes]:
        """Up to ``limit`` allowed assignments of ``values``: all symbols equal first, then from all over the space.

        The sizes that the graph was captured at come before all; they are allowed in any case.
        """
        names, pool = sorted(symbols, key=str), list(values)
        known = self.captured(names)
        captured = [known] if known else []
        mixed = list(itertools.islice(itertools.product(pool, repeat=len(names)), _MOST_COMBINATIONS))
        random.Random(0).shuffle(mixed)
        return self._allowed(
            names, dict.fromkeys([*captured, *((v,) * len(names) for v in reversed(pool)), *mixed]), limit
        )

    def captured(self, names: list[sympy.Symbol]) -> tuple[int, ...]:
        """The values that ``names`` had when the graph was captured; ``()`` where one is not known."""
        if self._env is None:
            return ()
        # Renamed in torch 2.13.
        known = getattr(self._env, "backed_var_to_val", None) or getattr(self._env, "var_to_val", {})
        return tuple(int(known[name]) for name in names) if all(name in known for name in names) else ()

    def _allowed(
        self, names: list[sympy.Symbol], combinations: Iterable[tuple[int, ...]], limit: int
    ) -> Iterator[Sizes]:
        sizes = (dict(zip(names, combination, strict=True)) for combination in combinations)
        return itertools.islice((entry for entry in sizes if self.holds(entry)), limit)
