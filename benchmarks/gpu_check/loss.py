"""The index loss on a GPU: compared with float64, and rows of what each of its kernels takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.timing import Row, Stopwatch, Wanted, make_operands, selection_launches, time_kernels
from benchmarks.speed.gate import TOLERANCE, Operands, Verdict
from benchmarks.speed.roofline import Roofline
from benchmarks.speed.setting import Setting, Work, attended_keys
from msa_compile.kernels.chip import chip_of
from msa_compile.kernels.index_loss import triton as loss
from msa_compile.kernels.index_loss.align_loss import AlignSums, Support, align_sums

# The supports of rows of the table that are not those of selected blocks; the second is what calibration begins with.
ALL, SELECT = "all keys", "all keys but forced ones"
# What that one leaves out, and the power of its teacher.
_LEFT_OUT: dict[str, Any] = {"local_blocks": 1, "sink_blocks": 1}
_POWER = 2.0
# Queries of each run that is compared with float64 at the length that is timed.
_COMPARED = 8


def compare_loss(
    align: Callable[..., AlignSums],
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    options: Mapping[str, Any],
) -> str:
    """Say what is wrong with the sums of a call, over each kind of support; the empty text if nothing is."""
    softcap = options.get("softcap")
    bounds = {name: value for name, value in options.items() if name not in ("softcap", "sinks", "block_size")}
    operands = (tensors["index_query"], tensors["index_key"], tensors["query"], tensors["key"])
    index_query, index_key, query, key = (operand.double() for operand in operands)
    tolerance = TOLERANCE[operands[0].dtype]
    everything = Support(block_size=options["block_size"], **bounds)
    for name, support, power in (
        (ALL, everything, 1.0),
        (SELECT, replace(everything, **_LEFT_OUT), _POWER),
        ("selected blocks", replace(everything, block_ids=ids), 1.0),
    ):
        found = align(*operands, support, softcap=softcap, power=power)
        expected = align_sums(index_query, index_key, query, key, support, softcap=softcap, power=power)
        if int(found.queries) != int(expected.queries):
            return f"index loss, {name}: {int(found.queries)} queries, there are {int(expected.queries)}"
        for part, one, other in zip(AlignSums._fields, found, expected, strict=True):
            assert one is not None, "gradients were asked for"
            assert other is not None, "gradients were asked for"
            error = float((one.double() - other).norm() / other.double().norm())
            if not error <= tolerance:
                return f"index loss, {name}, {part}: relative error {error:.1e} above {tolerance:.0e}"
    return ""


def measure_loss(
    wanted: Wanted, device: torch.device, roofline: Roofline, *, block_size: int = 128, topk: int = 16
) -> Row:
    """Measure the loss and its gradients of one prompt, over keys or over blocks, whose selection is not in it."""
    setting = Setting(*wanted.heads, "bf16", device, 1, block_size, topk)
    operands = make_operands(wanted, setting, wanted.length)
    support, power = Support(block_size=block_size), 1.0
    if wanted.selection == SELECT:
        support, power = replace(support, **_LEFT_OUT), _POWER
    elif wanted.selection != ALL:
        ids = torch.empty(*operands.index_query.shape[:3], topk, dtype=torch.int32, device=device)
        for launch in selection_launches(operands, ids, block_size):
            launch.run()
        support = replace(support, block_ids=ids)
    tensors = (operands.index_query, operands.index_key, operands.query, operands.key)
    sums = [torch.empty(tensor.shape[:3], device=device) for tensor in (tensors[0], tensors[2], tensors[0])]
    gradients = [torch.zeros(tensor.shape, device=device) for tensor in tensors[:2]]
    options: dict[str, Any] = dict.fromkeys(("index_scale", "scale", "softcap"))
    options |= {"power": power, "chip": chip_of(device)}
    launches = list(loss.find_launches(*tensors, support, *sums, *gradients, **options))

    def call() -> None:
        for launch in launches:
            launch.run()

    call()
    verdict = check_sums(operands, support, power, sums[0], *gradients)
    time = Stopwatch(device)
    seconds = time.of(call)
    pairs = wanted.length * (wanted.length + 1) // 2
    if support.block_ids is not None:
        pairs = attended_keys(wanted.length, block_size, topk)
    # The logits of teacher and student once, two products for the gradients, and every tensor once.
    flops = 2.0 * setting.head_dim * pairs * (setting.query_heads + 3 * setting.key_value_heads) * wanted.batch
    work = Work(flops, float(sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *gradients))))
    return Row(
        case=wanted.case,
        heads=setting.heads,
        length=wanted.length,
        batch=wanted.batch,
        selection=wanted.selection,
        indexer=wanted.indexer,
        gate=str(verdict),
        blocks_a_tile=None,
        queries_a_tile=1,
        kernels=time_kernels(launches, time),
        orders={},
        seconds=seconds,
        graph_seconds=None,
        dense={},
        is_dense_sampled=False,
        speed_up=None,
        roofline_share=roofline.seconds(work) / seconds,
        flops_per_second=work.flops / seconds,
        bytes_per_second=work.bytes / seconds,
    )


def check_sums(
    operands: Operands,
    support: Support,
    power: float,
    losses: Tensor,
    grad_index_query: Tensor,
    grad_index_key: Tensor,
) -> Verdict:
    """Check some queries with float64 at a length where no oracle can follow, and a sum that all are part of.

    ``<dK, K> = <dQ, Q>``, since both are the sum of differences of probabilities times scores; the two are computed
    apart.
    """
    tolerance = TOLERANCE[operands.query.dtype]
    length, groups = operands.query.shape[2], operands.key.shape[1]
    complaints, errors = [], []
    # The first that has something to compare.
    first = (support.local_blocks + support.sink_blocks) * (support.block_size or 0)
    for start in sorted({first, length // 2, length - _COMPARED}):
        rows = slice(start, start + _COMPARED)
        expected = align_sums(
            operands.index_query[:, :, rows].double(),
            operands.index_key.double(),
            operands.query[:, :, rows].double(),
            operands.key.double(),
            replace(
                support,
                block_ids=None if support.block_ids is None else support.block_ids[:, :, rows],
                query_start=torch.full((operands.query.shape[0],), start, device=operands.query.device),
            ),
            power=power,
        )
        assert expected.grad_index_query is not None, "gradients were asked for"
        error = float((losses[:, :, rows].sum() / groups - expected.loss).abs() / expected.loss)
        found = grad_index_query[:, :, rows].double()
        of_gradient = float((found - expected.grad_index_query).norm() / expected.grad_index_query.norm())
        if not max(error, of_gradient) <= tolerance:
            complaints.append(f"queries from {start}: loss by {error:.1e}, gradient by {of_gradient:.1e}")
        errors += [error, of_gradient]
    of_queries = (grad_index_query.double() * operands.index_query.double()).sum()
    products = grad_index_key.double() * operands.index_key.double()
    of_keys = float((of_queries - products.sum()).abs() / products.norm())
    if not of_keys <= tolerance:
        complaints.append(f"gradients of index keys and of index queries differ by {of_keys:.1e}")
    return Verdict(tuple(complaints), max(*errors, of_keys))
