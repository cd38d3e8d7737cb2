"""Index keys where every visible slot has one, the keys themselves otherwise."""

import pytest
import torch

from msa_compile.kernels.select_blocks import missed_selections, select_blocks

BUDGET = {"block_size": 4, "topk": 3}
BATCH, GROUPS, QUERIES, KEYS, WIDTH = 2, 2, 5, 40, 8


def operands(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(GROUPS, QUERIES), (1, KEYS), (GROUPS, QUERIES), (GROUPS, KEYS)]
    return [torch.randn(BATCH, heads, length, WIDTH, generator=generator) for heads, length in shapes]


def choose(tensors, **where):
    missed_selections.clear()
    return torch.ops.msa.select_blocks_if_fresh(*tensors, "site", 0, **BUDGET, **where), missed_selections.total()


def test_whole_index_keys_choose():
    index_query, index_key, query, key = tensors = operands()
    chosen, missed = choose(tensors)
    assert torch.equal(chosen, select_blocks(index_query, index_key, **BUDGET))
    assert not torch.equal(chosen, select_blocks(query, key, **BUDGET))
    assert missed == 0


ROWS = torch.tensor([[True] * 40, [False] * 3 + [True] * 37])[:, None, None]
HIDDEN = [
    (39, {"query_start": torch.tensor([30, 34])}),
    (2, {"key_start": torch.tensor([3, 4])}),
    (38, {"key_end": torch.tensor([38, 37])}),
    (9, {"document_start": torch.tensor([[10, 10, 10, 12, 12], [11, 11, 14, 14, 14]])}),
    (2, {"mask": ROWS & ROWS.flip(0), "key_start": torch.tensor([3, 3])}),
    (39, {"is_causal": False, "mask": torch.arange(40) < 39}),
]


@pytest.mark.parametrize(("slot", "where"), HIDDEN, ids=[next(iter(where)) for _, where in HIDDEN])
def test_a_slot_that_no_query_sees_may_be_unwritten(slot, where):
    where = {name: value[None, None, None] if name == "mask" and value.dim() == 1 else value
             for name, value in where.items()}  # fmt: skip
    tensors = operands()
    expected = select_blocks(*tensors[:2], **BUDGET, **where)
    tensors[1][:, :, slot] = torch.nan
    chosen, missed = choose(tensors, **where)
    assert torch.equal(chosen, expected)
    assert missed == 0
    tensors[1][1, :, 20] = torch.nan
    chosen, missed = choose(tensors, **where)
    assert torch.equal(chosen, select_blocks(*tensors[2:], **BUDGET, **where))
    assert missed == 1


def test_a_short_call_looks_at_nothing():
    tensors = operands()
    tensors[1].fill_(torch.nan)
    chosen, missed = choose(tensors, dense_below=KEYS)
    assert bool((chosen == -1).all())
    assert missed == 0


def test_the_op_is_a_legal_one():
    torch.library.opcheck(torch.ops.msa.select_blocks_if_fresh.default, (*operands(), "site", 0, 4, 3))
