"""Rows of the tables: what each kernel takes, alone and together, against the dense attention that PyTorch has."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed import setting as work_of
from benchmarks.speed.gate import Operands, check_rows
from benchmarks.speed.roofline import Roofline
from benchmarks.speed.setting import Setting, Work
from msa_compile.kernels.block_sparse_attention import triton as attention
from msa_compile.kernels.chip import chip_of
from msa_compile.kernels.launch import Launch
from msa_compile.kernels.select_blocks import triton as selection
from msa_compile.kernels.select_blocks.e4m3 import from_e4m3, to_e4m3
from msa_compile.kernels.stopwatch import seconds_of

# Neighbours whose index queries are alike, in a correlated selection, and how much of a query is its own.
_ALIKE, _OWN = 256, 0.3
# Queries of which the dense time of a long prompt is measured, and the prompt from which on it is.
_SAMPLED, _LONGEST_DENSE = 8192, 160 * 1024
_ORDERS = ("tiles", "blocks")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
# Larger than the L2 cache of any chip that we know.
_FLUSHED = 256 << 20


@dataclass(frozen=True)
class Row:
    """One measured call, selection included.

    Attributes:
        case: ``"prefill"``, ``"decode"``, ``"backward"`` or ``"index loss"``.
        heads: ``"Hq,Hkv,D"``.
        length, batch: Tokens of the key cache, rows.
        selection: ``"random"`` or ``"correlated"``; of the index loss also ``"all keys"``.
        indexer: ``"learned"`` (one index key) or ``"keys"``, and what is fp8: scores, or index keys.
        gate: ``"green ..."``, or what was found wrong.
        blocks_a_tile: Mean number of different blocks of a tile of queries; ``None`` in decode.
        queries_a_tile: How many queries that is of.
        kernels: Seconds of each kernel, of all its launches.
        orders: Seconds of attention with tiles and with blocks outside, whichever the shape chooses, and of a selection
            in two kernels where one does it; prefill only.
        seconds: Of the whole call; ``graph_seconds`` of the same as a CUDA graph.
        dense: Seconds of dense attention by backend, as called or as a graph, as the sparse call.
        is_dense_sampled: Whether that was scaled up from some of the queries.
        speed_up: Fastest dense over sparse, both as graphs in decode.
        roofline_share: Least possible time under the rates measured here over the time taken.
        flops_per_second, bytes_per_second: Of the work that has to be done.
    """

    case: str
    heads: str
    length: int
    batch: int
    selection: str
    indexer: str
    gate: str
    blocks_a_tile: float | None
    queries_a_tile: int
    kernels: Mapping[str, float]
    orders: Mapping[str, float]
    seconds: float
    graph_seconds: float | None
    dense: Mapping[str, float]
    is_dense_sampled: bool
    speed_up: float | None
    roofline_share: float
    flops_per_second: float
    bytes_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Wanted:
    """A row to measure; see ``Row``.

    With ``candidates`` scores are fp8, and so many blocks are scored again; with ``has_bytes`` index keys are fp8.
    """

    case: str
    heads: tuple[int, int, int]
    length: int
    selection: str = "random"
    indexer: str = "learned"
    batch: int = 1
    candidates: int = 0
    has_bytes: bool = False


def measure(wanted: Wanted, device: torch.device, roofline: Roofline, *, block_size: int = 128, topk: int = 16) -> Row:
    """Measure one row; the gate compares blocks and outputs of sampled queries with float64 at this very length."""
    is_decode = wanted.case == "decode"
    setting = Setting(*wanted.heads, "bf16", device, 1, block_size, topk)
    operands = make_operands(wanted, setting, 1 if is_decode else wanted.length)
    ids = torch.empty(*operands.index_query.shape[:3], topk, dtype=torch.int32, device=device)
    output = torch.empty_like(operands.query)
    launches = [
        *selection_launches(operands, ids, block_size, wanted.candidates),
        *_attention(operands, ids, output, block_size),
    ]
    call = partial(_run, launches)
    call()
    of_first_row = Operands(*(getattr(operands, name)[:1] for name in Operands.__dataclass_fields__))
    if wanted.has_bytes:
        of_first_row = replace(of_first_row, index_key=from_e4m3(of_first_row.index_key, torch.float64))
    verdict = check_rows(of_first_row, ids[:1], output[:1], block_size=block_size, topk=topk)
    blocks_a_tile, queries_a_tile = _union(launches)
    time = Stopwatch(device)
    kernels = time_kernels(launches, time)
    orders = {} if is_decode else {order: _time_order(operands, ids, block_size, order, time) for order in _ORDERS}
    if "score_and_choose" in kernels:
        apart = selection_launches(operands, torch.empty_like(ids), block_size, fuses=False)
        orders = {**orders, "selection apart": time.of(partial(_run, apart))}
    seconds = time.of(call)
    as_graph = time.of_graph(call) if is_decode else None
    is_sampled = not is_decode and wanted.length > _LONGEST_DENSE
    dense = _time_dense(operands, time, is_decode=is_decode, is_sampled=is_sampled)
    work = _work(setting, wanted)
    taken = seconds if as_graph is None else as_graph
    return Row(
        case=wanted.case,
        heads=setting.heads,
        length=wanted.length,
        batch=wanted.batch,
        selection=wanted.selection,
        indexer=wanted.indexer + ", fp8 scores" * bool(wanted.candidates) + ", fp8 keys" * wanted.has_bytes,
        gate=str(verdict),
        blocks_a_tile=blocks_a_tile,
        queries_a_tile=queries_a_tile,
        kernels=kernels,
        orders=orders,
        seconds=seconds,
        graph_seconds=as_graph,
        dense=dense,
        is_dense_sampled=is_sampled,
        speed_up=min(dense.values()) / taken if dense and verdict.is_green else None,
        roofline_share=roofline.seconds(work) / taken,
        flops_per_second=work.flops / taken,
        bytes_per_second=work.bytes / taken,
    )


def time_kernels(launches: list[Launch], time: Stopwatch) -> dict[str, float]:
    """Time the launches of each kernel, in the order in which kernels first appear."""
    found = {}
    for name in dict.fromkeys(launch.kernel.__name__ for launch in launches):
        own = [launch for launch in launches if launch.kernel.__name__ == name]
        found[name] = time.of(partial(_run, own))
    return found


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def _time_order(operands: Operands, ids: Tensor, block_size: int, order: str, time: Stopwatch) -> float:
    """Time attention alone in one order; what it holds is freed afterwards."""
    launches = _attention(operands, ids, torch.empty_like(operands.query), block_size, order)
    return time.of(partial(_run, launches))


class Stopwatch:
    """Median seconds of a call with a cold L2 cache, after a first call that is not counted."""

    def __init__(self, device: torch.device, most: int = 20, seconds: float = 1.0) -> None:
        self.device, self.most = device, most
        # Interpreted, a call takes a second and says nothing of speed: once is enough.
        self.least, self.seconds = (3, seconds) if device.type == "cuda" else (1, 0.0)
        self.flushed = torch.empty(_FLUSHED if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def of(self, call: Callable[[], object]) -> float:
        """Time a call."""
        call()
        taken: list[float] = []
        while len(taken) < self.least or (len(taken) < self.most and sum(taken) < self.seconds):
            self.flushed.zero_()
            taken.append(seconds_of(call, self.device))
        return statistics.median(taken)

    def of_graph(self, call: Callable[[], object]) -> float:
        """Time a call as a CUDA graph, without what the host does; elsewhere the call itself."""
        if self.device.type != "cuda":
            return self.of(call)
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.of(graph.replay)


def make_operands(wanted: Wanted, setting: Setting, queries: int) -> Operands:
    """Make the tensors of a row, random or with neighbours that are alike."""
    heads, groups, dim = wanted.heads
    generator = torch.Generator(setting.device).manual_seed(0)

    def random(count: int, tokens: int) -> Tensor:
        made = torch.empty(wanted.batch, count, tokens, dim, dtype=setting.dtype, device=setting.device)
        return made.normal_(generator=generator)

    query, key, value = random(heads, queries), random(groups, wanted.length), random(groups, wanted.length)
    index_key = random(1, wanted.length) if wanted.indexer == "learned" else key
    index_query = random(groups, queries)
    if wanted.selection == "correlated":
        common = random(groups, -(-queries // _ALIKE)).repeat_interleave(_ALIKE, 2)[:, :, :queries]
        index_query.mul_(_OWN).add_(common)
    return Operands(query, key, value, index_query, to_e4m3(index_key) if wanted.has_bytes else index_key)


def bare_options(block_size: int, device: torch.device) -> dict[str, Any]:
    """Return the options that both families of launches take: a causal prompt and nothing else."""
    bounds: dict[str, Any] = dict.fromkeys(("query_start", "key_start", "key_end", "document_start", "mask"))
    return {**bounds, "block_size": block_size, "is_causal": True, "chip": chip_of(device)}


def selection_launches(
    operands: Operands, ids: Tensor, block_size: int, candidates: int = 0, *, fuses: bool = True
) -> list[Launch]:
    """Return the launches that write ``ids``."""
    queries, keys = operands.index_query, operands.index_key
    common = {**bare_options(block_size, ids.device), "candidates": candidates, "fuses": fuses}
    return list(selection.find_launches(queries, keys, ids, local_blocks=1, sink_blocks=0, **common))


def _attention(
    operands: Operands, ids: Tensor, output: Tensor, block_size: int, order: str | None = None
) -> list[Launch]:
    of_logits: dict[str, Any] = dict.fromkeys(("scale", "softcap", "sinks", "window"))
    common = {**of_logits, **bare_options(block_size, ids.device), "order": order}
    return list(attention.find_launches(operands.query, operands.key, operands.value, ids, output, **common))


def _union(launches: list[Launch]) -> tuple[float | None, int]:
    """Mean number of blocks that a tile of queries lists, and its queries; of the last chunk."""
    lists = [launch for launch in launches if launch.kernel.__name__ == "list_blocks"]
    if not lists:
        return None, 1
    tiles, rows, _ = lists[-1].grid
    counts = lists[-1].arguments["counts"].view(-1)[: tiles * rows]
    return float(counts.double().mean()), lists[-1].tile.sizes["QUERIES"]


def _time_dense(operands: Operands, time: Stopwatch, *, is_decode: bool, is_sampled: bool) -> dict[str, float]:
    """Seconds of dense attention by the backends that take the call."""
    query, key, value = operands.query, operands.key, operands.value
    scaled_by = 1.0
    if is_sampled:
        # The last queries see every key; of all queries together, a key is seen by half of them.
        scaled_by = query.shape[2] / _SAMPLED / 2
        query = query[:, :, -_SAMPLED:]
    if is_decode:
        # The heads of a group as queries of one head, which is faster where a backend would repeat keys.
        query = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
    found = {}
    backends = BACKENDS if time.device.type == "cuda" else {"math": SDPBackend.MATH}
    for name, backend in backends.items():

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=not (is_decode or is_sampled), enable_gqa=not is_decode
                )

        try:
            found[name] = scaled_by * (time.of_graph(dense) if is_decode else time.of(dense))
        except RuntimeError:  # not every backend takes every shape; those that do are compared
            continue
    return found


def _work(setting: Setting, wanted: Wanted) -> Work:
    if wanted.case == "prefill":
        one = work_of.sparse_prefill(setting, wanted.length)
    else:
        index_heads = 1.0 if wanted.indexer == "learned" else float(setting.key_value_heads)
        index_heads /= 2 if wanted.has_bytes else 1
        one = work_of.sparse_decode(setting, wanted.length, index_heads)
    return Work(wanted.batch * one.flops, wanted.batch * one.bytes)
