"""Capture a model with `torch.export` and make the attention of the program sparse."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from msa_compile import _compat
from msa_compile.config import MSAConfig
from msa_compile.errors import CaptureError, ExampleInputsError, ExportNotSparseError, MSAError
from msa_compile.export.positions import bound_masks, spell_content_starts
from msa_compile.export.records import Port, Range, SparseProgram, name_size
from msa_compile.export.thread_index_keys import (
    Threaded,
    check_indexers,
    check_scores,
    find_index_keys,
    name_index_keys,
    trust_index_keys,
    with_graph,
    with_index_branches,
)
from msa_compile.indexer import weights_in_use
from msa_compile.passes.pipeline import run_passes

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A module and one call of it.

    Attributes:
        module: What is captured.
        prefix: Path of the model in it, with a dot, or ``""``.
        args, kwargs: The call.
        dynamic_shapes: As `torch.export.export` takes them.
        input_names, output_names: Of the flat tensors; ``None`` for those that the program gives.
    """

    module: nn.Module
    prefix: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None


def capture(call: Call, config: MSAConfig, windows: Mapping[str, int], expected: Collection[str]) -> SparseProgram:
    """The program of ``call``, its attention sparse.

    Args:
        call: What to capture; its module is dense here.
        config: Of the sparsified model. Every length runs sparse in an artifact: up to the budget that is the same
            attention, and nothing is decided by what this machine is fast at.
        windows: Sliding windows known of sites.
        expected: Names of the sites that are sparse in the model.

    Raises:
        CaptureError: The model cannot be captured.
        ExampleInputsError: A number that is open has an example outside its range.
        ExportNotSparseError: A site that is sparse in the model would be dense in the artifact.
        ExportIndexerError: A site that selects by its index branch would select by the keys, or scores are fp8.
    """
    check_scores(config)
    model = call.module.get_submodule(call.prefix.rstrip("."))
    try:
        with torch.no_grad(), with_index_branches(model):
            learned = [name for name, module in model.named_modules() if weights_in_use(module)]
            program = torch.export.export(call.module, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes)
    except MSAError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture the model: {type(error).__name__}: {error}. If an open size is in "
            "question, name it in dynamic_shapes, with the range that the model allows."
        ) from error
    _strip_prefix(program.graph_module, call.prefix)
    result = run_passes(program, replace(config, dense_below=0), dict(windows))
    _check_sparse(result.record.sites, expected)
    check_indexers(result.record.sites, learned)
    index = find_index_keys(result.module, result.bindings)
    trust_index_keys(result.module)
    _clean(result.module)
    bound_masks(result.module)
    spell_content_starts(result.module)
    _clean(result.module)
    names = call.output_names or _output_names(program)
    return _describe(with_graph(program, result.module, index), result.record.sites, call, names, index)


def _strip_prefix(gm: GraphModule, prefix: str) -> None:
    """Make the module paths in the metadata start at the model."""
    if not prefix:
        return
    root = prefix.rstrip(".")
    for body in _compat.graphs_in(gm):
        for node in body.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                node.meta["nn_module_stack"] = {
                    key: ("" if path == root else path.removeprefix(prefix), kind)
                    for key, (path, kind) in stack.items()
                    if path == root or path.startswith(prefix)
                }


def _check_sparse(sites: Collection[Any], expected: Collection[str]) -> None:
    sparse = {site.name for site in sites if site.decision == "sparse"}
    lost = [name for name in expected if name not in sparse]
    if not sparse or lost:
        why = {site.name: f"{site.reason.value}: {site.detail}" for site in sites if site.reason is not None}
        lines = "\n".join(f"  {name or '<root>'}: {why.get(name, 'not in the program')}" for name in lost)
        raise ExportNotSparseError(
            f"{len(lost)} attention sites are sparse in the model and would be dense in the artifact:\n{lines}\n"
            "Nothing was written. Exclude them in MSAConfig(exclude=...) if they may be dense."
        )


def _clean(gm: GraphModule) -> None:
    """Drop what only training needs."""
    graph = gm.graph
    for node in reversed(list(graph.nodes)):
        if node.target is _compat.set_grad_enabled:
            graph.erase_node(node)
        elif node.target in (_compat.enter_autocast, _compat.exit_autocast):
            raise CaptureError(
                "the forward of the model enters autocast, which an artifact cannot hold: export a model in the dtype "
                "that it shall run in"
            )
    graph.eliminate_dead_code(lambda node: _is_effect(node))
    graph.lint()
    gm.recompile()


def _is_effect(node: torch.fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _describe(
    program: ExportedProgram, sites: tuple[Any, ...], call: Call, names: tuple[str, ...], index: Threaded
) -> SparseProgram:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        kept = ", ".join([*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()])
        raise CaptureError(
            f"the model writes into tensors that it keeps ({kept}), which an artifact has none of. Give it its cache "
            "as arguments that it returns (cache='none'), or export it without one."
        )
    symbols = _symbol_names(call)
    by_name = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    flat = [leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor)]
    user = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    tensors = [name for name in user if isinstance(by_name.get(name), Tensor)]
    own = tensors[: len(tensors) - len(index.inputs)]
    named = dict(zip(own, call.input_names or own, strict=True))
    inputs = [*named.values(), *(name_index_keys(named[source]) for source in index.sources)]
    returned = [spec.arg.name for spec in signature.output_specs]
    outputs = [*names, *(name_index_keys(names[binding.outputs[0]]) for binding in index.returned)]
    found: dict[str, str] = {}
    for name, tensor in zip(tensors, flat, strict=True):
        for dim, size in enumerate(by_name[name].shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size.node.expr), symbols.get((id(tensor), dim), str(size)))
    ranges = {
        found[str(symbol)]: Range(int(allowed.lower), int(allowed.upper) if allowed.upper < 2**31 else 2**31)
        for symbol, allowed in program.range_constraints.items()
        if str(symbol) in found
    }
    return SparseProgram(
        program=program,
        sites=sites,
        inputs=tuple(_port(a, by_name[b], found) for a, b in zip(inputs, tensors, strict=True)),
        outputs=tuple(_port(a, by_name[b], found) for a, b in zip(outputs, returned, strict=True)),
        ranges=ranges,
        symbols=found,
        example=tuple(flat),
    )


def _symbol_names(call: Call) -> dict[tuple[int, int], str]:
    """The name of the user's `Dim` for each dimension of each example."""
    names: dict[tuple[int, int], str] = {}

    def note(value: Any, dims: Any) -> None:
        if isinstance(value, Tensor):
            pairs = dims.items() if isinstance(dims, Mapping) else enumerate(dims or ())
            names.update({(id(value), at): dim.__name__ for at, dim in pairs if isinstance(dim, Dim)})
        elif isinstance(value, Mapping) and isinstance(dims, Mapping):
            for key, entry in value.items():
                note(entry, dims.get(key))
        elif isinstance(value, (list, tuple)) and isinstance(dims, (list, tuple)):
            for entry, entry_dims in zip(value, dims, strict=False):
                note(entry, entry_dims)

    if isinstance(call.dynamic_shapes, Mapping):
        bound = dict(call.kwargs)
        if call.args:
            import inspect

            bound |= inspect.signature(call.module.forward).bind(*call.args, **call.kwargs).arguments
        note(bound, call.dynamic_shapes)
    else:
        note(call.args, call.dynamic_shapes)
    return names


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names from the structure of what the model returns: ``logits``, ``past_key_values_0_1``; ``output`` for one."""
    spec = program.call_spec.out_spec
    assert spec is not None, "a program that was exported says what it returns"
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    names = [
        "_".join("".join(c if c.isalnum() else " " for c in str(key)).strip() for key in path) for path, _ in paths
    ]
    if names == [""]:
        return ("output",)
    return tuple(name if name and not name[0].isdigit() else f"output_{name}" for name in names)


def _port(name: str, value: Tensor, symbols: Mapping[str, str]) -> Port:
    shape = tuple(size if isinstance(size, int) else name_size(str(size.node.expr), symbols) for size in value.shape)
    return Port(name, str(value.dtype).removeprefix("torch."), shape)


def check_examples(call: Call) -> None:
    """Refuse an example that lies outside the range of an open size.

    Raises:
        ExampleInputsError: Naming the size and its range.
    """
    names = _symbol_names(call)
    dims = {dim.__name__: dim for dim in pytree.tree_leaves(call.dynamic_shapes) if isinstance(dim, Dim)}
    for tensor in pytree.tree_leaves((call.args, call.kwargs)):
        for at in range(tensor.dim() if isinstance(tensor, Tensor) else 0):
            dim = dims.get(names.get((id(tensor), at), ""))
            if dim is not None and not dim.min <= tensor.shape[at] <= dim.max:
                raise ExampleInputsError(
                    f"{dim.__name__} is {tensor.shape[at]} in the example inputs; its range is {dim.min} to {dim.max}"
                )
