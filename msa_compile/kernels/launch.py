"""A launch of a Triton kernel as a value: run on a GPU, or compiled without one by the gate.

Both read the same launches, so what is checked is what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is compiled.

    Args:
        sizes: constants of the kernel by name.
        warps: warps of a program.
        stages: iterations of the loop over keys that are loaded ahead.
    """

    sizes: Mapping[str, int]
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel.

    Args:
        kernel: the `triton.jit` function.
        grid: programs, of shapes alone: no value of a tensor is read on the host.
        arguments: everything but the sizes of the tile, by name.
        tile: how it is compiled.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    tile: Tile

    def run(self) -> None:
        """Enqueue the kernel on the current stream."""
        self.kernel[self.grid](
            **self.arguments, **self.tile.sizes, num_warps=self.tile.warps, num_stages=self.tile.stages
        )


def power_of_two_from(value: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `value` and `least`."""
    return max(least, 1 << (value - 1).bit_length())


def divide_up(value: int, by: int) -> int:
    """Return `value / by`, rounded up."""
    return -(-value // by)
