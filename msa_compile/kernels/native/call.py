"""What a call of a kernel needs to know of tensors."""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.native.build import is_available, load

# As the kernels number them.
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Multiplications that a thread should have at least: some microseconds.
_WORK = 1 << 18


def holds(name: str, dtype: torch.dtype) -> bool:
    """Return whether the kernel of `<name>.cpp` takes `dtype`, and is there on this machine."""
    return dtype in _NUMBERS and is_available(name)


def run(name: str, call: bytes) -> None:
    """Run the kernel of `<name>.cpp` on what `call` describes: the bytes of the C++ struct.

    Raises:
        MemoryError: there is not enough for its workspace.
        KernelBuildError: as `load` says.
    """
    kernel = _kernels.get(name)
    if kernel is None:
        kernel = _kernels[name] = load(name)[f"msa_{name}"]
        kernel.argtypes, kernel.restype = [ctypes.c_char_p], ctypes.c_int
    if not kernel(call):
        raise MemoryError(f"{name}: no memory for the workspace of the kernel")


_kernels: dict[str, Any] = {}


def dtype_number(dtype: torch.dtype) -> int:
    """Return the number that the kernels know `dtype` by."""
    return _NUMBERS[dtype]


def readable(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy of it, with the numbers of a row side by side."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def byte_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides, in bytes, of all dimensions but the last of four."""
    size = tensor.element_size()
    first, second, third, _ = tensor.stride()
    return first * size, second * size, third * size


def threads_for(work: float) -> int:
    """Return how many threads so many multiplications are worth."""
    return 1 if _is_forked else max(1, min(torch.get_num_threads(), int(work) // _WORK))


# Threads of OpenMP do not survive a fork, and a child that calls for them waits for ever.
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
