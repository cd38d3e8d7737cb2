"""Attention calls of an eager model: counted, and computed anew over few blocks. Knows nothing of the package.

Calls are seen by a `TorchFunctionMode`: `scaled_dot_product_attention`, and a softmax over enough columns to be keys
(the models of the census have fewer experts than their shortest window has keys). Blocks are chosen by plain loops: the
anchor of a query is the first key that it sees; a block's score is its best visible token, `<mean of the group's query
heads, k_j>`; the query's own block is always in; the others follow by score, ties to the lower id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.census.architectures import WINDOW

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
_HIDDEN = -1e4


class AttentionCalls(TorchFunctionMode):
    """Counts the attention calls of a forward.

    Attributes:
        count: Calls so far.
        grouped: Whether some call has fewer distinct key heads than query heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.grouped = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.count += 1
            query, key = args[0], args[1] if len(args) > 1 else kwargs["key"]
            self.grouped |= distinct_heads(key) < query.shape[1]
        elif func in _SOFTMAX and is_over_keys(args, kwargs):
            self.count += 1
        return func(*args, **kwargs)


class BlockOracle(TorchFunctionMode):
    """Replaces the attention calls that ``decisions`` calls sparse by masked dense attention over chosen blocks.

    Args:
        decisions: ``"sparse"`` or ``"dense"`` for each call of one forward, in order; repeated for further forwards.
        block_size: Keys in a block.
        topk: Blocks of a query.
        key_value_heads: Of attention that is written out, where the repeated keys are not seen.

    Attributes:
        count: Attention calls so far.
        batch, query_length, key_length: Of the next forward; set them before each.
    """

    def __init__(self, decisions: Sequence[str], block_size: int, topk: int, key_value_heads: int) -> None:
        super().__init__()
        self.decisions = decisions
        self.block_size, self.topk, self.key_value_heads = block_size, topk, key_value_heads
        self.batch = 1
        self.query_length = self.key_length = 0
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_sdpa = func is F.scaled_dot_product_attention
        if not is_sdpa and not (func in _SOFTMAX and is_over_keys(args, kwargs)):
            return func(*args, **kwargs)
        self.count += 1
        if self.decisions[(self.count - 1) % len(self.decisions)] != "sparse":
            return func(*args, **kwargs)
        return self._sdpa(*args, **kwargs) if is_sdpa else self._restrict(args[0])

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        shape = query.shape
        if shape[2] != self.query_length:  # transformers folds the heads of a group into the length of a decode step
            query = query.reshape(shape[0], -1, self.query_length, shape[3])
        lengths = (query.shape[2], key.shape[2])
        if is_causal:
            visible = torch.ones(1, *lengths, dtype=torch.bool).tril()
        elif attn_mask is None:
            visible = torch.ones(1, *lengths, dtype=torch.bool)
        else:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
            visible = (attn_mask if attn_mask.dtype == torch.bool else attn_mask > _HIDDEN)[:, 0]
        groups = distinct_heads(key)
        mean = query.float().unflatten(1, (groups, -1)).mean(2)
        chosen = self._choose(mean @ key[:, :: key.shape[1] // groups].float().mT, visible)
        chosen = chosen.repeat_interleave(query.shape[1] // groups, dim=1)
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        logits = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
        return (_softmax(logits.masked_fill(~chosen, float("-inf"))) @ value).reshape(*shape[:3], -1)

    def _restrict(self, logits: Tensor) -> Tensor:
        """Softmax of written-out attention over chosen blocks only; a last column beyond the keys is a sink."""
        shape = logits.shape
        scores = logits.reshape(self.batch, -1, *shape[-2:])[..., : self.key_length].float()
        visible = scores[:, 0] > _HIDDEN
        groups = min(self.key_value_heads, scores.shape[1])
        chosen = self._choose(scores.unflatten(1, (groups, -1)).mean(2), visible)
        kept = chosen.repeat_interleave(scores.shape[1] // groups, dim=1)
        kept = F.pad(kept, (0, shape[-1] - self.key_length), value=True).reshape(shape)
        return _softmax(logits.masked_fill(~kept, float("-inf")))

    def _choose(self, token_scores: Tensor, visible: Tensor) -> Tensor:
        """Keys in chosen blocks: bool ``[B, Hkv, Tq, Tk]`` of scores of that shape and visibility ``[B|1, Tq, Tk]``."""
        chosen = torch.zeros(token_scores.shape, dtype=torch.bool)
        for row, seen in enumerate(visible.expand(token_scores.shape[0], -1, -1).tolist()):
            slots = [[slot for slot, is_seen in enumerate(keys) if is_seen] for keys in seen]
            for group, query in product(range(token_scores.shape[1]), range(len(slots))):
                if slots[query]:
                    scores = token_scores[row, group, query].tolist()
                    chosen[row, group, query, list(self._kept(scores, slots[query]))] = True
        return chosen

    def _kept(self, scores: list[float], slots: list[int]) -> Iterable[int]:
        anchor = slots[0]
        best: dict[int, float] = {}
        for slot in slots:
            block = (slot - anchor) // self.block_size
            best[block] = max(best.get(block, float("-inf")), scores[slot])
        own = (slots[-1] - anchor) // self.block_size
        others = sorted(best.keys() - {own}, key=lambda block: (-best[block], block))
        ids = {own, *others[: self.topk - 1]}
        return (slot for slot in slots if (slot - anchor) // self.block_size in ids)


def distinct_heads(key: Tensor) -> int:
    """How many of the heads of ``[B, H, T, D]`` differ, where equal ones stand side by side."""
    heads = key.shape[1]
    for groups in range(1, heads):
        if heads % groups == 0:
            parts = key.unflatten(1, (groups, -1))
            if bool((parts == parts[:, :, :1]).all()):
                return groups
    return heads


def is_over_keys(args: Any, kwargs: Any) -> bool:
    """Whether a softmax is over columns enough to be keys, of a whole cache or of a rolling one."""
    scores: Tensor = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return scores.dim() >= 3 and dim in (-1, scores.dim() - 1) and scores.shape[-1] >= WINDOW


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros where everything is -inf."""
    return torch.nan_to_num(torch.softmax(logits.float(), dim=-1)).to(logits.dtype)
