"""A decoder in plain PyTorch, for shapes that come without modelling code: grouped-query attention, RoPE, gated MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of each layer buffers for keys and values, [B, Hkv, capacity, D].
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
    """Grouped-query self-attention with a cache of buffers that new tokens are written into."""

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

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
        """``x`` is ``[B, T, C]``: a whole prompt, which starts at 0, or one token after ``start`` others."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.widths.head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )  # [B, H, T, D]
        theta = self.widths.theta
        q, k = rotate(self.q_norm(q), start, theta), rotate(self.k_norm(k), start, theta)
        keys, values = cache
        end = start + x.shape[1]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        keys, values = keys[:, :, :end], values[:, :, :end]
        if x.shape[1] > 1:
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(widths.hidden), nn.RMSNorm(widths.hidden)
        self.attention = Attention(widths)
        self.gate = nn.Linear(widths.hidden, widths.mlp, bias=False)
        self.up = nn.Linear(widths.hidden, widths.mlp, bias=False)
        self.down = nn.Linear(widths.mlp, widths.hidden, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
        """``x`` is ``[B, T, C]``."""
        x = x + self.attention(self.norm1(x), cache, start)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The whole decoder; make it on the meta device, then ``to_empty`` and ``fill_randomly``."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        self.embed = nn.Embedding(widths.vocabulary, widths.hidden)
        self.layers = nn.ModuleList(Layer(widths) for _ in range(widths.layers))
        self.norm = nn.RMSNorm(widths.hidden)
        self.head = nn.Linear(widths.hidden, widths.vocabulary, bias=False)

    def forward(self, ids: Tensor, cache: Cache, start: int = 0) -> Tensor:
        """Logits of the last token, ``[B, 1, V]``; ``ids`` is ``[B, T]``, a prompt, or one token after ``start``."""
        x = self.embed(ids)
        for layer, entry in zip(self.layers, cache, strict=True):
            x = layer(x, entry, start)
        return self.head(self.norm(x[:, -1:]))  # type: ignore[no-any-return]

    def make_cache(self, tokens: int) -> Cache:
        """Buffers, not filled, for one row of ``tokens`` tokens."""
        like, widths = self.embed.weight, self.widths
        shape = (1, widths.key_value_heads, tokens, widths.head_dim)
        return [(like.new_empty(shape), like.new_empty(shape)) for _ in self.layers]

    @torch.no_grad()
    def fill_randomly(self) -> None:
        """Norms of one, and weights of a size that keeps activations at one."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                bound = (3.0 / parameter.shape[1]) ** 0.5
                parameter.uniform_(-bound, bound)
