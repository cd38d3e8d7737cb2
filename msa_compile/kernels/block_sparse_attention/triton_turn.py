"""The launches that turn a selection around: lists of the queries of each block, a chunk of queries at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.block_sparse_attention.tiling import count_queries_an_item
from msa_compile.kernels.block_sparse_attention.triton_queries import (
    count_queries,
    list_queries,
    mark_queries,
    place_queries,
)
from msa_compile.kernels.launch import Launch, Tile, divide_up, power_of_two_from

# Words of bits held at once, a bit for each query and block: 256 MiB.
_WORDS = 1 << 26
_BITS = 32
# Words of a step by blocks: a row of words is read as a whole sector of memory.
_STEP = {"ROWS": 32, "COLUMNS": 16}


@dataclass(frozen=True, slots=True)
class Turned:
    """The lists of a chunk of queries.

    Args:
        start: first query of the chunk.
        end: one past its last query.
        launches: they write the lists, in order.
        told: arguments of a kernel that reads them, the bounds among them; it has a program for each of `items`.
    """

    start: int
    end: int
    launches: list[Launch]
    told: dict[str, Any]


def turn_around(block_ids: Tensor, bounds: Mapping[str, Any], *, queries: int, most: int) -> Iterator[Turned]:
    """Turn the selection around, a chunk of at most `most` queries at a time; a list is read `queries` at a time."""
    batch, groups, query_length, topk = block_ids.shape
    programs = batch * groups
    blocks = divide_up(bounds["key_length"], bounds["BLOCK_SIZE"])
    chunk = min(query_length, most, _BITS * max(1, _WORDS // (programs * blocks)))
    # What a document selected may lie across two blocks.
    listed = chunk * topk * (1 if bounds["document_start"] is None else 2)
    an_item = count_queries_an_item(queries=queries, listed=listed, blocks=blocks)
    items = blocks + listed // an_item

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=block_ids.device)

    words = integers(programs, divide_up(chunk, _BITS), blocks)
    counts = integers(programs, blocks)
    of_blocks = {"list_start": integers(programs, blocks + 1), "item_start": integers(programs, blocks + 1)}
    lists = {**of_blocks, "queries": integers(programs, listed), "item_blocks": integers(programs, items)}
    columns = {"COLUMNS": min(1024, power_of_two_from(blocks + 1))}
    for start in range(0, query_length, chunk):
        end = min(start + chunk, query_length)
        tiles = divide_up(end - start, _BITS)
        sizes = {"tiles": tiles, "blocks": blocks}
        of_columns = (divide_up(blocks, _STEP["COLUMNS"]), programs, 1)
        marked = {
            **bounds,
            "block_ids": block_ids,
            "topk": topk,
            "words": words,
            "blocks": blocks,
            "chunk_start": start,
            "chunk_end": end,
        }
        launches = [
            Launch(
                mark_queries, (tiles, programs, 1), marked, Tile({"PLACES": power_of_two_from(topk), **columns}, 4, 1)
            ),
            Launch(count_queries, of_columns, {**sizes, "words": words, "counts": counts}, Tile(_STEP, 4, 1)),
            Launch(
                place_queries,
                (programs, 1, 1),
                {**of_blocks, "counts": counts, "blocks": blocks, "QUERIES_AN_ITEM": an_item},
                Tile(columns, 4, 1),
            ),
            Launch(
                list_queries,
                of_columns,
                {**sizes, **lists, "words": words, "chunk_start": start, "list_size": listed, "items": items},
                Tile(_STEP, 4, 1),
            ),
        ]
        told = {
            "blocks": blocks,
            "list_size": listed,
            "items": items,
            "QUERIES_AN_ITEM": an_item,
        }
        yield Turned(start, end, launches, {**bounds, **lists, **told})
