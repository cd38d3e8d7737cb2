"""A decoder written by hand in plain PyTorch, made sparse from outside: `python -m examples.hand_written`.

The model knows nothing of `msa_compile`: grouped-query attention with rotary positions, and a key/value cache of fixed
size that is written by slice assignment.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msa_compile
from msa_compile import MSAConfig

VOCABULARY, WIDTH, LAYERS, HEADS, GROUPS, MAX_LENGTH = 256, 128, 2, 8, 2, 256
HEAD_DIM = WIDTH // HEADS


def rotate(x: Tensor, start: int) -> Tensor:  # x: [B, H, T, D]
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device) / half)  # [D/2]
    angle = torch.arange(start, start + x.shape[2], device=x.device)[:, None] * frequency  # [T, D/2]
    a, b = x[..., :half], x[..., half:]  # [B, H, T, D/2]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class KVCache(nn.Module):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(batch, GROUPS, MAX_LENGTH, HEAD_DIM), persistent=False)  # [B, Hkv, L, D]
        self.register_buffer("v", torch.zeros(batch, GROUPS, MAX_LENGTH, HEAD_DIM), persistent=False)

    def update(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # k, v: [B, Hkv, T, D]
        end = start + k.shape[2]
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]  # [B, Hkv, start + T, D]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.cache: KVCache | None = None

    def forward(self, x: Tensor, start: int) -> Tensor:  # x: [B, T, C]
        batch, length, _ = x.shape
        heads = self.wqkv(x).view(batch, length, -1, HEAD_DIM).transpose(1, 2)  # [B, Hq + 2 Hkv, T, D]
        q, k, v = heads.split((HEADS, GROUPS, GROUPS), dim=1)
        q, k = rotate(q, start), rotate(k, start)
        if self.cache is not None:
            k, v = self.cache.update(start, k, v)
        if length > 1:  # the whole prompt at once
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, Hq, T, D]
        else:  # one new token, which sees every key that there is
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # [B, Hq, 1, D]
        return self.wo(y.transpose(1, 2).reshape(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.w13 = nn.Linear(WIDTH, 6 * WIDTH, bias=False)
        self.w2 = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, start: int) -> Tensor:  # x: [B, T, C]
        x = x + self.attention(self.norm1(x), start)
        gate, up = self.w13(self.norm2(x)).chunk(2, dim=-1)  # [B, T, 3C]
        return x + self.w2(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:  # ids: [B, T] -> logits: [B, T, V]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, start)
        return self.head(self.norm(x))

    def use_cache(self, batch: int | None) -> None:
        for layer in self.layers:
            layer.attention.cache = None if batch is None else KVCache(batch)


@torch.no_grad()
def generate(model: Decoder, prompt: Tensor, new: int) -> Tensor:  # prompt: [B, T] -> [B, T + new]
    model.use_cache(len(prompt))
    ids = prompt
    fresh, start = prompt, 0
    for _ in range(new):
        token = model(fresh, start)[:, -1].argmax(-1, keepdim=True)  # [B, 1]
        fresh, start, ids = token, ids.shape[1], torch.cat((ids, token), dim=1)
    model.use_cache(None)
    return ids


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.hand_written", description=__doc__.splitlines()[0])
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--new", type=int, default=40, help="tokens to generate (default 40)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Decoder()
    ids = torch.randint(VOCABULARY, (2, 100))

    # A budget that covers every key: the same logits as the dense model. dense_below=0 keeps the sparse path on.
    everything = MSAConfig(block_size=16, topk_blocks=MAX_LENGTH // 16, dense_below=0)
    msa_compile.sparsify(model, everything, example_inputs=(ids,), inner=arguments.inner)
    print(msa_compile.explain(model))
    with torch.no_grad():
        sparse = model(ids)
        with msa_compile.dense(model):
            dense = model(ids)
    difference = (sparse - dense).abs().max().item()
    print(f"\nbudget covers every key: logits differ from dense by {difference:.1e} at most")
    if difference > 1e-4:
        raise SystemExit("the logits should be the same")
    msa_compile.unsparsify(model)

    # Three blocks of 16 keys, with the cache.
    few = MSAConfig(block_size=16, topk_blocks=3, dense_below=0)
    msa_compile.sparsify(model, few, example_inputs=(ids,), inner=arguments.inner)
    with msa_compile.dense(model):
        print("dense: ", generate(model, ids, arguments.new)[0, ids.shape[1] :].tolist())
    print("sparse:", generate(model, ids, arguments.new)[0, ids.shape[1] :].tolist())

    # Training goes through the sparse attention.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"one step of training: loss {losses[0]:.4f} -> {losses[1]:.4f}")
    calls = msa_compile.explain(model).dense_calls
    print(f"calls that ran dense although the model is sparsified: {calls}")
    return 0 if losses[1] < losses[0] and calls == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
