"""Block-sparse attention and its gradients in plain torch: the specification, on any device.

Arguments and results are as in `op.py`. Queries go through in chunks of bounded size. A chunk is a batch of tiles: `R`
tiles of `M` query rows each, which share the `W` key slots of their tile. The sparse form has a tile a query (`M = G`
heads, `W` = the slots of its blocks, gathered); the dense form has one tile a chunk (`W = Tk`, nothing gathered).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from msa_compile.kernels.visibility import Visibility, find_visibility

# Elements of the largest temporary of a chunk; memory beyond inputs and outputs does not grow with Tq.
_WORKSPACE = 1 << 21


class Gradients(NamedTuple):
    """Gradients of the inputs, each in the shape and dtype of its input; `sinks` is None without sinks."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class _Problem:
    """One call: the tensors, what is visible, and the constants of the softmax."""

    query: Tensor
    key: Tensor
    value: Tensor
    # None selects every block.
    block_ids: Tensor | None
    block_size: int
    scale: float
    softcap: float | None
    sinks: Tensor | None
    visibility: Visibility
    precision: torch.dtype


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries `start .. end - 1` as tiles.

    Args:
        start: first query.
        end: one past the last query.
        query: `[B, Hkv, R, M, D]` in the working precision.
        key: `[B, Hkv, R, W, D]` in the working precision, zero where the tile cannot see the slot.
        value: as `key`.
        visible: `[B|1, Hkv|1, R, M|1, W]` bool.
        sinks: `[1, Hkv, R, M, 1]` in the working precision, or None.
        slots: `[B * Hkv * R * W]` int64, row of each key in `key.reshape(-1, D)` of the whole call.
    """

    start: int
    end: int
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    sinks: Tensor | None
    slots: Tensor


class _Softmax(NamedTuple):
    """Probabilities of the keys `[B, Hkv, R, M, W]` and of the sink `[B, Hkv, R, M, 1]`, and the capped logits."""

    of_keys: Tensor
    of_sink: Tensor | None
    logits: Tensor


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
    problem = _problem(
        query,
        key,
        value,
        block_ids,
        block_size,
        scale,
        softcap,
        sinks,
        window,
        query_start,
        key_start,
        key_end,
        document_start,
        mask,
        is_causal,
    )
    return _forward(problem)


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
    problem = _problem(
        query,
        key,
        value,
        block_ids,
        block_size,
        scale,
        softcap,
        sinks,
        window,
        query_start,
        key_start,
        key_end,
        document_start,
        mask,
        is_causal,
    )
    return _backward(grad_output, problem)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    """Attend to every visible token: `block_sparse_attention` with all blocks selected.

    The keys are not copied once a query, so a NaN in a slot that some query of the call sees may reach the others, as
    in any dense attention. Slots that no query sees have no influence.
    """
    problem = _problem(
        query,
        key,
        value,
        None,
        1,
        scale,
        softcap,
        sinks,
        window,
        query_start,
        key_start,
        key_end,
        document_start,
        mask,
        is_causal,
    )
    return _forward(problem)


def dense_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    """Differentiate `dense_attention`, recomputing its softmax; `grad_output` is `[B, Hq, Tq, D]`."""
    problem = _problem(
        query,
        key,
        value,
        None,
        1,
        scale,
        softcap,
        sinks,
        window,
        query_start,
        key_start,
        key_end,
        document_start,
        mask,
        is_causal,
    )
    return _backward(grad_output, problem)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor | None,
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
) -> _Problem:
    if block_ids is not None:
        # Valid ids are a prefix of at most N, so a topk beyond N only holds -1 there.
        block_ids = block_ids[..., : -(-key.shape[2] // block_size)]
    return _Problem(
        query=query,
        key=key,
        value=value,
        block_ids=block_ids,
        block_size=block_size,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        visibility=find_visibility(
            query_length=query.shape[2],
            key_length=key.shape[2],
            device=query.device,
            window=window,
            query_start=query_start,
            key_start=key_start,
            key_end=key_end,
            document_start=document_start,
            mask=mask,
            is_causal=is_causal,
        ),
        precision=torch.float64 if query.dtype == torch.float64 else torch.float32,
    )


def _forward(problem: _Problem) -> Tensor:
    output = problem.query.new_zeros(problem.query.shape)
    for chunk in _chunks(problem):
        probabilities = _softmax(chunk, problem)
        result = probabilities.of_keys @ chunk.value
        output[:, :, chunk.start : chunk.end] = _from_tiles(result, chunk, problem).to(output.dtype)
    return output


def _backward(grad_output: Tensor, problem: _Problem) -> Gradients:
    """Apply the chain rule with `P` the probabilities and `dP = dO V^T`.

    delta = rowsum(P * dP), which equals rowsum(dO * O)
    dV = P^T dO,  dS = P * (dP - delta) * (1 - tanh^2),  dQ = scale dS K,  dK = scale dS^T Q,  dsink = -sum P_sink delta
    """
    head_dim = problem.query.shape[-1]
    grad_query = problem.query.new_zeros(problem.query.shape)
    grad_key = torch.zeros(problem.key.shape[:3].numel(), head_dim, dtype=problem.precision, device=problem.key.device)
    grad_value = torch.zeros_like(grad_key)
    grad_sinks = None if problem.sinks is None else torch.zeros_like(problem.sinks, dtype=problem.precision)
    for chunk in _chunks(problem):
        softmax = _softmax(chunk, problem)
        grad = _to_tiles(grad_output, chunk.start, chunk.end, chunk.key.shape[2], problem)
        grad_softmax = grad @ chunk.value.transpose(-1, -2)
        delta = (softmax.of_keys * grad_softmax).sum(-1, keepdim=True)
        grad_logits = softmax.of_keys * (grad_softmax - delta)
        if problem.softcap is not None:
            grad_logits = grad_logits * (1 - (softmax.logits / problem.softcap).square())
        result = grad_logits @ chunk.key * problem.scale
        grad_query[:, :, chunk.start : chunk.end] = _from_tiles(result, chunk, problem).to(grad_query.dtype)
        # Where a tile sees no slot the product is 0 times a query, which may be poisoned: it must not be added.
        is_seen = chunk.visible.any(-2)[..., None]
        of_key = torch.where(is_seen, grad_logits.transpose(-1, -2) @ chunk.query * problem.scale, 0.0)
        of_value = torch.where(is_seen, softmax.of_keys.transpose(-1, -2) @ grad, 0.0)
        grad_key.index_add_(0, chunk.slots, of_key.flatten(0, -2))
        grad_value.index_add_(0, chunk.slots, of_value.flatten(0, -2))
        if grad_sinks is not None and softmax.of_sink is not None:
            groups = problem.key.shape[1]
            of_sink = (softmax.of_sink * delta).reshape(-1, groups, chunk.end - chunk.start, len(grad_sinks) // groups)
            grad_sinks -= of_sink.sum((0, 2)).flatten()
    return Gradients(
        grad_query,
        grad_key.view(problem.key.shape).to(problem.key.dtype),
        grad_value.view(problem.value.shape).to(problem.value.dtype),
        None if grad_sinks is None or problem.sinks is None else grad_sinks.to(problem.sinks.dtype),
    )


def _softmax(chunk: _Chunk, problem: _Problem) -> _Softmax:
    logits = chunk.query @ chunk.key.transpose(-1, -2) * problem.scale
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    masked = torch.where(chunk.visible, logits, -torch.inf)
    highest = masked.amax(-1, keepdim=True)
    if chunk.sinks is not None:
        highest = torch.maximum(highest, chunk.sinks)
    # A row that sees nothing has -inf here, and -inf minus -inf is NaN.
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(masked - highest)
    total = weights.sum(-1, keepdim=True)
    sink = None
    if chunk.sinks is not None:
        sink = torch.exp(chunk.sinks - highest)
        total = total + sink
    total = total.masked_fill(total == 0, 1.0)
    return _Softmax(weights / total, None if sink is None else sink / total, logits)


def _chunks(problem: _Problem) -> Iterator[_Chunk]:
    """Cut the queries into chunks whose largest temporary has at most `_WORKSPACE` elements, or one query."""
    batch, heads, query_length, head_dim = problem.query.shape
    groups, key_length = problem.key.shape[1:3]
    if problem.query.numel() == 0 or problem.key.numel() == 0:
        return
    if problem.block_ids is None:
        cost = batch * heads * key_length
    else:
        width = problem.block_ids.shape[-1] * problem.block_size
        cost = batch * groups * width * max(head_dim, heads // groups)
    # Copied once if they are strided, so that a key is a row.
    key_rows = problem.key.reshape(-1, head_dim)
    value_rows = problem.value.reshape(-1, head_dim)
    step = max(1, _WORKSPACE // cost)
    for start in range(0, query_length, step):
        end = min(start + step, query_length)
        visible, slots = _find_slots(problem, start, end)
        tiles, width = visible.shape[2], visible.shape[4]
        is_seen = visible.any(-2)[..., None]
        shape = (batch, groups, tiles, width, head_dim)
        sinks = problem.sinks
        if sinks is not None:
            per_query = sinks.to(problem.precision).view(1, groups, 1, -1, 1).expand(-1, -1, end - start, -1, -1)
            sinks = per_query.reshape(1, groups, tiles, -1, 1)
        yield _Chunk(
            start=start,
            end=end,
            query=_to_tiles(problem.query, start, end, tiles, problem),
            # Zeroed, not only masked later: 0 times NaN would carry poisoned memory into the products.
            key=torch.where(is_seen, key_rows[slots].view(shape).to(problem.precision), 0.0),
            value=torch.where(is_seen, value_rows[slots].view(shape).to(problem.precision), 0.0),
            visible=visible,
            sinks=sinks,
            slots=slots,
        )


def _find_slots(problem: _Problem, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Return `visible` and `slots` of a chunk, as `_Chunk` describes them."""
    groups, key_length = problem.key.shape[1:3]
    device = problem.key.device
    seen = problem.visibility.rows(start, end)
    # The row of slot 0 of each batch row and group.
    base = torch.arange(problem.key.shape[0] * groups, device=device).view(-1, groups, 1, 1) * key_length
    if problem.block_ids is None:
        heads_a_group = problem.query.shape[1] // groups
        visible = seen.of_all_slots()[:, :, None].repeat_interleave(heads_a_group, dim=-2)
        return visible, (base + torch.arange(key_length, device=device)).flatten()
    ids = problem.block_ids[:, :, start:end].to(torch.int64)[..., None]
    slots = seen.anchor[:, None, :, None, None] + ids * problem.block_size
    slots = (slots + torch.arange(problem.block_size, device=device)).flatten(-2)
    visible = seen.of_slots(slots) & (ids >= 0).expand(*ids.shape[:-1], problem.block_size).flatten(-2)
    return visible[..., None, :], (torch.where(visible, slots, 0) + base).flatten()


def _to_tiles(rows: Tensor, start: int, end: int, tiles: int, problem: _Problem) -> Tensor:
    """Cut queries out of `[B, Hq, Tq, D]` and return them as `[B, Hkv, tiles, M, D]` in the working precision."""
    batch, groups = problem.key.shape[:2]
    head_dim = rows.shape[-1]
    by_group = rows[:, :, start:end].reshape(batch, groups, -1, end - start, head_dim)
    return by_group.transpose(2, 3).reshape(batch, groups, tiles, -1, head_dim).to(problem.precision)


def _from_tiles(tiles: Tensor, chunk: _Chunk, problem: _Problem) -> Tensor:
    """Undo `_to_tiles`: return `[B, Hq, end - start, D]`."""
    batch, heads, _, head_dim = problem.query.shape
    groups, length = problem.key.shape[1], chunk.end - chunk.start
    by_query = tiles.reshape(batch, groups, length, heads // groups, head_dim)
    return by_query.transpose(2, 3).reshape(batch, heads, length, head_dim)
