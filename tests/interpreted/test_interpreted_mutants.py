"""Negative controls: a kernel that is broken in one line turns a law red."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import oracle
import pytest
import torch
from kernel_laws import Implementation, make_case
from test_interpreted_index_loss import check_case
from test_kernel_laws import CASES

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import triton as attention
from msa_compile.kernels.block_sparse_attention import (
    triton_arguments,
    triton_backward,
    triton_blocks,
    triton_key_gradients,
    triton_lists,
    triton_queries,
    triton_query_gradients,
    triton_slots,
    triton_tiles,
    triton_turn,
)
from msa_compile.kernels.chip import CHIPS, Chip
from msa_compile.kernels.index_loss import triton as index_loss
from msa_compile.kernels.index_loss import triton_compare, triton_index_keys, triton_sums, triton_teacher
from msa_compile.kernels.select_blocks import cuda as selection_cuda
from msa_compile.kernels.select_blocks import triton as selection
from msa_compile.kernels.select_blocks import triton_choose, triton_fused, triton_rescore, triton_scores

OPS = Implementation(select_blocks, block_sparse_attention)


def _oracle(name: str) -> Callable[[], None]:
    return lambda: laws.check_equals_oracle(OPS, CASES[name])


def _candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 40, 8, generator=generator)
    options = {"block_size": 4, "topk": 3, "candidates": 4}
    laws.assert_equal(selection_cuda.select_blocks(query, key, **options), oracle.select_blocks(query, key, **options))


def _in_one_kernel() -> None:
    ones = torch.ones(1, 2, 50, 16, dtype=torch.bfloat16)
    keys = torch.arange(350).div(70, rounding_mode="floor").eq(1)[:, None].expand(1, 1, 350, 16).bfloat16()
    options = {"block_size": 70, "topk": 3}
    with pytest.MonkeyPatch.context() as patch:
        # A chip that one program fills.
        patch.setattr(selection, "chip_of", lambda device: Chip(90, CHIPS[90].shared_memory, 0))
        found = selection_cuda.select_blocks(ones, keys, **options)
    laws.assert_equal(found, oracle.select_blocks(ones, keys, **options))


def _few_queries() -> None:
    laws.check_equals_oracle(OPS, make_case(queries=2, keys=40, topk=9))


def _poison() -> None:
    laws.check_future_has_no_influence(OPS, make_case(queries=20, batch=1, groups=1, topk=2), change=float("nan"))


def _gradients(name: str) -> Callable[[], None]:
    return lambda: laws.check_gradients_equal_oracle(OPS, CASES[name])


def _blocks_outside(name: str) -> Callable[[], None]:
    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "is_for_blocks", lambda chip, **shape: True)
            laws.check_equals_oracle(OPS, CASES[name])

    return check


def _loss(name: str, *, is_selected: bool) -> Callable[[], None]:
    return lambda: check_case(name, is_selected=is_selected)


# The kernel's module, the module that launches it, the kernel, what it says, what the mutant says, the law.
MUTANTS = {
    "scores of a slot behind the end of the row": (
        triton_scores,
        selection,
        "score_blocks",
        "(slot[None, :] < stop[:, None])",
        "(slot[None, :] <= stop[:, None])",
        _oracle("ragged right padding"),
    ),
    "scores without the mask": (
        triton_scores,
        selection,
        "score_blocks",
        "visible & (tl.load(shown, mask=visible, other=0) != 0)",
        "visible",
        _oracle("mask with holes"),
    ),
    "scores of other documents": (
        triton_scores,
        selection,
        "score_blocks",
        "sees & (anchor == here)",
        "sees",
        _oracle("documents behind padding"),
    ),
    "no local block": (
        triton_choose,
        selection,
        "choose_blocks",
        "(local - local_blocks)[:, None]",
        "local[:, None]",
        _oracle("one head a group"),
    ),
    "ties to the higher id": (
        triton_choose,
        selection,
        "choose_blocks",
        "tl.cumsum(is_equal.to(tl.int32), 1) <= room[:, None]",
        "tl.sum(is_equal.to(tl.int32), 1)[:, None] - tl.cumsum(is_equal.to(tl.int32), 1) < room[:, None]",
        _oracle("all scores equal"),
    ),
    "e4m3 without scales": (
        triton_scores,
        selection,
        "score_blocks",
        "score = score * scale[None, :]",
        "score = score + 0 * scale[None, :]",
        _candidates,
    ),
    "candidates are not all that score as high": (
        triton_choose,
        selection,
        "keep_candidates",
        "can_be_chosen & (rank >= threshold[:, None])",
        "can_be_chosen & (rank > threshold[:, None])",
        _candidates,
    ),
    "candidates keep their rounded scores": (
        triton_rescore,
        selection,
        "rescore_blocks",
        "tl.store(place, found, mask=is_candidate)",
        "tl.store(place, found, mask=is_candidate & (found > 1e30))",
        _candidates,
    ),
    "in one kernel: ties to the higher id": (
        triton_fused,
        selection,
        "score_and_choose",
        "(-block + _LAST_ID)",
        "block",
        _in_one_kernel,
    ),
    "in one kernel: forced blocks are not": (
        triton_fused,
        selection,
        "score_and_choose",
        "rank = tl.where(is_forced, _FORCED, rank)",
        "rank = tl.where(is_forced, rank, rank)",
        _in_one_kernel,
    ),
    "drops block 0": (
        triton_lists,
        triton_arguments,
        "list_blocks",
        "(block >= 0)",
        "(block >= 1)",
        _oracle("one head a group"),
    ),
    "every query of a tile is a member": (
        triton_tiles,
        attention,
        "attend_tiles",
        "((bits >> turn_of_row) & 1) != 0",
        "((bits >> turn_of_row) & 1) >= 0",
        _oracle("one head a group"),
    ),
    "attention without the mask": (
        triton_tiles,
        attention,
        "attend_tiles",
        "visible & (tl.load(shown, mask=visible, other=0) != 0)",
        "visible",
        _oracle("mask with holes"),
    ),
    "no care for values that are not finite": (
        triton_tiles,
        attention,
        "attend_tiles",
        "if is_broken != 0:",
        "if is_broken > 1:",
        _poison,
    ),
    "few queries: the last place is dropped": (
        triton_slots,
        attention,
        "attend_slots",
        "tl.minimum(begin + places_a_split, topk)",
        "tl.minimum(begin + places_a_split, topk - 1)",
        _few_queries,
    ),
    "few queries: the token after the last": (
        triton_slots,
        attention,
        "attend_slots",
        "(slot < stop)",
        "(slot <= stop)",
        _few_queries,
    ),
    "merge without weights": (
        triton_slots,
        attention,
        "merge_slots",
        "share = tl.exp2(highest - base)",
        "share = tl.exp2(base - base) + tl.zeros_like(highest)",
        _few_queries,
    ),
    "the second block of a document's query is not marked": (
        triton_queries,
        triton_turn,
        "mark_queries",
        "mask=is_seen & (high > low)",
        "mask=is_seen & (high < low)",
        _gradients("documents behind padding"),
    ),
    "the last item of a list is dropped": (
        triton_queries,
        triton_turn,
        "place_queries",
        "pieces = tl.cdiv(count, QUERIES_AN_ITEM)",
        "pieces = count // QUERIES_AN_ITEM",
        _gradients("one head a group"),
    ),
    "gradients of queries without the mean slope": (
        triton_query_gradients,
        triton_backward,
        "differentiate_tiles",
        "slope = product(tile_of_grads, tl.trans(values)) - delta[:, None]",
        "slope = product(tile_of_grads, tl.trans(values))",
        _gradients("one head a group"),
    ),
    "gradients of keys from queries that do not see them": (
        triton_key_gradients,
        triton_backward,
        "differentiate_blocks",
        "(slot[:, None] < stop[None, :])",
        "(slot[:, None] <= stop[None, :])",
        _gradients("one head a group"),
    ),
    "gradients of keys from both blocks of a document's query": (
        triton_key_gradients,
        triton_backward,
        "differentiate_blocks",
        "(is_low & has_low[None, :]) | (~is_low & has_high[None, :])",
        "has_low[None, :] | has_high[None, :]",
        _gradients("documents behind padding"),
    ),
    "the first part of a block is dropped": (
        triton_key_gradients,
        triton_backward,
        "add_parts",
        "for item in range(begin, end):",
        "for item in range(begin + 1, end):",
        _gradients("one head a group"),
    ),
    "blocks outside: two blocks in one place": (
        triton_blocks,
        attention,
        "attend_blocks",
        "(ids < block)",
        "(ids < block - 1)",
        _blocks_outside("more places than blocks"),
    ),
    "blocks outside: the token after the last": (
        triton_blocks,
        attention,
        "attend_blocks",
        "(slot[None, :] < stop[:, None])",
        "(slot[None, :] <= stop[:, None])",
        _blocks_outside("ragged right padding"),
    ),
    "blocks outside: the first block is not merged": (
        triton_blocks,
        attention,
        "merge_places",
        "is_part = (block >= 0)",
        "is_part = (block >= 1)",
        _blocks_outside("ragged right padding"),
    ),
    "index loss: the normaliser of the token after the last": (
        triton_sums,
        index_loss,
        "sum_logits",
        "(slot[None, :] < stop[:, None])",
        "(slot[None, :] <= stop[:, None])",
        _loss("plain", is_selected=False),
    ),
    "index loss: a query that does not count": (
        triton_compare,
        index_loss,
        "compare_queries",
        "is_row = is_counted(counted, batch, token, is_there, query_length)",
        "is_row = is_there",
        _loss("ragged rows", is_selected=False),
    ),
    "index loss: keys of other documents": (
        triton_index_keys,
        index_loss,
        "compare_keys",
        "(is_low & has_low[None, :]) | (~is_low & has_high[None, :])",
        "has_low[None, :] | has_high[None, :]",
        _loss("documents", is_selected=True),
    ),
    "index loss: one local block too few is left out": (
        triton_sums,
        index_loss,
        "sum_logits",
        "(blocks - LOCAL_BLOCKS) * BLOCK_SIZE",
        "(blocks - LOCAL_BLOCKS + 1) * BLOCK_SIZE",
        _loss("select, one and a half, without first and two last", is_selected=False),
    ),
    "index loss: the sum of probabilities that are not raised": (
        triton_teacher,
        index_loss,
        "sum_teacher",
        "total += tl.sum(raise_to(teacher, POWER), 0)",
        "total += tl.sum(teacher, 0)",
        _loss("select, one and a half, without first and two last", is_selected=False),
    ),
    "index loss: the last group is not added": (
        triton_index_keys,
        index_loss,
        "add_key_parts",
        "for turn in range(groups_a_key):",
        "for turn in range(groups_a_key - 1):",
        _loss("plain", is_selected=False),
    ),
}


# Those of kernels that one mutant already stands for.
SLOW = (
    "the second block of a document's query is not marked",
    "gradients of keys from queries that do not see them",
    "gradients of keys from both blocks of a document's query",
    "the first part of a block is dropped",
    "blocks outside: the token after the last",
    "blocks outside: the first block is not merged",
    "index loss: the normaliser of the token after the last",
    "index loss: a query that does not count",
    "index loss: keys of other documents",
    "in one kernel: forced blocks are not",
    "index loss: one local block too few is left out",
)


@pytest.mark.parametrize(
    ("module", "launcher", "kernel", "said", "mutated", "check"),
    [
        pytest.param(*mutant, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, mutant in MUTANTS.items()
    ],
)
def test_mutant_turns_a_law_red(
    module: ModuleType,
    launcher: ModuleType,
    kernel: str,
    said: str,
    mutated: str,
    check: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    source = Path(str(module.__file__)).read_text()
    assert source.count(said) == 1, "the line that the mutant breaks has changed"
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(said, mutated))
    spec = importlib.util.spec_from_file_location(module.__name__, broken)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(launcher, kernel, getattr(mutant, kernel))
    with pytest.raises(AssertionError):
        check()
