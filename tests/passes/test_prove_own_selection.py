"""A model's own block selection is recognised by what it computes; whatever chooses otherwise stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_attention import GROUPS, HEAD_DIM, WIDTH, capture, only, project, repeat_kv, sparse, tokens, weights
from torch import Tensor
from torch.nn import functional as F

from msa_compile.config import MSAConfig
from msa_compile.passes.pipeline import run_passes
from msa_compile.records import Reason
from msa_compile.runtime import mark_dynamic

BLOCK, TOPK = 4, 3
LOWEST = torch.finfo(torch.float32).min
LENGTHS = (40, 13, 37, 5, 12)


def same(given: Any) -> Any:
    return given


@dataclass(frozen=True)
class Rule:
    """How a model chooses blocks; each part may be changed."""

    scores: Callable[[Tensor], Tensor] = same
    places: Callable[[Tensor], Tensor] = same
    pool: Callable[[Tensor], Tensor] = lambda blocks: blocks.amax(-1)
    best: Callable[[Tensor], Tensor] = same
    local: int = 1
    budget: Callable[[int], int] = lambda blocks: min(TOPK, blocks)
    keep: Callable[[Tensor], Tensor] = same
    hides_by: float | None = LOWEST
    precision: torch.dtype = torch.float32


def attend(rule: Rule) -> Callable[[Tensor], Tensor]:
    """Attention that chooses blocks of keys, as MiniMax-M3 in transformers writes it."""
    generator = torch.Generator().manual_seed(2)
    index_query, index_key = (torch.randn(n * HEAD_DIM, WIDTH, generator=generator) for n in (GROUPS, 1))

    def function(x: Tensor) -> Tensor:
        query, key, value = project(x, *weights())
        chooser, chosen_by, _ = project(x, index_query, index_key, index_key)
        batch, length, _ = x.shape
        blocks = -(-length // BLOCK)
        places = rule.places(torch.arange(length))
        scores = chooser.to(rule.precision) @ chosen_by.to(rule.precision).transpose(-1, -2)
        future = torch.arange(length) > places[:, None]
        scores = rule.scores(scores).masked_fill(future, -torch.inf)
        scores = F.pad(scores, (0, blocks * BLOCK - length), value=-torch.inf)
        best = rule.best(rule.pool(scores.view(batch, GROUPS, length, blocks, BLOCK)))
        if rule.local:
            local = (places // BLOCK)[:, None] - torch.arange(rule.local)
            best.scatter_(-1, local.clamp(min=0).expand(batch, GROUPS, -1, -1), torch.inf)
        top = best.topk(rule.budget(blocks), dim=-1)
        ids = top.indices.masked_fill(top.values == -torch.inf, blocks)
        chosen = torch.zeros(batch, GROUPS, length, blocks + 1, dtype=torch.bool).scatter(-1, ids, True)
        keep = rule.keep(chosen[..., :blocks].repeat_interleave(BLOCK, dim=-1)[..., :length])
        later = torch.arange(length) > torch.arange(length)[:, None]
        mask = keep.repeat_interleave(query.shape[1] // GROUPS, dim=1) & ~later
        if rule.hides_by is not None:
            mask = torch.zeros(mask.shape).masked_fill(~mask, rule.hides_by)
        return F.scaled_dot_product_attention(query, repeat_kv(key), repeat_kv(value), attn_mask=mask)

    return function


QUICK = {
    *("as it is", "two local blocks", "places of its own"),
    *("no local block", "another scale", "scores cut off", "the first block forced", "a budget that grows"),
}
SAME = {
    "as it is": Rule(),
    "hidden by minus infinity": Rule(hides_by=-torch.inf),
    "hidden by a bool": Rule(hides_by=None),
    "two local blocks": Rule(local=2),
    "scores in float64": Rule(precision=torch.float64),
    "places of its own": Rule(places=lambda places: (places - 1).clamp(min=0)),
}
OTHER = {
    "mean pooling": Rule(pool=lambda blocks: blocks.clamp(min=-9).mean(-1)),
    "largest magnitude": Rule(scores=torch.abs),
    "no local block": Rule(local=0),
    "another scale": Rule(scores=lambda scores: scores * 0.3),
    "scores cut off": Rule(scores=lambda scores: scores.clamp(max=50.0)),
    "scores from zero": Rule(scores=lambda scores: scores.clamp(min=0.0)),
    "far scores dropped": Rule(scores=lambda scores: scores.masked_fill(scores < -200.0, -torch.inf)),
    "tiny scores equal": Rule(scores=lambda scores: scores.masked_fill((scores > 0) & (scores < 1e-3), 0.0)),
    "scores in half precision": Rule(precision=torch.bfloat16),
    "the worst blocks": Rule(scores=torch.neg),
    "the first block forced": Rule(best=lambda best: best.masked_fill(torch.arange(best.shape[-1]) == 0, torch.inf)),
    "a budget that grows": Rule(budget=lambda blocks: -(-blocks // 2)),
    "changes far away": Rule(scores=lambda s: s.masked_fill(torch.arange(s.shape[-1]) > 5000, -torch.inf)),
    "neighbours too": Rule(keep=lambda keep: keep | keep.roll(BLOCK, dims=-1)),
    "the first key always": Rule(keep=lambda keep: keep | (torch.arange(keep.shape[-1]) == 0)),
    "hidden by little": Rule(hides_by=-1e4),
}


def names_of(rules: dict[str, Rule]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in rules]


@pytest.mark.parametrize("name", names_of(SAME))
def test_the_rule_of_msa_runs_on_the_ops_and_gives_the_same(name, sparse_calls):
    function = attend(SAME[name])
    captured = capture(function, tokens(2, 37))
    found = only(captured.found())
    selection = found.proved.selection
    assert (selection.block_size, selection.topk, selection.local_blocks) == (BLOCK, TOPK, SAME[name].local)
    assert (selection.positions is None) == (name != "places of its own"), "queries stand at the last keys"
    rewritten = run_passes(captured.dynamo, MSAConfig(), {}).module.graph
    assert not [node for node in rewritten.nodes if node.target is torch.ops.aten.topk.default], "its own is gone"
    fast = sparse(function)
    for length in LENGTHS:
        x = tokens(2, length)
        mark_dynamic((x,))
        torch.testing.assert_close(fast(x), function(x), atol=1e-5, rtol=1e-4)
    assert sparse_calls


@pytest.mark.slow
def test_gradients_are_those_of_the_model(sparse_calls):
    function = attend(Rule())
    fast = sparse(function, inner="aot_eager")
    found, expected = [], []
    for gradients, run in ((found, fast), (expected, function)):
        x = tokens(2, 37).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert sparse_calls
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", names_of(OTHER))
def test_another_rule_is_refused_and_the_graph_is_as_it_was(name):
    # `capture` runs the graph after detection, and compares.
    found = only(capture(attend(OTHER[name]), tokens(2, 37)).found())
    assert found.proved is None
    assert found.reason is Reason.DATA_DEPENDENT_MASK
    assert found.detail
