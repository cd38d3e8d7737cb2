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
# The gradients of queries hold two tiles of rows; chips that keep them in registers have half as many.
_QUERY_GRADIENTS = (
    (128, 64, 8, 2),
    (128, 32, 8, 2),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 1),
)
# Those of keys and values accumulate two tiles of slots, and load two of rows ahead.
_KEY_GRADIENTS = (
    (64, 64, 8, 3),
    (64, 64, 8, 2),
    (64, 32, 8, 2),
    (32, 32, 8, 2),
    (16, 32, 4, 1),
)
_SINGLE_GRADIENTS = ((16, 16, 4, 2), (16, 16, 4, 1))
# Blocks outside: a whole block is held, and tiles of rows are loaded ahead.
_OUTER = ((128, 8, 2), (64, 8, 3), (64, 8, 2), (32, 8, 2), (16, 4, 2))
# What 8 warps hold of results and queries, and of logits: rows times two channels and a slot.
_HELD = 128 * (2 * 64 + 128)
# Float32 is multiplied in three parts: rows, and channels times slots, of which the parts fit.
_ROWS_OF_SINGLES, _HELD_SINGLES = 32, 64 * 32
# Larger blocks would need too many registers for the logits of a row.
_OUTER_BLOCK = 128
# What blocks outside cost, in times of the products that must be done: a result is written and read for each block of a
# query. And what each further query of a tile adds to its blocks, as a share of a selection. Both from arithmetic and
# from what is reported of trained models; `gpu_check` times both orders.
_OUTER_COST, _ADDED = 4.0, 1 / 14
# Rows that the large matrix instructions take; fewer cost as much.
_FULL_ROWS = 64
# Queries of an item of a block's list are at most so many tiles.
_TILES_AN_ITEM = 64
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


def choose_query_gradient_tile(chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int) -> Tile:
    """Choose the tile of `differentiate_tiles`."""
    heads_tile = power_of_two_from(heads)
    channels = power_of_two_from(head_dim, 16)
    most = 128 * 128 if chip.has_large_tiles else 64 * 128

    def fits(tile: tuple[int, int, int, int]) -> bool:
        rows, slots, _, stages = tile
        held = 2 * stages * slots + (2 * rows if chip.has_large_tiles else 0)
        return (
            heads_tile <= rows <= heads_tile * _QUERIES
            and rows * channels <= most
            and chip.fits(held * channels * item_size)
        )

    tiles = _SINGLE_GRADIENTS if item_size == 4 else _QUERY_GRADIENTS
    rows, slots, warps, stages = next((tile for tile in tiles if fits(tile)), (max(16, heads_tile), 16, 4, 1))
    slots = min(slots, power_of_two_from(block_size, 16))
    sizes = {
        "CHANNELS": channels,
        "HEADS_TILE": heads_tile,
        "QUERIES": rows // heads_tile,
        "SLOTS": slots,
        "PIECES": divide_up(block_size, slots),
    }
    return Tile(sizes, max(warps, min(8, rows * channels // _ACCUMULATED)), stages)


def choose_key_gradient_tile(chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int) -> Tile:
    """Choose the tile of `differentiate_blocks`, whose queries need not be neighbours."""
    heads_tile = power_of_two_from(heads)
    channels = power_of_two_from(head_dim, 16)

    def fits(tile: tuple[int, int, int, int]) -> bool:
        rows, slots, _, stages = tile
        held = 2 * stages * rows + (2 * slots if chip.has_large_tiles else 0)
        return heads_tile <= rows and slots * channels <= 64 * 128 and chip.fits(held * channels * item_size)

    tiles = _SINGLE_GRADIENTS if item_size == 4 else _KEY_GRADIENTS
    rows, slots, warps, stages = next((tile for tile in tiles if fits(tile)), (max(16, heads_tile), 16, 4, 1))
    slots = min(slots, power_of_two_from(block_size, 16))
    sizes = {"CHANNELS": channels, "HEADS_TILE": heads_tile, "QUERIES": rows // heads_tile, "SLOTS": slots}
    return Tile(sizes, warps, stages)


def count_queries_an_item(*, queries: int, listed: int, blocks: int) -> int:
    """Say how many of `listed` queries of all blocks an item has: about twice those of a block, in whole tiles."""
    tiles = power_of_two_from(divide_up(2 * listed, blocks * queries))
    return queries * min(tiles, _TILES_AN_ITEM)


def is_for_blocks(chip: Chip, *, heads: int, item_size: int, queries: int, blocks: int, topk: int) -> bool:
    """Whether blocks outside are expected to cost less than tiles of `queries` queries; nobody knows the selection.

    A tile meets every block that one of its queries selected: as many as one of them has, or as many times more as it
    has queries, but not more than there are.
    """
    widened = min(1 + (queries - 1) * _ADDED, blocks / topk)
    rows = queries * power_of_two_from(heads)
    idle = max(1.0, _FULL_ROWS / rows) if chip.has_large_tiles and item_size == 2 else 1.0
    return widened * idle > _OUTER_COST


def choose_block_tile(chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int) -> Tile | None:
    """Choose the tile of `attend_blocks`; None where a block and queries do not fit into shared memory."""
    heads_tile = power_of_two_from(heads)
    channels = power_of_two_from(head_dim, 16)
    slots = power_of_two_from(block_size, 16)

    def fits(tile: tuple[int, int, int]) -> bool:
        rows, _, stages = tile
        is_held = rows * (2 * channels + slots) <= _HELD
        if item_size == 4:
            is_held = rows <= _ROWS_OF_SINGLES and slots * channels <= _HELD_SINGLES
        return heads_tile <= rows and is_held and chip.fits((stages * rows + 2 * slots) * channels * item_size)

    found = next((tile for tile in _OUTER if slots <= _OUTER_BLOCK and fits(tile)), None)
    if found is None:
        return None
    rows, warps, stages = found
    sizes = {"CHANNELS": channels, "HEADS_TILE": heads_tile, "QUERIES": rows // heads_tile, "SLOTS": slots}
    return Tile(sizes, warps, stages)
