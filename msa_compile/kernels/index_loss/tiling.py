"""The table of tiles of the index loss: read by the launches, and through them by the compile gate."""

from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Tile, divide_up, power_of_two_from

# Rows of queries and heads, key slots, warps, stages; the first that fits is taken.
_SUMS = (
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 2),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (32, 64, 4, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 1),
)
# Float32 is multiplied in three parts, which take registers: rows times slots times channels of which they fit.
_SINGLE_SUMS = ((32, 32, 4, 2), (32, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
_SINGLES = 32 * 32 * 64
# Key slots, which are the rows of products, queries, warps, stages.
_COMPARED = (
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 3),
    (64, 32, 8, 3),
    (64, 32, 8, 2),
    (32, 32, 4, 2),
    (16, 32, 4, 2),
    (16, 16, 4, 1),
)
_SINGLES_COMPARED = ((32, 16, 8, 2), (16, 16, 4, 2), (16, 16, 4, 1))
_SINGLE_KEYS_COMPARED = ((16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1))
# Slots of a step times channels, and queries of a step times channels, that leave registers for what is added up.
_KEPT, _PASSING = 128 * 128, 64 * 128
# Where neither operands nor accumulators of products pass through other registers there is room for 64 queries, and for
# more slots.
_ROOMY = 90
# A mask has an address for each logit: slots of a step of sums at most, and no more than 32 queries of a comparison.
_MASKED_SLOTS = 32
# Members of a list are bits of 32.
_LISTED = 32


def choose_sum_tile(
    chip: Chip, *, heads: int, head_dim: int, item_size: int, block_size: int | None, has_mask: bool
) -> Tile:
    """Choose the tile of `sum_logits` for `heads` heads a key head; `block_size` only where blocks are listed."""
    heads_tile = power_of_two_from(heads)
    channels = power_of_two_from(head_dim, 16)
    most = heads_tile * (_LISTED if block_size else 1 << 20)

    def fits(tile: tuple[int, int, int, int]) -> bool:
        rows, slots, _, stages = tile
        # Queries are an operand in shared memory, or pass through it on their way to registers.
        held = stages * slots + (rows if chip.has_large_tiles else rows // 2)
        is_narrow = slots <= _MASKED_SLOTS or not has_mask
        is_narrow = is_narrow and (item_size == 2 or rows * slots * channels <= _SINGLES)
        return heads_tile <= rows <= most and is_narrow and chip.fits(held * channels * item_size)

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
    chip: Chip, *, head_dim: int, width: int, item_size: int, block_size: int | None, has_mask: bool, is_of_keys: bool
) -> Tile:
    """Choose the tile of `compare_queries`, or of `compare_keys` with `is_of_keys`."""
    channels, width_tile = power_of_two_from(head_dim, 16), power_of_two_from(width, 16)
    widest = max(channels, width_tile)
    is_roomy = chip.capability == _ROOMY
    is_for_few = has_mask or not is_roomy or (block_size is not None and not is_of_keys)

    def fits(tile: tuple[int, int, int, int]) -> bool:
        slots, queries, _, stages = tile
        # Keys stay, queries of a head come by, and differences of probabilities meet what they are multiplied by.
        held = slots * (channels + width_tile) + queries * (stages * channels + width_tile) + slots * queries
        is_light = slots * widest <= _KEPT or (is_roomy and not is_of_keys)
        is_light = is_light and queries * widest <= _PASSING and (queries <= _LISTED or not is_for_few)
        return is_light and chip.fits(held * item_size)

    tiles: tuple[tuple[int, int, int, int], ...] = _COMPARED
    if item_size == 4:
        tiles = _SINGLE_KEYS_COMPARED if is_of_keys else _SINGLES_COMPARED
    slots, queries, warps, stages = next((tile for tile in tiles if fits(tile)), tiles[-1])
    slots = slots if block_size is None else min(slots, power_of_two_from(block_size, 16))
    sizes = {"CHANNELS": channels, "WIDTH_TILE": width_tile, "QUERIES": queries, "SLOTS": slots}
    if not is_of_keys:
        sizes["PIECES"] = 1 if block_size is None else divide_up(block_size, slots)
    return Tile(sizes, warps, stages)
