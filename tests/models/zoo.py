"""Tiny random models, and how each family is called. No weights are downloaded; every build is the same."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn

from models import handwritten

VOCAB = 100
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # tied, a random model repeats its last token and hides what attention does
}


def _gemma3():
    kinds = ["sliding_attention", "full_attention"]
    config = tf.Gemma3TextConfig(**_COMMON, head_dim=16, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=16)
    return tf.Gemma3ForCausalLM(config)


def _gpt_oss():
    config = tf.GptOssConfig(**_COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return tf.GptOssForCausalLM(config)


def _gemma2():
    config = tf.Gemma2Config(
        **_COMMON, head_dim=16, sliding_window=8, attn_implementation="eager", attn_logit_softcapping=3.0
    )
    return tf.Gemma2ForCausalLM(config)


def _gpt2():
    config = tf.GPT2Config(
        n_embd=64, n_layer=2, n_head=8, vocab_size=VOCAB, n_positions=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


class CallTransformers:
    """A transformers causal LM, called with what `generate` hands it, so that both use the same compiled graphs."""

    caches = ("dynamic", "static")
    pads = True

    @staticmethod
    def _arguments(model, ids, mask):
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": places,
            "logits_to_keep": 0,
            "use_cache": False,
            "return_dict": True,
        }

    @classmethod
    def whole(cls, model, ids, mask=None):
        """Logits of one call without a cache in sight."""
        if mask is None:
            return model(ids).logits
        return model(**cls._arguments(model, ids, mask)).logits

    @classmethod
    def start(cls, model, cache, batch, length):
        """A function that takes the next tokens, and the mask of all so far, and returns their logits."""
        made = tf.DynamicCache(config=model.config) if cache == "dynamic" else tf.StaticCache(model.config, length)
        total = 0

        def feed(ids, mask=None):
            nonlocal total
            total += ids.shape[1]
            mask = torch.ones(batch, total, dtype=torch.long) if mask is None else mask
            given = {**cls._arguments(model, ids, mask), "use_cache": True}
            return model(**given, past_key_values=made).logits

        return feed

    @classmethod
    def generate(cls, model, ids, steps, cache, mask=None):
        """Greedy tokens from transformers' own `generate`."""
        how = {
            "none": {"use_cache": False},
            "dynamic": {},
            "static": {"cache_implementation": "static", "disable_compile": True},
        }[cache]
        mask = torch.ones_like(ids) if mask is None else mask
        return model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, logits_to_keep=0, **how)


class _Call:
    """A hand-written model."""

    caches: tuple[str, ...] = ()
    pads = False

    @classmethod
    def generate(cls, model, ids, steps, cache, mask=None):
        """Greedy tokens from a plain loop."""
        feed = None if cache == "none" else cls.start(model, cache, ids.shape[0], ids.shape[1] + steps)
        fresh = ids
        for _ in range(steps):
            logits = cls.whole(model, ids, mask) if feed is None else feed(fresh, mask)
            fresh = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fresh], dim=1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(fresh)], dim=1)
        return ids


class CallPlain(_Call):
    """`model(ids)`."""

    @classmethod
    def whole(cls, model, ids, mask=None):
        return model(ids)


class CallAtStart(_Call):
    """`model(ids, start_pos)`, the cache inside the model."""

    caches = ("slices",)

    @classmethod
    def whole(cls, model, ids, mask=None):
        return model(ids, 0)

    @classmethod
    def start(cls, model, cache, batch, length):
        position = 0

        def feed(ids, mask=None):
            nonlocal position
            position += ids.shape[1]
            return model(ids, position - ids.shape[1])

        return feed


class CallAtPositions(_Call):
    """`model(ids, input_pos)` after `model.setup_caches(batch)`."""

    caches = ("buffers",)

    @classmethod
    def whole(cls, model, ids, mask=None):
        return cls.start(model, "buffers", ids.shape[0], ids.shape[1])(ids)

    @classmethod
    def start(cls, model, cache, batch, length):
        model.setup_caches(batch)
        position = 0

        def feed(ids, mask=None):
            nonlocal position
            position += ids.shape[1]
            return model(ids, torch.arange(position - ids.shape[1], position))

        return feed


class CallWithPast(_Call):
    """`logits, past = model(ids, keep, past)`."""

    caches = ("returned",)
    pads = True

    @classmethod
    def whole(cls, model, ids, mask=None):
        return model(ids, torch.ones_like(ids) if mask is None else mask)[0]

    @classmethod
    def start(cls, model, cache, batch, length):
        past, total = None, 0

        def feed(ids, mask=None):
            nonlocal past, total
            total += ids.shape[1]
            keep = torch.ones(batch, total, dtype=torch.long) if mask is None else mask
            logits, past = model(ids, keep, past)
            return logits

        return feed


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        make: Builds it; `build` then gives it weights that make attention sharp.
        calls: How it is called.
        sparse_sites: Attention sites that must become sparse; the others have a sliding window.
        key_value_heads: Hkv.
    """

    make: Callable[[], nn.Module]
    calls: type = CallTransformers
    sparse_sites: int = 2
    key_value_heads: int = 2

    def build(self, seed: int = 0) -> nn.Module:
        """The model, in eval mode, every weight drawn anew.

        At the usual 0.02 all scores are close to 0, attention is close to a mean, and a wrong block would hardly show.
        """
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model


ZOO = {
    "llama": Entry(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_COMMON))),
    "qwen3": Entry(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_COMMON, head_dim=16))),
    "gemma3": Entry(_gemma3, sparse_sites=1),
    "phi3": Entry(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_COMMON))),
    "mixtral": Entry(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_COMMON, num_local_experts=4))),
    "gpt_oss": Entry(_gpt_oss, sparse_sites=1),
    "gemma2": Entry(_gemma2, sparse_sites=1),
    "gpt2": Entry(_gpt2, key_value_heads=8),
    "nanogpt": Entry(handwritten.NanoGPT, CallPlain, key_value_heads=8),
    "nanogpt_slow": Entry(lambda: handwritten.NanoGPT(handwritten.NanoSlowAttention), CallPlain, key_value_heads=8),
    "meta_llama": Entry(handwritten.MetaLlama, CallAtStart),
    "gpt_fast": Entry(handwritten.GPTFast, CallAtPositions),
    "gpt_fast_repeat": Entry(lambda: handwritten.GPTFast(enable_gqa=False), CallAtPositions),
    "index_copy": Entry(lambda: handwritten.GPTFast(write="index_copy"), CallAtPositions),
    "cat": Entry(handwritten.CatModel, CallWithPast),
}
