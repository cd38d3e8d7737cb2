"""A decoder in plain PyTorch, for shapes that come without modelling code: grouped-query attention, RoPE, gated MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Widths:
    """The sizes of a decoder.

    Attributes:
        hidden, mlp: Width of the residual stream, and of the gated MLP; for a mixture of experts that of all experts
            that one token uses.
        layers, vocabulary: Counts.
        query_heads, key_value_heads, head_dim: ``Hq``, ``Hkv``, ``D``.
        has_qk_norm: Whether queries and keys are normalised per head.
        theta: Base of RoPE.
    """

    hidden: int
    mlp: int
    layers: int
    vocabulary: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    has_qk_norm: bool = False
    theta: float = 1e6


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """RoPE, half-split; ``x`` is ``[B, H, T, D]`` and its first token stands at ``start``."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)  # [D/2]
    angle = torch.arange(start, start + x.shape[2], device=x.device)[:, None] * frequency  # [T, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query self-attention with a cache that grows by concatenation."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        dim = widths.head_dim
        self.q = nn.Linear(widths.hidden, widths.query_heads * dim, bias=False)
        self.k = nn.Linear(widths.hidden, widths.key_value_heads * dim, bias=False)
        self.v = nn.Linear(widths.hidden, widths.key_value_heads * dim, bias=False)
        self.o = nn.Linear(widths.query_heads * dim, widths.hidden, bias=False)
        self.q_norm = nn.RMSNorm(dim) if widths.has_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim) if widths.has_qk_norm else nn.Identity()

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x`` is ``[B, T, C]``; with ``past`` it is one new token."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.widths.head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )  # [B, H, T, D]
        start = 0 if past is None else past[0].shape[2]
        theta = self.widths.theta
        q, k = rotate(self.q_norm(q), start, theta), rotate(self.k_norm(k), start, theta)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2)), (k, v)


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(widths.hidden), nn.RMSNorm(widths.hidden)
        self.attention = Attention(widths)
        self.gate = nn.Linear(widths.hidden, widths.mlp, bias=False)
        self.up = nn.Linear(widths.hidden, widths.mlp, bias=False)
        self.down = nn.Linear(widths.mlp, widths.hidden, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``x`` is ``[B, T, C]``."""
        y, cache = self.attention(self.norm1(x), past)
        x = x + y
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), cache


class Decoder(nn.Module):
    """The whole decoder; make it on the meta device, then ``to_empty`` and ``fill_randomly``."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.embed = nn.Embedding(widths.vocabulary, widths.hidden)
        self.layers = nn.ModuleList(Layer(widths) for _ in range(widths.layers))
        self.norm = nn.RMSNorm(widths.hidden)
        self.head = nn.Linear(widths.hidden, widths.vocabulary, bias=False)

    def forward(self, ids: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits of the last token, ``[B, 1, V]``, and the cache; ``ids`` is ``[B, T]``, one token with ``past``."""
        x = self.embed(ids)
        cache: Cache = []
        for index, layer in enumerate(self.layers):
            x, entry = layer(x, None if past is None else past[index])
            cache.append(entry)
        return self.head(self.norm(x[:, -1:])), cache

    @torch.no_grad()
    def fill_randomly(self) -> None:
        """Norms of one, and weights of a size that keeps activations at one."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                bound = (3.0 / parameter.shape[1]) ** 0.5
                parameter.uniform_(-bound, bound)
