"""Find where the keys of an attention are kept: the keys of this call, and the cache that they join.

Index keys are kept beside the keys, slot by slot. So what the graph does to its key cache is read here as it is
spelled, a concatenation, with slices where it rolls, or one write into a buffer, and `insert_index_branch` does the
same to the index keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

import msa_compile.kernels.write_cache  # noqa: F401  (registers the op)
from msa_compile.passes.attention import Heads
from msa_compile.passes.graph_facts import GraphFacts, argument, is_op, is_owned, tensor_value
from msa_compile.passes.placed import Cut, IndexRefused, Placed, dimension_of, uncut, unmoved
from msa_compile.passes.trace_key_store import Store, trace_key_store, without_writes

aten = torch.ops.aten


@dataclass(frozen=True)
class KeyCache:
    """Where keys come from.

    Attributes:
        fresh: The keys of this call, ``[B, H, T, D]`` in some order.
        past: What they are appended to, an input of the graph.
        past_cuts: What of it they are appended to, where it rolls.
        position: Where in ``past`` each row of them is written instead (``msa::write_cache``).
        store: What they are written into, in place.
        outputs: Places among the graph's outputs of the tensor that holds all keys afterwards.
        kept_cuts: What of all keys that tensor holds, where it rolls.
    """

    fresh: Placed
    past: Placed | None = None
    past_cuts: tuple[Cut, ...] = ()
    position: Node | None = None
    store: Store | None = None
    outputs: tuple[int, ...] = ()
    kept_cuts: tuple[Cut, ...] = ()


def trace_key_cache(facts: GraphFacts, key: Heads, reader: Node, *, is_body: bool) -> KeyCache:
    """Where the keys that ``reader`` attends to come from.

    Args:
        facts: Facts of the graph.
        key: The un-repeated keys.
        reader: The attention's output.
        is_body: Whether the graph is the body of another, which cannot be handed a cache of ours.

    Raises:
        IndexRefused: They come from something else than this call, a concatenation, or one write into a buffer.
    """
    if len(key.permutation) != 4:
        raise IndexRefused("the keys are not [B, H, T, D] in some order")
    axes = ["?"] * 4
    for axis, dim in zip("BHTD", key.permutation, strict=True):
        axes[dim] = axis
    placed = Placed(key.node, "".join(axes))
    cache = _stored(facts, placed, key.count, reader) if facts.writes(key.node, reader) else _appended(facts, placed)
    if not is_body:
        return cache
    if cache.past is not None or cache.store is not None:
        raise IndexRefused("the key cache is used inside a checkpointed region")
    return KeyCache(cache.fresh)


def _stored(facts: GraphFacts, placed: Placed, heads: int, reader: Node) -> KeyCache:
    store = trace_key_store(facts, placed, heads, reader)
    outputs: tuple[int, ...] = ()
    if store.root.op != "placeholder":
        outputs = tuple(index for index, node in enumerate(_outputs(facts)) if without_writes(node) is store.root)
    return KeyCache(unmoved(store.value), store=store, outputs=outputs)


def _appended(facts: GraphFacts, placed: Placed) -> KeyCache:
    joined = unmoved(placed)
    if facts.writes(joined.node, facts.graph.output_node()):
        raise IndexRefused("the keys are changed in place after they are computed")
    outputs, kept_cuts = _kept(facts, joined)
    if is_op(joined.node, torch.ops.msa.write_cache):
        return _written(joined, outputs)
    kept = KeyCache(joined, outputs=outputs, kept_cuts=kept_cuts)
    if not is_op(joined.node, aten.cat):
        return kept
    dim = dimension_of(argument(joined.node, "dim"), 4)
    parts = [part for part in joined.node.all_input_nodes if not _is_empty(part)]
    if joined.axes[dim] != "T":
        return kept  # of channels: RoPE on a part of them
    fresh = unmoved(Placed(parts[-1], joined.axes))
    if len(parts) == 1:
        return replace(kept, fresh=fresh)
    past, past_cuts = uncut(Placed(parts[0], joined.axes))
    if len(parts) > 2 or not _is_handed_in(past.node) or not _are_of_tokens(past_cuts):
        raise IndexRefused("the keys are appended to something else than a cache that was handed in")
    return replace(kept, fresh=fresh, past=past, past_cuts=past_cuts)


def _kept(facts: GraphFacts, joined: Placed) -> tuple[tuple[int, ...], tuple[Cut, ...]]:
    """Places among the outputs of all keys, or of the same cut of them where all of them are not returned."""
    found: dict[tuple[Cut, ...], list[int]] = {}
    for index, node in enumerate(_outputs(facts)):
        value = tensor_value(node)
        if value is None or value.dim() != 4:
            continue
        source, cuts = uncut(Placed(node, "0123"))
        if source.node is joined.node:
            named = tuple(replace(cut, axis=joined.axes[source.axes.index(cut.axis)]) for cut in cuts)
            found.setdefault(named, []).append(index)
    cuts = () if () in found or len(found) != 1 else next(iter(found))
    return (tuple(found.get(cuts, ())), cuts) if _are_of_tokens(cuts) else ((), ())


def _are_of_tokens(cuts: tuple[Cut, ...]) -> bool:
    return all(cut.axis in "BT" for cut in cuts)


def _written(joined: Placed, outputs: tuple[int, ...]) -> KeyCache:
    cache, update, position = joined.node.args
    assert isinstance(cache, Node) and isinstance(update, Node) and isinstance(position, Node), "arguments of the op"
    past = unmoved(Placed(cache, joined.axes))
    if joined.axes != "BHTD" or not _is_handed_in(past.node):
        raise IndexRefused("the keys are written into something else than a cache that was handed in")
    return KeyCache(unmoved(Placed(update, joined.axes)), past, position=position, outputs=outputs)


def _is_handed_in(node: Node) -> bool:
    return node.op == "placeholder" and not is_owned(node)


def _outputs(facts: GraphFacts) -> list[Node]:
    found = facts.graph.output_node().args[0]
    return list(found) if isinstance(found, (list, tuple)) else []  # type: ignore[arg-type]


def _is_empty(node: object) -> bool:
    value = tensor_value(node)
    return value is not None and value.dim() == 1 and value.shape[0] == 0
