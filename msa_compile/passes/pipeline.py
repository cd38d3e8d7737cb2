"""The order of the passes: canonicalize, detect, plan, rewrite, clean up, verify."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch.export import ExportedProgram
from torch.fx import GraphModule

from msa_compile._compat import HigherOrderOperator
from msa_compile.config import MSAConfig
from msa_compile.index_keys import IndexBinding
from msa_compile.passes.canonicalize import TRANSPARENT_BODIES, canonicalize
from msa_compile.passes.canonicalize_exported import canonicalize_exported
from msa_compile.passes.detect_attention import detect_attention
from msa_compile.passes.eliminate_dead_code import eliminate_dead_code
from msa_compile.passes.plan_index import markers_of, plan_indexers
from msa_compile.passes.plan_sites import plan_sites
from msa_compile.passes.return_losses import return_losses
from msa_compile.passes.rewrite_attention import rewrite_attention
from msa_compile.passes.verify_graph import verify_graph
from msa_compile.records import GraphRecord, Reason, Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassResult:
    """A rewritten graph and what was done to it.

    Attributes:
        module: The graph.
        record: What was found and done.
        bindings: Index keys that it takes in behind its inputs and hands out behind its outputs.
        losses: Sites whose index losses it hands out behind those.
    """

    module: GraphModule
    record: GraphRecord
    bindings: tuple[IndexBinding, ...] = ()
    losses: tuple[str, ...] = ()


def run_passes(
    captured: GraphModule | ExportedProgram,
    config: MSAConfig,
    windows: dict[str, int],
    *,
    after: str = "",
    rewrite: bool = True,
    owner: int = 0,
    learns: bool = False,
    has_losses: bool = False,
) -> PassResult:
    """Canonicalize a captured graph, find its attention, and make it sparse.

    Args:
        captured: A graph from Dynamo, or an exported program; not changed.
        config: What the user asks for.
        windows: Sliding windows known of sites, shared between the graphs of one model.
        after: The graph break that this graph comes after, ``GraphRecord.graph_break`` of the one before.
        rewrite: Whether to rewrite, or only to report; then nothing is measured either.
        owner: Number of the compiled model, under which calls that turn out dense at run time are counted.
        learns: Whether gradients may reach the weights of index branches.
        has_losses: Whether the graph returns the losses of index branches.

    Raises:
        CaptureError: If the graph cannot be brought into the canonical form.
        GraphError: If the result breaks an invariant; a bug of this package.
    """
    started = time.perf_counter()
    if isinstance(captured, ExportedProgram):
        gm, canonical = captured.graph_module, canonicalize_exported(captured)
    else:
        gm, canonical = captured, canonicalize(captured)
    traced = time.perf_counter()
    sites: list[Site] = []
    bindings: list[IndexBinding] = []
    for body in _bodies(canonical):
        number, options = owner if rewrite else None, {"learns": learns, "has_losses": has_losses}
        found, bound = _run_on_body(body, config, windows, number, is_body=body is not canonical, **options)
        sites += found
        bindings += bound
    losses = return_losses(canonical)
    verify_graph(canonical, gm, bindings, losses)
    broken = _break_of(gm)
    record = GraphRecord(
        sites=tuple(_with_breaks(_numbered(sites), after, broken)),
        nodes=len(canonical.graph.nodes),
        retrace_seconds=traced - started,
        passes_seconds=time.perf_counter() - traced,
        graph_break=broken,
    )
    log.info(
        "graph of %d nodes: %d sparse, %d dense sites (re-trace %.2f s, passes %.2f s)",
        record.nodes,
        sum(site.decision == "sparse" for site in sites),
        sum(site.decision == "dense" for site in sites),
        record.retrace_seconds,
        record.passes_seconds,
    )
    return PassResult(canonical, record, tuple(bindings), losses)


def _run_on_body(
    body: GraphModule,
    config: MSAConfig,
    windows: dict[str, int],
    owner: int | None,
    *,
    is_body: bool,
    learns: bool,
    has_losses: bool,
) -> tuple[list[Site], list[IndexBinding]]:
    plans = plan_sites(detect_attention(body.graph), config, windows, measure=owner is not None)
    indexed = plan_indexers(body.graph, plans, config, is_body=is_body, needs_weights=owner is not None)
    bindings: list[IndexBinding] = []
    for found, site, index in indexed:
        if owner is not None and site.decision == "sparse":
            assert found.proved is not None, "a sparse site is proved"
            assert site.dense_below is not None, "a sparse site has its dense threshold"
            own, threshold = config.for_site(site.name), site.dense_below.keys
            gradients = {"learns": learns, "has_loss": has_losses}
            bound = rewrite_attention(body.graph, found.proved, site.name, own, threshold, owner, index, **gradients)
            bindings += [] if bound is None else [bound]
    sites = [site for _, site, _ in indexed]
    _erase_markers(body, {site.name.split(":")[0] for site in sites})
    eliminate_dead_code(body.graph)
    body.graph.lint()
    body.recompile()
    return sites, bindings


def _bodies(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and every transparent body inside it (activation checkpointing), outermost first."""
    found = [gm]
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and node.target in TRANSPARENT_BODIES:
            for source in node.all_input_nodes:
                body = getattr(gm, str(source.target), None) if source.op == "get_attr" else None
                if isinstance(body, GraphModule) and body not in found:
                    found += _bodies(body)
    return found


def _numbered(sites: list[Site]) -> list[Site]:
    """Names made unique over all bodies of a graph: one module may own a site in several."""
    seen: dict[str, int] = {}
    unique = []
    for site in sites:
        base = site.name.split(":")[0]
        count = seen.get(base, 0)
        seen[base] = count + 1
        unique.append(replace(site, name=base if count == 0 else f"{base}:{count}"))
    return unique


def _break_of(gm: GraphModule) -> str:
    """Dynamo's reason for ending this graph early, and the line of the model where it did; ``""`` if it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    said = reason.reason.strip().splitlines()[0]
    if not reason.user_stack:
        return said
    frame = reason.user_stack[-1]
    return f"{said} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"


def _with_breaks(sites: list[Site], *breaks: str) -> list[Site]:
    """Sites that a graph break cut, with what Dynamo says of the breaks around their graph."""
    said = "; ".join(dict.fromkeys(entry for entry in breaks if entry))
    return [
        replace(site, detail=f"{site.detail}; Dynamo broke the graph: {said}")
        if said and site.reason is Reason.NOT_CAPTURED
        else site
        for site in sites
    ]


def _erase_markers(body: GraphModule, owners: Collection[str]) -> None:
    """Erase the marker of each module whose attention is in this body and so is accounted for.

    A marker whose module has no site here stays: the site was cut by a graph break, and the marker will say so when it
    runs.
    """
    for node in markers_of(body.graph):
        if node.args[1] in owners:
            body.graph.erase_node(node)
