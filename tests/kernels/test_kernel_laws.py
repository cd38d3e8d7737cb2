"""Laws 1 to 6 of DESIGN.md 3 on the ops, and law 8: every law turns red on a mutant."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import kernel_laws as laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_laws import Case, Implementation, make_case
from torch import Tensor

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import cpu as attention_cpu
from msa_compile.kernels.block_sparse_attention import reference as attention_reference
from msa_compile.kernels.select_blocks import cpu as selection_cpu
from msa_compile.kernels.select_blocks import reference as selection_reference

OPS = Implementation(select_blocks, block_sparse_attention)


@pytest.fixture(scope="module", params=["cpu", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test of this file on what a CPU runs, and on the reference in its place."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(selection_cpu, "select_blocks", selection_reference.select_blocks)
            for name in ("block_sparse_attention", "block_sparse_attention_backward"):
                patch.setattr(attention_cpu, name, getattr(attention_reference, name))
        yield


def documents(batch: int, length: int, *starts: int) -> Tensor:
    """`[B, Tq]`: the first slot of the document of each query, for documents that start at `starts`."""
    slots, first = torch.arange(length), torch.zeros(length, dtype=torch.int64)
    for start in starts:
        first = torch.where(slots >= start, start, first)
    return first.expand(batch, length)


def holes(batch: int, groups: int, queries: int, keys: int, seed: int = 3) -> Tensor:
    return torch.rand(batch, groups, queries, keys, generator=torch.Generator().manual_seed(seed)) > 0.3


CASES = {
    "plain 63": make_case(),
    "plain 100, three heads a group": make_case(queries=100, heads_a_group=3, block_size=16, topk=2),
    "own index key a group": make_case(shared_index_key=False),
    "one head a group": make_case(groups=3, heads_a_group=1, queries=31, block_size=5),
    "more places than blocks": make_case(topk=40),
    "all scores equal": replace(make_case(topk=4), index_query=torch.zeros(2, 2, 63, 8)),
    "sinks and local blocks are forced": make_case(topk=5, choose={"local_blocks": 2, "sink_blocks": 2}),
    "ragged left padding": make_case(bounds={"key_start": torch.tensor([3, 17])}),
    "ragged right padding": make_case(bounds={"key_end": torch.tensor([63, 41], dtype=torch.int32)}),
    "documents": make_case(queries=100, bounds={"document_start": documents(2, 100, 13, 14, 60)}),
    "documents behind padding": make_case(
        bounds={"document_start": documents(2, 63, 20, 45), "key_start": torch.tensor([5, 30])}
    ),
    "mask with holes": make_case(bounds={"mask": holes(2, 2, 63, 63)}),
    "mask of keys": make_case(bounds={"mask": holes(2, 1, 1, 63)}),
    "mask of queries": make_case(bounds={"mask": holes(1, 1, 63, 1)}),
    "mask with holes behind padding": make_case(
        bounds={"mask": holes(1, 2, 63, 63), "key_start": torch.tensor([3, 17])}
    ),
    "window": make_case(attend={"window": 11}),
    "softcap": make_case(attend={"softcap": 0.7, "scale": 1.3}),
    "sink logits": make_case(attend={"sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0])}),
    "everything": make_case(
        queries=29,
        keys=63,
        topk=4,
        choose={"sink_blocks": 1},
        attend={"window": 40, "softcap": 1.5, "sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0]), "scale": 0.3},
        bounds={
            "query_start": torch.tensor([34, 20]),
            "key_start": torch.tensor([4, 0]),
            "key_end": torch.tensor([63, 47]),
            "document_start": documents(2, 29, 9),
            "mask": holes(2, 1, 29, 63),
        },
    ),
    "queries before and after the keys": make_case(queries=40, keys=20, bounds={"query_start": torch.tensor([-7, 5])}),
    "one token": make_case(queries=1),
    "block of one": make_case(queries=20, block_size=1, topk=4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ids_and_output_equal_the_float64_oracle(case: Case) -> None:
    laws.check_equals_oracle(OPS, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_equal_the_float64_oracle(case: Case) -> None:
    laws.check_gradients_equal_oracle(OPS, case)


@pytest.mark.parametrize("name", ["plain 63", "everything", "documents"])
def test_ids_and_output_do_not_depend_on_the_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, output = laws.both(OPS, CASES[name])
    monkeypatch.setattr(selection_reference, "_WORKSPACE", 3000)
    monkeypatch.setattr(attention_reference, "_WORKSPACE", 3000)
    small_ids, small_output = laws.both(OPS, CASES[name])
    laws.assert_equal(small_ids, ids)
    laws.assert_close(small_output, output)
    laws.check_gradients_equal_oracle(OPS, CASES[name])


@pytest.mark.parametrize(("length", "block_size"), [(63, 8), (100, 16), (64, 64), (5, 8), (1, 1)])
def test_enough_blocks_give_dense_attention(length: int, block_size: int) -> None:
    laws.check_equals_dense(OPS, length, block_size)


@pytest.mark.parametrize("sizes", [[1], [37, 8, 1, 16], [24, 1], [62, 1]], ids=str)
@pytest.mark.parametrize("attend", [{}, {"window": 11, "softcap": 2.0}], ids=["plain", "window"])
def test_pieces_equal_one_shot(sizes: list[int], attend: dict[str, object]) -> None:
    laws.check_pieces_equal_one_shot(OPS, make_case(attend=attend), sizes)


@pytest.mark.parametrize(("before", "after"), [(5, 0), (0, 11), (8, 8), (13, 1)])
def test_padding_changes_nothing(before: int, after: int) -> None:
    laws.check_padding_changes_nothing(OPS, make_case(), before=before, after=after)
    everything = make_case(choose={"sink_blocks": 1}, attend={"window": 30, "sinks": torch.ones(4)})
    laws.check_padding_changes_nothing(OPS, everything, before=before, after=after)


def test_a_packed_document_equals_the_document_alone() -> None:
    whole = make_case(queries=100, bounds={"document_start": documents(2, 100, 13, 60)})
    ids, output = laws.both(OPS, whole)
    for start, end in ((0, 13), (13, 60), (60, 100)):
        alone_ids, alone = laws.both(OPS, laws.cut(whole, slice(start, end), slice(start, end)))
        laws.assert_equal(alone_ids, ids[:, :, start:end])
        laws.assert_close(alone, output[:, :, start:end])


@pytest.mark.parametrize("change", [3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["plain 63", "documents", "ragged left padding", "mask of keys", "sink logits"])
def test_the_future_has_no_influence(name: str, change: float) -> None:
    laws.check_future_has_no_influence(OPS, CASES[name], change=change)


def test_nothing_visible_gives_zeros() -> None:
    laws.check_nothing_visible_gives_zeros(OPS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_case_equals_the_float64_oracle(data: st.DataObject) -> None:
    draw = data.draw
    batch, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads_a_group, keys = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    queries = draw(st.integers(1, keys))
    local_blocks, sink_blocks = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    seed = draw(st.integers(0, 99))
    rng = torch.Generator().manual_seed(seed)

    def slots(*shape: int) -> Tensor:
        return torch.randint(0, keys + 1, shape, generator=rng)

    possible = {
        "query_start": slots(batch) - 2,
        "key_start": slots(batch) // 2,
        "key_end": keys - slots(batch) // 2,
        "document_start": slots(batch, queries).sort().values // 2,
        "mask": holes(*(draw(st.sampled_from([1, size])) for size in (batch, groups, queries, keys)), seed),
        "is_causal": False,
    }
    options = {
        "window": draw(st.integers(1, keys)),
        "softcap": 1.2,
        "sinks": torch.randn(groups * heads_a_group, generator=rng),
    }
    case = make_case(
        batch=batch,
        groups=groups,
        heads_a_group=heads_a_group,
        queries=queries,
        keys=keys,
        width=draw(st.integers(1, 5)),
        block_size=draw(st.integers(1, 12)),
        topk=local_blocks + sink_blocks + draw(st.integers(0, 3)),
        shared_index_key=draw(st.booleans()),
        seed=seed,
        choose={"local_blocks": local_blocks, "sink_blocks": sink_blocks},
        attend={name: options[name] for name in draw(st.sets(st.sampled_from(sorted(options))))},
        bounds={name: possible[name] for name in draw(st.sets(st.sampled_from(sorted(possible))))},
    )
    outside = torch.zeros(batch, keys, dtype=torch.bool)
    if "key_start" in case.bounds:
        outside |= torch.arange(keys) < case.bounds["key_start"][:, None]
    if "key_end" in case.bounds:
        outside |= torch.arange(keys) >= case.bounds["key_end"][:, None]
    poison = {
        name: getattr(case, name).masked_fill(outside[:, None, :, None], float("nan"))
        for name in ("key", "value", "index_key")
    }
    case = replace(case, **poison)
    laws.check_equals_oracle(OPS, case, tolerance=1e-5)
    laws.check_gradients_equal_oracle(OPS, case, tolerance=2e-5)


def test_the_laws_run_the_sparse_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"select": 0, "attend": 0, "backward": 0}

    def count(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    for module, function, name in (
        (selection_cpu, "select_blocks", "select"),
        (attention_cpu, "block_sparse_attention", "attend"),
        (attention_cpu, "block_sparse_attention_backward", "backward"),
    ):
        monkeypatch.setattr(module, function, count(name, getattr(module, function)))
    laws.check_equals_dense(OPS)
    laws.check_gradients_equal_oracle(OPS, make_case(queries=20))
    assert calls == {"select": 2, "attend": 2, "backward": 1}


# Mutants: each is wrong in one way that has happened in a published implementation (spec/msa.md 13).


def attend_without_last_block(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, **options: object) -> Tensor:
    """Drop one slot of each query that has two or more: its last valid id."""
    count = (ids >= 0).sum(-1, keepdim=True)
    is_last = (torch.arange(ids.shape[-1]) == count - 1) & (count > 1)
    return block_sparse_attention(query, key, value, ids.masked_fill(is_last, -1), **options)


def select_without_mask(*tensors: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    return select_blocks(*tensors, **options)


def attend_without_mask(*tensors: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    return block_sparse_attention(*tensors, **options)


def select_without_local_block(*tensors: Tensor, **options: object) -> Tensor:
    return torch.ops.msa.select_blocks(*tensors, local_blocks=0, **options)


def attend_to_next_token(query: Tensor, key: Tensor, *rest: Tensor, **options: object) -> Tensor:
    start = torch.full((query.shape[0],), key.shape[2] - query.shape[2] + 1)
    return block_sparse_attention(query, key, *rest, **{**options, "query_start": start})


def forget_query_start(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mutant(*tensors: Tensor, query_start: Tensor | None = None, **options: object) -> Tensor:
        return function(*tensors, **options)

    return mutant


def anchor_at_slot_zero(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mutant(query: Tensor, key: Tensor, *rest: Tensor, key_start: Tensor | None = None, **options: object) -> Tensor:
        if key_start is None:
            return function(query, key, *rest, **options)
        mask = torch.arange(key.shape[2]) >= key_start.view(-1, 1, 1, 1)
        return function(query, key, *rest, mask=mask, **options)

    return mutant


def attend_with_nan_in_empty_rows(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, **options: object) -> Tensor:
    is_empty = (ids < 0).all(-1, keepdim=True).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return block_sparse_attention(query, key, value, ids, **options).masked_fill(is_empty, float("nan"))


MUTANTS = {
    "law 1, drops one slot": (
        Implementation(select_blocks, attend_without_last_block),
        laws.check_equals_dense,
    ),
    "law 2, forgets query_start": (
        Implementation(forget_query_start(select_blocks), forget_query_start(block_sparse_attention)),
        lambda mutant: laws.check_pieces_equal_one_shot(mutant, make_case(), [8]),
    ),
    "law 3, anchors at slot 0": (
        Implementation(anchor_at_slot_zero(select_blocks), anchor_at_slot_zero(block_sparse_attention)),
        lambda mutant: laws.check_padding_changes_nothing(mutant, make_case(), before=5, after=0),
    ),
    "law 4, attends to the next token": (
        Implementation(select_blocks, attend_to_next_token),
        lambda mutant: laws.check_future_has_no_influence(mutant, make_case(), change=3.0),
    ),
    "law 5, NaN in empty rows": (
        Implementation(select_blocks, attend_with_nan_in_empty_rows),
        laws.check_nothing_visible_gives_zeros,
    ),
    "law 6, drops one slot": (
        Implementation(select_blocks, attend_without_last_block),
        lambda mutant: laws.check_equals_oracle(mutant, make_case()),
    ),
    "law 6, selection ignores the mask": (
        Implementation(select_without_mask, block_sparse_attention),
        lambda mutant: laws.check_equals_oracle(mutant, CASES["mask with holes"]),
    ),
    "law 6, attention ignores the mask": (
        Implementation(select_blocks, attend_without_mask),
        lambda mutant: laws.check_equals_oracle(mutant, CASES["mask with holes"]),
    ),
    "law 6, forgets the local block": (
        Implementation(select_without_local_block, block_sparse_attention),
        lambda mutant: laws.check_equals_oracle(mutant, make_case()),
    ),
}


@pytest.mark.parametrize(("mutant", "check"), MUTANTS.values(), ids=MUTANTS.keys())
def test_mutant_turns_the_law_red(mutant: Implementation, check: Callable[[Implementation], None]) -> None:
    check(OPS)
    with pytest.raises(AssertionError):
        check(mutant)
