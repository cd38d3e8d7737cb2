"""One model three times: untouched, sparsified, and with its attention given to the oracle."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch

import msa_compile
from models.oracle import BlockOracle
from models.zoo import VOCAB, ZOO, Entry
from msa_compile import MSAConfig
from msa_compile.kernels.block_sparse_attention import cpu as attend_cpu
from msa_compile.kernels.select_blocks import cpu as select_cpu

BLOCK_SIZE, TOPK = 4, 5
BUDGET = BLOCK_SIZE * TOPK
EXACT = 1e-4  # float32, logits of a size of about 2


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def left_padding(length, *pads):
    """`[B, length]`: row `b` begins with `pads[b]` padded places."""
    return (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


def difference(left, right, mask=None):
    """The largest difference at real tokens."""
    assert left.shape == right.shape
    gap = (left - right).abs().amax(-1)
    return float((gap if mask is None else gap[mask.bool()]).max())


class OpCalls:
    """How often each sparse op ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.selections = self.attentions = 0
        select, attend = select_cpu.select_blocks, attend_cpu.block_sparse_attention

        def counted_select(*args, **kwargs):
            self.selections += 1
            return select(*args, **kwargs)

        def counted_attend(*args, **kwargs):
            self.attentions += 1
            return attend(*args, **kwargs)

        monkeypatch.setattr(select_cpu, "select_blocks", counted_select)
        monkeypatch.setattr(attend_cpu, "block_sparse_attention", counted_attend)

    @contextlib.contextmanager
    def expecting(self, count: int) -> Iterator[None]:
        """Fail unless each op runs `count` times inside."""
        before = (self.selections, self.attentions)
        yield
        ran = (self.selections - before[0], self.attentions - before[1])
        assert ran == (count, count), f"the sparse ops ran {ran} times, expected {count} each"


class Run:
    """A model and its calling convention; every forward is checked to attend as often as it must."""

    def __init__(self, model, entry: Entry, checking) -> None:
        self.model, self.calls, self.checking = model, entry.calls, checking

    def whole(self, ids, mask=None):
        """Logits of one call."""
        with self.checking(1):
            return self.calls.whole(self.model, ids, mask)

    def pieces(self, ids, sizes, cache, mask=None, length=None):
        """Logits of `ids` fed in pieces of `sizes` through one cache."""
        assert sum(sizes) == ids.shape[1]
        feed = self.calls.start(self.model, cache, ids.shape[0], length or ids.shape[1] + 3)
        logits, end = [], 0
        for piece in ids.split(list(sizes), dim=1):
            end += piece.shape[1]
            # Contiguous: Dynamo guards on the strides of a view, and would compile again where one equals a length.
            with self.checking(1):
                logits.append(feed(piece.contiguous(), None if mask is None else mask[:, :end].contiguous()))
        return torch.cat(logits, dim=1)

    def generate(self, ids, steps, cache, mask=None):
        """`ids` and `steps` greedy tokens."""
        with self.checking(steps):
            return self.calls.generate(self.model, ids, steps, cache, mask)


class Subject:
    """One model three times: untouched, sparsified, and with its attention given to the oracle."""

    def __init__(self, name: str) -> None:
        self.name, self.entry = name, ZOO[name]
        self._dense = self.entry.build()
        self._sparse = None
        self.ops: OpCalls | None = None

    @property
    def dense(self) -> Run:
        return Run(self._dense, self.entry, lambda forwards: contextlib.nullcontext())

    @property
    def sparse(self) -> Run:
        if self._sparse is None:
            config = MSAConfig(block_size=BLOCK_SIZE, topk_blocks=TOPK, dense_below=0)
            self._sparse = msa_compile.sparsify(copy.deepcopy(self._dense), config, inner="eager")
        ops, sites = self.ops, self.entry.sparse_sites
        assert ops is not None, "the `subject` fixture counts the ops"
        return Run(self._sparse, self.entry, lambda forwards: ops.expecting(forwards * sites))

    @property
    def oracle(self) -> Run:
        return self.oracle_with(TOPK)

    def oracle_with(self, topk: int) -> Run:
        @contextlib.contextmanager
        def checking(forwards):
            oracle = BlockOracle(BLOCK_SIZE, topk, self.entry.key_value_heads)
            with oracle.in_place_of(self._dense):
                yield
            assert oracle.calls == forwards * self.entry.sparse_sites
            assert oracle.dense_calls == forwards * (2 - self.entry.sparse_sites)

        return Run(self._dense, self.entry, checking)
