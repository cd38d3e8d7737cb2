"""Write out the mask of each ``flex_attention`` as a tensor of the graph, where later passes can read and run it."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.attention.flex_attention import create_mask

from msa_compile import _compat
from msa_compile.passes.flatten_vmap import splice

log = logging.getLogger(__name__)

MASK_NAME = "msa_block_mask"


def spell_block_masks(gm: GraphModule, fake_mode: _compat.FakeTensorMode) -> None:
    """Insert the boolean mask ``[B or 1, Hq or 1, Tq, Tk]`` of each ``flex_attention`` before it.

    What hides a score is ``mask_mod`` alone: the lists of blocks beside it say where to skip it. The mask has no user
    until the attention is rewritten, so a site that stays dense does not pay for it; ``meta[MASK_NAME]`` of the call is
    its name. Where ``mask_mod`` cannot be traced there is none, and the site will be refused.

    Args:
        gm: The canonical graph, changed in place.
        fake_mode: Mode of its values.
    """
    for node in list(gm.graph.nodes):
        if node.target is _compat.flex_attention:
            try:
                node.meta[MASK_NAME] = _spell(gm, node, fake_mode).name
            except Exception as error:  # a mask_mod may hold anything
                log.debug("the mask of %s could not be written out: %s", node, error)


def _spell(gm: GraphModule, call: Node, fake_mode: _compat.FakeTensorMode) -> Node:
    query, key = call.args[0], call.args[1]
    body: GraphModule = getattr(gm, call.args[4][-1].target)  # type: ignore[index, union-attr, arg-type]
    captured: tuple[Any, ...] = call.args[8]  # type: ignore[assignment]
    by_batch, by_head = (bool(index.users) for index in list(body.graph.nodes)[:2])

    def mask(q: Tensor, k: Tensor, *tensors: Any) -> Tensor:
        given = iter(tensors)
        buffers = [next(given) if isinstance(entry, Node) else entry for entry in captured]

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return body(b, h, q_idx, kv_idx, *buffers)

        batch, heads = q.shape[0] if by_batch else None, q.shape[1] if by_head else None
        return create_mask(mask_mod, batch, heads, q.shape[2], k.shape[2], q.device)

    inputs: list[Node] = [query, key, *(entry for entry in captured if isinstance(entry, Node))]  # type: ignore[list-item]
    with fake_mode, fx_traceback.preserve_node_meta(), fx_traceback.set_current_meta(call):
        traced = _compat.make_fx(mask)(*(node.meta["val"] for node in inputs))
    result: Node = splice(gm, call, traced, inputs)
    assert result.meta["val"].dtype == torch.bool, "a mask_mod says true or false"
    return result
