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
    choose_list_tile,
    choose_slots_tile,
    count_splits,
    is_for_slots,
)
from msa_compile.kernels.block_sparse_attention.triton_lists import list_blocks
from msa_compile.kernels.block_sparse_attention.triton_slots import attend_slots, merge_slots
from msa_compile.kernels.block_sparse_attention.triton_tiles import attend_tiles
from msa_compile.kernels.chip import Chip, chip_of
from msa_compile.kernels.launch import Launch, Tile, divide_up, power_of_two_from

# Entries of the lists of blocks held at once: 256 MiB for starts and members.
_WORKSPACE = 1 << 25
# A window beyond this sees everything; the slots of a kernel are int32.
_WINDOW = 1 << 30


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
) -> Tensor:
    """Attend to the visible tokens of the selected blocks; as in `op.py`."""
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
) -> Iterator[Launch]:
    """Give the launches of a call that writes `output`, in order; no tensor is read, so they may be on `meta`."""
    batch, heads, query_length, head_dim = query.shape
    groups, key_length = key.shape[1:3]
    # Valid ids are a prefix of at most N, so a topk beyond N only holds -1 there.
    block_ids = block_ids[..., : divide_up(key_length, block_size)].contiguous()
    bounds: dict[str, Any] = {
        "query_start": _contiguous(query_start),
        "key_start": _contiguous(key_start),
        "key_end": _contiguous(key_end),
        "document_start": _contiguous(document_start),
        "query_length": query_length,
        "key_length": key_length,
        "window": None if window is None else min(window, _WINDOW),
        "groups": groups,
        "BLOCK_SIZE": block_size,
        "IS_CAUSAL": is_causal,
    }
    operands = _operands(query, key, value, mask, query_length, key_length)
    operands |= {
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
        "HEAD_DIM": head_dim,
        "HEADS": heads // groups,
    }
    common: dict[str, Any] = {"heads": heads // groups, "head_dim": head_dim, "item_size": query.dtype.itemsize}
    tile = choose_attention_tile(chip, block_size=block_size, **common)
    sinks = _contiguous(sinks)
    if is_for_slots(chip, batch=batch, groups=groups, query_length=query_length, queries=tile.sizes["QUERIES"]):
        tile = choose_slots_tile(chip, block_size=block_size, **common)
        yield from _slots_launches(block_ids, output, sinks, operands, bounds, tile, chip)
    else:
        yield from _tiles_launches(block_ids, output, sinks, operands, bounds, tile)


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


def _tiles_launches(
    block_ids: Tensor,
    output: Tensor,
    sinks: Tensor | None,
    operands: dict[str, Any],
    bounds: dict[str, Any],
    tile: Tile,
) -> Iterator[Launch]:
    batch, groups, query_length, topk = block_ids.shape
    queries = tile.sizes["QUERIES"]
    list_tile = choose_list_tile(queries=queries, topk=topk)
    list_size = queries * list_tile.sizes["PLACES"]
    tiles_a_chunk = max(1, min(divide_up(query_length, queries), _WORKSPACE // (batch * groups * list_size)))
    shape = (batch * groups, tiles_a_chunk, list_size)
    lists = {
        "starts": torch.empty(shape, dtype=torch.int32, device=output.device),
        "members": torch.empty(shape, dtype=torch.int32, device=output.device),
        "counts": torch.empty(shape[:2], dtype=torch.int32, device=output.device),
    }
    for start in range(0, query_length, tiles_a_chunk * queries):
        tiles = min(tiles_a_chunk, divide_up(query_length - start, queries))
        chunk = {**lists, **bounds, "chunk_start": start}
        yield Launch(
            list_blocks,
            (tiles, batch * groups, 1),
            {**chunk, "block_ids": block_ids, "topk": topk},
            list_tile,
        )
        yield Launch(
            attend_tiles,
            (tiles, batch * groups, 1),
            {**operands, **chunk, "output": output, "sinks": sinks, "list_size": list_size},
            tile,
        )


def _operands(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, query_length: int, key_length: int
) -> dict[str, Any]:
    """Return the tensors that both kernels of attention read, with their strides."""
    found: dict[str, Any] = {}
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        found[name] = tensor
        found |= {f"{name}_stride_{axis}": tensor.stride(dim) for dim, axis in enumerate("bht")}
    shown = None
    if mask is not None:
        shown = mask.expand(key.shape[0], key.shape[1], query_length, key_length).view(torch.uint8)
    found["mask"] = shown
    found |= {f"mask_stride_{axis}": 0 if shown is None else shown.stride(dim) for dim, axis in enumerate("bhqk")}
    return found


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
