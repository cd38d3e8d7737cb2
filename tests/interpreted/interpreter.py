"""Triton's interpreter, made fit for bfloat16 and e4m3: kernels run as numpy on the CPU, in a process of their own.

Whether a kernel is interpreted is decided when it is imported, so everything here is skipped unless TRITON_INTERPRET=1
was set from the start; `make test` does that. As it comes the interpreter cuts float32 to bfloat16 instead of rounding,
multiplies the bit patterns of bfloat16 matrices, and takes e4m3's NaN for a number. The second our kernels avoid by
themselves; all are mended here, and a canary in `test_interpreter.py` says when that stops holding.
"""

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start of the process; make test sets it", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def _convert_rounding(data: Any, of: Any, to: Any, rounding_mode: Any) -> Any:
    if of == tl.float32 and to == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if of == tl.float32 and to == tl.float8e4nv:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy().reshape(data.shape)
    if of == tl.float8e4nv and to == tl.float32:
        exact = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn).to(torch.float32)
        return exact.numpy().view(np.uint32).reshape(data.shape)
    return _convert(data, of, to, rounding_mode)


def _dot_of_numbers(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _dot(self, *(_as_float32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), d, *rest)


def _as_float32(handle: Any) -> Any:
    numbers = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(numbers, tl.float32)


interpreter._convert_float = _convert_rounding
interpreter.InterpreterBuilder.create_dot = _dot_of_numbers
