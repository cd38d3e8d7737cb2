"""Block-sparse attention on a GPU: tiles of queries where there are many, split blocks where there are few.

Arguments and result as in `op.py`, for float16, bfloat16 and float32; the forward pass alone. Nothing waits for the
device, grids follow from shapes alone, and the memory beyond inputs and outputs is bounded.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention.tiling import (
    choose_attention_tile,
    choose_block_tile,
    choose_slots_tile,
    count_splits,
    is_for_blocks,
    is_for_slots,
)
from msa_compile.kernels.block_sparse_attention.triton_arguments import (
    contiguous,
    cut_ids,
    describe_bounds,
    describe_operands,
    list_tiles,
)
from msa_compile.kernels.block_sparse_attention.triton_blocks import attend_blocks, merge_places
from msa_compile.kernels.block_sparse_attention.triton_slots import attend_slots, merge_slots
from msa_compile.kernels.block_sparse_attention.triton_tiles import attend_tiles
from msa_compile.kernels.block_sparse_attention.triton_turn import turn_around
from msa_compile.kernels.chip import Chip, chip_of
from msa_compile.kernels.launch import Launch, Tile, divide_up, power_of_two_from

# Elements of the results of queries and blocks that are held at once: 2 GiB in 16 bits.
_PARTS = 1 << 30


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
    order: str | None = None,
) -> Tensor:
    """Attend to the visible tokens of the selected blocks; as in `op.py`, and `order` as in `find_launches`."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for launch in find_launches(
        query,
        key,
        value,
        block_ids,
        output,
        block_size=block_size,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
        is_causal=is_causal,
        chip=chip_of(query.device),
        order=order,
    ):
        launch.run()
    return output


def find_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    output: Tensor,
    *,
    block_size: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    chip: Chip,
    order: str | None = None,
) -> Iterator[Launch]:
    """Give the launches of a call that writes `output`, in order; no tensor is read, so they may be on `meta`.

    `order` says what many queries go by, `"tiles"` or `"blocks"`; the default follows from shapes. Documents, and
    blocks that do not fit into shared memory, always go by tiles.
    """
    batch, heads, query_length, head_dim = query.shape
    groups = key.shape[1]
    block_ids = cut_ids(block_ids, key.shape[2], block_size)
    bounds = describe_bounds(
        query,
        key,
        block_size=block_size,
        window=window,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        is_causal=is_causal,
    )
    operands = describe_operands(query, key, mask, value=value, scale=scale, softcap=softcap)
    common: dict[str, Any] = {
        "heads": heads // groups,
        "head_dim": head_dim,
        "item_size": query.dtype.itemsize,
        "block_size": block_size,
    }
    tile = choose_attention_tile(chip, **common)
    queries = tile.sizes["QUERIES"]
    sinks = contiguous(sinks)
    if is_for_slots(chip, batch=batch, groups=groups, query_length=query_length, queries=queries):
        tile = choose_slots_tile(chip, **common)
        yield from _slots_launches(block_ids, output, sinks, operands, bounds, tile, chip)
        return
    outer = None if order == "tiles" or document_start is not None else choose_block_tile(chip, **common)
    is_outer = order == "blocks" or is_for_blocks(
        chip,
        heads=heads // groups,
        item_size=query.dtype.itemsize,
        queries=queries,
        blocks=divide_up(key.shape[2], block_size),
        topk=block_ids.shape[3],
    )
    if outer is not None and is_outer:
        yield from _blocks_launches(block_ids, output, sinks, operands, bounds, outer)
    else:
        for listed, lists in list_tiles(block_ids, bounds, queries):
            yield listed
            yield Launch(attend_tiles, listed.grid, {**operands, **lists, "output": output, "sinks": sinks}, tile)


def _slots_launches(
    block_ids: Tensor,
    output: Tensor,
    sinks: Tensor | None,
    operands: dict[str, Any],
    bounds: dict[str, Any],
    tile: Tile,
    chip: Chip,
) -> Iterator[Launch]:
    batch, groups, query_length, topk = block_ids.shape
    heads, head_dim = operands["HEADS"], operands["HEAD_DIM"]
    splits = count_splits(chip, programs=batch * groups * query_length, topk=topk)
    shape = (batch * groups, query_length, splits, heads)
    partial = {
        "partial_output": torch.empty(*shape, head_dim, dtype=torch.float32, device=output.device),
        "partial_total": torch.empty(shape, dtype=torch.float32, device=output.device),
        "partial_highest": torch.empty(shape, dtype=torch.float32, device=output.device),
    }
    yield Launch(
        attend_slots,
        (query_length, batch * groups, splits),
        {
            **operands,
            **bounds,
            **partial,
            "block_ids": block_ids,
            "topk": topk,
            "places_a_split": divide_up(topk, splits),
        },
        tile,
    )
    sizes = {
        "CHANNELS": tile.sizes["CHANNELS"],
        "SPLITS": splits,
        "SPLITS_TILE": power_of_two_from(splits),
    }
    yield Launch(
        merge_slots,
        (query_length, batch * groups * heads, 1),
        {
            **partial,
            "sinks": sinks,
            "output": output,
            "query_length": query_length,
            "groups": groups,
            "HEAD_DIM": head_dim,
            "HEADS": heads,
        },
        Tile(sizes, 4, 1),
    )


def _blocks_launches(
    block_ids: Tensor,
    output: Tensor,
    sinks: Tensor | None,
    operands: dict[str, Any],
    bounds: dict[str, Any],
    tile: Tile,
) -> Iterator[Launch]:
    batch, groups, query_length, topk = block_ids.shape
    heads, head_dim = operands["HEADS"], operands["HEAD_DIM"]
    chunk = max(1, min(query_length, _PARTS // (batch * groups * heads * topk * head_dim)))
    ids = {"block_ids": block_ids, "topk": topk, "PLACES": power_of_two_from(topk)}
    parts: dict[str, Any] = {}
    for turned in turn_around(block_ids, bounds, queries=tile.sizes["QUERIES"], most=chunk):
        yield from turned.launches
        queries = turned.end - turned.start
        if not parts:
            shape = (batch * groups, queries, topk, heads)
            parts = {
                "partial_output": torch.empty(*shape, head_dim, dtype=output.dtype, device=output.device),
                "partial_total": torch.empty(shape, dtype=torch.float32, device=output.device),
                "partial_highest": torch.empty(shape, dtype=torch.float32, device=output.device),
                "chunk": queries,
            }
        told = {**_without_documents(turned.told), **parts, **ids, "chunk_start": turned.start}
        yield Launch(attend_blocks, (told["items"], batch * groups, 1), {**operands, **told}, tile)
        yield Launch(
            merge_places,
            (queries, batch * groups * heads, 1),
            {
                **_without_documents(bounds),
                **parts,
                **ids,
                "chunk_start": turned.start,
                "sinks": sinks,
                "output": output,
                "HEAD_DIM": head_dim,
                "HEADS": heads,
            },
            Tile({"CHANNELS": tile.sizes["CHANNELS"]}, 4, 1),
        )


def _without_documents(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name != "document_start"}
