"""The op `msa::exact_where_biased`: dense attention where a handed-in mask turns out to be a bias.

A mask that arrives with the call is taken to hide keys and nothing else; only its values can tell. Where they add
something, sparse attention would drop it: the result of the sparse op is then replaced by exact attention with the
bias, and the site says so.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.autocast import register_autocast

log = logging.getLogger(__name__)

# Calls of this process that were dense because of a bias, by compiled model and site: for the report.
biased_calls: Counter[tuple[int, str]] = Counter()
_lock = threading.Lock()

# Logits held at once, in elements; a chunk of queries is sized to it.
_WORKSPACE = 1 << 22


def _run(
    sparse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor,
    is_bias: Tensor,
    site: str,
    owner: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return `sparse`, or where the mask is a bias attention over all visible keys with it.

    Args:
        sparse: `[B, Hq, Tq, D]`, what the sparse op made of the same queries, keys and values.
        query: `[B, Hq, Tq, D]` floating point.
        key: `[B, Hkv, Tk, D]`.
        value: `[B, Hkv, Tk, D]`.
        bias: floating point, broadcastable to `[B, Hq, Tq, Tk]`, added to the logits after scale and softcap.
        mask: bool, broadcastable to `[B, 1, Tq, Tk]`, True where a key is seen.
        is_bias: bool `[]`.
        site: name of the attention site, for the log and the report.
        owner: number of the compiled model, whose names these are.
        scale: factor of the logits.
        softcap: bound of the logits before the bias.
        sinks: `[Hq]`, one more logit a head.

    Returns:
        `[B, Hq, Tq, D]`, contiguous. A query that sees nothing gets zeros.
    """
    if not bool(is_bias):
        return sparse.clone(memory_format=torch.contiguous_format)
    with _lock:
        biased_calls[owner, site] += 1
        is_first = biased_calls[owner, site] == 1
    if is_first:
        log.warning(
            "%s ran DENSE: the additive attention mask of this call holds values that are neither 0 (seen) nor -1e4 or "
            "less (hidden). That is a bias, which sparse attention would drop, so attention was computed exactly. "
            "Pass a mask that only hides, or keep the site dense: MSAConfig(exclude=(%r,)).",
            site or "<root>",
            site,
        )
    output = torch.empty_like(sparse, memory_format=torch.contiguous_format)
    for rows, logits, _ in _logits(query, key, bias, mask, scale, softcap):
        probabilities, _ = _softmax(logits, sinks)
        output[:, :, rows] = (probabilities @ _repeated(value, query)).to(output.dtype)
    return output


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor,
    is_bias: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `sparse`, query, key, value and sinks (empty without sinks), in their shapes and dtypes."""
    grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    grad_sinks = query.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    if not bool(is_bias):
        return grad.clone(memory_format=torch.contiguous_format), *grads, grad_sinks  # type: ignore[return-value]
    precision = _precision(query)
    of_key = torch.zeros(key.shape, dtype=precision, device=key.device)
    of_value = torch.zeros_like(of_key)
    groups = key.shape[1]
    for rows, logits, slope in _logits(query, key, bias, mask, scale, softcap):
        probabilities, of_sink = _softmax(logits, sinks)
        arriving = grad[:, :, rows].to(precision)
        of_probabilities = arriving @ _repeated(value, query).transpose(-1, -2)
        delta = (probabilities * of_probabilities).sum(-1, keepdim=True)
        of_logits = probabilities * (of_probabilities - delta)
        of_logits = of_logits * scale if slope is None else of_logits * slope * scale
        grads[0][:, :, rows] = (of_logits @ _repeated(key, query)).to(query.dtype)
        of_key += _summed(of_logits.transpose(-1, -2) @ query[:, :, rows].to(precision), groups)
        of_value += _summed(probabilities.transpose(-1, -2) @ arriving, groups)
        if of_sink is not None:
            grad_sinks -= (of_sink * delta).sum((0, 2, 3)).to(grad_sinks.dtype)
    grads[1:] = of_key.to(key.dtype), of_value.to(value.dtype)
    nothing = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    return nothing, *grads, grad_sinks  # type: ignore[return-value]


def _precision(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values a query head: `[B, Hq, Tk, D]` in the working precision."""
    return tensor.to(_precision(query)).repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _summed(tensor: Tensor, groups: int) -> Tensor:
    """Undo `_repeated`: `[B, Hkv, Tk, D]`."""
    return tensor.unflatten(1, (groups, -1)).sum(2)


def _logits(
    query: Tensor, key: Tensor, bias: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Biased logits `[B, Hq, rows, Tk]` of a chunk of queries at a time, and the slope of the cap there."""
    batch, heads, length, _ = query.shape
    sizes = (batch, -1, length, key.shape[2])
    bias, mask = bias.expand(*sizes), mask.expand(*sizes)
    keys = _repeated(key, query).transpose(-1, -2)
    step = max(1, _WORKSPACE // max(1, batch * heads * key.shape[2]))
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        logits = query[:, :, rows].to(keys.dtype) @ keys * scale
        slope = None
        if softcap is not None:
            capped = torch.tanh(logits / softcap)
            logits, slope = softcap * capped, 1 - capped.square()
        logits = logits + bias[:, :, rows].to(keys.dtype)
        yield rows, logits.masked_fill(~mask[:, :, rows], -torch.inf), slope


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the keys and of the sink `[B, Hq, rows, 1]`; zeros in a row that sees nothing."""
    if sinks is None:
        return torch.softmax(logits, -1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0), None
    sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    both = torch.softmax(torch.cat([logits, sink], -1), -1)
    return both[..., :-1], both[..., -1:]


_op = torch.library.custom_op("msa::exact_where_biased", _run, mutates_args=())
_backward_op = torch.library.custom_op("msa::exact_where_biased_backward", _run_backward, mutates_args=())
exact_where_biased = _op


@_op.register_fake
def _fake(sparse: Tensor, *rest: Any) -> Tensor:
    return sparse.new_empty(sparse.shape)


@_backward_op.register_fake
def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor,
    is_bias: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    made = tuple(tensor.new_empty(tensor.shape) for tensor in (grad, query, key, value))
    return *made, query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, query, key, value, bias, mask, is_bias, _, _, *ctx.constants, sinks = inputs
    ctx.has_sinks = sinks is not None
    ctx.save_for_backward(query, key, value, bias, mask, is_bias, *([sinks] if ctx.has_sinks else []))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bias, mask, is_bias, *sinks = ctx.saved_tensors
    sparse, of_query, of_key, of_value, of_sinks = torch.ops.msa.exact_where_biased_backward(
        grad, query, key, value, bias, mask, is_bias, *ctx.constants, *sinks
    )
    nothing = (None,) * 7
    return sparse, of_query, of_key, of_value, *nothing, of_sinks if ctx.has_sinks else None


_op.register_autograd(_differentiate, setup_context=_save_for_backward)
register_autocast("exact_where_biased", cast_first=4)
register_autocast("exact_where_biased_backward", cast_first=0)
