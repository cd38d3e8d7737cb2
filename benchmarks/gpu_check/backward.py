"""Rows of the backward pass: what each kernel takes, against the backward of the dense attention that PyTorch has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.timing import (
    BACKENDS,
    Row,
    Stopwatch,
    Wanted,
    bare_options,
    make_operands,
    selection_launches,
    time_kernels,
)
from benchmarks.speed.gate import TOLERANCE, Operands, Verdict
from benchmarks.speed.roofline import Roofline
from benchmarks.speed.setting import Setting, Work, attended_keys
from msa_compile.kernels.block_sparse_attention import triton_backward as backward
from msa_compile.kernels.launch import Launch


def measure_backward(
    wanted: Wanted, device: torch.device, roofline: Roofline, *, block_size: int = 128, topk: int = 16
) -> Row:
    """Measure the gradients of one prompt, given its blocks; the forward pass is not in it."""
    setting = Setting(*wanted.heads, "bf16", device, 1, block_size, topk)
    operands = make_operands(wanted, setting, wanted.length)
    ids = torch.empty(*operands.index_query.shape[:3], topk, dtype=torch.int32, device=device)
    for launch in selection_launches(operands, ids, block_size):
        launch.run()
    grad = torch.randn(operands.query.shape, generator=torch.Generator().manual_seed(2)).to(operands.query)
    found = [torch.zeros_like(operands.query), *(torch.zeros_like(operands.key, dtype=torch.float32) for _ in range(2))]
    launches = _launches(operands, ids, grad, found, block_size)

    def call() -> None:
        for launch in launches:
            launch.run()

    call()
    verdict = check_identities(operands, grad, *found)
    time = Stopwatch(device)
    seconds = time.of(call)
    dense = _time_dense(operands, grad, time)
    keys = attended_keys(wanted.length, block_size, topk)
    # Five products, and every tensor and its gradient once.
    tensors = (operands.query, operands.key, operands.value)
    moved = float(2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    work = Work(10.0 * setting.query_heads * setting.head_dim * keys * wanted.batch, moved)
    return Row(
        case=wanted.case,
        heads=setting.heads,
        length=wanted.length,
        batch=wanted.batch,
        selection=wanted.selection,
        indexer=wanted.indexer,
        gate=str(verdict),
        blocks_a_tile=None,
        queries_a_tile=1,
        kernels=time_kernels(launches, time),
        orders={},
        seconds=seconds,
        graph_seconds=None,
        dense=dense,
        is_dense_sampled=False,
        speed_up=min(dense.values()) / seconds if dense and verdict.is_green else None,
        roofline_share=roofline.seconds(work) / seconds,
        flops_per_second=work.flops / seconds,
        bytes_per_second=work.bytes / seconds,
    )


def check_identities(
    operands: Operands, grad: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
) -> Verdict:
    """Check two sums that every query and key is part of, at a length where no oracle can follow.

    Weights of a query sum to 1, so the gradients of a group's values sum to those of its outputs, channel by channel.
    And ``<dK, K> = <dQ, Q>``, since both are the sum of slopes times logits; the two are computed apart.
    """
    tolerance = TOLERANCE[operands.query.dtype]
    groups = operands.key.shape[1]
    given = grad.double().unflatten(1, (groups, -1)).sum((2, 3))
    returned = grad_value.double().sum(2)
    of_values = float((given - returned).norm() / given.norm())
    of_queries = (grad_query.double() * operands.query.double()).unflatten(1, (groups, -1)).sum((2, 3, 4))
    of_keys = (grad_key.double() * operands.key.double()).sum((2, 3))
    size = (grad_key.double() * operands.key.double()).norm(dim=(2, 3))
    of_slopes = float(((of_queries - of_keys).abs() / size).max())
    complaints = []
    if not of_values <= tolerance:
        complaints.append(f"gradients of values sum up wrong by {of_values:.1e}")
    if not of_slopes <= tolerance:
        complaints.append(f"gradients of keys and of queries differ by {of_slopes:.1e}")
    return Verdict(tuple(complaints), max(of_values, of_slopes))


def _launches(operands: Operands, ids: Tensor, grad: Tensor, found: list[Tensor], block_size: int) -> list[Launch]:
    query = operands.query
    sums = torch.empty(2, *query.shape[:3], device=query.device)
    options: dict[str, Any] = dict.fromkeys(("scale", "softcap", "sinks", "window"))
    options |= bare_options(block_size, query.device)
    given = (grad, query, operands.key, operands.value, ids, *found, *sums)
    return list(backward.find_launches(*given, **options))


def _time_dense(operands: Operands, grad: Tensor, time: Stopwatch) -> dict[str, float]:
    """Seconds of the backward of dense attention, by the backends that take the call."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in (operands.query, operands.key, operands.value))
    found = {}
    backends = BACKENDS if time.device.type == "cuda" else {"math": SDPBackend.MATH}
    for name, backend in backends.items():
        try:
            with torch.enable_grad(), sdpa_kernel(backend):
                output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            call = partial(torch.autograd.grad, output, (query, key, value), grad, retain_graph=True)
            found[name] = time.of(call)
        except RuntimeError:  # not every backend takes every shape; those that do are compared
            continue
    return found
