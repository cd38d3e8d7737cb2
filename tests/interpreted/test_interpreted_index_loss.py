"""The Triton kernels of the index loss: the chunks of plain torch judge in float64, over bounds, shapes and dtypes."""

from typing import Any

import interpreter  # noqa: F401  # skips this file in other processes
import pytest
import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention import triton_arguments, triton_turn
from msa_compile.kernels.chip import CHIPS
from msa_compile.kernels.index_loss import align_loss, cuda, triton
from msa_compile.kernels.index_loss.align_loss import AlignSums, Support, align_sums
from msa_compile.kernels.select_blocks import reference as selection

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def make_operands(
    *,
    batch: int = 2,
    groups: int = 2,
    heads: int = 3,
    queries: int = 140,
    keys: int = 140,
    width: int = 24,
    head_dim: int = 40,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
) -> Operands:
    """Index queries, index keys, queries and keys; `heads` of each group."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int, length: int, channels: int) -> Tensor:
        return (1.5 * torch.randn(batch, count, length, channels, generator=generator)).to(dtype)

    index = some(groups, queries, width), some(1 if shared else groups, keys, width)
    return *index, some(groups * heads, queries, head_dim), some(groups, keys, head_dim)


def selected(operands: Operands, block_size: int = 16, topk: int = 3, **bounds: Any) -> Support:
    """The support of the selected blocks, and these bounds."""
    index_query, index_key = (tensor.double() for tensor in operands[:2])
    chosen = {name: value for name, value in bounds.items() if name not in ("counted", "window")}
    ids = selection.select_blocks(index_query, index_key, block_size=block_size, topk=topk, **chosen)
    return Support(block_ids=ids, block_size=block_size, **bounds)


def check(operands: Operands, support: Support, tolerance: float = 1e-5, **options: Any) -> AlignSums:
    """What the kernels add up is what float64 adds up; returns it."""
    found = triton.align_sums(*operands, support, **options)
    expected = align_sums(*(tensor.double() for tensor in operands), support, **options)
    assert expected.loss > 0.05
    assert found.queries == expected.queries
    assert abs(found.loss.item() - expected.loss.item()) <= tolerance * expected.loss.item()
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        assert (one[other == 0].abs() <= tolerance).all(), "a gradient where there is none"
        assert (one.double() - other).norm() <= tolerance * other.norm()
    return found


def documents(*ends: int, queries: int = 140) -> Tensor:
    """The first slots of the documents of each query, where the others start at `ends`."""
    slot = torch.arange(queries)
    return torch.stack([torch.where(slot >= end, end, 0) for end in ends]).amax(0).expand(2, -1).contiguous()


def _real(first: int, last: int) -> Tensor:
    counted = torch.ones(2, 140, dtype=torch.bool)
    counted[0, :first], counted[1, last:] = False, False
    return counted


_HOLES = torch.rand(2, 2, 140, 140, generator=torch.Generator().manual_seed(3)) > 0.3

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({"batch": 1}, {}, {}),
    "one head a group, own keys, factors": (
        {"heads": 1, "shared": False},
        {},
        {"softcap": 2.0, "scale": 0.3, "index_scale": 0.2},
    ),
    "a window on a longer past": ({"queries": 70}, {"window": 33}, {}),
    "ragged rows": (
        {},
        {"key_start": torch.tensor([21, 0]), "key_end": torch.tensor([140, 90]), "counted": _real(21, 90)},
        {},
    ),
    "documents": ({"heads": 1}, {"document_start": documents(67, 75, 130)}, {}),
    "a mask with holes": ({"heads": 2}, {"mask": _HOLES}, {}),
    "not causal": ({"heads": 2, "queries": 70}, {"key_end": torch.tensor([140, 90]), "is_causal": False}, {}),
    "select": ({}, {"block_size": 16, "local_blocks": 1}, {"power": 2.0}),
    "select, one and a half, without first and two last": (
        {"heads": 1, "queries": 75},
        {"block_size": 16, "local_blocks": 2, "sink_blocks": 1, "window": 70},
        {"power": 1.5},
    ),
    "select, ragged rows": (
        {"groups": 1, "heads": 2},
        {
            "block_size": 11,
            "local_blocks": 1,
            "sink_blocks": 1,
            "key_start": torch.tensor([21, 0]),
            "key_end": torch.tensor([140, 90]),
            "counted": _real(21, 90),
        },
        {"power": 2.0},
    ),
    "select, documents": (
        {"groups": 1, "heads": 1},
        {"block_size": 16, "local_blocks": 1, "document_start": documents(67, 75, 130)},
        {"power": 2.0},
    ),
    "select, not causal, first power": (
        {"heads": 2, "queries": 70},
        {
            "block_size": 13,
            "local_blocks": 2,
            "sink_blocks": 1,
            "query_start": torch.tensor([0, 40]),
            "key_start": torch.tensor([27, 5]),
            "is_causal": False,
        },
        {},
    ),
    "everything": (
        {"groups": 1, "heads": 4, "queries": 100},
        {
            "query_start": torch.tensor([40, 25]),
            "key_start": torch.tensor([0, 9]),
            "key_end": torch.tensor([133, 140]),
            "document_start": documents(60, 77, queries=100),
            "mask": _HOLES[:, :1, :100],
            "window": 50,
            "counted": torch.rand(2, 100, generator=torch.Generator().manual_seed(4)) > 0.2,
        },
        {"softcap": 4.0},
    ),
}


def check_case(name: str, *, is_selected: bool) -> None:
    """Check one of the cases above."""
    sizes, bounds, options = CASES[name]
    operands = make_operands(**sizes)
    # Forced first blocks have a place of their own.
    topk = 3 + bounds.get("sink_blocks", 0)
    support = selected(operands, topk=topk, **bounds) if is_selected else Support(**bounds)
    check(operands, support, **options)


# One of each kind of bound, and each path through a kernel.
QUICK = {
    False: (
        "plain",
        "one head a group, own keys, factors",
        "documents",
        "everything",
        "select, one and a half, without first and two last",
        "select, ragged rows",
        "select, not causal, first power",
    ),
    True: ("documents", "everything", "select, documents"),
}


@pytest.mark.parametrize(
    ("name", "is_selected"),
    [
        pytest.param(
            name,
            is_selected,
            id=f"{name}, {'selected blocks' if is_selected else 'all that is visible'}",
            marks=[] if name in QUICK[is_selected] else pytest.mark.slow,
        )
        for is_selected in (False, True)
        for name in CASES
    ],
)
def test_sums_and_gradients_equal_those_of_float64(name: str, is_selected: bool) -> None:
    check_case(name, is_selected=is_selected)


# Differences of probabilities are rounded once before they meet keys or queries.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "capability", "block_size"),
    [
        (16, 128, torch.bfloat16, 90, None),
        (4, 96, torch.bfloat16, 80, 64),
        (2, 256, torch.bfloat16, 89, None),
        (1, 64, torch.float16, 100, 32),
        (5, 64, torch.float16, 86, None),
        pytest.param(16, 128, torch.bfloat16, 90, 128, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_halves_agree_with_float64(
    heads: int,
    width: int,
    dtype: torch.dtype,
    capability: int,
    block_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "chip_of", lambda device: CHIPS[capability])
    operands = make_operands(batch=1, heads=heads, queries=70, keys=150, width=width, head_dim=width, dtype=dtype)
    support = Support() if block_size is None else selected(operands, block_size, 2)
    check(operands, support, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_halves_agree_with_float64_on_a_raised_teacher(dtype: torch.dtype) -> None:
    operands = make_operands(batch=1, heads=2, queries=70, keys=150, width=64, head_dim=64, dtype=dtype)
    check(operands, Support(block_size=32, local_blocks=1), TOLERANCE[dtype], power=2.0)


@pytest.mark.parametrize(
    ("is_selected", "has_mask"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_what_lies_in_padding_reaches_nothing(is_selected: bool, has_mask: bool) -> None:
    operands = make_operands(groups=1, heads=1)
    counted = _real(0, 90)
    counted[0, 90:] = False
    bounds: dict[str, Any] = {"counted": counted, "key_end": torch.tensor([90, 90])}
    if has_mask:
        bounds = {"counted": counted, "mask": counted[:, None, None, :]}
    support = selected(operands, **bounds) if is_selected else Support(**bounds)
    before = triton.align_sums(*operands, support)
    for tensor in operands:
        tensor[:, :, 90:] = torch.nan
    assert before.loss > 0.05
    assert all(map(torch.equal, triton.align_sums(*operands, support), before))


def test_a_query_that_sees_nothing_adds_nothing_though_it_is_not_a_number() -> None:
    operands = make_operands(batch=1, groups=1, heads=1)
    mask = torch.ones(1, 1, 140, 140, dtype=torch.bool)
    mask[:, :, 100:] = False
    before = triton.align_sums(*operands, Support(mask=mask))
    assert before.queries == 100
    for query in (operands[0], operands[2]):
        query[:, :, 100:] = torch.nan
    assert all(map(torch.equal, triton.align_sums(*operands, Support(mask=mask)), before))


@pytest.mark.parametrize("is_selected", [False, True])
def test_a_query_with_nothing_left_to_compare_adds_nothing_though_it_is_not_a_number(is_selected: bool) -> None:
    operands = make_operands(batch=1, groups=1, heads=1, queries=60, keys=60)
    support = Support(block_size=16, local_blocks=1, sink_blocks=1)
    if is_selected:
        support = selected(operands, local_blocks=1, sink_blocks=1)
    before = check(operands, support, power=2.0)
    assert before.queries == 60 - 32
    for query in (operands[0], operands[2]):
        query[:, :, :32] = torch.nan
    assert all(map(torch.equal, triton.align_sums(*operands, support, power=2.0), before))


def test_all_blocks_left_out_is_no_loss_and_no_gradient() -> None:
    operands = make_operands(batch=1, heads=1, queries=40, keys=40)
    found = triton.align_sums(*operands, Support(block_size=20, local_blocks=2), power=2.0)
    assert not any(bool(tensor.any()) for tensor in found if tensor is not None)


def test_two_runs_and_chunks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make_operands(batch=1, groups=1, heads=1)
    support = selected(operands, document_start=documents(67, 75)[:1])
    first, again = (triton.align_sums(*operands, support) for _ in range(2))
    assert all(map(torch.equal, first, again))
    monkeypatch.setattr(triton_arguments, "_WORKSPACE", 32 * 4)
    monkeypatch.setattr(triton_turn, "_WORDS", 9 * 2)
    in_chunks = triton.align_sums(*operands, support)
    assert all(map(torch.equal, first[:3], in_chunks[:3]))
    torch.testing.assert_close(first.grad_index_key, in_chunks.grad_index_key, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_loss_is_the_same() -> None:
    operands = make_operands(batch=1, groups=1, heads=1)
    loss, queries, *gradients = triton.align_sums(*operands, Support(), has_gradients=False)
    assert gradients == [None, None]
    whole = triton.align_sums(*operands, Support())
    assert loss == whole.loss
    assert queries == whole.queries == 140


@pytest.mark.parametrize("sizes", [{"queries": 0}, {"keys": 0}, {"batch": 0}], ids=str)
def test_nothing_to_compare_is_no_loss_and_no_gradient(sizes: dict[str, int]) -> None:
    operands = make_operands(**sizes)
    found = triton.align_sums(*operands, Support())
    assert found.loss == 0
    assert found.queries == 0
    assert found.grad_index_query is not None
    assert found.grad_index_key is not None
    assert found.grad_index_query.shape == operands[0].shape
    assert not found.grad_index_key.any()


def test_nobody_who_counts_is_no_loss_and_no_gradient() -> None:
    operands = make_operands(batch=1, heads=1)
    found = triton.align_sums(*operands, Support(counted=torch.zeros(1, 140, dtype=torch.bool)))
    assert not any(bool(tensor.any()) for tensor in found if tensor is not None)


def test_layouts_and_dtypes_of_a_model_do_not_matter() -> None:
    index_query, index_key, query, key = make_operands(batch=1, groups=1, heads=2)
    expected = triton.align_sums(index_query, index_key, query, key, Support())
    stored = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (index_query, query, key)]
    by_columns = index_key.mT.contiguous().mT
    found = triton.align_sums(stored[0], by_columns, stored[1], stored[2], Support())
    assert all(map(torch.equal, found, expected))
    mixed = (index_query, index_key, query.bfloat16(), key.bfloat16())
    check(mixed, Support(), 1e-5)


def test_the_op_runs_the_kernels_and_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_kernels", lambda *tensors: all(t.dtype != torch.float64 for t in tensors))
    ran = []
    original = triton.align_sums
    monkeypatch.setattr(triton, "align_sums", lambda *rest, **options: ran.append(1) or original(*rest, **options))
    operands = make_operands(groups=1, heads=1, width=16, head_dim=16)
    bounds = {"key_end": torch.tensor([140, 90])}
    ids = selected(operands, **bounds).block_ids

    def found(*tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
        loss, *_ = torch.ops.msa.index_loss(*leaves, *tensors[2:], ids, 16, key_end=bounds["key_end"])
        return [loss, *torch.autograd.grad(3 * loss, leaves)]

    mine, theirs = found(*operands), found(*(tensor.double() for tensor in operands))
    assert ran == [1]
    for one, other in zip(mine, theirs, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()
    loss = align_loss.align_loss(*operands, Support(block_size=16, local_blocks=1), power=2.0)
    assert ran == [1, 1]
    assert loss.dtype == torch.float32
