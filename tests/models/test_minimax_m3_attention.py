"""The reference from outside: with MiniMax-M3's indexer weights an attention of ours is MiniMax-M3's attention."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import msa_compile
from models.minimax_m3 import BLOCK_SIZE, HIDDEN, TOPK, GroupedAttention, config_of, m3, with_weights
from models.subject import OpCalls, difference
from msa_compile import MSAConfig
from msa_compile.kernels.select_blocks import missed_selections

LENGTH, ROOM = 61, 66
LEARNED = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=TOPK, dense_below=0, indexer="learned")
UNPADDED = torch.ones(2, LENGTH, dtype=torch.bool)
RIGHT_PADDED = torch.arange(LENGTH) < torch.tensor([[LENGTH], [41]])


class Layers:
    """The reference's attention, an attention of ours with its weights, and the same left dense."""

    def __init__(self) -> None:
        self.config = config_of()
        self.rope = m3.MiniMaxM3VLRotaryEmbedding(self.config)
        self.theirs = with_weights(m3.MiniMaxM3VLAttention(self.config, 0))
        self.dense = with_weights(GroupedAttention(self.config, 0))
        self.ours = msa_compile.sparsify(with_weights(GroupedAttention(self.config, 0)), LEARNED, inner="eager")
        self.attend(self.ours, hidden_states(), UNPADDED)  # finds the site
        self.ours.load_state_dict(self.theirs.state_dict(), strict=True)

    def attend(self, layer: nn.Module, hidden: Tensor, real: Tensor, start: int = 0, cache: object = None) -> Tensor:
        """Attention output of tokens that stand at `start`; `real [B, T]` says which of all tokens are no padding."""
        length = hidden.shape[1]
        places = torch.arange(start, start + length).expand(2, -1)
        room = ROOM if isinstance(cache, transformers.StaticCache) else start + length
        seen = nn.functional.pad(real, (0, ROOM - LENGTH))[:, :room]
        mask = seen[:, None, None] & (torch.arange(room) <= places[:, None, :, None])
        out: Tensor = layer(
            hidden_states=hidden,
            position_embeddings=self.rope(hidden, places),
            attention_mask=mask,
            past_key_values=cache,
            position_ids=places,
        )[0]
        return out


def hidden_states() -> Tensor:
    return torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def layers() -> Layers:
    with torch.no_grad():
        return Layers()


@pytest.mark.parametrize("real", [UNPADDED, RIGHT_PADDED], ids=["unpadded", "right padded"])
def test_a_prefill_gives_the_references_attention(layers: Layers, real: Tensor, ops: OpCalls) -> None:
    theirs = layers.attend(layers.theirs, hidden_states(), real)
    with ops.expecting(1):
        ours = layers.attend(layers.ours, hidden_states(), real)
    assert difference(ours, theirs, real) < 1e-4
    assert difference(ours, layers.attend(layers.dense, hidden_states(), real), real) > 1e-2, "few blocks must show"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("real", [UNPADDED, RIGHT_PADDED], ids=["unpadded", "right padded"])
def test_chunks_and_decoding_give_the_references_attention(layers: Layers, real: Tensor, kind: str) -> None:
    caches = [
        transformers.DynamicCache(config=layers.config)
        if kind == "dynamic"
        else transformers.StaticCache(layers.config, ROOM)
        for _ in range(2)
    ]
    missed = missed_selections.copy()
    start = 0
    for length in (40, 1, 1, 13, 1, 5):
        piece = hidden_states()[:, start : start + length]
        theirs, ours = (
            layers.attend(layer, piece, real, start, cache)
            for layer, cache in zip((layers.theirs, layers.ours), caches, strict=True)
        )
        assert difference(ours, theirs, real[:, start : start + length]) < 1e-4
        start += length
    assert start == LENGTH
    assert missed_selections == missed, "every selection is by index keys"
