"""The table of tiles of block selection: read by the launches, and through them by the compile gate."""

from dataclasses import dataclass

from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Tile, divide_up, power_of_two_from

# Rows of queries, key slots, warps, stages; the first that fits is taken.
_LARGE = (256, 128, 8, 3)
_HALVES = (
    (128, 128, 8, 3),
    (128, 128, 8, 2),
    (64, 128, 4, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 2),
    (32, 128, 4, 2),
    (16, 128, 4, 3),
    (16, 128, 4, 2),
    (16, 64, 4, 2),
    (16, 32, 4, 1),
)
# A mask has an address for each score, and float32 is multiplied in three parts: both take registers.
_MASKED = ((64, 64, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2), (16, 32, 4, 1))
_SINGLES = ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
# A tile packs at most so many groups: more of them leave too few queries.
_PACKED = 64


@dataclass(frozen=True, slots=True)
class ScoreGrid:
    """How the scores of a call are cut into programs.

    Args:
        tile: sizes and options of `score_blocks`.
        heads: key heads that are programs of their own: `Hkv`, or 1 where groups are packed.
        queries: queries a program.
        blocks_a_split: key blocks a program.
        splits: programs that share the key blocks of a tile of queries.
    """

    tile: Tile
    heads: int
    queries: int
    blocks_a_split: int
    splits: int


def cut_scores(
    chip: Chip,
    *,
    batch: int,
    groups: int,
    query_length: int,
    blocks: int,
    width: int,
    item_size: int,
    block_size: int,
    is_shared: bool,
    has_mask: bool,
) -> ScoreGrid:
    """Choose the tile of the scores and the grid, from shapes and the chip alone."""
    packed = power_of_two_from(groups)
    packed = packed if is_shared and packed <= _PACKED else 1
    width_tile = power_of_two_from(width, 16)
    rows_of_call = power_of_two_from(packed * query_length, 16)
    tiles: tuple[tuple[int, int, int, int], ...] = (_LARGE, *_HALVES) if chip.has_large_tiles else _HALVES
    if has_mask:
        tiles = _MASKED
    if item_size == 4:
        tiles = _SINGLES

    def fits(tile: tuple[int, int, int, int]) -> bool:
        rows, slots, _, stages = tile
        # Queries are an operand in shared memory, or in registers.
        held = stages * slots + (rows if chip.has_large_tiles else 0)
        # Several blocks a step are pooled through shared memory.
        pooled = 32 * rows if block_size < slots else 0
        return packed <= rows <= rows_of_call and chip.fits(held * width_tile * item_size + pooled)

    rows, slots, warps, stages = next((tile for tile in tiles if fits(tile)), (max(16, packed), 16, 4, 1))
    slots_a_block = min(slots, power_of_two_from(block_size))
    blocks_a_step = slots // slots_a_block
    tile = Tile(
        {
            "WIDTH_TILE": width_tile,
            "PACKED_GROUPS": packed,
            "QUERIES": rows // packed,
            "BLOCKS": blocks_a_step,
            "SLOTS": slots_a_block,
            "PIECES": divide_up(block_size, slots_a_block),
        },
        warps,
        stages,
    )
    heads = 1 if packed > 1 else groups
    programs = divide_up(query_length, rows // packed) * batch * heads
    # Few queries read every key once and compute little: more programs than processors hide the latency of memory.
    wanted = (4 if rows <= 32 else 2) * chip.processors
    steps = divide_up(blocks, blocks_a_step)
    steps_a_split = divide_up(steps, max(1, min(steps, wanted // programs)))
    return ScoreGrid(tile, heads, rows // packed, steps_a_split * blocks_a_step, divide_up(steps, steps_a_split))


def choose_tile(*, query_length: int, blocks: int, topk: int) -> Tile:
    """Choose the tile of `choose_blocks`: a row of scores stays in the registers of one program."""
    columns = power_of_two_from(blocks, 16)
    rows = min(max(1, 4096 // columns), 8, power_of_two_from(query_length))
    warps = min(32, max(4, rows * columns // 1024))
    return Tile({"ROWS": rows, "COLUMNS": columns, "PLACES": power_of_two_from(topk)}, warps, 1)
