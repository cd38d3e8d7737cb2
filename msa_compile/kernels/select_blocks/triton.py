"""Block selection on a GPU: scores by one kernel, a chunk of queries at a time, and the choice among them by another.

Arguments and result as in `op.py`, for float16, bfloat16 and float32. Nothing waits for the device, grids follow from
shapes alone, and the memory beyond inputs and outputs is bounded.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.chip import Chip, chip_of
from msa_compile.kernels.launch import Launch, Tile, divide_up
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3
from msa_compile.kernels.select_blocks.tiling import (
    ScoreGrid,
    choose_list_tile,
    choose_round_tile,
    choose_tile,
    cut_candidates,
    cut_scores,
    fuse_choice,
)
from msa_compile.kernels.select_blocks.triton_choose import choose_blocks, keep_candidates
from msa_compile.kernels.select_blocks.triton_fused import score_and_choose
from msa_compile.kernels.select_blocks.triton_rescore import list_candidates, rescore_blocks
from msa_compile.kernels.select_blocks.triton_round import round_keys
from msa_compile.kernels.select_blocks.triton_scores import score_blocks

# Block scores held at once, in elements: 1 GiB.
_WORKSPACE = 1 << 28
# Up to this many queries keys of a byte a number are read as such; more of them would make numbers of them many times.
_FEW_QUERIES = 16


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
    candidates: int = 0,
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
        candidates=candidates,
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
    candidates: int = 0,
    fuses: bool = True,
) -> Iterator[Launch]:
    """Give the launches of a call that writes `block_ids`, in order; no tensor is read, so they may be on `meta`.

    Where shapes allow it one kernel does it all, unless `fuses` is false.
    """
    batch, groups, query_length, width = index_query.shape
    key_length, topk = index_key.shape[2], block_ids.shape[3]
    blocks = divide_up(key_length, block_size)
    if index_key.dtype == torch.uint8 and query_length > _FEW_QUERIES:
        index_key = from_e4m3(index_key, index_query.dtype)
    index_query, index_key = _with_adjacent_channels(index_query), _with_adjacent_channels(index_key)
    bounds = {
        "query_start": _contiguous(query_start),
        "key_start": _contiguous(key_start),
        "key_end": _contiguous(key_end),
        "document_start": _contiguous(document_start),
        "query_length": query_length,
        "key_length": key_length,
    }
    budget = {"local_blocks": local_blocks, "sink_blocks": sink_blocks}
    shown = None
    if mask is not None:
        shown = mask.expand(batch, groups, query_length, key_length).view(torch.uint8)
    chunk = max(1, min(query_length, _WORKSPACE // (batch * groups * blocks)))
    sizes: dict[str, Any] = {
        "batch": batch,
        "groups": groups,
        "query_length": chunk,
        "blocks": blocks,
        "width": width,
        "block_size": block_size,
        "is_shared": index_key.shape[1] == 1,
        "has_mask": mask is not None,
    }
    item_size = index_query.dtype.itemsize
    grid = cut_scores(chip, item_size=1 if candidates else item_size, **sizes)
    if fuses and not candidates:
        whole = cut_scores(chip, item_size=item_size, **{**sizes, "query_length": query_length})
        is_plain = mask is None and document_start is None and key_start is None and key_end is None
        one = fuse_choice(chip, whole, topk=topk, item_size=item_size) if is_plain else None
        if one is not None:
            yield _fused(one, index_query, index_key, block_ids, bounds, budget, block_size, is_causal=is_causal)
            return
    tile = choose_tile(query_length=chunk, blocks=blocks, topk=topk)
    scores = torch.empty(batch * groups, blocks, chunk, dtype=torch.float32, device=index_query.device)
    of_mask = {
        "mask": shown,
        "mask_stride_b": 0 if shown is None else shown.stride(0),
        "mask_stride_h": 0 if shown is None else shown.stride(1),
        "mask_stride_q": 0 if shown is None else shown.stride(2),
        "mask_stride_k": 0 if shown is None else shown.stride(3),
    }
    of_queries = {"index_query": index_query, **_strides("query", index_query), **of_mask, "WIDTH": width}
    scored, scales, again = index_key, None, None
    if candidates:
        scored = torch.empty(index_key.shape, dtype=torch.float8_e4m3fn, device=index_key.device)
        scales = torch.empty(index_key.shape[:3], dtype=torch.float32, device=index_key.device)
        yield _round(index_key, scored, scales)
        again = _Again(cut_candidates(chip, item_size=item_size, **sizes), blocks, chunk, index_key)
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
                **of_queries,
                **_of_keys(scored),
                "key_scales": scales,
                "scale_stride_b": 0 if scales is None else scales.stride(0),
                "scale_stride_h": 0 if scales is None or scales.shape[1] == 1 else scales.stride(1),
                "blocks_a_split": grid.blocks_a_split,
            },
            grid.tile,
        )
        of_rows = (divide_up(end - start, tile.sizes["ROWS"]), batch * groups, 1)
        if again is not None:
            yield from again.launches(common, budget, of_queries, of_rows, tile, candidates)
        yield Launch(choose_blocks, of_rows, {**common, **budget, "block_ids": block_ids, "topk": topk}, tile)


class _Again:
    """The launches that keep candidates and score them again, and what they hold between chunks of queries."""

    def __init__(self, grid: ScoreGrid, blocks: int, chunk: int, index_key: Tensor) -> None:
        self.grid, self.blocks, self.index_key = grid, blocks, index_key
        self.tiles = divide_up(chunk, grid.queries)
        rows = index_key.shape[0] * grid.heads
        device = index_key.device
        # Each chunk leaves it as it found it.
        self.wanted = torch.zeros(rows * self.tiles, blocks, dtype=torch.uint8, device=device)
        self.lists = torch.empty(rows * self.tiles, blocks, dtype=torch.int32, device=device)
        self.counts = torch.empty(rows * self.tiles, dtype=torch.int32, device=device)

    def launches(
        self,
        common: Mapping[str, Any],
        forced: Mapping[str, int],
        of_queries: Mapping[str, Any],
        of_rows: tuple[int, int, int],
        tile: Tile,
        candidates: int,
    ) -> Iterator[Launch]:
        """Give the launches of a chunk whose scores are there; a short chunk leaves tiles that find no query."""
        grid, rows = self.grid, self.counts.shape[0]
        kept = {"wanted": self.wanted, "blocks": self.blocks, "tiles": self.tiles, "candidates": candidates}
        kept_tile = {name: tile.sizes[name] for name in ("ROWS", "COLUMNS")}
        kept_tile |= {name: grid.tile.sizes[name] for name in ("PACKED_GROUPS", "QUERIES")}
        yield Launch(keep_candidates, of_rows, {**common, **forced, **kept}, Tile(kept_tile, tile.warps, tile.stages))
        listed = {"lists": self.lists, "counts": self.counts, "blocks": self.blocks}
        yield Launch(
            list_candidates, (rows, 1, 1), {"wanted": self.wanted, **listed}, choose_list_tile(blocks=self.blocks)
        )
        yield Launch(
            rescore_blocks,
            (self.tiles, rows // self.tiles, grid.splits),
            {**common, **of_queries, **_of_keys(self.index_key), **listed},
            grid.tile,
        )


def _fused(
    tile: Tile,
    index_query: Tensor,
    index_key: Tensor,
    block_ids: Tensor,
    bounds: Mapping[str, Any],
    budget: Mapping[str, int],
    block_size: int,
    *,
    is_causal: bool,
) -> Launch:
    batch, groups, query_length, width = index_query.shape
    given = {"index_query": index_query, **_strides("query", index_query), "index_key": index_key, **budget}
    given |= {"key_stride_b": index_key.stride(0), "key_stride_t": index_key.stride(2)}
    sizes = {"groups": groups, "topk": block_ids.shape[3], "BLOCK_SIZE": block_size, "WIDTH": width}
    lengths = {name: bounds[name] for name in ("query_start", "query_length", "key_length")}
    return Launch(
        score_and_choose,
        (divide_up(query_length, tile.sizes["QUERIES"]), batch, 1),
        {**lengths, **given, **sizes, "block_ids": block_ids, "IS_CAUSAL": is_causal},
        tile,
    )


def _round(index_key: Tensor, rounded: Tensor, scales: Tensor) -> Launch:
    batch, heads, key_length, width = index_key.shape
    tile = choose_round_tile(width=width)
    given = {"index_key": index_key, **_strides("key", index_key), "rounded": rounded, "scales": scales}
    sizes = {"key_length": key_length, "key_heads": heads, "WIDTH": width}
    return Launch(round_keys, (divide_up(key_length, tile.sizes["ROWS"]), batch * heads, 1), {**given, **sizes}, tile)


def _of_keys(index_key: Tensor) -> dict[str, Any]:
    strides = _strides("key", index_key)
    return {"index_key": index_key, **strides, "key_stride_h": strides["key_stride_h"] * (index_key.shape[1] > 1)}


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": tensor.stride(dim) for dim, axis in enumerate("bht")}


def _with_adjacent_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
