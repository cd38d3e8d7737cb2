"""What only `select_blocks` promises: ties, NaN scores, forced blocks, argument errors, and the op's registrations."""

from typing import Any

import kernel_laws as laws
import pytest
import torch
from kernel_laws import make_case
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels import select_blocks


def one_hot_scores(scores: list[float]) -> tuple[Tensor, Tensor]:
    """Index tensors of one query, the newest, whose token scores are `scores`."""
    return torch.ones(1, 1, 1, 1), torch.tensor(scores, dtype=torch.float32).view(1, 1, -1, 1)


def test_equal_scores_give_the_first_blocks_and_the_local_one() -> None:
    ids = select_blocks(torch.zeros(1, 2, 90, 4), torch.zeros(1, 1, 90, 4), block_size=8, topk=4)
    assert ids[0, 0, -1].tolist() == [0, 1, 2, 11]
    assert ids[0, 1, 30].tolist() == [0, 1, 2, 3]
    assert ids[0, 1, 15].tolist() == [0, 1, -1, -1]


def test_many_equal_scores_keep_the_order_of_ids() -> None:
    ids = select_blocks(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5000, 4), block_size=4, topk=100)
    assert ids.flatten().tolist() == [*range(99), 1249]


def test_the_block_score_is_the_best_visible_token() -> None:
    query, key = one_hot_scores([0, 9, 5, 5, 6, 0, 7, -3, 0])
    assert select_blocks(query, key, block_size=2, topk=3).flatten().tolist() == [0, 3, 4]
    hidden = torch.tensor([True, False, True, True, True, True, True, True, True]).view(1, 1, 1, 9)
    assert select_blocks(query, key, block_size=2, topk=3, mask=hidden).flatten().tolist() == [2, 3, 4]


def test_a_nan_score_is_the_lowest_and_its_block_stays_selectable() -> None:
    nan = float("nan")
    query, key = one_hot_scores([nan, nan, -5, nan, 1, 2, 0, 0])
    assert select_blocks(query, key, block_size=2, topk=2).flatten().tolist() == [2, 3]
    assert select_blocks(query, key, block_size=2, topk=3).flatten().tolist() == [1, 2, 3]
    assert select_blocks(query, key, block_size=2, topk=4).flatten().tolist() == [0, 1, 2, 3]


def test_an_infinite_score_does_not_displace_a_forced_block() -> None:
    inf = float("inf")
    query, key = one_hot_scores([inf, inf, inf, inf, 1, 2, -inf, -inf])
    assert select_blocks(query, key, block_size=2, topk=1).flatten().tolist() == [3]
    assert select_blocks(query, key, block_size=2, topk=2).flatten().tolist() == [0, 3]
    assert select_blocks(query, key, block_size=2, topk=2, local_blocks=2).flatten().tolist() == [2, 3]
    assert select_blocks(query, key, block_size=2, topk=4).flatten().tolist() == [0, 1, 2, 3]


# Scores 256, 257 and 0: bfloat16, with its 8 bits, would make the first two a tie.
CLOSE_QUERY = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
CLOSE_KEY = torch.tensor([[256.0, 0.0], [256.0, 1.0], [0.0, 0.0]]).view(1, 1, 3, 2)


def test_scores_are_compared_in_float32_for_half_precision_inputs() -> None:
    ids = select_blocks(CLOSE_QUERY.bfloat16(), CLOSE_KEY.bfloat16(), block_size=1, topk=2)
    assert ids.flatten().tolist() == [1, 2]


def test_scores_are_compared_in_float64_for_float64_inputs() -> None:
    key = CLOSE_KEY.double() + torch.tensor([2.0**25, 0.0])
    assert select_blocks(CLOSE_QUERY.double(), key, block_size=1, topk=2).flatten().tolist() == [1, 2]


def test_autocast_does_not_round_scores() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = select_blocks(CLOSE_QUERY, CLOSE_KEY, block_size=1, topk=2)
    assert ids.flatten().tolist() == [1, 2]


def test_the_result_is_contiguous_int32_without_gradient_and_as_wide_as_topk() -> None:
    query = torch.randn(2, 5, 2, 8, requires_grad=True).transpose(1, 2)
    ids = select_blocks(query, torch.randn(2, 5, 1, 8, requires_grad=True).transpose(1, 2), block_size=4, topk=7)
    assert ids.shape == (2, 2, 5, 7)
    assert ids.dtype == torch.int32
    assert ids.is_contiguous()
    assert not ids.requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_empty_inputs_give_no_ids(shape: tuple[int, int, int, int]) -> None:
    batch, groups, queries, keys = shape
    ids = select_blocks(torch.ones(batch, groups, queries, 4), torch.ones(batch, 1, keys, 4), block_size=2, topk=3)
    assert ids.shape == (batch, groups, queries, 3)
    assert (ids == -1).all()


def test_strided_inputs_give_the_same_ids() -> None:
    case = make_case()
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (case.index_query, case.index_key)]
    assert not strided[0].is_contiguous()
    laws.assert_equal(
        select_blocks(*strided, block_size=8, topk=3),
        select_blocks(case.index_query, case.index_key, block_size=8, topk=3),
    )


def test_no_work_is_done_up_to_dense_below() -> None:
    case = make_case(queries=64)
    arguments = (case.index_query, case.index_key, 8, 3)
    assert (torch.ops.msa.select_blocks(*arguments, dense_below=64) == -1).all()
    laws.assert_equal(torch.ops.msa.select_blocks(*arguments, dense_below=63), torch.ops.msa.select_blocks(*arguments))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_start": torch.tensor([3, 17]), "mask": torch.ones(1, 1, 1, 20, dtype=torch.bool)},
        {"document_start": torch.arange(20).expand(2, 20) // 7 * 7, "local_blocks": 2, "sink_blocks": 1},
        {"query_start": torch.tensor([0, 1]), "key_end": torch.tensor([20, 9]), "dense_below": 5},
    ],
    ids=["plain", "padding and mask", "documents", "ranges"],
)
def test_opcheck(options: dict[str, Any]) -> None:
    case = make_case(queries=20)
    torch.library.opcheck(
        torch.ops.msa.select_blocks.default, (case.index_query.requires_grad_(), case.index_key, 8, 3), options
    )


QUERY, KEY = torch.randn(2, 3, 10, 4), torch.randn(2, 1, 20, 4)
LEGAL: dict[str, Any] = {"index_query": QUERY, "index_key": KEY, "block_size": 4, "topk": 3}


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("index_query", {"index_query": QUERY[0]}),
        ("index_query", {"index_query": QUERY.long()}),
        ("index_key", {"index_key": KEY[0]}),
        ("index_key", {"index_key": KEY.double()}),
        ("index_key", {"index_key": KEY[:1]}),
        ("index_key", {"index_key": KEY.expand(2, 2, 20, 4)}),
        ("index_key", {"index_key": KEY[..., :3]}),
        ("index_key", {"index_key": KEY.to("meta")}),
        ("block_size", {"block_size": 0}),
        ("local_blocks", {"local_blocks": 0}),
        ("sink_blocks", {"sink_blocks": -1}),
        ("topk", {"topk": 0}),
        ("topk", {"topk": 3, "sink_blocks": 3}),
        ("query_start", {"query_start": torch.zeros(3, dtype=torch.int64)}),
        ("query_start", {"query_start": torch.zeros(2)}),
        ("key_start", {"key_start": torch.zeros(2, 1, dtype=torch.int64)}),
        ("key_end", {"key_end": torch.zeros(2, dtype=torch.int16)}),
        ("document_start", {"document_start": torch.zeros(2, 20, dtype=torch.int64)}),
        ("mask", {"mask": torch.ones(2, 1, 10, 20)}),
        ("mask", {"mask": torch.ones(10, 20, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(2, 6, 10, 20, dtype=torch.bool)}),
    ],
)
def test_an_illegal_argument_is_named(argument: str, wrong: dict[str, Any]) -> None:
    select_blocks(**LEGAL)
    with pytest.raises(KernelArgumentError, match=rf"^{argument}: found .*; legal (is|are) "):
        select_blocks(**{**LEGAL, **wrong})
