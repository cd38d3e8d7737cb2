"""Scores of e4m3 and candidates that are scored again, by the Triton kernels: against the oracle, and the reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import oracle
import pytest
import torch
from kernel_laws import Case, make_case
from test_kernel_laws import documents, holes
from torch import Tensor

from msa_compile.kernels.chip import CHIPS
from msa_compile.kernels.launch import Launch
from msa_compile.kernels.select_blocks import cuda, reference
from msa_compile.kernels.select_blocks import triton as selection

CASES = {
    "plain": make_case(queries=27, keys=63, choose={"candidates": 4}),
    "everything": make_case(
        queries=29,
        keys=63,
        topk=4,
        block_size=5,
        choose={"candidates": 5, "sink_blocks": 1, "local_blocks": 2},
        bounds={
            "query_start": torch.tensor([34, 20]),
            "key_start": torch.tensor([4, 0]),
            "key_end": torch.tensor([63, 47]),
            "document_start": documents(2, 29, 9),
            "mask": holes(2, 1, 29, 63),
        },
    ),
    "three groups with keys of their own, one row": make_case(
        batch=1, groups=3, queries=37, keys=90, shared_index_key=False, choose={"candidates": 3}
    ),
    "blocks larger than a tile": make_case(
        batch=1, groups=1, queries=20, keys=500, block_size=150, topk=2, choose={"candidates": 2}
    ),
}


def select(case: Case, run: Callable[..., Tensor] = cuda.select_blocks, **changed: Any) -> Tensor:
    options = {"block_size": case.block_size, "topk": case.topk, **case.choose, **case.bounds, **changed}
    return run(case.index_query, case.index_key, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ids_equal_the_float64_oracle(case: Case) -> None:
    found = select(case)
    laws.assert_ids_are_well_formed(found)
    laws.assert_equal(found, select(case, oracle.select_blocks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_halves_of_odd_width_equal_the_reference(dtype: torch.dtype) -> None:
    case = make_case(batch=1, queries=70, keys=161, width=40, block_size=16, choose={"candidates": 5}, dtype=dtype)
    exact = replace(case, index_query=case.index_query.double(), index_key=case.index_key.double())
    laws.assert_equal(select(case), select(exact, reference.select_blocks))


def test_a_block_that_e4m3_ranks_too_low_is_missed_and_one_that_ties_is_not() -> None:
    # Scores 17, 17.5, 16 and 19 a block: e4m3 has 18, 18, 16 and 20, for steps of 2 from 16 on.
    keys = torch.tensor([16.0, 17.0, 17.4, 19.0, 0.0]).view(1, 1, -1, 1).repeat_interleave(8, 2)
    case = make_case(batch=1, groups=1, queries=40, topk=2, choose={"candidates": 3})
    case = replace(case, index_query=torch.ones(1, 1, 40, 1), index_key=keys)
    assert select(case)[0, 0, -1].tolist() == [3, 4]
    assert select(case, topk=3)[0, 0, -1].tolist() == [2, 3, 4]


def test_chunks_of_queries_and_other_chips_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=1, queries=20, keys=63, choose={"candidates": 4})
    whole = select(case)
    monkeypatch.setattr(selection, "_WORKSPACE", 2 * 8 * 13)
    monkeypatch.setattr(selection, "chip_of", lambda device: CHIPS[89])
    laws.assert_equal(select(case), whole)


def test_the_future_has_no_influence_and_neither_has_what_is_not_finite() -> None:
    case = make_case(batch=1, queries=20, keys=43, topk=2, choose={"candidates": 3})
    before = select(case)
    poisoned = case.index_key.clone()
    poisoned[:, :, 36:] = float("nan")
    after = select(replace(case, index_key=poisoned))
    laws.assert_equal(after[:, :, :13], before[:, :, :13])
    case.index_key[:, :, 5], case.index_key[:, :, 20] = float("inf"), float("nan")
    case.index_query[:, :, 17] = -float("inf")
    laws.assert_equal(select(case), select(case, reference.select_blocks))


def test_kernels_run_in_their_order_and_only_blocks_that_are_wanted_are_scored_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[Launch] = []
    run = selection.Launch.run
    monkeypatch.setattr(selection.Launch, "run", lambda launch: ran.append(launch) or run(launch))
    select(make_case(batch=1, groups=1, queries=17, keys=300, choose={"candidates": 3}))
    names = [launch.kernel.__name__ for launch in ran]
    chunk = ["score_blocks", "keep_candidates", "list_candidates", "rescore_blocks", "choose_blocks"]
    assert names == ["round_keys", *chunk]
    counts = ran[4].arguments["counts"]
    assert 3 <= int(counts[0]) < 38
