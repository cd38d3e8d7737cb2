"""The markers that tell when a call went around the door of a sparsified model.

Each attention site that was made sparse has one, a forward pre-hook that calls ``msa::site``. The ``"msa"`` backend
erases it; where it executes, that call was dense, and it says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from msa_compile._compat import graphs_in
from msa_compile.indexer import weights_in_use

log = logging.getLogger(__name__)

TOKEN = "_msa_dense_calls"


@torch.library.custom_op("msa::site", mutates_args=("token",))
def site(token: Tensor, name: str, weights: Sequence[Tensor]) -> None:
    """Count a dense call of an attention site that was made sparse; warn at the first.

    Args:
        token: int64 ``[1]``, the counter; changed in place, so that no compiler drops the call.
        name: Module path of the site.
        weights: Those of its index branch, so that they are guarded inputs of the captured graph; empty without one.
    """
    token.add_(1)
    if token.item() == 1:
        log.warning(
            "%s ran DENSE although the model is sparsified: this call did not go through the model's own forward "
            "(an inner module was called, a graph break cut the attention, or compilation was switched off). "
            "Call the sparsified model itself, or use `with msa_compile.dense(model):` if dense was meant.",
            name or "<root>",
        )


@site.register_fake
def _(token: Tensor, name: str, weights: Sequence[Tensor]) -> None:
    return None


class SiteMarker:
    """Forward pre-hook that reports a dense call of a site; ``owner`` where another module is hooked. Picklable."""

    def __init__(self, name: str, owner: nn.Module | None = None) -> None:
        self.name = name
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Count."""
        owner = module if self.owner is None else self.owner
        torch.ops.msa.site(module._buffers[TOKEN], self.name, weights_in_use(owner))


class FrameTag:
    """Forward pre-hook that does nothing but differ, so that Dynamo keeps the graphs of equal modules apart.

    Where a graph break parts a model, Dynamo compiles the frames of equal inner modules once, for all of them; a site
    would have no name then, and ``include`` and ``exclude`` no meaning.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Read the path, and so guard on it."""
        if self.path == "":
            raise AssertionError("the root of a model is not tagged")


def install_markers(model: nn.Module, carriers: Mapping[str, str]) -> None:
    """Put a marker on each carrier that has none.

    Args:
        model: The model.
        carriers: For each site, by the path of its owner, the module whose call belongs to the same captured graph: the
            owner itself, or a module in it where a graph break parts the owner's call from its attention.
    """
    for owner, carrier in carriers.items():
        try:
            module = model.get_submodule(carrier)
        except AttributeError:
            log.warning("%s is no registered module of the model: calls around its forward cannot be noticed", carrier)
            continue
        if TOKEN in module._buffers:
            continue
        module.register_buffer(TOKEN, torch.zeros(1, dtype=torch.int64, device="cpu"), persistent=False)
        if module is not model:
            other = None if carrier == owner else model.get_submodule(owner)
            module.register_forward_pre_hook(SiteMarker(owner, other))


def tag_frames(model: nn.Module) -> None:
    """Put a :class:`FrameTag` on every module that has parameters or modules, but the root."""
    for path, module in model.named_modules():
        if path and (module._modules or module._parameters):
            module.register_forward_pre_hook(FrameTag(path))


def marker_tokens(model: nn.Module) -> dict[str, Tensor]:
    """The dense-call counter of each marked module."""
    return {name: module._buffers[TOKEN] for name, module in model.named_modules() if TOKEN in module._buffers}  # type: ignore[misc]


def remove_markers(model: nn.Module) -> list[Removed]:
    """Take every marker and counter away, and leave no trace; returns what was there."""
    removed = []
    for module in model.modules():
        hooks = {
            key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, (SiteMarker, FrameTag))
        }
        for key in hooks:
            del module._forward_pre_hooks[key]
        token = module._buffers.pop(TOKEN, None)
        module._non_persistent_buffers_set.discard(TOKEN)
        if hooks or token is not None:
            removed.append(Removed(module, token, hooks))
    return removed


@dataclass(frozen=True)
class Removed:
    """What a module carried."""

    module: nn.Module
    token: Tensor | None
    hooks: Mapping[int, Callable[..., None]]

    def put_back(self) -> None:
        """Give it back."""
        if self.token is not None:
            self.module.register_buffer(TOKEN, self.token, persistent=False)
        self.module._forward_pre_hooks.update(self.hooks)


def marker_nodes(gm: GraphModule) -> list[Node]:
    """The markers in a graph; the second argument of each is the path of its site's owner."""
    calls = (torch.ops.msa.site, torch.ops.msa.site.default)
    return [node for body in graphs_in(gm) for node in body.graph.nodes if node.target in calls]
