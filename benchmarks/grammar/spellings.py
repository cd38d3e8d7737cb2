"""Small attention modules, each a sentence of a grammar of the ways in which people write attention."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM, WIDTH = 4, 16, 32
WINDOW = 5
SOFTCAP = 20.0  # far enough from the scores that none of them becomes equal to another

_SDPA = ("sdpa",)
_WRITTEN = ("matmul", "einsum", "bmm", "baddbmm")
_GROUPED = ("grouped einsum", "broadcast", "multi-query")
_DENSE_MASKS = ("window", "none", "bias")


@dataclass(frozen=True)
class Spelling:
    """One way to write attention.

    Attributes:
        product: How the two products are written.
        repeat: How key/value heads come to match the query heads: ``"expand"``, ``"interleave"``, ``"enable_gqa"``,
            ``"equal"`` (they do), or ``"grouped"`` (the products do it).
        mask: What hides scores.
        hide: How written-out attention applies its mask.
        scale: How the scores are scaled.
        rope: How positions are rotated into queries and keys.
        projection: ``"separate"``, ``"fused"`` or ``"biased"``.
        norm: Whether queries and keys are normalised.
        cache: ``"none"``, ``"concat"`` (keys handed in) or ``"slice"`` (keys written to a buffer).
        extra: ``"none"``, ``"softcap"`` or ``"sinks"``.
        dynamic: Whether batch and length are open in the captured graph.
    """

    product: str
    repeat: str
    mask: str
    hide: str
    scale: str
    rope: str
    projection: str
    norm: bool
    cache: str
    extra: str
    dynamic: bool

    @property
    def groups(self) -> int:
        """Key/value heads."""
        if self.product == "multi-query":
            return 1
        return HEADS if self.repeat == "equal" else 2

    @property
    def is_sparse(self) -> bool:
        """Whether the attention is one that has to be made sparse."""
        return self.mask not in _DENSE_MASKS


def draw(seed: int) -> Spelling:
    """A random sentence; the same for the same ``seed``."""
    choose = random.Random(seed).choice
    product = choose((*_SDPA * 3, *_WRITTEN, *_GROUPED))
    extra = choose(("none", "none", "softcap", "sinks")) if product in ("matmul",) else "none"
    repeat = "grouped" if product in _GROUPED else choose(("expand", "interleave", "equal"))
    if product in _SDPA and choose((True, False)):
        repeat = "enable_gqa"
    if extra == "softcap":
        repeat = "equal"  # the mean of capped logits is no capped mean, so groups of one head are comparable
    cache = choose(("none", "none", "concat", "slice"))
    masks = ["tril", "arange", "additive", "minimum", "padding", "padding added", "window", "none", "bias"]
    if product in _SDPA and cache == "none":
        masks += ["flag"] * 4
    return Spelling(
        product=product,
        repeat=repeat,
        mask=choose(masks),
        hide=choose(("masked_fill", "where", "add")),
        scale=choose(("default", "factor", "divisor", "queries", "half each")),
        rope=choose(("none", "half", "interleaved", "complex", "partial")),
        projection=choose(("separate", "fused", "biased")),
        norm=choose((True, False)),
        cache=cache,
        extra=extra,
        dynamic=choose((True, False)),
    )


class Attention(nn.Module):
    """Self-attention as ``spelling`` says, with random weights."""

    keys: Tensor
    values: Tensor

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        biased, groups = spelling.projection == "biased", spelling.groups
        if spelling.projection == "fused":
            self.qkv = nn.Linear(WIDTH, (HEADS + 2 * groups) * HEAD_DIM, bias=False)
        else:
            self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=biased)
            self.k = nn.Linear(WIDTH, groups * HEAD_DIM, bias=biased)
            self.v = nn.Linear(WIDTH, groups * HEAD_DIM, bias=biased)
        self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.register_buffer("keys", torch.zeros(3, groups, 64, HEAD_DIM))
        self.register_buffer("values", torch.zeros(3, groups, 64, HEAD_DIM))

    def forward(self, x: Tensor, padding: Tensor, past: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """Attention over ``x [B, T, C]`` and what a cache holds of ``start`` earlier tokens; ``padding [B, Tk]``."""
        batch, length, _ = x.shape
        q, k, v = self._project(x)
        if self.spelling.norm:
            q, k = (F.rms_norm(part, (HEAD_DIM,)) for part in (q, k))
        q, k = (_rotated(part, self.spelling.rope, start) for part in (q, k))
        if self.spelling.cache == "concat" and past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        elif self.spelling.cache == "slice":
            self.keys[:batch, :, start : start + length] = k
            self.values[:batch, :, start : start + length] = v
            k, v = self.keys[:batch, :, : start + length], self.values[:batch, :, : start + length]
        out = self._sdpa(q, k, v, padding) if self.spelling.product in _SDPA else self._written_out(q, k, v, padding)
        return self.o(out.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.spelling.groups
        if self.spelling.projection == "fused":
            heads = self.qkv(x).view(*x.shape[:2], HEADS + 2 * groups, HEAD_DIM).transpose(1, 2)
            q, k, v = heads.split([HEADS, groups, groups], dim=1)
            return q, k, v
        q, k, v = (proj(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return q, k, v

    def _scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries, keys and the factor that is left for the scores."""
        factor = HEAD_DIM**-0.5
        if self.spelling.scale == "queries":
            return q * factor, k, 1.0
        if self.spelling.scale == "half each":
            return q * factor**0.5, k * factor**0.5, 1.0
        return q, k, factor if self.spelling.scale == "default" else 0.3

    def _repeated(self, x: Tensor) -> Tensor:
        times = HEADS // x.shape[1]
        if self.spelling.repeat == "expand":
            batch, groups, length, dim = x.shape
            return x[:, :, None].expand(batch, groups, times, length, dim).reshape(batch, HEADS, length, dim)
        return x.repeat_interleave(times, dim=1) if self.spelling.repeat == "interleave" else x

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        q, k, factor = self._scaled(q, k)
        scale = None if self.spelling.scale == "default" else factor
        gqa = self.spelling.repeat == "enable_gqa"
        k, v = self._repeated(k), self._repeated(v)
        if self.spelling.mask == "flag":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        mask = self._mask(q, k, padding)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor) -> Tensor | None:
        """Bool (true where seen) or additive, broadcastable to ``[B, Hq, Tq, Tk]``."""
        kind, queries, keys = self.spelling.mask, q.shape[2], k.shape[2]
        if kind == "none":
            return None
        if kind == "tril":
            return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if kind == "additive":
            return torch.full((queries, keys), -math.inf).triu(keys - queries + 1)
        slots = torch.arange(queries)[:, None] + (keys - queries)
        seen = torch.arange(keys) <= slots
        if kind == "window":
            seen = seen & (torch.arange(keys) > slots - WINDOW)
        if kind in ("padding", "padding added"):
            seen = seen & padding[:, None, None, :].bool()
        if kind == "bias":
            slope = -torch.arange(1, HEADS + 1)[:, None, None] / 8
            return torch.where(seen, slope * (slots - torch.arange(keys)), -math.inf)[None]
        return torch.where(seen, 0.0, torch.finfo(q.dtype).min) if kind in ("minimum", "padding added") else seen

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = self._mask(q, k, padding)
        q, k, factor = self._scaled(q, k)
        batch, groups = q.shape[0], self.spelling.groups
        product = self.spelling.product
        if product in _GROUPED:
            scores = _grouped_scores(product, q.unflatten(1, (groups, -1)), k)
        else:
            k, v = self._repeated(k), self._repeated(v)
            if product == "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
            elif product == "matmul":
                scores = q @ k.transpose(-1, -2)
            else:
                scores = self._flat_scores(q.flatten(0, 1), k.flatten(0, 1), factor)
                factor = 1.0 if product == "baddbmm" else factor
        if factor != 1.0:
            scores = scores / (1.0 / factor) if self.spelling.scale == "divisor" else scores * factor
        if self.spelling.extra == "softcap":
            scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
        if mask is not None:
            scores = self._hidden(scores, mask, batch)
        if self.spelling.extra == "sinks":
            sinks = self.sinks.view(1, HEADS, 1, 1).expand(batch, HEADS, scores.shape[2], 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        if product in _GROUPED:
            return _grouped_values(product, weights, v).reshape(q.shape)
        if product == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        return weights @ v if product == "matmul" else torch.bmm(weights, v.flatten(0, 1)).view(q.shape)

    def _flat_scores(self, q: Tensor, k: Tensor, factor: float) -> Tensor:
        if self.spelling.product == "bmm":
            return torch.bmm(q, k.transpose(1, 2))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
        return torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=factor)

    def _hidden(self, scores: Tensor, mask: Tensor, batch: int) -> Tensor:
        """``scores`` with ``mask`` applied, in the shape that the scores have."""
        if self.spelling.hide == "add" and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf)
        if scores.dim() == 3:
            mask = mask.expand(batch, HEADS, *scores.shape[1:]).reshape(scores.shape)
        elif scores.dim() == 5 and mask.dim() == 4:
            mask = mask.unflatten(1, scores.shape[1:3]) if mask.shape[1] == HEADS else mask.unsqueeze(1)
        elif self.spelling.product == "multi-query" and mask.dim() == 4 and mask.shape[1] == 1:
            mask = mask.expand(-1, HEADS, -1, -1)
        if mask.dtype != torch.bool:
            return scores + mask
        if self.spelling.hide == "where":
            return torch.where(mask, scores, -math.inf)
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def _grouped_scores(product: str, q: Tensor, k: Tensor) -> Tensor:
    """Scores of ``q [B, Hkv, G, Tq, D]``."""
    if product == "grouped einsum":
        return torch.einsum("bgrid,bgjd->bgrij", q, k)
    if product == "broadcast":
        return q @ k.unsqueeze(2).transpose(-1, -2)
    return torch.einsum("bhid,bjd->bhij", q.squeeze(1), k.squeeze(1))


def _grouped_values(product: str, weights: Tensor, v: Tensor) -> Tensor:
    if product == "grouped einsum":
        return torch.einsum("bgrij,bgjd->bgrid", weights, v)
    if product == "broadcast":
        return weights @ v.unsqueeze(2)
    return torch.einsum("bhij,bjd->bhid", weights, v.squeeze(1))


def _rotated(x: Tensor, rope: str, start: int) -> Tensor:
    """``x [B, H, T, D]`` rotated by its positions from ``start``."""
    if rope == "none":
        return x
    dim = HEAD_DIM // 2 if rope == "partial" else HEAD_DIM
    rates = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = (torch.arange(x.shape[2]) + start)[:, None] * rates
    if rope == "complex":
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    if rope == "interleaved":
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    turned, rest = x[..., :dim], x[..., dim:]
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)
