"""Blocks that are chosen where they are scored: the same ids as by two kernels, and as the reference's in float64."""

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import pytest
import torch
from kernel_laws import Case, make_case

from msa_compile.kernels.chip import CHIPS, Chip
from msa_compile.kernels.launch import Tile
from msa_compile.kernels.select_blocks import cuda, reference, tiling
from msa_compile.kernels.select_blocks import triton as selection

BFLOAT16 = {"dtype": torch.bfloat16, "width": 16, "heads_a_group": 1}
CASES = {
    "more blocks than places": make_case(
        batch=1, groups=4, queries=40, keys=21 * 70, block_size=70, topk=16, choose={"sink_blocks": 1}, **BFLOAT16
    ),
    "chunks of rows, three groups, odd blocks of two pieces": make_case(
        batch=2,
        groups=3,
        queries=70,
        keys=900,
        block_size=150,
        topk=3,
        choose={"local_blocks": 2},
        bounds={"query_start": torch.tensor([830, -20])},
        **BFLOAT16,
    ),
    "not causal": make_case(
        batch=1,
        groups=2,
        queries=130,
        keys=800,
        block_size=100,
        topk=5,
        bounds={"is_causal": False},
        **BFLOAT16,
    ),
}


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A chip that one program fills, and the kernels that run on it."""
    names: list[str] = []
    run = selection.Launch.run
    monkeypatch.setattr(selection, "chip_of", lambda device: Chip(90, CHIPS[90].shared_memory, 0))
    monkeypatch.setattr(selection.Launch, "run", lambda launch: names.append(launch.kernel.__name__) or run(launch))
    return names


def _select(case: Case) -> torch.Tensor:
    options = {"block_size": case.block_size, "topk": case.topk, **case.choose, **case.bounds}
    return cuda.select_blocks(case.index_query, case.index_key, **options)


# A program sorts, which takes seconds here: one of the cases stands for all.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (case.index_query.shape[2] > 40))
        for name, case in CASES.items()
    ],
)
def test_ids_equal_the_reference_in_float64(case: Case, ran: list[str]) -> None:
    found = _select(case)
    assert ran == ["score_and_choose"]
    laws.assert_ids_are_well_formed(found)
    options = {"block_size": case.block_size, "topk": case.topk, **case.choose, **case.bounds}
    laws.assert_equal(found, reference.select_blocks(case.index_query.double(), case.index_key.double(), **options))


def test_ties_go_to_the_lower_id_and_what_is_not_finite_keeps_its_place(ran: list[str]) -> None:
    case = make_case(batch=1, groups=2, queries=50, keys=1400, block_size=70, topk=4, **BFLOAT16)
    case.index_query.fill_(1)
    case.index_key.fill_(0)
    case.index_key[:, :, 300], case.index_key[:, :, 600:700] = float("inf"), float("nan")
    case.index_key[:, :, 1050:1120] = -float("inf")
    options = {"block_size": case.block_size, "topk": case.topk}
    expected = reference.select_blocks(case.index_query.double(), case.index_key.double(), **options)
    laws.assert_equal(_select(case), expected)
    assert expected[0, 0, -1].tolist() == [0, 1, 4, 19]
    assert set(ran) == {"score_and_choose"}


def test_the_rule_follows_from_shapes() -> None:
    shape = {"batch": 1, "groups": 4, "query_length": 1 << 15, "blocks": 256, "width": 128, "item_size": 2}
    more = {"block_size": 128, "is_shared": True, "has_mask": False}

    def fuse(capability: int = 90, topk: int = 16, **changed: int) -> Tile | None:
        chip = CHIPS[capability]
        grid = tiling.cut_scores(chip, **{**shape, **more, **changed})
        return tiling.fuse_choice(chip, grid, topk=topk, item_size=changed.get("item_size", 2))

    found = fuse()
    assert found is not None
    assert (found.sizes["PACKED_GROUPS"] * found.sizes["QUERIES"], found.sizes["PLACES"]) == (256, 16)
    assert fuse(topk=17) is None
    assert fuse(topk=17, width=256) is not None
    assert fuse(block_size=64) is None
    assert fuse(is_shared=False) is None
    assert fuse(query_length=1000) is None
    assert fuse(item_size=4) is None
    assert fuse(80) is None
    assert fuse(100) is None
