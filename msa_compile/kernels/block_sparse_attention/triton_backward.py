"""The gradients of block-sparse attention on a GPU: of queries by tiles of them, of keys and values by blocks.

Arguments and result as in `op.py`, for float16, bfloat16 and float32. Nothing waits for the device, grids follow from
shapes alone, nothing is added by atomics, and the same bits come out every time.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention.reference import Gradients
from msa_compile.kernels.block_sparse_attention.tiling import choose_key_gradient_tile, choose_query_gradient_tile
from msa_compile.kernels.block_sparse_attention.triton_arguments import (
    contiguous,
    cut_ids,
    describe_bounds,
    describe_operands,
    list_tiles,
)
from msa_compile.kernels.block_sparse_attention.triton_key_gradients import add_parts, differentiate_blocks
from msa_compile.kernels.block_sparse_attention.triton_query_gradients import differentiate_tiles
from msa_compile.kernels.block_sparse_attention.triton_turn import turn_around
from msa_compile.kernels.chip import Chip, chip_of
from msa_compile.kernels.launch import Launch, Tile, divide_up, power_of_two_from


def block_sparse_attention_backward(
    grad_output: Tensor,
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
) -> Gradients:
    """Differentiate `block_sparse_attention`, recomputing its softmax; `grad_output` is `[B, Hq, Tq, D]`."""
    of_keys, of_values = (torch.zeros(key.shape, dtype=torch.float32, device=key.device) for _ in range(2))
    of_rows = torch.zeros(2, *query.shape[:3], dtype=torch.float32, device=query.device)
    log_sums, deltas = of_rows.unbind()
    grad_query = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    if query.numel() > 0 and key.numel() > 0:
        for launch in find_launches(
            grad_output,
            query,
            key,
            value,
            block_ids,
            grad_query,
            of_keys,
            of_values,
            log_sums,
            deltas,
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
    of_sinks = None
    if sinks is not None:
        of_sink = torch.exp2(sinks.to(torch.float32)[:, None] * math.log2(math.e) - log_sums)
        of_sinks = -(of_sink * deltas).sum((0, 2)).to(sinks.dtype)
    return Gradients(grad_query, of_keys.to(key.dtype), of_values.to(value.dtype), of_sinks)


def find_launches(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
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
    """Give the launches of a call, in order; no tensor is read, so they may be on `meta`.

    They write `grad_query`, in its dtype, and in float32 `grad_key` and `grad_value`, zeros before, `[B, Hkv, Tk, D]`,
    and `log_sums` and `deltas`, `[B, Hq, Tq]`, as `differentiate_tiles` says.
    """
    _, heads, query_length, head_dim = query.shape
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
    operands = describe_operands(query, key, mask, value=value, grad_output=grad_output, scale=scale, softcap=softcap)
    operands |= {"log_sums": log_sums, "deltas": deltas}
    common: dict[str, Any] = {
        "heads": heads // groups,
        "head_dim": head_dim,
        "item_size": query.dtype.itemsize,
        "block_size": block_size,
    }
    tile = choose_query_gradient_tile(chip, **common)
    for listed, lists in list_tiles(block_ids, bounds, tile.sizes["QUERIES"]):
        yield listed
        told = {**operands, **lists, "grad_query": grad_query, "sinks": contiguous(sinks)}
        yield Launch(differentiate_tiles, listed.grid, told, tile)
    tile = choose_key_gradient_tile(chip, **common)
    yield from _key_launches(block_ids, grad_key, grad_value, operands, bounds, tile, query_length)


def _key_launches(
    block_ids: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    operands: dict[str, Any],
    bounds: dict[str, Any],
    tile: Tile,
    query_length: int,
) -> Iterator[Launch]:
    batch, groups, _, topk = block_ids.shape
    block_size, head_dim = bounds["BLOCK_SIZE"], operands["HEAD_DIM"]
    parts: dict[str, Tensor] = {}
    for chunk in turn_around(block_ids, bounds, queries=tile.sizes["QUERIES"], most=query_length):
        yield from chunk.launches
        lists = chunk.told
        shape = (batch * groups, lists["items"], block_size, head_dim)
        if not parts:
            parts = {
                name: torch.empty(shape, dtype=torch.float32, device=grad_key.device)
                for name in ("key_parts", "value_parts")
            }
        pieces = divide_up(block_size, tile.sizes["SLOTS"])
        yield Launch(
            differentiate_blocks,
            (lists["items"], batch * groups, pieces),
            {**operands, **lists, **parts, "block_ids": block_ids, "topk": topk, "PLACES": power_of_two_from(topk)},
            tile,
        )
        yield Launch(
            add_parts,
            (lists["blocks"], batch * groups, pieces),
            {
                **parts,
                "item_start": lists["item_start"],
                "key_start": bounds["key_start"],
                "grad_key": grad_key,
                "grad_value": grad_value,
                "key_length": bounds["key_length"],
                "blocks": lists["blocks"],
                "groups": groups,
                "items": lists["items"],
                "BLOCK_SIZE": block_size,
                "HEAD_DIM": head_dim,
                "IS_FIRST": chunk.start == 0,
            },
            Tile({name: tile.sizes[name] for name in ("CHANNELS", "SLOTS")}, 8, 1),
        )
