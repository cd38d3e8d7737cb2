"""Canaries of the interpreter itself: what `interpreter.py` mends stays mended, and the memory is poisoned."""

import interpreter  # noqa: F401  # skips this file in other processes
import pytest
import torch
import triton
import triton.language as tl

from msa_compile.kernels.triton_rows import INTERPRETED, product


@triton.jit
def _multiply(left, right, out, cast, BY_OURS: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a = tl.load(left + row * 16 + column)
    b = tl.load(right + row * 16 + column)
    result = product(a, b) if BY_OURS else tl.dot(a, b)
    tl.store(out + row * 16 + column, result)
    tl.store(cast + row * 16 + column, result.to(tl.bfloat16))


@pytest.mark.parametrize("by_ours", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_and_casts_are_those_of_torch(dtype: torch.dtype, by_ours: bool) -> None:
    assert INTERPRETED.value
    left, right = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, cast = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    _multiply[(1,)](left, right, out, cast, BY_OURS=by_ours)
    torch.testing.assert_close(out, left.float() @ right.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(cast, out.to(torch.bfloat16))


def test_a_cast_to_bfloat16_rounds_to_even() -> None:
    numbers = torch.zeros(16, 16)
    # Halfway between two neighbours, just above it, denormal, infinite, NaN.
    numbers[0, :6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1e-40, torch.inf, torch.nan])
    out, cast = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    numbers[1:, 1:] = 0
    _multiply[(1,)](torch.eye(16), numbers.nan_to_num(posinf=0), out, cast, BY_OURS=True)
    assert torch.equal(cast, numbers.nan_to_num(posinf=0).to(torch.bfloat16))
