"""Every kernel against float64 on the device itself: heads, dtypes, blocks, bounds, poison; graphs and waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.loss import compare_loss
from benchmarks.speed.gate import TOLERANCE
from msa_compile.kernels.block_sparse_attention import cuda as attention_cuda
from msa_compile.kernels.block_sparse_attention import reference as attention_reference
from msa_compile.kernels.block_sparse_attention.reference import Gradients
from msa_compile.kernels.index_loss import triton as loss_kernels
from msa_compile.kernels.index_loss.align_loss import AlignSums, Support
from msa_compile.kernels.select_blocks import reference as selection_reference
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3, to_e4m3
from msa_compile.kernels.triton_support import why_no_e4m3


def _attend_by_blocks(*tensors: Tensor, **options: Any) -> Tensor:
    return attention_cuda.block_sparse_attention(*tensors, order="blocks", **options)


@dataclass(frozen=True)
class Ops:
    """The functions under test: those of the package, or what runs behind them on a CUDA device.

    Attributes:
        select, attend: The two ops; many queries go by tiles or by blocks, as shapes say.
        attend_by_blocks: The same with blocks outside, wherever that order can run.
        differentiate: The backward of ``attend``; it is given the gradient of the output first.
        align: The sums of the index loss.
    """

    select: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    attend_by_blocks: Callable[..., Tensor] = _attend_by_blocks
    differentiate: Callable[..., Gradients] = attention_cuda.block_sparse_attention_backward
    align: Callable[..., AlignSums] = loss_kernels.align_sums


@dataclass(frozen=True)
class Check:
    """One call of each op.

    Attributes:
        name: Said when it fails.
        heads: ``Hq, Hkv, D``.
        queries, keys: ``Tq``, ``Tk``; scaled down in a dry run, and blocks too.
        dtype: Of all tensors.
        block_size, topk: Keys in a block, blocks a query.
        is_shared: One index key for all groups.
        has: Names of what bounds the slots, and of ``sinks``, ``softcap`` and ``window``.
        candidates: Blocks a query that are scored again, where scores are fp8.
        has_bytes: Index keys are bytes of e4m3.
        is_whole: The other order, the gradients and the index loss too; not everywhere, for each is some kernels more
            to compile.
    """

    name: str
    heads: tuple[int, int, int]
    queries: int
    keys: int
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 128
    topk: int = 4
    is_shared: bool = True
    has: frozenset[str] = field(default_factory=frozenset)
    is_whole: bool = False
    candidates: int = 0
    has_bytes: bool = False


_BOUNDS = frozenset({"query_start", "key_start", "key_end", "document_start", "mask"})
_LOGITS = frozenset({"sinks", "softcap", "window"})

_WHOLE = ("prefill", torch.bfloat16)

CHECKS = (
    *(
        Check(f"{kind}, {dtype}, {heads}", heads, queries, 1031, dtype, is_whole=(kind, dtype) == _WHOLE)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for heads in ((64, 4, 128), (32, 8, 128))
        for kind, queries in (("prefill", 1031), ("decode", 1))
    ),
    Check("1 head a group, D 64", (4, 4, 64), 700, 700, is_shared=False, is_whole=True),
    Check("2 heads a group, D 256", (4, 2, 256), 700, 700, is_whole=True),
    Check("5 heads a group, D 96, blocks of 64", (10, 2, 96), 700, 700, block_size=64),
    Check("8 heads a group, blocks of 32", (16, 2, 64), 700, 700, block_size=32, topk=8, is_whole=True),
    Check("blocks of 100", (8, 2, 64), 700, 700, block_size=100),
    Check("three new tokens", (32, 8, 128), 3, 1031, is_shared=False),
    Check("sixteen new tokens", (32, 8, 128), 16, 1031),
    Check("float32, gradients", (8, 2, 64), 300, 500, torch.float32, block_size=32, is_whole=True),
    Check("a chunk of a prompt", (32, 8, 128), 300, 1031),
    Check("logits", (16, 2, 128), 500, 500, has=_LOGITS, is_whole=True),
    # Long enough that one kernel scores and chooses.
    Check("chosen where it is scored", (4, 4, 128), 4500, 4500, topk=16),
    Check("chosen where it is scored, a chunk", (4, 4, 64), 4300, 4500, topk=9, has=frozenset({"query_start"})),
    Check("fp8 scores", (64, 4, 128), 1031, 1031, candidates=6),
    Check("fp8 scores, keys of their own", (4, 4, 64), 700, 700, block_size=32, is_shared=False, candidates=6),
    Check("fp8 scores, everything", (16, 2, 64), 300, 700, has=_BOUNDS, block_size=64, candidates=5),
    Check("fp8 index keys, prefill", (32, 8, 128), 300, 1031, has_bytes=True),
    Check("fp8 index keys, decode", (64, 4, 128), 1, 1031, has_bytes=True),
    Check("fp8 index keys, everything", (16, 2, 64), 3, 700, has=_BOUNDS, block_size=64, has_bytes=True),
    Check("ragged rows", (16, 2, 128), 500, 500, has=frozenset({"key_start", "key_end"}), is_whole=True),
    Check("documents", (16, 2, 128), 500, 500, has=frozenset({"document_start"}), is_whole=True),
    Check("mask", (16, 2, 128), 500, 500, has=frozenset({"mask"})),
    Check("everything", (16, 2, 64), 300, 700, has=_BOUNDS | _LOGITS, block_size=64, is_whole=True),
    Check("everything, few queries", (16, 2, 64), 3, 700, has=_BOUNDS | _LOGITS, block_size=64),
)


def run_checks(ops: Ops, device: torch.device, *, shrink: int = 1) -> Iterator[tuple[str, str]]:
    """Give the name of each check and what is wrong, the empty text if nothing is; lengths are divided by `shrink`."""
    for check in CHECKS:
        if check.candidates and why_no_e4m3(device):
            continue
        yield check.name, _run(ops, check, device, shrink)
    yield "values that are not finite", _check_poison(ops, device)
    yield "two runs give the same bits", _check_bits(ops, device, shrink)
    if device.type == "cuda":
        yield "nothing waits for the device", _check_no_wait(ops, device)
        yield "a CUDA graph gives the same bits", _check_graph(ops, device)


@dataclass(frozen=True)
class _Inputs:
    tensors: dict[str, Tensor]
    choose: dict[str, Any]
    attend: dict[str, Any]
    bounds: dict[str, Any]


def _make(check: Check, device: torch.device, shrink: int) -> _Inputs:
    batch, (heads, groups, dim) = 2, check.heads
    queries, keys = max(1, check.queries // shrink), max(8, check.keys // shrink)
    rng = torch.Generator().manual_seed(0)

    def normal(count: int, tokens: int) -> Tensor:
        return torch.randn(batch, count, tokens, dim, generator=rng).to(device, check.dtype)

    def integers(count: int, tokens: int) -> Tensor:
        # Scores are exact in any order of summation, so that ids can be compared as they are, and ties are frequent.
        return torch.randint(-2, 3, (batch, count, tokens, dim), generator=rng).to(device, check.dtype)

    slot = torch.arange(keys)
    first, last = torch.tensor([keys // 9, 0]), torch.tensor([keys, keys - keys // 7])
    possible = {
        "query_start": torch.tensor([keys - queries, (keys - queries) // 2]),
        "key_start": first,
        "key_end": last,
        "document_start": torch.where(torch.arange(queries) < queries // 3, 0, keys // 5).expand(batch, queries),
        "mask": torch.rand(batch, 1, queries, keys, generator=rng) > 0.2,
    }
    bounds: dict[str, Any] = {name: value.to(device) for name, value in possible.items() if name in check.has}
    logits: dict[str, Any] = {"sinks": torch.randn(heads, generator=rng).to(device), "softcap": 5.0}
    logits["window"] = keys // 2
    tensors = {
        "query": normal(heads, queries),
        "key": normal(groups, keys),
        "value": normal(groups, keys),
        "index_query": integers(groups, queries),
        "index_key": integers(1 if check.is_shared else groups, keys),
    }
    outside = torch.zeros(batch, keys, dtype=torch.bool)
    if "key_start" in check.has:
        outside |= slot < first[:, None]
    if "key_end" in check.has:
        outside |= slot >= last[:, None]
    for name in ("key", "value", "index_key"):
        tensors[name] = tensors[name].masked_fill(outside.to(device)[:, None, :, None], float("nan"))
    if check.has_bytes:
        tensors["index_key"] = to_e4m3(tensors["index_key"])
    return _Inputs(
        tensors,
        {"block_size": max(4, check.block_size // shrink), "topk": check.topk, "candidates": check.candidates},
        {name: value for name, value in logits.items() if name in check.has},
        bounds,
    )


def _run(ops: Ops, check: Check, device: torch.device, shrink: int) -> str:
    inputs = _make(check, device, shrink)
    size, tensors = inputs.choose["block_size"], inputs.tensors
    ids, output = _both(ops, inputs)
    doubles = {name: _in_float64(tensor) for name, tensor in tensors.items()}
    expected_ids = selection_reference.select_blocks(
        doubles["index_query"], doubles["index_key"], **inputs.choose, **inputs.bounds
    )
    if not torch.equal(ids, expected_ids):
        return f"{int((ids != expected_ids).any(-1).sum())} of {ids[..., 0].numel()} queries have other blocks"
    operands = (tensors["query"], tensors["key"], tensors["value"], ids)
    options = {"block_size": size, **inputs.attend, **inputs.bounds}
    exact = (doubles["query"], doubles["key"], doubles["value"], ids)
    expected = attention_reference.block_sparse_attention(*exact, **options)
    said = _compare(output, expected, TOLERANCE[check.dtype])
    if said or not check.is_whole:
        return said
    said = _compare(ops.attend_by_blocks(*operands, **options), expected, TOLERANCE[check.dtype])
    if said:
        return f"with blocks outside: {said}"
    said = _compare_gradients(ops, operands, exact, options, TOLERANCE[check.dtype])
    return said or compare_loss(ops.align, tensors, ids, options)


def _in_float64(tensor: Tensor) -> Tensor:
    return from_e4m3(tensor, torch.float64) if tensor.dtype == torch.uint8 else tensor.double()


def _compare(output: Tensor, expected: Tensor, tolerance: float) -> str:
    size_of_rows = expected.norm(dim=-1)
    error = (output.double() - expected).norm(dim=-1)
    if bool((error[size_of_rows == 0] != 0).any()):
        return "a query that sees nothing does not give zeros"
    worst = float((error / size_of_rows.clamp(min=1e-30)).max())
    # Not "worst > tolerance": a NaN is wrong too.
    return "" if worst <= tolerance else f"relative error {worst:.1e} above {tolerance:.0e}"


def _compare_gradients(
    ops: Ops,
    operands: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    options: dict[str, Any],
    tolerance: float,
) -> str:
    """Compare each gradient as a whole, as its rows are sums of many sizes; what no query sees has to get 0."""
    grad = torch.randn(operands[0].shape, generator=torch.Generator().manual_seed(1)).to(operands[0])
    found = ops.differentiate(grad, *operands, **options)
    expected = attention_reference.block_sparse_attention_backward(grad.double(), *exact, **options)
    for name, one, other in zip(Gradients._fields, found, expected, strict=True):
        if one is None or other is None:  # no sinks
            continue
        if not bool((one.double()[other == 0].abs() <= tolerance).all()):
            return f"gradient of {name} where there is none"
        error = float((one.double() - other).norm() / other.norm())
        if not error <= tolerance:
            return f"gradient of {name}: relative error {error:.1e} above {tolerance:.0e}"
    return ""


def _both(ops: Ops, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    tensors = inputs.tensors
    ids = ops.select(tensors["index_query"], tensors["index_key"], **inputs.choose, **inputs.bounds)
    output = ops.attend(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        ids,
        block_size=inputs.choose["block_size"],
        **inputs.attend,
        **inputs.bounds,
    )
    return ids, output


def _check_poison(ops: Ops, device: torch.device) -> str:
    """A value that is not finite reaches those who see it and nobody else, though they share a tile."""
    inputs = _make(Check("poison", (4, 1, 64), 40, 40, block_size=8, topk=2), device, 1)
    _, before = _both(ops, inputs)
    for name in ("key", "value", "index_key"):
        inputs.tensors[name][:, :, 20:] = float("nan")
    _, after = _both(ops, inputs)
    if not torch.equal(after[:, :, :20], before[:, :, :20]):
        return "NaN in later tokens reaches earlier ones"
    return "" if bool(after[:, :, 20:].isnan().all()) else "NaN in a token does not reach it"


def _check_bits(ops: Ops, device: torch.device, shrink: int) -> str:
    inputs = _make(Check("bits", (8, 1, 128), 500, 500), device, shrink)
    first, second = _all_of(ops, inputs), _all_of(ops, inputs)
    return "" if all(map(torch.equal, first, second)) else "two runs differ"


def _all_of(ops: Ops, inputs: _Inputs) -> list[Tensor]:
    """What is selected, what comes out in either order, the gradients, and the sums of the index loss."""
    ids, output = _both(ops, inputs)
    operands = (inputs.tensors["query"], inputs.tensors["key"], inputs.tensors["value"], ids)
    options = {"block_size": inputs.choose["block_size"], **inputs.attend, **inputs.bounds}
    gradients = ops.differentiate(output, *operands, **options)
    by_blocks = ops.attend_by_blocks(*operands, **options)
    support = Support(block_ids=ids, block_size=options["block_size"], **inputs.bounds)
    sums = ops.align(*(inputs.tensors[name] for name in ("index_query", "index_key", "query", "key")), support)
    return [ids, output, by_blocks, *(one for one in (*gradients, *sums) if one is not None)]


def _few_and_many(device: torch.device) -> list[_Inputs]:
    return [
        _make(Check("few and many", (32, 8, 128), queries, 1031, has=_BOUNDS | _LOGITS), device, 1)
        for queries in (1, 400)
    ]


def _check_no_wait(ops: Ops, device: torch.device) -> str:
    several = _few_and_many(device)
    for inputs in several:  # compiled before, which may wait
        _all_of(ops, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs in several:
            _all_of(ops, inputs)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _check_graph(ops: Ops, device: torch.device) -> str:
    for inputs in _few_and_many(device):
        _all_of(ops, inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _all_of(ops, inputs)
        # Other numbers at the same places: what is replayed has to read them.
        for name, tensor in inputs.tensors.items():
            tensor.copy_(tensor.flip(-1) if name.startswith("index") else -tensor)
        graph.replay()
        if not all(map(torch.equal, captured, _all_of(ops, inputs))):
            return f"a replay with {inputs.tensors['query'].shape[2]} queries differs from a call"
    return ""
