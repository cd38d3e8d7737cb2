"""Dense attention as the user gets it, and every faster way to it that PyTorch offers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.setting import Setting

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

DEFAULT = "sdpa"


@contextlib.contextmanager
def onednn_float32() -> Iterator[None]:
    """Float32 products through oneDNN, for the duration.

    The flag allows bfloat16 inside a product. Processors without bfloat16 matrix units compute in float32 all the same,
    and faster than MKL; where they do not, the gate finds the baseline's error and leaves it out.
    """
    backends: Any = torch.backends
    settings = backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` as models call it; causal, or one newest query."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


def _sdpa_onednn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with onednn_float32():
        return sdpa(query, key, value)


def _sdpa_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(query, key, value)


def _grouped_bmm(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query a head: the heads of a group are the rows of one product."""
    groups, dim = key.shape[1], key.shape[3]
    rows = query.reshape(groups, -1, dim)  # [Hkv, G, D] at batch 1
    scores = torch.bmm(rows, key[0].transpose(1, 2)).float() * dim**-0.5
    return torch.bmm(scores.softmax(-1).to(value.dtype), value[0]).view(query.shape)


def _grouped_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query a head: the heads of a group are the queries of one head."""
    rows = query.view(1, key.shape[1], -1, key.shape[3])
    return F.scaled_dot_product_attention(rows, key, value).view(query.shape)


def _compiled_flex() -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[int, Any] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        if length not in masks:
            masks.clear()
            masks[length] = create_block_mask(
                lambda b, h, q, k: q >= k, None, None, length, length, device=str(query.device)
            )
        out: Any = compiled(query, key, value, block_mask=masks[length], enable_gqa=True)
        return out

    return attend


def prefill_baselines(setting: Setting, *, flex: bool = False) -> dict[str, Attend]:
    """Causal attention of a prompt; the first is what the user gets."""
    found: dict[str, Attend] = {DEFAULT: sdpa}
    if setting.device.type == "cpu" and setting.dtype == torch.float32:
        found["sdpa, oneDNN"] = _sdpa_onednn
    if setting.device.type == "cuda" and setting.dtype != torch.float32:
        found["sdpa, cuDNN"] = _sdpa_cudnn
    if flex:
        found["flex_attention"] = _compiled_flex()
    return found


def decode_baselines(setting: Setting) -> dict[str, Attend]:
    """Attention of one new token; the first is what the user gets."""
    return {DEFAULT: sdpa, "grouped bmm": _grouped_bmm, "grouped sdpa": _grouped_sdpa}
