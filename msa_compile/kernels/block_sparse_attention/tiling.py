"""The table of tiles of block-sparse attention: read by the launches, and through them by the compile gate."""

from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Tile, divide_up, power_of_two_from

# Rows of queries and heads, key slots, warps, stages; the first that fits is taken.
_HALVES = (
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 1),
)
# Float32 is multiplied in three parts, which take registers.
_SINGLES = ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
# Rows times channels that a warp accumulates without spilling.
_ACCUMULATED = 64 * 128 // 4
# Members of a list are bits of 32.
_QUERIES = 32
# Comparisons that a step of `list_blocks` makes.
_COMPARED = 8192


def choose_attention_tile(chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int) -> Tile:
    """Choose the tile of `attend_tiles` for `heads` heads a group."""
    heads_tile = power_of_two_from(heads)
    channels = power_of_two_from(head_dim, 16)
    tiles = _SINGLES if item_size == 4 else _HALVES

    def fits(tile: tuple[int, int, int, int]) -> bool:
        rows, slots, _, stages = tile
        # Queries are an operand in shared memory, or in registers; keys and values always lie there.
        held = 2 * stages * slots + (rows if chip.has_large_tiles else 0)
        return heads_tile <= rows <= heads_tile * _QUERIES and chip.fits(held * channels * item_size)

    fallback = (max(16, heads_tile), 16, 4, 1)
    rows, slots, warps, stages = next((tile for tile in tiles if fits(tile)), fallback)
    slots = min(slots, power_of_two_from(block_size, 16))
    sizes = {
        "CHANNELS": channels,
        "HEADS_TILE": heads_tile,
        "QUERIES": rows // heads_tile,
        "SLOTS": slots,
        "PIECES": divide_up(block_size, slots),
    }
    return Tile(sizes, max(warps, min(8, rows * channels // _ACCUMULATED)), stages)


def choose_list_tile(*, queries: int, topk: int) -> Tile:
    """Choose the tile of `list_blocks` for lists of `queries` queries."""
    places = power_of_two_from(topk)
    size = queries * places
    part = max(1, min(size, _COMPARED // size))
    return Tile({"QUERIES": queries, "PLACES": places, "PART": part}, 4, 1)


def is_for_slots(chip: Chip, *, batch: int, groups: int, query_length: int, queries: int) -> bool:
    """Whether a call has too few queries to fill the chip with tiles of `queries` of them."""
    return query_length <= 16 and batch * groups * divide_up(query_length, queries) < 4 * chip.processors


def choose_slots_tile(chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int) -> Tile:
    """Choose the tile of `attend_slots`."""
    channels = power_of_two_from(head_dim, 16)
    rows = power_of_two_from(heads, 16)
    slots, stages = (64, 3) if item_size == 2 and channels <= 128 else (32, 2)
    if not chip.fits((rows + 2 * stages * slots) * channels * item_size):
        slots, stages = 32, 2
    slots = min(slots, power_of_two_from(block_size, 16))
    sizes = {"CHANNELS": channels, "ROWS": rows, "SLOTS": slots, "PIECES": divide_up(block_size, slots)}
    return Tile(sizes, 4, stages)


def count_splits(chip: Chip, *, programs: int, topk: int) -> int:
    """Say how many programs share the places of a query, so that about two a processor run."""
    splits = max(1, min(topk, 2 * chip.processors // programs))
    return divide_up(topk, divide_up(topk, splits))
