"""What the launches of attention are told in the same words: operands, bounds, and lists of blocks."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention.tiling import choose_list_tile
from msa_compile.kernels.block_sparse_attention.triton_lists import list_blocks
from msa_compile.kernels.launch import Launch, divide_up

# Entries of the lists of blocks held at once: 256 MiB for starts and members.
_WORKSPACE = 1 << 25
# A window beyond this sees everything; the slots of a kernel are int32.
_WINDOW = 1 << 30


def cut_ids(block_ids: Tensor, key_length: int, block_size: int) -> Tensor:
    """Return the ids that can name a block: valid ids are a prefix, so a topk beyond `N` only holds -1 there."""
    return block_ids[..., : divide_up(key_length, block_size)].contiguous()


def describe_bounds(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    window: int | None,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    is_causal: bool,
) -> dict[str, Any]:
    """Return what says which slots a query sees, by the names of the kernels' arguments."""
    return {
        "query_start": contiguous(query_start),
        "key_start": contiguous(key_start),
        "key_end": contiguous(key_end),
        "document_start": contiguous(document_start),
        "query_length": query.shape[2],
        "key_length": key.shape[2],
        "window": None if window is None else min(window, _WINDOW),
        "groups": key.shape[1],
        "BLOCK_SIZE": block_size,
        "IS_CAUSAL": is_causal,
    }


def describe_operands(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    **others: Tensor,
) -> dict[str, Any]:
    """Return the tensors that are read by their strides, channels adjacent, and the constants of the logits."""
    found: dict[str, Any] = {}
    for name, tensor in (("query", query), ("key", key), *others.items()):
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        found[name] = tensor
        found |= {f"{name.removesuffix('_output')}_stride_{axis}": tensor.stride(dim) for dim, axis in enumerate("bht")}
    shown = None
    if mask is not None:
        shown = mask.expand(key.shape[0], key.shape[1], query.shape[2], key.shape[2]).view(torch.uint8)
    found["mask"] = shown
    found |= {f"mask_stride_{axis}": 0 if shown is None else shown.stride(dim) for dim, axis in enumerate("bhqk")}
    head_dim = query.shape[3]
    return found | {
        "scale": head_dim**-0.5 if scale is None else float(scale),
        "softcap": None if softcap is None else float(softcap),
        "HEAD_DIM": head_dim,
        "HEADS": query.shape[1] // key.shape[1],
    }


def list_tiles(block_ids: Tensor, bounds: Mapping[str, Any], queries: int) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """Cut the queries into tiles of `queries` and those into chunks, so that the memory of lists is bounded.

    Gives, for each chunk, the launch that writes the lists, one program a tile, and what a kernel is told that reads
    them with the same grid.
    """
    batch, groups, query_length, topk = block_ids.shape
    tile = choose_list_tile(queries=queries, topk=topk)
    size = queries * tile.sizes["PLACES"]
    tiles_a_chunk = max(1, min(divide_up(query_length, queries), _WORKSPACE // (batch * groups * size)))
    shape = (batch * groups, tiles_a_chunk, size)
    lists = {
        "starts": torch.empty(shape, dtype=torch.int32, device=block_ids.device),
        "members": torch.empty(shape, dtype=torch.int32, device=block_ids.device),
        "counts": torch.empty(shape[:2], dtype=torch.int32, device=block_ids.device),
    }
    for start in range(0, query_length, tiles_a_chunk * queries):
        grid = (min(tiles_a_chunk, divide_up(query_length - start, queries)), batch * groups, 1)
        chunk = {**lists, **bounds, "chunk_start": start}
        yield (
            Launch(list_blocks, grid, {**chunk, "block_ids": block_ids, "topk": topk}, tile),
            {**chunk, "list_size": size},
        )


def contiguous(values: Tensor | None) -> Tensor | None:
    """Return `values` without strides, if they are there."""
    return None if values is None else values.contiguous()
