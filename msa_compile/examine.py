"""Find a model's attention sites by a real call, where the model cannot be copied onto fake tensors (FSDP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.fx import GraphModule

from msa_compile._compat import restore_paths
from msa_compile.backend import MSABackend
from msa_compile.config import MSAConfig
from msa_compile.discover import CallInputs, Discovery, carrier_of, mark_every_module, sparse_owners
from msa_compile.markers import install_markers, marker_nodes, marker_tokens, remove_markers, tag_frames
from msa_compile.passes.pipeline import run_passes


class ExaminingBackend(MSABackend):
    """Records what there is to rewrite, and runs every graph as it is."""

    def __init__(self, config: MSAConfig, model: nn.Module, windows: dict[str, int]) -> None:
        super().__init__(config, "eager", model=model, windows=windows)
        self.carriers: dict[str, str] = {}

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Examine one graph."""
        assert self.model is not None, "it was given"
        restore_paths(gm, self.model)
        marked = [str(node.args[1]) for node in marker_nodes(gm)]
        found = run_passes(gm, self.config, self.windows, rewrite=False).record
        self.records.append(found)
        for owner in sparse_owners(found.sites):
            self.carriers.setdefault(owner, carrier_of(owner, marked, taken=self.carriers.values()))
        for node in marker_nodes(gm):
            node.graph.erase_node(node)
        gm.recompile()
        return gm.forward  # type: ignore[no-any-return]


def examine(
    model: nn.Module,
    inputs: CallInputs,
    config: MSAConfig,
    windows: dict[str, int],
    compiling_with: Callable[[MSABackend], AbstractContextManager[None]],
) -> Discovery:
    """What there is in a call of a sparsified model; its markers are put where that call shows them.

    Args:
        model: The model.
        inputs: The call.
        config: What to look for.
        windows: Sliding windows known of its sites.
        compiling_with: Makes the block in which the model is compiled with a backend.
    """
    backend = ExaminingBackend(config, model, windows)
    removed = remove_markers(model)
    try:
        mark_every_module(model)
        for token in marker_tokens(model).values():
            token.fill_(1)  # a marker that executes warns at its first
        with compiling_with(backend):
            model(*inputs.args, **inputs.kwargs)
    except BaseException:
        remove_markers(model)
        for marker in removed:
            marker.put_back()
        raise
    remove_markers(model)
    tag_frames(model)
    install_markers(model, backend.carriers)
    return Discovery(tuple(backend.records), windows, backend.carriers)
