"""The loss that aligns index scores with attention, and its gradient, a tile of keys at a time.

For query `i` of group `r`, over a support `T[i, r]` of slots (all that it sees, or those in selected blocks):

    teacher  P[j] = mean over the heads h of the group of softmax over T of l[h, j]
             l[h, j] = scale * <query[h, i], key[r, j]>, capped by softcap * tanh(l / softcap) with softcap only
    student  S[j] = softmax over T of index_scale * <index_query[r, i], index_key[j]>
    loss     sum over i and r of KL(P || S) = sum_j P[j] (log P[j] - log S[j]),  divided by Hkv
    gradient d/d index_query[r, i] = c sum_j (S[j] - P[j]) index_key[j]
             d/d index_key[j]      = c sum_(i, r) (S[j] - P[j]) index_query[r, i]      with c = index_scale / Hkv

With `power` and with blocks that are left out of the support because every selection has them (`local_blocks`,
`sink_blocks`), the probabilities being of all slots that the query sees, left out or not:

    teacher  P'[j] = P[j]^power / sum over T of P^power
    loss     sum over i and r of w KL(P' || S),  w = sum over T of P
    gradient as above with w (S[j] - P'[j])

The teacher has no gradient. Each head's probabilities are those of the tokens alone: a sink takes no part. Queries go
through in chunks and their keys in tiles, first for the softmax's normalisers and then once more for the loss (and once
between for `P'`), so that nothing of the size `Tq * Tk` is ever held; what a query cannot see is not computed. What is
here is plain torch and the specification; on a GPU Triton kernels do the same (`triton.py`).

Source: MiniMax Sparse Attention (arXiv 2606.13392), equations 9 and 10, which are `power` 1 with nothing left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msa_compile.kernels.index_loss import cuda
from msa_compile.kernels.visibility import Visibility, find_visibility

# Elements of one tile's logits over all heads, and queries of a chunk at most.
_WORKSPACE = 1 << 22
_LONGEST_CHUNK = 256


@dataclass(frozen=True)
class Support:
    """Which slots each query is compared on; fields as in the ops' docstrings (`kernels/select_blocks/op.py`).

    Attributes:
        counted: bool `[B, Tq]`, False for queries that do not count, such as padding; default all.
        block_ids: int32 `[B, Hkv, Tq, topk]` as `select_blocks` returns them: only slots of these blocks; default all.
        block_size: Slots a block; needed with `block_ids`, `local_blocks` and `sink_blocks`.
        local_blocks, sink_blocks: How many blocks up to the query's own, and how many first ones, are left out.
        window, query_start, key_start, key_end, document_start, mask, is_causal: What a query sees. Packed documents
            are told apart by `document_start`.
    """

    counted: Tensor | None = None
    block_ids: Tensor | None = None
    block_size: int | None = None
    local_blocks: int = 0
    sink_blocks: int = 0
    window: int | None = None
    query_start: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    document_start: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = True

    @property
    def leaves_out(self) -> bool:
        """Whether some blocks that a query sees are left out."""
        return self.local_blocks > 0 or self.sink_blocks > 0


class AlignSums(NamedTuple):
    """What was added up over queries; nothing is divided by their number, so that shards can be added.

    Attributes:
        loss: Scalar, the sum over queries of the mean over groups of the divergence, nats.
        queries: Scalar int64, how many queries that is: those that count and have a slot to compare.
        grad_index_query: Of `loss`, in the shape of `index_query` and the working precision, or `None` where it was
            not asked for.
        grad_index_key: Of `loss`, in the shape of `index_key`, likewise.
    """

    loss: Tensor
    queries: Tensor
    grad_index_query: Tensor | None
    grad_index_key: Tensor | None


def align_loss(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    support: Support | None = None,
    *,
    index_scale: float | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    power: float = 1.0,
) -> Tensor:
    """The mean over queries and groups of the divergence of index scores from attention; scalar, nats.

    Gradients reach `index_query` and `index_key` alone. Without a query that counts the loss is 0, and so are they.

    Args:
        index_query: `[B, Hkv, Tq, D]` floating point.
        index_key: `[B, 1, Tk, D]` for one key head shared by all groups, or `[B, Hkv, Tk, D]`.
        query: `[B, Hq, Tq, Dh]`, as attention takes it: normed and rotated.
        key: `[B, Hkv, Tk, Dh]`.
        support: What is compared; default everything that a causal query sees.
        index_scale: Of the index scores; default `D ** -0.5`.
        scale: Of the attention's; default `Dh ** -0.5`.
        softcap: Bound of the attention's logits; default none.
        power: To which the teacher's probabilities are raised: above 1, small ones matter less.
    """
    support = Support() if support is None else support
    loss, queries = _Align.apply(index_query, index_key, query, key, support, index_scale, scale, softcap, power)
    return loss / queries.clamp(min=1)


class _Align(torch.autograd.Function):
    """The sum of the divergences; its gradient is made on the way, so that nothing of a tile has to be kept."""

    @staticmethod
    def forward(ctx: Any, index_query: Tensor, index_key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        query, key, support, index_scale, scale, softcap, power = rest
        sums = align_sums(
            index_query,
            index_key,
            query,
            key,
            support,
            index_scale=index_scale,
            scale=scale,
            softcap=softcap,
            power=power,
            has_gradients=any(ctx.needs_input_grad[:2]),
        )
        ctx.dtypes = (index_query.dtype, index_key.dtype)
        ctx.save_for_backward(sums.grad_index_query, sums.grad_index_key)
        ctx.mark_non_differentiable(sums.queries)
        return sums.loss, sums.queries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded last: the sum over all queries may be too large for float16, and the mean is not.
        scaled = ((upstream * grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (*scaled, *[None] * 7)


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
    """The sums behind :func:`align_loss`, and their gradients where `has_gradients`; other arguments as there."""
    if not cuda.has_kernels(index_query, index_key, query, key):
        return _align_in_chunks(
            index_query, index_key, query, key, support, index_scale, scale, softcap, power, has_gradients=has_gradients
        )
    # Imported by the first call: importing the package loads no optional package.
    from msa_compile.kernels.index_loss import triton

    # Triton launches on the current device, which need not be that of the tensors.
    with torch.no_grad(), torch.cuda.device_of(query):
        return triton.align_sums(
            index_query,
            index_key,
            query,
            key,
            support,
            index_scale=index_scale,
            scale=scale,
            softcap=softcap,
            power=power,
            has_gradients=has_gradients,
        )


def _align_in_chunks(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    support: Support,
    index_scale: float | None,
    scale: float | None,
    softcap: float | None,
    power: float,
    *,
    has_gradients: bool,
) -> AlignSums:
    """Add up in plain torch: on a CPU, in float64, and where there are no kernels."""
    groups = index_query.shape[1]
    problem = _Problem(
        index_query=index_query,
        index_key=index_key,
        query=query.unflatten(1, (groups, query.shape[1] // groups)),
        key=key,
        support=support,
        visibility=find_visibility(
            query_length=query.shape[2],
            key_length=key.shape[2],
            device=query.device,
            window=support.window,
            query_start=support.query_start,
            key_start=support.key_start,
            key_end=support.key_end,
            document_start=support.document_start,
            mask=support.mask,
            is_causal=support.is_causal,
        ),
        index_scale=index_query.shape[3] ** -0.5 if index_scale is None else index_scale,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        softcap=softcap,
        power=power,
        precision=torch.float64 if index_query.dtype == torch.float64 else torch.float32,
    )
    # Autocast would round the products, whose logarithms are compared.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        totals = _Totals(problem, has_gradients)
        for chunk in _chunks(problem):
            _add_chunk(problem, chunk, totals)
    return AlignSums(totals.loss, totals.queries, totals.of_query, totals.of_key)


def sees_itself(query_length: int, key_length: int, device: torch.device, **bounds: Any) -> Tensor:
    """Which queries see their own slot, bool `[B|1, Tq]`: the others are padding. `bounds` as of `Support`."""
    seen = find_visibility(query_length=query_length, key_length=key_length, device=device, **bounds)
    return seen.of_slots(seen.position[:, None, :, None])[..., 0].any(1)


@dataclass(frozen=True, slots=True)
class _Problem:
    """One call, as it was given but for `query`.

    Attributes:
        query: `[B, Hkv, G, Tq, Dh]`.
        precision: In which everything is multiplied and added.
    """

    index_query: Tensor
    index_key: Tensor
    query: Tensor
    key: Tensor
    support: Support
    visibility: Visibility
    index_scale: float
    scale: float
    softcap: float | None
    power: float
    precision: torch.dtype

    @property
    def is_plain(self) -> bool:
        """Whether the teacher is attention as it is."""
        return self.power == 1.0 and not self.support.leaves_out


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some queries, and the tiles of slots that some of them see.

    Attributes:
        start, end: Queries `start .. end - 1`.
        tiles: Slots `first .. stop - 1` of each tile.
        seen: Visibility of these queries.
        index_query: `[B, Hkv, C, D]`, scaled, in the working precision.
        query: `[B, Hkv, G, C, Dh]`, likewise.
        is_selected: `[B, Hkv, C, N + 1]` bool, whether a block is in the support, or `None` where every block is.
    """

    start: int
    end: int
    tiles: tuple[tuple[int, int], ...]
    seen: Visibility
    index_query: Tensor
    query: Tensor
    is_selected: Tensor | None


class _Totals:
    """What is added up, in the working precision; as in `AlignSums`."""

    def __init__(self, problem: _Problem, has_gradients: bool) -> None:
        device, precision = problem.query.device, problem.precision
        self.loss = torch.zeros((), dtype=precision, device=device)
        self.queries = torch.zeros((), dtype=torch.int64, device=device)
        self.of_query: Tensor | None = None
        self.of_key: Tensor | None = None
        if has_gradients:
            self.of_query = torch.zeros_like(problem.index_query, dtype=precision)
            self.of_key = torch.zeros_like(problem.index_key, dtype=precision)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Logits of a tile.

    Attributes:
        teacher: `[B, Hkv, G, C, W]`, `-inf` where a slot is neither in the support nor in a block that is left out.
        student: `[B, Hkv, C, W]`, `-inf` where a slot is not in the support.
        compared: `[B|1, Hkv|1, C, W]` bool, the support.
    """

    teacher: Tensor
    student: Tensor
    compared: Tensor


@dataclass(frozen=True, slots=True)
class _Normalisers:
    """Of each query of a chunk; 0 where there is nothing to normalise.

    Attributes:
        teacher: `[B, Hkv, G, C, 1]`, logarithm of the sum of the heads' exponentials.
        student: `[B, Hkv, C, 1]`, likewise of the scores in the support.
        weight: `[B, Hkv, C, 1]`, probability in the support, or `None` where it is 1.
        raised: `[B, Hkv, C, 1]`, sum over the support of the raised probabilities, or `None` where it is 1.
    """

    teacher: Tensor
    student: Tensor
    weight: Tensor | None = None
    raised: Tensor | None = None


def _chunks(problem: _Problem) -> Iterator[_Chunk]:
    """Cut the queries into chunks, and what each sees into tiles of at most `_WORKSPACE` logits, or one."""
    batch, groups, heads, query_length, _ = problem.query.shape
    if problem.query.numel() == 0 or problem.key.numel() == 0:
        return
    room = max(1, _WORKSPACE // (batch * groups * heads))
    step = min(_LONGEST_CHUNK, math.isqrt(room))
    width = room // step
    for start in range(0, query_length, step):
        end = min(start + step, query_length)
        seen = problem.visibility.rows(start, end)
        first, stop = int(seen.first.min()), int(seen.stop.max())
        yield _Chunk(
            start=start,
            end=end,
            tiles=tuple((slot, min(slot + width, stop)) for slot in range(first, stop, width)),
            seen=seen,
            index_query=problem.index_query[:, :, start:end].to(problem.precision) * problem.index_scale,
            query=problem.query[:, :, :, start:end].to(problem.precision) * problem.scale,
            is_selected=_selected(problem, start, end),
        )


def _selected(problem: _Problem, start: int, end: int) -> Tensor | None:
    ids, size = problem.support.block_ids, problem.support.block_size
    if ids is None:
        return None
    assert size is not None, "ids of blocks mean nothing without block_size"
    ids = ids[:, :, start:end].to(torch.int64)
    blocks = -(-problem.key.shape[2] // size)
    found = torch.zeros(*ids.shape[:3], blocks + 1, dtype=torch.bool, device=ids.device)
    # -1, no block, lands in the last column, which no slot belongs to.
    return found.scatter_(3, ids % (blocks + 1), True)


def _add_chunk(problem: _Problem, chunk: _Chunk, totals: _Totals) -> None:
    """Add one chunk: its normalisers first, then loss and gradients."""
    of_teacher = torch.full(chunk.query.shape[:4], -torch.inf, dtype=problem.precision, device=chunk.query.device)
    of_student = of_teacher[:, :, 0].clone()
    kept: list[_Tile] = []
    for first, stop in chunk.tiles:
        tile = _tile(problem, chunk, first, stop)
        of_teacher = torch.logaddexp(of_teacher, tile.teacher.logsumexp(-1))
        of_student = torch.logaddexp(of_student, tile.student.logsumexp(-1))
        # A single tile is not computed twice.
        kept = [tile] if len(chunk.tiles) == 1 else []
    counts = of_student != -torch.inf
    if problem.support.counted is not None:
        counts = counts & problem.support.counted[:, None, chunk.start : chunk.end]
    totals.queries += counts.any(1).sum()
    # A query that sees nothing has -inf here, and -inf minus -inf is NaN.
    of = _Normalisers(*(part.masked_fill(part == -torch.inf, 0.0)[..., None] for part in (of_teacher, of_student)))
    if not problem.is_plain:
        of = _with_sums(problem, chunk, of, kept)
    counts, share = counts[..., None], 1 / problem.index_query.shape[1]
    for first, stop in chunk.tiles:
        tile = kept.pop() if kept else _tile(problem, chunk, first, stop)
        teacher = _probabilities(tile, of)
        if of.raised is not None:
            teacher = teacher.pow_(problem.power) / of.raised
        log_student = tile.student - of.student
        surprise = torch.xlogy(teacher, teacher) - teacher * log_student.masked_fill(~tile.compared, 0.0)
        weighed = surprise if of.weight is None else surprise * of.weight
        # Chosen and not multiplied by 0: what lies in padding may be NaN.
        totals.loss += torch.where(counts, weighed, 0.0).sum() * share
        if totals.of_query is not None and totals.of_key is not None:
            change = log_student.exp_() - teacher
            change = torch.where(counts, change if of.weight is None else change * of.weight, 0.0) * share
            index_query = torch.where(counts, chunk.index_query, 0.0)
            of_keys = totals.of_key[:, :, first:stop]
            keys = problem.index_key[:, :, first:stop].to(problem.precision)
            keys = torch.where(tile.compared.any(2)[..., None].any(1, keepdim=True), keys, 0.0)
            totals.of_query[:, :, chunk.start : chunk.end] += change @ keys * problem.index_scale
            of_keys += _of_index_key(change, index_query, of_keys.shape[1])


def _with_sums(problem: _Problem, chunk: _Chunk, of: _Normalisers, kept: list[_Tile]) -> _Normalisers:
    """`of`, with what probabilities in the support sum up to; `kept` is the only tile of the chunk, or empty."""
    weight, raised = torch.zeros_like(of.student), torch.zeros_like(of.student)
    for first, stop in chunk.tiles:
        probabilities = _probabilities(kept[0] if kept else _tile(problem, chunk, first, stop), of)
        weight += probabilities.sum(-1, keepdim=True)
        raised += probabilities.pow_(problem.power).sum(-1, keepdim=True)
    # Where so little is left that its power is 0, there is nothing to learn, and no quotient.
    return replace(of, weight=weight, raised=raised.clamp_(min=torch.finfo(raised.dtype).tiny))


def _probabilities(tile: _Tile, of: _Normalisers) -> Tensor:
    """Of attention, mean over the heads of a group, `[B, Hkv, C, W]`; 0 outside the support."""
    return (tile.teacher - of.teacher).exp_().mean(2).masked_fill_(~tile.compared, 0.0)


def _of_index_key(change: Tensor, index_query: Tensor, key_heads: int) -> Tensor:
    """`d loss / d index_key` of a tile, from `d loss / d score`, `[B, Hkv, C, W]`, and the scaled index queries."""
    if key_heads == change.shape[1]:
        return change.transpose(2, 3) @ index_query
    # One shared key head: the groups are further rows of one product.
    return (change.flatten(1, 2).transpose(1, 2) @ index_query.flatten(1, 2))[:, None]


def _tile(problem: _Problem, chunk: _Chunk, first: int, stop: int) -> _Tile:
    slots = torch.arange(first, stop, device=problem.key.device)[None, None, None]
    compared = visible = chunk.seen.of_slots(slots)
    if chunk.is_selected is not None or problem.support.leaves_out:
        size = problem.support.block_size
        assert size is not None, "blocks mean nothing without block_size"
        block = (slots - chunk.seen.anchor[:, None, :, None]).clamp(min=0) // size
        if chunk.is_selected is not None:
            compared = visible = visible & chunk.is_selected.gather(3, block.expand(*chunk.is_selected.shape[:3], -1))
        if problem.support.leaves_out:
            compared = visible & ~_left_out(problem.support, chunk, block, size)
    keys = problem.key[:, :, None, first:stop].to(problem.precision)
    teacher = chunk.query @ keys.transpose(3, 4)
    if problem.softcap is not None:
        teacher = problem.softcap * torch.tanh(teacher / problem.softcap)
    index_keys = problem.index_key[:, :, first:stop].to(problem.precision)
    student = chunk.index_query @ index_keys.transpose(2, 3)
    return _Tile(
        teacher=teacher.masked_fill_(~visible[:, :, None], -torch.inf),
        student=student.masked_fill_(~compared, -torch.inf),
        compared=compared,
    )


def _left_out(support: Support, chunk: _Chunk, block: Tensor, size: int) -> Tensor:
    """Which slots, of blocks `block`, lie in those that every selection has; in the shape of `block`."""
    own = ((chunk.seen.position - chunk.seen.anchor) // size)[:, None, :, None]
    return (block < support.sink_blocks) | ((block <= own) & (block > own - support.local_blocks))
