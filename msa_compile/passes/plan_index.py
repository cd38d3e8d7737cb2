"""Plan the index branch of a site: the hidden state it reads, the RoPE it applies, and the cache its keys join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

import msa_compile.markers  # noqa: F401  (registers the marker)
from msa_compile.config import MSAConfig
from msa_compile.passes.check_projections import hidden_states
from msa_compile.passes.detect_attention import Found, Proved
from msa_compile.passes.graph_facts import GraphFacts, tensor_value
from msa_compile.passes.lift_rope import LiftedRope, lift_rope
from msa_compile.passes.placed import IndexRefused
from msa_compile.passes.replay import expression
from msa_compile.passes.trace_key_cache import KeyCache, trace_key_cache
from msa_compile.records import Site

_MARKER = torch.ops.msa.site.default


@dataclass(frozen=True)
class IndexPlan:
    """Everything about an index branch that its insertion needs, proved.

    Attributes:
        hidden: The hidden state that feeds queries and keys, ``[B, T, C]``.
        rope: The layer's own.
        cache: Where the keys come from, and index keys with them.
        weights: Weights of the branch in the graph, as ``IndexBranch.weights`` lists them; none in a graph that is
            only examined.
    """

    hidden: Node
    rope: LiftedRope
    cache: KeyCache
    weights: tuple[Node, ...] = ()

    @property
    def hidden_size(self) -> int:
        """``C``."""
        return int(self.hidden.meta["val"].shape[-1])


def plan_indexers(
    graph: Graph, plans: Sequence[tuple[Found, Site]], config: MSAConfig, *, is_body: bool, needs_weights: bool
) -> list[tuple[Found, Site, IndexPlan | None]]:
    """The decisions on sites, with the indexer of each that is sparse.

    Args:
        graph: The canonical graph; not changed.
        plans: The attention in it, and what was decided.
        config: What the user asks for.
        is_body: Whether the graph is the body of another.
        needs_weights: Whether the graph is to be rewritten; one that is only examined may have no weights yet.
    """
    weights = {str(node.args[1]): node.args[2] for node in markers_of(graph) if len(node.args) > 2 and node.args[2]}
    names = [site.name for _, site in plans]
    decided: list[tuple[Found, Site, IndexPlan | None]] = []
    for found, site in plans:
        given = weights.get(site.name, ())
        assert isinstance(given, (list, tuple)), "the weights of a marker are a list"
        if site.indexer != "keys" or not (given or config.indexer == "learned"):
            decided.append((found, site, None))
            continue
        try:
            if ":" in site.name or f"{site.name}:1" in names:
                raise IndexRefused("its module has several attentions")
            assert found.proved is not None, "a sparse site is proved"
            plan = plan_index(graph, found.proved, given, is_body=is_body)  # type: ignore[arg-type]
            if needs_weights and not given:
                raise IndexRefused("this graph has no index branch for it")
            decided.append((found, replace(site, indexer="learned", hidden_size=plan.hidden_size), plan))
        except IndexRefused as refusal:
            detail = f"{site.detail}; scored with keys: {refusal}" if site.detail else f"scored with keys: {refusal}"
            decided.append((found, replace(site, detail=detail), None))
    return decided


def markers_of(graph: Graph) -> list[Node]:
    """The markers in a graph; see ``msa::site``."""
    return [node for node in graph.nodes if node.target is _MARKER]


def plan_index(graph: Graph, proved: Proved, weights: Sequence[Node], *, is_body: bool) -> IndexPlan:
    """The index branch of one proved attention.

    Args:
        graph: The canonical graph; not changed.
        proved: What detection proved.
        weights: See ``IndexPlan.weights``.
        is_body: Whether the graph is the body of another.

    Raises:
        IndexRefused: Something about it is not proved; the site is scored with ``"keys"``.
    """
    if any(node.op != "placeholder" for node in weights):
        raise IndexRefused("the weights of the index branch are computed in the graph")
    facts = GraphFacts(graph)
    output = proved.attention.output
    states = hidden_states(facts, proved.attention.query, output) | hidden_states(facts, proved.key.node, output)
    if len(states) != 1:
        raise IndexRefused(f"{len(states)} hidden states feed queries and keys")
    cache = trace_key_cache(facts, proved.key, output, is_body=is_body)
    hidden = states.pop()
    value, fresh = tensor_value(hidden), cache.fresh.node.meta["val"]
    tokens = [fresh.shape[cache.fresh.axes.index(axis)] for axis in "BT"]
    if (
        value is None
        or value.dim() != 3
        or not value.is_floating_point()
        or not isinstance(value.shape[-1], int)
        or [expression(size) for size in value.shape[:2]] != [expression(size) for size in tokens]
        or type(value) is not type(fresh)
    ):
        raise IndexRefused(f"the hidden state {hidden} is not [B, T, C]")
    if value.device != fresh.device or not fresh.is_floating_point():
        raise IndexRefused("the hidden state and the keys are on different devices")
    return IndexPlan(hidden, lift_rope(facts, cache.fresh), cache, tuple(weights))
