"""Index keys of a byte a number in the Triton kernels: every byte, few queries that read them, many that do not."""

from typing import Any

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import pytest
import torch
from kernel_laws import Case, make_case
from test_kernel_laws import documents, holes

from msa_compile.kernels.select_blocks import cuda, reference
from msa_compile.kernels.select_blocks import triton as selection
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3, to_e4m3

EVERYTHING = {
    "query_start": torch.tensor([60, 20]),
    "key_start": torch.tensor([4, 0]),
    "key_end": torch.tensor([63, 47]),
    "document_start": documents(2, 3, 1),
    "mask": holes(2, 2, 3, 63),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_is_the_number_that_torch_says(dtype: torch.dtype) -> None:
    # One key a block, one channel: the block score is the number, and the order of the blocks that of the numbers.
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = from_e4m3(bits, torch.float32)
    bits = bits[numbers.argsort(descending=True, stable=True)].view(1, 1, -1, 1)
    query = torch.ones(1, 1, 1, 1, dtype=dtype)
    scores = _scores(query, bits, block_size=1)
    expected = from_e4m3(bits, torch.float32).flatten().nan_to_num(nan=-torch.finfo(torch.float32).max)
    assert torch.equal(scores.flatten(), expected)


def _scores(query: torch.Tensor, bits: torch.Tensor, block_size: int) -> torch.Tensor:
    nothing: dict[str, Any] = dict.fromkeys(("query_start", "key_start", "key_end", "document_start", "mask"))
    ids = torch.empty(*query.shape[:3], 4, dtype=torch.int32)
    chip = selection.chip_of(query.device)
    bounds = {**nothing, "is_causal": True, "chip": chip, "local_blocks": 1, "sink_blocks": 0}
    launch = next(selection.find_launches(query, bits, ids, block_size=block_size, **bounds))
    assert launch.arguments["index_key"].dtype == torch.uint8
    launch.run()
    scores: torch.Tensor = launch.arguments["scores"]
    return scores


@pytest.mark.parametrize(
    "case",
    [
        make_case(queries=1, keys=63, dtype=torch.bfloat16),
        make_case(queries=3, keys=63, topk=4, width=40, choose={"sink_blocks": 1}, bounds=EVERYTHING),
        make_case(batch=1, queries=20, keys=63, dtype=torch.float16),
        make_case(batch=1, queries=20, keys=63, choose={"candidates": 4}),
    ],
    ids=["one query", "three queries, everything", "many queries", "many queries and candidates"],
)
def test_ids_equal_those_of_the_numbers_in_float64(case: Case) -> None:
    key = torch.randn(case.index_key.shape, generator=torch.Generator().manual_seed(0))
    bits = to_e4m3(key)
    options = {"block_size": case.block_size, "topk": case.topk, **case.choose, **case.bounds}
    expected = reference.select_blocks(case.index_query.double(), from_e4m3(bits, torch.float64), **options)
    laws.assert_equal(cuda.select_blocks(case.index_query, bits, **options), expected)
