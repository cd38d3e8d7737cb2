"""The table of tiles of the index loss: read by the launches, and through them by the compile gate."""

from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Tile, divide_up, power_of_two_from

# Rows of queries and heads, key slots, warps, stages; the first that fits is taken.
_SUMS = (
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (32, 64, 4, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 1),
)
# Float32 is multiplied in three parts, which take registers.
_SINGLE_SUMS = ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
# Key slots, queries, warps, stages: of the slots are the rows of products.
_COMPARED = (
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 3),
    (64, 64, 8, 2),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 2),
    (16, 16, 4, 1),
)
_SINGLES_COMPARED = ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
# Members of a list are bits of 32.
_LISTED = 32
# Rows times columns of the gradient that a warp accumulates beside a teacher, a head's logits and a student.
_ACCUMULATED = 64 * 128 // 4


def choose_sum_tile(chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int | None) -> Tile:
    """Choose the tile of `sum_logits` for `heads` heads a key head; `block_size` only where blocks are listed."""
    heads_tile = power_of_two_from(heads)
    channels = power_of_two_from(head_dim, 16)
    most = heads_tile * (_LISTED if block_size else 1 << 20)

    def fits(tile: tuple[int, int, int, int]) -> bool:
        rows, slots, _, stages = tile
        held = stages * slots + (rows if chip.has_large_tiles else 0)
        return heads_tile <= rows <= most and chip.fits(held * channels * item_size)

    tiles = _SINGLE_SUMS if item_size == 4 else _SUMS
    rows, slots, warps, stages = next((tile for tile in tiles if fits(tile)), (max(16, heads_tile), 16, 4, 1))
    slots = slots if block_size is None else min(slots, power_of_two_from(block_size, 16))
    sizes = {
        "CHANNELS": channels,
        "HEADS_TILE": heads_tile,
        "QUERIES": rows // heads_tile,
        "SLOTS": slots,
        "PIECES": 1 if block_size is None else divide_up(block_size, slots),
    }
    return Tile(sizes, warps, stages)


def choose_comparison_tile(
    chip: Chip, *, head_dim: int, width: int, item_size: int, block_size: int | None, is_of_keys: bool
) -> Tile:
    """Choose the tile of `compare_queries`, or of `compare_keys` with `is_of_keys`."""
    channels, width_tile = power_of_two_from(head_dim, 16), power_of_two_from(width, 16)

    def fits(tile: tuple[int, int, int, int]) -> bool:
        slots, queries, warps, stages = tile
        # Keys stay, queries of a head come by, and differences of probabilities meet what they are multiplied by.
        held = slots * (channels + width_tile) + queries * (stages * channels + width_tile) + slots * queries
        of_gradient = (slots if is_of_keys else queries) * width_tile
        is_listed = block_size is not None and not is_of_keys
        return (
            chip.fits(held * item_size)
            and of_gradient <= warps * _ACCUMULATED
            and (queries <= _LISTED or not is_listed)
        )

    tiles = _SINGLES_COMPARED if item_size == 4 else _COMPARED
    slots, queries, warps, stages = next((tile for tile in tiles if fits(tile)), tiles[-1])
    slots = slots if block_size is None else min(slots, power_of_two_from(block_size, 16))
    sizes = {"CHANNELS": channels, "WIDTH_TILE": width_tile, "QUERIES": queries, "SLOTS": slots}
    if not is_of_keys:
        sizes["PIECES"] = 1 if block_size is None else divide_up(block_size, slots)
    return Tile(sizes, warps, stages)
