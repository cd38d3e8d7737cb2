"""Two small models and a counter: what every test of the runtime needs."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import msa_compile
from msa_compile import MSAConfig
from msa_compile.kernels.block_sparse_attention import cpu

CONFIG = MSAConfig(block_size=4, topk_blocks=3, dense_below=0)
EVERYTHING = MSAConfig(block_size=4, topk_blocks=64, dense_below=0)  # sparse ops that select every block
LAYERS = 2
VOCAB = 50


class Attention(nn.Module):
    """Grouped-query attention with a graph break where a test wants one."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, break_at: str = "") -> None:
        super().__init__()
        self.heads, self.groups, self.dim, self.break_at = heads, groups, width // heads, break_at
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, groups * self.dim)
        self.v = nn.Linear(width, groups * self.dim)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(batch, length, self.groups, self.dim).transpose(1, 2)
        v = self.v(x).view(batch, length, self.groups, self.dim).transpose(1, 2)
        if self.break_at == "before attention":
            torch._dynamo.graph_break()
        if self.break_at == "after softmax":
            y = self.eager(q, k, v, length)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if self.break_at == "after attention":
            torch._dynamo.graph_break()
        return self.o(y.transpose(1, 2).reshape(batch, length, width))

    def eager(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = (q @ k.transpose(-1, -2) * self.dim**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        torch._dynamo.graph_break()
        return weights @ v


class Block(nn.Module):
    def __init__(self, break_at: str = "") -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(32), Attention(break_at=break_at), nn.Linear(32, 32)
        self.break_at = break_at

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        if self.break_at == "in block":
            torch._dynamo.graph_break()
        return x + self.mlp(x)


class Small(nn.Module):
    """A hand-written model; brings no dummy inputs."""

    def __init__(self, breaks: tuple[str, ...] = ("",) * LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(Block(where) for where in breaks)
        self.head = nn.Linear(32, VOCAB)
        self.break_at = breaks[0]

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
            if self.break_at == "in model":
                torch._dynamo.graph_break()
        return self.head(x) * scale


def small(*breaks: str, seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small(breaks or ("",) * LAYERS).eval()


def llama(seed: int = 0, layers: int = LAYERS) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(length: int = 37, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def sparse(model: nn.Module, config: MSAConfig = CONFIG, **options: object) -> nn.Module:
    """``model`` sparsified, its sites found now."""
    if isinstance(model, Small):
        options.setdefault("example_inputs", (tokens(),))
    return msa_compile.sparsify(model, config, inner="eager", **options)


class OpCount:
    """How often the sparse attention op really ran."""

    def __init__(self) -> None:
        self.total = 0

    def take(self) -> int:
        """The count since the last time."""
        total, self.total = self.total, 0
        return total


@contextlib.contextmanager
def counted_ops() -> Iterator[OpCount]:
    count = OpCount()
    original = cpu.block_sparse_attention

    def counting(*args: object, **kwargs: object) -> Tensor:
        count.total += 1
        return original(*args, **kwargs)

    with mock.patch.object(cpu, "block_sparse_attention", counting):
        yield count
