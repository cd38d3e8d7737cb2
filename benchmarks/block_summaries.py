"""Would a summary of each block of keys let decode with `"keys"` skip most of the key cache? Measured, and not kept.

    python -m benchmarks.block_summaries            # trains the demo's small model for a minute first

`"keys"` scores a block by its best token, so a decode step reads every key. A summary is a few vectors a block:

- ``mean``: one vector, the score of the mean key.
- ``centre and radius``: one vector and a number, ``q . c + |q| r``: never below the best score in the block.
- ``min and max``: two vectors, the sum over dimensions of the larger product: never below it either.

Two uses. *Instead* of the keys: which of the blocks that the best token chooses are found, and how much of the softmax
mass that they hold. *Before* the keys: a bound is exact if every block that could still be among the best is scored by
its keys; what counts is the share of blocks that survive.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from examples.byte_model import build_model, load_corpus, train
from msa_compile.kernels.break_even import cpu_name

CONTEXT, BLOCK, BUDGETS, QUERIES = 2048, 32, (4, 8, 16), 256


def mean_score(query: Tensor, blocks: Tensor) -> Tensor:
    """``[Q, N]`` for queries ``[Q, D]`` and blocks of keys ``[N, S, D]``."""
    return query @ blocks.mean(1).T


def radius_bound(query: Tensor, blocks: Tensor) -> Tensor:
    """``[Q, N]``, at least the best score of each block."""
    centre = (blocks.amin(1) + blocks.amax(1)) / 2
    radius = (blocks - centre[:, None]).norm(dim=-1).amax(-1)
    return query @ centre.T + query.norm(dim=-1, keepdim=True) * radius


def box_bound(query: Tensor, blocks: Tensor) -> Tensor:
    """``[Q, N]``, at least the best score of each block."""
    low, high = blocks.amin(1), blocks.amax(1)
    return query.clamp(min=0) @ high.T + query.clamp(max=0) @ low.T


SUMMARIES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "mean": (mean_score, False),
    "centre and radius": (radius_bound, True),
    "min and max": (box_bound, True),
}


def survivors(bound: Tensor, exact: Tensor, topk: int) -> float:
    """Share of blocks to score by their keys, best bound first, until no bound can beat the ``topk`` best."""
    order = bound.argsort(-1, descending=True)
    seen = exact.gather(-1, order)
    needed = []
    for scores, bounds in zip(seen, bound.gather(-1, order), strict=True):
        count = topk
        while count < len(scores) and bounds[count] > scores[:count].topk(topk).values[-1]:
            count += 1
        needed.append(count / len(scores))
    return sum(needed) / len(needed)


def judge(query: Tensor, keys: Tensor, topk: int) -> Iterator[tuple[float, float, float]]:
    """The three numbers of each summary, for the queries of a group ``[G, Q, D]`` that all see the keys ``[T, D]``."""
    blocks = keys.unflatten(0, (-1, BLOCK))
    middle = query.mean(0)
    exact = torch.einsum("qd,nsd->qns", middle, blocks).amax(-1)
    chosen = exact.topk(topk, dim=-1).indices
    mass = (query @ keys.T * keys.shape[-1] ** -0.5).softmax(-1).mean(0).unflatten(-1, (-1, BLOCK)).sum(-1)
    of_keys = mass.gather(-1, chosen).sum(-1)
    for summarize, is_bound in SUMMARIES.values():
        score = summarize(middle, blocks)
        instead = score.topk(topk, dim=-1).indices
        found = (instead[:, :, None] == chosen[:, None]).any(-1).float().mean()
        held = (mass.gather(-1, instead).sum(-1) / of_keys).mean()
        yield float(found), float(held), survivors(score, exact, topk) if is_bound else math.nan


def trained(seconds: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries ``[G, Q, D]`` and keys ``[T, D]`` of each layer and group of the demo's model, on held-out text."""
    torch.manual_seed(0)
    corpus = load_corpus()
    model = build_model(layers=3, hidden=128, context=CONTEXT)
    train(model, corpus.train, context=CONTEXT, seconds=seconds, steps=None, seed=0)
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(module: object, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> object:
        seen.append((query, key))
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    from transformers import AttentionInterface

    AttentionInterface.register("recorded", attend)
    model.set_attn_implementation("recorded")
    with torch.no_grad():
        model(corpus.held_out[None, :CONTEXT])
    for query, key in seen:
        for group, keys in enumerate(key[0]):
            heads = query.shape[1] // key.shape[1]
            yield query[0, group * heads : (group + 1) * heads, -QUERIES:], keys[: CONTEXT - QUERIES]


def random_tensors() -> Iterator[tuple[Tensor, Tensor]]:
    """The same shapes, normal random."""
    torch.manual_seed(0)
    yield torch.randn(4, QUERIES, 16), torch.randn(CONTEXT - QUERIES, 16)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block_summaries")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time (default 60)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/block_summaries.md"))
    options = parser.parse_args()
    rows = []
    for name, sample in (("trained", list(trained(options.seconds))), ("random", list(random_tensors()))):
        for topk in BUDGETS:
            by_group = torch.tensor([list(judge(query, keys, topk)) for query, keys in sample])
            for summary, numbers in zip(SUMMARIES, by_group.mean(0), strict=True):
                found, held, left = numbers.tolist()
                last = "-" if math.isnan(left) else f"{left:.0%}"
                rows.append(f"| {name} | {topk} | {summary} | {found:.0%} | {held:.1%} | {last} |")
    text = TEXT.format(cpu=cpu_name(), torch=torch.__version__, blocks=(CONTEXT - QUERIES) // BLOCK, block=BLOCK)
    options.out.write_text(text + "\n".join(rows) + "\n")
    print(options.out.read_text())


TEXT = """# Summaries of key blocks, for decode with `"keys"`

Made by `python -m benchmarks.block_summaries`; {cpu}, torch {torch}. {blocks} blocks of {block} keys; the demo's byte
model (its last 256 queries, all layers and groups), and normal random tensors.

Not kept: bounds rule out next to no block, so an exact choice would still read the keys; and what summaries choose by
themselves differs from what the best token chooses, which is what `"keys"` means. The mean of a block holds as much
softmax mass on this small model: a question for the indexer's quality, not for its speed.

*found*: blocks of the best token's choice that the summary chooses too. *mass held*: softmax mass of what the summary
chooses, as a share of that of the best token's choice. *to score*: blocks whose keys must be read, best bound first,
until no other can be among the chosen ones.

| tensors | chosen | summary | found | mass held | to score |
|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    main()
