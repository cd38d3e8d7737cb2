"""Put the index branch of a site into the graph: its projections, norms and RoPE, and index keys beside the key cache.

What the graph does to the keys is done to the index keys with the same calls: a concatenation, or a write into a buffer
that has one head where the cache has ``Hkv``. Such a buffer, or what is appended to, comes in as an input of its own at
the end, and longer index keys leave as an output of their own; ``IndexKeys`` keeps them between calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from msa_compile._compat import ConstantSource
from msa_compile.index_keys import IndexBinding
from msa_compile.kernels.select_blocks import nan_in
from msa_compile.passes.emitter import Emitter
from msa_compile.passes.graph_facts import OWNED, TRAINED
from msa_compile.passes.placed import Cut
from msa_compile.passes.plan_index import IndexPlan
from msa_compile.passes.trace_key_store import Store

aten = torch.ops.aten
_EPS = 1e-6  # IndexNorm's

# Metadata of the nodes of an index branch that others look for: the name of its site, and which one it is.
BRANCH = "msa_index_branch"


@dataclass(frozen=True)
class IndexNodes:
    """The index branch of one site in a graph.

    Attributes:
        query: ``[B, Hkv, Tq, D]``.
        key: ``[B, 1, Tk, D]``; uint8 where it is rounded to e4m3.
        binding: How index keys of earlier calls come in, and go out to later ones; ``None`` without a cache.
        is_handed_in: Whether some of them come from earlier calls, and may be missing.
    """

    query: Node
    key: Node
    binding: IndexBinding | None
    is_handed_in: bool


def insert_index_branch(
    emit: Emitter, plan: IndexPlan, name: str, groups: int, *, learns: bool, rounds: bool = False
) -> IndexNodes:
    """Compute index queries and keys of this call, and join them to those of earlier calls.

    Args:
        emit: Inserts before the attention.
        plan: What was proved.
        name: Site name.
        groups: ``Hkv``.
        learns: Whether the weights may get gradients; the hidden state gets none in any case.
        rounds: Whether index keys are rounded to e4m3, and kept as its bytes.
    """
    hidden = emit(aten.detach.default, plan.hidden)
    hidden.meta[BRANCH] = (name, "hidden")
    weights = plan.weights if learns else tuple(emit(aten.detach.default, node) for node in plan.weights)
    query_weight, key_weight, query_gain, key_gain = weights
    dtype = query_weight.meta["val"].dtype
    hidden = _cast(emit, hidden, dtype)
    query = emit(aten.unflatten.int, emit(aten.linear.default, hidden, query_weight), -1, [groups, -1])
    key = emit(aten.unsqueeze.default, emit(aten.linear.default, hidden, key_weight), 2)
    query, key = _normalised(emit, query, query_gain, dtype), _normalised(emit, key, key_gain, dtype)
    query.meta[BRANCH], key.meta[BRANCH] = (name, "query"), (name, "key")
    query, key = _turned(emit, plan, query, groups), _turned(emit, plan, key, groups)
    query, key = _cast(emit, query, dtype), _cast(emit, key, dtype)
    if rounds:
        key = emit(torch.ops.msa.to_e4m3.default, key)
    if plan.cache.store is not None:
        return _stored(emit, plan, plan.cache.store, name, query, key)
    return _appended(emit, plan, name, query, key)


def _normalised(emit: Emitter, node: Node, gain: Node, dtype: torch.dtype) -> Node:
    """``IndexNorm`` of ``[B, T, H, D]``."""
    wide = _cast(emit, node, torch.float32)
    mean = emit(aten.mean.dim, emit(aten.mul.Tensor, wide, wide), [-1], True)
    wide = emit(aten.mul.Tensor, wide, emit(aten.rsqrt.default, emit(aten.add.Scalar, mean, _EPS)))
    factor = emit(aten.add.Scalar, _cast(emit, gain, torch.float32), 1.0)
    return _cast(emit, emit(aten.mul.Tensor, wide, factor), dtype)


def _turned(emit: Emitter, plan: IndexPlan, node: Node, groups: int) -> Node:
    """Index heads ``[B, T, H, D]`` under the layer's RoPE, ``[B, H, T, D]``; ``H`` is ``Hkv`` or 1."""
    rope = plan.rope
    if not rope.inner:
        return emit(aten.transpose.int, node, 1, 2)
    heads = int(node.meta["val"].shape[2])
    if heads != groups:
        node = emit(aten.repeat.default, node, [1, 1, groups, 1])  # the embedding is spelled for Hkv heads
    node = emit(aten.permute.default, node, rope.source.permutation_of("BTHD"))
    values = {rope.source.node: _cast(emit, node, rope.source.node.meta["val"].dtype)}
    for call in rope.inner:
        args, kwargs = map_arg((call.args, call.kwargs), lambda entry: values.get(entry, entry))
        values[call] = emit(call.target, *args, **kwargs)
    turned = emit(aten.permute.default, values[rope.result.node], [rope.result.axes.index(axis) for axis in "BHTD"])
    if heads == groups:
        return turned
    return emit(aten.clone.default, emit(aten.slice.Tensor, turned, 1, 0, 1), memory_format=torch.contiguous_format)


def _cast(emit: Emitter, node: Node, dtype: torch.dtype) -> Node:
    """``node`` in ``dtype``, also where autocast changes what the node is in a run."""
    return emit(aten.to.dtype, node, dtype)


def _appended(emit: Emitter, plan: IndexPlan, name: str, query: Node, key: Node) -> IndexNodes:
    past, outputs = plan.cache.past, plan.cache.outputs
    dtype = key.meta["val"].dtype
    source = None
    dims: tuple[int | None, ...] = ()
    if past is not None:
        source = _place(emit.graph, past.node)
        dims = tuple(None if axis == "H" else past.axes.index(axis) for axis in "BHTD")
        earlier, position = _new_input(emit, past.node, dims, dtype), plan.cache.position
        earlier = _cut(emit, earlier, plan.cache.past_cuts)
        key = (
            emit(aten.cat.default, [earlier, key], 2)
            if position is None
            else emit(torch.ops.msa.write_cache.default, earlier, key, position)
        )
    if past is None and not outputs:
        return IndexNodes(query, key, None, is_handed_in=False)
    binding = _binding(emit.graph, plan, name, dtype, source, dims, grows=True)
    if binding.is_returned:
        # At the end: where a cache rolls, how much of it is kept may be computed late.
        _new_output(emit.graph, _cut(emit.at_end(), key, plan.cache.kept_cuts))
    return IndexNodes(query, key, binding, is_handed_in=past is not None)


def _cut(emit: Emitter, keys: Node, cuts: tuple[Cut, ...]) -> Node:
    """Index keys ``[B, 1, T, D]``, cut as their cache is."""
    for cut in cuts:
        keys = emit(aten.slice.Tensor, keys, "BHTD".index(cut.axis), *cut.bounds)
    return keys


def _stored(emit: Emitter, plan: IndexPlan, store: Store, name: str, query: Node, key: Node) -> IndexNodes:
    entry = store.entry
    dtype = key.meta["val"].dtype
    if store.root.op == "placeholder":
        dims = tuple(None if axis == "H" else store.kept[dim] for dim, axis in enumerate(entry.axes))
        buffer = _new_input(emit, store.root, dims, dtype)
        binding = _binding(emit.graph, plan, name, dtype, _place(emit.graph, store.root), dims, grows=False)
    else:
        sizes = [1 if axis == "H" else _size(emit, entry.node, dim) for dim, axis in enumerate(entry.axes)]
        device = entry.node.meta["val"].device
        buffer = emit(aten.full.default, sizes, nan_in(dtype), dtype=dtype, device=device)
        binding = _binding(emit.graph, plan, name, dtype, None, (), grows=True)
        if binding.is_returned:
            _new_output(emit.graph, buffer)
    target = _through(emit, store.targets, buffer)
    value = emit(aten.permute.default, key, store.value.permutation_of("BHTD"))
    args, place = list(store.write.args), _value_argument(store.write)
    args[0], args[place] = target, value
    emit(store.write.target, *args, **store.write.kwargs)
    attended = _through(emit, store.reads, buffer)
    attended = emit(aten.permute.default, attended, [store.read_axes.index(axis) for axis in "BHTD"])
    return IndexNodes(query, attended, binding, is_handed_in=True)


def _through(emit: Emitter, views: tuple[Node, ...], buffer: Node) -> Node:
    """A buffer seen through the views that the graph takes of its cache."""
    for view in views:
        buffer = emit(view.target, buffer, *view.args[1:], **view.kwargs)
    return buffer


def _value_argument(write: Node) -> int:
    return {aten.copy_: 1, aten.index_put_: 2, aten.index_copy_: 3}[write.target.overloadpacket]  # type: ignore[union-attr]


def _size(emit: Emitter, node: Node, dim: int) -> int | Node:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else emit(aten.sym_size.int, node, dim)


def _binding(
    graph: Graph,
    plan: IndexPlan,
    name: str,
    dtype: torch.dtype,
    source: int | None,
    dims: tuple[int | None, ...],
    *,
    grows: bool,
) -> IndexBinding:
    weights = tuple(_place(graph, node) for node in plan.weights)
    return IndexBinding(name, weights, dtype, source, dims, grows, plan.cache.outputs)


def _place(graph: Graph, node: Node) -> int:
    """Place of an input among the inputs of the graph."""
    return [entry for entry in graph.nodes if entry.op == "placeholder"].index(node)


def _new_input(emit: Emitter, cache: Node, dims: tuple[int | None, ...], dtype: torch.dtype) -> Node:
    """An input after all others, for the index keys that belong to ``cache``."""
    inputs = [entry for entry in emit.graph.nodes if entry.op == "placeholder"]
    value = cache.meta["val"]
    with emit.graph.inserting_after(inputs[-1]):
        node = emit.graph.placeholder(f"msa_index_keys_{len(inputs)}")
    with emit.fake_mode:
        sizes = [1 if dim is None else value.shape[dim] for dim in dims]
        node.meta = {"val": torch.empty(sizes, dtype=dtype, device=value.device), OWNED: False, TRAINED: False}
    node._dynamo_source = ConstantSource(node.name)  # type: ignore[attr-defined]
    return node


def _new_output(graph: Graph, keys: Node) -> None:
    """An output after all others."""
    output = graph.output_node()
    output.args = ((*output.args[0], keys),)  # type: ignore[misc]
