"""The reference from outside: the indexer of MiniMax-M3 in transformers selects the same blocks for real tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from msa_compile.kernels import select_blocks

m3 = pytest.importorskip(
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl", reason="this transformers has no MiniMax-M3"
)
LENGTH, BLOCK_SIZE, TOPK, GROUPS, WIDTH = 100, 8, 4, 2, 16


def build_indexer(local_blocks: int) -> Any:
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    config = MiniMaxM3VLTextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=GROUPS,
        num_hidden_layers=1,
        head_dim=WIDTH,
        rotary_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        index_n_heads=GROUPS,
        index_head_dim=WIDTH,
        index_block_size=BLOCK_SIZE,
        index_topk_blocks=TOPK,
        index_local_blocks=local_blocks,
        layer_types=["minimax_m3_sparse"],
        mlp_layer_types=["dense"],
    )
    torch.manual_seed(0)
    indexer = m3.MiniMaxM3VLIndexer(config, layer_idx=0)
    # Spread the norms, which start at zero, so that they matter.
    torch.nn.init.normal_(indexer.q_norm.weight, std=0.3)
    torch.nn.init.normal_(indexer.k_norm.weight, std=0.3)
    return indexer, m3.MiniMaxM3VLRotaryEmbedding(config)


def index_tensors(indexer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the index query and key that the indexer scores, `[B, Hkv, T, D]` and `[B, 1, T, D]`."""
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(indexer, name).register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
        for name in ("q_norm", "k_norm")
    ]
    positions = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
    indexer(hidden, rope, None, positions)
    for hook in hooks:
        hook.remove()
    return m3.apply_rotary_pos_emb(seen["q_norm"].transpose(1, 2), seen["k_norm"].transpose(1, 2), *rope)


def as_sets(ids: Tensor) -> list[frozenset[int]]:
    return [frozenset(int(block) for block in row if block >= 0) for row in ids.flatten(0, -2)]


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (LENGTH, 61)], ids=["unpadded", "right padded"])
@torch.no_grad()
def test_selected_blocks_are_those_of_minimax_m3(lengths: tuple[int, int], local_blocks: int) -> None:
    indexer, rotary = build_indexer(local_blocks)
    hidden = torch.randn(2, LENGTH, 32)
    positions = torch.arange(LENGTH).expand(2, -1)
    rope = rotary(hidden, positions)
    index_query, index_key = index_tensors(indexer, hidden, rope)
    theirs = indexer(hidden, rope, None, positions)
    ours = select_blocks(
        index_query,
        index_key,
        block_size=BLOCK_SIZE,
        topk=TOPK,
        local_blocks=local_blocks,
        key_end=torch.tensor(lengths),
    )
    choices = 0
    for row, length in enumerate(lengths):
        expected = as_sets(theirs[row, :, :length])
        assert as_sets(ours[row, :, :length]) == expected
        choices += len(set(expected))
    # Not only the blocks that everyone must choose: the scores decided.
    assert choices > 60
