"""Run a lifted mask at concrete sizes, on every kind of padding and at several cache offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from msa_compile.kernels.given_mask.op import HIDDEN
from msa_compile.passes.attention import Attention, MaskTerm, Refused
from msa_compile.passes.graph_facts import GraphFacts, tensor_value
from msa_compile.passes.lift_mask import LiftedMask
from msa_compile.passes.replay import ReplayError, Sizes, concrete, replay
from msa_compile.records import Reason


@dataclass(frozen=True)
class MaskRun:
    """One concrete mask: ``visible [B or 1, Tq, Tk]`` at a cache offset; ``padded`` says if keys were padded."""

    visible: torch.Tensor
    offset: int
    padded: bool

    def causal(self) -> torch.Tensor:
        """``[Tq, Tk]``: key ``j`` is not after query ``i``."""
        tq, tk = self.visible.shape[-2:]
        return torch.arange(tk)[None, :] <= torch.arange(tq)[:, None] + self.offset

    def distance(self) -> torch.Tensor:
        """``[Tq, Tk]``: how far key ``j`` is behind query ``i``."""
        tq, tk = self.visible.shape[-2:]
        return torch.arange(tq)[:, None] + self.offset - torch.arange(tk)[None, :]


def run_mask(
    facts: GraphFacts, attention: Attention, lifted: LiftedMask, sizes: Sizes, tq: int, tk: int
) -> list[MaskRun]:
    """The masks of ``attention`` at ``sizes``, for several cache offsets and paddings.

    Raises:
        ReplayError: If they cannot be run there.
        Refused: If what they add is more than visibility, or differs between heads.
    """
    runs = []
    offsets = sorted({0, (tk - tq) // 2, tk - tq}) if lifted.offsets else [tk - tq]
    for offset in offsets:
        for pattern in ("none", "left", "right", "holes") if lifted.paddings else ("none",):
            given: dict[Node, torch.Tensor] = {}
            for leaf in lifted.offsets:
                value = cast(torch.Tensor, tensor_value(leaf))
                given[leaf] = torch.full([concrete(s, sizes) for s in value.shape], offset, dtype=value.dtype)
            for leaf in lifted.paddings:
                value = cast(torch.Tensor, tensor_value(leaf))
                given[leaf] = _padding([concrete(size, sizes) for size in value.shape], pattern).to(value.dtype)
            visible: torch.Tensor = torch.ones(1, tq, tk, dtype=torch.bool)
            for term in attention.mask:
                visible = visible & _visible(replay(facts, lifted.inner, given, sizes, term.node), term, tq, tk)
            runs.append(MaskRun(visible, offset, pattern != "none"))
    return runs


def _padding(shape: list[int], pattern: str) -> torch.Tensor:
    rows, length = shape
    mask = torch.ones(rows, length)
    for row in range(rows):
        width = (row * 2 + 1) % max(length, 1)
        if pattern == "left":
            mask[row, :width] = 0
        elif pattern == "right":
            mask[row, length - width :] = 0
        elif pattern == "holes":
            mask[row, row % length :: 3] = 0
    return mask


def _visible(mask: torch.Tensor, term: MaskTerm, tq: int, tk: int) -> torch.Tensor:
    """The concrete term as visibility ``[B or 1, Tq, Tk]``."""
    mask = mask.to("cpu")
    if term.kind == "additive":
        if not ((mask == 0) | (mask <= HIDDEN)).all():
            raise Refused(Reason.ATTENTION_BIAS, f"{term.node} adds values other than 0 and minus infinity")
        seen = mask == 0
    else:
        seen = mask.bool() if term.kind == "visible" else ~mask.bool()
    seen = seen.squeeze(1) if seen.dim() == 5 else seen[(None,) * (4 - seen.dim())]
    if not (seen == seen[:, :1]).all():
        raise Refused(Reason.MASK_PER_HEAD, f"{term.node} differs between heads")
    if any(size not in (1, wanted) for size, wanted in zip(seen.shape[2:], (tq, tk), strict=True)):
        # An exported program may have a size of its own for a mask that is handed in.
        raise ReplayError(f"{term.node} is {tuple(seen.shape[2:])} for {tq} queries and {tk} keys")
    return seen[:, 0].expand(-1, tq, tk)
