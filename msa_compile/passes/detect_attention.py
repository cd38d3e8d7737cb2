"""Find every attention of a graph and prove what it is, or say why not. Reads only."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from msa_compile.passes.attention import Attention, Heads, MaskProof, MaskTerm, OutputLayout, Refused
from msa_compile.passes.check_projections import check_projections
from msa_compile.passes.find_own_selection import find_own_selection
from msa_compile.passes.graph_facts import GraphFacts
from msa_compile.passes.keep_subclasses import is_kept_attention
from msa_compile.passes.match_flex_attention import is_flex_attention, match_flex_attention
from msa_compile.passes.match_sdpa import is_sdpa, match_sdpa
from msa_compile.passes.match_softmax_chain import is_softmax, match_softmax_chain
from msa_compile.passes.prove_heads import prove_heads
from msa_compile.passes.prove_mask import prove_mask
from msa_compile.passes.prove_own_selection import SelectionProof, SelectionProver
from msa_compile.passes.prove_products import prove_products
from msa_compile.records import Reason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proved:
    """Everything about one attention that the rewrite needs, proved.

    Attributes:
        attention: The attention; without the mask of its own block selection, where it has one.
        query, key, value: Its operands, keys and values un-repeated.
        output: The layout of its result.
        mask: What hides scores.
        selection: The block selection that the model has of its own.
    """

    attention: Attention
    query: Heads
    key: Heads
    value: Heads
    output: OutputLayout
    mask: MaskProof
    selection: SelectionProof | None = None


@dataclass(frozen=True)
class Found:
    """One attention of a graph: proved, or refused with a reason.

    Attributes:
        anchor: The node it was found at.
        name: Module path of its owner.
        source: ``file:line``.
        form: Spelling, for the report.
        query_heads, key_value_heads, head_dim: 0 where not known.
        proved: The proof, or ``None``.
        reason, detail: Why not, when ``proved`` is ``None``.
    """

    anchor: Node
    name: str
    source: str
    form: str
    query_heads: int
    key_value_heads: int
    head_dim: int
    proved: Proved | None
    reason: Reason | None
    detail: str


def detect_attention(graph: Graph) -> list[Found]:
    """Every attention of ``graph``, in order; a second one of the same module is named ``"path:1"``."""
    facts = GraphFacts(graph)
    prover = SelectionProver(facts)
    found: list[Found] = []
    seen: dict[str, int] = {}
    for node in graph.nodes:
        entry = _detect(facts, prover, node, seen)
        if entry is not None:
            found.append(entry)
            log.debug("%s at %s: %s", entry.form, entry.name, entry.reason or entry.proved)
    return found


def _detect(facts: GraphFacts, prover: SelectionProver, node: Node, seen: dict[str, int]) -> Found | None:
    attention: Attention | None = None
    form = "sdpa" if is_sdpa(node) else "flex" if is_flex_attention(node) else "eager"
    heads = (0, 0, 0)
    proved: Proved | None = None
    try:
        if is_kept_attention(node):
            raise Refused(Reason.TENSOR_SUBCLASS, f"{node} runs on {type(node.meta['val']).__name__}")
        if is_sdpa(node):
            attention = match_sdpa(node)
        elif is_flex_attention(node):
            attention = match_flex_attention(facts, node)
        elif is_softmax(node):
            attention = match_softmax_chain(facts, node)
        if attention is None:
            return None
        query, key, value, output = _operands(facts, attention)
        heads = (query.count, key.count, query.dim)
        form = f"{attention.form}/{key.spelling}"
        check_projections(facts, attention, key.node)
        _check_dims(query, key, value)
        own = find_own_selection(facts, attention, key.count)
        selection = None if own is None else prover.prove(attention, own)
        if own is not None:
            attention = replace(attention, mask=(MaskTerm(own.seen, "visible"),))
        mask = prove_mask(facts, attention, query, key)
        proved = Proved(attention, query, key, value, output, mask, selection)
    except Refused as refusal:
        return _found(node, seen, form, heads, None, refusal.reason, refusal.detail)
    return _found(node, seen, form, heads, proved, None, proved.mask.detail)


def _operands(facts: GraphFacts, attention: Attention) -> tuple[Heads, Heads, Heads, OutputLayout]:
    """Queries, un-repeated keys and values, and the layout of the result, each proved."""
    if attention.form == "products":
        return prove_products(facts, attention)
    query = Heads(attention.query, (0, 1, 2, 3), int(attention.query.meta["val"].shape[1]))
    key = prove_heads(facts, attention, attention.key, transposed=attention.key_transposed)
    return query, key, prove_heads(facts, attention, attention.value), OutputLayout()


def _check_dims(query: Heads, key: Heads, value: Heads) -> None:
    if value.count != key.count:
        raise Refused(Reason.HEAD_LAYOUT, f"{key.count} key heads against {value.count} value heads")
    if not query.dim == key.dim == value.dim:
        raise Refused(Reason.HEAD_DIM, f"query {query.dim}, key {key.dim}, value {value.dim}")


def _found(
    node: Node,
    seen: dict[str, int],
    form: str,
    heads: tuple[int, int, int],
    proved: Proved | None,
    reason: Reason | None,
    detail: str,
) -> Found:
    path = owner_path(node)
    count = seen.get(path, 0)
    seen[path] = count + 1
    name = path if count == 0 else f"{path}:{count}"
    return Found(node, name, _source(node), form, *heads, proved=proved, reason=reason, detail=detail)


def owner_path(node: Node) -> str:
    """Module path of the innermost module around ``node``; ``""`` for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    # Dynamo writes L['module'].layers.0.attn; older versions L['self']._modules['layers']._modules['0'].
    path = re.sub(r"^L\['\w+'\]\.?", "", re.sub(r"getattr\((.*), '([^']+)'\)", r"\1.\2", path))
    return re.sub(r"\.?(?:_modules)?\['(\w+)'\]", r".\1", path).lstrip(".")


def _source(node: Node) -> str:
    """The innermost line of the model's own code that made ``node``."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    places = [place for place in frames if "/torch/nn/attention/" not in place[0]]
    return f"{places[-1][0].rsplit('/', 1)[-1]}:{places[-1][1]}" if places else ""
