"""The correctness gate: what is not right is not timed. An oracle in float64 that shares no code with the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import msa_compile
from msa_compile.kernels import select_blocks

# Largest relative error of an output row, and of the scores that a selection may confuse, as a share of the largest.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ROWS = 24


@dataclass(frozen=True)
class Ops:
    """The implementation under test, so that a test of the gate can hand in a wrong one."""

    select: Callable[..., Tensor] = select_blocks
    whole: Callable[..., Tensor] = msa_compile.attention


@dataclass(frozen=True)
class Verdict:
    """Whether numbers may be printed.

    Attributes:
        complaints: What was found wrong; none is green.
        error: Largest relative error of an output row that was looked at; 0 where none was compared.
    """

    complaints: tuple[str, ...] = ()
    error: float = 0.0

    @property
    def is_green(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.complaints

    def __str__(self) -> str:
        if not self.is_green:
            return f"RED: {'; '.join(self.complaints[:3])}"
        return f"green, relative error {self.error:.1e}" if self.error else "green"


@dataclass(frozen=True)
class Operands:
    """The tensors of one call, batch 1; the queries are the newest tokens.

    Attributes:
        query: ``[1, Hq, Tq, D]``.
        key, value: ``[1, Hkv, Tk, D]``.
        index_query: ``[1, Hkv, Tq, D]``.
        index_key: ``[1, 1 or Hkv, Tk, D]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    index_key: Tensor


def make_operands(
    *,
    heads: tuple[int, int, int],
    length: int,
    queries: int,
    dtype: torch.dtype,
    device: torch.device,
    shared_index_key: bool = False,
    seed: int = 0,
) -> Operands:
    """Normal random operands: the selection then has no locality, which is the hard case for a kernel.

    Args:
        heads: ``Hq, Hkv, D``.
        length: ``Tk``.
        queries: ``Tq``.
        dtype: Of all tensors.
        device: Where they are.
        shared_index_key: One index key for all groups, as the learned indexer has; default the keys themselves.
        seed: Of the numbers.
    """
    query_heads, groups, dim = heads
    generator = torch.Generator(device).manual_seed(seed)

    def random(count: int, tokens: int) -> Tensor:
        made = torch.empty(1, count, tokens, dim, dtype=dtype, device=device)
        return made.normal_(generator=generator)

    query, key, value = random(query_heads, queries), random(groups, length), random(groups, length)
    if shared_index_key:
        return Operands(query, key, value, random(groups, queries), random(1, length))
    return Operands(query, key, value, query.unflatten(1, (groups, -1)).mean(2), key)


def check_rows(operands: Operands, ids: Tensor, output: Tensor | None, *, block_size: int, topk: int) -> Verdict:
    """Compare selection and output of sampled queries with the oracle.

    Args:
        operands: What the ops were given.
        ids: What was selected, ``[1, Hkv, Tq, topk]``.
        output: What came out, ``[1, Hq, Tq, D]``; ``None`` where only the selection is judged.
        block_size: Keys in a block.
        topk: Blocks a query.
    """
    queries, keys = operands.query.shape[2], operands.key.shape[2]
    tolerance = TOLERANCE[operands.query.dtype]
    complaints: list[str] = []
    worst = 0.0
    for row in _sampled(queries):
        position = keys - queries + row
        for group in range(operands.key.shape[1]):
            chosen = [int(block) for block in ids[0, group, row] if block >= 0]
            said = _judge_selection(operands, chosen, group, row, position, block_size, topk, tolerance)
            complaints += [f"query {position}, group {group}: {said}"] if said else []
            if output is None:
                continue
            error = _row_error(operands, output, chosen, group, row, position, block_size)
            # Not "error > tolerance": a NaN is wrong too.
            if not error <= tolerance:
                complaints.append(f"query {position}, group {group}: relative error {error:.1e} above {tolerance:.0e}")
            worst = max(worst, error)
    return Verdict(tuple(complaints), worst)


def _sampled(queries: int) -> list[int]:
    """The first and last queries, and some in between, always the same."""
    if queries <= ROWS:
        return list(range(queries))
    generator = torch.Generator().manual_seed(1)
    between = torch.randint(queries, (ROWS - 4,), generator=generator).tolist()
    return sorted({0, 1, queries - 2, queries - 1, *between})


def _judge_selection(
    operands: Operands,
    chosen: list[int],
    group: int,
    row: int,
    position: int,
    block_size: int,
    topk: int,
    tolerance: float,
) -> str:
    local = position // block_size
    if chosen != sorted(set(chosen)) or any(block > local for block in chosen):
        return f"blocks {chosen} are not ascending, or in the future"
    if local not in chosen:
        return "the local block is not selected"
    if len(chosen) != min(topk, local + 1):
        return f"{len(chosen)} blocks are selected, not {min(topk, local + 1)}"
    index_key = operands.index_key[0, min(group, operands.index_key.shape[1] - 1), : position + 1].double()
    scores = index_key @ operands.index_query[0, group, row].double()
    largest = [float(part.max()) for part in scores.split(block_size)]
    left_out = [score for block, score in enumerate(largest) if block not in chosen]
    taken = [score for block, score in enumerate(largest) if block in chosen and block != local]
    if left_out and taken and max(left_out) > min(taken) + tolerance * float(scores.abs().max()):
        return f"a block of score {max(left_out):.6g} is left out, one of {min(taken):.6g} is selected"
    return ""


def _row_error(
    operands: Operands, output: Tensor, chosen: list[int], group: int, row: int, position: int, block_size: int
) -> float:
    """Largest relative error of the heads of a group, against softmax attention to the blocks chosen."""
    slots = torch.arange(position + 1, device=output.device)
    blocks = torch.tensor(chosen, dtype=slots.dtype, device=slots.device)
    slots = slots[torch.isin(slots // block_size, blocks)]
    heads = operands.query.shape[1] // operands.key.shape[1]
    mine = slice(group * heads, (group + 1) * heads)
    query = operands.query[0, mine, row].double()
    key, value = operands.key[0, group, slots].double(), operands.value[0, group, slots].double()
    expected = (query @ key.T * query.shape[-1] ** -0.5).softmax(-1) @ value
    return float(((output[0, mine, row].double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def attend_dense(operands: Operands) -> Tensor:
    """Dense causal attention in float64, ``[1, Hq, Tq, D]``."""
    return _attend_masked(operands.query.double(), operands.key.double(), operands.value.double(), None, 1)


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, block_size: int) -> Tensor:
    """Dense attention under a mask: causal, and with ``ids`` only the blocks selected."""
    queries, keys = query.shape[2], key.shape[2]
    slots = torch.arange(keys, device=query.device)
    visible = (slots <= torch.arange(keys - queries, keys, device=query.device)[:, None])[None]  # [1, Tq, Tk]
    if ids is not None:
        visible = visible & (ids[0, :, :, None, :] == (slots // block_size)[:, None]).any(-1)  # [Hkv, Tq, Tk]
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    if visible.shape[0] > 1:
        visible = visible.repeat_interleave(heads, 0)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Normwise error of a whole tensor."""
    return float((found.double() - expected).norm() / expected.norm())


def check_small(
    ops: Ops,
    *,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    decode: bool = False,
    shared_index_key: bool = False,
) -> Verdict:
    """A short and odd length: with two blocks against the oracle, and with all blocks against dense attention."""
    length = 4 * block_size + block_size // 3 + 1
    blocks = -(-length // block_size)
    operands = make_operands(
        heads=heads,
        length=length,
        queries=1 if decode else length,
        dtype=dtype,
        device=device,
        shared_index_key=shared_index_key,
    )
    few = run_ops(ops, operands, block_size=block_size, topk=2)
    verdict = check_rows(operands, *few, block_size=block_size, topk=2)
    _, whole = run_ops(ops, operands, block_size=block_size, topk=blocks)
    error = relative_error(whole, attend_dense(operands))
    complaints = verdict.complaints
    if not error <= TOLERANCE[dtype]:
        complaints = (*complaints, f"with all blocks it differs from dense attention by {error:.1e}")
    return Verdict(complaints, max(verdict.error, error))


def run_ops(ops: Ops, operands: Operands, *, block_size: int, topk: int) -> tuple[Tensor, Tensor]:
    """What is selected, and what comes out."""
    ids = ops.select(operands.index_query, operands.index_key, block_size=block_size, topk=topk)
    return ids, call_whole(ops, operands, block_size=block_size, topk=topk)


def call_whole(ops: Ops, operands: Operands, *, block_size: int, topk: int) -> Tensor:
    """Selection and attention, as a user calls them; an index branch is given only where it is not the default one."""
    given = {}
    if operands.index_key is not operands.key:
        given = {"index_query": operands.index_query, "index_key": operands.index_key}
    is_causal = operands.query.shape[2] > 1
    return ops.whole(
        operands.query,
        operands.key,
        operands.value,
        is_causal=is_causal,
        block_size=block_size,
        topk_blocks=topk,
        **given,
    )


def check_gradients(
    ops: Ops, *, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device, block_size: int
) -> Verdict:
    """Gradients of a short call, against autograd through masked dense attention in float64."""
    length = 4 * block_size + block_size // 3 + 1
    operands = make_operands(heads=heads, length=length, queries=length, dtype=dtype, device=device)
    ids = ops.select(operands.index_query, operands.index_key, block_size=block_size, topk=2)
    leaves = [tensor.clone().requires_grad_() for tensor in (operands.query, operands.key, operands.value)]
    output = ops.whole(*leaves, is_causal=True, block_size=block_size, topk_blocks=2)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(device=device, dtype=dtype)
    found = torch.autograd.grad(output, leaves, weight)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(
        _attend_masked(doubles[0], doubles[1], doubles[2], ids, block_size), doubles, weight.double()
    )
    errors = {name: relative_error(a, b) for name, a, b in zip("qkv", found, expected, strict=True)}
    wrong = [f"gradient of {name} differs by {e:.1e}" for name, e in errors.items() if not e <= TOLERANCE[dtype]]
    return Verdict(tuple(wrong), max(errors.values()))


def all_green(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict of several."""
    several = list(verdicts)
    return Verdict(tuple(said for one in several for said in one.complaints), max(one.error for one in several))
