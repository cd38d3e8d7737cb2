"""The compile gate on a few kernels, and that it turns red on kernels that are compiled badly; no GPU is needed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed")
from benchmarks.kernel_gate.compile import Compiled, compile_launch
from benchmarks.kernel_gate.expect import judge
from benchmarks.kernel_gate.problems import PROBLEMS, launches_of
from msa_compile.kernels.chip import CHIPS
from msa_compile.kernels.launch import Launch, Tile

PREFILL = "prefill, 16 heads a group"
# Scored and chosen by kernels of their own on every chip.
APART = "prefill, one group, documents"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def _launch(kernel: str, problem: str = PREFILL, capability: int = 90) -> Launch:
    launches = launches_of(PROBLEMS[problem], CHIPS[capability])
    return next(launch for launch in launches if launch.kernel.__name__ == kernel)


def _judge(launch: Launch) -> str:
    chip = CHIPS[90]
    return "; ".join(judge(launch, compile_launch(launch, chip), chip))


SELECTION = {"score_blocks", "choose_blocks"}
TURNED = {"mark_queries", "count_queries", "place_queries", "list_queries"}
KERNELS = {
    "prefill": SELECTION | {"list_blocks", "attend_tiles"},
    "decode": SELECTION | {"attend_slots", "merge_slots"},
    "blocks outside": SELECTION | TURNED | {"attend_blocks", "merge_places"},
    "backward": TURNED | {"list_blocks", "differentiate_tiles", "differentiate_blocks", "add_parts"},
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "problem",
    [
        PREFILL,
        "decode, 16 heads a group",
        "prefill, everything",
        pytest.param("blocks outside, 16 heads a group", marks=pytest.mark.slow),
        pytest.param("backward, 16 heads a group", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_as_expected(problem: str, capability: int) -> None:
    chip = CHIPS[capability]
    names = set()
    for launch in launches_of(PROBLEMS[problem], chip):
        names.add(launch.kernel.__name__)
        assert judge(launch, compile_launch(launch, chip), chip) == [], launch.kernel.__name__
    expected = KERNELS[problem.split(",")[0]]
    if (problem, capability) == (PREFILL, 90):
        expected = expected - SELECTION | {"score_and_choose"}
    assert names == expected


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("capability", CHIPS)
def test_every_problem_has_launches_that_fit_their_kernels(problem: str, capability: int) -> None:
    from benchmarks.kernel_gate.compile import specialize

    for launch in launches_of(PROBLEMS[problem], CHIPS[capability]):
        signature, _, _ = specialize(launch)
        assert set(signature) == {parameter.name for parameter in launch.kernel.params}
        assert all(0 < size < 2**31 for size in launch.grid)
        assert all(size < 2**16 for size in launch.grid[1:])


def test_gate_sees_a_tile_that_misses_the_large_matrix_instruction() -> None:
    launch = _launch("attend_tiles")
    narrow = Tile({**launch.tile.sizes, "QUERIES": 1}, 4, 2)
    compiled = compile_launch(replace(launch, tile=narrow), CHIPS[90])
    assert compiled.products["wgmma"] == 0
    assert "no wgmma at 128 rows" in "; ".join(judge(launch, compiled, CHIPS[90]))


def test_gate_sees_registers_that_spill() -> None:
    launch = _launch("attend_tiles")
    large = Tile({**launch.tile.sizes, "SLOTS": 128, "PIECES": 1}, 4, 2)
    assert "bytes spilled" in _judge(replace(launch, tile=large))


def test_gate_sees_shared_memory_that_a_chip_has_not() -> None:
    launch = _launch("score_blocks", APART)
    assert "bytes of shared memory" in "; ".join(
        judge(launch, compile_launch(launch, CHIPS[90]), replace(CHIPS[90], shared_memory=101_376))
    )


def test_gate_sees_loads_that_are_not_ahead() -> None:
    launch = _launch("score_blocks", APART)
    assert "no asynchronous copy" in _judge(replace(launch, tile=replace(launch.tile, stages=1)))


def test_gate_sees_more_registers_than_there_are() -> None:
    launch = _launch("choose_blocks", APART)
    compiled = Compiled(registers=255, spilled=0, shared=0, products={}, copies=0)
    crowded = replace(launch, tile=replace(launch.tile, warps=16))
    assert "a processor has" in "; ".join(judge(crowded, compiled, CHIPS[90]))
