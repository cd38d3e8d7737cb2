"""The op `msa::index_loss`: the divergence of index scores from attention on selected blocks, in a graph that trains.

The gradient is made in the forward and saved, so that the op is one loss among others: it is scaled with what it is
multiplied by, and computed once more where a region is checkpointed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msa_compile.kernels.autocast import register_autocast
from msa_compile.kernels.index_loss.align_loss import Support, align_sums, sees_itself


def _run(
    index_query: Tensor,
    index_key: Tensor,
    query: Tensor,
    key: Tensor,
    block_ids: Tensor,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    query_start: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    document_start: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over queries and groups of the divergence, nats, and its gradients.

    A query that does not see its own slot is padding and does not count.

    Args:
        index_query: `[B, Hkv, Tq, D]`.
        index_key: `[B, 1, Tk, D]`.
        query: `[B, Hq, Tq, D]`, as attention takes it.
        key: `[B, Hkv, Tk, D]`.
        block_ids: `[B, Hkv, Tq, topk]` int32, as `select_blocks` returns them.
        block_size: As attention has it, and so on.
        scale: Of the attention's logits.
        softcap: Bound of them.
        query_start: `[B]`.
        key_start: `[B]`.
        key_end: `[B]`.
        document_start: `[B, Tq]`.
        mask: Bool, broadcastable to `[B, Hkv, Tq, Tk]`.
        is_causal: Whether a query sees no later slot.

    Returns:
        The loss, scalar, and its gradients by `index_query` and `index_key`, all in the working precision.

    Source: MiniMax Sparse Attention (arXiv 2606.13392), equations 9 and 10.
    """
    bounds: dict[str, Any] = {
        "query_start": query_start,
        "key_start": key_start,
        "key_end": key_end,
        "document_start": document_start,
        "mask": mask,
        "is_causal": is_causal,
    }
    counted = sees_itself(query.shape[2], key.shape[2], query.device, **bounds)
    support = Support(counted.expand(query.shape[0], -1), block_ids, block_size, **bounds)
    sums = align_sums(index_query, index_key, query, key, support, scale=scale, softcap=softcap)
    assert sums.grad_index_query is not None and sums.grad_index_key is not None, "they were asked for"
    share = 1 / sums.queries.clamp(min=1)
    gradients = (sums.grad_index_query * share, sums.grad_index_key * share)
    # In the strides that the fake promises, whatever those of the operands are.
    return sums.loss * share, gradients[0].contiguous(), gradients[1].contiguous()


index_loss = torch.library.custom_op("msa::index_loss", _run, mutates_args=())


@index_loss.register_fake
def _fake(index_query: Tensor, index_key: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    precision = torch.float64 if index_query.dtype == torch.float64 else torch.float32
    loss = index_query.new_empty((), dtype=precision)
    return (
        loss,
        index_query.new_empty(index_query.shape, dtype=precision),
        index_key.new_empty(index_key.shape, dtype=precision),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.others = len(inputs) - 2


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scaled = ((upstream * grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
    return (*scaled, *[None] * ctx.others)


index_loss.register_autograd(_backward, setup_context=_save)
# Probabilities are compared: autocast would round the products.
register_autocast("index_loss", cast_first=0)
