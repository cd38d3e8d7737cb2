"""The order with blocks outside, by the Triton kernels: laws against the float64 oracle, poison, chunks, the choice."""

import interpreter  # noqa: F401  # skips this file in other processes
import kernel_laws as laws
import pytest
import torch
from kernel_laws import Implementation, make_case
from test_kernel_laws import CASES

from msa_compile.kernels import block_sparse_attention, select_blocks
from msa_compile.kernels.block_sparse_attention import reference, tiling, triton_turn
from msa_compile.kernels.block_sparse_attention import triton as attention
from msa_compile.kernels.chip import CHIPS

OPS = Implementation(select_blocks, block_sparse_attention)

NAMES = (
    "ragged right padding",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "plain 100, three heads a group",
            "more places than blocks",
            "mask with holes behind padding",
            "window",
            "softcap",
            "sink logits",
            "queries before and after the keys",
        )
    ),
)


@pytest.fixture(autouse=True)
def blocks_outside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Choose this order for every call, and note the kernels that run."""
    ran: list[str] = []
    run = attention.Launch.run
    monkeypatch.setattr(attention, "is_for_blocks", lambda chip, **shape: True)
    monkeypatch.setattr(attention.Launch, "run", lambda launch: ran.append(launch.kernel.__name__) or run(launch))
    return ran


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_output_equal_the_float64_oracle(name: str, blocks_outside: list[str]) -> None:
    laws.check_equals_oracle(OPS, CASES[name])
    assert {"attend_blocks", "merge_places"} < set(blocks_outside)


def test_documents_go_by_tiles(blocks_outside: list[str]) -> None:
    laws.both(OPS, CASES["documents"])
    assert "attend_tiles" in blocks_outside
    assert "attend_blocks" not in blocks_outside


@pytest.mark.parametrize("change", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_the_future_has_no_influence(change: float) -> None:
    laws.check_future_has_no_influence(OPS, make_case(queries=31, batch=1, groups=1, topk=2), change=change)


@pytest.mark.slow
def test_nothing_visible_gives_zeros() -> None:
    laws.check_nothing_visible_gives_zeros(OPS)


def test_two_runs_give_the_same_bits_and_chunks_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=1, groups=1, queries=50, heads_a_group=2)
    ids, output = laws.both(OPS, case)
    laws.assert_equal(laws.attend(OPS, case, ids), output)
    monkeypatch.setattr(attention, "_PARTS", 2 * 3 * 8 * 33)
    laws.assert_close(laws.attend(OPS, case, ids), output)
    monkeypatch.setattr(triton_turn, "_WORDS", 7)
    laws.assert_close(laws.attend(OPS, case, ids), output)


@pytest.mark.parametrize(
    ("heads_a_group", "width", "dtype", "tolerance"),
    [(16, 128, torch.bfloat16, 1.6e-2), (1, 64, torch.bfloat16, 1.6e-2), (5, 40, torch.float16, 2e-3)],
    ids=str,
)
def test_halves_agree_with_float64(heads_a_group: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    case = make_case(
        batch=1,
        groups=1,
        heads_a_group=heads_a_group,
        queries=20,
        keys=161,
        width=width,
        block_size=32,
        topk=2,
        dtype=dtype,
    )
    ids, output = laws.both(OPS, case)
    exact = (tensor.double() for tensor in (case.query, case.key, case.value))
    expected = reference.block_sparse_attention(*exact, ids, block_size=32)
    assert (output.double() - expected).abs().max() <= tolerance


def test_the_choice_follows_from_shapes() -> None:
    def choose(capability: int = 90, **changed: int) -> bool:
        shape = {"heads": 16, "item_size": 2, "queries": 8, "blocks": 1024, "topk": 16, **changed}
        return tiling.is_for_blocks(CHIPS[capability], **shape)

    assert not choose()
    # One head a group fills half of the large matrix instruction, whatever its 32 queries have in common.
    assert choose(heads=1, queries=32)
    assert not choose(heads=1, queries=32, blocks=30)
    assert not choose(80, heads=1, queries=32)
    assert not choose(heads=1, queries=32, item_size=4)
    # A block and its queries have to fit.
    common = {"heads": 2, "head_dim": 256, "item_size": 2}
    assert tiling.choose_block_tile(CHIPS[90], block_size=128, **common) is not None
    assert tiling.choose_block_tile(CHIPS[86], block_size=128, **common) is None
    assert tiling.choose_block_tile(CHIPS[90], block_size=150, **common) is None
