"""The loss that aligns index scores with attention on a GPU: normalisers first, then the comparison, then index keys.

Arguments and result as in `align_loss.py`, for float16, bfloat16 and float32. Nothing waits for the device, grids
follow from shapes alone, nothing is added by atomics, and nothing of the size `Tq * Tk` is ever held.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention.triton_arguments import (
    cut_ids,
    describe_bounds,
    describe_operands,
    list_tiles,
)
from msa_compile.kernels.block_sparse_attention.triton_turn import turn_around
from msa_compile.kernels.chip import Chip, chip_of
from msa_compile.kernels.index_loss.align_loss import AlignSums, Support
from msa_compile.kernels.index_loss.tiling import choose_comparison_tile, choose_sum_tile
from msa_compile.kernels.index_loss.triton_compare import compare_queries
from msa_compile.kernels.index_loss.triton_index_keys import add_key_parts, compare_keys
from msa_compile.kernels.index_loss.triton_sums import sum_logits
from msa_compile.kernels.index_loss.triton_teacher import sum_teacher
from msa_compile.kernels.launch import Launch, Tile, divide_up, power_of_two_from

# Where the support is everything that is visible there are no lists: what kernels are told in their place.
_NO_LISTS = {"starts": None, "members": None, "counts": None, "list_size": 0, "chunk_start": 0}
_NO_TURN = {
    **dict.fromkeys(("block_ids", "queries", "list_start", "item_start", "item_blocks")),
    **dict.fromkeys(("topk", "blocks", "list_size", "items"), 0),
    "QUERIES_AN_ITEM": 1,
    "PLACES": 1,
}


def align_sums(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    support: Support,
    *,
    index_scale: float | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    power: float = 1.0,
    has_gradients: bool = True,
) -> AlignSums:
    """Add up the loss over queries, and its gradients where `has_gradients`; as in `align_loss.py`."""
    device = query.device
    losses = torch.zeros(index_query.shape[:3], dtype=torch.float32, device=device)
    log_sums = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    index_log_sums = torch.full(losses.shape, -torch.inf, dtype=torch.float32, device=device)
    of_query, of_key = None, None
    if has_gradients:
        of_query = torch.zeros(index_query.shape, dtype=torch.float32, device=device)
        of_key = torch.zeros(index_key.shape, dtype=torch.float32, device=device)
    if query.numel() > 0 and key.numel() > 0:
        # The two of a product have one dtype.
        index_query, index_key = _alike(index_query, index_key)
        query, key = _alike(query, key)
        for launch in find_launches(
            index_query,
            index_key,
            query,
            key,
            support,
            losses,
            log_sums,
            index_log_sums,
            of_query,
            of_key,
            index_scale=index_scale,
            scale=scale,
            softcap=softcap,
            power=power,
            chip=chip_of(device),
        ):
            launch.run()
    queries = (index_log_sums != -torch.inf).any(1).sum()
    return AlignSums(losses.sum() / max(1, losses.shape[1]), queries, of_query, of_key)


def _alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def find_launches(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    support: Support,
    losses: Tensor,
    log_sums: Tensor,
    index_log_sums: Tensor,
    grad_index_query: Tensor | None,
    grad_index_key: Tensor | None,
    *,
    index_scale: float | None,
    scale: float | None,
    softcap: float | None,
    power: float,
    chip: Chip,
) -> Iterator[Launch]:
    """Give the launches of a call, in order; no tensor is read, so they may be on `meta`.

    They write, all float32, `losses` and `index_log_sums`, `[B, Hkv, Tq]`, and `log_sums`, `[B, Hq, Tq]`, as the
    kernels say, and `grad_index_query` and `grad_index_key`, in the shapes of `index_query` and `index_key` and zeros
    before. Either both gradients are there or none.
    """
    groups, ids, counted = key.shape[1], None, None
    block_size = support.block_size or 1
    assert support.block_size or (support.block_ids is None and not support.leaves_out), "blocks of which size?"
    if support.block_ids is not None:
        ids = cut_ids(support.block_ids, key.shape[2], block_size)
    if support.counted is not None:
        counted = support.counted.expand(query.shape[0], -1).contiguous().view(torch.uint8)
    bounds = describe_bounds(
        query,
        key,
        block_size=block_size,
        window=support.window,
        query_start=support.query_start,
        key_start=support.key_start,
        key_end=support.key_end,
        document_start=support.document_start,
        is_causal=support.is_causal,
    )
    index_key = index_key if index_key.stride(-1) == 1 else index_key.contiguous()
    keys_of_groups = index_key.expand(-1, groups, -1, -1)
    of_logits: dict[str, Any] = {"scale": scale, "softcap": softcap}
    teacher = describe_operands(query, key, support.mask, **of_logits)
    # One key head for all groups has their queries as its heads, which is one reading of the keys; but the blocks of a
    # list are those of one group.
    keys_of_student = index_key if ids is None else keys_of_groups
    student = describe_operands(index_query, keys_of_student, None, scale=index_scale, softcap=None)
    student |= {name: value for name, value in teacher.items() if name.startswith("mask")}
    # Attention is of all that a query sees, and the student of what is compared.
    everything = {"LOCAL_BLOCKS": 0, "SINK_BLOCKS": 0}
    left_out = {"LOCAL_BLOCKS": support.local_blocks, "SINK_BLOCKS": support.sink_blocks}
    teacher |= {"log_sums": log_sums, "counted": counted}
    student |= {"log_sums": index_log_sums, "counted": counted}
    yield from _sum_launches({**teacher, **everything, "HEADS_A_MASK": teacher["HEADS"]}, bounds, ids, chip)
    yield from _sum_launches({**student, **left_out, "HEADS_A_MASK": 1}, bounds, ids, chip)

    compared = describe_operands(
        query, key, support.mask, **of_logits, index_query=index_query, index_key=keys_of_groups
    )
    compared |= {"index_scale": student["scale"], "WIDTH": student["HEAD_DIM"], "counted": counted}
    compared |= {"log_sums": log_sums, "index_log_sums": index_log_sums}
    of_power: dict[str, Any] = {**left_out, "log_weights": None, "shares": None, "POWER": float(power)}
    is_plain = power == 1.0 and not support.leaves_out
    if not is_plain:
        log_weights, shares = torch.empty(2, *losses.shape, dtype=torch.float32, device=losses.device).unbind()
        of_power |= {"log_weights": log_weights, "shares": shares}
    compared |= of_power
    shape: dict[str, Any] = {
        "head_dim": compared["HEAD_DIM"],
        "width": compared["WIDTH"],
        "item_size": max(query.dtype.itemsize, index_query.dtype.itemsize),
        "block_size": None if ids is None else block_size,
        "has_mask": support.mask is not None,
    }
    tile = choose_comparison_tile(chip, **shape, is_of_keys=False)
    for listed, grid, told in _cut(bounds, ids, tile.sizes["QUERIES"], query.shape[0]):
        yield from listed
        if not is_plain:
            sizes = {name: size for name, size in tile.sizes.items() if name != "WIDTH_TILE"}
            of_teacher = Tile(sizes, tile.warps, tile.stages)
            yield Launch(sum_teacher, grid, {**teacher, **of_power, **told}, of_teacher)
        written = {"losses": losses, "grad_index_query": grad_index_query}
        yield Launch(compare_queries, grid, {**compared, **told, **written}, tile)
    if grad_index_key is None:
        return
    tile = choose_comparison_tile(chip, **shape, is_of_keys=True)
    if ids is None:
        yield from _slot_launches(grad_index_key, compared, bounds, tile)
    else:
        yield from _item_launches(ids, grad_index_key, compared, bounds, tile)


def _sum_launches(operands: dict[str, Any], bounds: dict[str, Any], ids: Tensor | None, chip: Chip) -> Iterator[Launch]:
    batch, key_heads = operands["key"].shape[:2]
    tile = choose_sum_tile(
        chip,
        heads=operands["HEADS"],
        head_dim=operands["HEAD_DIM"],
        item_size=operands["query"].dtype.itemsize,
        block_size=None if ids is None else bounds["BLOCK_SIZE"],
        has_mask=operands["mask"] is not None,
    )
    for listed, grid, told in _cut({**bounds, "groups": key_heads}, ids, tile.sizes["QUERIES"], batch):
        yield from listed
        yield Launch(sum_logits, grid, {**operands, **told}, tile)


def _cut(
    bounds: dict[str, Any], ids: Tensor | None, queries: int, batch: int
) -> Iterator[tuple[list[Launch], tuple[int, int, int], dict[str, Any]]]:
    """Cut the queries into tiles; give launches that come before, the grid, and what a kernel is told."""
    if ids is None:
        grid = (divide_up(bounds["query_length"], queries), batch * bounds["groups"], 1)
        yield [], grid, {**bounds, **_NO_LISTS}
        return
    for launch, told in list_tiles(ids, bounds, queries):
        yield [launch], launch.grid, told


def _slot_launches(
    grad_index_key: Tensor, compared: dict[str, Any], bounds: dict[str, Any], tile: Tile
) -> Iterator[Launch]:
    batch, key_heads, key_length, width = grad_index_key.shape
    groups, slots = bounds["groups"], tile.sizes["SLOTS"]
    tiles = divide_up(key_length, slots)
    parts = grad_index_key
    if key_heads < groups:
        parts = torch.empty(batch, groups, key_length, width, dtype=torch.float32, device=grad_index_key.device)
    told = {**compared, **bounds, **_NO_TURN, "parts": parts}
    yield Launch(compare_keys, (tiles, batch * groups, 1), told, tile)
    if key_heads < groups:
        of_slots = {"item_start": None, "key_start": None, "blocks": 0, "items": 0, "BLOCK_SIZE": slots}
        yield _add_key_parts((tiles, 1), grad_index_key, tile, {**of_slots, "parts": parts}, groups, is_first=True)


def _item_launches(
    ids: Tensor, grad_index_key: Tensor, compared: dict[str, Any], bounds: dict[str, Any], tile: Tile
) -> Iterator[Launch]:
    batch, groups, query_length, topk = ids.shape
    block_size, width = bounds["BLOCK_SIZE"], compared["WIDTH"]
    pieces = divide_up(block_size, tile.sizes["SLOTS"])
    parts: Tensor | None = None
    for chunk in turn_around(ids, bounds, queries=tile.sizes["QUERIES"], most=query_length):
        yield from chunk.launches
        lists = chunk.told
        if parts is None:
            shape = (batch * groups, lists["items"], block_size, width)
            parts = torch.empty(shape, dtype=torch.float32, device=grad_index_key.device)
        told = {**compared, **lists, "parts": parts, "block_ids": ids, "topk": topk, "PLACES": power_of_two_from(topk)}
        yield Launch(compare_keys, (lists["items"], batch * groups, pieces), told, tile)
        of_items = {name: lists[name] for name in ("item_start", "key_start", "blocks", "items", "BLOCK_SIZE")}
        grid = (lists["blocks"], pieces)
        is_first = chunk.start == 0
        yield _add_key_parts(grid, grad_index_key, tile, {**of_items, "parts": parts}, groups, is_first=is_first)


def _add_key_parts(
    grid: tuple[int, int], grad_index_key: Tensor, tile: Tile, told: dict[str, Any], groups: int, *, is_first: bool
) -> Launch:
    batch, key_heads, key_length, width = grad_index_key.shape
    return Launch(
        add_key_parts,
        (grid[0], batch * key_heads, grid[1]),
        {
            **told,
            "grad_index_key": grad_index_key,
            "key_length": key_length,
            "key_heads": key_heads,
            "groups_a_key": groups // key_heads,
            "WIDTH": width,
            "IS_FIRST": is_first,
        },
        Tile({name: tile.sizes[name] for name in ("WIDTH_TILE", "SLOTS")}, 8, 1),
    )
