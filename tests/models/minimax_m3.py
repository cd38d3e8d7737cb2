"""MiniMax-M3 of transformers, tiny: the public reference of MSA, and its attention without an indexer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.zoo import VOCAB

m3 = pytest.importorskip(
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl", reason="this transformers has no MiniMax-M3"
)
BLOCK_SIZE, TOPK, GROUPS, HIDDEN = 8, 3, 2, 32


def config_of(**changes: Any) -> Any:
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    layers = changes.get("num_hidden_layers", 1)
    settings = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": layers,
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "dense_intermediate_size": 32,
        "index_n_heads": GROUPS,
        "index_head_dim": 16,
        "index_block_size": BLOCK_SIZE,
        "index_topk_blocks": TOPK,
        "layer_types": ["minimax_m3_sparse"] * layers,
        "mlp_layer_types": ["dense"] * layers,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "attn_implementation": "sdpa",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return MiniMaxM3VLTextConfig(**{**settings, **changes})


def with_weights(module: nn.Module) -> Any:
    """Random weights that depend on a parameter's name alone, and are large enough to choose blocks decidedly."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else 0.2, generator=generator)
    return module.eval()


class GroupedAttention(m3.MiniMaxM3VLAttention):  # type: ignore[misc, name-defined]
    """The attention of a layer as a grouped-query model has it: without indexer, and without a name for one."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.indexer

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        rows = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*rows, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key, value = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2), value.transpose(1, 2)
        query, key = m3.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(*rows, -1)), None
