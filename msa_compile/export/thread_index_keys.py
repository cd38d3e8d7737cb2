"""Index keys in an exported program: they come in beside the key cache that they belong to, and go out beside it.

The passes put the inputs and outputs for them behind all others, as they do at run time. An artifact has no memory of
its own, so nobody but its caller can have written a cache: index keys that come in are those that went out, and are
taken for what they are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from msa_compile.config import MSAConfig
from msa_compile.errors import ExportIndexerError
from msa_compile.index_keys import IndexBinding
from msa_compile.indexer import remove_index_branches
from msa_compile.markers import TOKEN, SiteMarker, remove_markers
from msa_compile.records import Site
from msa_compile.runtime import restore_parts

# Behind the arguments of the model.
ARGUMENT = "index_keys"


@dataclass(frozen=True)
class Threaded:
    """The index keys of a program.

    Attributes:
        bindings: One for each site that keeps some.
        sources: For each of ``inputs``, the name of the input that is the key cache it belongs to.
        inputs: Names of the inputs that are index keys, in order.
    """

    bindings: tuple[IndexBinding, ...]
    sources: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def handed_in(self) -> tuple[IndexBinding, ...]:
        """Those with an input."""
        return tuple(binding for binding in self.bindings if binding.source is not None)

    @property
    def returned(self) -> tuple[IndexBinding, ...]:
        """Those with an output."""
        return tuple(binding for binding in self.bindings if binding.is_returned)


@contextlib.contextmanager
def with_index_branches(model: nn.Module) -> Iterator[None]:
    """A paused model with its markers and index branches in their places, for a capture that shall have the weights."""
    restore_parts(model)
    if TOKEN in model._buffers:
        model.register_forward_pre_hook(SiteMarker(""))
    try:
        yield
    finally:
        remove_markers(model)
        remove_index_branches(model)


def find_index_keys(gm: GraphModule, bindings: Sequence[IndexBinding]) -> Threaded:
    """What the passes added to ``gm``, while its inputs still stand where the bindings say."""
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    sources = [inputs[binding.source] for binding in bindings if binding.source is not None]
    return Threaded(tuple(bindings), tuple(sources), tuple(inputs[len(inputs) - len(sources) :]))


def check_indexers(sites: Collection[Site], learned: Collection[str]) -> None:
    """Refuse a program in which a site selects by the keys, and in the model by its index branch.

    Args:
        sites: Those of the program.
        learned: Names of the sites that select by an index branch in the model.

    Raises:
        ExportIndexerError: Naming them, and why.
    """
    kept = {site.name for site in sites if site.indexer == "learned"}
    lost = [name for name in learned if name not in kept]
    if lost:
        why = {site.name: site.detail for site in sites}
        lines = "\n".join(f"  {name or '<root>'}: {why.get(name) or 'not in the program'}" for name in lost)
        raise ExportIndexerError(
            f"{len(lost)} sites select by a learned indexer, and would select by the keys in the artifact, so that its "
            f'blocks would be others:\n{lines}\nNothing was written. Sparsify with MSAConfig(indexer="keys") to export.'
        )


def check_scores(config: MSAConfig) -> None:
    """Refuse scores and index keys that no artifact has.

    Raises:
        ExportIndexerError: ``index_scores`` or ``index_cache`` is not ``"exact"``.
    """
    for field in ("index_scores", "index_cache"):
        if getattr(config, field) != "exact":
            raise ExportIndexerError(
                f'the model selects with {field}="{getattr(config, field)}", and an artifact by exact scores of exact '
                f"keys, so that its blocks may be others. Nothing was written. To export, sparsify with "
                f'MSAConfig({field}="exact").'
            )


def trust_index_keys(gm: GraphModule) -> None:
    """Select by the index keys that were handed in, without asking whether they are fresh."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.msa.select_blocks_if_fresh.default:
            node.target, node.args = torch.ops.msa.select_blocks.default, node.args[:2]


def with_graph(program: ExportedProgram, gm: GraphModule, index: Threaded) -> ExportedProgram:
    """``program`` with another graph, whose inputs and outputs are its own and those of index keys."""
    signature = program.graph_signature
    output = gm.graph.output_node()
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    own = len(returned) - len(index.returned)
    markers = {
        spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.BUFFER and _is_token(spec.target)
    }
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and node.name in markers:
            gm.graph.erase_node(node)
    gm.recompile()
    input_specs = [spec for spec in signature.input_specs if spec.arg.name not in markers]
    input_specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(name), None) for name in index.inputs]
    output_specs = [
        replace(spec, arg=type(spec.arg)(name=out.name)) if isinstance(out, Node) else spec
        for spec, out in zip(signature.output_specs, returned[:own], strict=True)
    ]
    output_specs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(out.name), None) for out in returned[own:]]
    args, kwargs = program.example_inputs
    by_name = _by_name(program)
    keys = [_example(binding, by_name[name]) for binding, name in zip(index.handed_in, index.sources, strict=True)]
    return ExportedProgram(
        gm,
        gm.graph,
        ExportGraphSignature(input_specs, output_specs),
        program.state_dict,
        program.range_constraints,
        [_called(entry, (args, kwargs), index, len(keys)) for entry in program.module_call_graph],
        example_inputs=(args, kwargs | {ARGUMENT: keys} if keys else kwargs),
        constants={name: value for name, value in program.constants.items() if not _is_token(name)},
        verifiers=program.verifiers,
    )


def name_index_keys(name: str) -> str:
    """The name of the index keys beside the keys of a name: ``past_key_values.0.index_key``."""
    return re.sub(r"key$", "index_key", name) if name.endswith(".key") else f"{name}_index_key"


def _is_token(target: str | None) -> bool:
    return target is not None and target.split(".")[-1] == TOKEN


def _by_name(program: ExportedProgram) -> dict[str, Tensor]:
    """The example of each input."""
    user = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return dict(zip(user, pytree.tree_leaves(program.example_inputs), strict=True))


def _example(binding: IndexBinding, cache: Tensor) -> Tensor:
    shape = [1 if dim is None else cache.shape[dim] for dim in binding.dims]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(cache.device, binding.dtype)


def _called(entry: ModuleCallEntry, given: Any, index: Threaded, count: int) -> ModuleCallEntry:
    """How the program is called, with index keys as one more argument and one more result."""
    signature = entry.signature
    if entry.fqn or signature is None or not index.bindings:
        return entry
    args, kwargs = given
    in_spec, names = signature.in_spec, signature.forward_arg_names
    if count:
        in_spec = pytree.tree_structure((args, kwargs | {ARGUMENT: [0] * count}))
        names = None if names is None else [*names, ARGUMENT]
    out_spec = signature.out_spec
    if index.returned:
        result = pytree.tree_unflatten([0] * out_spec.num_leaves, out_spec)
        out_spec = pytree.tree_structure((result, [0] * len(index.returned)))
    return replace(entry, signature=replace(signature, in_spec=in_spec, out_spec=out_spec, forward_arg_names=names))
