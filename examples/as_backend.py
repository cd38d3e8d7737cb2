"""Two more ways in: a `torch.compile` backend, and a function for code of your own: `python -m examples.as_backend`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msa_compile

WIDTH, HEADS, GROUPS = 64, 4, 2


class Attention(nn.Module):
    """Causal grouped-query attention; `sparse` says which function computes it."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * WIDTH * GROUPS // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C]
        heads = self.qkv(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)  # [B, Hq + 2 Hkv, T, D]
        q, k, v = heads.split((HEADS, GROUPS, GROUPS), dim=1)
        if self.sparse:  # the edited line
            y = msa_compile.attention(q, k, v, is_causal=True, block_size=16, topk_blocks=4)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.as_backend", description=__doc__)
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    inner = parser.parse_args(argv).inner
    torch.manual_seed(0)
    plain, edited = Attention(sparse=False), Attention(sparse=True)
    edited.load_state_dict(plain.state_dict())
    x = torch.randn(2, 200, WIDTH)

    options = {"block_size": 16, "topk_blocks": 4, "dense_below": 0, "inner": inner}
    compiled = torch.compile(plain, backend="msa", options=options)
    with torch.no_grad():
        dense, through_backend, by_hand = plain(x), compiled(x), edited(x)
    apart = (through_backend - by_hand).abs().max().item()
    print(f"backend against msa_compile.attention: {apart:.1e} apart at most")
    changed = (through_backend - dense).abs().amax((0, 2))  # [T]
    first = int((changed > 1e-4).nonzero()[0])
    print(f"4 blocks of 16 keys hold the first 64 tokens; the first query that differs from dense is number {first}")
    return 0 if apart < 1e-4 and first >= 64 else 1


if __name__ == "__main__":
    raise SystemExit(main())
