"""Block selection on a GPU: scores by one kernel, a chunk of queries at a time, and the choice among them by another.

Arguments and result as in `op.py`, for float16, bfloat16 and float32. Nothing waits for the device, grids follow from
shapes alone, and the memory beyond inputs and outputs is bounded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from msa_compile.kernels.chip import Chip, chip_of
from msa_compile.kernels.launch import Launch, divide_up
from msa_compile.kernels.select_blocks.tiling import choose_tile, cut_scores
from msa_compile.kernels.select_blocks.triton_choose import choose_blocks
from msa_compile.kernels.select_blocks.triton_scores import score_blocks

# Block scores held at once, in elements: 1 GiB.
_WORKSPACE = 1 << 28


def select_blocks(
    index_query: Tensor,
    index_key: Tensor,
    *,
    block_size: int,
    topk: int,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Choose key blocks by the best visible token of each; as in `op.py`."""
    shape = (*index_query.shape[:3], topk)
    if 0 in shape or index_key.shape[2] == 0:
        return torch.full(shape, -1, dtype=torch.int32, device=index_query.device)
    block_ids = torch.empty(shape, dtype=torch.int32, device=index_query.device)
    for launch in find_launches(
        index_query,
        index_key,
        block_ids,
        block_size=block_size,
        local_blocks=local_blocks,
        sink_blocks=sink_blocks,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
        is_causal=is_causal,
        chip=chip_of(index_query.device),
    ):
        launch.run()
    return block_ids


def find_launches(
    index_query: Tensor,
    index_key: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    local_blocks: int,
    sink_blocks: int,
    query_start: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    document_start: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    chip: Chip,
) -> Iterator[Launch]:
    """Give the launches of a call that writes `block_ids`, in order; no tensor is read, so they may be on `meta`."""
    batch, groups, query_length, width = index_query.shape
    key_length, topk = index_key.shape[2], block_ids.shape[3]
    blocks = divide_up(key_length, block_size)
    index_query, index_key = _with_adjacent_channels(index_query), _with_adjacent_channels(index_key)
    bounds = {
        "query_start": _contiguous(query_start),
        "key_start": _contiguous(key_start),
        "key_end": _contiguous(key_end),
        "document_start": _contiguous(document_start),
        "query_length": query_length,
        "key_length": key_length,
    }
    shown = None
    if mask is not None:
        shown = mask.expand(batch, groups, query_length, key_length).view(torch.uint8)
    chunk = max(1, min(query_length, _WORKSPACE // (batch * groups * blocks)))
    grid = cut_scores(
        chip,
        batch=batch,
        groups=groups,
        query_length=chunk,
        blocks=blocks,
        width=width,
        item_size=index_query.dtype.itemsize,
        block_size=block_size,
        is_shared=index_key.shape[1] == 1,
        has_mask=mask is not None,
    )
    tile = choose_tile(query_length=chunk, blocks=blocks, topk=topk)
    scores = torch.empty(batch * groups, blocks, chunk, dtype=torch.float32, device=index_query.device)
    for start in range(0, query_length, chunk):
        end = min(start + chunk, query_length)
        common = {
            **bounds,
            "scores": scores,
            "score_stride_h": scores.stride(0),
            "score_stride_n": scores.stride(1),
            "chunk_start": start,
            "chunk_end": end,
            "groups": groups,
            "BLOCK_SIZE": block_size,
            "IS_CAUSAL": is_causal,
        }
        yield Launch(
            score_blocks,
            (divide_up(end - start, grid.queries), batch * grid.heads, grid.splits),
            {
                **common,
                "index_query": index_query,
                "index_key": index_key,
                "mask": shown,
                **_strides("query", index_query),
                **_strides("key", index_key),
                "key_stride_h": index_key.stride(1) if index_key.shape[1] > 1 else 0,
                "mask_stride_b": 0 if shown is None else shown.stride(0),
                "mask_stride_h": 0 if shown is None else shown.stride(1),
                "mask_stride_q": 0 if shown is None else shown.stride(2),
                "mask_stride_k": 0 if shown is None else shown.stride(3),
                "blocks_a_split": grid.blocks_a_split,
                "WIDTH": width,
            },
            grid.tile,
        )
        yield Launch(
            choose_blocks,
            (divide_up(end - start, tile.sizes["ROWS"]), batch * groups, 1),
            {
                **common,
                "block_ids": block_ids,
                "topk": topk,
                "local_blocks": local_blocks,
                "sink_blocks": sink_blocks,
            },
            tile,
        )


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": tensor.stride(dim) for dim, axis in enumerate("bht")}


def _with_adjacent_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
