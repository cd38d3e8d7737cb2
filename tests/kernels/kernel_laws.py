"""The laws of DESIGN.md 3 at op level, as checks of any implementation: a mutant must fail them (law 8).

Index queries and keys are small integers: their scores are exact in any order of summation, so that ids are compared as
they are, and ties are frequent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import torch
from torch import Tensor
from torch.nn import functional as F

_OF_QUERIES = ("query", "index_query")
_OF_KEYS = ("key", "value", "index_key")


@dataclass(frozen=True)
class Implementation:
    """The two functions of `msa_compile.kernels`, or something that claims to be them."""

    select: Callable[..., Tensor]
    attend: Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one call of each op."""

    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    index_key: Tensor
    block_size: int
    topk: int
    choose: dict[str, Any] = field(default_factory=dict)
    attend: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, Any] = field(default_factory=dict)


def make_case(
    *,
    batch: int = 2,
    groups: int = 2,
    heads_a_group: int = 2,
    queries: int = 63,
    keys: int | None = None,
    width: int = 8,
    block_size: int = 8,
    topk: int = 3,
    shared_index_key: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    choose: dict[str, Any] | None = None,
    attend: dict[str, Any] | None = None,
    bounds: dict[str, Any] | None = None,
) -> Case:
    keys = queries if keys is None else keys
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=rng).to(dtype)

    return Case(
        query=normal(batch, groups * heads_a_group, queries, width),
        key=normal(batch, groups, keys, width),
        value=normal(batch, groups, keys, width),
        index_query=integers(batch, groups, queries, width),
        index_key=integers(batch, 1 if shared_index_key else groups, keys, width),
        block_size=block_size,
        topk=topk,
        choose=choose or {},
        attend=attend or {},
        bounds=bounds or {},
    )


def select(implementation: Implementation, case: Case, **changed: Any) -> Tensor:
    options = {"block_size": case.block_size, "topk": case.topk, **case.choose, **case.bounds, **changed}
    return implementation.select(case.index_query, case.index_key, **options)


def attend(implementation: Implementation, case: Case, ids: Tensor, **changed: Any) -> Tensor:
    options = {"block_size": case.block_size, **case.attend, **case.bounds, **changed}
    return implementation.attend(case.query, case.key, case.value, ids, **options)


def both(implementation: Implementation, case: Case) -> tuple[Tensor, Tensor]:
    ids = select(implementation, case)
    return ids, attend(implementation, case, ids)


def cut(case: Case, queries: slice, keys: slice, **bounds: Any) -> Case:
    """Keep some queries and keys; bounds replace those of the case."""
    return replace(
        case,
        query=case.query[:, :, queries],
        key=case.key[:, :, keys],
        value=case.value[:, :, keys],
        index_query=case.index_query[:, :, queries],
        index_key=case.index_key[:, :, keys],
        bounds=bounds,
    )


def extend(case: Case, *, before: int, after: int, poison: float, **bounds: Any) -> Case:
    """Put slots full of `poison` before and after the keys, and as many queries; bounds replace those of the case."""

    def pad(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, before, after), value=poison)

    return replace(case, bounds=bounds, **{name: pad(getattr(case, name)) for name in (*_OF_QUERIES, *_OF_KEYS)})


def assert_ids_are_well_formed(ids: Tensor) -> None:
    """Ascending, no duplicates, -1 on the right only."""
    assert ids.dtype == torch.int32
    left, right = ids[..., :-1], ids[..., 1:]
    assert ((right == -1) | (right > left)).all(), "ids must ascend without duplicates"
    assert ((left != -1) | (right == -1)).all(), "-1 must stand on the right"
    assert (ids >= -1).all()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=False)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance, equal_nan=False)


def check_equals_dense(implementation: Implementation, length: int = 63, block_size: int = 8) -> None:
    """Law 1: enough blocks for the whole sequence give dense attention."""
    case = make_case(queries=length, block_size=block_size, topk=-(-length // block_size))
    _, output = both(implementation, case)
    dense = F.scaled_dot_product_attention(case.query, case.key, case.value, is_causal=True, enable_gqa=True)
    assert_close(output, dense)


def check_pieces_equal_one_shot(implementation: Implementation, case: Case, sizes: list[int]) -> None:
    """Law 2: a sequence in pieces equals the sequence at once, with a growing and with a preallocated cache."""
    ids, output = both(implementation, case)
    length, start, piece = case.query.shape[2], 0, 0
    # The buffer is longer than the sequence, and what is not written yet is poison.
    buffer = extend(case, before=0, after=5, poison=float("nan"))
    while start < length:
        end = min(length, start + sizes[min(piece, len(sizes) - 1)])
        grown_ids, grown = both(implementation, cut(case, slice(start, end), slice(0, end)))
        assert_equal(grown_ids, ids[:, :, start:end])
        assert_close(grown, output[:, :, start:end])
        unwritten = torch.arange(length + 5)[:, None] >= end
        static = cut(buffer, slice(start, end), slice(None), query_start=torch.full((case.query.shape[0],), start))
        poisoned = {name: getattr(static, name).masked_fill(unwritten, float("nan")) for name in _OF_KEYS}
        static_ids, static_output = both(implementation, replace(static, **poisoned))
        assert_equal(static_ids, ids[:, :, start:end])
        assert_close(static_output, output[:, :, start:end])
        start, piece = end, piece + 1


def check_padding_changes_nothing(implementation: Implementation, case: Case, *, before: int, after: int) -> None:
    """Law 3: poisoned slots before (left padding) and after (right padding) change nothing for real tokens."""
    ids, output = both(implementation, case)
    batch, length = case.query.shape[0], case.query.shape[2]
    padded = extend(
        case,
        before=before,
        after=after,
        poison=float("nan"),
        key_start=torch.full((batch,), before),
        key_end=torch.full((batch,), before + length),
    )
    padded_ids, padded_output = both(implementation, padded)
    assert_equal(padded_ids[:, :, before : before + length], ids)
    assert_close(padded_output[:, :, before : before + length], output)
    # The padding on the left sees nothing: zeros although its own query is NaN.
    assert_equal(padded_output[:, :, :before], torch.zeros_like(padded_output[:, :, :before]))


def check_future_has_no_influence(implementation: Implementation, case: Case, *, change: float) -> None:
    """Law 4: overwriting a token and all after it changes nothing before it."""
    ids, output = both(implementation, case)
    length = case.query.shape[2]
    for at in (1, length // 2, length - 1):
        tensors = {name: getattr(case, name).clone() for name in (*_OF_QUERIES, *_OF_KEYS)}
        for tensor in tensors.values():
            tensor[:, :, at:] = change
        changed = replace(case, **tensors)
        changed_ids, changed_output = both(implementation, changed)
        assert_equal(changed_ids[:, :, :at], ids[:, :, :at])
        assert_equal(changed_output[:, :, :at], output[:, :, :at])


def check_nothing_visible_gives_zeros(implementation: Implementation) -> None:
    """Law 5: a row or a query that sees nothing gives zeros and no ids, whatever hides the tokens."""
    full = make_case()
    row_without_keys = {"key_start": torch.tensor([0, 40]), "key_end": torch.tensor([63, 40])}
    for bounds in (
        row_without_keys,
        {"mask": torch.tensor([True, False]).view(2, 1, 1, 1)},
        {"query_start": torch.tensor([0, -100])},
    ):
        for options in ({}, {"sinks": torch.ones(4)}):
            case = replace(full, bounds=bounds, attend=options)
            case.key[1], case.value[1], case.index_key[1] = float("nan"), float("inf"), float("nan")
            ids, output = both(implementation, case)
            assert (ids[1] == -1).all()
            assert_equal(output[1], torch.zeros_like(output[1]))
            assert output[0].isfinite().all()
            assert output[0].abs().amax(-1).min() > 0


def check_equals_oracle(implementation: Implementation, case: Case, tolerance: float = 2e-6) -> None:
    """Law 6: ids and output equal those of the plain loops in float64."""
    options = {"block_size": case.block_size, **case.bounds}
    ids, output = both(implementation, case)
    assert_ids_are_well_formed(ids)
    assert_equal(ids, oracle.select_blocks(case.index_query, case.index_key, topk=case.topk, **case.choose, **options))
    expected = oracle.block_sparse_attention(case.query, case.key, case.value, ids, **case.attend, **options)
    assert_close(output, expected, tolerance)


def check_gradients_equal_oracle(implementation: Implementation, case: Case, tolerance: float = 1e-5) -> None:
    """Law 6 for gradients of query, key, value and sinks."""
    ids = select(implementation, case)
    sinks = case.attend.get("sinks")
    leaves = [
        t.clone().requires_grad_() for t in (case.query, case.key, case.value, *([] if sinks is None else [sinks]))
    ]
    options = {**case.attend, **({} if sinks is None else {"sinks": leaves[3]})}
    output = implementation.attend(*leaves[:3], ids, block_size=case.block_size, **options, **case.bounds)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    found = torch.autograd.grad(output, leaves, grad)
    _, *expected = oracle.block_sparse_attention(
        case.query, case.key, case.value, ids, block_size=case.block_size, grad=grad, **case.attend, **case.bounds
    )
    for one, other in zip(found, expected, strict=False):
        assert_close(one, other, tolerance)
