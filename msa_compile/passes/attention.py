"""The records of detection: an attention found in a graph, and the way to say no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from msa_compile.records import Reason


class Refused(Exception):
    """A check of detection failed: the site stays dense with this reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class MaskTerm:
    """One tensor that hides scores.

    Attributes:
        node: Broadcasts to ``[B, Hq, Tq, Tk]``.
        kind: ``"visible"`` (bool, true where a key is seen), ``"hidden"`` (bool, true where it is not), or
            ``"additive"`` (float, added to the scores).
    """

    node: Node
    kind: Literal["visible", "hidden", "additive"]


@dataclass(frozen=True)
class Attention:
    """An attention computation as the graph spells it; nothing about it is proved yet.

    Attributes:
        output: The node to replace.
        query: Left operand of ``q @ k.T``; ``[B, Hq, Tq, D]`` where the products are plain 4-D ones.
        key: Right operand; ``[B, Hq or Hkv, Tk, D]``, or ``[..., D, Tk]`` when ``key_transposed``.
        value: Right operand of the second product; ``[B, Hq or Hkv, Tk, D]``.
        scale: Factor on ``q . k``.
        softcap: Cap of the ``tanh`` on the scaled scores, or ``None``.
        sinks: One extra logit a head, ``[1, Hq, 1, 1]``, or ``None``.
        mask: What hides scores, all terms together.
        is_causal: The top-left causal flag of ``scaled_dot_product_attention``.
        grouped: Whether the call itself repeats the key/value heads (``enable_gqa``).
        form: ``"sdpa"``, ``"flex"``, ``"eager"`` or, for products of another rank or an einsum, ``"products"``.
        key_transposed: Whether ``key`` is ``[..., D, Tk]``.
        scores: Input of the softmax, for ``"products"``.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    scale: float
    softcap: float | None
    sinks: Node | None
    mask: tuple[MaskTerm, ...]
    is_causal: bool
    grouped: bool
    form: str
    key_transposed: bool = False
    scores: Node | None = None


@dataclass(frozen=True)
class Heads:
    """A tensor of the graph that holds queries, or un-repeated keys or values, and the way to ``[B, H, T, D]``.

    Attributes:
        node: The tensor. With 4 dimensions ``permutation`` brings it to ``[B, H, T, D]``; with 3 to ``[B, T, D]``, one
            head; with 5 to ``[B, Hkv, G, T, D]``, whose heads are then flattened.
        permutation: Of the dimensions of ``node``.
        count: ``H``.
        spelling: How the graph repeats them, for the report.
    """

    node: Node
    permutation: tuple[int, ...]
    count: int
    spelling: str = ""

    @property
    def batch(self) -> object:
        """``B``, possibly symbolic."""
        return self.node.meta["val"].shape[self.permutation[0]]

    @property
    def length(self) -> object:
        """``T``, possibly symbolic."""
        return self.node.meta["val"].shape[self.permutation[-2]]

    @property
    def dim(self) -> int:
        """``D``."""
        return int(self.node.meta["val"].shape[self.permutation[-1]])

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """A concrete value of ``node`` as ``[B, H, T, D]``."""
        tensor = tensor.permute(self.permutation)
        if tensor.dim() == 3:
            return tensor.unsqueeze(1)
        return tensor.flatten(1, 2) if tensor.dim() == 5 else tensor


@dataclass(frozen=True)
class OutputLayout:
    """How ``[B, Hq, Tq, D]`` becomes the shape of the replaced node.

    Attributes:
        permutation: Applied first.
        flatten: First of two dimensions that are then merged, or ``None``.
        unflatten: Dimension that is then split, and its parts, or ``None``.
    """

    permutation: tuple[int, ...] = (0, 1, 2, 3)
    flatten: int | None = None
    unflatten: tuple[int, tuple[int, int]] | None = None

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """A concrete ``[B, Hq, Tq, D]`` in the layout of the graph."""
        tensor = tensor.permute(self.permutation)
        if self.flatten is not None:
            return tensor.flatten(self.flatten, self.flatten + 1)
        return tensor.unflatten(*self.unflatten) if self.unflatten is not None else tensor


@dataclass(frozen=True)
class MaskProof:
    """What was proved of a mask.

    Attributes:
        form: ``"causal"``, ``"top_left"``, ``"causal+padding"``, ``"window"`` or ``"given"``.
        window: Width of a sliding window.
        detail: For the report.
        is_handed_in: Whether its values are known at run time only.
    """

    form: Literal["causal", "top_left", "causal+padding", "window", "given"]
    window: int | None = None
    detail: str = ""
    is_handed_in: bool = False

    def __str__(self) -> str:
        return f"window({self.window})" if self.form == "window" else self.form.replace("top_left", "causal")
