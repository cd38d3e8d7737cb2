"""RoPE is lifted whatever its spelling, and nothing else is taken for it."""

import pytest
import torch
from passes.tiny_attention import GROUPS, HEAD_DIM, capture, only, project, tokens, weights
from torch import Tensor, nn
from torch.nn import functional as F

from msa_compile.passes.check_projections import projected
from msa_compile.passes.graph_facts import GraphFacts
from msa_compile.passes.lift_rope import LiftedRope
from msa_compile.passes.placed import IndexRefused
from msa_compile.passes.plan_index import IndexPlan, plan_index
from msa_compile.passes.replay import replay

LENGTH = 13


def angles(length: int, width: int) -> Tensor:
    return torch.outer(torch.arange(length).float(), 10.0 ** -torch.arange(width // 2).float())


def half_split(x: Tensor) -> Tensor:
    turns = torch.cat([angles(x.shape[2], HEAD_DIM)] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * turns.cos() + torch.cat([-second, first], -1) * turns.sin()


def interleaved(x: Tensor) -> Tensor:
    turns = angles(x.shape[2], HEAD_DIM)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * turns.cos() - odd * turns.sin(), even * turns.sin() + odd * turns.cos()], -1).flatten(-2)


def as_complex(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(x.shape[2], HEAD_DIM // 2), angles(x.shape[2], HEAD_DIM))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def partial(x: Tensor) -> Tensor:
    turns = angles(x.shape[2], 4)
    even, odd, rest = x[..., :2], x[..., 2:4], x[..., 4:]
    return torch.cat([even * turns.cos() - odd * turns.sin(), even * turns.sin() + odd * turns.cos(), rest], -1)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def plan(change) -> tuple[IndexPlan, GraphFacts]:
    """The plan for an attention whose keys and queries go through `change`."""

    def attend(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        q, k, v = project(x, wq, wk, wv)
        return F.scaled_dot_product_attention(q, change(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1),
                                              is_causal=True)  # fmt: skip

    captured = capture(attend, tokens(length=LENGTH), *weights(), sizes="static")
    proved = only(captured.found()).proved
    assert proved is not None
    return plan_index(captured.graph, proved, (), is_body=False), GraphFacts(captured.graph)


def run(rope: LiftedRope, facts: GraphFacts, heads: Tensor) -> Tensor:
    """The lifted calls on `[B, Hkv, T, D]`, with the graph's own cosines and sines."""
    sides = {node for call in rope.inner for node in call.all_input_nodes} - set(rope.inner) - {rope.source.node}
    sizes = {}
    for dim, axis in enumerate(rope.source.axes):
        size = rope.source.node.meta["val"].shape[dim]
        if isinstance(size, torch.SymInt):
            sizes[size.node.expr] = heads.shape["BHTD".index(axis)]
    inner = set(rope.inner).union(*(part for side in sides for part in facts.makers(side, side)))
    given = {rope.source.node: heads.permute(rope.source.permutation_of("BHTD"))}
    out = replay(facts, inner, given, sizes, rope.result.node)
    return out.permute([rope.result.axes.index(axis) for axis in "BHTD"])


@pytest.mark.parametrize("rope", [half_split, interleaved, as_complex, partial])
def test_each_spelling_is_lifted_and_turns_other_heads(rope):
    found, facts = plan(rope)
    heads = torch.randn(3, GROUPS, LENGTH, HEAD_DIM)
    torch.testing.assert_close(run(found.rope, facts, heads), rope(heads))
    assert found.hidden.op == "placeholder"


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(HEAD_DIM))

    def forward(self, k: Tensor) -> Tensor:
        return half_split(rms(k) * (1 + self.gain))


@torch.no_grad()
def test_a_norm_before_rope_is_not_lifted():
    found, facts = plan(Normed())
    heads = torch.randn(3, GROUPS, LENGTH, HEAD_DIM)
    torch.testing.assert_close(run(found.rope, facts, heads), half_split(heads))


@pytest.mark.parametrize("change", [lambda k: k, rms], ids=["nothing", "a norm"])
def test_keys_without_positions_have_no_rope(change):
    found, _ = plan(change)
    assert found.rope.inner == ()


def turned_by_head(k: Tensor) -> Tensor:
    return half_split(k) * torch.arange(1, 1 + GROUPS)[:, None, None]


def pulled_from_the_token_before(k: Tensor) -> Tensor:
    return half_split(k) + F.pad(k, (0, 0, 1, 0))[:, :, :-1]


def shifted(k: Tensor) -> Tensor:
    return half_split(k) + angles(k.shape[2], 2 * HEAD_DIM)


def normed(k: Tensor) -> Tensor:
    return rms(half_split(k).exp())


def mixed(k: Tensor) -> Tensor:
    return half_split(k) + half_split(k.flip(1))


@pytest.mark.parametrize("change", [turned_by_head, pulled_from_the_token_before, shifted, normed, mixed])
def test_what_is_no_rotary_embedding_is_refused(change):
    with pytest.raises(IndexRefused, match="rotary embedding"):
        plan(change)


def test_only_a_projection_counts_as_one():
    found, _ = plan(half_split)
    assert projected(found.hidden) is None
    assert found.hidden_size == 16
