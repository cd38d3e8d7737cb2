"""Scores of e4m3 and candidates that are scored again: the reference against the oracle, and when the op uses them."""

from dataclasses import replace
from typing import Any

import kernel_laws as laws
import oracle
import pytest
import torch
from kernel_laws import Case, Implementation, make_case
from test_kernel_laws import documents, holes
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.select_blocks import cuda, reference

OPS = Implementation(select_blocks, block_sparse_attention)
CHOOSE = {"candidates": 4}


@pytest.mark.parametrize(
    "case",
    [
        make_case(choose=CHOOSE),
        make_case(choose=CHOOSE, shared_index_key=False, bounds={"key_start": torch.tensor([5, 0])}),
        make_case(choose={**CHOOSE, "sink_blocks": 1}, bounds={"document_start": documents(2, 63, 9)}),
        make_case(choose=CHOOSE, queries=30, keys=63, bounds={"mask": holes(2, 2, 30, 63)}),
    ],
    ids=["plain", "padding", "documents", "mask"],
)
def test_ids_equal_the_float64_oracle(case: Case) -> None:
    # Not the integers of the case, which e4m3 holds; in float64, so that rounding alone makes the difference.
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(t.shape, generator=generator).double() for t in (case.index_query, case.index_key))
    case = replace(case, index_query=query, index_key=key)
    laws.check_equals_oracle(OPS, case)


def test_e4m3_finds_other_blocks_than_exact_scores_do_and_more_candidates_find_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 400, 16, generator=generator)
    options: dict[str, Any] = {"block_size": 4, "topk": 4}
    exact = select_blocks(query, key, **options)
    differing = []
    for candidates in (4, 5, 8):
        found = select_blocks(query, key, candidates=candidates, **options)
        differing.append(int((found != exact).any(-1).sum()))
    assert differing[0] > differing[1] > differing[2] == 0


@pytest.mark.parametrize("row", [[0.0, 0.0], [1.0, 2.0**-20], [1e30, -3e29], [5e-30, 1e-31], [448.0, 449.0]], ids=str)
def test_rounding_is_that_of_the_oracle(row: list[float]) -> None:
    found = reference.round_to_e4m3(torch.tensor([row], dtype=torch.float64))
    assert found[0].tolist() == pytest.approx(oracle._to_e4m3(row), rel=1e-12)


def test_numbers_of_e4m3_come_back_unchanged_and_a_row_that_is_not_finite_is_nan() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    # The largest is halved, so the smallest that 3 bits of mantissa are left to is twice that of e4m3.
    every = every[every.abs() >= 2.0**-5]
    assert torch.equal(reference.round_to_e4m3(every[None] * 2.0**11), every[None] * 2.0**11)
    for broken in (torch.inf, -torch.inf, torch.nan):
        assert reference.round_to_e4m3(torch.tensor([[1.0, broken], [1.0, 2.0]])).isnan().tolist() == [
            [True, True],
            [False, False],
        ]


@pytest.mark.parametrize(("queries", "keys"), [(16, 400), (60, 64)], ids=["few queries", "few blocks"])
def test_a_call_that_gains_nothing_is_scored_exactly(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(queries=queries, keys=keys, topk=3)
    exact = laws.select(OPS, case)

    def refuse(*tensors: Tensor, **options: Any) -> Tensor:
        raise AssertionError("scored twice")

    monkeypatch.setattr(reference, "select_blocks", refuse)
    laws.assert_equal(laws.select(OPS, replace(case, choose={"candidates": 8})), exact)
    with pytest.raises(AssertionError, match="scored twice"):
        laws.select(OPS, make_case(queries=17, keys=65, choose={"candidates": 8}))


def test_fewer_candidates_than_places_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match=r"^candidates: found 2; legal are 0 and integers from 3"):
        laws.select(OPS, make_case(choose={"candidates": 2}))


def test_a_gpu_that_cannot_multiply_e4m3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    said = "products of e4m3 need compute capability 8.9, and cuda:0 has 8.0"
    monkeypatch.setattr(cuda, "why_no_e4m3", lambda device: said)
    case = make_case()
    with pytest.raises(KernelArgumentError, match=f'found "fp8"; legal is "exact" here: {said}'):
        cuda.select_blocks(case.index_query, case.index_key, block_size=8, topk=3, candidates=4)


def test_opcheck() -> None:
    case = make_case(queries=20, keys=80)
    arguments = (case.index_query.requires_grad_(), case.index_key, 8, 3)
    torch.library.opcheck(torch.ops.msa.select_blocks.default, arguments, CHOOSE)
