"""The records of detection: an attention found in a graph, and the way to say no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        output: The node to replace, ``[B, Hq, Tq, D]``.
        query: ``[B, Hq, Tq, D]``.
        key: ``[B, Hq or Hkv, Tk, D]``, or its transpose ``[..., D, Tk]`` when ``key_transposed``.
        value: ``[B, Hq or Hkv, Tk, D]``.
        scale: Factor on ``q . k``.
        softcap: Cap of the ``tanh`` on the scaled scores, or ``None``.
        sinks: One extra logit a head, ``[1, Hq, 1, 1]``, or ``None``.
        mask: What hides scores, all terms together.
        is_causal: The top-left causal flag of ``scaled_dot_product_attention``.
        grouped: Whether the call itself repeats the key/value heads (``enable_gqa``).
        form: ``"sdpa"`` or ``"eager"``.
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


@dataclass(frozen=True)
class Heads:
    """Where the un-repeated keys or values are.

    Attributes:
        node: The tensor that holds them.
        permutation: Brings ``node`` to ``[B, Hkv, Tk, D]``.
        count: ``Hkv``.
        spelling: How the graph repeats them, for the report.
    """

    node: Node
    permutation: tuple[int, ...]
    count: int
    spelling: str


@dataclass(frozen=True)
class MaskProof:
    """What was proved of a mask.

    Attributes:
        form: ``"causal"``, ``"top_left"``, ``"causal+padding"``, ``"window"`` or ``"given"``.
        window: Width of a sliding window.
        detail: For the report.
    """

    form: Literal["causal", "top_left", "causal+padding", "window", "given"]
    window: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        return f"window({self.window})" if self.form == "window" else self.form.replace("top_left", "causal")
