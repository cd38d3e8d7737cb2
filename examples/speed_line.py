"""One line of the demo: how fast one layer's attention is here, dense and sparse, whichever way it comes out."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

import msa_compile

QUERY_HEADS, GROUPS, HEAD_DIM = 16, 2, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SECONDS = 6.0  # for everything; the longest length that fits is shown
ROUNDS = 3


def speed_line(*, block_size: int = 128, topk_blocks: int = 16, longest: int = LENGTHS[-1]) -> str:
    """Time SDPA and `msa_compile.attention` on random tensors, at the longest length that there is time for."""
    said = ""
    started = time.perf_counter()
    for length in (length for length in LENGTHS if length <= longest):
        before = time.perf_counter()
        q = torch.randn(1, QUERY_HEADS, length, HEAD_DIM)  # [B, Hq, T, D]
        k, v = torch.randn(2, 1, GROUPS, length, HEAD_DIM)  # [B, Hkv, T, D]
        prefill = _in_turns(q, k, v, block_size, topk_blocks)
        newest = _in_turns(q[:, :, -1:], k, v, block_size, topk_blocks)
        said = (
            f"one layer, {QUERY_HEADS} heads in {GROUPS} groups of {HEAD_DIM}, float32, {length} tokens: "
            f"prefill {_told(*prefill)}; one new token {_told(*newest)}"
        )
        # Twice the length takes up to four times the time.
        if time.perf_counter() - started + 4 * (time.perf_counter() - before) > SECONDS:
            break
    return said


def _in_turns(q: Tensor, k: Tensor, v: Tensor, block_size: int, topk_blocks: int) -> tuple[float, float]:
    """Median seconds of dense and of sparse; they take turns, so that what disturbs the machine disturbs both."""
    is_causal = q.shape[2] > 1
    dense_seconds, sparse_seconds = [], []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        between = time.perf_counter()
        msa_compile.attention(q, k, v, is_causal=is_causal, block_size=block_size, topk_blocks=topk_blocks)
        dense_seconds.append(between - started)
        sparse_seconds.append(time.perf_counter() - between)
    return statistics.median(dense_seconds[1:]), statistics.median(sparse_seconds[1:])  # the first was a warm-up


def _told(dense: float, sparse: float) -> str:
    verdict = f"{dense / sparse:.1f}x faster" if sparse <= dense else f"{sparse / dense:.1f}x slower"
    return f"dense {dense * 1e3:.3g} ms, sparse {sparse * 1e3:.3g} ms ({verdict})"
