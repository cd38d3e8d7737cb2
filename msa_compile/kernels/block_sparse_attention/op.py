"""The ops `msa::block_sparse_attention` and its backward: schema, fake, autograd, autocast, and the public function."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msa_compile.errors import KernelArgumentError
from msa_compile.kernels.arguments import (
    check_at_least,
    check_device,
    check_dimensions,
    check_floating,
    check_size,
    check_visibility,
)
from msa_compile.kernels.autocast import register_autocast
from msa_compile.kernels.block_sparse_attention import cpu, cuda, reference
from msa_compile.kernels.block_sparse_attention.dense import attend_densely
from msa_compile.kernels.register import LIBRARY, register


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
    """Attend, exactly, to the visible tokens of the selected blocks and to nothing else.

        l[j] = scale * <query[b, h, i], key[b, g, j]>        with g = h // (Hq // Hkv)
        l[j] = softcap * tanh(l[j] / softcap)                with softcap only
        output[b, h, i] = sum_j exp(l[j]) value[b, g, j] / (sum_j exp(l[j]) + exp(sinks[h]))

    over the slots `j` that are visible and lie in a block of `block_ids[b, g, i]`. Visibility and the anchor of the
    blocks are those of `select_blocks`, and with `window` also `j > p - window`. The softmax is computed in float32
    (float64 for float64). A query that sees nothing gets zeros. What lies in slots that a query does not see, or in
    blocks not selected, has no influence on it, NaN included. Gradients reach query, key, value and sinks.

    Args:
        query: `[B, Hq, Tq, D]` floating point, `Hq` a multiple of `Hkv`.
        key: `[B, Hkv, Tk, D]`, dtype of `query` (under autocast any).
        value: `[B, Hkv, Tk, D]`, dtype of `query` (under autocast any).
        block_ids: `[B, Hkv, Tq, topk]` int32 as `select_blocks` returns them: no duplicates, valid ids first, then -1.
        block_size: slots a block, at least 1.
        scale: factor of the logits; default `D ** -0.5`.
        softcap: bound of the logits, above 0; default none.
        sinks: `[Hq]` floating point, one more logit a head that takes softmax mass and has no value; default none.
        window: newest slots that a query may see, at least 1; default all.
        query_start: `[B]` int32 or int64, slot of the first query; default `Tk - Tq`.
        key_start: `[B]` int32 or int64, first visible slot of the row, `0 .. Tk`; default 0.
        key_end: `[B]` int32 or int64, one past the last visible slot of the row, `0 .. Tk`; default `Tk`.
        document_start: `[B, Tq]` int32 or int64, first slot of the document of each query; default 0.
        mask: bool, broadcastable to `[B, Hkv, Tq, Tk]`, True where the slot may be seen; it can only hide slots.
        is_causal: whether `j <= p` is asked for; without it the other bounds alone say what is seen.

    Returns:
        `[B, Hq, Tq, D]`, contiguous, dtype of `query` (under autocast the autocast dtype).

    Raises:
        KernelArgumentError: a shape, dtype, device or number outside the ranges above.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), equation 8; DESIGN.md section 3.
    """
    check_dimensions("query", query, "[B, Hq, Tq, D]")
    check_floating("query", query)
    batch, heads, query_length, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check_dimensions(name, tensor, "[B, Hkv, Tk, D]")
        check_floating(name, tensor)
        check_device(name, tensor, query.device)
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise KernelArgumentError(f"{name}: found dtype {tensor.dtype}; legal is {query.dtype}, the dtype of query")
        check_size(name, tensor, 0, batch, "the batch of query")
        check_size(name, tensor, 3, head_dim, "the head dim of query")
    groups, key_length = key.shape[1:3]
    check_size("value", value, 1, groups, "the heads of key")
    check_size("value", value, 2, key_length, "the length of key")
    if groups == 0 or heads % groups != 0:
        raise KernelArgumentError(f"query: found {heads} heads; legal are multiples of {groups}, the heads of key")
    _check_block_ids(block_ids, batch, groups, query_length, query.device)
    check_at_least("block_size", block_size, 1)
    # Comparisons, because Dynamo traces them on a symbolic float and math.isfinite it does not.
    if scale is not None and not -math.inf < scale < math.inf:
        raise KernelArgumentError(f"scale: found {scale}; legal are finite numbers and None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise KernelArgumentError(f"softcap: found {softcap}; legal are finite numbers above 0 and None")
    if window is not None:
        check_at_least("window", window, 1)
    if sinks is not None:
        check_floating("sinks", sinks)
        check_device("sinks", sinks, query.device)
        if sinks.shape != (heads,):
            raise KernelArgumentError(f"sinks: found shape {tuple(sinks.shape)}; legal is ({heads},), the query heads")
    check_visibility(
        batch=batch,
        groups=groups,
        query_length=query_length,
        key_length=key_length,
        device=query.device,
        query_start=query_start,
        key_start=key_start,
        key_end=key_end,
        document_start=document_start,
        mask=mask,
    )
    output: Tensor = torch.ops.msa.block_sparse_attention(
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
        is_causal=is_causal,
    )
    return output


def _check_block_ids(block_ids: Tensor, batch: int, groups: int, query_length: int, device: torch.device) -> None:
    check_dimensions("block_ids", block_ids, "[B, Hkv, Tq, topk]")
    check_device("block_ids", block_ids, device)
    if block_ids.dtype != torch.int32:
        raise KernelArgumentError(f"block_ids: found dtype {block_ids.dtype}; legal is int32")
    check_size("block_ids", block_ids, 0, batch, "the batch of query")
    check_size("block_ids", block_ids, 1, groups, "the heads of key")
    check_size("block_ids", block_ids, 2, query_length, "the length of query")
    if block_ids.shape[3] < 1:
        raise KernelArgumentError(f"block_ids: found shape {tuple(block_ids.shape)}; legal is a topk of at least 1")


def _run_with(implementation: ModuleType) -> Callable[..., Tensor]:
    """Make the op's kernel of a module that implements it."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_ids: Tensor,
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
        dense_below: int = 0,
        is_causal: bool = True,
    ) -> Tensor:
        # Decided here, from the size at hand: a cache that grows past the bound needs no new graph.
        if key.shape[2] <= dense_below:
            return attend_densely(
                query,
                key,
                value,
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
            )
        return implementation.block_sparse_attention(
            query,
            key,
            value,
            block_ids,
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
        )

    return run


def _run_backward_with(implementation: ModuleType) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Make the backward op's kernel of a module that implements it."""

    def run(
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_ids: Tensor,
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
        dense_below: int = 0,
        is_causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if key.shape[2] <= dense_below:
            grads = reference.dense_attention_backward(
                grad_output,
                query,
                key,
                value,
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
            )
        else:
            grads = implementation.block_sparse_attention_backward(
                grad_output,
                query,
                key,
                value,
                block_ids,
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
            )
        # An op returns a tensor in every place: an empty one stands for no sinks.
        return grads.query, grads.key, grads.value, query.new_empty(0) if grads.sinks is None else grads.sinks

    return run


def _fake(query: Tensor, *rest: Any, **options: Any) -> Tensor:
    return query.new_empty(query.shape)


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_sinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_sinks


register("block_sparse_attention", cpu=_run_with(cpu), cuda=_run_with(cuda), fake=_fake)
register(
    "block_sparse_attention_backward",
    cpu=_run_backward_with(cpu),
    cuda=_run_backward_with(cuda),
    fake=_fake_backward,
)

# Place of `sinks` among the arguments of the op.
_SINKS = 7


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.is_tensor = tuple(isinstance(item, Tensor) for item in inputs)
    ctx.save_for_backward(*(item for item in inputs if isinstance(item, Tensor)))
    ctx.constants = tuple(item for item in inputs if not isinstance(item, Tensor))


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
    arguments = [next(tensors if is_tensor else constants) for is_tensor in ctx.is_tensor]
    grads: tuple[Tensor, ...] = torch.ops.msa.block_sparse_attention_backward(grad_output, *arguments)
    by_argument: list[Tensor | None] = [None] * len(arguments)
    by_argument[:3] = grads[:3]
    if ctx.is_tensor[_SINKS]:
        by_argument[_SINKS] = grads[3]
    return tuple(by_argument)


torch.library.register_autograd(
    "msa::block_sparse_attention", _differentiate, setup_context=_save_for_backward, lib=LIBRARY
)
register_autocast("block_sparse_attention", cast_first=3)
# A backward pass inside the `with` statement must not round what the forward pass kept in float32.
register_autocast("block_sparse_attention_backward", cast_first=0)
