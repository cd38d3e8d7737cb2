"""Caches that are not a tensor a layer: all layers and values in one, rolling ones that drop tokens, and a ring.

Each is fed a prompt, single tokens and a chunk, past what a rolling cache keeps. The oracle is the model itself run
eagerly, its blocks chosen by index keys that it keeps as the model keeps its keys.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msa_compile
from models.learned import sharpen
from models.oracle import BlockOracle
from models.subject import EXACT, tokens
from msa_compile import MSAConfig
from msa_compile.kernels.select_blocks import missed_selections

HEADS, GROUPS, HEAD_DIM, WIDTH, ROOM, KEPT = 8, 2, 8, 64, 40, 16
PIECES = [10, 1, 1, 4, *[1] * 10]  # no chunk goes round a ring: its queries would not stand at slots in order
IDS = tokens(2, sum(PIECES))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(WIDTH, heads * HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)
        )

    def forward(self, x, mask, keep):
        q, k, v = (part(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = keep(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """`model(ids, at, cache)` gives logits, and the next call's cache; `at` is the place of the first token, or all."""

    def __init__(self, layers=1):
        super().__init__()
        self.embed, self.head = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, 100)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    @staticmethod
    def at(first, end):
        return first

    def forward(self, ids, at, cache):
        x, mask, kept = self.embed(ids), self.mask(at, ids.shape[1], cache)[None, None], []
        for number, layer in enumerate(self.layers):

            def keep(k, v, number=number):
                both, entry = self.keep(number, k, v, at, cache)
                kept.append(entry)
                return both

            x = x + layer(x, mask, keep)
        return self.head(x), kept


class Stacked(Model):
    """Keys and values of both layers in one tensor, written by slices."""

    def __init__(self):
        super().__init__(layers=2)

    @staticmethod
    def start():
        return torch.zeros(2, 2, 2, GROUPS, ROOM, HEAD_DIM)

    def mask(self, at, new, cache):
        return torch.arange(at + new) <= torch.arange(at, at + new)[:, None]

    def keep(self, number, k, v, at, cache):
        end = at + k.shape[2]
        cache[number, 0, :, :, at:end] = k
        cache[number, 1, :, :, at:end] = v
        return (cache[number, 0, :, :, :end], cache[number, 1, :, :, :end]), None


class StackedByPosition(Stacked):
    """The same, written at positions and read whole."""

    @staticmethod
    def at(first, end):
        return torch.arange(first, end)

    def mask(self, at, new, cache):
        return torch.arange(ROOM) <= at[:, None]

    def keep(self, number, k, v, at, cache):
        return (cache[number][0].index_copy_(2, at, k), cache[number][1].index_copy_(2, at, v)), None


class RollingAfter(Model):
    """What a call leaves is cut to the last tokens."""

    @staticmethod
    def start():
        return None

    def mask(self, at, new, cache):
        past = 0 if cache is None else min(cache[0][0].shape[2], KEPT)
        return torch.arange(past + new) <= torch.arange(past, past + new)[:, None]

    def keep(self, number, k, v, at, cache):
        if cache is not None:
            k, v = torch.cat([cache[number][0], k], 2), torch.cat([cache[number][1], v], 2)
        return (k, v), (k[:, :, -KEPT:], v[:, :, -KEPT:])


class RollingBefore(RollingAfter):
    """What a call takes is cut to the last tokens."""

    def keep(self, number, k, v, at, cache):
        if cache is not None:
            k, v = (torch.cat([past[:, :, -KEPT:], new], 2) for past, new in zip(cache[number], (k, v), strict=True))
        return (k, v), (k, v)


class Ring(StackedByPosition):
    """A buffer whose slots are written again and again."""

    def __init__(self):
        Model.__init__(self)

    @staticmethod
    def start():
        return torch.zeros(2, 2, GROUPS, KEPT, HEAD_DIM)

    def mask(self, at, new, cache):
        held = at[-1] - (at[-1] - torch.arange(KEPT)) % KEPT  # the place of the token in each slot
        return (held <= at[:, None]) & (held >= 0)

    def keep(self, number, k, v, at, cache):
        return (cache[0].index_copy_(2, at % KEPT, k), cache[1].index_copy_(2, at % KEPT, v)), None


class KeepingOracle(BlockOracle):
    """Scores with the branches' own queries and keys; keys go through the model's own `keep`, into a cache apart."""

    def __init__(self, model, branches, topk):
        super().__init__(4, topk, GROUPS)
        self.model, self.branches, self.cache, self.kept = model, branches, model.start(), []

    def choose(self, token_scores, visible):
        return super().choose(self.token_scores, visible)

    @contextlib.contextmanager
    def scoring(self, at):
        def before(layer, args):
            number = list(self.model.layers).index(layer)
            heads = self.branches[number](args[0])
            key = heads.key.expand(-1, GROUPS, -1, -1)  # as many heads as the model's cache has
            (key, _), entry = self.model.keep(number, key, key, at, self.cache)
            self.kept.append(entry)
            self.token_scores = heads.query @ key[:, :1].transpose(-1, -2)

        hooks, self.kept = [layer.register_forward_pre_hook(before) for layer in self.model.layers], []
        try:
            with self.in_place_of(self.model):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.cache = self.cache if isinstance(self.cache, torch.Tensor) else self.kept


def build(kind):
    torch.manual_seed(0)
    model = kind().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25)
    return model


def fed(model, around=None):
    """Logits of all pieces."""
    cache, first, logits = model.start(), 0, []
    for piece in IDS.split(PIECES, dim=1):
        end = first + piece.shape[1]
        at = model.at(first, end)
        with contextlib.nullcontext() if around is None else around(at):
            out, kept = model(piece.contiguous(), at, cache)
        cache, first = cache if isinstance(cache, torch.Tensor) else kept, end
        logits.append(out)
    return torch.cat(logits, dim=1)


def sparse(kind, topk):
    config = MSAConfig(block_size=4, topk_blocks=topk, dense_below=0, indexer="learned")
    example = (IDS[:, :10].contiguous(), kind.at(0, 10), kind.start())
    model = msa_compile.sparsify(build(kind), config, inner="eager", example_inputs=example)
    sharpen(model)
    return model


KINDS = [Stacked, StackedByPosition, RollingAfter, pytest.param(RollingBefore, marks=pytest.mark.slow), Ring]


@pytest.mark.parametrize("kind", KINDS)
def test_few_blocks_are_those_of_index_keys_that_are_kept_as_the_keys_are(kind, ops):
    model, plain, missed = sparse(kind, 2), build(kind), missed_selections.total()
    oracle = KeepingOracle(plain, [layer.indexer for layer in model.layers], 2)
    expected = fed(plain, oracle.scoring)
    with ops.expecting(len(PIECES) * len(plain.layers)):
        found = fed(model)
    assert (found - expected).abs().max() < EXACT
    assert (found - fed(plain)).abs().max() > 1e-2, "so few blocks must show"
    assert missed_selections.total() == missed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_everything_gives_the_dense_logits(kind, ops):
    model = sparse(kind, 16)
    with ops.expecting(len(PIECES) * len(model.layers)):
        found = fed(model)
    assert (found - fed(build(kind))).abs().max() < EXACT
