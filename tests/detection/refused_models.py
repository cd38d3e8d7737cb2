"""Hand-written models with attention that must not be touched, or only with care."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, GROUPS, WIDTH, VOCABULARY = 4, 2, 32, 50
DIM = WIDTH // HEADS


class Attention(nn.Module):
    """Grouped-query attention; the model says what mask it has."""

    def __init__(self, heads: int = HEADS, groups: int = GROUPS) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q = nn.Linear(WIDTH, heads * DIM, bias=False)
        self.k = nn.Linear(WIDTH, groups * DIM, bias=False)
        self.v = nn.Linear(WIDTH, groups * DIM, bias=False)
        self.out = nn.Linear(heads * DIM, WIDTH, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(layer(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.project(x), attn_mask=mask, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Two layers; `mask(x, *extra)` makes what every layer's attention takes."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([attention() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()

    def forward(self, ids: Tensor, *extra: Tensor) -> Tensor:
        x = self.embedding(ids)
        mask = self.mask(x, *extra)
        for layer in self.layers:
            x = x + layer(x, mask)
        return self.head(x)


class Chunked(Decoder):
    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        slots = torch.arange(x.shape[1])
        return (slots[:, None] >= slots) & (slots[:, None] // 6 == slots // 6)


class Packed(Decoder):
    """Documents side by side; `position_ids` count from 0 in each."""

    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        (positions,) = extra
        slots = torch.arange(x.shape[1])
        start = slots - positions
        same = start[:, :, None] == start[:, None, :]
        return (same & (slots[:, None] >= slots))[:, None]


class Prefix(Decoder):
    """The first `length` tokens of a row see each other."""

    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        (length,) = extra
        slots = torch.arange(x.shape[1])
        return (slots[:, None] >= slots) | (slots < length[:, None, None, None])


class HandedIn(Decoder):
    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        return extra[0]


class Padded(Decoder):
    """Causal, and a padding mask `[B, T]` of ones and zeros."""

    def mask(self, x: Tensor, *extra: Tensor) -> Tensor:
        (padding,) = extra
        slots = torch.arange(x.shape[1])
        return (slots[:, None] >= slots) & padding[:, None, None, :].bool()


class RelativeAttention(Attention):
    """T5's learned bucket bias."""

    def __init__(self) -> None:
        super().__init__(HEADS, HEADS)
        self.bias = nn.Embedding(16, HEADS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        slots = torch.arange(x.shape[1])
        distance = (slots[:, None] - slots).clamp(0, 15)
        scores = q @ k.transpose(-1, -2) + self.bias(distance).permute(2, 0, 1)[None]
        scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
        out = F.softmax(scores.float(), dim=-1).type_as(scores) @ v
        return self.out(out.transpose(1, 2).flatten(2))


class GatedMaskAttention(Attention):
    """Keys are dropped by a score of their own: the mask is computed from activations."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = (self.keep(x).squeeze(-1) > 0)[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool)
        return super().forward(x, mask & kept)


class AlibiAttention(Attention):
    """One slope for all heads: nothing but its values tells the bias from a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        slots = torch.arange(x.shape[1])
        bias = torch.where(mask, (slots - slots[:, None]) * 0.5, -math.inf)
        return super().forward(x, bias.to(x.dtype))


class Pooled(nn.Module):
    """A decoder, and a learned query that pools its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.query = nn.Parameter(torch.randn(1, HEADS, 1, DIM))
        self.pool = Attention(HEADS, HEADS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.decoder(ids) @ self.decoder.head.weight
        _, k, v = self.pool.project(x)
        return F.scaled_dot_product_attention(self.query.expand(len(ids), -1, -1, -1), k, v).flatten(1)


class DotPooled(nn.Module):
    """A decoder whose tokens are weighted by a learned score."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()
        self.score = nn.Linear(VOCABULARY, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.decoder(ids)
        weights = self.score(x).transpose(1, 2).softmax(-1)
        return (weights @ x)[:, 0]
