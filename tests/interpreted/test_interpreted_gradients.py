"""Gradients by the Triton kernels: laws against the float64 oracle, dtypes, poison, chunks, and the same bits twice."""

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import pytest
import torch
from kernel_laws import Case, Implementation, make_case
from test_block_sparse_attention import test_poisoned_memory_never_reaches_output_or_gradients as poisoned_memory
from test_kernel_laws import CASES, documents
from torch import Tensor

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import (
    reference,
    triton_arguments,
    triton_backward,
    triton_turn,
)
from msa_compile.kernels.chip import CHIPS

OPS = Implementation(select_blocks, block_sparse_attention)

NAMES = (
    "one head a group",
    "documents behind padding",
    "everything",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "plain 100, three heads a group",
            "more places than blocks",
            "mask with holes behind padding",
            "ragged right padding",
            "queries before and after the keys",
            "block of one",
        )
    ),
)


@pytest.fixture(autouse=True)
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the reference away from the ops: what runs here are kernels."""
    monkeypatch.setattr(reference, "block_sparse_attention_backward", None)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_float64_oracle(name: str) -> None:
    laws.check_gradients_equal_oracle(OPS, CASES[name])


@pytest.mark.slow
def test_poisoned_memory_never_reaches_output_or_gradients() -> None:
    poisoned_memory()


@pytest.mark.slow
def test_a_block_that_everybody_selects_is_cut_into_items() -> None:
    case = make_case(batch=1, groups=1, queries=90, block_size=8, topk=2, choose={"sink_blocks": 1})
    laws.check_gradients_equal_oracle(OPS, case)


def _gradients(case: Case, ids: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = block_sparse_attention(*leaves, ids, block_size=case.block_size, **case.attend, **case.bounds)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad(output, leaves, grad)


# Slopes are rounded once before they meet the keys, and so are the weights before they meet the gradients.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    ("heads_a_group", "width", "dtype", "capability"),
    [
        (16, 128, torch.bfloat16, 90),
        (4, 64, torch.bfloat16, 80),
        (2, 256, torch.bfloat16, 90),
        (5, 40, torch.float16, 86),
    ],
    ids=str,
)
def test_halves_agree_with_float64(
    heads_a_group: int, width: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backward, "chip_of", lambda device: CHIPS[capability])
    case = make_case(
        batch=1, heads_a_group=heads_a_group, queries=70, keys=101, width=width, block_size=32, topk=2, dtype=dtype
    )
    ids = laws.select(OPS, case)
    found = _gradients(case, ids)
    leaves = [tensor.double().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = reference.block_sparse_attention(*leaves, ids, block_size=32)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for one, other in zip(found, torch.autograd.grad(output, leaves, grad.double()), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


def test_two_runs_and_chunks_give_gradients_of_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=1, queries=50, heads_a_group=4, bounds={"document_start": documents(1, 50, 13, 40)})
    ids = laws.select(OPS, case)
    first, again = _gradients(case, ids), _gradients(case, ids)
    monkeypatch.setattr(triton_arguments, "_WORKSPACE", 2 * 32 * 4)
    monkeypatch.setattr(triton_turn, "_WORDS", 2 * 7)
    in_chunks = _gradients(case, ids)
    for one, other, chunked in zip(first, again, in_chunks, strict=True):
        laws.assert_equal(one, other)
        laws.assert_close(one, chunked, 1e-5)
    laws.assert_equal(first[0], in_chunks[0])


def test_a_key_that_is_not_finite_reaches_the_gradients_of_those_who_see_it_alone() -> None:
    case = make_case(batch=1, groups=1, queries=20, block_size=4, topk=2)
    case.key[0, 0, 18] = float("nan")
    ids = laws.select(OPS, case)
    of_query, of_key, of_value = _gradients(case, ids)
    sees = (ids[0, 0] == 4).any(-1) & (torch.arange(20) >= 18)
    assert torch.equal(of_query[0, 0].isnan().any(-1), sees)
    reached = torch.zeros(20, dtype=torch.bool)
    for query in (18, 19):
        reached |= torch.isin(torch.arange(20) // 4, ids[0, 0, query]) & (torch.arange(20) <= query)
    assert torch.equal(of_key[0, 0].isnan().any(-1), reached)
    assert torch.equal(of_value[0, 0].isnan().any(-1), reached)
