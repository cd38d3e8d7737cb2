"""Compare what an artifact computes with the program that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from msa_compile.errors import ExportMismatchError
from msa_compile.export.records import SparseProgram
from msa_compile.export.sample import Sample, samples

# Of the largest value of an output. Half precision rounds elsewhere, and may choose another of two equal blocks.
TOLERANCES = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
# Rows of an output that may be further off: two blocks can score alike to the last digit.
_TIES = 0.01


@dataclass(frozen=True)
class Checked:
    """What was compared and found equal, and what could not be."""

    checks: tuple[str, ...]
    not_checked: tuple[str, ...]


def compare(
    runtime: str, run: Callable[[Sample], Sequence[Tensor]], sparse: SparseProgram, block_size: int, budget: int
) -> Checked:
    """Compare at several sizes.

    Args:
        runtime: Its name.
        run: The flat outputs of the artifact.
        sparse: The program.
        block_size: Of the sparsified model.
        budget: Keys that a query attends to.

    Raises:
        ExportMismatchError: Some output differs, or nothing could be compared.
    """
    module = sparse.program.module(check_guards=False)
    wanted, left_out = samples(sparse, block_size, budget)
    chosen, equal = [], []
    for sample in wanted:
        try:
            with torch.no_grad():
                expected = pytree.tree_leaves(module(*sample.args, **sample.kwargs))
        except Exception as error:
            # Sizes of a model of the user's own may belong together in a way that only it knows.
            left_out = (*left_out, f"{sample}: the model does not take it ({first_line(error)})")
            continue
        chosen.append(sample)
        equal.append(_compare(runtime, sparse, sample, expected, run(sample)))
    if not chosen:
        raise ExportMismatchError(
            f"nothing could be compared between {runtime} and PyTorch: {'; '.join(left_out)}. Nothing was written. "
            "Give dynamic_shapes whose sizes go together."
        )
    done = f"{runtime} on a CPU equals PyTorch at " + "; ".join(
        f"{sample} ({worst:.0e} of the largest value)" for sample, worst in zip(chosen, equal, strict=True)
    )
    return Checked((done,), left_out)


def _compare(
    runtime: str, sparse: SparseProgram, sample: Sample, expected: Sequence[Tensor], found: Sequence[Tensor]
) -> float:
    worst = 0.0
    for port, ours, theirs in zip(sparse.outputs, expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise ExportMismatchError(
                f"{port.name} is {list(theirs.shape)} in {runtime}, {list(ours.shape)} in PyTorch"
            )
        worst = max(worst, _difference(runtime, port.name, port.dtype, ours, theirs, sample))
    return worst


def _difference(runtime: str, name: str, dtype: str, ours: Tensor, theirs: Tensor, sample: Sample) -> float:
    if not ours.dtype.is_floating_point:
        if not torch.equal(ours.cpu(), theirs):
            raise ExportMismatchError(f"{name} differs between {runtime} and PyTorch at {sample}")
        return 0.0
    gap = (ours.cpu().double() - theirs.double()).abs()
    scale = max(float(ours.abs().max()), 1.0) if ours.numel() else 1.0
    rows = gap.flatten(0, -2).amax(-1) if gap.dim() > 1 and gap.numel() else gap.flatten()
    off = rows > TOLERANCES[dtype] * scale
    if not bool(torch.isfinite(rows).all()) or float(off.sum()) > _TIES * len(off):
        raise ExportMismatchError(
            f"{name} is {float(gap.max()):.1e} apart between {runtime} and PyTorch at {sample}, of values up to "
            f"{scale:.1e}; {int(off.sum())} of {len(off)} rows are off. Nothing was written. "
            "This is a bug of msa_compile."
        )
    return float(gap.max()) / scale if gap.numel() else 0.0


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
