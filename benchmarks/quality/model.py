"""A small grouped-query language model in plain PyTorch: RoPE, norms on queries and keys, and a token shift.

Before its attention a layer adds to each token a share of the one before, channel by channel (as RWKV and others do).
A key then knows what stood before it, so that one layer can look up a fact; without, two have to learn to do it
together, which takes these models many times longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Query [B, Hq, T, D], key and value [B, Hkv, T, D] to output [B, Hq, T, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the model.

    Attributes:
        vocabulary: Tokens.
        layers: Blocks of attention and MLP.
        hidden: Width of the residual stream.
        query_heads: ``Hq``.
        groups: ``Hkv``.
        head_dim: ``D``.
        context: Longest sequence.
    """

    vocabulary: int
    layers: int = 2
    hidden: int = 128
    query_heads: int = 8
    groups: int = 2
    head_dim: int = 32
    context: int = 2048


def attend_densely(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention to every key."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of ``[B, H, T, D]`` with ``[T, D]``, halves split."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention; what `attend` is can be exchanged for the duration of a measurement."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.previous = nn.Parameter(torch.randn(size.hidden))
        self.q_proj = nn.Linear(size.hidden, size.query_heads * size.head_dim, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.groups * size.head_dim, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.groups * size.head_dim, bias=False)
        self.o_proj = nn.Linear(size.query_heads * size.head_dim, size.hidden, bias=False)
        self.q_norm = nn.RMSNorm(size.head_dim)
        self.k_norm = nn.RMSNorm(size.head_dim)
        # From a sharper start, heads that look for one token form earlier.
        nn.init.constant_(self.q_norm.weight, 2.0)
        self.attend: Attend = attend_densely

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of ``[B, T, hidden]``."""
        x = x + self.previous * F.pad(x, (0, 0, 1, -1))
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self.q_norm(query).transpose(1, 2), cos, sin)
        key = rotate(self.k_norm(key).transpose(1, 2), cos, sin)
        return self.o_proj(self.attend(query, key, value.transpose(1, 2)).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(size.hidden)
        self.attention = Attention(size)
        self.mlp_norm = nn.RMSNorm(size.hidden)
        self.gate_up = nn.Linear(size.hidden, 4 * size.hidden, bias=False)
        self.down = nn.Linear(2 * size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """Next-token logits ``[B, T, vocabulary]`` of token ids ``[B, T]``; embeddings are tied."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList([Layer(size) for _ in range(size.layers)])
        self.norm = nn.RMSNorm(size.hidden)
        frequencies = 500_000.0 ** -(torch.arange(0, size.head_dim, 2) / size.head_dim)
        angles = torch.outer(torch.arange(size.context), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=0.05)

    def attentions(self) -> list[Attention]:
        """Of each layer."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.embed(ids) * self.embed.embedding_dim**0.5
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embed.weight)


def count_parameters(size: ModelSize) -> int:
    """How many a model has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(size).parameters())
