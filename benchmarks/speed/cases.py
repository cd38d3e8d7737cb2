"""The registry of kernel cases: what is called, against what, at which lengths, and what the gate asks of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.speed import gate
from benchmarks.speed import setting as work_of
from benchmarks.speed.baselines import DEFAULT, Attend, decode_baselines, prefill_baselines
from benchmarks.speed.gate import Operands, Ops, Verdict
from benchmarks.speed.setting import Setting, Work

Call = Callable[[], Any]
K = 1024


@dataclass(frozen=True)
class Problem:
    """One case at one length.

    Attributes:
        sparse: The call under test.
        baselines: Dense calls of the same meaning; the first is what a user gets.
        check: Judges the result of ``sparse`` at this very length.
        sparse_work, dense_work: Arithmetic and traffic.
        theory: What sparse would gain if both ran at the same rate: the ratio of FLOPs, in decode of bytes.
    """

    sparse: Call
    baselines: Mapping[str, Call]
    check: Callable[[Any], Verdict]
    sparse_work: Work
    dense_work: Work
    theory: float


class Build(Protocol):
    """Makes the problem of a case."""

    def __call__(self, setting: Setting, length: int, indexer: str, ops: Ops, *, flex: bool) -> Problem:
        """At one length."""


@dataclass(frozen=True)
class Case:
    """A kind of call.

    Attributes:
        name: On the command line.
        title: What is timed.
        lengths: Default lengths in tokens.
        power: Dense time grows with the length to this power; what is too long to measure is extrapolated by it.
        indexers: ``"keys"`` scores the keys themselves, ``"learned"`` one index key that all groups share.
        build: Makes the problem at one length.
        gate: Judges the implementation at a short length.
        in_a_row: Calls that a turn consists of. With one, the caches hold what the call before left there.
    """

    name: str
    title: str
    lengths: tuple[int, ...]
    power: int
    indexers: tuple[str, ...]
    build: Build
    gate: Callable[[Setting, Ops], Verdict]
    in_a_row: int = 1


def _operands(setting: Setting, length: int, queries: int, indexer: str = "keys") -> Operands:
    return gate.make_operands(
        heads=(setting.query_heads, setting.key_value_heads, setting.head_dim),
        length=length,
        queries=queries,
        dtype=setting.dtype,
        device=setting.device,
        shared_index_key=indexer == "learned",
    )


def _small(setting: Setting, ops: Ops, *, decode: bool, indexer: str = "keys") -> Verdict:
    return gate.check_small(
        ops,
        heads=(setting.query_heads, setting.key_value_heads, setting.head_dim),
        dtype=setting.dtype,
        device=setting.device,
        block_size=setting.block_size,
        decode=decode,
        shared_index_key=indexer == "learned",
    )


def _bound(attends: Mapping[str, Attend], operands: Operands) -> dict[str, Call]:
    q, k, v = operands.query, operands.key, operands.value
    return {name: lambda attend=attend: attend(q, k, v) for name, attend in attends.items()}  # type: ignore[misc]


def _attention(
    setting: Setting, operands: Operands, ops: Ops, attends: Mapping[str, Attend], dense: Work, sparse: Work
) -> Problem:
    """Selection and attention against dense attention."""
    budget = {"block_size": setting.block_size, "topk": setting.topk}

    def check(output: Tensor) -> Verdict:
        ids = ops.select(operands.index_query, operands.index_key, **budget)
        return gate.check_rows(operands, ids, output, **budget)

    is_decode = operands.query.shape[2] == 1
    return Problem(
        sparse=lambda: gate.call_whole(ops, operands, **budget),
        baselines=_bound(attends, operands),
        check=check,
        sparse_work=sparse,
        dense_work=dense,
        theory=dense.bytes / sparse.bytes if is_decode else dense.flops / sparse.flops,
    )


def _build_prefill(setting: Setting, length: int, indexer: str, ops: Ops, *, flex: bool) -> Problem:
    dense, sparse = work_of.dense_prefill(setting, length), work_of.sparse_prefill(setting, length)
    operands = _operands(setting, length, length, indexer)
    return _attention(setting, operands, ops, _prefill_attends(setting, flex), dense, sparse)


@functools.cache
def _prefill_attends(setting: Setting, flex: bool) -> dict[str, Attend]:
    # Kept, because flex_attention is compiled.
    return usable(setting, prefill_baselines(setting, flex=flex))


def _build_decode(setting: Setting, length: int, indexer: str, ops: Ops, *, flex: bool) -> Problem:
    index_heads = setting.key_value_heads if indexer == "keys" else 1
    dense, sparse = work_of.dense_decode(setting, length), work_of.sparse_decode(setting, length, index_heads)
    operands = _operands(setting, length, 1, indexer)
    return _attention(setting, operands, ops, usable(setting, decode_baselines(setting), decode=True), dense, sparse)


def _build_select(setting: Setting, length: int, indexer: str, ops: Ops, *, flex: bool) -> Problem:
    operands = _operands(setting, length, length, indexer)
    budget = {"block_size": setting.block_size, "topk": setting.topk}
    work = work_of.index_prefill(setting, length)

    return Problem(
        sparse=lambda: ops.select(operands.index_query, operands.index_key, **budget),
        baselines={"plain PyTorch": lambda: plain_selection(operands.index_query, operands.index_key, **budget)},
        check=lambda ids: gate.check_rows(operands, ids, None, **budget),
        sparse_work=work,
        dense_work=Work(2 * work.flops, work.bytes),
        theory=2.0,
    )


def plain_selection(index_query: Tensor, index_key: Tensor, *, block_size: int, topk: int) -> Tensor:
    """Selection as one would write it in PyTorch: product, mask, maximum of each block, ``topk``; in strips."""
    length = index_key.shape[2]
    found = []
    pad = -length % block_size
    keys = torch.nn.functional.pad(index_key, (0, 0, 0, pad)).transpose(-1, -2)
    slots = torch.arange(length + pad, device=index_key.device)
    for start in range(0, length, 512):
        strip = index_query[:, :, start : start + 512]
        rows = torch.arange(start, start + strip.shape[2], device=index_key.device)
        scores = (strip @ keys).masked_fill(slots > rows[:, None], -torch.inf)
        best = scores.unflatten(-1, (-1, block_size)).amax(-1)
        best.scatter_(-1, (rows // block_size)[:, None].expand(*best.shape[:3], 1), torch.inf)
        found.append(best.topk(min(topk, best.shape[-1]), dim=-1).indices)
    return torch.cat(found, 2)


def _build_backward(setting: Setting, length: int, indexer: str, ops: Ops, *, flex: bool) -> Problem:
    operands = _operands(setting, length, length)
    leaves = [tensor.requires_grad_() for tensor in (operands.query, operands.key, operands.value)]
    weight = torch.ones_like(operands.query)

    def both_ways(attend: Callable[..., Tensor]) -> Call:
        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(attend(*leaves), leaves, weight)

        return call

    def attend_sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.whole(q, k, v, is_causal=True, block_size=setting.block_size, topk_blocks=setting.topk)

    # Five products backward for two forward; the selection has no gradient.
    dense, sparse = work_of.dense_prefill(setting, length), work_of.sparse_prefill(setting, length)
    index = work_of.index_prefill(setting, length).flops
    dense_work = Work(3.5 * dense.flops, 3 * dense.bytes)
    sparse_work = Work(index + 3.5 * (sparse.flops - index), 3 * sparse.bytes)
    return Problem(
        sparse=both_ways(attend_sparse),
        baselines={name: both_ways(attend) for name, attend in _prefill_attends(setting, False).items()},
        check=lambda grads: Verdict(() if all(bool(g.isfinite().all()) for g in grads) else ("not finite",)),
        sparse_work=sparse_work,
        dense_work=dense_work,
        theory=dense_work.flops / sparse_work.flops,
    )


def _gate_backward(setting: Setting, ops: Ops) -> Verdict:
    heads = (setting.query_heads, setting.key_value_heads, setting.head_dim)
    return gate.check_gradients(
        ops, heads=heads, dtype=setting.dtype, device=setting.device, block_size=setting.block_size
    )


def usable(setting: Setting, attends: Mapping[str, Attend], *, decode: bool = False) -> dict[str, Attend]:
    """The baselines that run here and are right; the user's own always is one."""
    operands = _operands(setting, 192, 1 if decode else 192)
    expected = gate.attend_dense(operands)
    found = {}
    for name, attend in attends.items():
        try:
            error = gate.relative_error(attend(operands.query, operands.key, operands.value), expected)
        except (RuntimeError, ValueError):
            if name == DEFAULT:
                raise
            continue
        if name == DEFAULT or error <= gate.TOLERANCE[setting.dtype]:
            found[name] = attend
    return found


PREFILL = tuple(K << power for power in range(1, 8))
DECODE = (16 * K, 32 * K, 64 * K, 128 * K, 256 * K)

_OF_DECODE = (
    DECODE,
    1,
    ("keys", "learned"),
    _build_decode,
    lambda setting, ops: gate.all_green(
        _small(setting, ops, decode=True, indexer=indexer) for indexer in ("keys", "learned")
    ),
)

CASES = {
    case.name: case
    for case in (
        Case(
            "prefill",
            "selection and attention of a prompt",
            PREFILL,
            2,
            ("keys",),
            _build_prefill,
            lambda setting, ops: _small(setting, ops, decode=False),
        ),
        Case("decode", "selection and attention of one new token after so many", *_OF_DECODE),
        Case(
            "decode_again", "the same, twenty calls in a turn, so that caches hold what fits", *_OF_DECODE, in_a_row=20
        ),
        Case(
            "select",
            "selection alone, against product, maximum and topk in plain PyTorch",
            (4 * K, 8 * K, 16 * K, 32 * K, 64 * K),
            2,
            ("keys",),
            _build_select,
            lambda setting, ops: _small(setting, ops, decode=False),
        ),
        Case(
            "backward",
            "forward and backward of a prompt",
            (4 * K, 8 * K),
            2,
            ("keys",),
            _build_backward,
            _gate_backward,
        ),
    )
}
