"""Tiny attentions as plain functions, and what the passes make of them: the material of the tests in this folder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from msa_compile.passes.canonicalize import canonicalize
from msa_compile.passes.detect_attention import Found, detect_attention
from msa_compile.runtime import mark_dynamic

# Every spelling is tried with open sizes; specialised graphs, and graphs with every number open, in the slow run.
STATIC = pytest.param("static", marks=pytest.mark.slow)
SIZES = ["dynamic", STATIC, pytest.param("all", marks=pytest.mark.slow)]

HEADS, GROUPS, HEAD_DIM, WIDTH = 4, 2, 8, 16
# Blocks enough for every key, and no dense path: the ops run, and must give what dense attention gives.
FULL = {"block_size": 4, "topk_blocks": 64, "dense_below": 0, "inner": "eager"}


@dataclass
class Captured:
    """One graph: as Dynamo gave it, and its canonical form."""

    dynamo: GraphModule
    canonical: GraphModule

    @property
    def graph(self) -> Graph:
        return self.canonical.graph

    def nodes(self, *ops: Any) -> list[Node]:
        return [n for n in self.graph.nodes if n.target in ops or getattr(n.target, "overloadpacket", None) in ops]

    def found(self) -> list[Found]:
        return detect_attention(self.graph)


def capture(function: Callable[..., Any], *args: Any, sizes: str = "dynamic", run: bool = True) -> Captured:
    """The only graph of `function(*args)`; `sizes` is "static", "dynamic" (batch and length), or "all" (floats too).

    With `run` the canonical graph computes the result, which has to be that of the function.
    """
    seen: list[Captured] = []

    def record(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        seen.append(Captured(gm, canonicalize(gm)))
        return seen[-1].canonical if run else gm

    if sizes == "dynamic":
        mark_dynamic(args)
    dynamic = {"static": False, "dynamic": None, "all": True}[sizes]
    expected = function(*_copies(args))
    got = torch.compile(function, backend=record, dynamic=dynamic)(*_copies(args))
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert len(seen) == 1, f"{len(seen)} graphs"
    return seen[0]


def _copies(args: Any) -> list[Any]:
    """Copies of the tensors, for functions that write into them; marks of dynamic sizes are kept."""
    copies = []
    for arg in args:
        copy = arg
        if isinstance(arg, Tensor) and not arg.requires_grad:
            copy = arg.clone()
            copy.__dict__.update(arg.__dict__)
        copies.append(copy)
    return copies


def only(found: list[Found]) -> Found:
    assert len(found) == 1, f"{len(found)} attentions: {[(f.form, f.reason, f.detail) for f in found]}"
    return found[0]


def weights(heads: int = HEADS, groups: int = GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    """Projections of queries, keys and values."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count * HEAD_DIM, WIDTH, generator=generator) / 4 for count in (heads, groups, groups))


def tokens(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(batch * 1000 + length))


def project(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, Hq, T, D]`, keys and values `[B, Hkv, T, D]`."""
    batch, length, _ = x.shape
    return tuple(F.linear(x, w).view(batch, length, -1, HEAD_DIM).transpose(1, 2) for w in (wq, wk, wv))


def repeat_kv(x: Tensor, times: int = HEADS // GROUPS) -> Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)


def sparse(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` with its attention made sparse under a budget that covers every key."""
    return torch.compile(function, backend="msa", options={**FULL, **options})
