"""Every causal language model of transformers, small enough to run in a second: config, weights, how it is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 128
QUERY_HEADS, KEY_VALUE_HEADS, HEAD_DIM, LAYERS = 8, 2, 16, 2
WINDOW = 8
MOST_PARAMETERS = 50e6

# The names that configs have for a size, and the small value that it gets.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), QUERY_HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads"), QUERY_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), KEY_VALUE_HEADS),
    "head_dim": HEAD_DIM,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "sliding_window": WINDOW,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # tied, a random model repeats its last token and hides what attention does
}

# What an architecture needs besides; a dict under a name of a sub-config goes to that sub-config.
_MLA = {
    "num_key_value_heads": QUERY_HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "n_group": 1, "topk_group": 1, "index_head_dim": 16,
    "index_n_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16, "use_mamba_kernels": False}
_QSA = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 1, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "ngram_vocab_size_base": 100,
}  # fmt: skip
_SAM = {"hidden_size": 32, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32}
_HYBRID = ["mamba", "hybrid"]
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
_NOT_FULL = ("sliding_attention", "chunked_attention", "linear_attention", "conv")
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_FULL_SECOND = {"layer_types": ["sliding_attention", "full_attention"]}
_NO_WINDOW = {"sliding_window": None}  # these have one in every layer or in none
_MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "youtu"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "hy_v4"), _MLA),
    **dict.fromkeys(("minimax", "ministral3", "mistral", "mixtral", "phi3", "phi4_multimodal"), _NO_WINDOW),
    **dict.fromkeys(("phimoe", "starcoder2"), _NO_WINDOW),
    "deepseek_v4": {"layer_types": ["sliding_attention", "compressed_sparse_attention"]},
    "bailing_hybrid": {**_MLA, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 128, "cross_attn_k": 1},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        **_FULL_SECOND,
        "rope_parameters": dict.fromkeys(_FULL_SECOND["layer_types"], _ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KEY_VALUE_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": {**_MLA, "per_layer_config": {}}},
    "dots3_note_text": _MLA,
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4},
    "falcon_h1": _MAMBA,
    "fuyu": {"text_config": {"model_type": "persimmon", "head_dim": 8}},
    "gemma3": {"vision_config": _SIGLIP, "text_config": _FULL_SECOND, "mm_tokens_per_image": 4},
    "gemma3n_text": {**_FULL_SECOND, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}, "vision_config": _SAM},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_MLA, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48), "attn_layers": ("local", "lsh")},
    "xlm": {"emb_dim": 64},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_MAMBA, "layers_block_type": _HYBRID, "n_mamba_heads": 2, "attention_head_dim": 16},
    "zamba2": {**_MAMBA, "layers_block_type": _HYBRID, "n_mamba_heads": 8, "mamba_d_state": 16},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
}


class Causal:
    """A tiny random causal language model.

    Attributes:
        name: Its ``model_type``.
        model: The model, in evaluation mode.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        config_class = _classes()[name]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        config = _config(config_class, _MORE.get(name, {}))
        if model_class.config_class is not config_class:
            # The text part of a multimodal config.
            config = config.decoder if "decoder" in config_class.sub_configs else config.get_text_config()
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size / 1e6:.0f} million parameters, legal is {MOST_PARAMETERS / 1e6:.0f}")
        torch.manual_seed(0)
        self.model: nn.Module = model_class(config).eval()

    def __call__(self, ids: Tensor, **more: Any) -> Tensor:
        """Logits ``[B, T, V]`` of token ids ``[B, T]``."""
        logits: Tensor = self.model(input_ids=ids, **more).logits
        return logits


def names() -> list[str]:
    """Every ``model_type`` that transformers maps to a causal language model."""
    return sorted(_classes())


def _classes() -> dict[str, type[PreTrainedConfig]]:
    return {config_class.model_type: config_class for config_class in MODEL_FOR_CAUSAL_LM_MAPPING}


def _config(config_class: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    fields = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    given = {name: value for name, value in _SMALL.items() if name in fields}
    for name, sub_class in config_class.sub_configs.items():
        part = more.get(name, {})
        if dataclasses.is_dataclass(sub_class):
            given[name] = _config(sub_class, part)  # type: ignore[arg-type]
        elif part:
            given[name] = {**_SMALL, **part}
    given.update({name: value for name, value in more.items() if name not in config_class.sub_configs})
    config = config_class(**given)
    kinds = getattr(config, "layer_types", None)
    if "layer_types" in fields and "layer_types" not in more and kinds and kinds[-1] in _NOT_FULL:
        # Two layers of a long pattern are often all windows; the last is to be a full one.
        config = config_class(**given, layer_types=[*kinds[: LAYERS - 1], "full_attention"])
    return config
