"""How often does scoring by e4m3 choose the blocks that exact scores choose? On the reference, on a CPU.

    python -m benchmarks.fp8_scores            # half a minute

Queries and keys are bfloat16 of length 1, as an index branch makes them (times the root of the width). Three kinds:

- ``random``: normal, each on its own.
- ``drifting``: each is 0.98 times the one before and a little of its own, so neighbours are alike, keys and queries.
- ``crowded``: all keys are one vector and 0.2 of a random one, so that blocks hardly differ.

With as many candidates as places, e4m3 alone decides; `MSAConfig(index_scores="fp8")` takes twice as many. Keys of a
byte, `MSAConfig(index_cache="fp8")`, are scored by queries as they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from msa_compile.kernels import select_blocks
from msa_compile.kernels.select_blocks.e4m3 import to_e4m3

KEYS, QUERIES, GROUPS, WIDTH, BLOCK, TOPK = 32768, 256, 4, 128, 128, 16
FACTORS = (1, 1.5, 2, 3)


def _normal(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, heads, tokens, WIDTH, generator=generator)


def _drift(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    own = _normal(heads, tokens, generator)
    last, rows = own[:, :, 0], []
    for token in range(tokens):
        last = 0.98 * last + math.sqrt(1 - 0.98**2) * own[:, :, token]
        rows.append(last)
    return torch.stack(rows, 2)


def _crowd(heads: int, tokens: int, generator: torch.Generator) -> Tensor:
    return _normal(heads, 1, generator) + 0.2 * _normal(heads, tokens, generator)


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "random": (_normal, _normal),
    "drifting": (_drift, _drift),
    "crowded": (_normal, _crowd),
}


def compare(kind: str) -> Iterator[tuple[str, float, float, float]]:
    """Give what was done, shares of queries with the same set and of blocks found, and the worst loss, a row a factor.

    The loss of a query is what the scores of its blocks sum up to less than those of the exact ones, as a share of the
    difference between the best and the worst score of a block.
    """
    generator = torch.Generator().manual_seed(0)
    of_queries, of_keys = KINDS[kind]
    query, key = of_queries(GROUPS, QUERIES, generator), of_keys(1, KEYS, generator)
    query, key = (t * math.sqrt(WIDTH) / t.norm(dim=-1, keepdim=True) for t in (query, key))
    query, key = query.bfloat16(), key.bfloat16()
    # Every query sees every block: the first is at the last block's start at the earliest.
    options = {"block_size": BLOCK, "topk": TOPK, "is_causal": False}
    scores = (query.float() @ key.float().transpose(-1, -2)).unflatten(-1, (-1, BLOCK)).amax(-1)
    span = scores.amax(-1) - scores.amin(-1)
    exact = select_blocks(query, key, **options)  # type: ignore[arg-type]
    best = scores.gather(-1, exact.long()).sum(-1)
    ways = [(f"{int(factor * TOPK)} candidates", key, int(factor * TOPK)) for factor in FACTORS]
    for name, scored, candidates in (*ways, ("keys of a byte", to_e4m3(key), 0)):
        found = select_blocks(query, scored, candidates=candidates, **options)  # type: ignore[arg-type]
        is_same = (found == exact).all(-1).float().mean()
        shared = (found[..., :, None] == exact[..., None, :]).any(-1).float().mean()
        loss = (best - scores.gather(-1, found.long()).sum(-1)) / span
        yield name, float(is_same), float(shared), float(loss.max())


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_scores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fp8_scores.md"))
    options = parser.parse_args()
    rows = []
    for kind in KINDS:
        for way, same, shared, loss in compare(kind):
            rows.append(f"| {kind} | {way} | {same:.2%} | {shared:.3%} | {loss:.4f} |")
    head = TEXT.format(torch=torch.__version__, queries=QUERIES * GROUPS, blocks=KEYS // BLOCK, block=BLOCK, topk=TOPK)
    options.out.write_text(head + "\n".join(rows) + "\n")
    print(options.out.read_text())


TEXT = """# Blocks that scores of e4m3 find

Made by `python -m benchmarks.fp8_scores`, torch {torch}, on the CPU reference: {queries} queries, {topk} of {blocks}
blocks of {block} keys, bfloat16 of 128 channels. On a GPU nothing of this has run; its products of e4m3 may be summed
with fewer bits than the reference has.

*candidates*: blocks that are scored again; with {topk} e4m3 alone decides, and 32 is what `index_scores="fp8"` takes.
*keys of a byte* are those of `index_cache="fp8"`, which no exact keys stand behind.
*same set*: queries whose blocks are those of exact scores. *found*: blocks of exact scores that are chosen. *worst
loss*: of any query, what its blocks score less in sum, in parts of the span between its best and worst block.

| queries and keys | scores | same set | found | worst loss |
|---|---|---|---|---|
"""


if __name__ == "__main__":
    main()
