"""Attention as people write it by hand: six small models, each in the style of a well-known repository.

They share no layer on purpose. Sizes are those of the zoo: 8 query heads of 8, 2 key/value heads (nanoGPT: 8),
vocabulary 100. Layouts are `[B, H, T, D]` except where a name says otherwise.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS, MAX_LENGTH = 100, 64, 8, 2, 8, 2, 64


# nanoGPT: fused c_attn, learned positions, SDPA with is_causal, no cache -----


class NanoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        y = self.attend(q, k, v, T)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    def attend(self, q, k, v, T):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)


class NanoSlowAttention(NanoAttention):
    """The branch of nanoGPT for a torch without SDPA: a written-out softmax under a registered triangle."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH)).view(1, 1, MAX_LENGTH, MAX_LENGTH))

    def attend(self, q, k, v, T):
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        return att @ v


class NanoBlock(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = attention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, attention=NanoAttention):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(MAX_LENGTH, WIDTH)
        self.h = nn.ModuleList([NanoBlock(attention) for _ in range(LAYERS)])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx):
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


# Meta Llama: complex RoPE, cache buffers written by slice assignment, repeat_kv on [B, T, H, D], float mask -----


def precompute_freqs_cis(dim, end, theta=10000.0):
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(xq_BTHD, xk_BTHD, freqs_cis):
    xq_ = torch.view_as_complex(xq_BTHD.float().reshape(*xq_BTHD.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk_BTHD.float().reshape(*xk_BTHD.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(1, xq_.shape[1], 1, xq_.shape[-1])
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq_BTHD), xk_out.type_as(xk_BTHD)


def repeat_kv(x_BTHD, n_rep):
    bs, slen, n_kv_heads, head_dim = x_BTHD.shape
    if n_rep == 1:
        return x_BTHD
    return (
        x_BTHD[:, :, :, None, :]
        .expand(bs, slen, n_kv_heads, n_rep, head_dim)
        .reshape(bs, slen, n_kv_heads * n_rep, head_dim)
    )


class MetaAttention(nn.Module):
    def __init__(self, max_batch=4):
        super().__init__()
        self.wq = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.cache_k = torch.zeros(max_batch, MAX_LENGTH, KV_HEADS, HEAD_DIM)
        self.cache_v = torch.zeros(max_batch, MAX_LENGTH, KV_HEADS, HEAD_DIM)

    def forward(self, x, start_pos, freqs_cis, mask):
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(bsz, seqlen, HEADS, HEAD_DIM)
        xk = xk.view(bsz, seqlen, KV_HEADS, HEAD_DIM)
        xv = xv.view(bsz, seqlen, KV_HEADS, HEAD_DIM)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        self.cache_k[:bsz, start_pos : start_pos + seqlen] = xk
        self.cache_v[:bsz, start_pos : start_pos + seqlen] = xv
        keys = repeat_kv(self.cache_k[:bsz, : start_pos + seqlen], HEADS // KV_HEADS)
        values = repeat_kv(self.cache_v[:bsz, : start_pos + seqlen], HEADS // KV_HEADS)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(HEAD_DIM)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        return self.wo(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


class MetaBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MetaAttention()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.w1 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.w2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x, start_pos, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        y = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(y)) * self.w3(y))


class MetaLlama(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([MetaBlock() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        self.freqs_cis = precompute_freqs_cis(HEAD_DIM, MAX_LENGTH)

    def forward(self, tokens, start_pos: int):
        _, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
        mask = None
        if seqlen > 1:
            mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos), device=tokens.device), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        return self.output(self.norm(h)).float()


# gpt-fast: input_pos, a static cache written by index_put_ or index_copy_, a mask buffer indexed by input_pos -----


class KVCache(nn.Module):
    def __init__(self, max_batch_size, max_seq_length, write):
        super().__init__()
        shape = (max_batch_size, KV_HEADS, max_seq_length, HEAD_DIM)
        self.write = write
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def update(self, input_pos, k_val, v_val):
        k_out, v_out = self.k_cache, self.v_cache
        if self.write == "index_put":
            k_out[:, :, input_pos] = k_val
            v_out[:, :, input_pos] = v_val
        else:
            k_out.index_copy_(2, input_pos, k_val)
            v_out.index_copy_(2, input_pos, v_val)
        return k_out, v_out


def rotate(x_BTHD, freqs_TD2):
    """RoPE on neighbouring pairs with a table of cosines and sines, as gpt-fast spells it."""
    pairs = x_BTHD.float().reshape(*x_BTHD.shape[:-1], -1, 2)
    freqs = freqs_TD2.view(1, pairs.size(1), 1, pairs.size(3), 2)
    out = torch.stack(
        [
            pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
            pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
        ],
        -1,
    )
    return out.flatten(3).type_as(x_BTHD)


class FastAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv_cache = None

    def forward(self, x, freqs, mask, input_pos, *, enable_gqa):
        bsz, seqlen, _ = x.shape
        kv_size = KV_HEADS * HEAD_DIM
        q, k, v = self.wqkv(x).split([WIDTH, kv_size, kv_size], dim=-1)
        q = rotate(q.view(bsz, seqlen, HEADS, HEAD_DIM), freqs)
        k = rotate(k.view(bsz, seqlen, KV_HEADS, HEAD_DIM), freqs)
        v = v.view(bsz, seqlen, KV_HEADS, HEAD_DIM)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        if enable_gqa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, enable_gqa=True)
        else:
            k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
            v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, WIDTH))


class FastBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = FastAttention()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.ffn_norm = nn.RMSNorm(WIDTH)
        self.w1 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.w2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, freqs, mask, input_pos, enable_gqa):
        h = x + self.attention(self.attention_norm(x), freqs, mask, input_pos, enable_gqa=enable_gqa)
        return h + self.w2(F.silu(self.w1(self.ffn_norm(h))))


class GPTFast(nn.Module):
    def __init__(self, write="index_put", enable_gqa=True):
        super().__init__()
        self.write, self.enable_gqa = write, enable_gqa
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([FastBlock() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        freqs = precompute_freqs_cis(HEAD_DIM, MAX_LENGTH)
        self.register_buffer("freqs_cis", torch.stack([freqs.real, freqs.imag], dim=-1))
        self.register_buffer("causal_mask", torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool)))
        self.max_batch_size = -1

    def setup_caches(self, max_batch_size):
        if self.max_batch_size == max_batch_size:
            return
        self.max_batch_size = max_batch_size
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(max_batch_size, MAX_LENGTH, self.write)

    def forward(self, idx, input_pos):
        mask = self.causal_mask[None, None, input_pos]
        freqs = self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, freqs, mask, input_pos, self.enable_gqa)
        return self.output(self.norm(x))


# A cache that is returned: torch.cat, separate projections, a padding mask, positions counted from it -----


class CatAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.out_proj = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x, seen, past):
        b, t, _ = x.shape
        q = self.q_proj(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        if past is not None:
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, -1)), (k, v)


class CatModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(MAX_LENGTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(LAYERS)])
        self.attentions = nn.ModuleList([CatAttention() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids, keep, past=None):
        """`keep [B, Tk]` is 1 for real tokens, the cached ones included."""
        total, new = keep.shape[1], ids.shape[1]
        places = (keep.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        keys = torch.arange(total, device=ids.device)
        causal = keys[None, :] <= keys[total - new :, None]
        seen = causal[None, None] & keep.bool()[:, None, None, :]
        x = self.embed(ids) + self.positions(places)
        new_past = []
        for i, (norm, attention) in enumerate(zip(self.norms, self.attentions, strict=True)):
            y, kv = attention(norm(x), seen, None if past is None else past[i])
            x = x + y
            new_past.append(kv)
        return self.head(x), new_past
