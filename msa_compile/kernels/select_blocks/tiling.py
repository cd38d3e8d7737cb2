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
# Candidates are scored again by tiles of fewer queries, for the more of them there are the more blocks they want.
_AGAIN = _HALVES
# Programs that share the list of a tile make up so many a processor, and have so many blocks each, if all are listed.
_PROGRAMS_AGAIN, _BLOCKS_AGAIN = 4, 8
# Places of a running choice that stay in registers beside the scores of so many rows, on Hopper.
_FUSED = {256: 16, 128: 32}
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
    packed = _pack(groups, is_shared=is_shared)
    # Products of 8 bits are at least 32 wide.
    width_tile = power_of_two_from(width, 32 if item_size == 1 else 16)
    # Scales take registers, which 256 rows do not leave on Blackwell.
    is_large = chip.has_large_tiles and (item_size > 1 or chip.capability < 100)
    tiles: tuple[tuple[int, int, int, int], ...] = (_LARGE, *_HALVES) if is_large else _HALVES
    rows, slots, warps, stages = _find_tile(
        chip,
        tiles,
        packed=packed,
        rows_of_call=power_of_two_from(packed * query_length, 16),
        width_tile=width_tile,
        item_size=item_size,
        block_size=block_size,
        has_mask=has_mask,
    )
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


def fuse_choice(chip: Chip, grid: ScoreGrid, *, topk: int, item_size: int) -> Tile | None:
    """Choose the tile of `score_and_choose`, that of the scores; None where the choice does not fit beside them.

    Where programs share the keys of a query none of them can choose, and a tile of several blocks, of one group, or of
    float32, has no registers left. Calls with a mask, documents or padding do not ask.
    """
    sizes = grid.tile.sizes
    places = power_of_two_from(topk, 16)
    fits = places <= _FUSED.get(sizes["PACKED_GROUPS"] * sizes["QUERIES"], 0) and item_size == 2
    is_simple = sizes["BLOCKS"] == 1 and sizes["PACKED_GROUPS"] > 1 and grid.splits == 1
    if chip.capability != 90 or not is_simple or not fits:
        return None
    kept = {name: size for name, size in sizes.items() if name != "BLOCKS"}
    return Tile({**kept, "PLACES": places}, grid.tile.warps, grid.tile.stages)


def cut_candidates(
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
    """Choose the tile of `rescore_blocks` and the grid; a program has a share of a list of unknown length."""
    packed = _pack(groups, is_shared=is_shared)
    width_tile = power_of_two_from(width, 16)
    rows, slots, warps, stages = _find_tile(
        chip,
        _AGAIN,
        packed=packed,
        rows_of_call=power_of_two_from(packed * query_length, 16),
        width_tile=width_tile,
        item_size=item_size,
        block_size=block_size,
        has_mask=has_mask,
    )
    slots = min(slots, power_of_two_from(block_size, 16))
    sizes = {"WIDTH_TILE": width_tile, "PACKED_GROUPS": packed, "QUERIES": rows // packed, "SLOTS": slots}
    heads = 1 if packed > 1 else groups
    programs = divide_up(query_length, rows // packed) * batch * heads
    splits = max(1, min(_PROGRAMS_AGAIN * chip.processors // programs, blocks // _BLOCKS_AGAIN))
    return ScoreGrid(
        Tile({**sizes, "PIECES": divide_up(block_size, slots)}, warps, stages), heads, rows // packed, 1, splits
    )


def _pack(groups: int, *, is_shared: bool) -> int:
    """Say how many groups a tile has."""
    packed = power_of_two_from(groups)
    return packed if is_shared and packed <= _PACKED else 1


def _find_tile(
    chip: Chip,
    tiles: tuple[tuple[int, int, int, int], ...],
    *,
    packed: int,
    rows_of_call: int,
    width_tile: int,
    item_size: int,
    block_size: int,
    has_mask: bool,
) -> tuple[int, int, int, int]:
    """Return the first tile that fits: rows, slots, warps, stages."""
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

    return next((tile for tile in tiles if fits(tile)), (max(16, packed), 16, 4, 1))


def choose_round_tile(*, width: int) -> Tile:
    """Choose the tile of `round_keys`."""
    width_tile = power_of_two_from(width, 16)
    return Tile({"WIDTH_TILE": width_tile, "ROWS": max(1, 4096 // width_tile)}, 4, 1)


def choose_list_tile(*, blocks: int) -> Tile:
    """Choose the tile of `list_candidates`."""
    return Tile({"COLUMNS": min(1024, power_of_two_from(blocks, 16))}, 4, 1)


def choose_tile(*, query_length: int, blocks: int, topk: int) -> Tile:
    """Choose the tile of `choose_blocks`: a row of scores stays in the registers of one program."""
    columns = power_of_two_from(blocks, 16)
    rows = min(max(1, 4096 // columns), 8, power_of_two_from(query_length))
    warps = min(32, max(4, rows * columns // 1024))
    return Tile({"ROWS": rows, "COLUMNS": columns, "PLACES": power_of_two_from(topk)}, warps, 1)
