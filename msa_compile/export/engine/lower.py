"""Lower a sparse program to what TensorRT gets: each attention is plugins, each cache write a scatter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from msa_compile._compat import OpOverload
from msa_compile.export.engine.entries import lists_of
from msa_compile.export.engine.plugins import blocks_of
from msa_compile.export.positions import ATTEND, SELECT
from msa_compile.export.records import SparseProgram
from msa_compile.export.to_onnx import check_arguments
from msa_compile.kernels.chip import Chip

_WRITE = torch.ops.msa.write_cache.default


@dataclass(frozen=True)
class Target:
    """What plugins are chosen by.

    Attributes:
        is_python_free: Whether each plugin is one launch; otherwise plugins call the ops of this package.
        chip: What launches are compiled for.
        most_keys: Keys of the longest call.
    """

    is_python_free: bool
    chip: Chip
    most_keys: int


def lower(sparse: SparseProgram, target: Target) -> ExportedProgram:
    """The program with plugins in the place of attention; the rest is as it was.

    Raises:
        ExportNotSparseError: An attention has a mask that the plugins cannot say.
    """
    check_arguments(sparse)
    table: dict[Any, Callable[..., Any]] = {_WRITE: written}
    if target.is_python_free:
        select, attend = _launches(target)
    else:
        select, attend = _select, _attend
    table |= {SELECT: _named(SELECT, select), ATTEND: _named(ATTEND, attend)}
    return decomposed(sparse.program, table)


def decomposed(program: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
    """The program with operators replaced by what a table says they are made of, and no other."""
    with warnings.catch_warnings():
        # What torch says to itself about its own trees.
        warnings.simplefilter("ignore", FutureWarning)
        return program.run_decompositions(table)


def _named(op: OpOverload, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, called with every argument of an op by its name, however the op was called."""
    arguments = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}

    def call(*args: Any, **kwargs: Any) -> Tensor:
        placed = dict(zip((argument.name for argument in arguments), args, strict=False))
        return function(**(defaults | placed | kwargs))

    return call


def written(cache: Tensor, update: Tensor, position: Tensor) -> Tensor:
    """A cache with some of its slots written, as `msa::write_cache`, of operators that TensorRT has."""
    slots = position[:, None] + torch.arange(update.shape[2], device=cache.device)
    return torch.scatter(cache, 2, slots[:, None, :, None].expand(update.shape), update)


@dataclass(frozen=True)
class _Where:
    """Where queries stand and what they see, all of it as tensors, because a plugin leaves nothing out."""

    query_start: Tensor
    key_start: Tensor
    key_visible: Tensor
    lengths: Tensor
    flags: tuple[int, int]


def _where(query: Tensor, key: Tensor, options: dict[str, Any]) -> _Where:
    start, first, mask = (options.get(name) for name in ("query_start", "key_start", "mask"))
    batch, keys, queries = query.shape[0], key.shape[2], query.shape[2]
    flags = (int(mask is not None or first is not None), int(start is not None))
    if start is None:
        start = torch.full((batch,), 0, dtype=torch.int64, device=query.device) + (keys - queries)
    if first is None:
        first = torch.full((batch,), 0, dtype=torch.int64, device=query.device)
    if mask is not None:
        visible = mask.squeeze((1, 2)).expand(batch, keys)
    elif flags[0]:
        visible = torch.full((batch, keys), True, dtype=torch.bool, device=query.device)
    else:
        visible = torch.full((batch, 1), True, dtype=torch.bool, device=query.device)
    lengths = torch.cat([_number(queries, query), _number(keys, query)])
    return _Where(start, first, visible, lengths, flags)


def _number(size: int, like: Tensor) -> Tensor:
    """A size as a tensor of one number."""
    return torch.full((1,), 0, dtype=torch.int64, device=like.device) + size


def _select(
    index_query: Tensor,
    index_key: Tensor,
    block_size: int,
    topk: int,
    local_blocks: int,
    sink_blocks: int,
    **options: Any,
) -> Tensor:
    where = _where(index_query, index_key, options)
    return torch.ops.msa.SelectBlocks(
        index_query,
        index_key,
        where.query_start,
        where.key_start,
        where.key_visible,
        block_size,
        topk,
        local_blocks,
        sink_blocks,
    )


def _variant(name: str, sinks: Tensor | None, softcap: float | None) -> Any:
    return getattr(torch.ops.msa, name + ("Softcapped" if softcap else "") + ("" if sinks is None else "WithSinks"))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_size: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    **options: Any,
) -> Tensor:
    where = _where(query, key, options)
    return _variant("BlockSparseAttention", sinks, softcap)(
        query,
        key,
        value,
        block_ids,
        where.query_start,
        where.key_start,
        where.key_visible,
        *([] if sinks is None else [sinks]),
        block_size,
        scale,
        *([] if softcap is None else [softcap]),
    )


def _launches(target: Target) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What selection and attention become where each plugin is one launch: two plugins each."""

    def select(
        index_query: Tensor,
        index_key: Tensor,
        block_size: int,
        topk: int,
        local_blocks: int,
        sink_blocks: int,
        **options: Any,
    ) -> Tensor:
        where = _where(index_query, index_key, options)
        groups, width = index_query.shape[1], index_query.shape[3]
        scores = torch.ops.msa.ScoreBlocks(
            index_query,
            index_key,
            where.query_start,
            where.key_start,
            where.key_visible,
            where.lengths,
            block_size,
            groups,
            index_key.shape[1],
            width,
            *where.flags,
        )
        return torch.ops.msa.ChooseBlocks(
            scores,
            where.query_start,
            where.key_start,
            where.lengths,
            block_size,
            topk,
            local_blocks,
            sink_blocks,
            groups,
            blocks_of(target.most_keys, block_size),
            *where.flags,
        )

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_ids: Tensor,
        block_size: int,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        **options: Any,
    ) -> Tensor:
        where = _where(query, key, options)
        heads, head_dim, groups, topk = query.shape[1], query.shape[3], key.shape[1], block_ids.shape[3]
        sizes = {"heads": heads, "groups": groups, "head_dim": head_dim, "block_size": block_size}
        queries_a_tile, list_size = lists_of(sizes, topk, query.element_size(), target.chip)
        starts, members, counts = torch.ops.msa.ListBlocks(
            block_ids,
            where.query_start,
            where.key_start,
            where.lengths,
            block_size,
            topk,
            groups,
            queries_a_tile,
            list_size,
            *where.flags,
        )
        return _variant("AttendBlocks", sinks, softcap)(
            query,
            key,
            value,
            starts,
            members,
            counts,
            where.query_start,
            where.key_start,
            where.key_visible,
            where.lengths,
            *([] if sinks is None else [sinks]),
            block_size,
            scale,
            *([] if softcap is None else [softcap]),
            heads,
            groups,
            head_dim,
            list_size,
            *where.flags,
        )

    return select, attend
