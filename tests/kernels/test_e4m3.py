"""Index keys of a byte a number: how they are rounded and read, and that they select as the numbers that they are."""

import kernel_laws as laws
import oracle
import pytest
import torch
from kernel_laws import make_case
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels import select_blocks
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3, is_nan, nan_in, to_e4m3
from msa_compile.kernels.select_blocks.fresh import sees_unwritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_rounded_to_the_nearest_and_cut_at_the_largest(dtype: torch.dtype) -> None:
    numbers = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    found = from_e4m3(to_e4m3(numbers), torch.float64)
    # Scaled to between 128 and 256 by the oracle, where the first number of a row is 128.
    expected = [oracle._to_e4m3([128.0, number])[1] for number in numbers.double().flatten().tolist()]
    assert found.flatten().tolist() == expected
    for number, rounded in ((448.1, 448.0), (-1e4, -448.0), (torch.inf, 448.0), (0.0, 0.0)):
        given = torch.full((1, 1, 1, 1), number, dtype=dtype)
        assert from_e4m3(to_e4m3(given), torch.float32).item() == rounded


def test_nan_stays_nan_and_is_found() -> None:
    given = torch.tensor([1.0, torch.nan, -3.0]).view(1, 1, 3, 1)
    assert is_nan(to_e4m3(given)).flatten().tolist() == is_nan(given).flatten().tolist() == [False, True, False]
    for dtype in (torch.uint8, torch.bfloat16):
        assert is_nan(torch.full((2,), nan_in(dtype), dtype=dtype)).all()
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(is_nan(every), every.view(torch.float8_e4m3fn).float().isnan())


@pytest.mark.parametrize("query_length", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_select_as_the_numbers_that_they_are(query_length: int, dtype: torch.dtype) -> None:
    case = make_case(queries=query_length, keys=63, dtype=dtype)
    key = torch.randn(case.index_key.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = to_e4m3(key)
    for candidates in (0, 4):
        options = {"block_size": 8, "topk": 3, "candidates": candidates}
        found = select_blocks(case.index_query, bits, **options)
        laws.assert_equal(found, select_blocks(case.index_query, from_e4m3(bits, dtype), **options))


def test_a_slot_that_was_not_written_is_seen_in_bytes_too() -> None:
    bits = to_e4m3(torch.ones(1, 1, 9, 4))
    bits[:, :, 7:] = int(nan_in(torch.uint8))

    def sees(**bounds: Tensor | None) -> bool:
        nothing = dict.fromkeys(("query_start", "key_start", "key_end", "document_start", "mask"))
        return sees_unwritten(bits, 3, **(nothing | bounds), is_causal=True)

    assert sees()
    assert not sees(key_end=torch.tensor([7]))
    assert not sees(query_start=torch.tensor([4]))


def test_other_integers_are_refused() -> None:
    case = make_case()
    with pytest.raises(KernelArgumentError, match=r"^index_key: found dtype torch.int8; legal are torch.float32"):
        select_blocks(case.index_query, case.index_key.to(torch.int8), block_size=8, topk=3)


def test_opcheck() -> None:
    numbers = torch.randn(2, 5, 1, 4, requires_grad=True).transpose(1, 2)
    torch.library.opcheck(torch.ops.msa.to_e4m3.default, (numbers,))
    case = make_case(queries=20)
    arguments = (case.index_query, to_e4m3(case.index_key), 8, 3)
    torch.library.opcheck(torch.ops.msa.select_blocks.default, arguments)
