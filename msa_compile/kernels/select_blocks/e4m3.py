"""Index keys of a byte a number: the op `msa::to_e4m3`, and how its bytes are read again.

The bytes are e4m3 (4 bits of exponent, 3 of mantissa) without a scale. An index branch ends in a norm, so its keys have
the length of their gain, and a number of them lies far inside of what e4m3 reaches: 2**-9 to 448. They are held as
uint8, because a cache is written by `cat`, `index_copy_` and the like, which torch has for uint8 on every device. An op
of its own, because what a compiler makes of a cast to e4m3 runs on a GPU from compute capability 8.9 only.
"""

import torch
from torch import Tensor

from msa_compile.kernels.register import register

_LARGEST = 448.0
# Both bytes whose lower bits are these are NaN.
_NAN = 0x7F


def to_e4m3(numbers: Tensor) -> Tensor:
    """Round numbers to e4m3, the nearest, ties to even; what is larger becomes 448, and NaN stays NaN.

    Args:
        numbers: `[B, 1, T, D]` floating point.

    Returns:
        The bytes, uint8 `[B, 1, T, D]`, contiguous. No gradient.
    """
    bits: Tensor = torch.ops.msa.to_e4m3(numbers)
    return bits


def from_e4m3(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of bytes, exactly."""
    return bits.view(torch.float8_e4m3fn).to(dtype)


def is_nan(keys: Tensor) -> Tensor:
    """Say which numbers are NaN, of index keys in any dtype that they are held in."""
    return (keys & _NAN) == _NAN if keys.dtype == torch.uint8 else keys.isnan()


def nan_in(dtype: torch.dtype) -> float:
    """Return what fills index keys of `dtype` with NaN."""
    return _NAN if dtype == torch.uint8 else torch.nan


def _run(numbers: Tensor) -> Tensor:
    rounded = numbers.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return rounded.contiguous().view(torch.uint8)


def _fake(numbers: Tensor) -> Tensor:
    return numbers.new_empty(numbers.shape, dtype=torch.uint8)


register("to_e4m3", cpu=_run, cuda=_run, fake=_fake)
