"""From a plugin without Python to its launch: which kernel, its constants, its tile, its grid in sizes of the tensors.

What depends on the chip is decided when the graph is lowered, because the size of a list depends on it, and once more
when the kernel is compiled; both ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from msa_compile.export.engine.plugins import Numbers, Plugin, Shapes, Size, blocks_of
from msa_compile.kernels.block_sparse_attention.tiling import choose_attention_tile, choose_list_tile
from msa_compile.kernels.chip import Chip
from msa_compile.kernels.launch import Tile, divide_up, power_of_two_from
from msa_compile.kernels.select_blocks.tiling import choose_tile, cut_scores

# Whether TensorRT asks the driver for more shared memory than every kernel has is not documented, so tiles do without.
SHARED_MEMORY = 48 << 10
# Key blocks that one program scores, a number that has to do for every length: enough programs at 64K keys and one
# query to occupy a chip, and few enough to read the queries of a long prompt rarely.
_BLOCKS_A_SPLIT = 16
# A launch has any number of queries; tiles are chosen for many.
_MANY = 4096


@dataclass(frozen=True)
class Entry:
    """One launch of a plugin.

    Attributes:
        kernel: Name of the `triton.jit` function in `triton_entries`.
        constants: What is fixed in it, the sizes of the tile apart.
        tile: How it is compiled.
        grid: Programs.
    """

    kernel: str
    constants: Mapping[str, Any]
    tile: Tile
    grid: tuple[Size, Size, Size]


def small(chip: Chip) -> Chip:
    """A chip whose tiles fit into the shared memory that a plugin surely gets, on `chip` too.

    As on Hopper queries count as an operand in shared memory: on other chips the compiler may put them there.
    """
    return Chip(90, SHARED_MEMORY, chip.processors)


def attention_tile(numbers: Numbers, item_size: int, chip: Chip) -> Tile:
    """The tile of `attend_tiles`; numbers are ``heads``, ``groups``, ``head_dim`` and ``block_size``."""
    heads = int(numbers["heads"]) // int(numbers["groups"])
    return choose_attention_tile(
        small(chip),
        heads=heads,
        head_dim=int(numbers["head_dim"]),
        item_size=item_size,
        block_size=int(numbers["block_size"]),
    )


def entry_of(plugin: Plugin, shapes: Shapes, numbers: Numbers, item_size: int, chip: Chip) -> Entry:
    """The launch of a plugin.

    Args:
        plugin: One that runs without Python.
        shapes: Of its inputs, by name.
        numbers: Its attributes.
        item_size: Bytes of an element of the first input.
        chip: What the kernel is compiled for.
    """
    make = next(make for name, make in _ENTRIES.items() if plugin.name.startswith(name))
    return make(plugin, shapes, numbers, item_size, chip)


def _flags(numbers: Numbers) -> dict[str, Any]:
    return {"IS_PADDED": bool(numbers["is_padded"]), "IS_POSITIONED": bool(numbers["is_positioned"])}


def _score(plugin: Plugin, shapes: Shapes, numbers: Numbers, item_size: int, chip: Chip) -> Entry:
    batch, _, queries, _ = shapes["index_query"]
    keys = shapes["index_key"][2]
    block_size, groups, key_heads = (int(numbers[name]) for name in ("block_size", "groups", "key_heads"))
    cut = cut_scores(
        small(chip),
        batch=1,
        groups=groups,
        query_length=_MANY,
        blocks=_MANY,
        width=int(numbers["head_dim"]),
        item_size=item_size,
        block_size=block_size,
        is_shared=key_heads == 1,
        has_mask=bool(numbers["is_padded"]),
    )
    blocks_a_step = cut.tile.sizes["BLOCKS"]
    blocks_a_split = divide_up(_BLOCKS_A_SPLIT, blocks_a_step) * blocks_a_step
    constants = {
        "GROUPS": groups,
        "KEY_HEADS": key_heads,
        "BLOCK_SIZE": block_size,
        "WIDTH": int(numbers["head_dim"]),
        "BLOCKS_A_SPLIT": blocks_a_split,
        **_flags(numbers),
    }
    splits = blocks_of(blocks_of(keys, block_size), blocks_a_split)
    grid = (blocks_of(queries, cut.queries), batch * cut.heads, splits)
    return Entry("score_blocks_entry", constants, cut.tile, grid)


def _choose(plugin: Plugin, shapes: Shapes, numbers: Numbers, item_size: int, chip: Chip) -> Entry:
    batch, _, _, queries = shapes["scores"]
    groups, topk = int(numbers["groups"]), int(numbers["topk"])
    tile = choose_tile(query_length=_MANY, blocks=int(numbers["most_blocks"]), topk=topk)
    constants = {
        "GROUPS": groups,
        "BLOCK_SIZE": int(numbers["block_size"]),
        "TOPK": topk,
        "LOCAL_BLOCKS": int(numbers["local_blocks"]),
        "SINK_BLOCKS": int(numbers["sink_blocks"]),
        **_flags(numbers),
    }
    grid = (blocks_of(queries, tile.sizes["ROWS"]), batch * groups, 1)
    return Entry("choose_blocks_entry", constants, tile, grid)


def _list(plugin: Plugin, shapes: Shapes, numbers: Numbers, item_size: int, chip: Chip) -> Entry:
    batch, _, queries, _ = shapes["block_ids"]
    groups, topk, queries_a_tile = (int(numbers[name]) for name in ("groups", "topk", "queries_a_tile"))
    tile = choose_list_tile(queries=queries_a_tile, topk=topk)
    constants = {"GROUPS": groups, "BLOCK_SIZE": int(numbers["block_size"]), "TOPK": topk, **_flags(numbers)}
    grid = (blocks_of(queries, queries_a_tile), batch * groups, 1)
    return Entry("list_blocks_entry", constants, tile, grid)


def _attend(plugin: Plugin, shapes: Shapes, numbers: Numbers, item_size: int, chip: Chip) -> Entry:
    batch, _, queries, _ = shapes["query"]
    groups = int(numbers["groups"])
    tile = attention_tile(numbers, item_size, chip)
    constants: dict[str, Any] = {
        "SCALE": float(numbers["scale"]),
        "SOFTCAP": float(numbers["softcap"]) if "softcap" in numbers else None,
        "GROUPS": groups,
        "HEADS": int(numbers["heads"]) // groups,
        "HEAD_DIM": int(numbers["head_dim"]),
        "BLOCK_SIZE": int(numbers["block_size"]),
        "LIST_SIZE": int(numbers["list_size"]),
        **_flags(numbers),
    }
    if "sinks" not in plugin.tensors:
        constants["sinks"] = None
    grid = (blocks_of(queries, tile.sizes["QUERIES"]), batch * groups, 1)
    return Entry("attend_blocks_entry", constants, tile, grid)


_ENTRIES: dict[str, Callable[[Plugin, Shapes, Numbers, int, Chip], Entry]] = {
    "ScoreBlocks": _score,
    "ChooseBlocks": _choose,
    "ListBlocks": _list,
    "AttendBlocks": _attend,
}


def lists_of(numbers: Numbers, topk: int, item_size: int, chip: Chip) -> tuple[int, int]:
    """Queries that share a list, and entries that a list has room for."""
    queries = attention_tile(numbers, item_size, chip).sizes["QUERIES"]
    return queries, queries * power_of_two_from(topk)
