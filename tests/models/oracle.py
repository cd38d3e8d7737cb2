"""What a sparsified model must compute, from the untouched model run eagerly; imports nothing of the package.

The model's attention is intercepted and replaced by masked dense attention over blocks that plain Python loops choose:

- the anchor of a row is its first visible key, and blocks are counted from there;
- a query stands at its own key slot, the last one that it sees;
- a block's score is its best visible token, `<mean of the group's query heads, k_j>` in float32;
- the query's own block is always in; the others follow by score, ties to the lower id, up to `topk` in all.
"""

import contextlib
from itertools import product

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "block_oracle"
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


class BlockOracle:
    """Masked dense attention over chosen blocks, in the place of a model's own.

    `calls` counts the attentions that were replaced, `dense_calls` those left dense for their sliding window.
    """

    def __init__(self, block_size, topk, key_value_heads):
        self.block_size, self.topk, self.key_value_heads = block_size, topk, key_value_heads
        self.calls = self.dense_calls = 0

    def blocks(self, token_scores, anchor, slots):
        """Ids of the blocks of one query: `slots` are the keys that it sees, the last one its own."""
        best = {}
        for slot in slots:
            block = (slot - anchor) // self.block_size
            best[block] = max(best.get(block, float("-inf")), token_scores[slot])
        own = (slots[-1] - anchor) // self.block_size
        others = sorted(best.keys() - {own}, key=lambda block: (-best[block], block))
        return {own, *others[: self.topk - 1]}

    def choose(self, token_scores, visible):
        """Which visible keys lie in chosen blocks: bool and scores `[B, Hkv, Tq, Tk]`, visible `[B, Tq, Tk]`."""
        chosen = torch.zeros(token_scores.shape, dtype=torch.bool)
        for row, seen in enumerate(visible.tolist()):
            slots = [[slot for slot, is_seen in enumerate(keys) if is_seen] for keys in seen]
            anchor = min((of_query[0] for of_query in slots if of_query), default=0)
            for group, query in product(range(token_scores.shape[1]), range(len(slots))):
                if slots[query]:
                    ids = self.blocks(token_scores[row, group, query].tolist(), anchor, slots[query])
                    kept = [slot for slot in slots[query] if (slot - anchor) // self.block_size in ids]
                    chosen[row, group, query, kept] = True
        return chosen

    def attend(self, query, key, value, visible, *, scale=None, softcap=None, sinks=None, sliding_window=None):
        """`[B, Hq, Tq, D]`; key and value `[B, Hkv, Tk, D]`, visible `[B or 1, Tq, Tk]`."""
        batch, heads, length, head_dim = query.shape
        groups = heads // self.key_value_heads
        visible = visible.expand(batch, length, key.shape[2])
        if sliding_window is not None:
            self.dense_calls += 1
            chosen = visible[:, None].expand(batch, self.key_value_heads, length, key.shape[2])
        else:
            self.calls += 1
            mean = query.float().view(batch, self.key_value_heads, groups, length, head_dim).mean(2)
            chosen = self.choose(mean @ key.float().transpose(-1, -2), visible)
        chosen = chosen.repeat_interleave(groups, dim=1)
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        logits = (query @ key.transpose(-1, -2)) * (head_dim**-0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~chosen, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(batch, heads, length, 1)], dim=-1)
        return _softmax(logits)[..., : key.shape[2]] @ value

    def restrict(self, logits):
        """Softmax of a written-out attention, `[B, Hq, Tq, Tk]` with hidden scores at -inf, over chosen blocks only.

        A group's mean score is the score of its mean query head, up to the scale, which orders nothing.
        """
        self.calls += 1
        batch, heads, length, keys = logits.shape
        groups = heads // self.key_value_heads
        mean = logits.float().view(batch, self.key_value_heads, groups, length, keys).mean(2)
        chosen = self.choose(mean, ~torch.isneginf(logits[:, 0])).repeat_interleave(groups, dim=1)
        return _softmax(logits.masked_fill(~chosen, float("-inf")))

    @contextlib.contextmanager
    def in_place_of(self, model):
        """While open, `model` (transformers or hand-written) attends through this oracle."""
        if not isinstance(model, PreTrainedModel):
            with _Interception(self):
                yield
            return
        original = model.config._attn_implementation
        AttentionInterface.register(NAME, self._transformers_attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.config._attn_implementation = NAME
        try:
            yield
        finally:
            model.config._attn_implementation = original
            del AttentionInterface._global_mapping[NAME]
            del AttentionMaskInterface._global_mapping[NAME]

    def _transformers_attention(
        self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, s_aux=None,
        sliding_window=None, **kwargs,
    ):  # fmt: skip
        visible = attention_mask[:, 0, :, : key.shape[2]] == 0
        out = self.attend(
            query, key, value, visible, scale=scaling, softcap=softcap, sinks=s_aux, sliding_window=sliding_window
        )
        return out.transpose(1, 2).contiguous(), None


def _softmax(logits):
    """Softmax over the last dimension; zeros where everything is -inf."""
    return torch.nan_to_num(torch.softmax(logits.float(), dim=-1)).to(logits.dtype)


class _Interception(TorchFunctionMode):
    """Hands every SDPA call, and every softmax over `[B, H, Tq, Tk]`, to an oracle."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func in _SOFTMAX and args[0].dim() == 4:
            return self.oracle.restrict(args[0])
        return func(*args, **kwargs)

    def _sdpa(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        repeats = key.shape[1] // self.oracle.key_value_heads
        key, value = key[:, ::repeats], value[:, ::repeats]
        lengths = (query.shape[2], key.shape[2])
        if is_causal:
            visible = torch.ones(1, *lengths, dtype=torch.bool).tril()
        elif attn_mask is None:
            visible = torch.ones(1, *lengths, dtype=torch.bool)
        else:
            assert attn_mask.dtype == torch.bool, "the hand-written models pass boolean masks to SDPA"
            visible = attn_mask[:, 0]
        return self.oracle.attend(query, key, value, visible, scale=scale)
