"""What the rooms of the package hand on to each other and to the user: frozen records, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Reason(Enum):
    """Why a site stays dense. The value is the code in the report; ``sentence`` says what it means."""

    EXCLUDED = "excluded"
    NOT_CAUSAL = "not_causal"
    CROSS_ATTENTION = "cross_attention"
    LATENT_ATTENTION = "latent_attention"
    SLIDING_WINDOW = "sliding_window"
    ATTENTION_BIAS = "attention_bias"
    DATA_DEPENDENT_MASK = "data_dependent_mask"
    MASK_PER_HEAD = "mask_per_head"
    HEAD_LAYOUT = "head_layout"
    HEAD_DIM = "head_dim"
    SCALE = "scale"
    DROPOUT = "dropout"
    WEIGHTS_USED = "weights_used"
    UNKNOWN_FORM = "unknown_form"
    CACHE_WRITE = "cache_write"
    TENSOR_SUBCLASS = "tensor_subclass"
    NOT_CAPTURED = "not_captured"

    @property
    def sentence(self) -> str:
        """One sentence for a reader of the report."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.EXCLUDED: "the configuration's include/exclude globs leave this module out",
    Reason.NOT_CAUSAL: "queries see later keys, and MSA selects among earlier blocks only",
    Reason.CROSS_ATTENTION: "the keys are not made from the tokens that make the queries",
    Reason.LATENT_ATTENTION: "keys come through a latent projection (MLA), not from the queries' hidden state",
    Reason.SLIDING_WINDOW: "a sliding window already bounds the keys a query reads",
    Reason.ATTENTION_BIAS: "a bias (ALiBi, relative, learned) is added to the scores, which the op has no argument for",
    Reason.DATA_DEPENDENT_MASK: "the mask is computed from activations",
    Reason.MASK_PER_HEAD: "the mask differs between the heads of one key/value group",
    Reason.HEAD_LAYOUT: "the query heads of each key/value head could not be proved",
    Reason.HEAD_DIM: "queries, keys and values do not share one head dimension",
    Reason.SCALE: "the scale of the scores could not be proved to be a positive constant",
    Reason.DROPOUT: "attention dropout is active (training mode with a non-zero rate)",
    Reason.WEIGHTS_USED: "the attention probabilities themselves are used outside the attention",
    Reason.UNKNOWN_FORM: "softmax attention in a form that is not recognised",
    Reason.CACHE_WRITE: "the key or value cache is written between its read and the attention",
    Reason.TENSOR_SUBCLASS: "the attention itself runs on a tensor subclass (DTensor), not on each rank's local heads",
    Reason.NOT_CAPTURED: "the attention was cut by a graph break or ran outside the captured graph",
}


@dataclass(frozen=True)
class DenseBelow:
    """Up to how many keys the calls of a site run dense, and where the number is from.

    Attributes:
        keys: The number; 0 is never.
        origin: ``"given"`` by the user; ``"measured"`` on this machine; ``"extrapolated"`` from shorter lengths;
            ``"bound"``, the most there is, where sparse came not near in what was measured; ``"budget"`` where nothing
            was measured yet, and ``"unmeasured"`` where that failed.
        detail: For a human.
    """

    keys: int
    origin: str
    detail: str = ""

    def __str__(self) -> str:
        known = f"{self.origin}: {self.detail}" if self.detail else self.origin
        return f"calls with at most {self.keys} keys run dense ({known})"


@dataclass(frozen=True)
class Site:
    """One attention computation of the model, as one captured graph has it.

    Attributes:
        name: Module path of the owner, ``"layers.0.self_attn"``; a second site of one module is ``"...:1"``.
        source: ``"file.py:line"`` of the call in the model's code, or ``""``.
        form: How the attention is written: ``"sdpa"`` or ``"eager"``, with the grouping, ``"sdpa/enable_gqa"``.
        query_heads: ``Hq``.
        key_value_heads: ``Hkv``.
        head_dim: ``D``.
        mask: What was proved of the mask: ``"causal"``, ``"causal+padding"``, ``"given"``, ``"window(512)"``, ...
        decision: ``"sparse"`` or ``"dense"``.
        reason: Why it is dense; ``None`` when sparse.
        detail: What was found at this site, for a human.
        indexer: The indexer in use, ``"learned"``, ``"keys"``, or ``"own"`` where the model selects blocks itself;
            ``None`` when dense.
        graph: Ordinals of the captured graphs that hold this row.
        dense_below: Which of its calls run dense all the same; ``None`` when the site is dense.
        hidden_size: Width of the hidden state that a learned indexer reads; 0 where the site has none.
        own_budget: ``block_size`` and ``topk_blocks`` of the model itself, which count instead of the configuration's.
    """

    name: str
    source: str
    form: str
    query_heads: int
    key_value_heads: int
    head_dim: int
    mask: str
    decision: str
    reason: Reason | None
    detail: str
    indexer: str | None
    graph: tuple[int, ...] = (0,)
    dense_below: DenseBelow | None = None
    hidden_size: int = 0
    own_budget: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain Python values, ready for JSON."""
        row = dict(self.__dict__)
        row["reason"] = self.reason.value if self.reason else None
        row["graph"] = list(self.graph)
        row["dense_below"] = self.dense_below and dict(self.dense_below.__dict__)
        return row


@dataclass(frozen=True)
class GraphRecord:
    """What the passes found and did in one captured graph.

    Attributes:
        sites: The attention in it.
        nodes: Its size.
        retrace_seconds, passes_seconds: Time taken.
        graph_break: Why Dynamo ended the graph, and where, or ``""`` when it is the last of its frame.
    """

    sites: tuple[Site, ...]
    nodes: int
    retrace_seconds: float
    passes_seconds: float
    graph_break: str = ""
