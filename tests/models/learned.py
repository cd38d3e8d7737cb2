"""Models with the learned indexer, and its oracle: the branch run eagerly on what the layer was given."""

import contextlib
import copy

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import msa_compile
from models import handwritten
from models.oracle import BlockOracle
from models.subject import BLOCK_SIZE, TOPK, OpCalls, Run, tokens
from models.zoo import ZOO
from msa_compile import MSAConfig
from msa_compile.indexer import IndexBranch

LEARNED = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=TOPK, dense_below=0, indexer="learned")
# How each family hands its attention the hidden state, and what RoPE makes of heads [B, H, T, D].
_GIVEN = {
    "llama": lambda args, kwargs: (kwargs["hidden_states"], kwargs["position_embeddings"]),
    "qwen3": lambda args, kwargs: (kwargs["hidden_states"], kwargs["position_embeddings"]),
    "meta_llama": lambda args, kwargs: (args[0], args[2]),
    "cat": lambda args, kwargs: (args[0], None),
}


def turn(name, heads, positions):
    """The family's own RoPE."""
    if name == "cat":
        return heads
    if name == "meta_llama":
        rows = heads.query.transpose(1, 2), heads.key.transpose(1, 2)
        query, key = handwritten.apply_rotary_emb(*rows, positions)
        return query.transpose(1, 2), key.transpose(1, 2)
    return apply_rotary_pos_emb(heads.query, heads.key, *positions)


class LearnedOracle(BlockOracle):
    """Chooses blocks by index branches that it runs itself; whole sequences only."""

    def __init__(self, name, topk, branches):
        super().__init__(BLOCK_SIZE, topk, ZOO[name].key_value_heads)
        self.name, self.branches, self.token_scores = name, branches, None

    def choose(self, token_scores, visible):
        assert self.token_scores.shape == token_scores.shape
        return super().choose(self.token_scores, visible)

    @contextlib.contextmanager
    def in_place_of(self, model):
        def before(module, args, kwargs):
            hidden, positions = _GIVEN[self.name](args, kwargs)
            heads = self.branches[module](hidden)
            query, key = (heads.query, heads.key) if positions is None else turn(self.name, heads, positions)
            self.token_scores = query.float() @ key.float().transpose(-1, -2)

        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in self.branches]
        try:
            with super().in_place_of(model):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def example_inputs(name):
    """What finds the sites of a hand-written model at once."""
    calls = ZOO[name].calls.__name__
    given = {"CallAtStart": (tokens(2, 13), 0), "CallWithPast": (tokens(2, 13), torch.ones(2, 13, dtype=torch.long))}
    return given.get(calls)


def sharpen(model, seed=3):
    """Weights of index branches that choose decidedly, as a trained one does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, IndexBranch):
                for weight in module.weights():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


class LearnedSubject:
    """One model untouched, sparsified with index branches, and with its attention given to their oracle."""

    def __init__(self, name: str) -> None:
        self.name, self.entry = name, ZOO[name]
        self._dense = self.entry.build()
        options = {"inner": "eager", "example_inputs": example_inputs(name)}
        self.model: nn.Module = msa_compile.sparsify(copy.deepcopy(self._dense), LEARNED, **options)
        sharpen(self.model)
        self.ops: OpCalls | None = None

    @property
    def branches(self) -> dict[nn.Module, IndexBranch]:
        """The branch of each attention of the untouched model."""
        found = [(path, module) for path, module in self.model.named_modules() if isinstance(module, IndexBranch)]
        return {self._dense.get_submodule(path.removesuffix(".indexer")): branch for path, branch in found}

    @property
    def dense(self) -> Run:
        return Run(self._dense, self.entry, lambda forwards: contextlib.nullcontext())

    @property
    def sparse(self) -> Run:
        ops, sites = self.ops, self.entry.sparse_sites
        assert ops is not None
        return Run(self.model, self.entry, lambda forwards: ops.expecting(forwards * sites))

    def oracle(self, topk: int = TOPK) -> Run:
        @contextlib.contextmanager
        def checking(forwards):
            oracle = LearnedOracle(self.name, topk, self.branches)
            with oracle.in_place_of(self._dense):
                yield
            assert oracle.calls == forwards * self.entry.sparse_sites

        return Run(self._dense, self.entry, checking)
