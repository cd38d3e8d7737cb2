"""What a kernel's tiles are chosen by: the GPU it runs on, or the one that it is compiled for without running."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

# Bytes of shared memory that the compiler takes for itself, at most; the compile gate checks the sum.
_RESERVED = 2048


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of NVIDIA GPU.

    Args:
        capability: compute capability, 90 for Hopper.
        shared_memory: bytes of shared memory that one program may ask for.
        processors: multiprocessors, which a grid has to fill.
    """

    capability: int
    shared_memory: int
    processors: int

    @property
    def has_large_tiles(self) -> bool:
        """Whether four warps share a product with operands in shared memory: Hopper and data-centre Blackwell."""
        return self.capability in (90, 100, 103)

    def fits(self, shared: int) -> bool:
        """Whether a program may have `shared` bytes of tiles in shared memory, and what the compiler adds."""
        return shared <= self.shared_memory - _RESERVED


# The chips that the compile gate knows; a GPU at hand tells its own numbers.
CHIPS = {
    chip.capability: chip
    for chip in (
        Chip(80, 166_912, 108),
        Chip(86, 101_376, 84),
        Chip(89, 101_376, 128),
        Chip(90, 232_448, 132),
        Chip(100, 232_448, 148),
    )
}


def chip_of(device: torch.device) -> Chip:
    """Return the chip of a CUDA device; elsewhere kernels are interpreted, with the tiles of Hopper."""
    return _chip_of_cuda(device) if device.type == "cuda" else CHIPS[90]


@functools.cache
def _chip_of_cuda(device: torch.device) -> Chip:
    # Typed as Any: the stubs of torch leave out what one program may ask for.
    found: Any = torch.cuda.get_device_properties(device)
    return Chip(found.major * 10 + found.minor, found.shared_memory_per_block_optin, found.multi_processor_count)
