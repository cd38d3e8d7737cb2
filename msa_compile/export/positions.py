"""Where queries stand and what they see, as an op of its own: a mask that no artifact ever computes.

A transformers model takes a mask `[B, 1, Tq, Tk]`. While it is captured it is given the result of `msa::causal_mask`,
which says what the mask means and not what it holds; afterwards `bound_masks` puts that meaning, which is linear in
`Tk`, into the arguments of the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from msa_compile.errors import ExportNotSparseError

aten = torch.ops.aten
SELECT = torch.ops.msa.select_blocks.default
ATTEND = torch.ops.msa.block_sparse_attention.default


@torch.library.custom_op("msa::causal_mask", mutates_args=())
def causal_mask(queries: Tensor, key_length: int, query_start: Tensor | None, key_visible: Tensor | None) -> Tensor:
    """The mask of queries that stand one after the other in a row of keys.

    Args:
        queries: `[B, Tq]`, for the sizes.
        key_length: `Tk`.
        query_start: `[B]` int64, slot of the first query of the row; default `Tk - Tq`.
        key_visible: `[B, Tk]` bool, false where a key is padding; default all true.

    Returns:
        `[B, 1, Tq, Tk]` bool, true where a key is seen.
    """
    batch, length = queries.shape[:2]
    slots = torch.arange(key_length, device=queries.device)
    steps = torch.arange(length, device=queries.device)
    start = slots.new_full((batch,), key_length - length) if query_start is None else query_start
    visible = slots <= (start[:, None] + steps)[:, None, :, None]
    return visible if key_visible is None else visible & key_visible[:, None, None, :]


@causal_mask.register_fake
def _(queries: Tensor, key_length: int, query_start: Tensor | None, key_visible: Tensor | None) -> Tensor:
    return queries.new_empty((queries.shape[0], 1, queries.shape[1], key_length), dtype=torch.bool)


def bound_masks(gm: GraphModule) -> None:
    """Replace each `msa::causal_mask` by the arguments that say the same.

    Raises:
        ExportNotSparseError: Something other than a sparse attention reads the mask.
    """
    graph = gm.graph
    for mask in [node for node in graph.nodes if node.target is torch.ops.msa.causal_mask.default]:
        _, _, query_start, key_visible = mask.args
        visible, key_start = _padding(graph, mask, key_visible) if key_visible is not None else (None, None)
        for attention in [node for node in mask.users if node.target in (SELECT, ATTEND)]:
            kept = {name: value for name, value in attention.kwargs.items() if name not in _IMPLIED}
            given = {"query_start": query_start, "key_start": key_start, "mask": visible}
            attention.kwargs = kept | {name: value for name, value in given.items() if value is not None}
        for reader in [node for node in mask.users if node.target is torch.ops.msa.mask_positions.default]:
            for part in [*reader.users, reader]:
                if part.users:
                    raise ExportNotSparseError(f"{part} still reads the positions of the mask: a bug of msa_compile")
                graph.erase_node(part)
        if mask.users:
            readers = ", ".join(str(node) for node in mask.users)
            raise ExportNotSparseError(
                f"an attention that stays dense reads the mask of the cache ({readers}). Export with cache='none', or "
                "make every attention sparse; msa_compile.explain(model) says why one is not"
            )
        graph.erase_node(mask)
    gm.recompile()


def spell_content_starts(gm: GraphModule) -> None:
    """Write out where the content of each row starts, where a row of padding says it and nothing else is read."""
    graph = gm.graph
    key_start = 1  # of what `msa::mask_positions` returns
    for positions in [node for node in graph.nodes if node.target is torch.ops.msa.mask_positions.default]:
        mask, query = positions.args
        value, batch = mask.meta["val"], query.meta["val"].shape[0]
        parts = [part for part in positions.users if part.users]
        is_row = value.shape[1] == 1 and value.shape[2] == 1 and str(value.shape[0]) == str(batch)
        if not is_row or any(part.args[1] != key_start for part in parts):
            continue
        for part in parts:
            with graph.inserting_before(part), value.fake_mode:
                row = _call(graph, aten.squeeze.dims, mask, [1, 2])
                number = _call(graph, aten.to.dtype, row, torch.int32)
                part.replace_all_uses_with(_call(graph, aten.argmax.default, number, 1))
    graph.lint()
    gm.recompile()


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A call before the point of insertion, with its value."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


_IMPLIED = ("mask", "query_start", "key_start", "document_start", "is_causal")


def _padding(graph: Graph, before: Node, key_visible: Node) -> tuple[Node, Node]:
    """The padding as a mask of one row, and where the content of each row starts."""
    with graph.inserting_before(before), key_visible.meta["val"].fake_mode:
        key_start = _call(graph, aten.argmax.default, _call(graph, aten.to.dtype, key_visible, torch.int32), 1)
        row = _call(graph, aten.unsqueeze.default, key_visible, 1)
        return _call(graph, aten.unsqueeze.default, row, 1), key_start
