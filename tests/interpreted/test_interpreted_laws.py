"""The laws of DESIGN.md 3 on the Triton kernels, against the float64 oracle: masks, padding, documents, poison."""

from dataclasses import replace

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import pytest
import torch
from kernel_laws import Case, Implementation, make_case
from test_kernel_laws import CASES, documents, holes

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import triton as attention
from msa_compile.kernels.block_sparse_attention import triton_arguments
from msa_compile.kernels.chip import CHIPS
from msa_compile.kernels.select_blocks import triton as selection

OPS = Implementation(select_blocks, block_sparse_attention)

ALL_BOUNDS = {
    "query_start": torch.tensor([34, 20]),
    "key_start": torch.tensor([4, 0]),
    "key_end": torch.tensor([63, 47]),
    "document_start": documents(2, 29, 9),
    "mask": holes(2, 1, 29, 63),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ids_and_output_equal_the_float64_oracle(case: Case) -> None:
    laws.check_equals_oracle(OPS, case)


FEW = {
    "one query": make_case(queries=1, keys=63, attend={"sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0])}),
    "three queries, everything": make_case(
        queries=3,
        keys=63,
        topk=4,
        choose={"sink_blocks": 1},
        attend={"window": 40, "softcap": 1.5, "sinks": torch.ones(4), "scale": -0.3},
        bounds={
            "query_start": torch.tensor([60, 20]),
            "key_start": torch.tensor([4, 0]),
            "key_end": torch.tensor([63, 47]),
            "document_start": documents(2, 3, 1),
            "mask": holes(2, 2, 3, 63),
        },
    ),
    "sixteen queries, blocks of 32, three heads a group": make_case(
        queries=16, keys=200, block_size=32, heads_a_group=3, shared_index_key=False
    ),
    "not causal": make_case(queries=40, keys=20, bounds={"is_causal": False, "query_start": torch.tensor([-7, 5])}),
    "blocks larger than a tile": make_case(batch=1, queries=300, block_size=150, topk=2, heads_a_group=1, groups=1),
}


@pytest.mark.parametrize("case", FEW.values(), ids=FEW.keys())
def test_few_queries_and_odd_blocks_equal_the_float64_oracle(case: Case) -> None:
    laws.check_equals_oracle(OPS, case)


@pytest.mark.parametrize("capability", [80, 86])
def test_tiles_of_other_chips_equal_the_float64_oracle(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (selection, attention):
        monkeypatch.setattr(module, "chip_of", lambda device: CHIPS[capability])
    laws.check_equals_oracle(OPS, make_case(bounds={"mask": holes(2, 2, 63, 63)}))


def test_queries_in_chunks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(queries=70, heads_a_group=4, bounds={"document_start": documents(2, 70, 13, 40)})
    ids, output = laws.both(OPS, case)
    monkeypatch.setattr(selection, "_WORKSPACE", 2 * 2 * 9 * 40)
    monkeypatch.setattr(triton_arguments, "_WORKSPACE", 2 * 2 * 32 * 4)
    in_chunks, output_in_chunks = laws.both(OPS, case)
    laws.assert_equal(in_chunks, ids)
    laws.assert_equal(output_in_chunks, output)


def test_enough_blocks_give_dense_attention() -> None:
    laws.check_equals_dense(OPS, 100, 16)


def test_pieces_equal_one_shot() -> None:
    laws.check_pieces_equal_one_shot(OPS, make_case(attend={"window": 11, "softcap": 2.0}), [37, 8, 1, 17])


def test_padding_changes_nothing() -> None:
    everything = make_case(choose={"sink_blocks": 1}, attend={"window": 30, "sinks": torch.ones(4)})
    laws.check_padding_changes_nothing(OPS, everything, before=5, after=11)


@pytest.mark.parametrize("change", [float("nan"), float("inf")])
def test_the_future_has_no_influence(change: float) -> None:
    laws.check_future_has_no_influence(OPS, make_case(queries=31, batch=1, groups=1, topk=2), change=change)


def test_nothing_visible_gives_zeros() -> None:
    laws.check_nothing_visible_gives_zeros(OPS)


@pytest.mark.parametrize("queries", [20, 2])
def test_a_value_that_is_not_finite_reaches_those_who_see_it_and_nobody_else(queries: int) -> None:
    case = make_case(batch=1, groups=1, queries=queries, keys=20, block_size=4, topk=2)
    case.value[0, 0, 19, 3], case.key[0, 0, 2] = float("nan"), float("inf")
    ids, output = laws.both(OPS, case)
    sees_key = (ids[0, 0] == 0).any(-1) & (torch.arange(20 - queries, 20) >= 2)
    expected = torch.zeros(queries, 8, dtype=torch.bool)
    expected[sees_key] = True
    expected[-1, 3] = True
    assert torch.equal(output[0, 0].isnan(), expected)


@pytest.mark.parametrize("queries", [29, 2])
def test_two_runs_give_the_same_bits(queries: int) -> None:
    bounds = ALL_BOUNDS if queries == 29 else {}
    case = make_case(queries=queries, keys=63, topk=4, bounds=bounds, dtype=torch.bfloat16)
    for first, second in zip(laws.both(OPS, case), laws.both(OPS, case), strict=True):
        laws.assert_equal(first, second)


def test_infinite_and_nan_scores_keep_their_places() -> None:
    case = make_case(batch=1, groups=1, queries=24, block_size=4, topk=3)
    key = case.index_key.abs() + 1
    query = torch.ones_like(case.index_query)
    key[0, 0, 1], key[0, 0, 6], key[0, 0, 9] = float("inf"), float("nan"), -float("inf")
    laws.check_equals_oracle(OPS, replace(case, index_query=query, index_key=key))
